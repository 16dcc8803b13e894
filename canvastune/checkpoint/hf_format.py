"""Checkpoints in the Hub's layout, read and written one tensor at a time: `model.safetensors`, or shards with an index."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from canvastune.checkpoint.tensor_file import REMEDY, Specs, TensorFile, TensorFileWriter, distinct
from canvastune.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_SHARD_BYTES = 5 * 10**9
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)


class CheckpointReader:
    """A checkpoint folder in the Hub's layout.

    Every shard's header is read and checked when this is made, so a broken download is found before anything is computed.

    Raises:
        UserError: no weights, weights that are pickled, a shard that is missing, cut short or not safetensors, an index
            that does not place each tensor in the one shard that holds it; later, no tensor of the name asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, TensorFile] = {}
        index = folder / INDEX
        if not index.is_file():
            self._refuse_no_weights()
            file = TensorFile(folder / WEIGHTS)
            self._places = dict.fromkeys(file.names(), file)
            return
        weight_map = _read_index(index)
        files = {shard: TensorFile(self._shard(shard)) for shard in sorted(set(weight_map.values()))}
        held = {shard: set(file.names()) for shard, file in files.items()}
        for name, shard in weight_map.items():
            if name not in held[shard]:
                raise UserError(f"{folder / shard}: has no tensor {name!r}, which {INDEX} places there. {REMEDY}")
            self._places[name] = files[shard]
        for shard, names in held.items():
            for name in sorted(names):
                if weight_map.get(name) != shard:
                    found = f"places in {weight_map[name]}" if name in weight_map else "does not name"
                    raise UserError(f"{folder / shard}: holds tensor {name!r}, which {INDEX} {found}. {REMEDY}")

    def names(self) -> list[str]:
        """Every tensor's name, in the order of the index."""
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file(name).path

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._file(name).dtype(name)

    def get(self, name: str) -> torch.Tensor:
        """A whole tensor on the CPU, in the stored dtype."""
        return self._file(name).get(name)

    def get_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor; see `TensorFile.get_slice`."""
        return self._file(name).get_slice(name, slices)

    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Every tensor's shape and dtype: what `CheckpointWriter` wants to write the like."""
        return {name: (self.shape(name), self.dtype(name)) for name in self._places}

    def fingerprint(self) -> str:
        """SHA-256 of every tensor's name, dtype, shape and first and last 4 KiB: the same however the tensors are sharded."""
        digest = hashlib.sha256()
        for name in sorted(self._places):
            digest.update(f"{name}\0{self.dtype(name)}\0{self.shape(name)}\0".encode())
            digest.update(self._file(name).ends(name, 4096))
        return digest.hexdigest()

    def _file(self, name: str) -> TensorFile:
        if name not in self._places:
            raise UserError(f"{self.folder}: the checkpoint has no tensor {name!r}. Is it another model? Give the one it belongs to")
        return self._places[name]

    def _shard(self, shard: str) -> Path:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{self.folder / INDEX}: names the shard {shard!r}, expected a .safetensors file of the same folder. {REMEDY}")
        if not (self.folder / shard).is_file():
            raise UserError(f"{self.folder / shard}: the shard is missing, which {INDEX} names. {REMEDY}")
        return self.folder / shard

    def _refuse_no_weights(self) -> None:
        if (self.folder / WEIGHTS).is_file():
            return
        pickled = sorted(file.name for pattern in _PICKLED for file in self.folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{self.folder}: the weights are pickled ({pickled[0]}), which can run code when they are read. "
                "Give a checkpoint in safetensors, or convert this one where it can be trusted"
            )
        raise UserError(f"{self.folder}: holds neither {WEIGHTS} nor {INDEX}. Give the folder of a checkpoint in the Hub's layout")


class CheckpointWriter:
    """Write a checkpoint in the Hub's layout: one file, or shards of at most `max_shard_bytes` with an index, as transformers does.

    Headers are written first, and tensors come in any order; memory is one tensor. As a context manager it closes the files,
    and does not complain of missing tensors where an error is already on its way.

    Raises:
        UserError: the disk has no room for it.
    """

    def __init__(self, folder: Path, specs: Specs, max_shard_bytes: int = _MAX_SHARD_BYTES) -> None:
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in specs.items()}
        total, free = sum(sizes.values()), shutil.disk_usage(folder).free
        if total > free:
            found = f"the checkpoint takes {total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
            raise UserError(f"{folder}: {found}. Make room, or give a folder on another disk")
        shards = _split(sizes, max_shard_bytes)
        count = len(shards)
        files = [WEIGHTS] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        self._files: list[TensorFileWriter] = []
        self._places: dict[str, TensorFileWriter] = {}
        for file, names in zip(files, shards, strict=True):
            self._files.append(TensorFileWriter(folder / file, {name: specs[name] for name in names}))
            self._places |= dict.fromkeys(names, self._files[-1])
        if count > 1:
            weight_map = {name: writer.path.name for name, writer in self._places.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def shards(self) -> int:
        """Number of files that hold tensors."""
        return len(self._files)

    def write(self, name: str, tensor: torch.Tensor) -> str | None:
        """Write one announced tensor (`TensorFileWriter.write`); return the file's name if that completed it."""
        if name not in self._places:
            raise ValueError(f"tensor {name!r} was not announced")
        writer = self._places[name]
        return writer.path.name if writer.write(name, tensor) else None

    def close(self) -> None:
        """Close every file.

        Raises:
            ValueError: a tensor that was announced was not written.
        """
        with contextlib.ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        for file in self._files:
            file.close(complete=False)


def copy_side_files(base: Path, out: Path) -> list[str]:
    """Copy what belongs to a checkpoint beside its weights, byte for byte: configuration, tokenizer, chat template; return the names."""
    names = sorted({file.relative_to(base).as_posix() for pattern in _SIDE_FILES for file in base.glob(pattern) if file.is_file()})
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / name, out / name)
    return names


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut before the one that would make a shard larger than `limit` bytes; a larger tensor stands alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=distinct)["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("a shard's name is not a string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not the index of a checkpoint ({type(error).__name__}: {error}). {REMEDY}") from None
    return weight_map
