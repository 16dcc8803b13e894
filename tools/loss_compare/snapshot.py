"""Observable behavior as plain values: losses, tokens, file names, JSON keys, options, exit codes.

Everything is read from files and command output, and nothing of the product is imported, so that
this works with
any version. `tests/e2e/test_golden.py` compares the values with `tests/golden/`,
`tools/loss_compare.py` with those
of another commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors import safe_open

COMMANDS = (
    "run",
    "demo",
    "plan",
    "prepare",
    "fetch",
    "report",
    "merge",
    "serve",
    "evaluate",
    "ask",
    "runs",
    "sync",
    "compile",
    "submit",
    "upload",
    "doctor",
    "completion",
    "make-tiny-model",
)
METHODS = {
    "full": ("train.method=full",),
    "lora": ("train.method=lora",),
    "lora-experts": ("train.method=lora", "lora.experts=true", "lora.rank=4"),
}
# Paths are relative to the current folder: they are part of a checkpoint's identity.
RECIPE = """\
name: tiny
model: {id: model}
data: {source: problems.jsonl, seq_length: 96, validation_fraction: 0.2, validation_rows: 4}
train:
  steps: 5
  global_batch_size: 8
  precision: float32
  log_every: 1
  validate_every: 2
  validation_levels: [0.3, 0.7]
  checkpoint_every: 2
  keep_checkpoints: 9
  export: last
