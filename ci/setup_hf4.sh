#!/usr/bin/env bash
# Makes .venv-hf4: the packages of .venv, seen through a link, and transformers 4.57 on top. Instant when nothing has
# changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-hf4
stamp=$venv/.installed # a copy of everything that the installation depended on
log=$venv/install.log

fingerprint() {
    .venv/bin/python -c 'import sys; print(sys.base_prefix, sys.version)'
    pwd -P
    cat pyproject.toml ci/constraints.txt ci/constraints-hf4.txt ci/setup_hf4.sh
}

[[ -x .venv/bin/python ]] || {
    echo "There is no .venv: run ci/setup.sh first." >&2
    exit 1
}
if [[ -f $stamp ]] && fingerprint | cmp -s - "$stamp"; then exit 0; fi

echo "Making $venv: transformers 4.57 (log: $log)"
rm -rf "$venv"
.venv/bin/python -m venv "$venv"
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
echo "import site; site.addsitedir('$(.venv/bin/python -c "$purelib")')" >"$("$venv/bin/python" -c "$purelib")/venv.pth"
if ! PIP_CONSTRAINT=ci/constraints-hf4.txt "$venv/bin/python" -m pip --disable-pip-version-check --no-input install \
    --progress-bar off transformers >"$log" 2>&1 </dev/null; then
    echo "The installation failed. The end of $log:" >&2
    tail -n 15 "$log" >&2
    exit 1
fi
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "Ready: $venv"
