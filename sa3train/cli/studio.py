"""`sa3-studio`: a local web page to play adapters, watch training runs, and prepare data.

sa3-studio                                     the current folder, with nano, at http://127.0.0.1:7860
sa3-studio runs my_audio --model small-music   these folders and no others
SA3_STUDIO_PASSWORD=... sa3-studio --host 0.0.0.0   for others on the network, with a password
"""

import argparse
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence

from sa3train.cli.hydra_app import run_job
from sa3train.core.errors import ConfigError

PASSWORD = "SA3_STUDIO_PASSWORD"


def build_parser() -> argparse.ArgumentParser:
    """Build the command-line parser.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(
        prog="sa3-studio",
        description="A local web page to play adapters, watch training runs, and prepare data.",
        epilog="It reads and writes only inside the FOLDERs. Results are stored in .sa3-studio in the first one.",
    )
    add = parser.add_argument
    add("folders", nargs="*", default=["."], metavar="FOLDER", help="folders to work in (default: .)")
    add("--model", default="nano", help="model selected first, name or folder (default: nano)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best available)")
    add("--port", type=int, help="default: the first free port from 7860")
    add("--host", default="127.0.0.1", help="address to listen on instead of 127.0.0.1; requires a password")
    add("--share", action="store_true", help="open a public link through Gradio's servers; requires a password")
    add("--password", help=f"password to ask for; safer in the variable {PASSWORD}, which other users cannot see")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the command's name. None: those of the process.

    Returns:
        Exit code: 0 after an interrupt, 1 for an error, 2 for invalid arguments.
    """
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: _serve(arguments))


def _serve(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError('The studio needs Gradio. Run: pip install "sa3train[ui]"')
    from sa3train.studio.server.access import AccessSettings
    from sa3train.studio.server.workspace import Workspace

    password = arguments.password or os.environ.get(PASSWORD) or None
    access = AccessSettings(arguments.host, arguments.port, arguments.share, password)
    access.check()
    workspace = Workspace.create(arguments.folders, arguments.model, arguments.device)
    from sa3train.studio.app import run_studio  # takes seconds: after the checks

    with run_studio(workspace, access) as address:
        folders = ", ".join(map(str, workspace.roots))
        print(f"Studio running at {address} (folders: {folders}). Press Ctrl-C to stop.", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("Stopped. Training runs and other jobs that were started continue.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
