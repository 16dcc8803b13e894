"""README.md of an adapter or model folder: what it is, how to load it, under which license."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from canvastune import __version__
from canvastune.checkpoint.hub import LEGAL_FILES, copy_files
from canvastune.config import RunConfig
from canvastune.config.places import is_path
from canvastune.errors import UserError, one_line
from canvastune.io.atomic import replace_text
from canvastune.io.markdown import code, table

FILE_NAME = "README.md"
Kind = Literal["adapter", "merged", "full"]

_LICENSE_KEYS = ("license", "license_name", "license_link")
_CARRIED_KEYS = (*_LICENSE_KEYS, "pipeline_tag", "language")
_FRONT_MATTER = re.compile(r"\A---\s*\n(?P<yaml>.*?)\n---\s*(\n|\Z)", re.DOTALL)
_DATA_KEYS = ("source", "format", "rows_read", "kept", "train", "validation", "fingerprint")
_SOURCE_KEYS = ("source", "held_out", "share", "rows_read", "kept", "train", "validation")
_TITLES = {
    "adapter": "LoRA adapter of DiffusionGemma",
    "merged": "DiffusionGemma, tuned with LoRA and merged",
    "full": "DiffusionGemma, fully tuned",
}
_EVALUATION = "## Evaluation"
_NOT_EVALUATED = "Not evaluated when this file was written."
_FIRST_CARD = (
    _EVALUATION + "\n\n" + _NOT_EVALUATED + " The run's report has the figures, once it is there."
)


def write_model_card(
    folder: Path,
    kind: Kind,
    config: RunConfig,
    base: Path,
    data: Mapping[str, Any] | None,
) -> None:
    """Write README.md, and copy the base's license files next to it.

    Args:
        folder: of the adapter or the model, being written.
        base: the folder of the base, whose README.md may name a license.
        data: of the data card, as `data_figures` returns them; None: not known.
    """
    legal = copy_files(base, folder, LEGAL_FILES)
    given = read_front_matter(base)
    blocks = [
        _front_matter(kind, config, given, legal),
        f"# {_TITLES[kind]}",
        _what(kind, config),
        _facts(kind, config),
        "## Data",
        _data(data),
        _FIRST_CARD,
        "## Load",
        _usage("adapter").replace("BASE", json.dumps(config.model.id), 1)
        if kind == "adapter"
        else _usage("model"),
        "## License",
        _license(given, legal),
    ]
    (folder / FILE_NAME).write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def set_evaluation(folder: Path, text: str) -> bool:
    """Put an evaluation's figures into the README.md of a folder; return whether there is one.

    The rest of the file is kept as it is, with changes that a person made.

    Args:
        text: Markdown without headings.
    """
    file = folder / FILE_NAME
    if not file.is_file():  # a model of an earlier version
        return False
    card = file.read_text(encoding="utf-8")
    section = re.compile(rf"^{_EVALUATION}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    new, count = section.subn(lambda _: f"{_EVALUATION}\n\n{text}\n\n", card, count=1)
    if not count:  # a person removed the section
        return False
    replace_text(file, new)
    return True


def data_figures(prepared: Path | None) -> dict[str, Any] | None:
    """Return the figures of a prepared data set's card that a model card shows, if there is one.

    Raises:
        UserError: the card is not a JSON object.
    """
    file = prepared / "card.json" if prepared is not None else None
    if file is None or not file.is_file():
        return None
    try:
        card = dict(json.loads(file.read_text(encoding="utf-8")))
        figures = {key: card[key] for key in _DATA_KEYS if key in card}
        if "sources" in card:
            figures["sources"] = [
                {key: source[key] for key in _SOURCE_KEYS if key in source}
                for source in card["sources"]
            ]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file}: not a data card ({one_line(error)})", hint="Prepare the data again."
        ) from None
    return figures


def read_front_matter(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's README.md; nothing if it has none that can be read."""
    try:
        text = (folder / FILE_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # a base needs no README.md: its license is then unknown
        return {}
    found = _FRONT_MATTER.match(text)
    try:
        tree = yaml.safe_load(found["yaml"]) if found else None
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _front_matter(
    kind: Kind, config: RunConfig, given: Mapping[str, Any], legal: Sequence[str]
) -> str:
    tree: dict[str, Any] = {}
    # Only a Hub id is valid.
    if not is_path(config.model.id) and not Path(config.model.id).exists():
        tree["base_model"] = config.model.id
        tree["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
    tree["library_name"] = "peft" if kind == "adapter" else "transformers"
    tree |= {key: given[key] for key in _CARRIED_KEYS if key in given}
    # A link to a file of the base's repository leads to our copy.
    if "license" not in given and legal:
        tree |= {"license": "other", "license_link": legal[0]}
    hub = [
        source.source
        for source in config.data.sources
        if not is_path(source.source) and not Path(source.source).exists()
    ]
    if hub:
        tree["datasets"] = hub
    tree["tags"] = ["canvastune", "diffusion_gemma", *(["lora"] if kind != "full" else [])]
    return f"---\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}---"


def _what(kind: Kind, config: RunConfig) -> str:
    made = {
        "adapter": "LoRA adapter for the base model {}, in PEFT's layout.",
        "merged": "Complete model: the base {} with a LoRA adapter merged into it, in the Hub's layout.",
        "full": "Complete model: the base {}, fully tuned, in the Hub's layout.",
    }[kind]
    return f"{made.format(code(config.model.id))} Made by Canvastune {__version__}."


def _facts(kind: Kind, config: RunConfig) -> str:
    train, lora = config.train, config.lora
    rows = {
        "base": code(config.model.id),
        "base's revision": code(config.model.revision or "not named"),
        "recipe": f"{code(config.name)}; the complete recipe is in `config.yaml`",
        "training": f"{train.steps} steps of {train.global_batch_size} examples, {train.precision}",
        "learning rate": f"{config.optimizer.lr:g}",
        "seed": str(config.seed),
    }
    if kind != "full":
        experts = ", experts too" if lora.experts else ""
        rows["LoRA"] = f"rank {lora.rank}, alpha {lora.alpha:g}{experts}"
    files = {
        "adapter": "`canvastune.json` has the fingerprint of the base",
        "merged": "`provenance.json`; `merge_proof.json` compares this model with base and adapter",
        "full": "`provenance.json`",
    }
    rows["made from"] = files[kind]
    return table(rows.items())


def _data(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return "Unknown: the prepared data was not available when this file was written."
    rows = [
        ("source", code(data.get("source"))),
        ("format", code(data.get("format"))),
        ("rows read", _number(data.get("rows_read"))),
        ("examples kept", _number(data.get("kept"))),
        ("trained on", _number(data.get("train"))),
        ("held out", _number(data.get("validation"))),
        ("fingerprint", code(str(data.get("fingerprint"))[:16])),
    ]
    text = table(rows)
    sources = data.get("sources")
    if not sources:
        return text
    header = ("source", "share", "rows kept", "trained on", "held out")
    lines = [
        (
            code(each.get("source")),
            "held out" if each.get("held_out") else f"{each.get('share', 0):.1%}",
            *(_number(each.get(key)) for key in ("kept", "train", "validation")),
        )
        for each in sources
    ]
    return f"{text}\n\n{table(lines, header)}"


def _usage(kind: str) -> str:
    """Return how an adapter or a model is loaded and served, as Markdown."""
    return Path(__file__).with_name(f"use_{kind}.md").read_text(encoding="utf-8").rstrip("\n")


def _license(given: Mapping[str, Any], legal: Sequence[str]) -> str:
    named = given.get("license_name") or given.get("license")
    text = (
        f"The base's license, {code(named)}, applies to this folder."
        if named
        else "The base's license applies to this folder."
    )
    if legal:
        return f"{text} Files of the base: {', '.join(f'[{name}]({name})' for name in legal)}."
    if named:
        link = given.get("license_link")
        return f"{text} Its text: {link}." if link else text
    return (
        f"{text} The base's folder neither names one nor has a license file: look it up and add "
        "it here before you share this folder."
    )


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "not known"
