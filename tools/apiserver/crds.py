"""CRDs of operators, in one version or several."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Crd:
    """A CRD of a file: GROUP_PLURAL.vVERSION.yaml."""

    version: tuple[int, ...]
    document: dict[str, Any]

    @property
    def text(self) -> str:
        return ".".join(map(str, self.version))


def read_crds(folder: Path) -> dict[str, list[Crd]]:
    """Return the CRDs of a folder by name, the oldest version first."""
    found: dict[str, list[Crd]] = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(folder.glob("*.yaml")):
        version = re.search(r"\.v(\d+)\.(\d+)\.(\d+)\.yaml$", path.name)
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        if version and document["kind"] == "CustomResourceDefinition":
            crd = Crd(tuple(map(int, version.groups())), document)
            found.setdefault(document["metadata"]["name"], []).append(crd)
    return {name: sorted(crds, key=lambda crd: crd.version) for name, crds in found.items()}
