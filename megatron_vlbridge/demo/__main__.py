"""The command: `python -m megatron_vlbridge.demo`, or `make demo`."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_vlbridge.demo.process import ENVIRONMENT
from megatron_vlbridge.errors import VLBridgeError


def main() -> int:
    """0: every claim of the report holds; 1: one does not, or a stage failed; 2: wrong usage; 130: stopped."""
    options = _arguments()
    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGTERM, _stop)
    try:
        # Imported late: they read the environment, and a wrong option is answered at once.
        from transformers.utils import logging

        from megatron_vlbridge.demo.output import LORA_STAGES, STAGES, Progress
        from megatron_vlbridge.demo.pipeline import Options, run

        logging.disable_progress_bar()
        stages = LORA_STAGES if options.lora else STAGES
        result = run(Options(**vars(options)), Progress(sys.stdout, stages))
    except VLBridgeError as error:
        print(f"\nThe demo failed.\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. No process of the demo is left.", file=sys.stderr)
        return 130
    for claim in result.claims:
        if not claim.holds:
            print(f"Claim failed: {claim.text}: found {claim.found}", file=sys.stderr)
    return 0 if all(claim.holds for claim in result.claims) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vlbridge.demo",
        description="Teach a small model to read handwritten digits, on the CPU: Hugging Face checkpoint -> "
        "Megatron checkpoint -> Megatron's own pretrain -> Hugging Face checkpoint -> the same answers in both.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for all results (%(default)s)")
    parser.add_argument(
        "--family",
        choices=("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        default="qwen3_vl",
        help="(%(default)s)",
    )
    parser.add_argument("--tp", type=int, choices=(1, 2), default=1, help="tensor-parallel processes (%(default)s)")
    parser.add_argument("--pp", type=int, choices=(1, 2), default=1, help="pipeline stages (%(default)s)")
    parser.add_argument("--iterations", type=_at_least(1), default=450, help="training iterations (%(default)s)")
    parser.add_argument(
        "--lora",
        action="store_true",
        help="a third of the iterations trains a base on half of the digits, the rest adapters of it (LoRA) on all",
    )
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, help="of the weights, the pairs and the order (%(default)s)"
    )
    return parser.parse_args()


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, found {text}")
        return int(text)

    return number


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
