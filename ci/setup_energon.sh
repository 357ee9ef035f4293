#!/usr/bin/env bash
# Creates .venv-energon: the packages of .venv with Megatron Energon and its dependencies on top. Does nothing if up to
# date.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/overlay.sh" .venv-energon ci/constraints-energon.txt megatron-energon
