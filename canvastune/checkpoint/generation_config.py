"""A checkpoint's generation_config.json, read so that no key or value in it ends a run.

Stock transformers refuses a whole model for one key of another Gemma in this file, or for an integer
where it expects a float. Here every key is used, or reported as unused with the reason.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from canvastune.config.schema import SamplerConfig
from canvastune.errors import UserError, one_line
from canvastune.io.json_text import write_json

if TYPE_CHECKING:  # takes seconds to import, and most files need none of it
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
    )

FILE_NAME = "generation_config.json"
SGLANG_FILE = "sglang.yaml"  # what SGLang's --dllm-algorithm-config reads: it has its own defaults
_SAMPLER, _BOUND, _CLASS = "sampler_config", "entropy_bound", "_cls_name"
_SAMPLER_CLASS = "EntropyBoundSamplerConfig"
# Read by transformers about the file itself.
_ABOUT = frozenset({"transformers_version", "_commit_hash", "_from_model_config"})
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
# Settings of `generate()` that our own sampler does not have, and what becomes of each.
_UNUSED = {
    "max_new_tokens": None,  # a default for callers that name none, which is their own matter
    "max_length": "evaluate.max_new_tokens limits answers",
    "cache_implementation": "evaluation has its own cache",
    "cache_config": "evaluation has its own cache",
    "disable_compile": None,
    "return_dict_in_generate": "evaluation does not call `generate`",
}
STOCK_KEYS = frozenset(  # all that stock transformers loads
    {
        *("max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold"),
        *(_SAMPLER, *_TOKENS, *_UNUSED, *_ABOUT),
    }
)


@dataclass(frozen=True)
class SamplerSettings:
    """How a block is denoised. The names are those of generation_config.json."""

    steps: int  # max_denoising_steps
    entropy_bound: float
    t_min: float
    t_max: float
    stability_threshold: int  # steps in a row that leave the likeliest tokens as they are
    confidence_threshold: float  # nats: mean entropy below which a stable block has ended
    self_conditioning: bool = True

    def temperature(self, left: int) -> float:
        """Return what logits are divided by when `left` steps are left, this one included."""
        return self.t_min + (self.t_max - self.t_min) * (left / self.steps)


@functools.cache
def _defaults() -> SamplerSettings:
    """Return DiffusionGemma's own settings, as transformers has them."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
    )

    found = DiffusionGemmaGenerationConfig._get_default_generation_params()
    return SamplerSettings(
        steps=found["max_denoising_steps"],
        entropy_bound=found[_SAMPLER].entropy_bound,
        t_min=found["t_min"],
        t_max=found["t_max"],
        stability_threshold=found["stability_threshold"],
        confidence_threshold=found["confidence_threshold"],
    )


@dataclass(frozen=True)
class GenerationFile:
    """A generation_config.json as it is used."""

    sampler: SamplerSettings
    stops: tuple[int, ...]  # eos_token_id; empty if the file has none
    usable: Mapping[str, Any]  # the keys that stock transformers loads, as it expects them
    remarks: tuple[str, ...]  # what is not used, a line each

    def stock(self) -> DiffusionGemmaGenerationConfig:
        """Return what stock transformers would load if it could."""
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
            DiffusionGemmaGenerationConfig,
            EntropyBoundSamplerConfig,
        )

        given = dict(self.usable)
        if _SAMPLER in given:
            given[_SAMPLER] = EntropyBoundSamplerConfig(given[_SAMPLER][_BOUND])
        return DiffusionGemmaGenerationConfig(**given)


def read_generation_file(folder: Path) -> GenerationFile:
    """Read a checkpoint's generation_config.json; without one, everything is DiffusionGemma's own.

    Raises:
        UserError: the file cannot be read, or is no JSON object.
    """
    file = folder / FILE_NAME
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return GenerationFile(_defaults(), (), {}, ())
    except (OSError, ValueError) as error:
        raise _unreadable(file, one_line(error)) from None
    if not isinstance(found, dict):
        raise _unreadable(file, "found no JSON object")
    reader = _Reader(file, found)
    sampler = reader.sampler()
    stops = reader.stops()
    reader.name_the_rest()
    return GenerationFile(sampler, stops, reader.usable, tuple(reader.remarks))


def sampler_settings(folder: Path, config: SamplerConfig) -> SamplerSettings:
    """Return the recipe's settings over the checkpoint's.

    Raises:
        UserError: as `read_generation_file`; a `t_min` above the `t_max` of the other one.
    """
    given = {name: value for name, value in config.model_dump().items() if value is not None}
    settings = replace(read_generation_file(folder).sampler, **given)
    if settings.t_min > settings.t_max:
        raise UserError(
            f"evaluate.sampler: t_min is {settings.t_min} and t_max is {settings.t_max}, including "
            f"values from {folder / FILE_NAME}; expected t_min at most t_max",
            hint="Set both evaluate.sampler.t_min and evaluate.sampler.t_max.",
        )
    return settings


def write_generation_file(base: Path, out: Path) -> None:
    """Write the generation_config.json of a model derived from `base`, for any consumer, and the
    same settings as SGLang reads them.

    What a base's file lacks of DiffusionGemma's settings is filled in with their defaults (vLLM
    looks them up and fails without), and what stock transformers cannot load is left out. A file
    with nothing to change is copied byte for byte.

    Raises:
        UserError: as `read_generation_file`.
    """
    found = read_generation_file(base)
    whole = sampler_keys(found.sampler) | dict(found.usable)
    source = base / FILE_NAME
    given = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    if _same({key: value for key, value in given.items() if value is not None}, whole):
        (out / FILE_NAME).write_bytes(source.read_bytes())
    else:
        write_json(out / FILE_NAME, dict(sorted(whole.items())))
    (out / SGLANG_FILE).write_text(sglang_text(found.sampler), encoding="utf-8")


