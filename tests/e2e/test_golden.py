"""What users rely on does not change: losses, prepared tokens, options, exit codes, resuming old
checkpoints.

The expected values are in `tests/golden/`; its README says when and how they may change. The tests
drive
commands and read files only. `python -m tools.loss_compare --base REV` compares more, bit for bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.golden import FOLDER, golden
from tools.loss_compare import snapshot
from tools.loss_compare.side import Side, exit_codes, options_of_commands, prepared_forms, training

SHORT = (
    "train.steps=3",
    "train.global_batch_size=4",
    "train.checkpoint_every=100",
    "train.validate_every=100",
)
RUNS = {
    "full": (("full", 1), ("full", 2)),
    "lora with experts": (("lora-experts", 1), ("lora-experts", 2)),
}
AFTER_UPDATES = 2e-4
CHECKPOINT = ("train.method=lora", "train.global_batch_size=4", "parallel.ep=1")


@pytest.fixture(scope="module")
def here(commands: Side, tiny_model: Path) -> Side:
    """The commands of this tree, in a folder with a recipe, its rows, the prepared rows, and the
    tiny model.
    """
    (commands.folder / "model").symlink_to(tiny_model)
    shutil.copytree(FOLDER / "prepared", commands.folder / "prepared")
    return commands


@pytest.mark.parametrize("runs", RUNS.values(), ids=list(RUNS))
def test_the_same_recipe_gives_the_losses_that_it_gave(
    here: Side, runs: tuple[tuple[str, int], ...]
) -> None:
    curves = []
    for method, ranks in runs:
        output = f"{method}-{ranks}"
        found = snapshot.losses(
            here.train(
                output, *snapshot.METHODS[method], *SHORT, f"parallel.ep={ranks}", ranks=ranks
            )
        )
        expected = golden(f"losses-{output}", found)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            # Not bit for bit: another CPU sums in another order. After an update, a token between
            # two experts may go to the other one.
            assert found[name][:1] == pytest.approx(values[:1], rel=1e-5), f"{output}: {name}"
            assert found[name] == pytest.approx(values, rel=AFTER_UPDATES), f"{output}: {name}"
        curves.append(found)
    for name, values in curves[0].items():
        assert curves[1][name] == pytest.approx(values, rel=AFTER_UPDATES), (
            f"{name} depends on the number of ranks"
        )


def test_rows_of_every_form_are_prepared_as_they_were(here: Side) -> None:
    found = prepared_forms(here)
    assert found == golden("prepared", found), (
        "prepared data changed. If this is intended, raise PREPARATION_VERSION, so that no run"
        " resumes on different data, and update the values (tests/golden/README.md)"
    )


def test_no_command_or_option_is_lost(here: Side) -> None:
    found = options_of_commands(here)
    assert found == golden("options", found)
    assert found["canvastune COMMAND"] == sorted(snapshot.COMMANDS)


def test_exit_codes_stay(here: Side) -> None:
    found = exit_codes(here)
    assert found == golden("exit-codes", found)


def test_a_checkpoint_of_an_earlier_version_is_resumed(here: Side) -> None:
    run = here.folder / "earlier"
    shutil.copytree(FOLDER / "checkpoint", run)
    here.run("canvastune.train", *training(run.name, *CHECKPOINT), ranks=1)
    assert snapshot.resumed_from(run) == [3], "trained from the beginning"
    found = snapshot.losses(run)
    expected = golden("losses-checkpoint", found)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=AFTER_UPDATES), (
            f"{name} after the checkpoint is not what it would have been"
        )
    assert snapshot.file_names(run / "adapter") == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "canvastune.json",
        "config.yaml",
    ]
