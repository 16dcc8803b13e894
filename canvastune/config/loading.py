"""Read a recipe: YAML, defaults and `--set`, with an error text that names the line or the key."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import AliasChoices, ValidationError
from pydantic.fields import FieldInfo

from canvastune.config.data import DataConfig
from canvastune.config.schema import RunConfig
from canvastune.config.strict import StrictModel, affects_weights, flatten
from canvastune.errors import UserError, one_line, type_of

Section = TypeVar("Section", bound=StrictModel)
_EXAMPLE = "pipelines/recipes/tiny_lora.yaml"
_EPOCHS = "train.steps: an epoch is the training rows of the data card / train.global_batch_size"
# What other trainers call a setting, and which one it is here.
_OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "lr_scheduler_type": "optimizer.schedule",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "max_steps": "train.steps",
    "num_train_epochs": _EPOCHS,
    "epochs": _EPOCHS,
    "batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size, or train.global_batch_size for all ranks",
    "gradient_accumulation_steps": "train.global_batch_size; the number of forwards follows from it",
    "gradient_checkpointing": "train.activation_checkpointing",
    "logging_steps": "train.log_every",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "eval_steps": "train.validate_every",
    "max_seq_length": "data.seq_length",
    "max_length": "data.seq_length",
    "dataset_name": "data.source",
    "train_file": "data.source",
    "validation_file": "data.validation",
    "model_name_or_path": "model.id",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.experts: attention and dense MLP always have adapters",
    "output_dir": "the option --workspace",
}


class _Loader(yaml.SafeLoader):
    """A YAML reader that refuses duplicate keys; the library's own silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"duplicate key {key.value!r}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def load_yaml_file(path: Path) -> Any:
    """Return the value that a YAML file holds.

    Raises:
        UserError: a file that cannot be read, that is not UTF-8, or that `load_yaml` refuses.
    """
    return load_yaml(_read_text(path), str(path))


def load_yaml(text: str, where: str) -> Any:
    """Return the value that a YAML text holds.

    Args:
        where: the file or option, for messages.

    Raises:
        UserError: not YAML (a tab, an open bracket, ...), a duplicate key in a mapping, or a value
            that is invalid for its YAML type.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        problem = " ".join(filter(None, (error.problem, error.context)))
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(
            f"{where}: {place}invalid YAML: {problem}",
            hint="Correct this line, or the one above it.",
        ) from None
    except yaml.YAMLError as error:
        raise UserError(
            f"{where}: invalid YAML: {' '.join(str(error).split())}",
            hint="Save it as plain UTF-8 text.",
        ) from None
    except RecursionError:
        raise UserError(
            f"{where}: invalid YAML: nested too deeply",
            hint="Write only sections and keys.",
        ) from None
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # Raised by the constructor of a type: the date `2001-13-45`.
        reason = one_line(error, 120)
        raise UserError(
            f"{where}: invalid value for its YAML type: {reason}",
            hint="Put the value in quotes, or correct it.",
        ) from None


def load_config(recipe: Path | str, overrides: Sequence[str] | None = None) -> RunConfig:
    """Read a recipe from a YAML file and apply `key=value` overrides.

    Args:
        overrides: values are YAML: `lora.rank=32`, `train.method=full`.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known one), or an
            invalid value.
    """
    path = Path(recipe)
    if not path.is_file():
        raise UserError(
            f"{path}: no such recipe file",
            hint=f"Check the path; an example is {_EXAMPLE}.",
        )
    return loads(_read_text(path), overrides=overrides or (), source=str(path))


def loads(
    text: str,
    *,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    source: str = "recipe",
) -> RunConfig:
    """Read a recipe from YAML text, fill in defaults of `cluster` and apply `key=value` overrides.

    Args:
        overrides: applied in order; they win over the text.
        defaults: settings of the section `cluster`, which the text wins over; mappings such as
            `env` are merged key by key.
        source: what the text is, for messages.

    Raises:
        UserError: as `load_config`.
    """
    tree = _mapping(load_yaml(text, source), source)
    if defaults:
        tree = _with_cluster_defaults(tree, defaults)
    given = {_apply_override(tree, override): f"--set {override}" for override in overrides}
    return parse_config(tree, source, given)


def parse_config(
    tree: dict[str, Any] | str, where: str = "recipe", given: Mapping[str, str] | None = None
) -> RunConfig:
    """Validate a tree, or its JSON text, as a RunConfig.

    Args:
        given: keys that do not come from `where`, with what set each of them, for messages.

    Raises:
        UserError: one line per problem, each naming the key, the value and what is allowed.
    """
    if isinstance(tree, str):
        try:
            tree = json.loads(tree)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not JSON: {error}",
                hint="Pass the output of the step `resolve`.",
            ) from None
    return parse_section(RunConfig, _mapping(tree, where), where, given)


def parse_section(
    section: type[Section], tree: Any, where: str, given: Mapping[str, str] | None = None
) -> Section:
    """Validate a tree as one section.

    Args:
        given: as for `parse_config`.

    Raises:
        UserError: as `parse_config`.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        found = [_explain(problem) for problem in error.errors()]
        places = [_place(problem["loc"], given or {}, where) for problem in error.errors()]
        if section is not RunConfig:  # hints about keys are for a recipe's
            keys = f"The keys are {', '.join(section.model_fields)}."
            unknown = [problem["type"] == "extra_forbidden" for problem in error.errors()]
            found = [
                (text, keys if new else hint)
                for (text, hint), new in zip(found, unknown, strict=True)
            ]
    told = zip(places, found, strict=True)
    message = "\n".join(f"{place}: {problem}" for place, (problem, _) in told)
    raise UserError(message, hint=" ".join(dict.fromkeys(hint for _, hint in found if hint)))


