"""The documentation is correct: links, files and names exist, commands parse, examples run."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import sys
import types
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from canvastune.config import load_config, parse_config
from canvastune.config.loading import known_keys
from pipelines import cli
from pipelines.parser import build_parser, subcommands
from tests.support.cluster_rules import pod_security_problems
from tests.support.documents import (
    PAGES,
    ROOT,
    Block,
    anchors,
    blocks,
    commands,
    files,
    links,
    module_main,
    parsed,
    spans,
)
from tests.support.rendered_chart import texts
from tools.chart_table import CHART, documented_values

README, DOCS = ROOT / "README.md", ROOT / "docs"
ARCHITECTURE, EXTENDING = DOCS / "architecture.md", DOCS / "extending.md"
TINY = ROOT / "pipelines" / "recipes" / "tiny_lora.yaml"
# Programs of others: tests/cluster/test_journeys.py runs those for a cluster, and
# `make test-images` those for images; tests/unit/test_serving.py compares those of servers.
_OTHERS = {
    "cat",
    "cd",
    "cosign",  # tests/cluster/test_release.py compares its options with the workflow
    "docker",
    "done",
    "echo",
    "for",
    "head",
    "helm",
    "kfp",
    "kind",
    "kubectl",
    "mlx_vlm.server",
    "renew-locks.sh",
    "sglang",
    "transformers",
    "vllm",
    "xdg-open",
}
_ROOMS = (
    "benchmarks",
    "canvastune",
    "charts",
    "components",
    "docker",
    "docs",
    "findings",
    "pipelines",
    "tests",
    "tools",
)
_NOT_MODULES = {
    "canvastune.attempts",
    "canvastune.changed_settings",
    "canvastune.error",
    "canvastune.failed_step",
    "canvastune.path",
    "canvastune.state",
    "canvastune.promotion",
    "pipelines.kubeflow.org",
    "tools.strict",
}  # tags in MLflow, an audience of tokens, a key of rows
_VALUES = {
    row.key: row.default
    for row in documented_values((CHART / "values.yaml").read_text(encoding="utf-8"))
}
_FILE = re.compile(
    r".*\.(py|md|ya?ml|json|jsonl|db|txt|html|png|safetensors|env|Dockerfile|example\.com.*)"
)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
SHELL = [block for page in PAGES for block in blocks(page, "sh")]
YAML = [block for page in PAGES for block in blocks(page, "yaml")]
PYTHON = [block for page in PAGES for block in blocks(page, "python")]


@every_page
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        place, _, anchor = link.partition("#")
        target = page if not place else (page.parent / place).resolve()
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert not anchor or anchor in anchors(target), (
            f"{link}: no such heading among {sorted(anchors(target))}"
        )


def test_the_readmes_commands_for_a_cluster_are_those_that_the_journeys_test_runs() -> None:
    tested = [
        words for block in blocks(DOCS / "journeys.md", "sh") for words in commands(block.text)
    ]
    own = [
        words
        for block in blocks(README, "sh")
        for words in commands(block.text)
        if words[0] != "make"
    ]
    assert own
    assert all(words in tested for words in own)


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(README.parent / link.partition("#")[0]).resolve() for link in links(README)}
    missing = [page.name for page in DOCS.glob("*.md") if page not in linked]
    assert not missing, f"the README has no link to {missing}"


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    for span in spans(page):
        path = re.fullmatch(rf"(?:{'|'.join(_ROOMS)})/[\w.*/-]+", span)
        if path is not None and not any(name.startswith(span) for name in files(page)):
            assert (ROOT / span).exists() or list(ROOT.glob(span)), f"`{span}`: no such file"


@every_page
def test_modules_that_are_named_exist(page: Path) -> None:
    """A dotted name in code: a module, or an attribute of one."""
    for span in spans(page):
        name = re.fullmatch(
            r"((?:canvastune|components|pipelines|benchmarks|tools|tests)(?:\.\w+)+)(?:\(.*)?", span
        )
        if name is not None and not _FILE.fullmatch(name[1]) and name[1] not in _NOT_MODULES:
            assert _find(name[1]) or _on_page(name[1], page), f"`{span}`: no such module or name"


def _find(dotted: str) -> bool:
    """Return whether a dotted name can be imported: a module, or attributes of one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(name) is not None:
                found: Any = importlib.import_module(name)
                for part in parts[end:]:
                    found = getattr(found, part, None)
                return found is not None
    return False


def _on_page(dotted: str, page: Path) -> bool:
    """Return whether a page has its readers write the module."""
    return f"{dotted.replace('.', '/')}.py" in files(page)


