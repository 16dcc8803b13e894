"""Run the tests with the newest libraries that pip resolves, and print what differs from the pins.

`make test-newest` runs this. The libraries go into build/newest, a separate environment (about 6 GB
with torch for CUDA). What fails there is run again here, with the pinned versions: what passes here
is the difference. `OPTIONS="--keep torch -- tests/unit -k cache"` keeps a pin and chooses the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "build" / "newest"
# A score is comparable only with one of the same version.
_KEPT = ("sacrebleu",)
_EVERY_TEST = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
_VERSIONS = (
    "import importlib.metadata as m, json;"
    "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
)


def main() -> int:
    options = _parse(sys.argv[1:])
    python = ENVIRONMENT / "bin" / "python"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["pipeline"]]
    development = [
        line for line in project["optional-dependencies"]["dev"] if "canvastune[" not in line
    ]
    if not options.installed:
        _install(python, [*loosen(required, {*_KEPT, *options.keep}), *development])
    print("\n".join(describe_versions(required, _versions(sys.executable), _versions(python))))
    print(*_newer_on_the_index(python, required), sep="\n")
    failed = _run_tests(python, options.tests or list(_EVERY_TEST), "newest")
    if not failed:
        print("The tests pass with these versions.")
        return 0
    here = _run_tests(sys.executable, sorted(failed), "pinned")
    print("\n".join(describe_failures(failed, here)))
    return int(bool(set(failed) - set(here)))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tools.newest", description=__doc__)
    parser.add_argument(
        "--keep", action="append", default=[], metavar="PACKAGE", help="a package to leave pinned"
    )
    parser.add_argument(
        "--installed", action="store_true", help="use build/newest as it is, without installing"
    )
    parser.add_argument(
        "tests", nargs="*", help="arguments of pytest after -- (default: every test)"
    )
    return parser.parse_args(arguments)


def loosen(requirements: Iterable[str], keep: Collection[str] = ()) -> list[str]:
    """Drop pins and upper bounds, but not lower ones; `keep` names packages to leave as they are."""
    kept, found = {canonicalize_name(name) for name in keep}, []
    for text in requirements:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) not in kept:
            lower = [str(each) for each in requirement.specifier if each.operator in (">=", ">")]
            requirement.specifier = SpecifierSet(",".join(lower))
        found.append(str(requirement))
    return found


def describe_versions(
    requirements: Iterable[str], here: dict[str, str], newest: dict[str, str]
) -> list[str]:
    """Return a line for each required package whose version is not the one installed here."""
    lines = []
    for text in requirements:
        name = canonicalize_name(Requirement(text).name)
        if here.get(name) != newest.get(name):
            lines.append(f"{name}: {here.get(name)} here, newest that resolves {newest.get(name)}")
    return lines or ["Every required package has the version that is installed here."]


def describe_failures(newest: dict[str, str], pinned: Collection[str]) -> list[str]:
    """Return what fails only with the newest versions, with its reason, and what fails with both."""
    only = [name for name in newest if name not in pinned]
    lines = [f"{len(only)} tests fail with the newest versions only:"]
    lines += [f"  {name}: {newest[name]}" for name in only]
    both = [name for name in newest if name in pinned]
    if both:
        lines += [f"{len(both)} tests fail with the pinned versions, too:"]
        lines += [f"  {name}" for name in both]
    return lines


def failures(report: Path) -> dict[str, str]:
    """Return the first line of each failure in a JUnit report, by the test's pytest id."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((each for each in case if each.tag in ("failure", "error")), None)
        if problem is not None:
            file = case.attrib.get("file", "")
            module = file.removesuffix(".py").replace("/", ".")
            inner = case.attrib["classname"].removeprefix(module).strip(".")
            name = "::".join(filter(None, (file, inner, case.attrib["name"])))
            message = problem.attrib.get("message", "").strip().splitlines()
            found[name] = message[0] if message else "no message"
    return found


def _install(python: Path, requirements: list[str]) -> None:
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run([*pip, *upgrade, *requirements], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)


def _versions(python: Path | str) -> dict[str, str]:
    command = [str(python), "-c", _VERSIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return {canonicalize_name(name): version for name, version in json.loads(done.stdout).items()}


def _newer_on_the_index(python: Path, requirements: Iterable[str]) -> list[str]:
    """Return a line for each package of which the index has a newer version than the newest that
    resolves: another package does not allow it, or a file that it needs is missing.
    """
    lines, installed = [], _versions(python)
    for text in requirements:
        name = canonicalize_name(Requirement(text).name)
        command = [str(python), "-m", "pip", "index", "versions", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        match = re.match(rf"{re.escape(name)} \(([^)]+)\)", done.stdout, re.IGNORECASE)
        if match and match[1] != installed.get(name):
            lines.append(f"{name}: {match[1]} is on the index, and does not resolve")
    return lines


def _run_tests(python: Path | str, arguments: list[str], what: str) -> dict[str, str]:
    """Run pytest; return what failed. Raises: SystemExit, pytest did not run the tests."""
    report = ROOT / "build" / f"{what}.xml"
    report.unlink(missing_ok=True)
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    options = ["-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    command = [str(python), "-m", "pytest", *options, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, check=False)
    if done.returncode not in (0, 1) or not report.exists():
        raise SystemExit(f"pytest ended with {done.returncode}: {' '.join(command)}")
    return failures(report)


if __name__ == "__main__":
    sys.exit(main())
