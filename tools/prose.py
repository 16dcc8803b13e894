"""Check the project's English: `python -m tools.prose [PATHS]`.

A table of words and phrases to avoid, each with what to write instead, is applied to prose only:
Markdown outside of code, comments, docstrings and messages of programs, descriptions in YAML, and
the text of the report. Names in code, words in backticks, URLs and strings without a space (keys,
file names) are never flagged.

The docstring of a function (not of a property, nor in tests) begins with a verb: first words that
start a noun phrase or a question are flagged; ruff's D401 adds verbs that are not imperative.

To accept a word where it is right, put `prose: ok` and the reason into a comment on its line.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
ALLOW = "prose: ok"
# Not a part of an identifier, an option, a path, a hyphenated word, a call or a KEY=VALUE.
_BEFORE, _AFTER = r"(?<![\w/.=-])", r"(?![\w/=(]|\.\w|-\w)"
_CODE = "\0"  # stands in the place of each character that is not prose

# Paths that are not read, with the reason.
SKIPPED = {
    "LICENSE": "the license's own text",
    "CODE_OF_CONDUCT.md": "names the words of the public document that it adopts",
    "benchmarks/results": "measurements, not text",
    "canvastune/report/uplot": "a third party's code",
    "pipelines/finetune.yaml": "compiled from components that are read",
    "tests/unit/test_prose.py": "holds the words that this program looks for",
    "tools/prose.py": "holds the words that this program looks for",
}


@dataclass(frozen=True)
class Rule:
    """A phrase to avoid. A space in a pattern also matches a line break.

    `unless` is searched in the text around the match and describes correct uses. `where` limits
    the rule to kinds of prose: "docs" (Markdown), "code" (comments, docstrings and messages).
    """

    pattern: str
    write: str  # \\g<1> inserts a group of the match
    note: str
    unless: str = ""
    where: tuple[str, ...] = ("docs", "code")
    match_case: bool = False
    regex: re.Pattern[str] = field(init=False, repr=False, compare=False)
    exception: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        flags = re.NOFLAG if self.match_case else re.IGNORECASE
        gap = r"(?:[ \t]+(?:\n[ \t]*)?|\n[ \t]*)"
        body = f"{_BEFORE}(?:{self.pattern.replace(' ', gap)}){_AFTER}"
        object.__setattr__(self, "regex", re.compile(body, flags))
        object.__setattr__(
            self, "exception", re.compile(self.unless, re.IGNORECASE) if self.unless else None
        )


_BE = "(?:is|are|was|were|be|been|being)"
_GO = "(?:go|goes|gone|going|went)"
_PLACE = "in|on|at|before|beside|under|behind|among|above|below|within|outside|ready"

PHRASES = (
    Rule(r"mend(?:s|ed|ing)?", "fix", "to mend is for clothes"),
    Rule(
        rf"{_GO} on",
        "continue / resume",
        "of a run or a program",
        unless=rf"\b{_GO} on (?:the|a|an|each|every|its|CPU|GPU|device|top|rank)\b",
    ),
    Rule(
        r"(?:stands?|stood|standing) there", "is / appears / exists", "files and keys do not stand"
    ),
    Rule(
        rf"(?:stands?|stood) (?:{_PLACE}|as|first|last|alone|twice|once|still)",
        "is in / is stored in / precedes",
        "files and values do not stand",
        unless=r"\bstand(?:s|ing)? (?:in for|on its own)\b",
    ),
    Rule(
        rf"(?:lies?|lay|lying) (?:there|{_PLACE}|as)",
        "is in / is stored in",
        "files do not lie",
    ),
    Rule(r"in words", "as text / in a message", "say what is written where"),
    Rule(
        r"(?:no|some|any|every)body",
        "no one, or name the actor",
        "who acts? otherwise use the passive",
    ),
    Rule(r"who(?:so)?ever", "the one that / any X that", "name the actor"),
    Rule(r"for who", "for readers who / for users who", "'for' needs a noun"),
    Rule(
        r"Give",
        "Use / Pass / Set / Choose / Return",
        "instructions name the action",
        match_case=True,
    ),
    Rule(
        r"(?:or|and|then|please) give (?:an?|another|the|that|it|one|more|--\S+)",
        "or use / pass / set",
        "as above",
    ),
    Rule(
        r"(?:choose|give|take|use|name|set) such",
        "repeat the noun: use letters and digits",
        "such what?",
    ),
    Rule(
        r"alone",
        "only",
        "'only X' instead of 'X alone'",
        unless=r"\b(?:let|leav(?:e|es|ing)|left|run|runs|running|started|stands?) alone\b"
        r"|\bfrom (?:\S+ ){1,6}?alone\b|stand-alone",
    ),
    Rule(r"begun", "started", "or 'partial' for an output"),
    Rule(r"began", "started", "one word for the start of a run", where=("code",)),
    Rule(
        r"of (?:its|their|our|your|his|her|one's) own",
        "its own X / a separate X",
        "'a separate process', not 'a process of its own'",
    ),
    Rule(
        rf"(?:{_BE}|'s|now|already|all|long) gone(?! on)",
        "is missing / was deleted / has exited",
        "say what happened to it",
    ),
    Rule(r"of (?:no|little) interest", "ignored / not needed", "say what is done with it"),
    Rule(r"ma(?:kes?|de|king) no progress", "is stuck / hangs", "one word for a hang"),
    Rule(rf"{_BE} at work", "is running", "of a program"),
    Rule(rf"{_BE} told", "receives / is notified", "programs are not told"),
    Rule(
        r"(?:tells?|telling|told)",
        "report / send / log / print / show",
        "programs do not tell",
        unless=r"\btell(?:s|ing)?(?: \S+){0,4} (?:apart|from)\b|\btell (?:us|me|you)\b",
    ),
    Rule(rf"{_BE} said", "is reported / logged / printed", "programs do not say"),
    Rule(r"beside", "next to / with", "see the next rule"),
    Rule(r"besides", "in addition to / other than", "one meaning each"),
    Rule(r"anew", "again", ""),
    Rule(r"(?:cannot|can|to|not) be had", "is unavailable", ""),
    Rule(r"(?:is|are|was|were) no \w+'s", "does not belong to", "'is no run's' is not English"),
    Rule(r"in vain", "without success / cannot succeed", ""),
    Rule(r"shall", "must / will", "the house's word is must"),
    Rule(
        r"(?:there|where|here)(?:of|in|upon)|whence|hitherto|hereafter",
        "say it with a noun",
        "legal English",
    ),
    Rule(r"at length", "in full / for longer", ""),
    Rule(r"to (?:its|their) end", "to completion", ""),
    Rule(r"in mid-?(?:\w+)", "during the X", ""),
    Rule(r"cures?", "fix / solution", "errors have a fix"),
    Rule(r"cannot be made", "cannot create / cannot be created", ""),
    Rule(r"make room", "free disk space", "say which room"),
    Rule(r"there is (?:no )?room", "there is (not) enough space", ""),
    Rule(r"do(?:es)? not answer|answers? there", "does not respond", "of a server or a rank"),
    Rule(r"who you are", "authentication failed", "use the protocol's terms"),
    Rule(r"(?:is|are|was|were|while|stays?) away", "is unreachable", "of a server"),
    Rule(r"what for", "why / the purpose", ""),
    Rule(r"at night", "troubleshooting / for on-call engineers", "name the task"),
    Rule(r"what (?:it|they) (?:left|leaves?) behind", "what is in the folder", "name the place"),
    Rule(r"can do something", "was trained / works", "say what it does"),
    Rule(rf"{_BE} (?:not )?at hand", "was found / is available", "of a file"),
    Rule(r"what made it", "provenance", "the field's word"),
    Rule(r"otherwise than", "differently from", ""),
    Rule(r"nothing but \d+", "only", ""),
    Rule(r"(?:thirtieth|twentieth)s?", "3% / 5%", "a share is a percentage"),
    Rule(r"(?:loss|curve|chart|title \}\}) in figures", "as a table", "figures are pictures too"),
    Rule(r"to know before", "warnings / before you", "a heading is a noun or an instruction"),
    Rule(r"what the shell reads", "a script for shell completion", "the field's word"),
    Rule(r"\w+'s books", "the final state", "runs keep no books"),
    Rule(r"do(?:es)? not stand", "is unknown / is not in", "keys do not stand"),
    Rule(r"where everything lies", "where files are / where X is", "name the things"),
    Rule(r"Read on", "see also / further documentation", "a heading is a noun", match_case=True),
    Rule(rf"{_BE} believed", "is taken on trust / is not tested", "who believes?"),
    Rule(r"(?:no|what|which) rung", "not covered / level", "tests are not a ladder"),
    Rule(r"not the real thing", "simulated", "say what replaces what"),
    Rule(
        r"(?:some|few|several) (?:seconds|minutes|hours)",
        "about N minutes on M cores",
        "a measured figure, or no time at all",
    ),
)

# Stems of verbs in -ise: write -ize.
_ISE = (
    "author capital categor character crystall custom equal factor final formal general initial"
    " item local material maxim memor minim modern normal optim organ parallel penal polar prior"
    " quant random real recogn regular reorgan serial deserial special stabil standard summar"
    " synchron token util vector visual amort critic public priorit symbol sanit emphas hypothes"
    " neutral modular diagonal linear binar discret symmetr homogen"
)
_SPELLINGS = {
    r"colour(s|ed|ing|ful|less)?": "color\\g<1>",
    r"behaviour(s|al)?": "behavior\\g<1>",
    r"favour(s|ed|ing|able|ite)?": "favor\\g<1>",
    r"flavour(s|ed)?": "flavor\\g<1>",
    r"honour(s|ed|ing)?": "honor\\g<1>",
    r"neighbour(s|ing|hood)?": "neighbor\\g<1>",
    r"labour(s|ed)?": "labor\\g<1>",
    r"rumour(s)?": "rumor\\g<1>",
    r"centre(s|d)?": "center\\g<1>",
    r"metre(s)?": "meter\\g<1>",
    r"fibre(s)?": "fiber\\g<1>",
    r"grey(s|ed|scale)?": "gray\\g<1>",
    r"licence(s|d)?": "license\\g<1>",
    r"defence(s)?": "defense\\g<1>",
    r"offence(s)?": "offense\\g<1>",
    r"practis(e|es|ed|ing)": "practic\\g<1>",
    r"(label|cancel|model|travel|signal|channel|level|total|marshal|initial)l(ed|ing|ers?)": (
        "\\g<1>\\g<2>"
    ),
    r"analys(e|ed|ing)": "analyz\\g<1>",
    r"catalogue(s|d)?": "catalog\\g<1>",
    r"artefact(s)?": "artifact\\g<1>",
    r"judgement(s)?": "judgment\\g<1>",
    r"acknowledgement(s)?": "acknowledgment\\g<1>",
    r"programme(s)?": "program\\g<1>",
    r"whilst": "while",
    r"amongst": "among",
    r"learnt": "learned",
    r"spelt": "spelled",
    r"fulfil(s)?": "fulfill\\g<1>",
    r"skilful(ly)?": "skillful\\g<1>",
    r"ageing": "aging",
    r"enrol(s)?": "enroll\\g<1>",
    r"sceptic(al|s)?": "skeptic\\g<1>",
    r"mould(s|ed)?": "mold\\g<1>",
    r"towards": "toward",
    r"upwards": "upward",
    r"downwards": "downward",
}
SPELLING = (
    Rule(
        rf"((?:{'|'.join(_ISE.split())})i)s(e|ed|es|er|ers|ing|ation|ations|able)",
        "\\g<1>z\\g<2>",
        "American spelling",
    ),
    *(Rule(pattern, write, "American spelling") for pattern, write in _SPELLINGS.items()),
)
RULES = (*PHRASES, *SPELLING)
# Where any rule may match: one pass over a text instead of one per rule.
_ANY_RULE = re.compile(
    f"{_BEFORE}(?={'|'.join(rule.regex.pattern.removeprefix(_BEFORE) for rule in RULES)})",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Hit:
    path: str
    line: int
    found: str
    write: str

    def __str__(self) -> str:
        return f'{self.path}:{self.line}: "{self.found}" -> write "{self.write}"'


class _Prose:
    """A text in which only the kept ranges remain; lines and columns stay as they are."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._kept = [char if char.isspace() else _CODE for char in text]

    def keep(self, start: int, end: int, *, blank: str = "") -> None:
        """Keep text[start:end], except markers (such as # or a quote) that match `blank`."""
        part = self.text[start:end]
        if blank:
            part = re.sub(blank, lambda match: re.sub(r"\S", " ", match[0]), part)
        self._kept[start:end] = part

    def drop(self, start: int, end: int) -> None:
        """Mark text[start:end] as code."""
        self._kept[start:end] = [char if char.isspace() else _CODE for char in self.text[start:end]]

    def __str__(self) -> str:
        kept = "".join(self._kept)
        for code in (r"(`+)[^`\0]+?\1", r"\bhttps?://\S+"):
            kept = re.sub(code, lambda match: re.sub(r"\S", _CODE, match[0]), kept)
        return kept


