#!/usr/bin/env bash
# The first contact with a GPU: all that only one can show, in stages, the most telling first. Each prints its lines at
# once and ends in one line, "ok" or "OFF" with figures; a stage that fails does not stop the next. Exit status 1 where
# something is off, 2 where a requirement is lacking: a Python with this program's requirements (python3 unless PYTHON
# names one), a CUDA GPU with 40 GiB, 30 GB below TMPDIR. No network.
#     [PYTHON=.venv/bin/python] bash tests/gpu/check.sh [STAGE ...]
#     bash tests/gpu/check.sh --quick    # the small checkpoints only; also without a GPU, as far as it goes
#     bash tests/gpu/check.sh --help     # the stages
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -u -m tests.gpu.check "$@"
