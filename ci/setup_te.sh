#!/usr/bin/env bash
# Creates .venv-te: the packages of .venv with the Python part of Transformer Engine and its dependencies on top. The
# compiled extension with the kernels is not installed: the tests replace it. Does nothing if up to date.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/overlay.sh" .venv-te ci/constraints-te.txt --no-deps --only-binary :all: \
    transformer_engine flash-linear-attention fla-core ml_dtypes onnx onnx-ir onnxscript protobuf
