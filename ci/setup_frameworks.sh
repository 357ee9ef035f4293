#!/usr/bin/env bash
# Creates .venv-frameworks: the packages of .venv with peft, mbridge and verl on top, and what the modules of verl that
# the tests import need (not its trainers and servers). Does nothing if up to date.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/overlay.sh" .venv-frameworks ci/constraints-frameworks.txt \
    --no-deps --only-binary :all: \
    peft accelerate mbridge verl attrs codetiming jsonschema jsonschema-specifications msgpack omegaconf orjson \
    pandas pyvers ray referencing rpds-py tensordict
