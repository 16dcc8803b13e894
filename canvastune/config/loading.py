"""YAML that people write: read strictly, with every fault in words that name its line."""

from __future__ import annotations

import difflib
import json
import reprlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from canvastune.config.schema import RunConfig
from canvastune.config.strict import StrictModel
from canvastune.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML's own reader keeps the last of two equal keys without a word; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def load_yaml_file(path: Path) -> Any:
    """The value that a YAML file holds.

    Raises:
        UserError: a file that cannot be read, that is not UTF-8, or that `read_yaml` refuses.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start}). Save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML file that you may read") from None
    return load_yaml(text, str(path))


def load_yaml(text: str, where: str) -> Any:
    """The value that a YAML text holds.

    Args:
        where: the file or option, for messages.

    Raises:
        UserError: not YAML (a tab, an open bracket, ...), a key that stands twice in one mapping, or a value that cannot be made.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        problem = " ".join(filter(None, (error.problem, error.context)))
        place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: " if error.problem_mark else ""
        raise UserError(f"{where}: {place}not YAML that can be read: {problem}. Repair it there, or just above") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML that can be read: {' '.join(str(error).split())}. Save it as plain UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{where}: not YAML that can be read: nested too deeply. Write sections and keys, no more") from None
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:  # of a tag's constructor: `2001-13-45`
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{where}: a value is not what its form says ({reason}). Put it in quotes, or correct it") from None


def load_config(recipe: Path | str, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe from a YAML file and apply `key=value` overrides (values are YAML: `lora.rank=32`, `train.method=full`).

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known one) or an ill-typed value.
    """
    path = Path(recipe)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe file. Give the path of a YAML file, for example pipelines/recipes/tiny_lora.yaml")
    tree = _mapping(load_yaml_file(path), str(path))
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any] | str, where: str = "recipe") -> RunConfig:
    """Validate a tree, or its JSON text, as a RunConfig.

    Raises:
        UserError: one line per problem, each naming the key, the value and what is allowed.
    """
    if isinstance(tree, str):
        try:
            tree = json.loads(tree)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error}. Give what the step `resolve` wrote") from None
    try:
        return RunConfig.model_validate(_mapping(tree, where))
    except ValidationError as error:
        raise UserError("\n".join(_explain(where, problem) for problem in error.errors())) from None


def write_config(config: RunConfig, path: Path) -> None:
    """Write the whole tree, defaults included, as YAML."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def known_keys(section: type[StrictModel] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the tree with its pydantic field, branches before their leaves."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        keys[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, StrictModel):
            keys |= known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"--set {override}: expected key=value, for example --set lora.rank=32")
    if key not in known_keys():
        raise UserError(f"--set {override}: unknown key {key!r}{_nearest(key)}")
    value = load_yaml(text, f"--set {override}")
    *branches, leaf = key.split(".")
    for branch in branches:
        if not isinstance(tree.get(branch), dict):
            tree[branch] = {}
        tree = tree[branch]
    tree[leaf] = value


def _explain(where: str, problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r} (value {_short(value)}){_nearest(key)}"
    if problem["type"] == "missing":
        return f"{where}: key {key!r} is missing: {_describe(key)}. Set it in the recipe, or with --set {key}=VALUE"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where}: key {key!r}: found {_short(value)}, expected: {message}. Correct it: {_describe(key)}".rstrip(": ")


def _describe(key: str) -> str:
    field = known_keys().get(key)
    return field.description or "" if field is not None else ""


def _nearest(key: str) -> str:
    keys = list(known_keys())
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not close:  # the last part alone may be right, in another branch
        leaves = {known.rsplit(".", 1)[-1]: known for known in keys}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else f"; known keys begin with {', '.join(RunConfig.model_fields)}. Use one of those"


def _short(value: Any) -> str:
    brief = reprlib.Repr()  # bounded work as well: aliases can make a small file a vast value
    brief.maxstring = brief.maxother = 60
    text = brief.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _mapping(tree: Any, where: str) -> dict[str, Any]:
    if isinstance(tree, dict):
        return tree
    found = "nothing" if tree is None else f"a {type(tree).__name__}"
    raise UserError(f"{where}: a recipe is a mapping of keys, found {found}. Begin with pipelines/recipes/tiny_lora.yaml, and change it")
