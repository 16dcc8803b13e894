# datasets 5.2.0.
# Expected: two chat data sets read with load_dataset("json") can be joined: each has one column, messages, whose rows have role
# and content.
# Seen: if one of them has a tool call somewhere, its messages have the type Json and the others List of struct, and
# concatenate_datasets and interleave_datasets refuse both orders: "The features can't be aligned". Rows with and without calls in
# one file are fine.
# Our code prepares every source of a mixture on its own: canvastune/preparation/prepare.py.
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
call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
calls = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
open("plain.jsonl", "w").write(json.dumps({"messages": plain}) + "\n")
open("calls.jsonl", "w").write(json.dumps({"messages": calls}) + "\n")


def load(*files):
    return datasets.load_dataset("json", data_files=list(files), split="train")


refused = 0
for join in (datasets.concatenate_datasets, datasets.interleave_datasets):
    for files in (("plain.jsonl", "calls.jsonl"), ("calls.jsonl", "plain.jsonl")):
        try:
            join([load(file) for file in files])
        except ValueError as error:
            refused += 1
            print(join.__name__, *files, "->", str(error)[:100])
open("both.jsonl", "w").write(open("plain.jsonl").read() + open("calls.jsonl").read())
print("one file:", load("both.jsonl").num_rows, "rows")
sys.exit(0 if refused == 4 else 1)
EOF
    echo "changed: chats with and without tool calls can be joined ($(tail -n 1 "$folder/log"))"
    exit 1
}
