"""Write docs/recipes.md from the fields of the config: `python -m tools.recipes_page`."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator, AliasChoices
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, PydanticUndefined

from canvastune.config import RunConfig, load_config
from canvastune.config.strict import StrictModel, affects_weights
from canvastune.perf_model.hardware import ACCELERATORS
from canvastune.planner.planner import SHIPPED_CONFIG, make_plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
_FIXED = {None: "`null`", types.NoneType: "`null`", bool: "`true` or `false`"}
_NUMBERS = {int: "integer", float: "number"}
_BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
_LENGTHS = {
    MinLen: ("min_length", "minimum length {}"),
    MaxLen: ("max_length", "maximum length {}"),
}
_SCALAR_END = "\n..."  # the end of a YAML document that is one value
_PIPE = r"\|"  # a bar in a table cell
_INTRODUCTION = """# Recipes

A recipe is a YAML file that describes a run. Only two keys have no default, so this is the shortest
recipe:

```yaml
name: first
data:
  source: rows.jsonl
```

It runs LoRA on the released model, on eight GPUs. Canvastune ships with these recipes:

| recipe | what it does |
|---|---|
{recipes}

The next table shows what `canvastune plan` predicts for the four recipes of the released model, with
examples of 1,024 tokens.
*Validation* is its share of the time of all steps; *copies, files* is how long training waits for
the copies of checkpoints in host memory, and for their files:

| recipe | steps | time per step | bound by | tokens/s | all steps | validation | copies, files | memory per GPU, GB |
|---|---|---|---|---|---|---|---|---|
{plans}

- `--set key=value` changes a key for one run, for example `--set lora.rank=32 --set train.method=full`.
  Values are YAML, and the option can be repeated. `canvastune run`, `plan`, `prepare`, `submit`,
  `doctor` and `canvastune.train` accept it.
