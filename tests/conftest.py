"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from canvastune.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random DiffusionGemma; nobody writes into it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return folder
