"""Notes unverified settings in every checkpoint that Megatron saves."""

import argparse
from pathlib import Path
from typing import Any

import megatron.training.training
import torch
from megatron.training.checkpointing import get_checkpoint_name, save_checkpoint

from megatron_vlbridge.checkpoint.run_manifest import read_unverified, write_run_manifest
from megatron_vlbridge.training.launch.start import started_from


def note_unverified(args: argparse.Namespace) -> None:
    """Let Megatron's saver note what `--allow-unverified` names, and what the checkpoint that it starts from notes."""
    source = started_from(args)
    unverified = {*args.allow_unverified, *(read_unverified(source) if source else ())}

    def save_and_note(iteration: int, *positional: Any, **named: Any) -> None:
        save_checkpoint(iteration, *positional, **named)
        if torch.distributed.get_rank() == 0:
            write_run_manifest(Path(get_checkpoint_name(args.save, iteration, return_base_dir=True)), unverified)

    megatron.training.training.save_checkpoint = save_and_note if unverified else save_checkpoint
