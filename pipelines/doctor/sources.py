"""Check that a recipe's model and data set are available, without downloading either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.hub import hub_reason, resolve_model
from canvastune.config import RunConfig
from canvastune.config.data import MixtureSource
from canvastune.config.places import is_path
from canvastune.errors import UserError
from canvastune.preparation.sources import open_source, sibling_key
from pipelines.doctor.finding import Finding

_TIMEOUT = 10.0  # seconds, for a response of the Hub
_HUB_FIX = "check the network, HTTPS_PROXY and HF_ENDPOINT; or use a local copy in {key}"


def check_model(config: RunConfig, submitted: bool = False) -> Iterator[Finding]:
    """Check that the base model is available; of a local one, that its weights are complete.

    Args:
        submitted: the run is for Kubeflow, whatever backend the recipe names.
    """
    place = config.model.id
    if _in_pods(config, place, submitted):
        yield Finding(
            "model", "skipped", f"{place} is on the workspace volume, which only the pods can see"
        )
        return
    info = None
    if not Path(place).is_dir() and not is_path(place):
        try:
            info = HfApi().model_info(
                place, revision=config.model.revision, timeout=_TIMEOUT, files_metadata=True
            )
        except HFValidationError:
            pass  # a path, not a Hub id: resolve_model reports what is wrong with it
        except (
            Exception
        ) as error:  # the Hub's library, the network and proxies each raise other types
            kept = try_to_load_from_cache(place, "config.json", revision=config.model.revision)
            if isinstance(kept, str) and not isinstance(
                error, RepositoryNotFoundError | RevisionNotFoundError
            ):
                found = f"the Hub does not respond; {place} is in its cache ({Path(kept).parent})"
                yield Finding("model", "warning", found)
            else:
                yield _unavailable("model", "model.id", place, error)
            return
    if info is None:
        try:
            folder = resolve_model(config.model)
            CheckpointReader(folder)  # reads the header of every shard
            yield Finding("model", "ok", f"{folder}, a local folder")
        except UserError as error:
            yield Finding(
                "model",
                "problem",
                str(error),
                error.hint or "correct model.id, as the message says",
            )
        return
    size = sum(
        file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors")
    )
    yield Finding("model", "ok", f"{place} is on the Hub, {size / 1e9:,.0f} GB of weights")


def check_data(config: RunConfig, submitted: bool = False) -> Iterator[Finding]:
    """Check that each data set is available; of a local one, read the first row.

    `submitted`: as for `check_model`."""
    for key, source in config.source_keys.items():
        yield _check_source(config, key, source, submitted)


def _check_source(config: RunConfig, key: str, source: MixtureSource, submitted: bool) -> Finding:
    place = source.source
    if _in_pods(config, place, submitted):
        return Finding(
            "data", "skipped", f"{place} is on the workspace volume, which only the pods can see"
        )
    path = Path(place).expanduser()
    if not path.exists() and not is_path(place):
        try:
            info = HfApi().dataset_info(place, revision=source.revision, timeout=_TIMEOUT)
        except HFValidationError:
            pass  # a path, not a Hub id: open_source reports what is wrong with it
        except Exception as error:  # as above
            return _unavailable("data", key, place, error)
        else:
            card = info.card_data.to_dict() if info.card_data else {}
            return _check_declared(config, key, source, card)
    validation = _held_out_split(config, key)
    try:
        if validation is not None:
            held_out = source.model_copy(update={"split": validation})
            open_source(held_out, "data.validation", validation)
        row = next(open_source(source, key).rows())
    except UserError as error:
        return Finding("data", "problem", str(error), error.hint or f"correct {key}")
    if row.problem:
        fix = "correct the row; canvastune prepare lists every invalid one"
        return Finding("data", "warning", f"{row.file}: row {row.number}: {row.problem}", fix)
    return Finding("data", "ok", f"{path}: readable")


def _held_out_split(config: RunConfig, key: str) -> str | None:
    """Return the split of a source that the recipe holds out, if it names one."""
    validation = config.data.validation
    if validation is None or key == "data.validation" or is_path(validation):
        return None
    return validation


def _check_declared(
    config: RunConfig, key: str, source: MixtureSource, card: Mapping[str, Any]
) -> Finding:
    """Compare configuration and splits with those that the card of a Hub data set declares."""
    place, declared = source.source, declared_splits(card)
    if not declared:
        return Finding("data", "ok", f"{place} is on the Hub; its card does not list its splits")
    name = source.config
    if name is None:
        name = next(iter(declared)) if len(declared) == 1 else _default_config(card, declared)
    own = sibling_key(key, "config")
    if name not in declared:
        found = "is not set" if source.config is None else f"found {source.config!r}"
        return Finding(
            "data",
            "problem",
            f"{own}: {place}: {found}, expected one of {', '.join(declared)}",
            f"set {own}={next(iter(declared))}, or another one of those",
        )
    splits = declared[name]
    setting = "data.validation" if key == "data.validation" else sibling_key(key, "split")
    wanted = {setting: source.split, "data.validation": _held_out_split(config, key)}
    for setting, split in wanted.items():
        if splits and split is not None and split.partition("[")[0] not in splits:
            return Finding(
                "data",
                "problem",
                f"{setting}: {place}: found {split!r}, expected one of {', '.join(splits)}",
                f"set {setting} to one of those",
            )
    told = f", {name}: {', '.join(splits)}" if splits else ""
    return Finding("data", "ok", f"{place} is on the Hub{told}")


def declared_splits(card: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the splits of each configuration that a data set's card declares.

    A configuration whose splits it does not name has none here.
    """
    found: dict[str, list[str]] = {}
    for each in card.get("configs") or ():
        files = each.get("data_files")
        listed = files if isinstance(files, list) else []
        named = [entry["split"] for entry in listed if isinstance(entry, dict) and "split" in entry]
        found[each.get("config_name", "default")] = [str(split) for split in named]
    described = card.get("dataset_info") or []
    for each in [described] if isinstance(described, Mapping) else described:
        splits = [str(split["name"]) for split in each.get("splits") or ()]
        name = each.get("config_name", "default")
        found[name] = found.get(name) or splits
    return found


def _default_config(card: Mapping[str, Any], declared: Mapping[str, Any]) -> str | None:
    for each in card.get("configs") or ():
        if each.get("default"):
            return str(each.get("config_name", "default"))
    return "default" if "default" in declared else None


def _in_pods(config: RunConfig, place: str, submitted: bool) -> bool:
    return (
        (submitted or config.cluster.backend != "local")
        and Path(place).is_relative_to(config.cluster.mount_path)
        and not Path(place).exists()
    )


def _unavailable(name: str, key: str, place: str, error: Any) -> Finding:
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        found = f"{key}: {place}: not found on the Hub at that revision, or access denied"
        fix = f"check the name, accept the terms on its page, and set HF_TOKEN; or correct {key}"
        return Finding(name, "problem", found, fix)
    return Finding(
        name,
        "problem",
        f"{key}: {place}: the Hub does not respond ({hub_reason(error)})",
        _HUB_FIX.format(key=key),
    )
