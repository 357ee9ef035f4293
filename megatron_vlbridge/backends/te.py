"""Transformer Engine's kernels; attention takes packs (THD) through `PackedSegments`."""

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider

from megatron_vlbridge.errors import VLBridgeError


def spec_provider() -> BackendSpecProvider:
    """Megatron-Core's Transformer Engine provider.

    Raises:
        VLBridgeError: where Transformer Engine cannot be imported.
    """
    if not HAVE_TE:
        raise VLBridgeError(
            "the Transformer Engine backend needs the package transformer-engine, which cannot be imported here. "
            "Install the extra 'te' on a machine with a GPU, or call cpu_runtime.enable() first to use the CPU backend"
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
