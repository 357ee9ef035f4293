#!/usr/bin/env bash
# Creates .venv-frameworks: the packages of .venv with peft on top. Does nothing if up to date.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/overlay.sh" .venv-frameworks ci/constraints-frameworks.txt peft
