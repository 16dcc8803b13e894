"""Where a base model is found: a folder in the Hub's layout, or the Hub itself."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from canvastune.config.schema import ModelConfig
from canvastune.errors import UserError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TEXT = ("*.json", "*.jinja", "*.model", "tokenizer*")


def resolve_model(config: ModelConfig, *, weights: bool = True) -> Path:
    """Return the folder of the checkpoint, fetching it from the Hub if `config.id` is not a local folder.

    Args:
        weights: False fetches the configuration and the tokenizer alone (for `prepare_data` and `plan`).

    Raises:
        UserError: neither a checkpoint folder nor a repository that can be reached.
    """
    folder = Path(config.id)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.id: {folder} has no config.json. Give the folder of a checkpoint in the Hub's layout")
        return folder
    if config.id.startswith((".", "/", "~")) or config.id.count("/") > 1:
        raise UserError(
            f"model.id: {config.id}: no such folder. Give one that exists; `canvastune make-tiny-model DIR` writes a small model"
        )
    patterns = [*_TEXT, *(_WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(config.id, revision=config.revision, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise UserError(f"model.id: {config.id}: no such model on the Hub, or no right to it. Check the name, and HF_TOKEN") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"model.id: {config.id}: no such folder here, and it cannot be fetched from the Hub ({reason}). "
            "Give the folder of a checkpoint, or a network"
        ) from None
