# datasets 5.2.0.
# Expected: JSON has text and numbers, no dates: text in a JSON lines file stays text.
# Seen: a column in which every text looks like a date is read as timestamp, also inside messages. What the file said cannot be
# recovered ("2024-01-02T10:00:00Z" and "2024-01-02 10:00:00" become equal). With a second file of other answers, the outcome
# depends on the order of the files: an error, or "2024-01-01" silently changed to "2024-01-01 00:00:00".
# Our code reads JSON with Python's json: canvastune/preparation/readers.py.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'datasets==5.2.0' 'pyarrow==25.0.1' 'pandas==3.1.1'
cd "$folder"
HF_HOME="$folder/cache" "$folder/venv/bin/python" - <<'EOF' 2> "$folder/log" || {
import json
import sys

import datasets

datasets.disable_progress_bars()


def rows(*answers):
    return "".join(json.dumps({"messages": [{"role": "assistant", "content": text}]}) + "\n" for text in answers)


open("dates.jsonl", "w").write(rows("2024-01-01", "2024-01-02T10:00:00Z", "2024-01-02 10:00:00"))
open("texts.jsonl", "w").write(rows("yes"))
read = datasets.load_dataset("json", data_files="dates.jsonl", split="train")
answers = [row["messages"][0]["content"] for row in read]
print("dates.jsonl:", *map(repr, answers), sep="\n  ")
both = datasets.load_dataset("json", data_files=["texts.jsonl", "dates.jsonl"], split="train")
print("texts.jsonl, dates.jsonl:", [row["messages"][0]["content"] for row in both])
try:
    datasets.load_dataset("json", data_files=["dates.jsonl", "texts.jsonl"], split="train")
except Exception as error:
    print("dates.jsonl, texts.jsonl:", error.__cause__)
changed = both[1]["messages"][0]["content"] == "2024-01-01 00:00:00"
sys.exit(0 if changed and not isinstance(answers[0], str) and answers[1] == answers[2] else 1)
EOF
    echo "changed: dates in JSON stay text ($(tail -n 1 "$folder/log"))"
    exit 1
}
