"""Values and options that several commands take. A wrong value is wrong usage: argparse exits with 2."""

import argparse
import difflib
import re
from collections.abc import Sequence

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
EXPERTS = ("hub", "fused_in_out", "fused_out_in", "per_expert")


def suggestion(word: str, known: Sequence[str]) -> str:
    """` Did you mean x?`, or all that is known where nothing is close."""
    close = difflib.get_close_matches(word, known, 1)
    return f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."


def size(text: str) -> int:
    """A number of bytes: `512MiB`, `5GB`, `4g` (as `4GB`), `1000`."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*(?:([kmgt])(i?)b?)?", text.strip(), re.IGNORECASE)
    if not match or (match[3] and not text.strip().lower().endswith("b")):
        raise argparse.ArgumentTypeError(f"expected a size such as 4G, 1GiB or 512MiB, found {text!r}")
    power = " kmgt".index((match[2] or " ").lower())
    found = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if found < 1:
        raise argparse.ArgumentTypeError(f"expected at least one byte, found {text!r}")
    return found


def count(text: str) -> int:
    """An integer of at least 1, with at most nine digits."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 999999999, found {text!r}")
    return int(text)


def seed(text: str) -> int:
    """An integer of at least 0, with at most nine digits."""
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 999999999, found {text!r}")
    return int(text)


def dtype(text: str) -> str:
    """The name of a dtype in torch, from that or its short form."""
    name = DTYPES.get(text, text)
    if name not in DTYPES.values():
        known = [*DTYPES, *DTYPES.values()]
        raise argparse.ArgumentTypeError(f"expected a dtype, found {text!r}.{suggestion(text, known)}")
    return name


def experts(text: str) -> str:
    """One of the forms of experts."""
    if text not in EXPERTS:
        raise argparse.ArgumentTypeError(f"expected a form of experts, found {text!r}.{suggestion(text, EXPERTS)}")
    return text


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument(
        "--json", action="store_true", help="print results and errors as JSON on stdout, progress as JSON on stderr"
    )


def add_experts(parser: argparse.ArgumentParser) -> None:
    """Add `--experts`."""
    parser.add_argument(
        "--experts",
        type=experts,
        metavar="FORM",
        help=f"how the Hugging Face side holds experts (default: as it is found): {', '.join(EXPERTS)}",
    )


def add_ignore(parser: argparse.ArgumentParser) -> None:
    """Add `--ignore`, and `--leave-out`, its former name."""
    parser.add_argument(
        "--ignore",
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="ignore Hugging Face tensors with such names ('rotary.*') that are not part of the model; repeatable",
    )
