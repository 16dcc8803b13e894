"""`python -m tools.durations REPORT`: write tests/durations.json from a JUnit report of `pytest
--junitxml=REPORT`.

The tests start with the files that took longest, so that parallel processes finish together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
DURATIONS = ROOT / "tests" / "durations.json"
_SHORTEST = 5.0  # seconds: the order of shorter files does not matter


def seconds_by_file(report: Path) -> dict[str, float]:
    """Sum a JUnit report's test times by file, longest first; short files are left out."""
    seconds: dict[str, float] = defaultdict(float)
    for case in ElementTree.parse(report).iter("testcase"):
        path = case.attrib["classname"].replace(".", "/") + ".py"
        seconds[path] += float(case.attrib["time"])
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {path: round(total, 1) for path, total in ordered if total >= _SHORTEST}


def main() -> int:
    parser = argparse.ArgumentParser("tools.durations", description=__doc__)
    parser.add_argument("report", type=Path, help="JUnit XML that pytest wrote")
    options = parser.parse_args()
    DURATIONS.write_text(
        json.dumps(seconds_by_file(options.report), indent=2) + "\n", encoding="utf-8"
    )
    print(f"{DURATIONS.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
