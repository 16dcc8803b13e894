"""Read and write checkpoints in the Hub's layout, tensor by tensor.

`model.safetensors`, or shards with an index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from canvastune.checkpoint.truncation import DOWNLOAD_AGAIN, find_truncation
from canvastune.errors import UserError
from canvastune.io.byte_size import format_bytes
from canvastune.io.json_text import write_json

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class SafetensorsFile:
    """One safetensors file: its header is read on construction, a tensor on request.

    A tensor is a copy-on-write mapping of the file. The file is opened for each tensor again, so
    that no more than the tensors in use are mapped: mapped pages count as this process's resident
    memory.

    Raises:
        UserError: no such file, not a safetensors file, or a truncated one; later, no tensor of
            that name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        try:
            with safe_open(path, "pt") as file:
                for name in file.offset_keys():
                    part = file.get_slice(name)
                    self.specs[name] = tuple(part.get_shape()), self._dtype(name, part.get_dtype())
        except OSError as error:
            raise UserError(f"{path}: cannot read the file: {error}", hint=DOWNLOAD_AGAIN) from None
        except SafetensorError as error:
            raise UserError(
                f"{path}: {find_truncation(path) or f'not a safetensors file: {error}'}",
                hint=DOWNLOAD_AGAIN,
            ) from None

    def get(self, name: str) -> torch.Tensor:
        """Return a whole tensor on the CPU, in the stored dtype."""
        self._check(name)
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    def get_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """Return a part of a tensor on the CPU, in the stored dtype.

        Only that part is read from the disk.

        Args:
            slices: one per leading dimension, with step 1; dimensions without one are taken whole.
        """
        self._check(name)
        if not slices or 0 in self.specs[name][0]:
            return self.get(name)[slices]
        with safe_open(self.path, "pt") as file:
            return file.get_slice(name)[slices]

    def _check(self, name: str) -> None:
        if name not in self.specs:
            raise UserError(
                f"{self.path}: no tensor {name!r}",
                hint="Check that the file belongs to this model.",
            )

    def _dtype(self, name: str, code: str) -> torch.dtype:
        if code not in _DTYPES:
            raise UserError(
                f"{self.path}: tensor {name!r}: found dtype {code}, expected one of "
                f"{', '.join(_DTYPES)}",
                hint="Use an unquantized checkpoint.",
            )
        return _DTYPES[code]


class SafetensorsWriter:
    """One safetensors file, written header first; tensors follow one at a time, in any order.

    The format: 8 bytes of header length (little-endian), a JSON header `{name: {dtype, shape,
    data_offsets}}`, and the tensors' bytes, row-major; offsets count from the end of the header.
    """

    def __init__(self, path: Path, specs: Specs) -> None:
        self.path = path
        self._specs = specs
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wide types first, as the safetensors library does: every tensor is then aligned to its own
        # type.
        for name, (shape, dtype) in sorted(specs.items(), key=lambda item: -item[1][1].itemsize):
            self._offsets[name] = offset
            offset += math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _CODES[dtype],
                "shape": list(shape),
                "data_offsets": [self._offsets[name], offset],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file: IO[bytes] = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + offset)
        self._missing = dict.fromkeys(specs)

    def write(self, name: str, tensor: torch.Tensor) -> bool:
        """Write a tensor of `specs`, once, with its shape and dtype.

        Return True if it was the last one.

        Raises:
            ValueError: another shape or dtype, an unknown name, or a second time.
        """
        if name not in self._missing:
            problem = "was already written" if name in self._specs else "is not in specs"
            raise ValueError(f"{self.path.name}: tensor {name!r} {problem}")
        shape, dtype = self._specs[name]
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            found, expected = f"{list(tensor.shape)} {tensor.dtype}", f"{list(shape)} {dtype}"
            raise ValueError(
                f"{self.path.name}: tensor {name!r}: found {found}, expected {expected}"
            )
        self._file.seek(self._data + self._offsets[name])
        self._file.write(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
        del self._missing[name]
        return not self._missing

    def close(self, *, complete: bool = True) -> None:
        """Close the file.

        Args:
            complete: False skips the check that every tensor was written, where an error is being
                raised anyway.

        Raises:
            ValueError: a tensor of `specs` was not written.
        """
        self._file.close()
        if complete and self._missing:
            first = next(iter(self._missing))
            raise ValueError(
                f"{self.path.name}: {len(self._missing)} tensors of specs were not written, the "
                f"first is {first!r}"
            )


class CheckpointReader:
    """A checkpoint folder in the Hub's layout.

    Every shard's header is read and checked on construction, so that a broken download is found
    before anything is computed.

    Raises:
        UserError: no weights, pickled weights, a shard that is missing, truncated or not
            safetensors, an index that does not place each tensor in the one shard that holds it;
            later, no tensor of that name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, SafetensorsFile] = {}
        index = folder / INDEX
        if not index.is_file():
            self._refuse_no_weights()
            file = SafetensorsFile(folder / WEIGHTS)
            self._places = dict.fromkeys(file.specs, file)
            return
        weight_map = _read_index(index)
        files = {
            shard: SafetensorsFile(self._shard(shard)) for shard in sorted(set(weight_map.values()))
        }
        held = {shard: set(file.specs) for shard, file in files.items()}
        for name, shard in weight_map.items():
            if name not in held[shard]:
                raise UserError(
                    f"{folder / shard}: no tensor {name!r}, which {INDEX} places there",
                    hint=DOWNLOAD_AGAIN,
                )
            self._places[name] = files[shard]
        for shard, names in held.items():
            for name in sorted(names):
                if weight_map.get(name) != shard:
                    found = (
                        f"places in {weight_map[name]}" if name in weight_map else "does not name"
                    )
                    raise UserError(
                        f"{folder / shard}: found tensor {name!r}, which {INDEX} {found}",
                        hint=DOWNLOAD_AGAIN,
                    )

    def names(self) -> list[str]:
        """Return every tensor's name, in the order of the index."""
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._file(name).path

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._file(name).specs[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._file(name).specs[name][1]

    def get(self, name: str) -> torch.Tensor:
        """Return a whole tensor on the CPU, in the stored dtype."""
        return self._file(name).get(name)

    def get_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """Return a part of a tensor; see `SafetensorsFile.get_slice`."""
        return self._file(name).get_slice(name, slices)

    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return every tensor's shape and dtype, as `CheckpointWriter` takes them."""
        return {name: file.specs[name] for name, file in self._places.items()}

    def fingerprint(self) -> str:
        """Hash every tensor's name, dtype, shape, first and last 4 KiB, in any sharding."""
        digest = hashlib.sha256()
        for name in sorted(self._places):
            digest.update(f"{name}\0{self.dtype(name)}\0{self.shape(name)}\0".encode())
            digest.update(_ends(self.get(name), 4096))
        return digest.hexdigest()

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._places:
            raise UserError(
                f"{self.folder}: no tensor {name!r} in this checkpoint",
                hint="Check that this is the right model.",
            )
        return self._places[name]

    def _shard(self, shard: str) -> Path:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"{self.folder / INDEX}: found shard {shard!r}, expected a .safetensors file in "
                "the same folder",
                hint=DOWNLOAD_AGAIN,
            )
        if not (self.folder / shard).is_file():
            raise UserError(
                f"{self.folder / shard}: shard is missing, but {INDEX} names it",
                hint=DOWNLOAD_AGAIN,
            )
        return self.folder / shard

    def _refuse_no_weights(self) -> None:
        if (self.folder / WEIGHTS).is_file():
            return
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder}: no such folder, expected a checkpoint",
                hint="Restore it, then repeat the command: what was trained is kept.",
            )
        pickled = sorted(file.name for pattern in _PICKLED for file in self.folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{self.folder}: found pickled weights ({pickled[0]}), expected safetensors: a "
                "pickle can run code when it is read",
                hint="Use a checkpoint in safetensors, or convert this one if you trust it.",
            )
        raise UserError(
            f"{self.folder}: found neither {WEIGHTS} nor {INDEX}",
            hint="Use a checkpoint folder in the Hub's layout.",
        )


