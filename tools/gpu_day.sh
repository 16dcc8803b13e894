#!/bin/sh
# What a GPU is needed for, in under ten minutes on one card: run it where `python -m pip install -e '.[dev]'`
# has been run with a CUDA build of torch. PYTHON names the interpreter; `tools/gpu_day.sh --small` tries it on a CPU.
#
# Measures with `python -m benchmarks.gpu` (kernels of attention against tools/attention_backends.py, steps by
# length against the plain one, 20 steps of LoRA and of full fine-tuning against the plan). Each part is in
# benchmarks/results/gpu.json as soon as it is measured: after nine minutes the rest is left out. Then writes the
# section in docs/performance.md. Exit code 1: something failed or missed its goal; the last lines name it.
# Exit code 124: the time was up.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader
fi
status=0
timeout --signal=INT --kill-after=20 540 "$python" -m benchmarks.gpu "$@" || status=$?
"$python" -m benchmarks.page
exit "$status"