- Unknown keys, duplicate keys and values of the wrong type are rejected; for an unknown key, the
  error suggests the closest known one. See [troubleshooting](troubleshooting.md#recipe).
- Every output directory contains the complete recipe, including defaults, as `config.yaml`, which
  is itself a valid recipe.
- On a cluster, the chart provides defaults for the section [cluster](#cluster). Values in the
  recipe take precedence.
- An unfinished run can only be resumed with the recipe and data that it was started with, both in
  the pipeline and with `canvastune.train`. Settings that do not affect the trained weights may differ:
  {changeable}.

`python -m tools.recipes_page` generates this page from `canvastune/config`; a test fails if it is
out of date.

## Top level

{own}"""
RECIPES = {
    "gsm8k_lora": "the released model on GSM8K: LoRA on attention and dense MLP, 8 GPUs of 80 GB, "
    "8-way expert parallelism",
    "gsm8k_sft": "the same with full fine-tuning: every weight except the router and the vision "
    "tower",
    "gsm8k_lora_throughput": "`gsm8k_lora` with 128 examples per step instead of 8, to make full use of the GPUs, "
    "and a sixteenth of the steps",
    "gsm8k_sft_throughput": "the same changes to `gsm8k_sft`",
    "tiny_tools": "LoRA on the tiny base with tool-use conversations; `make run` prepares its data",
    "tiny_support": "LoRA on a second tiny base with a support desk's answers; `make demo-support` runs it",
    "tiny_lora": "LoRA on the tiny base with word problems, in two processes on CPU; `make run` runs it",
    "tiny_sft": "full fine-tuning from random weights; `python -m tools.tiny_base` uses it to make the tiny base",
}


def page() -> str:
    """Return the whole page, in Markdown."""
    recipes = "\n".join(
        f"| [`{name}.yaml`](../pipelines/recipes/{name}.yaml) | {what} |"
        for name, what in RECIPES.items()
    )
    plans = "\n".join(_plan(name) for name in RECIPES if name.startswith("gsm8k"))
    own = {
        name: field
        for name, field in RunConfig.model_fields.items()
        if _section(field.annotation) is None
    }
    parts = [
        _INTRODUCTION.format(
            recipes=recipes, plans=plans, changeable=_changeable(), own=_table(_rows(own, ""))
        )
    ]
    for name, field in RunConfig.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            parts.append(
                f"## {name}\n\n{_about(section)}\n\n"
                f"{_table(_rows(section.model_fields, f'{name}.'))}"
            )
            parts += [
                f"An entry of `{key}`:\n\n{_table(_rows(entry.model_fields, ''))}"
                for key, entry in _entries(section, f"{name}.")
            ]
    return "\n\n".join(parts) + "\n"


def _plan(name: str) -> str:
    config = load_config(ROOT / "pipelines" / "recipes" / f"{name}.yaml")
    plan = make_plan(config, SHIPPED_CONFIG, config.world_size)
    cells = (
        f"`{name}`",
        f"{config.train.steps}",
        f"{plan.step_seconds:.2f} s",
        plan.seconds.bound,
        f"{plan.tokens_per_step / plan.step_seconds:,.0f}",
        f"{plan.run_seconds / 60:.1f} min",
        f"{plan.validation.share:.1%}",
        f"{plan.checkpoint_times.staged:.1f} s, {plan.checkpoint_times.behind:.1f} s",
        f"{plan.memory_bytes / 1e9:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def values_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Describe the values that a key accepts."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values_of(parts[0], (*parts[1:], *metadata))
    if origin in (Union, types.UnionType, Literal):
        return _one_of(
            [f"`{part}`" if origin is Literal else values_of(part, metadata) for part in parts]
        )
    if origin is dict and parts[1] is Any:
        return "mapping"
    if origin is dict:
        return f"mapping from {values_of(parts[0])} to {values_of(parts[1])}"
    if origin is tuple:
        several = "list of" if parts[-1] is Ellipsis else str(len(parts))
        return f"{several} {values_of(parts[0], metadata)}{'' if _section(parts[0]) else 's'}"
    return _of_one_kind(annotation, metadata)


def _one_of(choices: list[str]) -> str:
    """Join choices as `a`, `b` or `c`; with `; or` if one of them has a comma."""
    *first, last = [choice for part in choices for choice in part.split(" or ")]
    if not first:
        return last
    return f"{', '.join(first)}{'; or' if ', ' in first[-1] else ' or'} {last}"


def _of_one_kind(annotation: Any, metadata: tuple[Any, ...]) -> str:
    if (section := _section(annotation)) is not None:
        return f"{{{', '.join(section.model_fields)}}}"
    return _FIXED.get(annotation) or _bounded(_NUMBERS.get(annotation, "string"), metadata)


def _bounded(kind: str, metadata: tuple[Any, ...]) -> str:
    """Describe a number or string with its bounds."""
    words = []
    for limit in metadata:
        if type(limit) in _BOUNDS and kind != "string":
            attribute, word = _BOUNDS[type(limit)]
            words.append(f"{word} {getattr(limit, attribute)}")
        elif type(limit) in _LENGTHS and kind == "string":
            attribute, form = _LENGTHS[type(limit)]
            words.append(form.format(getattr(limit, attribute)))
        elif isinstance(limit, AfterValidator):
            return _expected(limit)
        elif (pattern := getattr(limit, "pattern", None)) is not None:
            words.append(f"`{pattern}`")
    return ", ".join([kind, *words])


def _expected(check: AfterValidator) -> str:
    """Return what a validator of text expects, from the message that it raises."""
    try:
        check.func("\0")  # type: ignore[call-arg]
    except PydanticCustomError as error:
        return re.sub(r"^an? |(:|,? such as).*", "", error.message())
    raise AssertionError(f"{check} takes anything")


def _rows(fields: dict[str, FieldInfo], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield dotted key, values, default and meaning of every field, depth first.

    Raises:
        AssertionError: a field has no description.
    """
    for name, field in fields.items():
        section = _section(field.annotation)
        if section is not None:
            yield from _rows(section.model_fields, f"{prefix}{name}.")
            continue
        assert field.description, f"{prefix}{name} has no description"
        known = (
            _one_of([f"`{value}`" for value in ACCELERATORS])
            if (prefix, name) == ("hardware.", "accelerator")
            else None
        )
        yield (
            f"`{prefix}{name}`",
            known or values_of(field.annotation, tuple(field.metadata)),
            _default(field),
            _meaning(field),
        )


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000)
    return f"`{text.partition(_SCALAR_END)[0].strip()}`"


def _meaning(field: FieldInfo) -> str:
    """Return a field's description, with the older names that a recipe may use for it."""
    assert field.description is not None
    if not isinstance(field.validation_alias, AliasChoices):
        return field.description
    older = ", ".join(f"`{name}`" for name in field.validation_alias.choices[1:])
    return f"{field.description}; older name, still accepted, and written by the steps: {older}"


def _table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    cells = [("key", "values", "default", "meaning"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', _PIPE) for cell in row)} |" for row in cells)


def _entries(section: type[StrictModel], prefix: str) -> Iterator[tuple[str, type[StrictModel]]]:
    """Yield the keys whose value is a list or a mapping of sections."""
    for name, field in section.model_fields.items():
        for part in get_args(field.annotation):
            if (entry := _section(part)) is not None:
                yield prefix + name, entry


def _section(annotation: Any) -> type[StrictModel] | None:
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, StrictModel) else None
    )


def _about(section: type[StrictModel]) -> str:
    return " ".join((section.__doc__ or "").split())


def _changeable() -> str:
    """List what may change between two attempts at one run: whole sections first, then keys."""
    sections, keys = [], []
    for name, field in RunConfig.model_fields.items():
        section = _section(field.annotation)
        if not affects_weights(field):
            sections.append(f"`{name}`")
        elif section is not None:
            keys += [
                f"`{name}.{key}`"
                for key, own in section.model_fields.items()
                if not affects_weights(own)
            ]
    return f"the sections {', '.join(sections)}, and the keys {', '.join(keys)}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
