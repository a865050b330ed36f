#!/usr/bin/env bash
# The whole job on the photographs that the package ships, with a small random model: two ranks extract, the merge
# writes the parts and says that every row is covered. Needs Python 3.10 or newer; no GPU, and no network but for
# the installation. Run it again: it finds that everything is done.
#     bash launch/demo.sh [OUTPUT_FOLDER]
set -euo pipefail
out=$(realpath -m "${1:-demo_output}")
home=$(realpath "$(dirname "$0")/..")
cd "$home"
. launch/environment.sh
install_environment probe

# --multi_gpu starts two processes also where there is no GPU; --cpu would start one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
    extract_dist.py --demo --output-dir "$out"
python merge_shards.py --output-dir "$out"

echo
echo "made in $out:"
(cd "$out" && find . -type f | sort | sed 's|^\./|  |')
