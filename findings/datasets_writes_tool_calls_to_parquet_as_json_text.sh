# datasets 5.2.0.
# Expected: what load_dataset("json") reads as a list of messages is a list of messages in the Parquet file that to_parquet()
# writes, and in the Arrow file of save_to_disk().
# Seen: as soon as messages differ in their keys (a tool call in one of them), each message is stored as JSON text. datasets
# itself reads it back as a message, any other reader (pyarrow, pandas, DuckDB, and with_format("arrow") of datasets) gets a list
# of strings.
# Our code decodes these columns: canvastune/preparation/tables.py.
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
import pyarrow.parquet as pq

datasets.disable_progress_bars()
call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
rows = {
    "plain": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    "calls": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}],
}
kinds = {}
for name, messages in rows.items():
    open(f"{name}.jsonl", "w").write(json.dumps({"messages": messages}) + "\n")
    read = datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train")
    read.to_parquet(f"{name}.parquet")
    again = pq.read_table(f"{name}.parquet").to_pylist()[0]["messages"][0]
    print(f"{name}: datasets {read[0]['messages'][0]!r}, pyarrow {again!r}")
    kinds[name] = type(read.with_format("arrow")[0].to_pylist()[0]["messages"][0]), type(again)
sys.exit(0 if kinds == {"plain": (dict, dict), "calls": (str, str)} else 1)
EOF
    echo "changed: messages with tool calls are stored as messages ($(tail -n 1 "$folder/log"))"
    exit 1
}
