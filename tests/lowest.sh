#!/usr/bin/env bash
# The test suite with the lowest version of every requirement that pyproject.toml declares, in a virtual environment of
# its own. Needs Python 3.10 to 3.12, the newest that numpy 1.26 knows, and some GB. Arguments go to pytest:
#     [PYTHON=python3.11] bash tests/lowest.sh [-k NAME]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: found $("$python" --version), expected Python 3.10 to 3.12; name one with PYTHON=" >&2
    exit 2
}
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$python" -m venv "$environment"
. "$environment/bin/activate"
# "name>=1.2" and "name>=1.2,<3" become "name==1.2".
sed -n '/^dependencies = \[/,/^\]/p; /^probe = \[/p; /^test = \[/,/^\]/p' pyproject.toml \
    | grep -o '"[^"]*"' | tr -d '"' | grep -v '^vqa-embeddings\[' | sed -E 's/^([A-Za-z0-9_-]+)>=([0-9.]+)(,.*)?$/\1==\2/' > "$environment/lowest.txt"
if grep -v == "$environment/lowest.txt"; then
    echo "error: a requirement without a lowest version" >&2
    exit 2
fi
python -m pip install --quiet --disable-pip-version-check -r "$environment/lowest.txt"
python -m pip freeze
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592
python -m pytest "$@"
