"""Log lines of Megatron-Core 0.19.2 from runs of the example, and their short form."""

import math
import re

import pytest

from megatron_vlbridge.training.log_lines import duration, read_event, read_iteration

EXPERTS = (
    " [2026-11-26 02:11:34.066318] iteration        1/       6 | consumed samples:            2 | elapsed time per "
    "iteration (ms): 127.0 | learning rate: 1.000000E-03 | global batch size:     2 | lm loss: 5.834869E+00 | "
    "load_balancing_loss: 1.021448E+00 | loss scale: 1.0 | grad norm: 6.024 | number of skipped iterations:   0 | "
    "number of nan iterations:   0 |"
)


def test_an_iteration_has_the_losses_of_the_line_of_megatron() -> None:
    found = read_iteration(EXPERTS)
    assert found is not None
    assert (found.number, found.last, found.global_batch_size, found.seconds) == (1, 6, 2, 0.127)
    assert found.losses == {"lm loss": 5.834869, "load_balancing_loss": 1.021448}
    assert (found.grad_norm, found.loss_scale, found.skipped, found.nan) == (6.024, 1.0, 0, 0)
    assert found.text(256, 62.4) == (
        "iteration 1/6  loss 5.834869  load_balancing_loss 1.021448  grad norm 6.024  4,031 tokens/s  1 min 2 s left"
    )


MEASURED = (
    " packs: 2 | tokens: 400 | supervised tokens: 1234.5 | images: 3 | videos: 0 | patches: 12345678 | padding share: "
    "0.21875 | tokens per second: 3149.6 | model FLOPs: 123456789 | model TFLOP/s per rank: 0.00097 |"
)


def test_what_was_measured_is_shown() -> None:
    found = read_iteration(EXPERTS + MEASURED)
    assert found is not None
    assert len(found.measured) == 10
    assert found.measured["padding_share"] == 0.21875
    assert found.learning_rate == 1e-3
    assert found.losses == {"lm loss": 5.834869, "load_balancing_loss": 1.021448}
    assert found.text(256, 62.4) == (
        "iteration 1/6  loss 5.834869  load_balancing_loss 1.021448  grad norm 6.024  3,150 tokens/s  0.00097 TFLOP/s "
        "per rank  1 min 2 s left  1,234.5 supervised tokens, 3 images, 12,345,678 patches, 21.9% padding"
    )


def test_supervised_tokens_are_shown_where_there_are_none() -> None:
    zeros = re.sub(r"(tokens|images|patches|share): [0-9.]+", r"\1: 0", MEASURED)
    found = read_iteration(EXPERTS + zeros)
    assert found is not None
    assert found.text(256, None).endswith("  0 supervised tokens, 0.0% padding")


@pytest.mark.parametrize("value", [5.834869, 0.0, 1e-7, 123456.7, 1234567e3, 0.01234567])
def test_a_loss_keeps_every_digit_of_megatron(value: float) -> None:
    megatron = f"{value:.6E}"
    found = read_iteration(EXPERTS.replace("5.834869E+00", megatron))
    assert found is not None
    assert float(found.text(256, None).split()[3]) == float(megatron)


def test_skipped_and_nan_iterations_are_shown() -> None:
    line = EXPERTS.replace("skipped iterations:   0", "skipped iterations:   2").replace(
        "loss scale: 1.0", "loss scale: 65536.0"
    )
    found = read_iteration(line.replace("nan iterations:   0", "nan iterations:   1"))
    assert found is not None
    text = found.text(256, None)
    assert "loss scale 65536" in text
    assert "2 skipped" in text
    assert "1 with a loss that is not finite" in text


def test_a_nan_loss_is_shown() -> None:
    """Megatron logs no field for it."""
    found = read_iteration(EXPERTS.replace(" lm loss: 5.834869E+00 |", ""))
    assert found is not None
    assert math.isnan(float(found.text(256, None).split()[3]))


def test_the_last_iteration_shows_no_remaining_time() -> None:
    found = read_iteration(EXPERTS.replace("1/ ", "6/ "))
    assert found is not None
    assert "left" not in found.text(256, 0.0)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            " validation loss at iteration 3 | lm loss value: 5.192562E+00 | lm loss PPL: 1.799289E+02 | ",
            "validation loss 5.192562 at iteration 3",
        ),
        (
            " validation loss at iteration 6 on test set | lm loss value: 5.0E+00 | lm loss PPL: 1.4E+02 | ",
            "validation loss 5.000000 at iteration 6 on test set",
        ),
        (
            "  [2026-11-26 02:11:40.615321] successfully saved checkpoint from iteration       6 to saved "
            "[ t 1/1, gtp_remat 1/1, p 1/1 ]",
            "checkpoint saved at iteration 6: saved",
        ),
        (
            "  successfully loaded checkpoint from my [saved] runs [ t 1/1, gtp_remat 1/1, p 1/1 ] at iteration 3",
            "checkpoint loaded, iteration 3: my [saved] runs",
        ),
        (
            "Unable to load rng state from checkpoint out. Specify --no-load-rng, exiting ...",
            "Unable to load rng state from checkpoint out. Specify --no-load-rng, exiting ...",
        ),
        ("Invalid checkpoint version 4.", "Invalid checkpoint version 4."),
        ('  encountered exception "busy" when trying', 'encountered exception "busy" when trying'),
        ("skipping training (--skip-train is on) ...", "skipping training (--skip-train is on) ..."),
        ("[exiting program after receiving SIGTERM.] datetime: 2026-11-26 02:11:40", "stopped by a signal"),
        ("[exiting program at iteration 5] datetime: 2026", "[exiting program at iteration 5] datetime: 2026"),
        ("WARNING: one_logger package is required to enable e2e metrics tracking.", None),
        ("  logits_load_ignore_errors ....................... False", None),
        ("  error_injection_rate ............................ 0", None),
        ("  hf_folder ....................................... /data/error/hf", None),
        ("  inference_dynamic_batching_unified_memory_level . nan", None),
        ("WARNING: TP size not found in checkpoint args, using 1 as default.", None),
        ("WARNING: PP size not found in checkpoint args, using 1 as default.", None),
        ("could not find arguments in the checkpoint ...", None),
        ("WARNING: could not find the metadata file out/latest_checkpointed_iteration.txt", None),
        ("> building train, validation, and test datasets ...", None),
        ("    validation: 6", None),
        ("---------------------------", None),
        ("", None),
    ],
)
def test_other_lines(line: str, text: str | None) -> None:
    assert read_iteration(line) is None
    assert read_event(line) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (119.7, "2 min 0 s"),
        (3599.6, "1 h 00 min"),
        (3725, "1 h 02 min"),
    ],
)
def test_durations_are_formatted(seconds: float, text: str) -> None:
    assert duration(seconds) == text
