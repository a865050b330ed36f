#!/usr/bin/env bash
# Submit an array of N tasks that extract a slice of the table each, and the merge that begins when all have ended:
#     bash launch/slurm/submit.sh [--tasks N] [any sbatch option...] -- <arguments of extract_dist.py>
# NPROC in the environment is the number of ranks a task, by default one a GPU. The options go to the array; the merge
# gets those of them that say where, and under whose name, it may run. Both run in the environment of this call.
set -euo pipefail
home=$(realpath "$(dirname "$0")/../..")
. "$home/launch/environment.sh"
usage="usage: submit.sh [--tasks N] [any sbatch option...] -- <arguments of extract_dist.py>"

options=() shared=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --tasks | --tasks=*)
            [ "$1" = --tasks ] && { shift; tasks=${1:-}; } || tasks=${1#*=}
            [[ $tasks =~ ^[1-9][0-9]*$ ]] || { echo "error: --tasks $tasks, expected a number from 1; $usage" >&2; exit 2; }
            options+=(--array="0-$((tasks - 1))")
            shift
            continue
            ;;
        --account=* | --partition=* | --qos=* | --reservation=* | --chdir=* | --export=* | --mail-*=*) shared+=("$1") ;;
        --account | --partition | --qos | --reservation | --chdir | --export | --mail-* | -[ApqD]) shared+=("$1" "${2:-}") ;;
    esac
    options+=("$1")
    shift
done
[ $# -gt 0 ] || { echo "error: no -- before the arguments of extract_dist.py; $usage" >&2; exit 2; }
shift
if ! command -v sbatch > /dev/null; then
    echo "error: there is no sbatch here; run it on a login node, or without a queue:" \
        "bash $home/launch/slurm/array.sbatch <arguments>" >&2
    exit 2
fi
enter_environment
# What cannot be right is refused here, not hours later by every task of the array.
read_output='import sys; sys.argv[0] = "extract_dist.py"; from vqa_embeddings.options import parse_extract; print(parse_extract(None).output_dir)'
output=$(python -c "$read_output" "$@")

export VQA_EMBEDDINGS_HOME=$home
array=$(sbatch --parsable "${options[@]}" "$home/launch/slurm/array.sbatch" "$@")
array=${array%%;*}
echo "array job $array"
merge=$(sbatch --parsable "${shared[@]}" --dependency=afterany:"$array" "$home/launch/slurm/merge.sbatch" --output-dir "$output")
echo "merge job ${merge%%;*}"
