"""Find the data sets that a recipe names: local files and folders, and repositories of the Hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import datasets
import pyarrow as pa
import yaml
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError

from canvastune.config.data import DataConfig, SourceFields
from canvastune.config.places import DATA_SUFFIXES, is_path, refuse_address, refuse_missing
from canvastune.errors import UserError, one_line
from canvastune.io.hashing import hash_path
from canvastune.preparation.json_document import ReadLimits
from canvastune.preparation.readers import Row, read_file
from canvastune.preparation.tables import read_dataset

logger = logging.getLogger(__name__)

_LIMITS = ReadLimits()
_TRAIN_WORDS = frozenset({"train", "training"})
_HELD_OUT_WORDS = frozenset({"test", "testing", "validation", "valid", "val", "dev", "eval"})
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # as `save_to_disk` writes them
_INDEX = "dataset_info.json"  # of LLaMA-Factory; `save_to_disk` writes another file of this name
# What to do with other files: {file} is the path, {stem} its name without the suffix.
_UNPACK = "Unpack it, and use the data files inside."
_WITH_PANDAS = (
    "Convert it: python -c \"import pandas; pandas.{read}('{file}').to_json('{stem}.jsonl',"
    " orient='records', lines=True)\"."
)
_CONVERSIONS = {
    ".ndjson": "Rename it to {stem}.jsonl.",
    ".jsonlines": "Rename it to {stem}.jsonl.",
    ".zst": "Decompress it: zstd -d {file}.",
    ".bz2": "Decompress it: bunzip2 -k {file}.",
    ".xz": "Decompress it: unxz -k {file}.",
    ".zip": _UNPACK,
    ".tar": _UNPACK,
    ".tgz": _UNPACK,
    ".7z": _UNPACK,
    ".xlsx": "Save the sheet as CSV (UTF-8).",
    ".xls": "Save the sheet as CSV (UTF-8).",
    ".ods": "Save the sheet as CSV (UTF-8).",
    ".feather": _WITH_PANDAS.replace("{read}", "read_feather"),
    ".orc": _WITH_PANDAS.replace("{read}", "read_orc"),
    ".pkl": _WITH_PANDAS.replace("{read}", "read_pickle"),
    ".pickle": _WITH_PANDAS.replace("{read}", "read_pickle"),
    ".txt": 'Write one JSON object per row, such as {{"prompt": ..., "response": ...}}, to a'
    " .jsonl file.",
}
_OTHER = "Convert it to .jsonl, .csv or .parquet, with named columns."


@dataclass(frozen=True)
class Source:
    """An opened data set. `path` is the local file or folder, None for the Hub."""

    label: str
    path: Path | None
    _parts: tuple[tuple[str, str, Any], ...]  # (file, name, Path or datasets.Dataset)

    def rows(self, limits: ReadLimits = _LIMITS, source: int = 0) -> Generator[Row, None, None]:
        """Read every row in order, with a few hundred of them in memory.

        Args:
            source: index of this data set, for its rows.

        Raises:
            UserError: a file that cannot be read completely; names the file, the row reached and
                the reason.
        """
        for file, name, part in self._parts:
            is_table = isinstance(part, datasets.Dataset)
            read = read_dataset(file, part) if is_table else read_file(file, part, limits)
            empty = True
            for number, value, problem in read:
                empty = False
                yield Row(file, name, number, value, problem, source)
            if empty:
                raise UserError(
                    f"{file}: has no rows, expected at least one",
                    hint="Use a file with rows, or remove this one from the folder.",
                )


@dataclass(frozen=True)
class OpenedSource:
    """A data set that a recipe reads, and its use."""

    source: Source
    config: DataConfig  # with it as the only source
    weight: float  # of the training examples; 0 if they are all held out

    @property
    def held_out(self) -> bool:
        """Whether all rows are held out."""
        return self.weight == 0


def open_sources(config: DataConfig) -> list[OpenedSource]:
    """Open every data set that a recipe names; those of `data.validation` come first.

    Raises:
        UserError: as `open_source`; names the key.
    """
    opened = []
    if config.validation is not None:
        refuse_address("data.validation", config.validation)
    for each in config.validation_sources:
        source = open_source(each, "data.validation", config.validation)
        opened.append(OpenedSource(source, config.only(each), 0.0))
    for key, each in config.source_keys.items():
        if key != "data.validation":
            opened.append(OpenedSource(open_source(each, key), config.only(each), each.weight))
    return opened


def open_source(
    config: SourceFields, key: str = "data.source", validation: str | None = None
) -> Source:
    """Find one data set: a local file, a folder of files, a folder that `save_to_disk` wrote, a
    local data set repository, or the Hub.

    A folder whose README.md describes configurations (the Hub's layout) is read as the Hub reads
    it, with `config.config` and `config.split`; from any other folder, all data files below it are
    read in the order of their names.

    Args:
        key: of the recipe, for messages.
        validation: what `data.validation` says, if these rows are held out: a path, or a split,
            which the data set must then have.

    Raises:
        UserError: no such file, data set or split, an unsupported file type, an address, a folder
            that mixes splits.
    """
    text = config.source or ""
    refuse_address(key, text)
    path = Path(text).expanduser()
    split_wanted = validation is not None and not is_path(validation)
    if path.is_dir() and _is_repository(path):
        return _open_repository(config, str(path), path, key)
    if (path / _SAVED_SPLITS).is_file():
        return _open_saved_splits(config, path, key)
    if path.exists() and split_wanted:
        kind = "folder of files" if path.is_dir() else "file"
        raise UserError(
            f"data.validation: {validation!r} would be a split of {path}, a {kind}, which has"
            " no splits",
            hint=f"Name a file or folder by its path, such as ./{validation}.",
        )
    if path.exists():
        for name in ("config", "revision"):
            if (value := getattr(config, name)) is not None:
                logger.info(
                    f"prepare_data: {key}: {text} is on this machine: {name} {value!r} is not used"
                )
    if path.is_dir():
        return _open_saved(path, key) if (path / _SAVED).is_file() else _open_folder(path, key)
    if path.is_file():
        if not path.name.endswith(DATA_SUFFIXES):
            raise UserError(
                f"{key}: {path}: unsupported file type, expected one of {', '.join(DATA_SUFFIXES)}",
                hint=_conversion(path),
            )
        return Source(str(path), path, ((str(path), path.name, path),))
    refuse_missing(key, text, "" if key == "data.validation" else "data set")
    return _open_repository(config, text, None, key)


def _conversion(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    suffix = next((each for each in _CONVERSIONS if name.lower().endswith(each)), None)
    if suffix is None:
        return _OTHER
    stem = name[: -len(suffix)]
    return _CONVERSIONS[suffix].format(file=path, stem=stem)


def _open_folder(folder: Path, key: str) -> Source:
    every = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    saved = [path.parent for path in every if path.name in (_SAVED, _SAVED_SPLITS)]
    if saved:
        raise UserError(
            f"{key}: {folder}: contains a dataset written by `save_to_disk`,"
            f" in {saved[0].relative_to(folder)}",
            hint=f"Set {key}={saved[0]}.",
        )
    _refuse_index(folder, key)
    files = [path for path in every if path.name.endswith(DATA_SUFFIXES)]
    if not files:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        convertible = [path for path in every if path.suffix in _CONVERSIONS]
        raise UserError(
            f"{key}: {folder}: no data file in this folder: found {found}, expected"
            f" {', '.join(DATA_SUFFIXES)}",
            hint=_conversion(convertible[0]) if convertible else "Use a folder with data files.",
        )
    for path in every:
        if path.suffix in _CONVERSIONS and path.suffix != ".txt":
            logger.warning(f"prepare_data: {path}: not read. {_conversion(path)}")
    words = {
        file: set(re.split(r"[^a-z]+", file.relative_to(folder).as_posix().lower()))
        for file in files
    }
    train = [file for file in files if words[file] & _TRAIN_WORDS]
    held_out = [file for file in files if words[file] & _HELD_OUT_WORDS]
    if train and held_out:  # reading both would silently train on the test set
        raise UserError(
            f"{key}: {folder}: the folder mixes splits ({train[0].relative_to(folder)},"
            f" {held_out[0].relative_to(folder)})",
            hint="Use one file, or a folder with only the training files; data.validation may name"
            " the others.",
        )
    return Source(
        str(folder),
        folder,
        tuple((str(file), file.relative_to(folder).as_posix(), file) for file in files),
    )


def _refuse_index(folder: Path, key: str) -> None:
    """Refuse a folder with LLaMA-Factory's index, whose files differ in form and purpose."""
    path = folder / _INDEX
    if not path.is_file():
        return
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a data file, which is read or refused as such
    if not isinstance(index, dict):
        return
    entries = {
        name: entry["file_name"]
        for name, entry in index.items()
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)
    }
    if not entries:
        return
    there = {name: file for name, file in entries.items() if (folder / file).exists()}
    listed = (
        ", ".join(f"{name}: {file}" for name, file in list(there.items())[:8]) or "none of them"
    )
    raise UserError(
        f"{key}: {folder}: a folder with LLaMA-Factory's index {_INDEX}, which is not read; existing"
        f" files of the index: {listed}",
        hint=(
            f"Name one: {key}={folder / next(iter(there.values()))}; or several, in data.mixture."
            if there
            else f"Name a data file: {key}=...; those of the index are not in this folder."
        ),
    )


