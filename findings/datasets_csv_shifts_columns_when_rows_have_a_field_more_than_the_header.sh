# datasets 5.2.0.
# Expected: a CSV file whose rows all have one field more than its header (a trailing comma, an unquoted comma in every answer) is
# an error, as it is when only some rows have.
# Seen: every column moves by one without a word: "question" holds the first part of the answer, "answer" its second, and the
# questions are in __index_level_0__.
# Our code refuses the row and says where it is: canvastune/preparation/tables.py.
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
open("all.csv", "w").write("question,answer\nGreet Ana,Hello, Ana\nGreet Tom,Hello, Tom\n")
open("some.csv", "w").write("question,answer\nCount,One\nGreet Tom,Hello, Tom\n")
first = datasets.load_dataset("csv", data_files="all.csv", split="train")[0]
print("all.csv:", first)
try:
    print("some.csv:", datasets.load_dataset("csv", data_files="some.csv", split="train")[0])
except Exception as error:
    print("some.csv:", str(error.__cause__).strip())
    sys.exit(0 if first["question"] == "Hello" and first["answer"].strip() == "Ana" else 1)
sys.exit(1)
EOF
    echo "changed: a row with a field too many is not read ($(tail -n 1 "$folder/log"))"
    exit 1
}
