# safetensors 0.8.0: `save` and `save_file` with more than one key of `metadata`.
# Expected: equal tensors and equal metadata give equal bytes, as they do with one key.
# Seen: the keys' order in the header is another one from call to call, so that hashes of equal files differ. torch's `HuggingFaceStorageWriter`
#   writes three keys.
# canvastune/checkpoint/shard_writer.py writes one key: checkpoints of equal states have equal hashes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'safetensors==0.8.0' 'numpy<3'
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import safetensors
from safetensors.numpy import save

tensors = {"weight": numpy.arange(4, dtype=numpy.float32)}
files = {
    count: {save(tensors, {f"key{index}": "value" for index in range(count)}) for _ in range(100)} for count in (1, 3)
}
print(f"safetensors {safetensors.__version__}: 100 equal saves give {len(files[1])} file with one key of metadata, {len(files[3])} with three")
if not (len(files[1]) == 1 and len(files[3]) > 1):
    raise SystemExit("changed: canvastune/checkpoint/shard_writer.py may write more keys")
PYTHON
