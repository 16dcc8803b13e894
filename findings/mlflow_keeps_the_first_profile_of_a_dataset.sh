# mlflow 3.17.2.
# Expected: a run that logs a data set with a profile has that profile: what a later run says of the same data, such as a count of
# rows that it read, or a preview that was switched off, is what its page shows.
# Seen: with the name and digest of a data set that the experiment knows, profile, schema, and source of the later run are dropped
# without a word, and its page shows those of the first run.
# Our docs say that MLflow keeps the rows that a data set already shows: docs/mlflow.md.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlflow==3.17.2'
cd "$folder"
"$folder/venv/bin/python" - <<'EOF' 2> "$folder/log" || {
import sys

import mlflow
from mlflow.entities import Dataset, DatasetInput

mlflow.set_tracking_uri("sqlite:///mlflow.db")
client = mlflow.MlflowClient()
seen = []
for rows in (1, 2):
    given = Dataset("questions", "abc123", "local", f'{{"uri": "part-{rows}.jsonl"}}', profile=f'{{"rows": {rows}}}')
    with mlflow.start_run() as run:
        client.log_inputs(run.info.run_id, [DatasetInput(given, [])])
    found = client.get_run(run.info.run_id).inputs.dataset_inputs[0].dataset
    seen.append((found.profile, found.source))
    print(mlflow.__version__, seen[-1])
sys.exit(0 if seen[0] == seen[1] == ('{"rows": 1}', '{"uri": "part-1.jsonl"}') else 1)
EOF
    echo "changed: a later run has its own profile ($(tail -n 1 "$folder/log"))"
    exit 1
}
