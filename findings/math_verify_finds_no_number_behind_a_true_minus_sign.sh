# math-verify 0.9.0, verify(parse(reference), parse(answer)) with its extractors for expressions and LaTeX.
# Expected: typography is not part of a number: "-5" with U+2212, "-$5" and "+18" are -5, -5 and 18, as "$18.00" and "\boxed{18}"
# are 18, and "1 234" with a no-break space is 1234, as it is with a plain space.
# Seen: parse() finds nothing in the first three, and 234 in the last one.
# Our code normalizes answers itself: canvastune/evaluation/normalization.py, docs/evaluation.md.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'math-verify==0.9.0' 'latex2sympy2_extended==1.11.0' 'antlr4-python3-runtime==4.13.2'
"$folder/venv/bin/python" - <<'EOF' || {
import sys
from importlib.metadata import version

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

CONFIGS = [ExprExtractionConfig(), LatexExtractionConfig()]
print("math-verify", version("math-verify"))


def right(reference, answer):
    found = parse(answer, CONFIGS)
    equal = bool(verify(parse(reference, CONFIGS), found))
    print(f"{answer!r} for {reference!r}: {'right' if equal else 'wrong'}, parsed as {found}")
    return equal


usual = [("18", "$18.00"), ("18", "\\boxed{18}"), ("1234", "1 234"), ("-5", "-5")]
missed = [("-5", "\u22125"), ("-5", "-$5"), ("18", "+18"), ("1234", "1\u00a0234")]
good = all([right(*pair) for pair in usual])
sys.exit(0 if good and not any([right(*pair) for pair in missed]) else 1)
EOF
    echo "changed: math-verify reads these numbers"
    exit 1
}
