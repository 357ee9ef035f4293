#!/usr/bin/env bash
# Makes a venv that sees the packages of .venv through a link and has further ones on top. Instant when nothing has
# changed.
#
#   ci/overlay.sh VENV CONSTRAINTS ARGUMENT...   the arguments are pip install's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$1 constraints=$2
shift 2
stamp=$venv/.installed # a copy of everything that the installation depended on
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

echo "Making $venv (log: $log)"
rm -rf "$venv"
.venv/bin/python -m venv "$venv"
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
echo "import site; site.addsitedir('$(.venv/bin/python -c "$purelib")')" >"$("$venv/bin/python" -c "$purelib")/venv.pth"
if ! PIP_CONSTRAINT=$constraints "$venv/bin/python" -m pip --disable-pip-version-check --no-input install \
    --progress-bar off "$@" >"$log" 2>&1 </dev/null; then
    echo "The installation failed. The end of $log:" >&2
    tail -n 15 "$log" >&2
    exit 1
fi
fingerprint "$@" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "Ready: $venv"
