# datasets 5.2.0.
# Expected: Dataset.from_list(rows) and load_dataset("json") on the same rows give the same rows back.
# Seen: from_list gives every call the arguments of all calls, null where it had none; a template writes them (null_key:null), so
# a model learns to pass them. load_dataset("json") and map() keep the rows as they are. A Parquet file of the former has these
# nulls for every reader.
# Our code takes a null inside a column of a Parquet or Arrow file for a missing key: canvastune/preparation/tables.py.
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
rows = [{"call": {"name": "weather", "arguments": {"city": "Bonn"}}}, {"call": {"name": "news", "arguments": {"topic": "flood"}}}]
open("rows.jsonl", "w").write("".join(json.dumps(row) + "\n" for row in rows))
loaded = datasets.load_dataset("json", data_files="rows.jsonl", split="train")[:]["call"]
listed = datasets.Dataset.from_list(rows)[:]["call"]
print("load_dataset:", loaded)
print("from_list:   ", listed)
same = [row["call"] for row in rows]
sys.exit(0 if loaded == same and listed[0]["arguments"] == {"city": "Bonn", "topic": None} else 1)
EOF
    echo "changed: from_list keeps the rows as they are ($(tail -n 1 "$folder/log"))"
    exit 1
}
