"""Check that a recipe's model and data set are available, without downloading either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig
from canvastune.config.data import MixtureSource
from canvastune.config.places import is_path
from canvastune.errors import UserError
from canvastune.preparation.sources import open_source
from pipelines.doctor.finding import Finding

_TIMEOUT = 10.0  # seconds, for a response of the Hub
_HUB_FIX = "check the network, HTTPS_PROXY and HF_ENDPOINT; or use a local copy in {key}"


def check_model(config: RunConfig, submitted: bool = False) -> Iterator[Finding]:
    """Check that the base model is available; of a local one, that its weights are complete.

    Args:
        submitted: the run is for Kubeflow, whatever backend the recipe names.
    """
    place = config.model.id
    if _in_pods(config, place, submitted):
        yield Finding(
            "model", "skipped", f"{place} is on the workspace volume, which only the pods can see"
        )
        return
    info = None
    if not Path(place).is_dir():
        try:
            info = HfApi().model_info(
                place, revision=config.model.revision, timeout=_TIMEOUT, files_metadata=True
            )
        except HFValidationError:
            pass  # a path, not a Hub id: resolve_model reports what is wrong with it
        except (
            Exception
        ) as error:  # the Hub's library, the network and proxies each raise other types
            kept = try_to_load_from_cache(place, "config.json", revision=config.model.revision)
            if isinstance(kept, str) and not isinstance(
                error, RepositoryNotFoundError | RevisionNotFoundError
            ):
                found = f"the Hub does not respond; {place} is in its cache ({Path(kept).parent})"
                yield Finding("model", "warning", found)
            else:
                yield _unavailable("model", "model.id", place, error)
            return
    if info is None:
        try:
            folder = resolve_model(config.model)
            CheckpointReader(folder)  # reads the header of every shard
            yield Finding("model", "ok", f"{folder}, a local folder")
        except UserError as error:
            yield Finding(
                "model",
                "problem",
                str(error),
                error.hint or "correct model.id, as the message says",
            )
        return
    size = sum(
        file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors")
    )
    yield Finding("model", "ok", f"{place} is on the Hub, {size / 1e9:,.0f} GB of weights")


def check_data(config: RunConfig, submitted: bool = False) -> Iterator[Finding]:
    """Check that each data set is available; of a local one, read the first row.

    `submitted`: as for `check_model`."""
    for key, source in config.source_keys.items():
        yield _check_source(config, key, source, submitted)


def _check_source(config: RunConfig, key: str, source: MixtureSource, submitted: bool) -> Finding:
    place = source.source
    if _in_pods(config, place, submitted):
        return Finding(
            "data", "skipped", f"{place} is on the workspace volume, which only the pods can see"
        )
    path = Path(place).expanduser()
    if not path.exists() and not is_path(place):
        try:
            HfApi().dataset_info(place, revision=source.revision, timeout=_TIMEOUT)
        except HFValidationError:
            pass  # a path, not a Hub id: open_source reports what is wrong with it
        except Exception as error:  # as above
            return _unavailable("data", key, place, error)
        else:
            return Finding("data", "ok", f"{place} is on the Hub")
    validation = config.data.validation
    try:
        if validation is not None and key != "data.validation" and not is_path(validation):
            held_out = source.model_copy(update={"split": validation})
            open_source(held_out, "data.validation", validation)
        row = next(open_source(source, key).rows())
    except UserError as error:
        return Finding("data", "problem", str(error), error.hint or f"correct {key}")
    if row.problem:
        fix = "correct the row; canvastune prepare lists every invalid one"
        return Finding("data", "warning", f"{row.file}: row {row.number}: {row.problem}", fix)
    return Finding("data", "ok", f"{path}: readable")


def _in_pods(config: RunConfig, place: str, submitted: bool) -> bool:
    return (
        (submitted or config.cluster.backend != "local")
        and Path(place).is_relative_to(config.cluster.mount_path)
        and not Path(place).exists()
    )


def _unavailable(name: str, key: str, place: str, error: Any) -> Finding:
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        found = f"{key}: {place}: not found on the Hub at that revision, or access denied"
        fix = f"check the name, accept the terms on its page, and set HF_TOKEN; or correct {key}"
        return Finding(name, "problem", found, fix)
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return Finding(
        name,
        "problem",
        f"{key}: {place}: the Hub does not respond ({reason})",
        _HUB_FIX.format(key=key),
    )