def test_the_tree_of_the_architecture_page_exists() -> None:
    """Two spaces of indentation mean a directory; STEP is any step; the text names files too."""
    (tree, *_) = blocks(ARCHITECTURE, "")
    parents: list[Path] = []
    for line in tree.text.splitlines():
        found = re.match(r"( *)((?:[\w./]+, )*[\w./]+)", line)
        assert found is not None, line
        depth = len(found[1]) // 2
        parents = parents[:depth]
        folder = parents[-1] if parents else ROOT
        for name in found[2].split(", "):
            paths = list(folder.glob(name.replace("STEP", "*").rstrip("/")))
            assert paths, f"{line}: no {name} in {folder.relative_to(ROOT)}"
        parents.append(paths[0] if paths[0].is_dir() else folder)
        for name in re.findall(r"\b\w+\.py\b", line[found.end() :]):
            assert (parents[-1] / name).is_file() or (folder / name).is_file(), f"{line}: no {name}"


@every_page
def test_keys_that_are_named_exist(page: Path) -> None:
    trees = {
        "recipe": set(known_keys()),
        "chart": {part for key in _VALUES for part in _branches(key)},
    }
    for span in spans(page):
        key = re.match(r"([a-z_]+(?:\.[A-Za-z_]+)+)(?:=| |:|$)", span)
        if key is None or _FILE.fullmatch(span):
            continue
        for name, keys in trees.items():
            if key[1].partition(".")[0] in {known.partition(".")[0] for known in keys}:
                assert key[1] in keys, f"`{span}`: the {name} has no key {key[1]}"


