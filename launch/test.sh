#!/usr/bin/env bash
# Lint, types and the whole test suite, in the environment of launch/demo.sh with the test extra. Uses a GPU where
# there is one. Arguments go to pytest:
#     bash launch/test.sh                  # all: under half an hour on two cores
#     bash launch/test.sh -m "not slow"    # two minutes: decisions, tables, pictures, storage, one small model
#     bash launch/test.sh -k NAME
# The values that the tests compare with are computed once and kept in .pytest_cache; --cache-clear removes them.
# The tests on a real Slurm, under Open MPI and in a browser run where there are root and Debian's packages, and are
# skipped with a reason elsewhere:
#     apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2 openmpi-bin \
#         chromium chromium-driver
set -euo pipefail
home=$(realpath "$(dirname "$0")/..")
cd "$home"
. launch/environment.sh
install_environment test

ruff check .
ruff format --check .
mypy
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The allocator keeps the pages of large tensors: the tests' eager reference then takes a third less time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592
# Two files of tests at a time, each with a core: what computes the reference and what waits for a cluster share two well.
# In the order of tests/conftest.py, where xdist by itself would begin with the files of many small tests.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
