"""`python -m tools.data_page` writes the forms of docs/data.md, and docs/images/data/*.svg.

Each form has an example row. The reader and the encoder that training uses turn it into tokens, with
the tiny model's tokenizer and chat template; a picture shows them as text, in two colors.
"""

from __future__ import annotations

import json
import re
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from canvastune.config.loading import loads
from canvastune.preparation.chat_template import ChatEncoder, EncodedConversation
from canvastune.preparation.chat_tokenizer import ChatTokenizer
from canvastune.preparation.row_formats import RowReader, detect_format
from canvastune.preparation.tokenizer import load_tokenizer
from canvastune.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "data.md"
PICTURES = ROOT / "docs" / "images" / "data"
START, END = "<!-- python -m tools.data_page writes from here -->\n", "<!-- to here -->\n"
LINE_BREAK = "\u21b5"  # shown for \n
_WIDTH, _FOLD = 92, 100  # characters in a line of a picture, and of a row
_ADVANCE, _HEIGHT, _MARGIN = 7.8, 22, 14  # of a character, of a line, around the text; in pixels
_LEGEND = (
    ("context", "context: what inference feeds"),
    ("learned", "learned: what the model writes"),
)
_STYLE = """\
.page { fill: #ffffff; stroke: #d0d7de; } .context { fill: #e1e5ea; } .learned { fill: #b9ecc8; }
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
text.context, text.title { fill: #4d5762; } text.learned { fill: #0a3d1c; } text.control { font-weight: bold; }
@media (prefers-color-scheme: dark) {
.page { fill: #151b23; stroke: #3d444d; } .context { fill: #323b48; } .learned { fill: #1b5232; }
text.context, text.title { fill: #b6c0cb; } text.learned { fill: #d8f8e1; } }"""


@dataclass(frozen=True)
class Form:
    """An example row, and what the page says of it.

    Attributes:
        name: of the picture.
        settings: of the recipe, as `--set` takes them.
        learned: the sentence below the picture.
    """

    name: str
    title: str
    row: dict[str, Any]
    learned: str
    settings: tuple[str, ...] = ()


class Example(NamedTuple):
    """One example of a row, decoded from its tokens."""

    turn: int | None  # that is learned, if the row has several examples
    context: str
    learned: str


def _user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _call(number: int, city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"id": f"c{number}", "type": "function", "function": function}