def _markdown(text: str) -> str:
    prose = _Prose(text)
    prose.keep(0, len(text), blank=r"^[ \t]*(?:>[ \t]?)+")
    for code in (
        r"^([ \t]*(?:```+|~~~+)).*?^\1[`~]*[ \t]*$",
        r"\]\([^()\s]*\)",
        r"<!--.*?-->",
        r"<[a-zA-Z/][^>\n]*>",
    ):
        for match in re.finditer(code, text, re.MULTILINE | re.DOTALL):
            prose.drop(*match.span())
    return str(prose)


_INTERPOLATION = re.compile(r"(?<!\{)\{(?!\{)[^{}]*(?:\{[^{}]*\}[^{}]*)*\}")


def _python(text: str) -> str:
    prose = _Prose(text)
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    # Python 3.12 splits f-strings into tokens of their own, 3.11 gives one STRING.
    middle = getattr(tokenize, "FSTRING_MIDDLE", -1)
    edges = (getattr(tokenize, "FSTRING_START", -1), getattr(tokenize, "FSTRING_END", -1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        if token.type == tokenize.COMMENT:
            prose.keep(start, end, blank=r"^#+:?")
        elif token.type in edges:
            prose.keep(start, end, blank=r".+")
        elif token.type in (tokenize.STRING, middle) and re.search(r"\s", token.string):
            prose.keep(
                start, end, blank=r"""^[a-zA-Z]*(?:\"\"\"|'''|"|')|(?:\"\"\"|'''|"|')$|\\[nrt]"""
            )
            if re.match(r"[bBrR]*[fF]", token.string) and token.type == tokenize.STRING:
                for match in _INTERPOLATION.finditer(text, start, end):
                    prose.drop(*match.span())
    return str(prose)


def _hash_comments(text: str) -> str:
    prose = _Prose(text)
    for match in re.finditer(r"(?:^|(?<=\s))#+!?[^\n]*", text, re.MULTILINE):
        if not match[0].startswith("#!"):
            prose.keep(*match.span(), blank=r"^#+[ \t]*(?:-- )?")
    for match in re.finditer(r"""\b(?:echo|printf)\b[^\n]*""", text):
        for string in re.finditer(r'"[^"\n]*\s[^"\n]*"' + r"|'[^'\n]*\s[^'\n]*'", match[0]):
            prose.keep(match.start() + string.start() + 1, match.start() + string.end() - 1)
    return str(prose)


def _yaml(text: str) -> str:
    kept = _hash_comments(text)
    prose = _Prose(text)
    try:
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError:
        documents = []  # a Helm template: comments only
    for document in documents:
        for start, end in _descriptions(document):
            prose.keep(start, end, blank=r"^['\"]|['\"]$")
    described = str(prose)
    return "".join(a if a != _CODE else b for a, b in zip(kept, described, strict=True))


def _descriptions(node: yaml.Node | None) -> Iterator[tuple[int, int]]:
    """Yield the ranges of all scalars under a key `description`."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == "description" and isinstance(value, yaml.ScalarNode):
                yield value.start_mark.index, value.end_mark.index
            yield from _descriptions(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _descriptions(value)


def _schema(text: str) -> str:
    prose = _Prose(text)
    for match in re.finditer(r'"(?:description|title)"\s*:\s*"((?:[^"\\]|\\.)*)"', text):
        prose.keep(*match.span(1))
    return str(prose)


def _script(text: str) -> str:
    """Keep the comments and the strings of JavaScript, or the comments of CSS."""
    prose = _Prose(text)
    token = r"""//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`(?:[^`\\]|\\.)*`"""
    for match in re.finditer(token, text, re.DOTALL):
        if match[0].startswith("/"):
            prose.keep(*match.span(), blank=r"^//+|^/\*+|\*+/$|^[ \t]*\*")
        elif re.search(r"\s", match[0]):
            prose.keep(*match.span(), blank=r"^.|.$")
            for inner in re.finditer(r"\$\{[^{}]*\}", match[0]):
                prose.drop(match.start() + inner.start(), match.start() + inner.end())
    return str(prose)


def _markup(text: str) -> str:
    """Keep a template's text and comments, and strings with a space in its expressions."""
    prose = _Prose(text)
    prose.keep(0, len(text))
    for code in (
        r"<(script|style)\b.*?</\1>",
        r"<[a-zA-Z/!][^<>]*>",
        r"\{\{(?!-?\s*/\*).*?\}\}",
        r"\{%.*?%\}",
    ):
        for match in re.finditer(code, text, re.DOTALL):
            prose.drop(*match.span())
            if match[0].startswith("{"):
                for string in re.finditer(r'"[^"\n]*\s[^"\n]*"' + r"|'[^'\n]*\s[^'\n]*'", match[0]):
                    prose.keep(
                        match.start() + string.start(), match.start() + string.end(), blank=r"^.|.$"
                    )
    return str(prose)


def _template_comments(text: str) -> str:
    prose = _Prose(text)
    for match in re.finditer(r"\{\{-?\s*/\*.*?\*/\s*-?\}\}", text, re.DOTALL):
        prose.keep(*match.span(), blank=r"^\{\{-?\s*/\*|\*/\s*-?\}\}$")
    return str(prose)


def _helm_template(text: str) -> str:
    pairs = zip(_yaml(text), _template_comments(text), strict=True)
    return "".join(a if a != _CODE else b for a, b in pairs)


_READERS: tuple[tuple[str, Callable[[str], str]], ...] = (
    (r".*\.md", _markdown),
    (r".*\.pyi?", _python),
    (r"(?:.*/)?templates/.*\.(?:yaml|tpl)", _helm_template),
    (r".*\.ya?ml|(?:.*/)?\.(?:helm|docker|git)ignore", _yaml),
    (r".*\.schema\.json", _schema),
    (r".*\.(?:js|css)", _script),
    (r".*\.(?:jinja|html)|(?:.*/)?(?:NOTES|help/.*)\.txt", _markup),
    (
        r"(?:.*/)?(?:Makefile|[\w.-]*Dockerfile|CODEOWNERS|\.ci/run)|.*\.(?:sh|toml|in)",
        _hash_comments,
    ),
)


def check(path: str, text: str) -> list[Hit]:
    """Return what the rules find in a file's text; `path` decides how it is read."""
    reader = next((reader for name, reader in _READERS if re.fullmatch(name, path)), None)
    if reader is None or any(
        path == skipped or path.startswith(f"{skipped}/") for skipped in SKIPPED
    ):
        return []
    kind = "docs" if path.endswith(".md") else "code"
    prose, lines = re.sub(r"\0(?:[ \t]*\0)+", _CODE, reader(text)), text.splitlines()
    hits: list[Hit] = []
    checked = 0  # where the last match ended
    for start in (match.start() for match in _ANY_RULE.finditer(prose)):
        matches = ((rule, rule.regex.match(prose, start)) for rule in RULES if kind in rule.where)
        rule, match = next((pair for pair in matches if pair[1]), (None, None))
        if start < checked or rule is None or match is None:
            continue
        around = " ".join(prose[max(0, start - 60) : match.end() + 40].split())
        first, last = prose.count("\n", 0, start), prose.count("\n", 0, match.end())
        if any(ALLOW in line for line in lines[first : last + 1]) or (
            rule.exception and rule.exception.search(around)
        ):
            continue
        checked = match.end()
        hits.append(Hit(path, first + 1, " ".join(match[0].split()), match.expand(rule.write)))
    if path.endswith(".py") and not path.startswith("tests/"):
        hits += _docstring_hits(path, text)
    return sorted(hits, key=lambda hit: hit.line)


_NO_VERB = re.compile(
    r"(?:the|an?|what|whether|where|how|who|whose|which|why|every|each|all|no|none|this|that|these"
    r"|those|its|our|one|two|if|of|as|in|on|at|by|for|with|from|to)\b",
    re.IGNORECASE,
)


def _docstring_hits(path: str, text: str) -> Iterator[Hit]:
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or any(
            re.search(r"property|\.setter|computed_field", ast.unparse(decorator))
            for decorator in node.decorator_list
        ):
            continue
        first = _NO_VERB.match(ast.get_docstring(node) or "")
        line = node.body[0].lineno
        if first and ALLOW not in lines[line - 1]:
            yield Hit(
                path, line, f"{first[0]} ...", "a verb first: Return ..., Check ..., Yield ..."
            )


def files(paths: list[Path]) -> Iterator[Path]:
    """Yield the files below `paths`; without any, those that git knows or would add."""
    if not paths:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        names = sorted(set(listed.stdout.split("\0")) - {""})
        yield from (ROOT / name for name in names if (ROOT / name).is_file())
    for path in paths:
        if path.is_dir():
            yield from sorted(
                p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts
            )
        else:
            yield path


def main(arguments: list[str] | None = None) -> int:
    """Print each hit; return 1 if there is any."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.prose", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, help="files or folders; default: everything that git knows"
    )
    hits: list[Hit] = []
    for path in files(parser.parse_args(arguments).paths):
        full = path.resolve()
        name = full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else full.as_posix()
        try:
            hits += check(name, full.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a picture
    for hit in hits:
        print(hit)
    if hits:
        print(
            f"{len(hits)} to rewrite; a comment `{ALLOW}` on the line accepts one (tools/prose.py)",
            file=sys.stderr,
        )
    return 1 if hits else 0


if __name__ == "__main__":
    raise SystemExit(main())
