"""What the demo claims, and the page that reports what it did."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from platform import python_version

from torch import Tensor

from megatron_vlbridge.demo.process import PACKS_PER_ITERATION, SEQ_LENGTH, Recipe
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.log_lines import duration

LEAST_ACCURACY = 0.9
MOST_BLIND_ACCURACY = 0.2
LOGIT_TOLERANCE = 1e-4
PACKAGES = ("megatron-core", "torch", "transformers")


@dataclass(frozen=True)
class Claim:
    """Something that must come out, what came out, and whether it is enough."""

    text: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Difference:
    """Between logits and their reference: the largest absolute, and the norm of it over the reference's norm."""

    absolute: float
    relative: float

    @classmethod
    def of(cls, logits: Tensor, reference: Tensor) -> "Difference":
        """Raises VLBridgeError where the two differ in shape."""
        if logits.shape != reference.shape:
            raise VLBridgeError(f"logits: expected {list(reference.shape)}, found {list(logits.shape)}")
        difference = logits.double() - reference.double()
        return cls(difference.abs().max().item(), (difference.norm() / reference.double().norm()).item())


@dataclass(frozen=True)
class Result:
    """Everything that the run measured. Accuracies 0 to 1; losses in nats per answer token."""

    recipe: Recipe
    model: str
    parameters: int
    train_conversations: int
    held_out_conversations: int
    losses: Sequence[float]
    accuracy_megatron: float
    accuracy_transformers: float
    blind_megatron: float
    blind_transformers: float
    accuracy_videos: float
    other_answers: int
    logits: Difference
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What the demo promises."""
        here, there = self.accuracy_megatron, self.accuracy_transformers
        blind = max(self.blind_megatron, self.blind_transformers)
        return (
            Claim(
                f"Held-out accuracy at least {LEAST_ACCURACY:.0%}",
                f"{min(here, there):.1%}",
                min(here, there) >= LEAST_ACCURACY,
            ),
            Claim("The same accuracy in Megatron and in transformers", f"{here:.2%} and {there:.2%}", here == there),
            Claim(
                f"The same logits to {LOGIT_TOLERANCE:.0e}, absolute and relative",
                f"{self.logits.absolute:.1e} and {self.logits.relative:.1e}",
                # Each by itself: `max` may pass over a NaN.
                self.logits.absolute <= LOGIT_TOLERANCE and self.logits.relative <= LOGIT_TOLERANCE,
            ),
            Claim(
                f"With blanked images accuracy at most {MOST_BLIND_ACCURACY:.0%}",
                f"{blind:.1%}",
                blind <= MOST_BLIND_ACCURACY,
            ),
        )


def report_text(result: Result) -> str:
    """The report as Markdown; it shows `loss.png` and `answers.png` beside it."""
    recipe = result.recipe
    layout = "in one process"
    if recipe.processes > 1:
        layout = f"on {recipe.processes} processes (TP={recipe.tp} x PP={recipe.pp})"
    claims = [f"| {claim.text} | {claim.found} | {'yes' if claim.holds else '**no**'} |" for claim in result.claims]
    times = [f"| {title} | {duration(seconds)} |" for title, seconds in result.seconds.items()]
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return "\n".join(
        [
            f"# A small {result.model} learns to read digits",
            "",
            "Hugging Face checkpoint → Megatron checkpoint → Megatron's own `pretrain` → Hugging Face checkpoint, and "
            "the same answers in both. All of it on the CPU.",
            "",
            "| what must hold | found | holds |",
            "|---|---|---|",
            *claims,
            "",
            "## What was done",
            "",
            f"- **Data**: scikit-learn's handwritten digits as {result.train_conversations:,} conversations to learn "
            f"from and {result.held_out_conversations:,} about digits it never saw, with one or two images or a video "
            "of two digits.",
            f"- **Model**: {result.model} with {result.parameters:,} parameters, random at the start (seed "
            f"{recipe.seed}).",
            f"- **Training**: {recipe.iterations} iterations of {PACKS_PER_ITERATION} packs of {SEQ_LENGTH} tokens, "
            f"{layout}. Loss {result.losses[0]:.3f} at first, {result.losses[-1]:.5f} at last.",
            f"- **Accuracy** (the whole answer, word for word): {result.accuracy_megatron:.2%} in Megatron, "
            f"{result.accuracy_transformers:.2%} in transformers; {result.other_answers} answers differ. "
            f"Of the videos alone {result.accuracy_videos:.2%}. "
            f"With blanked images {result.blind_megatron:.2%} and {result.blind_transformers:.2%}.",
            f"- **Logits** of all tokens of the held-out conversations, Megatron against transformers: largest "
            f"difference {result.logits.absolute:.2e}, relative {result.logits.relative:.2e}.",
            "",
            "![The loss of each iteration](loss.png)",
            "",
            "![The held-out digits with the answers of the exported model](answers.png)",
            "",
            "## What is here",
            "",
            "| | |",
            "|---|---|",
            "| `data/` | the conversations (`images.jsonl`, `videos.jsonl`, `held-out.jsonl`), their images, frames; "
            "the sources of the training (`meta.yaml`) and their lengths |",
            "| `hf-start/` | the Hugging Face checkpoint at the start, with its processor |",
            "| `megatron-start/` | the same weights as a Megatron checkpoint |",
            "| `megatron-trained/` | what the training saved |",
            "| `hf-trained/` | the trained weights as a Hugging Face checkpoint |",
            "| `logs/` | the whole output of Megatron, and its answers |",
            "",
            "## Time",
            "",
            "| stage | time |",
            "|---|---|",
            *times,
            "",
            f"Python {python_version()}, {packages}.",
            "",
        ]
    )