def _open_saved_splits(config: SourceFields, folder: Path, key: str) -> Source:
    """Open one split of a `DatasetDict` that `save_to_disk` wrote."""
    path = folder / _SAVED_SPLITS
    try:
        splits = list(json.loads(path.read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{key}: {path}: cannot be read ({one_line(error)})", hint="Save the data set again."
        ) from None
    if config.split not in splits:
        setting = "data.validation" if key == "data.validation" else sibling_key(key, "split")
        raise UserError(
            f"{key}: {folder}: has no split {config.split!r}, found {', '.join(splits) or 'none'}",
            hint=f"Set {setting} to one of those.",
        )
    return _open_saved(folder / config.split, key, f"{folder}[{config.split}]")


def _open_saved(folder: Path, key: str, label: str | None = None) -> Source:
    """Open a data set that `save_to_disk` wrote; its files stay on disk."""
    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{key}: {folder}: not a readable folder of save_to_disk ({one_line(error)})",
            hint="Copy it again with all of its files, or save the data set again.",
        ) from None
    label = label or str(folder)
    return Source(label, folder, ((label, Path(label).name, table),))


def sibling_key(key: str, name: str) -> str:
    """Return the key next to one that names a data set: `data.split`, `data.mixture.0.split`."""
    return f"data.{name}" if key in ("data.source", "data.validation") else f"{key}.{name}"


