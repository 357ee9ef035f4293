"""The forms of a batch (padded, packed, split among context-parallel ranks), and the one that the model takes."""

from megatron_vlbridge.model.inputs.media import Media
from megatron_vlbridge.model.inputs.pack import PackedInputs
from megatron_vlbridge.model.inputs.positions import GivenPositions
from megatron_vlbridge.model.inputs.thd import from_thd
from megatron_vlbridge.model.inputs.thd_batch import ThdBatch

__all__ = ["GivenPositions", "Media", "PackedInputs", "ThdBatch", "from_thd"]
