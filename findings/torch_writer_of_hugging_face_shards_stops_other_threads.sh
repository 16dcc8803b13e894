# torch 2.13.0 and safetensors 0.8.0: `torch.distributed.checkpoint.async_save` with `HuggingFaceStorageWriter`, which takes a thread.
# Expected: other threads run while it writes, as with `FileSystemWriter`; that is what an asynchronous save is for.
# Seen: the thread holds the interpreter lock while it serializes a file in memory; no other thread runs meanwhile, a second or more for a GB.
#   `safetensors.torch.save_file` releases the lock and makes no copy.
# canvastune/checkpoint/shard_writer.py calls save_file instead.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'safetensors==0.8.0' 'numpy<3'
cat > "$folder/pauses.py" <<'PYTHON'
import pathlib
import sys
import time
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

warnings.simplefilter("ignore")
folder = pathlib.Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
state = {f"weight.{index}": torch.full((2**24,), float(index)) for index in range(12)}  # 805 MB


def longest_pause(writer):
    """Save in the background; return the longest time in which this thread did not run."""
    saving = dcp.async_save(state, storage_writer=writer)
    started = last = time.perf_counter()
    pause = 0.0
    while not saving.done():
        time.sleep(0.001)
        now = time.perf_counter()
        pause, last = max(pause, now - last), now
    saving.result()
    return pause, last - started


names, shares = {name: 1 for name in state}, {}
for name, writer in (
    ("FileSystemWriter", dcp.FileSystemWriter(folder / "plain")),
    ("HuggingFaceStorageWriter", dcp.HuggingFaceStorageWriter(str(folder / "hf"), names, save_distributed=True)),
):
    pause, seconds = longest_pause(writer)
    print(f"torch {torch.__version__}: {name} took {seconds:.2f} s; the other thread stood still for {pause:.2f} s at a time")
    shares[name] = pause / seconds
if not (shares["HuggingFaceStorageWriter"] > 0.1 and shares["FileSystemWriter"] < 0.05):
    raise SystemExit("changed: canvastune/checkpoint/shard_writer.py may go")
PYTHON
"$folder/venv/bin/python" "$folder/pauses.py" "$folder"
