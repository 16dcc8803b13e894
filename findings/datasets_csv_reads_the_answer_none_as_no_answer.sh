# datasets 5.2.0.
# Expected: a CSV file of questions and answers is read as text, and a quoted field in any case: "None" and "NA" are answers (of a
# classifier, a code model, a form), "007" is not 7.
# Seen: None, NA, N/A, nan and null become no value, quoted or not, and the row stays; in a column whose other answers are digits,
# "007" becomes 7.0.
# Our code reads every field of a CSV file as text: canvastune/preparation/tables.py.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'datasets==5.2.0' 'pyarrow==25.0.1' 'pandas==3.1.1'
cd "$folder"
HF_HOME="$folder/cache" "$folder/venv/bin/python" - <<'EOF' 2> "$folder/log" || {
import sys

import datasets

datasets.disable_progress_bars()
open("words.csv", "w").write('question,answer\na,"None"\nb,"NA"\nc,n/a\nd,null\ne,yes\n')
open("codes.csv", "w").write('question,answer\na,"007"\nb,"None"\n')
seen = {}
for name in ("words.csv", "codes.csv"):
    seen[name] = datasets.load_dataset("csv", data_files=name, split="train")["answer"][:]
    print(name, seen[name])
sys.exit(0 if seen == {"words.csv": [None] * 4 + ["yes"], "codes.csv": [7.0, None]} else 1)
EOF
    echo "changed: the answers are read as text ($(tail -n 1 "$folder/log"))"
    exit 1
}
