#!/bin/sh
# pip install, telling what it is at in one line that rewrites itself (on a terminal); all it said only if it fails.
#
#   sh tools/pip_install.sh PYTHON ARGUMENTS...
set -eu
python=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "Installing into ${python%/bin/*}: $*"
{ "$python" -m pip install "$@" 2>&1 || echo "pip failed"; } | tee "$log" | while IFS= read -r line; do
    [ ! -t 1 ] || printf '\r\033[K%.79s' "$line"
done
[ ! -t 1 ] || printf '\r\033[K'
if [ "$(tail -n 1 "$log")" = "pip failed" ]; then
    cat "$log" >&2
    exit 1
fi