class CheckpointWriter:
    """A checkpoint to write in the Hub's layout.

    One file, or shards of at most `max_shard_bytes` with an index.

    Headers are written first; tensors follow in any order. Memory is one tensor. As a context
    manager it closes the files, and skips the check for missing tensors where an error is being
    raised anyway.

    Raises:
        UserError: not enough free disk space.
    """

    def __init__(self, folder: Path, specs: Specs, max_shard_bytes: int = _MAX_SHARD_BYTES) -> None:
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in specs.items()}
        total, free = sum(sizes.values()), shutil.disk_usage(folder).free
        if total > free:
            raise UserError(
                f"{folder}: the checkpoint needs {format_bytes(total)}, the disk has "
                f"{format_bytes(free)} free",
                hint="Free some disk space or choose another disk.",
            )
        shards = _split(sizes, max_shard_bytes)
        count = len(shards)
        files = (
            [WEIGHTS]
            if count == 1
            else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        )
        self._files: list[SafetensorsWriter] = []
        self._places: dict[str, SafetensorsWriter] = {}
        for file, names in zip(files, shards, strict=True):
            self._files.append(
                SafetensorsWriter(folder / file, {name: specs[name] for name in names})
            )
            self._places |= dict.fromkeys(names, self._files[-1])
        if count > 1:
            weight_map = {name: at.path.name for name, at in sorted(self._places.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / INDEX, index)

    @property
    def shards(self) -> int:
        """Number of files that hold tensors."""
        return len(self._files)

    def write(self, name: str, tensor: torch.Tensor) -> str | None:
        """Write one tensor of `specs`; return the file's name if that completed it.

        Raises: as `SafetensorsWriter.write`.
        """
        if name not in self._places:
            raise ValueError(f"tensor {name!r} is not in specs")
        writer = self._places[name]
        return writer.path.name if writer.write(name, tensor) else None

    def close(self) -> None:
        """Close every file.

        Raises:
            ValueError: a tensor of `specs` was not written.
        """
        with contextlib.ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        for file in self._files:
            file.close(complete=False)


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split names, in order, into shards of at most `limit` bytes.

    A larger tensor gets its own shard.
    """
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
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)[
            "weight_map"
        ]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("a shard's name is not a string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: not a checkpoint index ({type(error).__name__}: {error})",
            hint=DOWNLOAD_AGAIN,
        ) from None
    return weight_map


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object's dict.

    Raises: ValueError, a duplicate key, whose first value JSON's own reader would drop.
    """
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return tree


def _ends(tensor: torch.Tensor, count: int) -> bytes:
    """Return the first and last `count` bytes of a tensor, or all of it if it is not longer."""
    data = tensor.reshape(-1).view(torch.uint8)
    return (
        (data if len(data) <= 2 * count else torch.cat([data[:count], data[-count:]]))
        .numpy()
        .tobytes()
    )
