#!/usr/bin/env bash
# Runs the tests that need a GPU: kernels and the whole model against their references, then the speed table.
#
#   ci/gpu.sh                    with python3
#   PYTHON=/a/python ci/gpu.sh   with this one
#   ci/gpu.sh --layers 8         further arguments are those of the speed table (tests/gpu/speed.py)
#
# It needs torch, Transformer Engine with its compiled extension, flash-linear-attention, the dependencies of this
# package, and pytest.
#
# Exit codes: 0 all passed, 3 no GPU and nothing was run, anything else a failure. See docs/gpu.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}

# By default Transformer Engine uses TF32 for fp32 matrix products; the fp32 tolerance is 1e-5.
export NVIDIA_TF32_OVERRIDE=0

"$python" - <<'END'
import datetime
import importlib
import importlib.metadata
import sys

try:
    import torch

    if not torch.cuda.is_available():
        print("no GPU: nothing was run", file=sys.stderr)
        sys.exit(3)
    for name in ("transformer_engine.pytorch", "fla", "megatron.core", "transformers", "pytest"):
        importlib.import_module(name)
except ImportError as error:
    sys.exit(f"{sys.executable} cannot import a required package: {error}")
versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core", "transformers")]
versions += [f"{name} {importlib.metadata.version(name)}" for name in ("transformer_engine", "flash-linear-attention")]
print(datetime.date.today(), "|", torch.cuda.device_count(), "x", torch.cuda.get_device_name(), "|", ", ".join(versions))
END
"$python" -m pytest -s tests/gpu
"$python" -m tests.gpu.speed "$@"
