#!/usr/bin/env bash
# Makes .venv-te: the packages of .venv, seen through a link, and Transformer Engine with its torch extension on top.
# Instant when nothing has changed; the first time compiles for ten minutes or so on two cores.
#
#   ci/setup_te.sh                       needs .venv (ci/setup.sh), a CUDA toolkit and a C++ compiler, but no GPU
#   CUDA_HOME=/a/toolkit ci/setup_te.sh  use this toolkit instead of the one whose nvcc is found
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-te
stamp=$venv/.installed # a copy of everything that the installation depended on
log=$venv/install.log

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

# A file on PATH may be a script that calls the real compiler elsewhere, so nvcc itself is asked where it lives.
find_cuda() {
    local nvcc
    nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
    nvcc=${nvcc:-$(type -P nvcc || echo /usr/local/cuda/bin/nvcc)}
    [[ -x $nvcc ]] || return 1
    CUDA_HOME=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
    CUDA_HOME=$(cd "$CUDA_HOME" && pwd -P) && [[ -f $CUDA_HOME/include/cuda_runtime.h ]]
}

fingerprint() {
    .venv/bin/python -c 'import sys, torch; print(sys.base_prefix, sys.version, torch.__version__)'
    pwd -P
    "$CUDA_HOME/bin/nvcc" --version
    cat pyproject.toml ci/constraints.txt ci/constraints-te.txt ci/setup_te.sh
}

[[ -x .venv/bin/python ]] || fail "There is no .venv: run ci/setup.sh first."
wanted=$(.venv/bin/python -c 'import torch; print((torch.version.cuda or "none").split(".")[0])')
[[ $wanted != none ]] || fail "The torch in .venv was built without CUDA; Transformer Engine needs one built with it."
find_cuda || fail "No CUDA toolkit was found (nvcc on PATH, in CUDA_HOME or in /usr/local/cuda)." \
    "Transformer Engine's torch extension is compiled here: install CUDA $wanted, or set CUDA_HOME to it."
found=$("$CUDA_HOME/bin/nvcc" --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
[[ $found == "$wanted" ]] || fail "The torch in .venv was built for CUDA $wanted, the toolkit in $CUDA_HOME is CUDA $found." \
    "Install CUDA $wanted, or set CUDA_HOME to it."
type -P g++ >/dev/null || fail "No C++ compiler was found: install g++."

if [[ -f $stamp ]] && fingerprint | cmp -s - "$stamp"; then exit 0; fi

echo "Making $venv: Transformer Engine compiled with $CUDA_HOME (log: $log)"
rm -rf "$venv"
.venv/bin/python -m venv "$venv"
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
packages=$(.venv/bin/python -c "$purelib")
here=$("$venv/bin/python" -c "$purelib")
echo "import site; site.addsitedir('$packages')" >"$here/venv.pth"

# The extension needs headers and libraries that the toolkit may lack and the packages of torch hold.
export CUDA_HOME
for part in cu13 nccl cudnn; do
    [[ -d $packages/nvidia/$part ]] || fail "$packages/nvidia/$part is missing: this torch came without NVIDIA's packages."
    export CPATH="$packages/nvidia/$part/include${CPATH:+:$CPATH}"
    export LIBRARY_PATH="$packages/nvidia/$part/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
done
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

# Without isolation, so that the extension is compiled against the torch that it will run with.
if ! PIP_CONSTRAINT=ci/constraints-te.txt "$venv/bin/python" -m pip --disable-pip-version-check --no-input install \
    --progress-bar off --no-build-isolation --editable ".[te]" >"$log" 2>&1 </dev/null; then
    fail "The installation failed. The end of $log:" "$(tail -n 15 "$log")"
fi
# Transformer Engine looks for cuDNN beside itself.
ln -s "$packages/nvidia" "$here/nvidia"
if ! "$venv/bin/python" -c 'import torch, transformer_engine.pytorch' >>"$log" 2>&1; then
    fail "Transformer Engine was installed but cannot be imported. The end of $log:" "$(tail -n 15 "$log")" \
        "If pip took an extension from its cache that another torch compiled: pip cache remove 'transformer_engine_torch*'"
fi
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "Ready: $venv"
