"""`sa3-studio`: a local web page to play adapters, watch training runs, and prepare data.

sa3-studio my_audio                            reads my_audio, writes to ./sa3-studio, at http://127.0.0.1:7860
sa3-studio my_audio runs --workspace ~/studio  reads these two folders, writes to ~/studio
SA3_STUDIO_PASSWORD=... sa3-studio --host 0.0.0.0   for others on the network, with a password
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser
from sa3train.cli.version import add_version
from sa3train.core.config import DEVICES
from sa3train.core.errors import ConfigError
from sa3train.core.signals import Interrupted
from sa3train.models.hub import choose_weights

if TYPE_CHECKING:
    from sa3train.studio.server.jobs import Job

PASSWORD = "SA3_STUDIO_PASSWORD"


def build_parser() -> argparse.ArgumentParser:
    """Build the command-line parser.

    Returns:
        The parser.
    """
    parser = CommandParser(
        prog="sa3-studio",
        description="A local web page to play adapters, watch training runs, and prepare data.",
        epilog="It reads the FOLDERs, and writes runs, latents and results to the workspace. Captions are saved beside "
        "their audio. It touches nothing else.",
    )
    add = parser.add_argument
    add("folders", nargs="*", default=["."], metavar="FOLDER", help="folders of yours to read (default: .)")
    add("--workspace", default="sa3-studio", help="new or earlier folder for all that it makes (default: ./sa3-studio)")
    add("--model", default="nano", help="model selected first, name or folder (default: nano)")
    add("--weights", choices=("released", "mlx"), help="mlx: open fp16 packs of that model, without an account")
    add("--device", help=f"{DEVICES} (default: the best that works)")
    add("--port", type=int, help="default: the first free port from 7860")
    add("--host", default="127.0.0.1", help="address to listen on instead of 127.0.0.1; requires a password")
    add("--share", action="store_true", help="open a public link through Gradio's servers; requires a password")
    add("--password", help=f"password to ask for; safer in the variable {PASSWORD}, which other users cannot see")
    add_version(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the command's name. None: those of the process.

    Returns:
        Exit code: 130 after Ctrl-C, 143 after SIGTERM, 1 for an error, 2 for invalid arguments.
    """
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: _serve(arguments))


def _serve(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError('The studio needs Gradio. Run: pip install "sa3train[ui]"')
    model = choose_weights(arguments.model, arguments.weights)
    from sa3train.studio.server.access import AccessSettings
    from sa3train.studio.server.workspace import Workspace

    password = arguments.password or os.environ.get(PASSWORD) or None
    access = AccessSettings(arguments.host, arguments.port, arguments.share, password)
    access.check()
    workspace = Workspace.create(arguments.workspace, arguments.folders, model, arguments.device)
    from sa3train.studio.app import describe_work, run_studio  # takes seconds: after the checks
    from sa3train.studio.server.jobs import finish_jobs

    with run_studio(workspace, access) as address:
        _note_other_studio(workspace.home / "server", address)
        sources = ", ".join(map(str, workspace.sources))
        try:
            print(f"Studio running at {address}. Press Ctrl-C to stop.\n  reads: {sources}", flush=True)
            print(f"  writes to its workspace: {workspace.folder}", flush=True)
            while True:  # unlike an event, it is interrupted by Ctrl-C on Windows too
                time.sleep(1)
        except Interrupted:
            _end_work(describe_work(workspace), finish_jobs())
            raise


def _note_other_studio(folder: Path, address: str) -> None:
    """Say which other studio uses the workspace; the latest is recorded in `folder`."""
    from sa3train.core import processes

    if pid := processes.get_running_pid(folder):
        other = processes.read_record(folder).get("address")
        print(f"note: another studio uses this workspace, and each shows what the other makes: PID {pid}, {other}.")
        print("  To keep them apart, stop one and start it with --workspace FOLDER.", flush=True)
    processes.record_this_process(folder, address=address)


def _end_work(going_on: list[str], unfinished: "list[Job]") -> None:
    """Say what goes on without the studio, and wait for what is computed inside it to be saved."""
    if going_on:
        print("These continue; sa3-studio finds them again at its next start:", *going_on, sep="\n  ", flush=True)
    for job in unfinished:
        print(f"Finishing {job.title!r}. Press Ctrl-C again to end at once.", flush=True)
        while not job.finished.wait(0.5):  # so that Ctrl-C is noticed on Windows too
            pass


if __name__ == "__main__":
    sys.exit(main())
