"""The choice of the backend."""

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider

from megatron_vlbridge.backends import cpu_runtime
from megatron_vlbridge.backends.cpu import CpuSpecProvider
from megatron_vlbridge.errors import VLBridgeError


def spec_provider() -> BackendSpecProvider:
    """The reference kernels where the CPU runtime is enabled, Transformer Engine everywhere else.

    Raises VLBridgeError where neither can be used.
    """
    if cpu_runtime.is_enabled():
        return CpuSpecProvider()
    if not HAVE_TE:
        raise VLBridgeError(
            "the Transformer Engine backend needs the package transformer-engine, which cannot be imported here. "
            "Install the extra 'te' on a machine with a GPU, or call cpu_runtime.enable() first to use the CPU backend"
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
