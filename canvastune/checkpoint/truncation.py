"""Find safetensors files that were cut off, by their headers and without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from canvastune.errors import UserError

DOWNLOAD_AGAIN = "Download the checkpoint again."

_MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit


def refuse_truncated(folder: Path) -> None:
    """Refuse a checkpoint with a file that an interrupted copy left; what is missing is not looked at.

    Raises:
        UserError: with the file, its size and where it should end; a file that cannot be read.
    """
    for path in sorted(filter(Path.is_file, folder.glob("*.safetensors"))):
        try:
            problem = find_truncation(path)
        except OSError as error:
            problem = f"cannot read the file ({error.strerror})"
        if problem:
            raise UserError(f"{path}: {problem}", hint=DOWNLOAD_AGAIN)


def find_truncation(path: Path) -> str:
    """Return where a file was cut off, which the library does not say.

    Return "" if it is broken in another way.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            return f"not a safetensors file ({size} bytes)"
        text = file.read(length)
    if len(text) < length:
        least = 8 + length
        return f"the file is truncated: found {size} bytes, expected a header of {least} bytes"
    try:
        header: dict[str, Any] = json.loads(text)
        ends = {
            name: 8 + length + int(tree["data_offsets"][1])
            for name, tree in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return ""
    cut = [(end, name) for name, end in ends.items() if end > size]
    if not cut:
        return ""
    end, name = min(cut)
    return (
        f"the file is truncated: found {size} bytes, expected tensor {name!r} to end at byte {end}"
    )
