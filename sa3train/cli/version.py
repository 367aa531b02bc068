"""`--version` of every command."""

import argparse
import platform

from sa3train import __version__
from sa3train.core.imports import get_version


def describe_version() -> str:
    """Describe the installed version, for `--version`.

    Returns:
        Versions of sa3train, Python and torch.
    """
    return f"sa3train {__version__} (Python {platform.python_version()}, torch {get_version('torch')})"


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `--version` to a command.

    Args:
        parser: Its parser.
    """
    parser.add_argument("--version", action="version", version=describe_version(), help="print the version and exit")
