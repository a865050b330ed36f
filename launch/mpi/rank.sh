#!/usr/bin/env bash
# One rank of extract.sh, as mpirun starts it. Every mpirun ends all ranks when one of them dies; behind this file a rank
# that dies costs the others nothing.
stopped='' status='' # whatever the environment has under these names
trap 'stopped=1' TERM INT USR1 USR2 # they reach python too, which stops after a commit; until then this shell has to stay
home=$(realpath "$(dirname "$0")/../..")
. "$home/launch/environment.sh"
enter_environment || status=2
[ -z "$stopped" ] || exit 0 # the signal came before there was a python to stop
[ -z "$status" ] || exit "$status"
python "$home/extract_dist.py" "$@"
status=$?
if [ $status != 0 ] && [ $status != 2 ]; then # 2: refused before any work, and so are the others
    echo "rank ${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-}} ended with status $status;" \
        "its rows since the last commit come with the next run of the same command" >&2
    status=0
fi
exit $status
