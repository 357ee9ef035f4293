#!/usr/bin/env bash
# Runs a selection of the tests with the oldest and the newest versions that pyproject.toml allows, each in its own venv
# (5 GB and a few minutes the first time): .venv-oldest, .venv-newest.
#
#   ci/versions.sh           both
#   ci/versions.sh oldest    one of them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

declare -A python=([oldest]=3.12 [newest]=3.13)
unit=(
    tests/unit/test_config.py tests/unit/test_rules.py tests/unit/test_cpu_backend.py tests/unit/test_positions.py
    tests/unit/test_chat.py tests/unit/test_turns.py tests/unit/test_published_tokenizer.py tests/unit/test_forms.py
    tests/unit/test_bad_samples.py tests/unit/test_replacement.py tests/unit/test_read_pack.py
    tests/unit/test_convert.py tests/unit/test_torch_dist.py tests/unit/test_seams.py
)
# Videos need transformers 5.20.
declare -A videos=([oldest]= [newest]="tests/unit/test_dataset.py tests/unit/test_media_tokens.py")
functional=(
    tests/functional/test_layouts.py tests/functional/test_moe.py tests/functional/test_mtp.py
    tests/functional/test_training.py::test_resumed_run_continues
)

ends=("$@")
(($#)) || ends=(oldest newest)
for name in "${ends[@]}"; do
    if [[ -z ${python[$name]:-} ]]; then
        echo "ci/versions.sh: expected oldest or newest, found $name" >&2
        exit 2
    fi
done
for name in "${ends[@]}"; do
    venv=.venv-$name
    # PYTHON was chosen for .venv and may be another version.
    PYTHON='' ci/setup.sh "$venv" "ci/constraints-$name.txt" "${python[$name]}"
    "$venv/bin/python" - <<'PY'
import platform
from importlib.metadata import version

names = ("torch", "transformers", "megatron-core")
print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in names))
PY
    OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest "${unit[@]}" ${videos[$name]} -m "not layouts" -n logical --dist loadfile
    "$venv/bin/python" -m pytest "${functional[@]}" -m "not long and not layouts"
done
