"""Check a model folder against what an inference server needs, and return the server's command.

What each backend needs and ignores, with the versions that this was run with or read from, is in
docs/serving.md.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaConfig

from canvastune.checkpoint.generation_config import (
    FILE_NAME as GENERATION_FILE,
)
from canvastune.checkpoint.generation_config import (
    SGLANG_FILE,
    SamplerSettings,
    read_generation_file,
    sampler_keys,
    sglang_text,
)
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import DECODER_SCALAR, ENCODER_SCALAR, read_model_config
from canvastune.checkpoint.peft_adapter import CONFIG as ADAPTER_CONFIG
from canvastune.errors import UserError

ARCHITECTURE = "DiffusionGemmaForBlockDiffusion"
_AUDIO_TOKENS = ("boa_token", "eoa_token")
_SAMPLER_CLASS = "EntropyBoundSamplerConfig"


@dataclass(frozen=True)
class Server:
    """A command that serves a model, and what its user should know."""

    command: tuple[str, ...]
    remarks: tuple[str, ...]
    install: str  # the command that installs the backend

    def __str__(self) -> str:
        return shlex.join(self.command)

    def run(self) -> None:
        """Become the server: its signals and its exit code are then those of this process.

        Raises:
            UserError: the backend is not installed.
        """
        program = shutil.which(self.command[0])
        if program is None:
            raise UserError(
                f"{self.command[0]}: not found on the PATH",
                hint=f"Install it in a separate environment and activate it: {self.install}.",
            )
        os.execv(program, self.command)


@dataclass(frozen=True)
class _Model:
    """What the checks look at."""

    folder: Path
    config: Mapping[str, Any]  # config.json as it stands
    parsed: DiffusionGemmaConfig  # with the defaults of what it lacks
    reader: CheckpointReader
    sampler: SamplerSettings


@dataclass(frozen=True)
class _Backend:
    command: Callable[[_Model], tuple[str, ...]]  # without the server's address
    checks: tuple[Callable[[_Model], None], ...]
    remarks: tuple[str, ...]
    install: str


def find_server(
    folder: Path, backend: str, host: str, port: int, extra: Sequence[str] = ()
) -> Server:
    """Return the command that serves a model folder.

    For SGLang the folder's `sglang.yaml` is written if it is missing, or does not say what
    `generation_config.json` says.

    Args:
        backend: a key of `BACKENDS`.
        extra: more options of the server, added at the end.

    Raises:
        UserError: not a model folder, or one that this backend cannot serve or would serve wrongly.
    """
    model, chosen = _read_model(folder), BACKENDS[backend]
    _check_tokenizer(model)
    for check in chosen.checks:
        check(model)
    command = (*chosen.command(model), "--host", host, "--port", str(port), *extra)
    remarks = chosen.remarks
    if "--dtype" in chosen.command(model):
        remarks += ("the weights are float32, which vLLM would cast to bfloat16 without --dtype",)
    return Server(command, remarks, chosen.install)


def _read_model(folder: Path) -> _Model:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder",
            hint="Pass a model's folder, such as RUN/model; `hf download ID` prints the "
            "folder of a model from the Hub.",
        )
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder}: found an adapter, expected a complete model: no server can load it, since encoder "
            "and decoder share the weights that it adapts",
            hint=f"Merge it: canvastune merge {shlex.quote(str(folder))} --output DIR, then serve "
            "DIR.",
        )
    for inner in (folder / "model", folder / "train" / "model"):
        if not (folder / "config.json").is_file() and (inner / "config.json").is_file():
            raise UserError(
                f"{folder}: found a run, expected a model's folder", hint=f"Serve {inner}."
            )
    parsed = read_model_config(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sampler = read_generation_file(folder).sampler
    return _Model(folder, config, parsed, CheckpointReader(folder), sampler)


def _check_tokenizer(model: _Model) -> None:
    if not (model.folder / "tokenizer.json").is_file():
        raise _missing(model, "tokenizer.json")
    settings = model.folder / "tokenizer_config.json"
    inline = "chat_template" in _read_object(settings)
    named = ("chat_template.jinja", "chat_template.json")
    if not inline and not any((model.folder / name).is_file() for name in named):
        raise _missing(model, "chat_template.jinja")


def _check_architecture(model: _Model) -> None:
    found = model.config.get("architectures")
    if not isinstance(found, list) or found[:1] != [ARCHITECTURE]:
        raise UserError(
            f"{model.folder / 'config.json'}: architectures: found {found!r}, expected "
            f"[{ARCHITECTURE!r}], by which the server chooses the model's code",
            hint=f'Set "architectures": ["{ARCHITECTURE}"] there.',
        )


def _check_tied_embeddings(model: _Model) -> None:
    for where, config in (("", model.parsed), ("text_config.", model.parsed.text_config)):
        tied = getattr(config, "tie_word_embeddings", None)
        if tied is not True:
            raise UserError(
                f"{model.folder / 'config.json'}: {where}tie_word_embeddings: found {tied!r}, "
                "expected true: the server has one tensor for both",
                hint='Set "tie_word_embeddings": true there, at both levels.',
            )


def _check_unquantized(model: _Model) -> None:
    if model.config.get("quantization_config") is not None:
        raise UserError(
            f"{model.folder / 'config.json'}: found quantization_config, which SGLang does not load "
            "for DiffusionGemma",
            hint="Use --backend vllm, or the unquantized model.",
        )


def _check_sampler_file(model: _Model) -> None:
    """Check the keys that vLLM looks up without a default."""
    file = model.folder / GENERATION_FILE
    given = _read_object(file)
    wanted = sampler_keys(model.sampler)
    sampler = given.get("sampler_config")
    lacking = {key: value for key, value in wanted.items() if given.get(key) is None}
    if not isinstance(sampler, dict) or sampler.get("_cls_name") != _SAMPLER_CLASS:
        lacking["sampler_config"] = wanted["sampler_config"]
    if lacking:
        add = json.dumps(lacking)[1:-1]
        raise UserError(
            f"{file}: no usable {', '.join(lacking)}, which the server requires",
            hint=f"Add to that file: {add}. These are the settings that would otherwise apply.",
        )


def _check_generation_file(model: _Model) -> None:
    """Check that stock transformers loads the file, and answers as it says."""
    file = model.folder / GENERATION_FILE
    given = _read_object(file)
    usable = read_generation_file(model.folder).usable
    # A server answers whole only where generate() returns a tensor.
    wrong = [
        key
        for key, value in given.items()
        if value is not None
        and key != "return_dict_in_generate"
        and json.dumps(value, sort_keys=True) != json.dumps(usable.get(key), sort_keys=True)
    ]
    if wrong:
        instead = json.dumps({key: usable[key] for key in wrong if key in usable})[1:-1]
        raise UserError(
            f"{file}: {', '.join(wrong)}: stock transformers refuses these keys or values, or "
            "they change its answers",
            hint=f"Remove them there{f', or write {instead}' if instead else ''}.",
        )


def _check_processor(model: _Model) -> None:
    names = ("processor_config.json", "preprocessor_config.json")
    if not any((model.folder / name).is_file() for name in names):
        raise _missing(model, names[0])


def _check_audio_tokens(model: _Model) -> None:
    """Check what stock's processor wants of a tokenizer, for any text: see findings/."""
    file = model.folder / "tokenizer_config.json"
    settings = _read_object(file)
    extra = settings.get("extra_special_tokens")
    named = settings | (extra if isinstance(extra, dict) else {})
    if missing := [name for name in _AUDIO_TOKENS if not named.get(name)]:
        raise UserError(
            f"{file}: no {', '.join(missing)}, without which the server's processor refuses all "
            "text, even without audio",
            hint="Use --backend vllm, sglang or mlx.",
        )


