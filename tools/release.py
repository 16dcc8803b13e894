"""Check a release's version, and prepare the chart that is published with it.

`python -m tools.release check v0.1.0` compares a tag with the versions of package, chart and changelog.
`python -m tools.release chart FOLDER --registry ghcr.io/OWNER --digests FILES` copies the chart to a
new folder, with the published images in its values. .github/workflows/release.yml runs both.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from tools.chart_table import values_table, with_table

ROOT = Path(__file__).parents[1]
IMAGES = ("mlflow", "pipeline", "trainer")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def version_problems(tag: str, root: Path = ROOT) -> list[str]:
    """Return what differs from a tag's version: one line per file, none if all agree."""
    chart = yaml.safe_load((root / "charts/canvastune/Chart.yaml").read_text(encoding="utf-8"))
    package = (root / "canvastune/__init__.py").read_text(encoding="utf-8")  # pyproject.toml's
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    version = tag.removeprefix("v")
    if not tag.startswith("v") or not re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", version):
        return [f"tag: found {tag!r}, expected v and a version, such as v1.2.0"]
    found = {
        "canvastune/__init__.py: __version__": _first(r'^__version__ = "(.*)"$', package),
        "charts/canvastune/Chart.yaml: version": chart["version"],
        "charts/canvastune/Chart.yaml: appVersion": chart["appVersion"],
    }
    problems = [
        f"{where}: found {its}, expected {version}, the tag's"
        for where, its in found.items()
        if its != version
    ]
    if _first(rf"^## \[({re.escape(version)})\]", changes) is None:
        problems.append(f"CHANGELOG.md: found no section [{version}], expected the tag's version")
    return problems


def write_chart(folder: Path, registry: str, digests: Mapping[str, str]) -> None:
    """Copy the chart to a new folder, with the images of a registry, pinned by their digests.

    Args:
        registry: of all three images, such as `ghcr.io/OWNER`.
        digests: `sha256:...` of each of IMAGES.

    Raises:
        ValueError: a digest is missing or malformed, the folder exists, or the chart lacks what is
            to be replaced.
    """
    for image in IMAGES:
        if not _DIGEST.fullmatch(digests.get(image, "")):
            found = digests.get(image, "none")
            raise ValueError(f"digest of {image}: found {found}, expected sha256:... of the push")
    if folder.exists():
        raise ValueError(f"{folder}: found a file or folder, expected a new one")
    shutil.copytree(ROOT / "charts" / "canvastune", folder)
    values = (folder / "values.yaml").read_text(encoding="utf-8")
    about = (folder / "Chart.yaml").read_text(encoding="utf-8")
    for image in IMAGES:
        for key, value in (("registry", registry), ("digest", digests[image])):
            pattern = rf'(?s)(\n  {image}:\n(?:    [^\n]*\n)*?    {key}: )""'
            values = _replaced(
                pattern, rf'\g<1>"{value}"', values, f"values.yaml: {key} of {image}"
            )
        pattern = rf"(image: )(canvastune/{image}:)"
        about = _replaced(pattern, rf"\g<1>{registry}/\g<2>", about, f"Chart.yaml: image {image}")
    (folder / "values.yaml").write_text(values, encoding="utf-8")
    (folder / "Chart.yaml").write_text(about, encoding="utf-8")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(with_table(readme, values_table(values)), encoding="utf-8")


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else None


def _replaced(pattern: str, by: str, text: str, what: str) -> str:
    text, count = re.subn(pattern, by, text)
    if count != 1:
        raise ValueError(f"{what}: found {count} places to replace, expected 1")
    return text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="compare a tag with the versions in the files")
    check.add_argument("tag", help="such as v0.1.0")
    chart = commands.add_parser("chart", help="write the chart with the published images")
    chart.add_argument(
        "folder", type=Path, help="a new folder; Helm wants it to be named canvastune"
    )
    chart.add_argument("--registry", required=True, help="of the images, such as ghcr.io/OWNER")
    chart.add_argument(
        "--digests", type=Path, required=True, help="folder with a file per image: its digest"
    )
    given = parser.parse_args(arguments)
    if given.command == "check":
        problems = version_problems(given.tag)
        print("\n".join(problems) or f"{given.tag}: package, chart and changelog agree")
        return int(bool(problems))
    digests = {
        image: (given.digests / image).read_text(encoding="utf-8").strip()
        for image in IMAGES
        if (given.digests / image).exists()
    }
    try:
        write_chart(given.folder, given.registry, digests)
    except ValueError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
