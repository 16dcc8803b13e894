"""Push a folder with its model card to a repository on the Hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HTTPError as ConnectionFailure  # of the client that it uses

from canvastune.checkpoint.hub import hub_reason
from canvastune.errors import UserError

KEY = "tracking.hub_model_id"
_VARIABLE = "HF_TOKEN"
_DENIED = (401, 403)
_NOT_FILES = ["**/.*", ".*"]  # what an interrupted writer may have left
_HINT = (
    f"Set {_VARIABLE} to a token that may write there, from https://huggingface.co/settings/tokens; "
    "on a cluster, in the secret of cluster.credentials."
)
logger = logging.getLogger(__name__)


def check_push(repository: str) -> bool:
    """Refuse a push that the Hub would refuse after training.

    Returns:
        Whether the Hub has answered; if not, there is a warning.

    Raises:
        UserError: no token, one that the Hub refuses, or one of neither the owner nor a member.
    """
    try:
        user = HfApi().whoami(token=_token())
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in _DENIED:
            return _warn(error)
        raise UserError(f"{KEY}: the Hub refuses {_VARIABLE}", hint=_HINT) from None
    except (ConnectionFailure, OSError) as error:
        return _warn(error)
    owner, names = repository.partition("/")[0], [user["name"]]
    names += [each["name"] for each in user.get("orgs", ())]
    if owner not in names:
        raise UserError(
            f"{KEY}: found the owner {owner!r}, but {_VARIABLE} belongs to {user['name']!r}, "
            f"who may write to {', '.join(names)}",
            hint="Name one of these, or use another token.",
        )
    return True


def push_to_hub(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder as one commit, and return the address of the commit.

    A repository that is not there is created; of one that is, the files of the same names are
    replaced, and its visibility is left. Nothing is committed if nothing has changed.

    Args:
        private: whether a repository that is created is private.

    Raises:
        UserError: no token, or the Hub cannot be reached or refuses.
    """
    token, api = _token(), HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True, token=token)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            token=token,
            ignore_patterns=_NOT_FILES,
            commit_message=f"Upload {folder.name} by Canvastune",
        )
    except (ConnectionFailure, OSError, ValueError) as error:
        raise UserError(
            f"{KEY}: {folder} cannot be pushed to {repository} ({hub_reason(error)})",
            hint=f"{_HINT} The same command with the same name then resumes with the push.",
        ) from None
    logger.info(f"{folder}: pushed to {commit.commit_url}")
    return str(commit.commit_url)


def _token() -> str:
    token = os.environ.get(_VARIABLE)
    if not token:
        raise UserError(f"{KEY}: {_VARIABLE} is not set", hint=_HINT)
    return token


def _warn(error: Exception) -> bool:
    logger.warning(
        f"{KEY}: the Hub cannot be asked whether {_VARIABLE} may write ({hub_reason(error)})"
    )
    return False
