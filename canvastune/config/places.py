"""What a text names, judged by its form: a local path, an address, or an id on the Hub."""

from __future__ import annotations

import difflib
import re
import stat
from pathlib import Path
from urllib.parse import unquote

from canvastune.errors import UserError

# Of the data files that are read; all but .arrow also as .gz.
TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_KINDS = (*TEXT_SUFFIXES, ".parquet")
DATA_SUFFIXES = (*_KINDS, *(f"{kind}.gz" for kind in _KINDS), ".arrow")
_WORKSPACE = "workspace/"  # where runs and the demo write by default; no name on the Hub
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_HUB_PAGE = re.compile(
    r"datasets/(?P<id>[^/@]+/[^/@]+)(?:@(?P<at>[^/]+))?"
    r"(?:/(?:resolve|blob|raw|tree|viewer)/(?P<revision>[^/]+))?(?:/(?P<file>.+))?"
)
_NO_FILES = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_COPY = {
    "s3": "aws s3 cp {address} {name}",
    "gs": "gcloud storage cp {address} {name}",
    "http": "curl -L -o {name} '{address}'",
    "https": "curl -L -o {name} '{address}'",
}


def is_path(text: str) -> bool:
    """Return whether a text names a local file or folder by its form, whether it exists or not.

    A text such as `org/name`, `gsm8k` or `validation` does not; `workspace/name` does.
    """
    return (
        text.startswith((".", "/", "~", _WORKSPACE))
        or text.endswith(DATA_SUFFIXES)
        or text.count("/") > 1
    ) and _ADDRESS.fullmatch(text) is None


def refuse_address(key: str, text: str) -> None:
    """Refuse an address such as s3://bucket/rows.jsonl: data is read from files and from the Hub.

    Args:
        key: of the recipe, for the message.

    Raises:
        UserError: with the setting or the command that gives the same data.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return
    scheme, rest = found[1].lower(), found[2].partition("?")[0].rstrip("/")
    other = "a split of the source" if key == "data.validation" else "an id on the Hub"
    raise UserError(
        f"{key}: {text}: found an address, expected a local file or folder, or {other}",
        hint=_way_out(key, text, scheme, rest),
    )


def refuse_missing(key: str, text: str, kind: str) -> None:
    """Refuse the path of a local file or folder that does not exist, or is a pipe, a socket or a
    device; and a text that may be an id on the Hub, where a local path differs by a slip:
    `workspace/tiny-bse` next to `workspace/tiny-base`.

    Args:
        key: of the recipe, for the message.
        kind: what the text may name on the Hub; "" if only a path is possible.

    Raises:
        UserError: with the nearest name that exists.
    """
    path = Path(text).expanduser()
    if _ADDRESS.fullmatch(text):
        return
    if path.exists():
        found = _NO_FILES.get(stat.S_IFMT(path.stat().st_mode))
        if found is not None:
            raise UserError(
                f"{key}: {text}: found {found}, expected a file or folder, which is read more than"
                " once",
                hint="Write its content to a file first, such as rows.jsonl, and name that file.",
            )
        return
    if path.is_symlink():
        raise UserError(
            f"{key}: {text}: a link to {path.readlink()}, which does not exist",
            hint="Restore what it links to, or name another path.",
        )
    names = [found.name for found in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if not is_path(text) and not ("/" in text and near):
        return
    other = f"Check the path, or use a Hub {kind} id." if kind else "Check the path."
    if text.startswith(_WORKSPACE):
        other += " `canvastune demo` makes what tiny recipes need; see `canvastune run --help`."
    raise UserError(
        f"{key}: {text}: no such file or folder",
        hint=f"Did you mean {path.parent / near[0]}?" if near else other,
    )


def _way_out(key: str, address: str, scheme: str, rest: str) -> str:
    if scheme == "file":
        return f"Set {key}={unquote(rest)}."
    hub = rest.removeprefix("huggingface.co/") if scheme in ("http", "https") else rest
    page = _HUB_PAGE.fullmatch(hub)
    if page is not None and (scheme == "hf" or hub != rest):
        revision = page["at"] or page["revision"]
        revision = unquote(revision) if revision not in (None, "main", "default") else None
        at = f" data.revision={revision}" if revision else ""
        hint = f"Set {key}={page['id']}{at}"
        if page["file"] is None or "/viewer/" in hub:
            return f"{hint}."
        file = page["file"]
        only = f" --revision {revision}" if revision else ""
        return (
            f"{hint}, or only this file: hf download {page['id']} {file} --repo-type dataset"
            f"{only} --local-dir ., then {key}=./{file}."
        )
    name = Path(rest).name or "rows.jsonl"
    if scheme in _COPY:
        many = scheme in ("s3", "gs") and not name.endswith(DATA_SUFFIXES)
        command = _COPY[scheme].format(address=address, name=name)
        command += " --recursive" if many else ""
        return (
            f"Download it: {command}, then {key}=./{name} (on a cluster: into the workspace, then"
            f" its path there, such as /workspace/{name})."
        )
    return f"Copy or mount it, then set {key} to the path of the file or folder."
