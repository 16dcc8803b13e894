# datasets 5.2.0.
# Expected: whether load_dataset("json") can read a file does not depend on the order of its rows: a tool call in row 2 or in row
# 12,001 is the same data.
# Seen: the types are taken from the first block of the file (10 MB). If the first tool call (or any key that other messages lack)
# is after it, reading ends with "Couldn't cast array of type struct<...>", without the line. Likewise with several files: the one
# with tool calls has to be the first.
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
call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
plain = [{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "Hello"}]
calls = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
chats, with_call = json.dumps({"messages": plain}) + "\n", json.dumps({"messages": calls}) + "\n"
open("early.jsonl", "w").write(with_call + chats * 12000)
open("late.jsonl", "w").write(chats * 12000 + with_call)
print("early.jsonl:", datasets.load_dataset("json", data_files="early.jsonl", split="train").num_rows, "rows")
try:
    print("late.jsonl:", datasets.load_dataset("json", data_files="late.jsonl", split="train").num_rows, "rows")
except Exception as error:
    print("late.jsonl:", type(error.__cause__).__name__, str(error.__cause__)[:60].replace("\n", " "))
    sys.exit(0)
sys.exit(1)
EOF
    echo "changed: the order of the rows does not matter ($(tail -n 1 "$folder/log"))"
    exit 1
}
