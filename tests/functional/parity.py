"""How far a layout is from transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.config import Config
from megatron_vlbridge.families import find
from megatron_vlbridge.families.experts import ExpertForm
from tests import mtp_reference, reference
from tests.closeness import FP32, relative_error
from tests.functional import ranks
from tests.functional.pool import Layout, Pool

# Where the gated delta rule is run, the gradients of its decay are sums whose terms cancel.
TOLERANCE, DELTA_RULE = FP32, 2e-5
PACK_LENGTH = 128

KINDS: dict[str, list[str]] = {
    "text": ["text"],
    "one image": ["image"],
    "several images of different sizes": ["images"],
    "a video": ["video"],
    "images and videos mixed": ["mixed"],
    "several conversations in one pack": ["text", "image", "images", "video"],
}


@dataclass(frozen=True)
class Errors:
    """Relative errors; of tower, logits and token losses the worst conversation's."""

    vision: float
    logits: float
    token_losses: float
    loss: float
    gradients: dict[str, float]
    tolerance: float

    def check(self) -> None:
        """Every error within the tolerance."""
        too_large = self.too_large()
        assert not too_large, f"{len(too_large)}, the worst: {list(too_large.items())[:6]}"

    def too_large(self) -> dict[str, float]:
        """The errors that are not within the tolerance."""
        found = {"vision": self.vision, "logits": self.logits, "token losses": self.token_losses, "loss": self.loss}
        found |= {f"gradient of {name}": error for name, error in self.gradients.items()}
        worst = sorted(found.items(), key=lambda item: -item[1])
        return {name: error for name, error in worst if not error < self.tolerance}


Groups = Sequence[Sequence[reference.Conversation]]


def measure(
    pool: Pool, layout: Layout, folder: Path, groups: Groups, length: int | None = PACK_LENGTH, **options: object
) -> Errors:
    """Packs of these conversations under `layout`, against transformers run conversation by conversation.

    A pack has `length` tokens; without one the groups are padded batches.
    """
    packs = [reference.pack(group, length) if length else reference.padded_batch(group) for group in groups]
    results = pool.run(ranks.forward_backward, layout, folder=folder, packs=packs, towers=length is not None, **options)
    return compare(results, layout, folder, groups)


def compare(results: Sequence[dict[str, Any]], layout: Layout, folder: Path, groups: Groups) -> Errors:
    """What the ranks gave, against transformers."""
    conversations = [c for group in groups for c in group]
    expected = run_reference(folder, groups)
    lengths = [[len(c.tokens) for c in group] for group in groups]
    logits = _cut(ranks.of_packs(results, "logits", layout, lengths), lengths)
    losses = _cut(ranks.of_packs(results, "losses", layout, lengths), lengths)
    losses = [x * (c.labels != -100) for x, c in zip(losses, conversations, strict=True)]
    reports = [x for r in results if r["losses"] and r["tp_rank"] == 0 for x in r["reports"]]
    total, count = torch.stack(reports).sum(0).tolist()
    config = read_config(folder)
    gradients = (
        find(config).table(config, ExpertForm.FUSED_OUT_IN).to_hf(ranks.assemble([r["gradients"] for r in results]))
    )
    assert gradients.keys() == expected.gradients.keys()
    check_data_reaches_every_parameter(expected, conversations)
    return Errors(
        vision=_vision_error(results, layout, expected, groups),
        logits=_worst([x[:, : config.text.vocab_size] for x in logits], expected.logits),
        token_losses=_worst(losses, expected.losses),
        loss=relative_error(total / count, expected.loss),
        gradients={name: relative_error(gradients[name], x) for name, x in expected.gradients.items()},
        tolerance=tolerance(config),
    )


def tolerance(config: Config) -> float:
    """What every error of a model must be below."""
    return DELTA_RULE if config.text.linear_attention else TOLERANCE


def run_reference(folder: Path, groups: Groups) -> reference.Reference:
    """The reference, with multi-token prediction where the folder has it."""
    if read_config(folder).text.num_mtp_layers:
        return mtp_reference.run_transformers(folder, groups).main
    return reference.run_transformers(folder, [c for group in groups for c in group])


def _vision_error(
    results: Sequence[dict[str, Any]], layout: Layout, expected: reference.Reference, groups: Groups
) -> float:
    """Zero where the ranks did not run the tower alone."""
    if not any(r["vision"] for r in results):
        return 0.0
    # Whether transformers' tower ran images or videos, a pack's rows are its images' and then its videos'.
    towers = torch.cat(ranks.of_packs(results, "vision", layout, [[0]] * len(groups)), dim=1)
    return relative_error(towers, _towers_in_order(expected, groups, towers))


def check_data_reaches_every_parameter(
    expected: reference.Reference, conversations: Sequence[reference.Conversation]
) -> None:
    """A gradient that is zero in both proves nothing; only the tower's may be, and only where there is text alone."""
    pictures = any(len(c.images) or len(c.videos) for c in conversations)
    silent = [name for name, x in expected.gradients.items() if not x.any() and (pictures or ".visual." not in name)]
    assert not silent, f"the test data do not reach {silent}"


def _cut(rows: Sequence[torch.Tensor], lengths: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Each conversation's part of its pack's row."""
    return [
        part for row, segments in zip(rows, lengths, strict=True) for part in row[: sum(segments)].split(list(segments))
    ]


def _towers_in_order(expected: reference.Reference, groups: Groups, like: torch.Tensor) -> torch.Tensor:
    rows = []
    number = 0
    for group in groups:
        for kind in ("images", "videos"):
            rows += [
                expected.vision[number + i][kind] for i in range(len(group)) if kind in expected.vision[number + i]
            ]
        number += len(group)
    return torch.cat(rows, dim=1) if rows else torch.zeros_like(like)


def _worst(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(relative_error(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
