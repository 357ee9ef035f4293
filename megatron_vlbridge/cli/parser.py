"""The parser of `vlbridge`, with suggestions for misspelt commands and options."""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from megatron_vlbridge.cli.arguments import suggestion
from megatron_vlbridge.cli.commands import COMMANDS

_DESCRIPTION = "Vision-language checkpoints between Hugging Face and Megatron-Core, bit for bit."
_EXIT_CODES = """`vlbridge COMMAND --help` shows the options of a command and an example.

exit codes: 0 done, 1 a difference or an invalid input was found,
            2 wrong usage, 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """A parser that knows its options by name."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.known: list[str] = []
        options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument, and note its name if it is an option."""
        self.known += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def check_options(self, words: Sequence[str]) -> None:
        """Exit with 2 for an unknown option, with the closest known one. argparse alone may complain of its value."""
        for word in takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if name.startswith("--") and not any(known.startswith(name) for known in self.known):
                self.error(f"unknown option {name}.{suggestion(name, self.known)}")


def make_parser(words: Sequence[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line `words`, and those of the commands; only one that is named has its arguments."""
    parser = Parser(prog="vlbridge", description=_DESCRIPTION, epilog=_EXIT_CODES)
    parser.add_argument(
        "--version", action="store_true", help="print the version, and that of Megatron-Core and others"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    found: dict[str, Parser] = {}
    for name, command in COMMANDS.items():
        found[name] = commands.add_parser(name, help=command.summary, description=command.description)
        if name in words:  # to add them may take imports
            command.add_arguments(found[name])
        found[name].set_defaults(run=command.run)
    return parser, found


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line; raises SystemExit with 2 where they are wrong."""
    parser, commands = make_parser(words)
    first = next((number for number, word in enumerate(words) if not word.startswith("-")), len(words))
    parser.check_options(words[:first])
    if first < len(words):
        if words[first] not in commands:
            parser.error(f"unknown command {words[first]}.{suggestion(words[first], list(commands))}")
        commands[words[first]].check_options(words[first + 1 :])
    return parser.parse_args(words)
