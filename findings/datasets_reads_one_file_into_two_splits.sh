# datasets 5.2.0.
# Expected: load_dataset(folder) puts every file into one split.
# Seen: a file whose name has two of the words (train_dev.jsonl: the part of the training data that one develops with) is in both
# splits: all its rows are trained on and validated on.
# Our code refuses a folder whose names mix splits: canvastune/preparation/sources.py.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'datasets==5.2.0' 'pyarrow==25.0.1' 'pandas==3.1.1'
cd "$folder"
HF_HOME="$folder/cache" "$folder/venv/bin/python" - <<'EOF' 2> "$folder/log" || {
import os
import sys

import datasets

datasets.disable_progress_bars()
os.mkdir("chats")
for name in ("train", "train_dev", "dev"):
    open(f"chats/{name}.jsonl", "w").write('{"from": "%s"}\n' % name)
splits = {split: rows["from"][:] for split, rows in datasets.load_dataset("./chats").items()}
print(splits)
sys.exit(0 if "train_dev" in splits["train"] and "train_dev" in splits["validation"] else 1)
EOF
    echo "changed: a file is in one split only ($(tail -n 1 "$folder/log"))"
    exit 1
}