def _is_repository(folder: Path) -> bool:
    """Return whether the folder's README.md has the YAML front matter of a Hub data set."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    head = re.match(
        r"---\s*\n(.*?)\n---\s*(?:\n|$)",
        readme.read_text(encoding="utf-8", errors="replace"),
        re.DOTALL,
    )
    if head is None:
        return False
    try:
        tree = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        raise UserError(
            f"{readme}: invalid YAML front matter: {one_line(error)}",
            hint="Correct it, or remove the file.",
        ) from None
    return isinstance(tree, dict) and ("configs" in tree or "dataset_info" in tree)


def _open_repository(config: SourceFields, location: str, path: Path | None, key: str) -> Source:
    """Open a repository: `location` is a Hub id, or with `path` a folder in the Hub's layout."""
    what = " ".join(
        [f"{key}:", location, *([f"(config {config.config})"] if config.config else [])]
    )
    revision = config.revision if path is None else None
    # `datasets` knows a local file again by its name and modification time, which tar, rsync -t and
    # container layers keep: a folder's cache is kept by its content instead. Without the Hub, it
    # reads whatever revision it has cached last: each has a separate cache.
    cache = None
    if path is not None:
        cache = f"content-{hash_path(path, whole=True)}"
    elif revision is not None:
        cache = f"revision-{quote(revision, safe='')}"
    try:
        table = datasets.load_dataset(
            location,
            name=config.config,
            split=config.split,
            revision=revision,
            cache_dir=cache and str(Path(datasets.config.HF_DATASETS_CACHE) / cache),
        )
    except DatasetNotFoundError as error:
        raise UserError(
            f"{what}: data set not found on the Hub at revision {revision or 'main'}, or access"
            f" denied ({one_line(error)})",
            hint="Check the name, the revision and HF_TOKEN, or use a local file.",
        ) from None
    except ValueError as error:  # a missing configuration or split: the message lists those there
        split = "data.validation" if key == "data.validation" else sibling_key(key, "split")
        raise UserError(
            f"{what}: {one_line(error)}",
            hint=f"Set {sibling_key(key, 'config')} and {split} (now {config.split!r}) to one of"
            " those.",
        ) from None
    except (
        HfHubHTTPError,
        ConnectionError,
        OSError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        if "scripts are no longer supported" in str(error):
            raise UserError(
                f"{what}: this data set needs a loading script; remote code is not executed",
                hint="Use its Parquet or JSON lines files.",
            ) from None
        raise UserError(
            f"{what}: cannot be downloaded or read ({one_line(error)})",
            hint="Check the network, or use a local file or folder.",
        ) from None
    label = f"{config.source}[{config.split}]"
    return Source(label, path, ((label, label, table),))
