"""The command line: the arguments of Megatron and of this package, with errors of one line."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron.training.arguments import add_megatron_arguments

from megatron_vlbridge.errors import VLBridgeError

# A percent sign that neither stands for itself (%%) nor for a field of the argument, such as %(default)s.
_PERCENT = re.compile(r"%(?!%|\(\w+\)[sdrfg])(?<!%%)")


class _HelpFormatter(argparse.HelpFormatter):
    """Accepts a single percent sign in a help text: Megatron-Core 0.19 has one, which ends argparse in an exception."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = super()._get_help_string(action)
        return text and _PERCENT.sub("%%", text)


class _Parser(argparse.ArgumentParser):
    """Raises VLBridgeError where argparse prints the usage, which has 800 lines here, and exits."""

    def error(self, message: str) -> NoReturn:
        raise VLBridgeError(message)


def make_parser(add_arguments: Callable[[argparse.ArgumentParser], object]) -> argparse.ArgumentParser:
    """A parser of the arguments that `add_arguments` adds, and of Megatron's after them."""
    parser = _Parser(
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        usage="%(prog)s --hf-folder DIR (--hf-weights | --pretrained-checkpoint DIR | --load DIR) [argument ...]",
        description="Train a vision-language model with Megatron-Core. First the arguments of megatron-vlbridge, then "
        "Megatron's own.",
    )
    add_arguments(parser)
    add_megatron_arguments(parser)
    return parser


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """`parser.parse_args`, which names the argument that an unknown one resembles.

    Raises VLBridgeError: an unknown argument, a value that no argument takes, or a value of the wrong type.
    """
    args, unknown = parser.parse_known_args(words)
    names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if names:
        close = difflib.get_close_matches(names[0], parser._option_string_actions, n=1)
        meant = f"did you mean {close[0]}?" if close else "--help lists all arguments"
        raise VLBridgeError(f"{names[0]}: no such argument; {meant}")
    if unknown:
        position = list(words).index(unknown[0])
        after = f" after {words[position - 1]}" if position else ""
        raise VLBridgeError(f"{unknown[0]!r}{after}: a value that no argument takes")
    return args
