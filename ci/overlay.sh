#!/usr/bin/env bash
# Creates a venv with the packages of .venv, through a .pth file, and other packages on top. Does nothing if up to date.
#
#   ci/overlay.sh VENV CONSTRAINTS ARGUMENT...   arguments of pip install
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$1 constraints=$2
shift 2
stamp=$venv/.installed # a copy of all inputs of the installation
log=$venv/install.log

fingerprint() {
    .venv/bin/python -c 'import sys; print(sys.base_prefix, sys.version)'
    pwd -P
    echo "$@"
    cat pyproject.toml ci/constraints.txt "$constraints" ci/overlay.sh
}

[[ -x .venv/bin/python ]] || {
    echo "There is no .venv: run ci/setup.sh first." >&2
    exit 1
}
if [[ -f $stamp ]] && fingerprint "$@" | cmp -s - "$stamp"; then exit 0; fi

echo "Creating $venv (log: $log)"
rm -rf "$venv"
.venv/bin/python -m venv "$venv"
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
echo "import site; site.addsitedir('$(.venv/bin/python -c "$purelib")')" >"$("$venv/bin/python" -c "$purelib")/venv.pth"
if ! PIP_CONSTRAINT=$constraints "$venv/bin/python" -m pip --disable-pip-version-check --no-input install \
    --progress-bar off "$@" >"$log" 2>&1 </dev/null; then
    echo "The installation failed. Last lines of $log:" >&2
    tail -n 15 "$log" >&2
    exit 1
fi
fingerprint "$@" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "Ready: $venv"
