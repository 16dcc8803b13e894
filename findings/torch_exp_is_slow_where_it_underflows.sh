# torch 2.13.0, CPU, x86-64: `torch.exp` of float32.
# Expected: as long for any finite values, as `torch.tanh` takes.
# Seen: below -87.3, where the result is no normal number any more, or 0, an element takes 100 times as long or longer.
#   Logits divided by a low temperature are that far from the highest; most of a vocabulary is.
# canvastune/evaluation/tiled_head.py raises what is so low to -80 before the exponential, which changes no float32 sum.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy<3'
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import time

import torch

torch.set_num_threads(1)


def microseconds(call, values):
    call(values)
    taken = []
    for _ in range(30):
        started = time.perf_counter()
        call(values)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1e6


values = torch.rand(2**17, generator=torch.Generator().manual_seed(0))
near, far = -80 * values, -1000 * values
ratios = {}
for name, call in (("exp", torch.exp), ("tanh", torch.tanh)):
    here, there = microseconds(call, near), microseconds(call, far)
    ratios[name] = there / here
    print(f"torch {torch.__version__}: {name} of 131,072 values: {here:.0f} us from -80 to 0, {there:.0f} us from -1000 to 0")
if not (ratios["exp"] > 10 and ratios["tanh"] < 3):
    raise SystemExit("changed: clamp_ in canvastune/evaluation/tiled_head.py may go")
PYTHON
