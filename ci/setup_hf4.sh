#!/usr/bin/env bash
# Creates .venv-hf4: the packages of .venv with transformers 4.57 on top. Does nothing if up to date.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/overlay.sh" .venv-hf4 ci/constraints-hf4.txt transformers
