"""An adapter and a model explain themselves, and carry their base's license on."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from transformers import Gemma4Processor

from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.model_card import (
    FILE_NAME,
    data_figures,
    read_front_matter,
    set_evaluation,
    write_model_card,
)
from canvastune.checkpoint.peft_adapter import write_adapter
from canvastune.config import RunConfig, parse_config, write_config
from canvastune.errors import UserError
from canvastune.merge import merge_folder
from canvastune.model.lora import lora_factors
from pipelines.cli import main
from tests.support.small import shared_model, stock_model, write_checkpoint

LICENSE = "The license,\n  word for word.\n"
DATA = {"source": "rows|of`mine.jsonl", "format": "chat", "rows_read": 4000, "kept": 3990}
DATA |= {"train": 3900, "validation": 90, "fingerprint": "0123456789abcdef0123"}


def recipe(method: str, model: str = "org/model", data: str = "./rows.jsonl") -> RunConfig:
    tree = {"name": "test", "model": {"id": model}, "data": {"source": data}}
    lora = {"rank": 8, "experts": True}
    return parse_config(tree | {"train": {"method": method, "precision": "float32"}, "lora": lora})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder)
    (folder / "LICENSE").write_text(LICENSE)
    (folder / "NOTICE.txt").write_text("Whom to thank.")
    (folder / FILE_NAME).write_text(
        "---\nlicense: gemma\nlicense_link: https://example.com/terms\nlanguage: [en]\n---\n# Base\n"
    )
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    folder.mkdir()
    config = recipe("lora", str(base))
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: (a.detach().clone(), torch.randn(b.shape, generator=generator) * 0.05)
        for name, a, b in lora_factors(shared_model(base, config))
    }
    write_adapter(folder, factors, config, base, DATA)
    write_config(config, folder / "config.yaml")
    write_model_card(folder, "adapter", config, base, DATA)
    return folder


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    assert main(["merge", str(adapter), "--output", str(out)]) == 0
    return out


def card(folder: Path) -> str:
    return (folder / FILE_NAME).read_text(encoding="utf-8")


def test_a_card_names_base_data_and_training(adapter: Path, merged: Path, base: Path) -> None:
    for folder in (adapter, merged):
        text = card(folder)
        for said in (str(base), "4,000", "3,900", "rank 8, alpha 32", "experts too", "config.yaml"):
            assert said in text, f"{folder.name} does not name {said!r}"
        assert "'rows\\|of`mine.jsonl'" in text, "a name with | or ` breaks the table"
    assert "merge_proof.json" in card(merged)


def test_license_and_notice_of_the_base_are_carried_on(adapter: Path, merged: Path) -> None:
    for folder in (adapter, merged):
        assert (folder / "LICENSE").read_text() == LICENSE
        assert (folder / "NOTICE.txt").read_text() == "Whom to thank."
        about = read_front_matter(folder)
        assert about["license"] == "gemma"
        assert about["license_link"] == "https://example.com/terms"
        assert about["language"] == ["en"]
        assert "base_model" not in about, "a local folder is not an id on the Hub"
        assert "[LICENSE](LICENSE), [NOTICE.txt](NOTICE.txt)" in card(folder)
    assert read_front_matter(adapter)["library_name"] == "peft"
    assert read_front_matter(merged)["library_name"] == "transformers"


def test_an_id_on_the_hub_and_its_data_are_linked_and_an_unknown_license_is_said(
    tmp_path: Path,
) -> None:
    config = recipe("full", data="org/rows")
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    write_model_card(tmp_path / "out", "full", config, tmp_path / "base", None)
    about = read_front_matter(tmp_path / "out")
    assert (about["base_model"], about["base_model_relation"]) == ("org/model", "finetune")
    assert about["datasets"] == ["org/rows"]
    assert "license" not in about
    assert "Unknown" in card(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "# no metadata", "---\n[\n---\n", "---\n- a\n---\n", b"\xff"])
def test_a_base_with_any_readme_gives_a_card(text: str | bytes, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    (base / FILE_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    (base / "COPYING").write_text("text")
    write_model_card(out, "full", recipe("full"), base, None)
    assert read_front_matter(out)["license"] == "other"
    assert read_front_matter(out)["license_link"] == "COPYING"


def test_the_evaluation_fills_its_section_and_nothing_else(merged: Path, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(card(merged) + "\n## Mine\n\nkept\n")
    before = card(tmp_path)
    assert set_evaluation(tmp_path, r"**Better**: \1 50.0%")
    assert set_evaluation(tmp_path, r"**Better**: \1 60.0%"), "a repeated step fails"
    after = card(tmp_path)
    assert re.search(r"\n## Evaluation\n\n\*\*Better\*\*: \\1 60\.0%\n\n## Load\n", after)
    assert "50.0%" not in after
    rest = re.compile(r"## Evaluation\n.*?(?=## Load)", re.DOTALL)
    assert rest.sub("", after) == rest.sub("", before)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    (tmp_path / FILE_NAME).write_text("# Mine only\n")
    assert not set_evaluation(tmp_path, "x")
    assert card(tmp_path) == "# Mine only\n"
    (tmp_path / FILE_NAME).unlink()
    assert not set_evaluation(tmp_path, "x")


def test_figures_of_a_mixture_are_those_of_the_data_card(tmp_path: Path) -> None:
    source = {"source": "a", "held_out": False, "share": 0.25, "rows_read": 9, "kept": 8}
    source |= {"train": 7, "validation": 1, "dropped": {}, "fingerprint": "x"}
    (tmp_path / "card.json").write_text(json.dumps(DATA | {"sources": [source], "samples": [1]}))
    found = data_figures(tmp_path)
    assert found is not None
    assert "samples" not in found
    out = tmp_path / "out"
    out.mkdir()
    write_model_card(out, "full", recipe("full"), tmp_path, found)
    assert "| `a` | 25.0% | 8 | 7 | 1 |" in card(out)
    assert data_figures(tmp_path / "out") is None
    (tmp_path / "card.json").write_text("[1]")
    with pytest.raises(UserError, match=r"card\.json: .*\bdata card\b"):
        data_figures(tmp_path)


def test_stock_peft_merges_as_the_adapters_card_says(
    base: Path, adapter: Path, merged: Path
) -> None:
    code = re.findall(r"```python\n(.*?)```", card(adapter), re.DOTALL)[1]
    model: Any = PeftModel.from_pretrained(stock_model(base), str(adapter))
    plain: Any = PeftModel.from_pretrained(stock_model(base), str(adapter)).merge_and_unload()
    scope: dict[str, Any] = {"model": model}
    exec(code, scope)
    found, reader = scope["merged"].state_dict(), CheckpointReader(merged)
    before, name = CheckpointReader(base), "model.decoder.layers.0.self_attn.q_proj.weight"
    update = reader.get(name) - before.get(name)
    twice = (plain.state_dict()[name] - before.get(name)).norm() / update.norm()
    assert float(twice) == pytest.approx(2, abs=1e-3), "PEFT no longer adds the update twice"
    for name in reader.names():
        difference = (found[name].double() - reader.get(name).double()).abs().max()
        assert float(difference) < 1e-5, f"{name} is not merged as the card says"


def test_an_adapter_is_merged_with_a_base_elsewhere_and_not_without_a_recipe(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "deep" / "adapter"
    moved.mkdir(parents=True)
    for file in adapter.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    recipe = yaml.safe_load((moved / "config.yaml").read_text())
    recipe["model"]["id"] = str(tmp_path / "gone")
    (moved / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"^model\.id: .*/gone\b"):
        merge_folder(moved, tmp_path / "out")
    merge_folder(moved, tmp_path / "out", str(base))
    assert (
        CheckpointReader(tmp_path / "out").fingerprint() == CheckpointReader(merged).fingerprint()
    )
    (moved / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"no config\.yaml"):
        merge_folder(moved, tmp_path / "other")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        merge_folder(base, tmp_path / "other")


def test_the_tiny_models_processor_file_names_what_stock_transformers_builds(
    tiny_model: Path,
) -> None:
    """Building it needs torchvision, which is not among our dependencies."""
    tree = json.loads((tiny_model / "processor_config.json").read_text())
    assert tree.pop("processor_class") == "Gemma4Processor"
    parts = inspect.signature(Gemma4Processor.__init__).parameters
    assert set(tree) <= set(parts)
    needed = {name for name in parts if name.endswith(("_processor", "_extractor"))}
    assert needed <= set(tree), "stock transformers would look for another file"
    for name in needed:
        assert hasattr(transformers, tree[name][f"{name}_type"])
    vision = json.loads((tiny_model / "config.json").read_text())["vision_config"]
    for name in ("image_processor", "video_processor"):
        for key in ("patch_size", "pooling_kernel_size"):
            assert tree[name][key] == vision[key], f"{name} cuts other patches than the model"
        # The numbers that transformers takes; its module needs torchvision too.
        assert tree[name]["max_soft_tokens"] in (70, 140, 280, 560, 1120)