def _check_equal_scalars(model: _Model) -> None:
    for index in range(model.parsed.text_config.num_hidden_layers):
        names = (DECODER_SCALAR.format(index), ENCODER_SCALAR.format(index))
        decoder, encoder = (model.reader.get(name) for name in names)
        if not torch.equal(decoder, encoder):
            raise UserError(
                f"{model.folder}: layer {index}: the decoder's layer_scalar is {decoder.item():.6g},"
                f" the encoder's {encoder.item():.6g}; vLLM would use the encoder's for both",
                hint="Use --backend sglang, mlx or transformers.",
            )


def _write_sglang_file(model: _Model) -> None:
    file, text = model.folder / SGLANG_FILE, sglang_text(model.sampler)
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{file}: cannot write the sampler's settings ({error.strerror})",
            hint="Make the folder writable, or copy the model.",
        ) from None


def _vllm(model: _Model) -> tuple[str, ...]:
    float32 = model.config.get("dtype", model.config.get("torch_dtype")) == "float32"
    return ("vllm", "serve", str(model.folder), *(("--dtype", "float32") if float32 else ()))


def _sglang(model: _Model) -> tuple[str, ...]:
    start = ("sglang", "serve", "--model-type", "llm", "--model-path", str(model.folder))
    settings = ("--dllm-algorithm-config", str(model.folder / SGLANG_FILE))
    return (*start, "--dllm-algorithm", "Gemma4Renoise", *settings)


