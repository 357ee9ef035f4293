#!/usr/bin/env bash
# Creates .venv in the root of the project, with the packages pinned in ci/constraints.txt. Does nothing if up to date.
#
#   ci/setup.sh                    find a Python >= 3.12
#   PYTHON=/a/python ci/setup.sh   use this Python (an existing .venv is kept: run `make clean-venv` first)
#   ci/setup.sh VENV CONSTRAINTS VERSIONS
#                                  another venv, constraints file and list of Python versions (ci/versions.sh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:-.venv}
constraints=${2:-ci/constraints.txt}
versions=${3:-3.12 3.13}
stamp=$venv/.installed       # a copy of all inputs of the installation
unfinished=$venv/.unfinished # exists while an installation runs: a venv that still has it is incomplete
log=$venv/install.log

probe='
import ensurepip, sys, sysconfig, venv
version = "%d.%d" % sys.version_info[:2]
assert version in "'"$versions"'".split(), "it is Python " + version
assert sys.implementation.name == "cpython", "it is " + sys.implementation.name
assert sys.maxsize > 2**32, "it is a 32-bit build"
assert not sysconfig.get_config_var("Py_GIL_DISABLED"), "it is a free-threaded build"
print(sys.executable)
'

rejected=""
# The command may exist without working (pyenv has shims for inactive versions), so run it.
# Returns the executable in $found.
try() {
    local out
    if out=$("$1" -c "$probe" 2>&1 </dev/null); then
        found=$out
    else
        rejected+="  $1: $(tail -n 1 <<<"$out")"$'\n'
        return 1
    fi
}

try_on_path() {
    local path
    path=$(type -P "$1") && try "$path"
}

try_pyenv() {
    local root path
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
        for path in "$root/versions/$1".*/bin/python; do
            if [[ -n $root && -x $path ]] && try "$path"; then return 0; fi
        done
    done
    return 1
}

try_uv() {
    local path
    path=$(uv python find --no-project "$1" 2>/dev/null </dev/null) && try "$path"
}

# The oldest version first, as new Python versions may lack prebuilt packages.
find_python() {
    local version
    if [[ -n ${PYTHON:-} ]]; then
        try "$PYTHON"
        return
    fi
    for version in $versions; do
        if try_on_path "python$version" || try_pyenv "$version" || try_uv "$version"; then return 0; fi
    done
    if try_on_path python3 || try_on_path python; then return 0; fi
    if type -P uv >/dev/null; then
        echo "No Python ${versions// / or } found; installing one with uv ..."
        if uv python install "${versions%% *}" </dev/null && try_uv "${versions%% *}"; then return 0; fi
    fi
    return 1
}

print_instructions() {
    {
        echo "No suitable Python was found. Required: 64-bit CPython ${versions// / or } with the venv and ensurepip modules."
        if [[ -n $rejected ]]; then printf 'Tried and rejected:\n%s' "$rejected"; fi
        echo "Install one, then run the same command again:"
        echo "  Debian, Ubuntu:  sudo apt-get install python3.12 python3.12-venv   (or python3.13 python3.13-venv)"
        echo "  Fedora:          sudo dnf install python3.12"
        echo "  macOS:           brew install python@3.12"
        echo "  with pyenv:      pyenv install 3.12"
        echo "  with uv:         uv python install 3.12"
        echo "Or use an existing one: PYTHON=/path/to/python make test"
    } >&2
}

fingerprint() {
    "$venv/bin/python" -c 'import sys; print(sys.base_prefix, sys.version)'
    cat pyproject.toml "$constraints"
}

# The scripts in a venv contain absolute paths, so a moved or copied venv is not usable.
venv_is_usable() {
    [[ -x $venv/bin/python && ! -e $unfinished ]] &&
        grep -qF "$(pwd -P)/$venv" "$venv/bin/activate" &&
        "$venv/bin/python" -c "$probe"$'\n''import pip' >/dev/null 2>&1
}

# The constraints also apply to builds from source. New versions of pip use PIP_BUILD_CONSTRAINT there.
install() {
    PIP_CONSTRAINT=$constraints PIP_BUILD_CONSTRAINT=$constraints \
        "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off --editable ".[dev]"
}

# Print only the slow steps from the output of pip: the large downloads and the last step.
show_progress() {
    awk '/^ *(Downloading|Using cached) .*\([0-9.]+ [MG]B\)/ {
             size = $(NF-1); sub(/\(/, "", size)
             if (size + 0 >= 100 || $NF ~ /^G/) {
                 name = $(NF-2); sub(/.*\//, "", name); sub(/-(cp|py)[0-9].*/, "", name)
                 print "  downloaded " name " (" size " " $NF; fflush() } }
         /^Installing collected packages/ { print "  installing " gsub(/,/, "") + 1 " packages ..."; fflush() }'
}

if venv_is_usable; then
    if fingerprint | cmp -s - "$stamp"; then exit 0; fi
else
    if ! find_python; then
        print_instructions
        exit 1
    fi
    echo "Creating $venv with $found ($("$found" -V))"
    rm -rf "$venv"
    mkdir "$venv"
    : >"$unfinished"
    "$found" -m venv "$venv"
fi

echo "Installing the packages of $constraints (about 5 GB and a few minutes the first time; log: $log)"
: >"$unfinished"
rm -f "$stamp"
if ! install 2>&1 </dev/null | tee "$log" | show_progress; then
    {
        echo "The installation failed. Last lines of $log:"
        tail -n 15 "$log"
    } >&2
    exit 1
fi
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
rm -f "$unfinished"
echo "Ready: $venv"
