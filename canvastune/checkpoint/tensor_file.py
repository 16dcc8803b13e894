"""One safetensors file, read and written one tensor at a time.

The format: 8 bytes of header length (little-endian), a JSON header `{name: {dtype, shape, data_offsets}}`, and the tensors'
bytes, row-major; offsets count from the end of the header.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from canvastune.errors import UserError

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

REMEDY = "Fetch the checkpoint again"

_MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit
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
_BITS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}  # numpy has no bfloat16: values travel as integers of their size


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes from the start of the file

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """One safetensors file. The header is read and checked when this is made; a tensor is read when it is asked for.

    Raises:
        UserError: no such file, not a safetensors file, or one that was cut short; later, no tensor of the name asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = _read_header(path)

    def names(self) -> list[str]:
        """Every tensor's name, in the order of the file."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._entry(name).dtype

    def get(self, name: str) -> torch.Tensor:
        """A whole tensor on the CPU, in the stored dtype."""
        return self.get_slice(name, ())

    def get_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor on the CPU, in the stored dtype; no more than that part is read into memory.

        Args:
            slices: one per leading dimension, with step 1; dimensions without one are taken whole.
        """
        entry = self._entry(name)
        if entry.size == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)[slices]
        with _mapped(self.path) as file:
            flat = np.frombuffer(file, _BITS[entry.dtype.itemsize], math.prod(entry.shape), entry.offset)
            part = np.array(flat.reshape(entry.shape)[slices])
            del flat  # a mapping closes only when nothing looks into it
        return torch.from_numpy(part).view(entry.dtype)

    def ends(self, name: str, count: int) -> bytes:
        """The first and the last `count` bytes of a tensor, or all of it where it is no longer than both."""
        entry = self._entry(name)
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            if entry.size <= 2 * count:
                return file.read(entry.size)
            first = file.read(count)
            file.seek(entry.offset + entry.size - count)
            return first + file.read(count)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UserError(f"{self.path}: has no tensor {name!r}. Is it the file of another model? Give the right one")
        return self._entries[name]


class TensorFileWriter:
    """One safetensors file whose header is written first; each tensor then goes to its place as it comes, in any order."""

    def __init__(self, path: Path, specs: Specs) -> None:
        self.path = path
        self._places: dict[str, _Entry] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wide types first, as the safetensors library does: every tensor is then aligned to its own type.
        for name, (shape, dtype) in sorted(specs.items(), key=lambda item: -item[1][1].itemsize):
            place = self._places[name] = _Entry(tuple(shape), dtype, offset)
            offset += place.size
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [place.offset, offset]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file: IO[bytes] = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + offset)
        self._missing = dict.fromkeys(specs)

    def write(self, name: str, tensor: torch.Tensor) -> bool:
        """Write a tensor that was announced, once, with the announced shape and dtype; return whether it was the file's last.

        Raises:
            ValueError: another shape or dtype, an unknown name, or a second time.
        """
        if name not in self._missing:
            raise ValueError(f"{self.path.name}: tensor {name!r} was {'written already' if name in self._places else 'not announced'}")
        place = self._places[name]
        if tuple(tensor.shape) != place.shape or tensor.dtype != place.dtype:
            announced, found = f"{list(place.shape)} {place.dtype}", f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{self.path.name}: tensor {name!r} is {found}, announced as {announced}")
        self._file.seek(self._data + place.offset)
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        del self._missing[name]
        return not self._missing

    def close(self, *, complete: bool = True) -> None:
        """Close the file.

        Args:
            complete: False does not ask that every tensor was written (an error is on its way already).

        Raises:
            ValueError: a tensor that was announced was not written.
        """
        self._file.close()
        if complete and self._missing:
            first = next(iter(self._missing))
            raise ValueError(f"{self.path.name}: {len(self._missing)} announced tensors were not written, the first is {first!r}")


def _read_header(path: Path) -> dict[str, _Entry]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _MAX_HEADER_BYTES:
                raise UserError(f"{path}: not a safetensors file ({size} bytes, the header would take {length}). {REMEDY}")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. {REMEDY}") from None
    if len(text) < length:
        raise UserError(f"{path}: the file is cut short: it has {size} bytes, and its header alone takes {8 + length}. {REMEDY}")
    try:
        header = json.loads(text, object_pairs_hook=distinct)
        entries = [_parse(name, tree) for name, tree in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file: its header is not the JSON that one has ({error}). {REMEDY}") from None
    found: dict[str, _Entry] = {}
    filled, before = 0, ""
    for name, shape, code, start, end in sorted(entries, key=lambda entry: entry[3:]):
        if code not in _DTYPES:
            raise UserError(f"{path}: tensor {name!r} has dtype {code}, expected one of {', '.join(_DTYPES)}. Give an unquantized one")
        entry = found[name] = _Entry(shape, _DTYPES[code], 8 + length + start)
        if entry.size != end - start:
            raise UserError(f"{path}: tensor {name!r} takes {entry.size} bytes, the header gives it {end - start}. {REMEDY}")
        if start < filled:
            raise UserError(f"{path}: tensor {name!r} begins at byte {start} of the data, where {before!r} ends at {filled}. {REMEDY}")
        filled, before = end, name
        if entry.offset + entry.size > size:
            last = entry.offset + entry.size
            raise UserError(f"{path}: the file is cut short: it has {size} bytes, and tensor {name!r} ends at byte {last}. {REMEDY}")
    return found


def _parse(name: str, tree: Any) -> tuple[str, tuple[int, ...], str, int, int]:
    start, end = tree["data_offsets"]
    shape = tuple(tree["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{name!r} has shape {tree['shape']} and data_offsets {tree['data_offsets']}")
    return name, shape, str(tree["dtype"]), start, end


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict.

    Raises:
        ValueError: a name that stands twice, of which JSON's own reader would drop the first.
    """
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return tree


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    # Mapped for one read only: pages of a mapping that stays would count as this process's memory.
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as file:
        yield file