optimizer: {lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}
lora: {rank: 1}
evaluate: {rows: 2, batch_size: 2, max_new_tokens: 16, sampler: {steps: 2}}
"""
_WEIGHT_LINE = ("loss", "diffusion_loss", "autoregressive_loss", "grad_norm", "lr")
_OPTION = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")


# --- inputs ---------------------------------------------------------------------------------------------------


def problem_rows(count: int = 40) -> list[dict[str, str]]:
    """Return fixed word problems in GSM8K form."""
    names, things = ("Tom", "Ana", "Ben", "Eva", "Sam"), ("apples", "books", "coins", "pens")
    rows = []
    for index in range(count):
        name, thing = names[index % 5], things[index // 5 % 4]
        first, second = 1 + index % 9, 1 + index // 9
        question = (
            f"{name} has {first} {thing}. {name} buys {second} more. How many {thing} does {name}"
            " have now?"
        )
        rows.append(
            {
                "question": question,
                "answer": f"{first}+{second}={first + second}\n#### {first + second}",
            }
        )
    return rows


def form_rows() -> dict[str, list[Any]]:
    """Return rows in every form of `data.format`: several turns, outer blanks, other scripts,
    repeats, truncation.
    """
    texts = [
        ("How many apples does Tom have?", "Tom has 3 apples"),
        ("  outer blanks are dropped \n", "\n 1+1=2\n#### 2  "),
        ("Größe, 数, 🙂 and\ttabs", "naïve ✓"),
        ("How many coins does Ana have now? " * 3, "It is 7, and " * 12),
        ("<turn|> in a question", "an answer with <|turn> in it"),
        ("How many pens are left?", "8-3=5\n#### 5"),
        ("How many keys does Zoe have than Max?", "9-2=7\n#### 7"),
        ("How many nuts?", "4"),
        ("How many cups?", "5"),
    ]
    texts.append(texts[0])  # a repeat
    chats: list[Any] = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in texts
    ]
    (first, answer), (second, other) = texts[5], texts[6]
    turns = [
        ("system", "Answer in one line."),
        ("user", first),
        ("assistant", answer),
        ("user", second),
        ("assistant", other),
    ]
    chats.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return {
        "gsm8k": [{"question": q, "answer": a} for q, a in texts],
        "columns": [{"prompt": q, "response": a} for q, a in texts],
        "columns-system": [
            {"prompt": q, "response": a, "system": f"Be short, {n}."}
            for n, (q, a) in enumerate(texts)
        ],
        "messages": chats,
    }


def form_settings(form: str) -> list[str]:
    """Return the overrides with which rows of a form are prepared."""
    settings = [
        "data.source=rows.jsonl",
        "data.seq_length=64",
        "data.validation_fraction=0.45",
        "data.max_duplicates=0.5",
        "data.max_bad_rows=0.3",
    ]
    system = ["data.columns.system=system"] if form == "columns-system" else []
    return [*settings, f"data.format={form.partition('-')[0]}", *system]


def write_rows(path: Path, rows: list[Any]) -> None:
    """Write rows as JSON lines."""
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def exit_code_cases() -> dict[str, tuple[str, list[str]]]:
    """Return modules and their arguments by name, for a folder with `recipe.yaml`, its data, and
    `model/`.
    """
    cli, train, evaluate = "pipelines.cli", "canvastune.train", "canvastune.evaluate"
    recipe = ["-c", "recipe.yaml"]
    return {
        "version": (cli, ["--version"]),
        "no command": (cli, []),
        "no such command": (cli, ["fly"]),
        "plan": (cli, ["plan", "recipe.yaml", "--gpus", "2", "--set", "parallel.ep=2"]),
        "plan that does not fit": (
            cli,
            [
                "plan",
                "recipe.yaml",
                "--gpus",
                "2",
                "--gpu-memory",
                "0.01GB",
                "--set",
                "parallel.ep=2",
            ],
        ),
        "plan without a recipe": (cli, ["plan"]),
        "plan, memory that is no size": (cli, ["plan", "recipe.yaml", "--gpu-memory", "much"]),
        "no such recipe": (cli, ["plan", "missing.yaml"]),
        "unknown key": (cli, ["plan", "recipe.yaml", "--set", "lora.ranks=2"]),
        "value of another type": (cli, ["plan", "recipe.yaml", "--set", "lora.rank=many"]),
        "prepare into a folder that holds something": (
            cli,
            ["prepare", "recipe.yaml", "--output", "model"],
        ),
        "prepare without an output": (cli, ["prepare", "recipe.yaml"]),
        "prepare what is not there": (
            cli,
            ["prepare", "recipe.yaml", "--output", "none", "--set", "data.source=none.jsonl"],
        ),
        "report of no run": (cli, ["report", "none"]),
        "sync of no run": (cli, ["sync", "none"]),
        "compile into another kind of file": (cli, ["compile", "-o", "pipeline.txt"]),
        "submit without a host": (cli, ["submit", "recipe.yaml"]),
        "completion for another shell": (cli, ["completion", "fish"]),
        "tiny model into a folder that holds something": (cli, ["make-tiny-model", "model"]),
        "train without an output": (train, recipe),
        "train, unknown key": (train, [*recipe, "--output", "none", "--set", "lora.ranks=2"]),
        "train, batch that does not divide": (
            train,
            [*recipe, "--output", "none", "--set", "parallel.ep=3"],
        ),
        "evaluate without data": (evaluate, recipe),
        "evaluate what is not there": (
            evaluate,
            [*recipe, "--data", "none", "--tuned", "model", "--output", "none"],
        ),
    }


# --- observations ---------------------------------------------------------------------------------------------------


def losses(run: Path) -> dict[str, list[float]]:
    """Return the losses, gradient norms and learning rates of `metrics.jsonl` by name, in the order
    of the steps.
    """
    found: dict[str, list[float]] = {}
    for record in _json_lines(run / "metrics.jsonl"):
        if record["kind"] == "train":
            values = {name: record[name] for name in _WEIGHT_LINE}
        elif record["kind"] == "validation":
            levels = {f"validation_{level}": value for level, value in record["levels"].items()}
            values = {
                "validation_loss": record["loss"],
                "validation_autoregressive_loss": record["autoregressive_loss"],
                **levels,
            }
        else:
            continue
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def resumed_from(run: Path) -> list[int]:
    """Return the steps at which the run was resumed."""
    return [
        record["step"]
        for record in _json_lines(run / "metrics.jsonl")
        if record.get("event") == "resumed"
    ]


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Return dtype, shape and SHA-256 (its first half) of every tensor in the safetensors files
    below a folder.
    """
    import torch

    hashes = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                tensor = tensors.get_tensor(name).contiguous()
                data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                hashes[name] = (
                    f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:32]}"
                )
    return hashes


def prepared_rows(folder: Path) -> dict[str, list[str]]:
    """Return every row of a prepared data set by split: id, lengths, and hashes of the tokens and
    texts.
    """
    found = {}
    for split in ("train", "validation"):
        rows = []
        for file in sorted((folder / split).glob("*.arrow")):
            with pa.memory_map(str(file)) as stream:
                table = pa.ipc.open_stream(stream).read_all()
            for row in table.to_pylist():
                tokens = pa.array(row["input_ids"], pa.int32()).buffers()[1].to_pybytes()
                texts = json.dumps(
                    [row["origin"], row["prompt"], row["answer"]], ensure_ascii=False
                ).encode()
                told = (
                    f"prefix {row['prefix_length']} complete {row['complete']} tokens"
                    f" {len(row['input_ids'])}"
                )
                digests = (
                    f"{hashlib.sha256(tokens).hexdigest()[:16]} texts"
                    f" {hashlib.sha256(texts).hexdigest()[:16]}"
                )
                rows.append(f"{row['id'][:16]} {told} {digests}")
        found[split] = rows
    return found


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 (its first half) of every file below a folder, except those that contain
    the time.
    """
    timed = ("provenance.json", "card.json", "card.html")
    files = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in timed
    )
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        for path in files
    }


def file_names(folder: Path) -> list[str]:
    """List the files below a folder, except `system.jsonl`: a short run may end before the first
    measurement.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "system.jsonl")
    return sorted(path.relative_to(folder).as_posix() for path in files)


