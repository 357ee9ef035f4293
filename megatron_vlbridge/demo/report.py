"""What the demo claims, and the page that reports what it did."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from platform import python_version

from torch import Tensor

from megatron_vlbridge.demo.digits import BASE_DIGITS, WORDS
from megatron_vlbridge.demo.process import LORA_RANK, PACKS_PER_ITERATION, SEQ_LENGTH, Recipe
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.log_lines import duration

LEAST_ACCURACY = 0.9
MOST_BLIND_ACCURACY = 0.2
MOST_OTHER_ACCURACY = 0.1
# Of the norm, and of a single logit: against fp64, those of transformers in fp32 differ by up to 1e-4 (of 10).
LOGITS_TOLERANCE, LOGIT_TOLERANCE = 1e-5, 5e-4
PACKAGES = ("megatron-core", "torch", "transformers")
BASE_WORDS = f"{WORDS[BASE_DIGITS[0]]} to {WORDS[BASE_DIGITS[-1]]}"


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
class Base:
    """What adapters were added to, trained on the first digits alone; accuracies 0 to 1, in transformers.

    `accuracy_known` is that of the questions about these digits, `accuracy_others` that of the rest.
    """

    conversations: int
    adapter_parameters: int
    accuracy: float
    accuracy_known: float
    accuracy_others: float

    @property
    def claim(self) -> Claim:
        """Without adapters it has learned what it was to learn, and nothing else."""
        known, others = self.accuracy_known, self.accuracy_others
        return Claim(
            f"Without adapters at least {LEAST_ACCURACY:.0%} of the questions about {BASE_WORDS}, at most "
            f"{MOST_OTHER_ACCURACY:.0%} of the others",
            f"{known:.1%} and {others:.1%}",
            known >= LEAST_ACCURACY and others <= MOST_OTHER_ACCURACY,
        )


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
    base: Base | None = None
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
                f"The same logits: to {LOGITS_TOLERANCE:.0e} of their norm, each to {LOGIT_TOLERANCE:.0e}",
                f"{self.logits.relative:.1e} and {self.logits.absolute:.1e}",
                # Each by itself: `max` may pass over a NaN.
                self.logits.relative <= LOGITS_TOLERANCE and self.logits.absolute <= LOGIT_TOLERANCE,
            ),
            Claim(
                f"With blanked images accuracy at most {MOST_BLIND_ACCURACY:.0%}",
                f"{blind:.1%}",
                blind <= MOST_BLIND_ACCURACY,
            ),
            *([self.base.claim] if self.base else []),
        )


def report_text(result: Result) -> str:
    """The report as Markdown; it shows `loss.png` and `answers.png` beside it."""
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
            *_done(result),
            "",
            "![The loss of each iteration](loss.png)",
            "",
            "![The held-out digits with the answers of the exported model](answers.png)",
            "",
            "## What is here",
            "",
            "| | |",
            "|---|---|",
            *_contents(result),
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


def _done(result: Result) -> list[str]:
    recipe = result.recipe
    layout = "in one process"
    if recipe.processes > 1:
        layout = f"on {recipe.processes} processes (TP={recipe.tp} x PP={recipe.pp})"
    return [
        f"- **Data**: scikit-learn's handwritten digits as {result.train_conversations:,} conversations to learn "
        f"from and {result.held_out_conversations:,} about digits it never saw, with one or two images or a video "
        "of two digits.",
        f"- **Model**: {result.model} with {result.parameters:,} parameters, random at the start (seed {recipe.seed}).",
        *_adapters_done(result),
        f"- **Training**: {len(result.losses)} iterations of {PACKS_PER_ITERATION} packs of {SEQ_LENGTH} tokens, "
        f"{layout}. Loss {result.losses[0]:.3f} at first, {result.losses[-1]:.5f} at last.",
        f"- **Accuracy** (the whole answer, word for word): {result.accuracy_megatron:.2%} in Megatron, "
        f"{result.accuracy_transformers:.2%} in transformers; {result.other_answers} answers differ. "
        f"Of the videos alone {result.accuracy_videos:.2%}. "
        f"With blanked images {result.blind_megatron:.2%} and {result.blind_transformers:.2%}.",
        f"- **Logits** of all tokens of the held-out conversations, Megatron against transformers: largest "
        f"difference {result.logits.absolute:.2e}, relative {result.logits.relative:.2e}.",
    ]


def _adapters_done(result: Result) -> list[str]:
    base = result.base
    if base is None:
        return []
    return [
        f"- **Base**: all parameters, trained for {result.recipe.base_iterations} iterations on {base.conversations:,} "
        f"conversations about {BASE_WORDS}. Alone it answers {base.accuracy:.2%} of the held-out questions, "
        f"{base.accuracy_known:.2%} of those about its digits and {base.accuracy_others:.2%} of the others.",
        f"- **Adapters**: LoRA of rank {LORA_RANK} on all projections, {base.adapter_parameters:,} parameters "
        f"({base.adapter_parameters / result.parameters:.1%} of the model), trained for "
        f"{result.recipe.adapter_iterations} iterations on all digits; the base is frozen. transformers "
        "loads them merged into it. All that follows is with adapters. The loss stays above that of a full training: "
        "the embedding, which is the head too, is frozen, and nothing has told the base the words of the other digits.",
    ]


def _contents(result: Result) -> list[str]:
    trained, adapters = "the trained weights", []
    if result.base is not None:
        trained = "the base"
        adapters = [
            "| `megatron-adapters/` | the adapters that the second training saved |",
            "| `adapter/` | the same as a folder of `peft` |",
            "| `hf-merged/` | the base with the adapters merged into it |",
        ]
    return [
        "| `data/` | the conversations (`images.jsonl`, `videos.jsonl`, `held-out.jsonl`), their images, frames; "
        "the sources of the training (`meta.yaml`) and their lengths |",
        "| `hf-start/` | the Hugging Face checkpoint at the start, with its processor |",
        "| `megatron-start/` | the same weights as a Megatron checkpoint |",
        f"| `megatron-trained/` | {trained}, as the training saved it |",
        f"| `hf-trained/` | {trained} as a Hugging Face checkpoint |",
        *adapters,
        "| `logs/` | the whole output of Megatron, and its answers |",
    ]
