# Sourced by the scripts of launch/, with the checkout's absolute path in $home.

# install_environment [EXTRA]: make the virtual environment .venv in the checkout, enter it, and install what is not
# installed yet or has changed in pyproject.toml.
install_environment() {
    local extra=${1:-} wanted
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: found $(python3 --version 2>&1 || true), expected Python 3.10 or newer as python3; install it" >&2
        return 2
    fi
    if [ ! -x "$home/.venv/bin/python" ] && ! python3 -m venv "$home/.venv"; then
        rm -rf "$home/.venv"
        echo "error: python3 cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        return 2
    fi
    . "$home/.venv/bin/activate"
    wanted="$(sha256sum < "$home/pyproject.toml") $extra"
    if ! grep -qsF "$wanted" "$home/.venv/installed"; then
        echo "installing into .venv (some GB with torch, the first time)"
        python -m pip install --quiet --disable-pip-version-check --editable "$home${extra:+[$extra]}"
        echo "$wanted" >> "$home/.venv/installed"
    fi
}

# enter_environment: the environment that this was called from where it has what the program needs, or else the one
# that launch/demo.sh made. Jobs inherit the environment that sbatch was called from.
enter_environment() {
    local needed='"torch", "transformers", "accelerate", "peft", "h5py"'
    local complete="import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, ($needed))))"
    if ! python -c "$complete" 2>/dev/null; then
        if [ ! -x "$home/.venv/bin/python" ]; then
            echo "error: $(command -v python || echo 'no python') lacks one of $needed, and there is no $home/.venv;" \
                "activate the environment with the program, or make one: bash $home/launch/demo.sh" >&2
            return 2
        fi
        . "$home/.venv/bin/activate"
    fi
    export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
    # A rank computes on its GPU, or on one core; with more threads, ranks on one node get into each other's way.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}

# find_mpirun: set $mpirun to the one that MPIRUN names, by default mpirun.
find_mpirun() {
    if ! mpirun=$(command -v "${MPIRUN:-mpirun}"); then
        echo "error: there is no ${MPIRUN:-mpirun} here; load your cluster's MPI, or name its mpirun in MPIRUN" >&2
        return 2
    fi
}

# count_gpus: print how many GPUs this job, or this machine, has; 1 where there is none.
count_gpus() {
    local gpus=0
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c . || true)
    elif command -v nvidia-smi > /dev/null; then
        gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU' || true)
    fi
    echo "$((gpus > 0 ? gpus : 1))"
}

# extract_here RANKS ARGUMENT...: extract with so many ranks on this machine; signals stop it after a commit.
extract_here() {
    local ranks=$1 launcher=(python)
    shift
    if [ "$ranks" -gt 1 ]; then
        launcher=(python -m accelerate.commands.launch --config_file "$home/launch/accelerate/one_node.yaml" --num_processes "$ranks")
    fi
    exec python -m vqa_embeddings.cli.supervise "${launcher[@]}" "$home/extract_dist.py" -- "$@"
}