def artifact_keys(folder: Path) -> dict[str, list[str]]:
    """Return the dotted keys of every JSON and JSON lines file below a folder, by file name.

    Records of metrics.jsonl are distinguished by their kind. Files in the formats of libraries
    (tokenizer, processor, model configuration, system metrics) and the records for MLflow (whose keys contain
    hashes) are left out.
    """
    foreign = (
        "tokenizer",
        "config.json",
        "generation_config",
        "special_tokens",
        "processor_config",
        "dataset_info",
        "state.json",
        "model.safetensors.index",
        "system",
    )
    keys: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.json*")):
        name = path.relative_to(folder).as_posix()
        if (
            not path.is_file()
            or path.name.startswith(foreign)
            or name.startswith((".tracking", "steps.json"))
        ):
            continue
        if path.suffix == ".json":
            keys[name] = sorted(set(_keys(json.loads(path.read_text(encoding="utf-8")))))
        elif path.suffix == ".jsonl":
            keys[name] = sorted(
                {
                    key
                    for record in _json_lines(path)
                    for key in _keys(record, f"{record.get('kind', '')}:")
                }
            )
    return keys


def command_options(help_text: str) -> list[str]:
    """Return the option strings and positional arguments in the --help of a command, without its
    prose.
    """
    usage = help_text.partition("usage:")[2].partition("\n\n")[0]
    options = set(_OPTION.findall(usage))
    for line in help_text.splitlines():
        if found := re.match(r"\s{2,4}(-{1,2}[a-zA-Z].*)", line):
            options |= set(_OPTION.findall(re.split(r"\s{2,}", found[1].strip())[0]))
    positional = re.search(r"^positional arguments:\n((?: {2,}.*\n?)+)", help_text, re.MULTILINE)
    if positional:
        options |= set(re.findall(r"^ {2}(\S+)", positional[1], re.MULTILINE))
    return sorted(options)


def subcommands(help_text: str) -> list[str]:
    """Return the subcommands in the main --help."""
    listed = help_text.partition("commands:\n")[2].partition("\n\n")[0]
    return sorted(re.findall(r"^ {4}([a-z][\w-]*)", listed, re.MULTILINE))


def mlflow_names(database: Path) -> dict[str, list[str]]:
    """Return the names of runs, metrics, parameters, tags and models in MLflow's SQLite file,
    without system metrics.
    """
    questions = {
        "runs": "select distinct name from runs",
        "metrics": "select distinct key from metrics where key not like 'system/%'",
        "params": "select distinct key from params",
        "tags": (
            "select distinct key from tags where key not like 'mlflow.source.%'"
        ),  # whether this is a git checkout
        "models": "select distinct name from registered_models",
        "aliases": "select distinct alias from registered_model_aliases",
    }
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return {
            name: sorted(row[0] for row in connection.execute(question))
            for name, question in questions.items()
        }


def pipeline_names(compiled: Path) -> dict[str, list[str]]:
    """Return the parameters and artifacts of the compiled pipeline and of each of its components,
    by direction.
    """
    import yaml

    tree = next(yaml.safe_load_all(compiled.read_text(encoding="utf-8")))
    found = {
        "tasks": sorted(key for key in _keys(tree["root"]["dag"]["tasks"]) if key.count(".") == 0)
    }
    for name, component in {"pipeline": tree["root"], **tree["components"]}.items():
        for direction in ("inputDefinitions", "outputDefinitions"):
            for kind, definitions in component.get(direction, {}).items():
                found[f"{name} {direction} {kind}"] = [
                    f"{key}:"
                    f" {value.get('parameterType') or value.get('artifactType', {}).get('schemaTitle')}"
                    for key, value in sorted(definitions.items())
                ]
    return found


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")
    elif isinstance(tree, list):
        for value in tree:
            yield from _keys(value, f"{prefix.removesuffix('.')}[].")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
