"""`python -m tests.errors_page` writes docs/errors.md: every message for users that the code can raise, with its cause and its cure."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"

# Where a user meets what a file says; the first that fits.
_STEPS = (
    ("Recipes and settings", r"canvastune/(config|yaml_text|kubernetes_forms|layout)\.py|canvastune/plan"),
    ("Commands and output folders", r"canvastune/(outputs|tiny)\.py|pipelines/(cli|demo|local|reporting|doctor\w*)\.py"),
    ("The base model", r"canvastune/model/(source|load|checkpoint_files|tensor_file|stock)\.py"),
    ("prepare_data", r"canvastune/data/(?!batches)"),
    ("train", r"canvastune/(train|trainer|checkpoints|ranks|model/lora|data/batches)\.py|components/train/"),
    ("merge_lora", r"canvastune/(merge|model/)"),
    ("evaluate and report", r"canvastune/(evaluat|tracking|report)"),
    ("Runs and their folders", r"components/(resolve|run_folder|report|finish)"),
    ("Jobs on a cluster", r"components/jobs/"),
    ("Kubeflow: submit and upload", r"pipelines/"),
    ("Elsewhere", r""),
)
_SAYS = ("UserError", "Forbidden", "Hold", "_give_up")  # what is called with a message for a user
_VALIDATED = "canvastune/config.py"  # whose ValueErrors pydantic hands on
_VERBS = (
    "add|ask|begin|check|choose|convert|copy|correct|create|delete|fetch|get|give|grant|install|keep|leave|look|lower|make|mount|move|name"
    "|pip|prepare|put|raise|remove|rename|repair|run|save|say|see|set|start|switch|take|train|try|use|wait|write"
)
_OTHERS = "did you mean|the smallest change|the same (?:command|run|step)|expected (?=.*for example|a name)"
_CURE = re.compile(rf"(?:^|(?<=[.?!:;,\n›])\s*|\band )((?:{_VERBS}|{_OTHERS})\b.*)", re.IGNORECASE | re.DOTALL)
_INTRODUCTION = """# Errors

What a user can cause, and what to do. A message is the last thing that a command or a step says, behind `canvastune: error:`; it names
the file, the row or the key. Nothing half-written is left, and what was there before stands. ‹Words in such brackets› stand for what
was found.

Written by `python -m tests.errors_page` from the messages in the code; a test fails where this page is behind it.

## Exit codes

| code | of | meaning |
|---:|---|---|
| 0 | every command | done |
| 1 | every command and step | refused or failed: the message says why |
| 2 | every command | the command line has an option or a value that is not known: its usage is shown |
| 3 | `canvastune.train` | stopped on request (SIGTERM, Ctrl-C), and the state is saved: the same command goes on |
| 4 | `canvastune.train` | a rank hangs, and is named: the same command goes on from the newest checkpoint |
| 130 | every command and step | interrupted with Ctrl-C |

`torchrun` ends with 1 where a rank ends with another code than 0.
"""
_ROWS = """
A row that cannot be trained on is counted; up to `data.max_bad_rows` of the rows may be such, and are listed in the data card. Beyond
that the step fails. Repair or remove the rows, or raise `data.max_bad_rows`.

| what is said of a row | file |
|---|---|
"""


@dataclass(frozen=True, order=True)
class Message:
    """What is said, up to the cure; what to do, empty if it is not said; and the file that says it."""

    step: int
    file: str
    cause: str
    cure: str


class _Source:
    """One file, and what its expressions stand for."""

    def __init__(self, path: Path, constants: dict[str, str]) -> None:
        self.name = path.relative_to(ROOT).as_posix()
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self._names = constants | constants_of(self.tree)
        self._imported: dict[str, _Source] = {}
        self._functions = {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)}

        for one in ast.walk(self.tree):
            if isinstance(one, ast.Assign) and (name := name_of(one.targets[0])) in ("hint", "remedy"):
                self._names[name] = " or ".join(filter(None, self.texts(one.value)))  # a local name that stands for what to do

    def called(self, *names: str) -> Iterator[ast.expr]:
        """The first argument of every call of one of these names."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and node.args and name_of(node.func) in names:
                yield node.args[0]

    def texts(self, node: ast.expr) -> list[str]:
        """The texts that an expression can be; what is found at run time stands in brackets."""
        parts: list[ast.expr] = []
        if isinstance(node, ast.JoinedStr):
            return ["".join(self._part(part) for part in node.values)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [left + right for left in self.texts(node.left) for right in self.texts(node.right)]
        if isinstance(node, ast.IfExp):
            parts = [node.body, node.orelse]
        elif isinstance(node, ast.Call) and name_of(node.func) == "join" and isinstance(node.args[0], ast.GeneratorExp):
            parts = [node.args[0].elt]
        elif isinstance(node, ast.Call) and name_of(node.func) in self._functions:
            return self.answers(name_of(node.func))
        elif isinstance(node, ast.Call) and name_of(node.func) in self._imported:
            return self._imported[name_of(node.func)].answers(name_of(node.func))
        return [text for part in parts for text in self.texts(part)] or [self._part(node)]

    def answers(self, function: str) -> list[str]:
        """The texts that a function returns."""
        ends = [end.value for end in ast.walk(self._functions[function]) if isinstance(end, ast.Return) and end.value]
        return [text for end in ends for text in self.texts(end)]

    def know(self, others: dict[str, _Source]) -> None:
        """Learn where imported functions are, given the files by module."""
        for one in ast.walk(self.tree):
            if isinstance(one, ast.ImportFrom) and one.module in others:
                other = others[one.module]
                self._imported |= {each.name: other for each in one.names if each.name in other._functions}

    def _part(self, node: ast.expr) -> str:
        node = node.value if isinstance(node, ast.FormattedValue) else node
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.Name) and node.id in self._names:
            return self._names[node.id]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return f"{self._part(node.left)}/{self._part(node.right)}"
        if isinstance(node, ast.Call) and name_of(node.func) in self._functions and name_of(node.func)[0] == "_":
            texts = self.texts(node)
            if all(" " in text for text in texts):
                return " or ".join([texts[0], *(text.lstrip("; ") for text in texts[1:])])
        names = [each for each in map(name_of, ast.walk(node)) if each and each not in ("self", "str", "sorted", "join", "strip")]
        return f"‹{names[0].strip('_').replace('_', ' ')}›" if names else "‹…›"


