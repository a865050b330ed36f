#!/usr/bin/env bash
# All that only a GPU can show, on a machine with one CUDA GPU, without a network: small checkpoints of both layouts and
# one of full size with random weights, 1 and 2 ranks on the one GPU, every number format against a float32 reference.
# Prints a table; exit status 1 where something is off, 2 where there is no GPU. Needs 40 GiB of GPU memory, 30 GB below
# TMPDIR, and a Python with this program's requirements, by default python3:
#     [PYTHON=.venv/bin/python] bash tests/gpu/check.sh
#     bash tests/gpu/check.sh --quick    # the small checkpoints only; also without a GPU
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH=".:tests${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" tests/gpu/check.py "$@"
