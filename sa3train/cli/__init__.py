"""Command-line entry points; the only readers of Hydra configs and command-line flags."""

import io
import os
import sys
from types import TracebackType

_previous_hook = sys.excepthook


def _end_at_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End as `run_job` ends a command, also while Python still imports what comes before it."""
    if not issubclass(kind, KeyboardInterrupt):
        _previous_hook(kind, error, trace)
        return
    os.write(2, b"stopped by Ctrl-C\n")
    os._exit(130)


sys.excepthook = _end_at_ctrl_c
for _stream in (sys.stdout, sys.stderr):  # a terminal or pipe of another encoding has no →, ≤ or name in Japanese
    if isinstance(_stream, io.TextIOWrapper) and _stream.errors == "strict":
        _stream.reconfigure(errors="backslashreplace")
