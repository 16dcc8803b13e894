# datasets 5.2.0.
# Expected: load_dataset(folder) reads all data files of the folder, or says which it leaves out.
# Seen: if one name contains the word test, train, dev, ... between separators (my_test_cases.jsonl), only such files are read, as
# that split; the others are left out without a word. Removing or renaming that one file brings the others back, as the split
# train.
# Our code reads every file of a folder and refuses a mix of splits by name: canvastune/preparation/sources.py.
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
for name in ("billing", "returns", "my_test_cases"):
    open(f"chats/{name}.jsonl", "w").write('{"from": "%s"}\n' % name)


def load():
    return {split: rows["from"][:] for split, rows in datasets.load_dataset("./chats").items()}


three = load()
os.remove("chats/my_test_cases.jsonl")
two = load()
print("billing, returns, my_test_cases:", three)
print("billing, returns:               ", two)
sys.exit(0 if three == {"test": ["my_test_cases"]} and two == {"train": ["billing", "returns"]} else 1)
EOF
    echo "changed: every file of the folder is read ($(tail -n 1 "$folder/log"))"
    exit 1
}
