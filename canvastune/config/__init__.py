"""The recipe: the one typed tree that describes a run."""

from canvastune.config.loading import (
    changed_settings,
    load_config,
    loads,
    parse_config,
    write_config,
)
from canvastune.config.schema import RunConfig

__all__ = ["RunConfig", "changed_settings", "load_config", "loads", "parse_config", "write_config"]
