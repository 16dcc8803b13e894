"""The doctor's look for a recipe's model and data set, without downloading either."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.preparation.readers import open_source
from pipelines.doctor.finding import Finding
from pipelines.doctor.machine import hub_cache

_SECONDS = 10.0  # that the Hub gets to answer in
_LOCAL = (".jsonl", ".json", ".parquet", ".gz")
_CURE = "check the network, HTTPS_PROXY and HF_ENDPOINT; or give a local copy in {key}"


def model(config: RunConfig, submitted: bool = False) -> Iterator[Finding]:
    """Whether the base model can be had, and whether its weights have room.

    Args:
        submitted: the run is meant for Kubeflow, whatever the recipe says of its backend.
    """
    place = config.model.id
    if _in_pods(config, place, submitted):
        yield Finding("model", "skipped", f"{place} lies on the workspace volume, which only the pods see")
        return
    info = None
    if not Path(place).is_dir():
        try:
            info = HfApi().model_info(place, revision=config.model.revision, timeout=_SECONDS, files_metadata=True)
        except HFValidationError:
            pass  # not a Hub id but a path: what resolves it says why it cannot be
        except Exception as error:  # the Hub's library, the network and proxies each have their own kinds
            kept = try_to_load_from_cache(place, "config.json", revision=config.model.revision)
            if isinstance(kept, str) and not isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
                yield Finding("model", "warning", f"the Hub cannot be asked; {place} is in its cache ({Path(kept).parent})")
            else:
                yield _away("model", "model.id", place, error)
            return
    if info is None:
        try:
            yield Finding("model", "ok", f"{resolve_model(config.model, weights=False)}, a folder here")
        except UserError as error:
            yield Finding("model", "problem", str(error), "correct model.id, as the message says")
        return
    size = sum(file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors"))
    cache = hub_cache()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    found = f"{place} is on the Hub, {size / 1e9:,.0f} GB of weights"
    if size > free and config.cluster.backend == "local":
        yield Finding("model", "warning", f"{found}, and {free / 1e9:,.0f} GB are free for them", "point HF_HOME to a larger disk")
    else:
        yield Finding("model", "ok", found)


def data(config: RunConfig, submitted: bool = False) -> Iterator[Finding]:
    """Whether the data set can be had; of a local one the first row is read. `submitted` as for `model`."""
    place = config.data.source
    if _in_pods(config, place, submitted):
        yield Finding("data", "skipped", f"{place} lies on the workspace volume, which only the pods see")
        return
    path = Path(place).expanduser()
    if not path.exists() and path.suffix not in _LOCAL:
        try:
            HfApi().dataset_info(place, revision=config.data.revision, timeout=_SECONDS)
        except HFValidationError:
            pass  # not a Hub id but a path: what opens it says why it cannot be
        except Exception as error:  # as above
            yield _away("data", "data.source", place, error)
            return
        else:
            yield Finding("data", "ok", f"{place} is on the Hub")
            return
    try:
        row = next(open_source(config.data).rows())
    except UserError as error:
        yield Finding("data", "problem", str(error), "correct data.source, as the message says")
        return
    if row.problem:
        cure = "correct the row; canvastune prepare names every one"
        yield Finding("data", "warning", f"{row.file}: row {row.number}: {row.problem}", cure)
    else:
        yield Finding("data", "ok", f"{path}: can be read")


def _in_pods(config: RunConfig, place: str, submitted: bool) -> bool:
    return (
        (submitted or config.cluster.backend != "local")
        and Path(place).is_relative_to(config.cluster.mount_path)
        and not Path(place).exists()
    )


def _away(name: str, key: str, place: str, error: Any) -> Finding:
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        found = f"{key}: {place}: not on the Hub at that revision, or no right to it"
        return Finding(name, "problem", found, f"check the name, accept its terms on its page, and set HF_TOKEN; or correct {key}")
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return Finding(name, "problem", f"{key}: {place}: the Hub cannot be asked ({reason})", _CURE.format(key=key))
