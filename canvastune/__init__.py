"""Fine-tune DiffusionGemma, from a data set to a merged, evaluated and reported model.

The public API is these four names and one function per step; docs/api.md has an example of each.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canvastune.config import RunConfig, load_config
    from canvastune.errors import UserError

__version__ = "0.1.0"
__all__ = ["RunConfig", "UserError", "__version__", "load_config"]

# PyTorch reads it at its first allocation: large tensors in the host's memory use pages of 2 MiB, so
# that getting new memory is cheap (see `training.devices`).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def lazy_attributes(package: str, **modules: str) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports a public name on first use: the modules load
    libraries for seconds.

    Args:
        modules: by name, the module in the package that defines it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return get


__getattr__ = lazy_attributes(
    __name__, RunConfig="config", load_config="config", UserError="errors"
)
