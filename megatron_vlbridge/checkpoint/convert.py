"""Import and export: a Hugging Face folder <-> a Megatron `torch_dist` folder, bit for bit, without a model.

An imported folder keeps, in `hf/`, the source's other files and what its weights were called, so that an export needs
nothing else.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.export_plan import ExportChoices, plan_export
from megatron_vlbridge.checkpoint.import_plan import plan_import
from megatron_vlbridge.checkpoint.stream.engine import Options


def import_checkpoint(
    hf_folder: str | Path,
    megatron_folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    experts: str | None = None,
    ignore: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    options: Options | None = None,
    resume: bool = False,
) -> Path:
    """Write a Hugging Face checkpoint as a Megatron checkpoint, and return the new folder.

    `hf_folder` may be a Hub id. The new folder loads through Megatron's `--load` and `--pretrained-checkpoint` at any
    parallel layout. `dtype` (`"float32"`, `"bfloat16"`, `"float16"`) converts all weights; by default each keeps its
    own, and those stored in FP8 become bfloat16. `experts` says the form of fused experts where their shapes do not.
    `ignore` are patterns (`rotary.*`) for tensors that are not part of the model; `leave_out` is its former name.
    `options` says with how many threads and how much memory; `resume` continues a run that was interrupted, with the
    same result.

    Raises VLBridgeError, and leaves nothing under the new name, when the two do not match exactly, a file is
    missing or damaged, the target exists or is being written, or the disk is full.
    Example: `import_checkpoint("Qwen/Qwen3-VL-2B-Instruct", "qwen3-vl-2b-megatron")`.
    """
    plan = plan_import(hf_folder, megatron_folder, dtype=dtype, experts=experts, ignore=[*ignore, *leave_out])
    return plan.run(options, resume=resume)


def export_checkpoint(
    megatron_folder: str | Path,
    hf_folder: str | Path,
    *,
    like: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    experts: str | None = None,
    max_shard_size: int | None = None,
    portable_config: bool = False,
    fp8: bool = False,
    options: Options | None = None,
    resume: bool = False,
) -> Path:
    """Write the weights of a Megatron checkpoint as a Hugging Face checkpoint, and return the new folder.

    Config, tokenizer, processor and all other files come unchanged from what the import kept beside the weights, or
    from `like`, the Hugging Face folder (or Hub id) that training started from; a folder that a training run wrote
    holds none. Shards are those of that source, or at most `max_shard_size` bytes each (5 GB where the source does not
    tell); experts have the form that they have there, or `experts`. Names are those of the Hub. Tensors of `like` that
    are not part of the model are copied unchanged. `dtype` converts all weights; by default they keep what the Megatron
    checkpoint holds. Where that is another than the source's, config.json names the new one. With `portable_config` it
    is written so that transformers 4.57 and 5.x read the same model from it. With `fp8` the linear layers of decoder
    and MTP layers become float8_e4m3fn with a float32 scale for each block of 128 x 128 (`x.weight_scale_inv`), each
    expert on its own, as FP8 checkpoints are published. `options` and `resume` are those of `import_checkpoint`.

    Raises VLBridgeError, and leaves nothing under the new name, when the two do not match exactly, a file is
    missing or damaged, the target exists or is being written, the disk is full, it is not known which config
    belongs to the weights, or a value has no form in FP8.
    Example: `export_checkpoint("run", "trained", like="Qwen/Qwen3-VL-2B-Instruct")`.
    """
    choices = ExportChoices(dtype, experts, max_shard_size, portable_config, fp8)
    return plan_export(megatron_folder, hf_folder, like, choices).run(options, resume=resume)
