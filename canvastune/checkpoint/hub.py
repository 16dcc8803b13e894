"""Find a base model, a local folder in the Hub's layout or a repository on the Hub, and its files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from canvastune.config.places import refuse_missing
from canvastune.config.schema import ModelConfig
from canvastune.errors import UserError, one_line

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
# The README.md names the license, which is carried on together with its files.
_TEXT = ("*.json", "*.jinja", "*.model", "tokenizer*", "README.md", *LEGAL_FILES)
PATTERNS = (*_TEXT, *_WEIGHTS)
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)


def resolve_model(config: ModelConfig, *, weights: bool = True) -> Path:
    """Return the checkpoint's folder, downloaded from the Hub if `config.id` is not a folder.

    Args:
        weights: False downloads only the configuration and the tokenizer (for `prepare_data` and
            `plan`).

    Raises:
        UserError: neither a checkpoint folder nor a repository that can be downloaded.
    """
    folder = Path(config.id)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model.id: no config.json in {folder}",
                hint="Use a checkpoint folder in the Hub's layout.",
            )
        return folder
    refuse_missing("model.id", config.id, "model")
    # Here, as the Hub's client takes half a second to import, and a folder does not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = list(PATTERNS if weights else _TEXT)
    try:
        return Path(snapshot_download(config.id, revision=config.revision, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise UserError(
            f"model.id: {config.id}: model not found on the Hub, or access denied",
            hint="Check the name and HF_TOKEN.",
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"model.id: {config.id}: not a local folder, and cannot be downloaded from the Hub "
            f"({hub_reason(error)})",
            hint="Use a checkpoint folder, or check the network.",
        ) from None


def copy_files(base: Path, out: Path, patterns: Sequence[str]) -> list[str]:
    """Copy a checkpoint's files other than weights, byte for byte; return their names."""
    names = sorted(
        {
            file.relative_to(base).as_posix()
            for pattern in patterns
            for file in base.glob(pattern)
            if file.is_file() and file.suffix != ".safetensors"
        }
    )
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / name, out / name)
    return names


def hub_reason(error: Exception) -> str:
    """Return on one line why the Hub's client failed, without its advice."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    # Its own text says that nothing is in the cache either; the cause is what failed.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    return one_line(cause or error, 200)