def _response(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


_WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
_TWO_TURNS = [_user("2+2?"), _says("4"), _user("And 1 more?"), _says("5")]

FORMS = (
    Form(
        "messages",
        "Messages",
        {"messages": [{"role": "system", "content": "Be short."}, *_TWO_TURNS]},
        "The last assistant turn, with the token that ends it. The first answer is context.",
    ),
    Form(
        "every_turn",
        "Messages, every turn learned",
        {"messages": _TWO_TURNS},
        "Each assistant turn, as a separate example that follows the history that is available at"
        " inference.",
        ("data.learn=all",),
    ),
    Form(
        "marks",
        "Messages with weights",
        {"messages": [_user("2+2?"), _says("5", weight=0), _user("Sure?"), _says("4", weight=1)]},
        "Only the turn whose weight is 1. The wrong answer is context, even with `data.learn=all`.",
        ("data.learn=all",),
    ),
    Form(
        "sharegpt",
        "ShareGPT",
        {
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "4"},
            ]
        },
        "The last turn from `gpt`, as with messages.",
    ),
    Form(
        "text_parts",
        "Content in parts",
        {
            "messages": [
                _user([{"type": "text", "text": "Add:"}, {"type": "text", "text": "2+2"}]),
                {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
            ]
        },
        "The answer. Text parts are joined as in the chat template: without a space, or with one in a"
        " system turn.",
    ),
    Form(
        "roles",
        "The roles developer and model",
        {
            "messages": [
                {"role": "developer", "content": "Be short."},
                _user("2+2?"),
                {"role": "model", "content": "4"},
            ]
        },
        "The turn of `model`, which is another name for `assistant`, as `developer` is for `system`.",
    ),
    Form(
        "prompt_completion",
        "Prompt and completion, text",
        {"prompt": "2+2?", "completion": "4"},
        "The completion.",
    ),
    Form(
        "prompt_completion_lists",
        "Prompt and completion, lists of messages",
        {
            "prompt": [{"role": "system", "content": "Be short."}, _user("2+2?")],
            "completion": [_says("4")],
        },
        "The last assistant turn of the completion.",
    ),
    Form(
        "alpaca",
        "Alpaca",
        {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
        "The output. The input follows the instruction, on a new line.",
    ),
    Form(
        "history",
        "Alpaca with history",
        {
            "instruction": "And 1 more?",
            "input": "",
            "output": "5",
            "system": "Be short.",
            "history": [["2+2?", "4"]],
        },
        "The output. The pairs in `history` become turns before the instruction; with"
        " `data.learn=all`, their answers are learned too.",
    ),
    Form(
        "gsm8k",
        "GSM8K",
        {
            "question": "Tom has 3 nuts. Tom finds 2 more. How many nuts does Tom have now?",
            "answer": "3+2=5\n#### 5",
        },
        "The whole answer. Exact match compares the number after `####`.",
    ),
    Form(
        "columns",
        "Custom columns",
        {
            "role": "You write SQL.",
            "schema": "users(id, name)",
            "ask": "Count users.",
            "sql": "SELECT COUNT(*) FROM users",
        },
        "The response column. The context precedes the prompt, with an empty line between them.",
        (
            "data.format=columns",
            "data.columns.prompt=ask",
            "data.columns.response=sql",
            "data.columns.system=role",
            "data.columns.context=schema",
        ),
    ),
    Form(
        "call",
        "A tool call",
        {
            "tools": [{"type": "function", "function": _WEATHER}],
            "messages": [_user("Rain in Bonn?"), _says("", tool_calls=[_call(1, "Bonn")])],
        },
        "The call, and the token that hands control to the tool, where generation stops. The"
        " declaration is context.",
    ),
    Form(
        "parallel_calls",
        "Parallel calls, responses and the answer",
        {
            "tools": [_WEATHER],
            "messages": [
                _user("Rain in Bonn or Ulm?"),
                _says("", tool_calls=[_call(1, "Bonn"), _call(2, "Ulm")]),
                _response(1, "rain"),
                _response(2, "sun"),
                _says("In Bonn."),
            ],
        },
        "Both calls as one example, and the answer as another. The tools' responses are context.",
        ("data.learn=all",),
    ),
    Form(
        "thinking",
        "Thinking",
        {"messages": [_user("2+2?"), _says("4", reasoning="2 and 2 make 4.")]},
        "The thinking, as a channel before the answer, and the answer itself. With `data.thinking=drop`,"
        " only the answer.",
    ),
    Form(
        "thinking_column",
        "Thinking in a column",
        {"question": "2+2?", "reasoning": "2 and 2 make 4.", "answer": "4"},
        "The same, from columns. If the thinking column has another name, set"
        " `data.columns.thinking`.",
    ),
    Form(
        "thinking_and_tools",
        "Thinking before a call",
        {
            "tools": [_WEATHER],
            "messages": [
                _user("Rain in Bonn?"),
                _says("", reasoning="I look.", tool_calls=[_call(1, "Bonn")]),
                _response(1, "rain"),
                _says("Yes."),
            ],
        },
        "The thinking with its call, and the answer. Before the answer, the generation prompt opens a"
        " thought; this answer has none, so the model learns to close it immediately.",
        ("data.learn=all",),
    ),
)


def examples(form: Form, tokenizer: ChatTokenizer) -> list[Example]:
    """Read and encode a form's row as `prepare_data` does.

    Raises:
        AssertionError: the row is not one that can be trained on.
    """
    overrides = ("name=page", "data.source=rows.jsonl", *form.settings)
    data = loads("{}", overrides=overrides).data
    found = detect_format(data, list(form.row))
    assert found is not None, f"{form.name}: no format has the columns {list(form.row)}"
    _, conversations = RowReader(found, data, data).read(form.row)
    shown = []
    for conversation, encoded in zip(
        conversations, ChatEncoder(tokenizer, "tiny").encode(conversations), strict=True
    ):
        assert isinstance(encoded, EncodedConversation), f"{form.name}: {encoded}"
        tokens, at = encoded.tokens.tolist(), encoded.prefix_length
        context, learned = (tokenizer.decode(part) for part in (tokens[:at], tokens[at:]))
        shown.append(
            Example(conversation.turn if len(conversations) > 1 else None, context, learned)
        )
    return shown


def picture(form: Form, tokenizer: ChatTokenizer) -> str:
    """Draw the examples of a form's row as SVG: text on two colors, control tokens in bold."""
    added = [token.content for token in tokenizer.added_tokens.values() if token.special]
    control = re.compile("|".join(map(re.escape, sorted(added))))
    body: list[str] = []
    top = _MARGIN
    left: float = _MARGIN
    for kind, words in _LEGEND:
        body.append(_box(kind, left, top, 2))
        body.append(_text("title", words, left + 3 * _ADVANCE, top))
        left += (len(words) + 6) * _ADVANCE
    top += _HEIGHT
    for example in examples(form, tokenizer):
        top += _HEIGHT // 2
        if example.turn is not None:
            body.append(_text("title", f"example for turn {example.turn}", _MARGIN, top))
            top += _HEIGHT
        for line in _lines(example, control):
            left = _MARGIN
            for run in line:
                body.append(_box(run.kind, left, top, len(run.text)))
                body.append(_text(run.classes, run.text, left, top))
                left += len(run.text) * _ADVANCE
            top += _HEIGHT
    width, height = round(_WIDTH * _ADVANCE + 2 * _MARGIN), top + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
            f' height="{height}" role="img">',
            f"<title>{escape(form.title)}: what is context, and what is learned</title>",
            f"<style>{_STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>',
            *body,
            "</svg>\n",
        ]
    )