def _missing(model: _Model, name: str) -> UserError:
    return UserError(
        f"{model.folder}: no {name}, which the server reads",
        hint=f"Copy {name} from the base's folder or repository.",
    )


def _read_object(file: Path) -> dict[str, Any]:
    """Return the object in a file; {} without one. Raises: UserError, it is not JSON."""
    if not file.is_file():
        return {}
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: invalid JSON: {error}", hint="Copy it from the base.") from None
    return tree if isinstance(tree, dict) else {}


BACKENDS: Mapping[str, _Backend] = {
    "vllm": _Backend(
        _vllm,
        (
            _check_architecture,
            _check_tied_embeddings,
            _check_sampler_file,
            _check_processor,
            _check_equal_scalars,
        ),
        (
            "answers end where max_tokens of the request says: max_new_tokens is not read",
            "a GPU is needed: vLLM runs no diffusion model on a CPU",
        ),
        "pip install vllm==0.33.0",
    ),
    "sglang": _Backend(
        _sglang,
        (_check_architecture, _check_tied_embeddings, _check_unquantized, _write_sglang_file),
        (
            f"{SGLANG_FILE} holds the sampler's settings, as SGLang reads no {GENERATION_FILE}",
            "requests with a seed, penalties, log probabilities, min_p or a JSON schema are refused",
            "a CUDA or ROCm GPU is needed",
        ),
        "pip install sglang==0.5.23",
    ),
    "mlx": _Backend(
        lambda model: ("mlx_vlm.server", "--model", str(model.folder)),
        (),
        (
            "the server's own sampler is confidence-threshold at temperature 0; a request chooses "
            'the model\'s with {"diffusion_sampler": "entropy-bound", "diffusion_full_canvas": true, '
            '"temperature": 1}',
            "`model` in a request is the folder as given here",
        ),
        "pip install 'mlx[cpu]==0.32.4' mlx-vlm==0.7.10",
    ),
    "transformers": _Backend(
        lambda model: ("transformers", "serve", str(model.folder)),
        (_check_generation_file, _check_processor, _check_audio_tokens),
        (
            "only streamed answers, or requests with "
            '{"generation_config": "{\\"return_dict_in_generate\\": false}"}: others end with '
            "HTTP 500",
            "one request at a time; its processor needs torchvision",
        ),
        "pip install 'transformers[serving]==5.24.0' torchvision",
    ),
}
