#!/usr/bin/env bash
# Extract with mpirun: Open MPI's, MPICH's or Intel's. It needs no queue; in a job, mpirun starts the ranks on its nodes.
#     [NPROC=8] bash launch/mpi/extract.sh <arguments of extract_dist.py>
# NPROC is the number of ranks, by default one a GPU of this machine. Stopped or killed, the same command goes on, with
# any number of ranks; with mpi4py in the environment they then share evenly what is left.
set -euo pipefail
home=$(realpath "$(dirname "$0")/../..")
. "$home/launch/environment.sh"
find_mpirun # yours, before another one comes with the environment
enter_environment
# EDIT: more options of your mpirun, such as where to start the ranks; "#" takes a line out.
options=()
#options+=(--hostfile hosts --map-by ppr:8:node)   # Open MPI: 8 ranks on each host in the file
#options+=(-f hosts -ppn 8)                        # MPICH, Intel MPI: the same
#export MPI4PY_LIBMPI=libmpi.so.40                 # where mpi4py has loaded another MPI than mpirun's, and says so
# Open MPI 4 and 5 bind a rank, and with it the threads that read its pictures, to one core, and count cores as places.
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_rmaps_base_oversubscribe=1
export PRTE_MCA_hwloc_default_binding_policy=none PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
exec python -m vqa_embeddings.cli.supervise "$mpirun" -n "${NPROC:-$(count_gpus)}" "${options[@]}" \
    bash "$home/launch/mpi/rank.sh" -- "$@"