class _Run(NamedTuple):
    """A part of a line."""

    kind: str  # context or learned
    text: str
    control: bool

    @property
    def classes(self) -> str:
        return f"{self.kind} control" if self.control else self.kind


def _lines(example: Example, control: re.Pattern[str]) -> Iterator[list[_Run]]:
    """Break an example into lines: after each line break, and where a line is full."""
    line: list[_Run] = []
    room = _WIDTH
    for kind, text in (("context", example.context), ("learned", example.learned)):
        for piece in _pieces(text, control):
            if len(piece) > room and line:
                yield line
                line, room = [], _WIDTH
            is_control = control.fullmatch(piece) is not None
            shown = piece.replace("\n", LINE_BREAK)
            last = line[-1] if line else None
            if last and not is_control and (last.kind, last.control) == (kind, False):
                line[-1] = last._replace(text=last.text + shown)
            else:
                line.append(_Run(kind, shown, is_control))
            room -= len(piece)
            if piece.endswith("\n"):
                yield line
                line, room = [], _WIDTH
    if line:
        yield line


def _pieces(text: str, control: re.Pattern[str]) -> Iterator[str]:
    """Yield what is not broken: control tokens, and words with the blanks after them."""
    end = 0
    for found in [*control.finditer(text), None]:
        plain = text[end : found.start() if found else None]
        for word in re.findall(r"\n|[^\n ,]*[ ,]+|[^\n ,]+", plain):
            yield from (word[at : at + _WIDTH] for at in range(0, len(word), _WIDTH))
        if found:
            yield found[0]
            end = found.end()


def _box(kind: str, left: float, top: int, characters: int) -> str:
    return (
        f'<rect class="{kind}" x="{left:.1f}" y="{top}" width="{characters * _ADVANCE:.1f}"'
        f' height="{_HEIGHT}"/>'
    )


def _text(classes: str, text: str, left: float, top: int) -> str:
    """Write text of a fixed width, whatever font there is."""
    return (
        f'<text class="{classes}" x="{left:.1f}" y="{top + 15}" xml:space="preserve"'
        f' textLength="{len(text) * _ADVANCE:.1f}" lengthAdjust="spacingAndGlyphs">'
        f"{escape(text)}</text>"
    )


def folded(value: Any, indent: int = 0, key: str = "") -> str:
    """Write JSON as people do: on one line if it is short, otherwise an item per line.

    Args:
        key: what precedes it on its line.
    """
    line = key + json.dumps(value, ensure_ascii=False)
    if len(line) + indent <= _FOLD or not isinstance(value, dict | list):
        return line
    inner = indent + 2
    if isinstance(value, dict):
        items = [folded(item, inner, f"{json.dumps(name)}: ") for name, item in value.items()]
    else:
        items = [folded(item, inner) for item in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    lines = ",\n".join(" " * inner + item for item in items)
    return f"{key}{first}\n{lines}\n{' ' * indent}{last}"


def section(form: Form) -> str:
    """Write a form's part of the page."""
    settings = (
        f"With {', '.join(f'`{each}`' for each in form.settings)}:\n\n" if form.settings else ""
    )
    return (
        f"### {form.title}\n\n{settings}```json\n{folded(form.row)}\n```\n\n"
        f"![{form.title}: what is context, and what is learned](images/data/{form.name}.svg)\n\n"
        f"{textwrap.fill('Learned: ' + _lower(form.learned), 140, break_on_hyphens=False)}\n"
    )


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def page(text: str) -> str:
    """Return the page's text with its forms replaced by those of this module."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    assert start, f"{PAGE}: no line {START!r}"
    assert end, f"{PAGE}: no line {END!r}"
    return "\n".join([f"{before}{start}", *map(section, FORMS), f"{end}{after}"])


def pictures(model: Path) -> dict[str, str]:
    """Draw every form.

    Args:
        model: a tiny model's folder.

    Returns:
        File names and their contents.
    """
    tokenizer = load_tokenizer(model).tokenizer
    return {f"{form.name}.svg": picture(form, tokenizer) for form in FORMS}


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for old in PICTURES.glob("*.svg"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        make_tiny_model(Path(scratch) / "model")
        for name, content in pictures(Path(scratch) / "model").items():
            (PICTURES / name).write_text(content, encoding="utf-8")
    print(PAGE, PICTURES, sep="\n")
