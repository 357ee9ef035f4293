"""What is noted in every checkpoint that Megatron saves: unverified settings, and what was read of the data."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import megatron.training.training
import torch
from megatron.training.checkpointing import get_checkpoint_name, save_checkpoint

from megatron_vlbridge.checkpoint.run_manifest import read_unverified, write_run_manifest
from megatron_vlbridge.training.launch.start import started_from

type Note = Callable[[Path], None]


def note_in_checkpoints(args: argparse.Namespace, notes: Sequence[Note]) -> None:
    """Let Megatron's saver call each of `notes` on all ranks with the folder of the iteration that it has saved."""

    def save_and_note(iteration: int, *positional: Any, **named: Any) -> None:
        save_checkpoint(iteration, *positional, **named)
        folder = Path(get_checkpoint_name(args.save, iteration, return_base_dir=True))
        for note in notes:
            note(folder)

    megatron.training.training.save_checkpoint = save_and_note


def unverified_note(args: argparse.Namespace) -> Note:
    """Notes what `--allow-unverified` names, and what the checkpoint that the run starts from notes."""
    source = started_from(args)
    unverified = {*args.allow_unverified, *(read_unverified(source) if source else ())}

    def write(folder: Path) -> None:
        if unverified and torch.distributed.get_rank() == 0:
            write_run_manifest(folder, unverified)

    return write