def write_config(config: RunConfig, path: Path) -> None:
    """Write the whole tree, defaults included, as YAML."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    path.write_text(text, encoding="utf-8")


def known_keys(section: type[StrictModel] = RunConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Return every dotted key with its field, sections before their keys, names before aliases."""
    keys: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        keys |= {prefix + spelling: field for spelling in _spellings(name, field)}
        if isinstance(field.annotation, type) and issubclass(field.annotation, StrictModel):
            keys |= known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _spellings(name: str, field: FieldInfo) -> list[str]:
    """Return the names that a recipe may use for a field, the current one first."""
    choices = field.validation_alias
    return list(map(str, choices.choices)) if isinstance(choices, AliasChoices) else [name]


def _current_name(key: str) -> str:
    """Return the current spelling of a known dotted key."""
    field = known_keys()[key]
    prefix, dot, name = key.rpartition(".")
    return f"{prefix}{dot}{_spellings(name, field)[0]}"


def _with_cluster_defaults(tree: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    own = tree.get("cluster") or {}
    if not isinstance(own, dict):  # the validation names the problem
        return tree
    merged = {
        key: {**defaults[key], **value}
        for key, value in own.items()
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
    }
    return {**tree, "cluster": {**defaults, **own, **merged}}


def changed_settings(
    old: Mapping[str, Any], new: RunConfig, *, affecting_weights: bool = True
) -> list[tuple[str, Any, Any]]:
    """List the settings that differ between two recipes and make them different runs: (key, before,
    after).

    Args:
        old: the whole tree of a recipe, nested or with dotted keys, as this version or an earlier
            one wrote it; a key that an earlier version did not know has its default.
        affecting_weights: False lists the others instead: those that an unfinished run may change,
            as they decide no weight.
    """
    defaults = RunConfig(name="default", data=DataConfig(source="default")).model_dump(mode="json")
    before, after = flatten(defaults) | flatten(old), flatten(new.model_dump(mode="json"))
    return [
        (key, before.get(key), value)
        for key, value in after.items()
        if before.get(key) != value and _affects_weights(key) == affecting_weights
    ]


def _affects_weights(key: str) -> bool:
    """Look up a dotted key; if its section affects no weight, no key of it does."""
    known = known_keys()
    names = key.split(".")
    prefixes = (".".join(names[: end + 1]) for end in range(len(names)))
    return all(affects_weights(known[prefix]) for prefix in prefixes if prefix in known)


def _place(location: Sequence[Any], given: Mapping[str, str], where: str) -> str:
    """Return what set the key at a place: an option, or the recipe."""
    key = ".".join(map(str, location))
    setters = [told for name, told in given.items() if f"{key}.".startswith(f"{name}.")]
    return setters[-1] if setters else where


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Set the key of an override; return its current name."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(
            f"--set {override}: expected key=value",
            hint="Write for example --set lora.rank=32.",
        )
    if key not in known_keys():
        raise UserError(f"--set {override}: unknown key {key!r}", hint=_suggest(key))
    value = load_yaml(text, f"--set {override}")
    *branches, leaf = _current_name(key).split(".")
    for branch in branches:
        if not isinstance(tree.get(branch), dict):
            tree[branch] = {}
        tree = tree[branch]
    for spelling in _spellings(leaf, known_keys()[key]):  # the text may use the other one
        tree.pop(spelling, None)
    tree[leaf] = value
    return _current_name(key)


