"""YAML that people write: read strictly, with every fault in words that name its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

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


def read_yaml_file(path: Path) -> Any:
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
    return read_yaml(text, str(path))


def read_yaml(text: str, where: str) -> Any:
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
