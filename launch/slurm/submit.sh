#!/usr/bin/env bash
# Submit an array of N tasks that extract a slice of the table each, and the merge that begins when all have ended:
#     bash launch/slurm/submit.sh [--tasks N] [any sbatch option...] -- <arguments of extract_dist.py>
# NPROC in the environment is the number of ranks a task, by default one a GPU. The options go to the array; the merge
# gets those of them that say where, and under whose name, it may run. Both run in the environment of this call.
set -euo pipefail
home=$(realpath "$(dirname "$0")/../..")
. "$home/launch/environment.sh"
usage="usage: submit.sh [--tasks N] [any sbatch option...] -- <arguments of extract_dist.py>"

options=() shared=() exported=${SBATCH_EXPORT:-ALL}
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --tasks | --tasks=*)
            [ "$1" = --tasks ] && { shift; tasks=${1:-}; } || tasks=${1#*=}
            [[ $tasks =~ ^[1-9][0-9]*$ ]] || { echo "error: --tasks $tasks, expected a number from 1; $usage" >&2; exit 2; }
            options+=(--array="0-$((tasks - 1))")
            shift
            continue
            ;;
        --export | --export=*)
            [ "$1" = --export ] && { shift; exported=${1:-}; } || exported=${1#*=}
            shift
            continue
            ;;
        --wait | -W | --test-only) echo "error: $1 does not go with a merge that follows; leave it out" >&2; exit 2 ;;
        --account=* | --partition=* | --qos=* | --reservation=* | --clusters=* | --chdir=* | --mail-*=*) shared+=("$1") ;;
        --account | --partition | --qos | --reservation | --clusters | --chdir | --mail-* | -[ApqMD])
            shared+=("$1" "${2:-}")
            ;;
        -[ApqMD]?*) shared+=("$1") ;;
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
# Wrong arguments are refused here, not hours later by every task of the array.
output=$(python -m vqa_embeddings.cli.array_output "$@")
[ -n "$output" ] || exit 0 # --help

export VQA_EMBEDDINGS_HOME=$home
[[ $exported =~ ^(NONE|NIL)$ ]] && exported= # and yet the job has to know these
exported="--export=${exported:+$exported,}VQA_EMBEDDINGS_HOME,NPROC"
array=$(sbatch --parsable "${options[@]}" "$exported" "$home/launch/slurm/array.sbatch" "$@")
array=${array%%;*}
echo "array job $array"
merge=$(sbatch --parsable "${shared[@]}" "$exported" --dependency=afterany:"$array" "$home/launch/slurm/merge.sbatch" \
    --output-dir "$output")
echo "merge job ${merge%%;*}"