def name_of(node: ast.AST) -> str:
    """The last name of `a` or `a.b`, empty for anything else."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def constants_of(tree: ast.Module) -> dict[str, str]:
    """The module's names that stand for a text."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    return found


def sources() -> list[_Source]:
    """Every file that can speak to a user."""
    paths = [path for room in ("canvastune", "components", "pipelines") for path in sorted((ROOT / room).rglob("*.py"))]
    shared = {name: text for path in paths for name, text in constants_of(ast.parse(path.read_text("utf-8"))).items() if name[0] != "_"}
    found = [_Source(path, shared) for path in paths]
    for source in found:
        source.know({other.name.removesuffix(".py").replace("/", "."): other for other in found})
    return found


def messages() -> list[Message]:
    """Every message, in the order of the page. Texts that only hand on another's words are left out."""
    found = set()
    for source in sources():
        step = next(at for at, (_, files) in enumerate(_STEPS) if re.match(files, source.name))
        validated = ("ValueError",) if source.name == _VALIDATED else ()
        for argument in source.called(*_SAYS, *validated):
            for text in source.texts(argument):
                own = re.sub("‹.*?›", "", text)
                if len(re.findall(r"[a-z]{2,}", own)) > 3 and not text.startswith("‹error›"):
                    found.add(Message(step, source.name, *parted(text)))
    return sorted(found)


def parted(text: str) -> tuple[str, str]:
    """Cause and cure, which begins where the last sentence that says what to do begins to say it."""
    starts = [0, *(end.start() + 1 for end in re.finditer(r"[.?] |\n", text))]
    for start in reversed(starts):
        if cure := _CURE.search(text, start):
            return text[: cure.start(1)].rstrip(" .;:,\n"), cure[1]
    return text, ""


def bad_rows() -> list[tuple[str, str]]:
    """What is said of a single row, with the file that says it."""
    found = set()
    for source in sources():
        problems = [node.args[4] for node in ast.walk(source.tree) if isinstance(node, ast.Call) and len(node.args) == 5]
        rows = [each for each in problems if source.name.endswith("rows.py")] + list(source.called("BadRow"))
        found |= {(text, source.name) for each in rows for text in source.texts(each) if " " in re.sub("‹.*?›", "", text)}
    return sorted(found)


def page() -> str:
    """The page's Markdown."""
    parts = [_INTRODUCTION]
    every = messages()
    for at, (title, _) in enumerate(_STEPS):
        mine = [message for message in every if message.step == at]
        if mine:
            parts.append(f"\n## {title}\n\n| what is said | what to do | file |\n|---|---|---|\n")
            parts += [f"| {_cell(each.cause)} | {_cell(each.cure)} | `{each.file}` |\n" for each in mine]
        if title == "prepare_data":
            parts += ["\n### Rows\n", _ROWS, *(f"| {_cell(text)} | `{file}` |\n" for text, file in bad_rows())]
    return "".join(parts)


def _cell(text: str) -> str:
    """A text as it is said, safe in a table of Markdown."""
    line = " ".join(text.split())
    line = line[:1].upper() + line[1:] if line[:1].isalpha() and line.split(":")[0].isalpha() else line
    return re.sub(r"([\\|*_<>\[\]`#~])", r"\\\1", line)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