def sampler_keys(sampler: SamplerSettings) -> dict[str, Any]:
    """Return the sampler's settings by their keys in generation_config.json."""
    settings = asdict(sampler)
    bound = {_BOUND: settings.pop(_BOUND), _CLASS: _SAMPLER_CLASS}
    del settings["self_conditioning"]
    return {"max_denoising_steps": settings.pop("steps"), _SAMPLER: bound, **settings}


def sglang_text(sampler: SamplerSettings) -> str:
    """Return the sampler's settings as YAML for SGLang, which reads no generation_config.json.

    The sections are those that every version with DiffusionGemma takes; the flat keys are newer.
    """
    tree = {
        "max_denoising_steps": sampler.steps,
        "sampler_config": {_BOUND: sampler.entropy_bound},
        "temperature_schedule": {"t_min": sampler.t_min, "t_max": sampler.t_max},
        "stopping_config": {
            "stability_threshold": sampler.stability_threshold,
            "confidence_threshold": sampler.confidence_threshold,
        },
    }
    return yaml.safe_dump(tree, sort_keys=False)


def _same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal, and integers where the other has them."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _unreadable(file: Path, why: str) -> UserError:
    hint = "Use the directory of an unchanged checkpoint."
    return UserError(f"{file}: cannot be read ({why})", hint=hint)


class _Reader:
    """Sorts the keys of a file into usable ones and remarks."""

    def __init__(self, file: Path, found: Mapping[str, Any]) -> None:
        self.file, self.found = file, found
        self.usable: dict[str, Any] = {}
        self.remarks: list[str] = []

    def sampler(self) -> SamplerSettings:
        steps = self._number("max_denoising_steps", int, lambda found: found > 0)
        low, high = self._temperatures()
        stable = self._number("stability_threshold", int, lambda found: found >= 0)
        confident = self._number("confidence_threshold", float, lambda found: found > 0)
        return SamplerSettings(steps, self._bound(), low, high, stable, confident)

    def stops(self) -> tuple[int, ...]:
        for key in _TOKENS:
            value = self.found.get(key)
            many = value if isinstance(value, list) and key == "eos_token_id" else [value]
            if value is None:
                continue
            if many and all(type(one) is int and one >= 0 for one in many):
                self.usable[key] = value
            else:
                self._unused(key, "expected a token id; config.json's is used")
        stops = self.usable.get("eos_token_id", ())
        return tuple(stops if isinstance(stops, list | tuple) else [stops])

    def name_the_rest(self) -> None:
        for key, why in _UNUSED.items():
            value = self.found.get(key)
            if value is None:
                continue
            if key == "max_new_tokens" and (type(value) is not int or value <= 0):
                self._unused(key, "expected a number of tokens")
            elif why is None or value is True or value == "dynamic":
                self.usable[key] = value
            else:
                self._unused(key, why)
        self.usable |= {key: self.found[key] for key in _ABOUT & self.found.keys()}
        if unknown := sorted(self.found.keys() - STOCK_KEYS):
            self.remarks.append(
                f"{self.file}: {', '.join(unknown)}: not used, DiffusionGemma has no such setting; "
                "left out of the tuned model's file, because stock transformers would not load it"
            )

    def _bound(self) -> float:
        value = self.found.get(_SAMPLER)
        if value is None:
            return _defaults().entropy_bound
        bound: Any = value.get(_BOUND) if isinstance(value, Mapping) else None
        if not _is_number(bound) or bound <= 0:
            default = _defaults().entropy_bound
            self._unused(
                _SAMPLER,
                f"expected an entropy_bound above 0; it is DiffusionGemma's own {default}",
            )
            return default
        name = value.get(_CLASS, _SAMPLER_CLASS)
        if "EntropyBound" not in str(name):
            self._unused(_SAMPLER, f"the sampler is {name}; its entropy_bound is used")
        self.usable[_SAMPLER] = {_BOUND: float(bound), _CLASS: _SAMPLER_CLASS}
        return float(bound)

    def _temperatures(self) -> tuple[float, float]:
        low = self._number("t_min", float, lambda found: found >= 0)
        high = self._number("t_max", float, lambda found: found > 0)
        if low < high:
            return low, high
        for key in ("t_min", "t_max"):
            self.usable.pop(key, None)
        defaults = _defaults()
        self.remarks.append(
            f"{self.file}: t_min is {low} and t_max {high}: not used, expected t_min below t_max; "
            f"they are DiffusionGemma's own {defaults.t_min} and {defaults.t_max}"
        )
        return defaults.t_min, defaults.t_max

    def _number(self, key: str, kind: type, fits: Callable[[float], bool]) -> Any:
        """Return a key's number as stock expects it, or the default with a remark."""
        value = self.found.get(key)
        if value is None:
            return sampler_keys(_defaults())[key]
        if _is_number(value) and fits(value) and (kind is float or value == int(value)):
            self.usable[key] = kind(value)
            return kind(value)
        default = sampler_keys(_defaults())[key]
        self._unused(key, f"it is DiffusionGemma's own {default}")
        return default

    def _unused(self, key: str, instead: str) -> None:
        self.remarks.append(f"{self.file}: {key} is {self.found[key]!r}: not used; {instead}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
