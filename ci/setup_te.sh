#!/usr/bin/env bash
# Makes .venv-te: .venv with Transformer Engine's Python on top, and what this imports. Its compiled extension and
# kernels are not installed: the tests bring a stand-in. Instant when nothing has changed.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/overlay.sh" .venv-te ci/constraints-te.txt --no-deps --only-binary :all: \
    transformer_engine ml_dtypes onnx onnx-ir onnxscript protobuf
