"""torchrun with our exit codes: 128 + the signal that stopped it, and no traceback beside a rank's own error.

python -m sa3train.cli.ranks --standalone --nproc-per-node=2 -m sa3train.cli.train data=DIR
"""

import sys
from collections.abc import Sequence

SHUTDOWN_SECONDS = 600
"""How long the ranks have to save after a signal; torchrun's own 30 seconds may be less than a step."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun.

    Args:
        argv: Its arguments; None for those of the process.

    Returns:
        Exit code: 0, 1 when a rank failed, or 128 + the signal.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    parser, arguments = get_args_parser(), list(sys.argv[1:] if argv is None else argv)
    if "--shutdown-timeout" in parser.format_usage():
        arguments = [f"--shutdown-timeout={SHUTDOWN_SECONDS}", *arguments]
    try:
        run(parser.parse_args(arguments))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        if any(failure.exitcode < 0 for failure in error.failures.values()):  # killed, without a word of its own
            print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
