# Sourced by the scripts beside it, in the checkout's top folder. install_environment [EXTRA] makes the virtual
# environment .venv there, enters it, and installs what is not installed yet or has changed in pyproject.toml.
install_environment() {
    local extra=${1:-} wanted
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: found $(python3 --version 2>&1 || true), expected Python 3.10 or newer as python3; install it" >&2
        return 2
    fi
    if [ ! -x .venv/bin/python ] && ! python3 -m venv .venv; then
        rm -rf .venv
        echo "error: python3 cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        return 2
    fi
    . .venv/bin/activate
    wanted="$(sha256sum < pyproject.toml) $extra"
    if ! grep -qsF "$wanted" .venv/installed; then
        echo "installing into .venv (some GB with torch, the first time)"
        python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
        echo "$wanted" >> .venv/installed
    fi
}
