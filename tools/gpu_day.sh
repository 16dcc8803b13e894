#!/bin/sh
# What a GPU is needed for, in under ten minutes on one card: run it where `python -m pip install -e '.[dev]'`
# has been run with a CUDA build of torch. PYTHON names the interpreter.
#
# Measures with `python -m benchmarks.gpu` (kernels of attention against tools/attention_backends.py, steps by
# length against the plain one, 20 steps of LoRA and of full fine-tuning against the plan), then writes
# benchmarks/results/gpu.json and its section in docs/performance.md. Exit code 1: something failed or missed its
# goal; the last lines name it.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader
status=0
timeout --signal=INT 540 "$python" -m benchmarks.gpu || status=$?
"$python" -m benchmarks.page
exit "$status"
