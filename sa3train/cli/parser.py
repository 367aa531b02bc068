"""The parser of every command with plain flags."""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from sa3train.core.text import suggest_name

_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")
_PLAIN_WORDS = {"invalid int value:": "needs a whole number, not", "invalid float value:": "needs a number, not"}


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that says what was meant: the closest name, or the quotes that are missing.

    A misused flag is one line and exit code 2, as other errors are one line and exit code 1.
    """

    def parse_known_args(  # type: ignore[override]  # of two overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse arguments, and refuse unknown ones: a subcommand knows its own flags.

        Args:
            args: The arguments; None for those of the process.
            namespace: Where to put the values; None for a new one.

        Returns:
            The values, and an empty list.
        """
        given = sys.argv[1:] if args is None else list(args)
        found, unknown = super().parse_known_args(given, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}. {self._explain(unknown, given)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print an error and exit.

        Args:
            message: What is wrong.
        """
        if found := _CHOICE.search(message):
            word, choices = found[1], found[2].replace("'", "").split(", ")
            message += f". {suggest_name(word, choices)}"
        for python, plain in _PLAIN_WORDS.items():
            message = message.replace(python, plain)
        end = "" if message.rstrip().endswith((".", "?")) else "."
        self.exit(2, f"error: {message.rstrip()}{end} See {self.prog} --help.\n")

    def _explain(self, unknown: list[str], given: list[str]) -> str:
        flag = next((word for word in unknown if word.startswith("-")), None)
        if flag is not None:
            return suggest_name(flag.partition("=")[0], re.findall(r"--[\w-]+", self.format_help()))
        if re.match(r"[a-z_.]+=", unknown[0]):
            return "Settings written NAME=VALUE are those of sa3-encode and sa3-train."
        first = next((index for index in range(len(given)) if given[index:][: len(unknown)] == unknown), 0)
        values = [" ".join(given[start : first + len(unknown)]) for start in range(first)]
        return f'Quote a value with spaces: "{next(filter(os.path.exists, values), values[-1])}".' if values else ""


class PromptAction(argparse.Action):
    """Collects prompts; several words after one flag are more likely one prompt without its quotes."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) > 1 and all(value and not re.search(r"\s", value) for value in values):
            several = " ".join(f"{option_string} {value}" for value in values)
            parser.error(
                f'quote a prompt: {option_string} "{" ".join(values)}", or for {len(values)} prompts: {several}'
            )
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), *values])


def name_flags(message: str, flags: Mapping[str, str]) -> str:
    """Name settings in a message of the library as the command line does.

    Args:
        message: With names as in Python, such as "cfg_scale=1".
        flags: Flag by setting.

    Returns:
        With flags, such as "--cfg-scale 1", and values as they are written after them, such as "--cfg-interval 0 0.5".
        Names that are plain words are known by their "=" only.
    """

    def name_flag(found: re.Match[str]) -> str:
        flag, values = flags[found[1] or found[4]], re.findall(r"[^,\s]+", found[3] or "")
        between = " " if flag.startswith("-") else " to "
        return flag + ("" if found[2] or not found[1] else " ") + between.join(f"{float(each):g}" for each in values)

    every, telling = "|".join(flags), "|".join(name for name in flags if "_" in name) or "(?!)"
    names = rf"(?<![\w./-])(?:({every})=(?:(True\b)|\(([-+.,\de ]+)\))?|({telling})(?![\w/-]|\.\w))"
    return re.sub(names, name_flag, message)
