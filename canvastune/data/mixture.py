"""How several sources share the endless stream of training examples."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from canvastune.errors import UserError

_FILE = "mixture.json"  # in the folder of the rows, so that a hash of their folder includes it


@dataclass(frozen=True)
class Share:
    """One source of a prepared data set; its rows follow those of the source before it."""

    weight: float
    rows: int


@dataclass(frozen=True)
class Mixture:
    """The sources of the rows of a prepared split, in the order of the rows."""

    shares: tuple[Share, ...]

    def write(self, folder: Path) -> None:
        """Write the mixture into the folder of the split."""
        text = json.dumps({"shares": [asdict(share) for share in self.shares]}, indent=2)
        (folder / _FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, rows: int) -> Mixture:
        """Read the mixture of the split in `folder`; without one, its rows have a single source.

        Args:
            rows: of the split.

        Raises:
            UserError: a file that is damaged, or that does not fit the rows.
        """
        path = folder / _FILE
        if not path.is_file():
            return cls((Share(1.0, rows),))
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            mixture = cls(tuple(Share(**share) for share in tree["shares"]))
            found = sum(share.rows for share in mixture.shares)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not the mixture of a prepared data set ({error!r})",
                hint="Run `canvastune prepare` again.",
            ) from None
        if found != rows:
            raise UserError(
                f"{path}: has {found:,} rows, expected {rows:,}, as the data set in its folder",
                hint="Run `canvastune prepare` again.",
            )
        return mixture


class Interleaving:
    """Which source each position of the endless stream belongs to: a function of the position.

    After any number of positions, the count of each source differs from its exact share by less
    than one. Example k of a source with share w may take the positions from floor(k / w) to
    ceil((k + 1) / w) - 1; each position goes to the source whose time ends first. This is the
    earliest deadline first schedule of one processor with Pfair windows (Baruah et al.,
    Proportionate progress, 1996), which misses no deadline as the shares sum to one.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Fix the shares. A weight is taken as the decimal number that it is written as."""
        exact = [Fraction(repr(float(weight))) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        parts = [int(weight * unit) for weight in exact]
        divisor = math.gcd(*parts)
        self._parts = [part // divisor for part in parts]  # of each source in a period
        self._period = sum(self._parts)
        # The beginning of the period, as far as it was needed.
        self._sources = array("H")
        self._ranks = array("Q")  # how many examples of the same source come before
        self._counts = [0] * len(parts)
        self._starts = [0] * len(parts)  # of the window of each source's next example
        self._ends = [-(-self._period // part) for part in self._parts]

    def at(self, position: int) -> tuple[int, int]:
        """Return the source at a position, and how many of its examples come before it."""
        if len(self._parts) == 1:
            return 0, position
        period, phase = divmod(position, self._period)
        if phase >= len(self._sources):
            self._extend(phase + 1)
        source = self._sources[phase]
        return source, period * self._parts[source] + self._ranks[phase]

    def _extend(self, needed: int) -> None:
        parts, period, starts, ends = self._parts, self._period, self._starts, self._ends
        every = range(len(parts))
        # Twice as far as before: a long stream costs one pass over it.
        for at in range(len(self._sources), min(max(needed, 2 * len(self._sources)), period)):
            source, earliest = 0, period + 1
            for each in every:
                if starts[each] <= at and ends[each] < earliest:
                    source, earliest = each, ends[each]
            self._sources.append(source)
            self._ranks.append(self._counts[source])
            self._counts[source] = count = self._counts[source] + 1
            starts[source] = count * period // parts[source]
            ends[source] = -(-(count + 1) * period // parts[source])
