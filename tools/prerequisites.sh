#!/bin/sh
# What `make` needs before it can begin: a Python of a supported version that can make virtual environments.
# Says the one line that installs what is missing; changes nothing.
set -eu
python=${1:-python3}

if ! command -v "$python" >/dev/null 2>&1; then
    echo "trace_ds needs Python 3.10 to 3.13. Install it:  sudo apt-get install python3 python3-venv" >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
    echo "trace_ds needs Python 3.10 to 3.13; this is $("$python" --version). Use another one:  make PYTHON=python3.12" >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "This Python cannot make virtual environments. Install it:  sudo apt-get install python$version-venv" >&2
    exit 2
fi
