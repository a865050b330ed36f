#!/usr/bin/env bash
# Merge with mpirun, at any time: its ranks share the parts, where mpi4py is in the environment. It needs no GPU.
#     [NPROC=4] bash launch/mpi/merge.sh --output-dir OUT
# The exit status is the merge's: 0 all rows extracted, 3 rows missing, 4 none missing but some failed.
set -euo pipefail
home=$(realpath "$(dirname "$0")/../..")
. "$home/launch/environment.sh"
find_mpirun # yours, before another one comes with the environment
enter_environment
# EDIT: more options of your mpirun, as in extract.sh.
options=()
#export MPI4PY_LIBMPI=libmpi.so.40   # where mpi4py has loaded another MPI than mpirun's, and says so
# Open MPI 4 and 5 count cores as places, and start no more ranks than that.
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
# mpirun would read what is typed, or pasted, behind this command.
exec "$mpirun" -n "${NPROC:-4}" "${options[@]}" python "$home/merge_shards.py" "$@" < /dev/null
