"""The choice of the backend."""

from megatron.core.models.backends import BackendSpecProvider

from megatron_vlbridge.backends import cpu, cpu_runtime, te


def spec_provider() -> BackendSpecProvider:
    """The reference kernels where the CPU runtime is enabled, Transformer Engine everywhere else."""
    return cpu.CpuSpecProvider() if cpu_runtime.is_enabled() else te.spec_provider()