def _explain(problem: Any) -> tuple[str, str]:
    """Return a validation problem as a message (key, found, expected) and a hint."""
    key = ".".join(str(part) for part in problem["loc"])
    value = _shorten(problem["input"])
    if problem["type"] == "extra_forbidden":
        if key in known_keys():
            name = _current_name(key)
            return f"{key}: another name of {name}, which is set too", f"Keep only {name}."
        return f"unknown key {key!r} (value {value})", _suggest(key)
    if problem["type"] == "missing":
        meaning = f" ({description})" if (description := _description(key)) else ""
        return (
            f"key {key!r} is missing{meaning}",
            f"Set {key} in the recipe, or with --set {key}=VALUE.",
        )
    if problem["type"] == "value_error":
        error = problem["ctx"]["error"]
        return str(error), getattr(error, "hint", "")
    message = problem["msg"].removeprefix("Input should be ")
    is_sentence = " should " in message  # "String should match pattern ..."
    message = message[0].lower() + message[1:]
    hint = f"{key}: {description}." if (description := _description(key)) else _section_hint(key)
    return f"{key}: found {value}{':' if is_sentence else ', expected'} {message}", hint


def _description(key: str) -> str:
    field = known_keys().get(key)
    return field.description or "" if field is not None else ""


def _section_hint(key: str) -> str:
    """Return what belongs into a section; "" if the key is none."""
    inside = [
        known.removeprefix(f"{key}.") for known in known_keys() if known.startswith(f"{key}.")
    ]
    names = dict.fromkeys(name.partition(".")[0] for name in inside)
    return f"Write the keys of {key} below it, such as {next(iter(names))}." if names else ""


def _suggest(key: str) -> str:
    """Return a hint with the known key that is nearest to an unknown one."""
    keys = list(known_keys())
    if (own := _OTHER_NAMES.get(key.rpartition(".")[2].lower())) is not None:
        return f"Use {own}."
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not close:  # the last part may be right, in another section
        leaves = {known.rsplit(".", 1)[-1]: known for known in keys}
        leaf = key.rsplit(".", 1)[-1]
        close = [leaves[near] for near in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    if close:
        return f"Did you mean {_current_name(close[0])!r}?"
    return f"Use one of the known keys; they begin with {', '.join(RunConfig.model_fields)}."


def _shorten(value: Any) -> str:
    brief = reprlib.Repr()  # limits the work too: aliases can make a small file a huge value
    brief.maxstring = brief.maxother = 60
    text = brief.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path}: not UTF-8 text (byte 0x{byte:02x} at {error.start})",
            hint="Save the file as UTF-8.",
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror})",
            hint="Check the path and that you may read the file.",
        ) from None


def _mapping(tree: Any, where: str) -> dict[str, Any]:
    if isinstance(tree, dict):
        return tree
    found = "nothing" if tree is None else type_of(tree)
    raise UserError(
        f"{where}: a recipe is a mapping of keys, found {found}",
        hint=f"Start from {_EXAMPLE}.",
    )
