"""Where two texts differ, word by word."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from markupsafe import Markup, escape

_ALIKE = 0.3  # share of words in common below which everything is different and marks would only blur the text


def marked(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts, escaped, with `<del>` around the words that only the first has and `<ins>` around those that only the second has.

    Nothing is marked where the texts have little in common.
    """
    words, others = re.findall(r"\s+|\w+|[^\w\s]", before), re.findall(r"\s+|\w+|[^\w\s]", after)
    # In long texts its "autojunk" looks for no word that is on every line: an untrained model's "of of of" would take seconds.
    match = SequenceMatcher(None, words, others)
    common = sum(not word.isspace() for at, _, size in match.get_matching_blocks() for word in words[at : at + size])
    if 2 * common < _ALIKE * sum(not word.isspace() for word in words + others):
        return escape(before), escape(after)
    left, right = Markup(), Markup()
    for kind, start, stop, other_start, other_stop in match.get_opcodes():
        same = kind == "equal"
        left += _wrapped("del", "".join(words[start:stop]), same)
        right += _wrapped("ins", "".join(others[other_start:other_stop]), same)
    return left, right


def _wrapped(tag: str, text: str, plain: bool) -> Markup:
    return escape(text) if plain or not text else Markup("<{0}>{1}</{0}>").format(Markup(tag), text)
