"""`sa3-studio`: a local page to play adapters, watch runs and handle data.

sa3-studio                                     the current folder, on nano, at http://127.0.0.1:7860
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
DEFAULT_MODEL = "nano"
LOCAL = "127.0.0.1"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sa3-studio",
        description="A local page to play adapters, watch runs and handle data.",
        epilog="It reads and writes nothing outside FOLDERs. Results are kept in .sa3-studio in the first of them.",
    )
    parser.add_argument("folders", nargs="*", default=["."], metavar="FOLDER", help="folders to work in (default: .)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the model first chosen, name or folder (default: nano)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--host", default=LOCAL, help="listen here instead of 127.0.0.1; needs a password")
    parser.add_argument("--share", action="store_true", help="a public link through Gradio's servers; needs a password")
    parser.add_argument(
        "--password", help=f"ask for it; better in the variable {PASSWORD}, where no other user sees it"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted: 0 then, 1 with a line on what was wrong, 2 for misused flags."""
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: studio(arguments))


def studio(arguments: argparse.Namespace) -> int:
    """Build the page and serve it. Raises `SA3Error` for folders, ports and openings that cannot be."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError('the studio needs Gradio: pip install "sa3train[ui]".')
    from sa3train.studio.server.access import Opening
    from sa3train.studio.server.workspace import Workspace

    opening = Opening(
        arguments.host, arguments.port, arguments.share, arguments.password or os.environ.get(PASSWORD) or None
    )
    opening.check()
    workspace = Workspace.at(arguments.folders, arguments.model, arguments.device)
    from sa3train.studio.app import build_app, serve

    page = build_app(workspace)
    address = serve(page, workspace, opening)
    print(f"The studio is at {address}  (folders: {', '.join(map(str, workspace.roots))}; Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ended; runs that were started go on")
    finally:
        page.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
