"""The order in which held-out rows are chosen where only some of them are used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

_TURN = re.compile(r"#\d+$")  # end of the origin of an example that is one of several of its row


def sample_order(ids: Sequence[str], origins: Sequence[str]) -> list[int]:
    """Return the indices of prepared rows in an order of which any beginning is a fair sample.

    It depends on the rows' contents and not on their places: the first rows of a file may all be of
    one kind. Ids are hashes. But a row is held out by its last turn's id, so among the held-out
    examples of `data.learn: all`, last turns have low ids. There the ids are hashed again.
    """
    if any(_TURN.search(origin) for origin in origins):
        ids = [hashlib.sha256(id.encode()).hexdigest() for id in ids]
    return sorted(range(len(ids)), key=ids.__getitem__)
