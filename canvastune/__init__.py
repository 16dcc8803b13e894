"""Fine-tune DiffusionGemma, from a data set to a merged, evaluated and reported model.

The public API is these four names and one function per step; docs/api.md has an example of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canvastune.config import RunConfig, load_config
    from canvastune.errors import UserError

__version__ = "0.1.0"
__all__ = ["RunConfig", "UserError", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import canvastune` takes no time."""
    if name in ("RunConfig", "load_config"):
        from canvastune import config

        return getattr(config, name)
    if name == "UserError":
        from canvastune.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
