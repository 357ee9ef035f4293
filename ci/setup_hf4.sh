#!/usr/bin/env bash
# Makes .venv-hf4: .venv with transformers 4.57 on top. Instant when nothing has changed.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/overlay.sh" .venv-hf4 ci/constraints-hf4.txt transformers