def _branches(key: str) -> list[str]:
    """Return `a`, `a.b` and `a.b.c` for the key `a.b.c`."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


@every_page
def test_commands_in_the_text_exist(page: Path) -> None:
    for span in spans(page):
        words = span.split()
        if words[0] == "make" and len(words) > 1:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
                f"`{span}`: no such target"
            )
        elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in _ROOMS:
            assert importlib.util.find_spec(words[2]), f"`{span}`: no such module"
        elif words[0] == "canvastune" and len(words) > 1 and re.fullmatch(r"[a-z-]+", words[1]):
            known = _options_of(words[1])
            unknown = {
                word.strip("[]") for word in words if word.lstrip("[").startswith("--")
            } - known
            assert not unknown, f"`{span}`: canvastune {words[1]} has no {unknown}"


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_accepted_by_their_programs(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in commands(block.text):
        program = Path(words[0]).name
        match program:
            case "canvastune":
                _check_recipe(parsed(cli.main, words[1:], monkeypatch), block.page)
            case "torchrun":
                from torch.distributed.run import get_args_parser

                given = get_args_parser().parse_args(words[1:])
                assert given.module, f"{block}: torchrun without -m"
                _check_module(given.training_script, given.training_script_args, block, monkeypatch)
            case "python" | "python3":
                assert words[1] == "-m", f"{block}: {words}"
                if words[2] != "venv":
                    _check_module(words[2], words[3:], block, monkeypatch)
            case "make":
                targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert next(word for word in words[1:] if "=" not in word) in targets, (
                    f"{block}: {words}"
                )
            case "mlflow":
                from mlflow.cli import cli as mlflow

                command = mlflow.get_command(click.Context(mlflow), words[1])
                assert command is not None, f"{block}: {words}"
                command.make_context(words[1], words[2:])
            case "pip":
                assert words[1] == "install"
                extras = [extra for word in words for extra in re.findall(r"^\.\[(\w+)\]$", word)]
                assert all(
                    f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras
                ), f"{block}: {words}"
            case _:
                assert program in _OTHERS, f"{block}: nothing here checks `{program}`"


def test_runs_that_the_quick_start_compares_have_the_same_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page, scales = ROOT / "docs" / "quick-start.md", set()
    for block in blocks(page, "sh"):
        for words in commands(block.text):
            if words[1:2] == ["run"] and any("lora.rank" in word for word in words):
                options = parsed(cli.main, words[1:], monkeypatch)
                lora = load_config(ROOT / options.recipe, options.set).lora
                scales.add(lora.alpha / lora.rank)
    assert len(scales) == 1, "the curves differ by the learning rate"


def _check_module(
    name: str, arguments: list[str], block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = module_main(name)
    if main is None:
        assert not arguments, f"{block}: python -m {name} takes no arguments"
        return
    _check_recipe(parsed(main, arguments, monkeypatch), block.page)


def _check_recipe(options: Namespace, page: Path) -> None:
    """Check that the recipe of a command exists here or on the page, and accepts its `--set`."""
    recipe = getattr(options, "recipe", None) or getattr(options, "config", None)
    if recipe is None or str(recipe).isupper():
        return
    shown = files(page).get(str(recipe))
    assert shown or (ROOT / recipe).is_file(), (
        f"{recipe}: no such recipe in the repository or on the page"
    )
    if not shown:
        load_config(ROOT / recipe, list(options.set))


def _options_of(command: str) -> set[str]:
    known = _subcommands()
    assert command in known, f"canvastune {command}: no such command"
    return {option for action in known[command]._actions for option in action.option_strings}


def _subcommands() -> dict[str, ArgumentParser]:
    return subcommands(build_parser())


def test_the_readme_lists_every_command() -> None:
    listed = re.findall(
        r"^\| `canvastune ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(_subcommands())


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_examples_are_valid(block: Block) -> None:
    tree = yaml.safe_load(block.text)
    if "kind" in tree:
        kubernetes_validate.validate(tree, "1.34", strict=True)
        assert not pod_security_problems(tree["spec"])
    elif tree.keys() <= {key.partition(".")[0] for key in _VALUES}:
        texts(tree)
    else:
        parse_config(tree, str(block))


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_examples_compile(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_code_blocks_name_their_language() -> None:
    unknown = {
        str(block): block.language
        for page in PAGES
        for block in blocks(page)
        if block.language not in ("", "sh", "yaml", "python", "json", "mermaid")
    }
    assert not unknown


# --- examples of docs/extending.md


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the page's examples were run, except those of the step."""
    folder = tmp_path_factory.mktemp("extending")
    for block in blocks(EXTENDING, "yaml"):
        assert block.name, f"{block} has no name"
        (folder / block.name).write_text(block.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks(EXTENDING, "python"):
            if block.name is None:
                exec(compile(block.text, str(block), "exec"), {"__name__": "__example__"})
    return folder


def test_the_example_of_a_dataset_is_prepared_as_the_page_says(workplace: Path) -> None:
    (row, *_) = [
        json.loads(line) for line in (workplace / "instructions.jsonl").read_text().splitlines()
    ]
    sample = json.loads((workplace / "prepared" / "card.json").read_text())["samples"][0]
    assert row["context"] in sample["prefix"]
    assert "Answer:" in sample["response"]


def test_the_example_of_a_step_works_where_the_page_puts_it(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, component, graph = (block for block in blocks(EXTENDING, "python") if block.name)
    module = types.ModuleType("canvastune.wordlist")
    exec(compile(engine.text, str(engine), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "canvastune.wordlist", module)
    wordlist = _imported(tmp_path / "wordlist.py", component.text).wordlist
    config = load_config(workplace / "instructions.yaml").model_dump_json()
    data, checked = (
        SimpleNamespace(path=str(workplace / "prepared")),
        SimpleNamespace(path=str(tmp_path / "checked")),
    )
    wordlist.python_func(config=config, words=["damn"], dataset=data, checked=checked)
    assert json.loads((tmp_path / "checked" / "words.json").read_text())["rows"] > 20
    with pytest.raises(SystemExit) as ended:
        wordlist.python_func(
            config=config,
            words=["answer"],
            dataset=data,
            checked=SimpleNamespace(path=str(tmp_path / "refused")),
        )
    assert ended.value.code == 1
    assert not (tmp_path / "refused").exists()
    tree = _compiled_with(graph, component, tmp_path)
    tasks = next(
        c["dag"]["tasks"]
        for c in tree["components"].values()
        if "train" in c.get("dag", {}).get("tasks", {})
    )
    assert {"plan", "wordlist"} <= set(tasks["train"]["dependentTasks"])


def _compiled_with(graph: Block, component: Block, folder: Path) -> Any:
    """Compile the pipeline with the page's lines in place of those in the file."""
    from kfp.compiler import Compiler

    source = (ROOT / "pipelines" / "finetune.py").read_text()
    lines = [line for line in graph.text.splitlines()[1:] if line]
    own = [line for line in lines if "wordlist" not in line and "checked" not in line]
    assert all(f"            {line}\n" in source for line in own), (
        f"{graph}: the graph does not have the lines {own}"
    )
    start = source.index(f"            {lines[0]}")
    end = source.index("            keep_node(training)")
    changed = source[:start] + "".join(f"            {line}\n" for line in lines) + source[end:]
    imported = "from wordlist import wordlist\n"
    sys.path.insert(0, str(folder))
    try:
        pipeline = _imported(
            folder / "graph.py",
            changed.replace("from components.decorator", f"{imported}from components.decorator"),
        )
    finally:
        sys.path.remove(str(folder))
    Compiler().compile(pipeline.finetune, str(folder / "graph.yaml"))
    return next(yaml.safe_load_all((folder / "graph.yaml").read_text()))


def _imported(path: Path, text: str) -> Any:
    """Import a text as a module from a file, since Kubeflow reads a component's source."""
    path.write_text(text)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
