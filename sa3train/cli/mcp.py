"""`sa3-mcp`: a Model Context Protocol server on stdin and stdout, so that an agent can train adapters unattended.

sa3-mcp --workspace work --folder my_audio --minutes 60 --gigabytes 5

The agent reads the folders and writes only to the workspace, which sa3-studio shows too. It starts our commands and
nothing else, one at a time, offline, for so many minutes in all and so much disk; what runs then is stopped, and so it
is when the server ends. docs/runs.md has the configuration of a client.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sa3train.cli.hydra_app import run_job
from sa3train.cli.parser import CommandParser
from sa3train.cli.version import add_version
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.text import suggest_name

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

    from sa3train.cli.mcp_tools import Tools

INSTRUCTIONS = """Train LoRA adapters for Stable Audio 3 and find out which is best. The usual order: status, audit,
encode, plan, train, watch_run until it has ended, evaluate, generate. Each call returns within a minute; what takes
longer goes on, and watch_job or watch_run waits for it. One job runs at a time."""


def main(argv: list[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code.
    """
    arguments = build_parser().parse_args(argv)
    return run_job(lambda: _run(arguments))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line.

    Returns:
        The parser.
    """
    text = "Serve training as tools of the Model Context Protocol, on stdin and stdout."
    flags = CommandParser(prog="sa3-mcp", description=text)
    add_version(flags)
    flags.add_argument("--workspace", required=True, metavar="FOLDER", help="the one folder that is written to")
    text = "folder to read, such as one of audio; repeatable"
    flags.add_argument("--folder", action="append", default=[], metavar="FOLDER", help=text)
    flags.add_argument("--minutes", type=float, required=True, help="time of all jobs together")
    flags.add_argument("--gigabytes", type=float, required=True, help="how much the workspace may grow")
    flags.add_argument("--model", default="nano", help="model that may be used besides those at hand (default: nano)")
    return flags


def _run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("mcp") is None:
        raise ConfigError('sa3-mcp needs the package mcp. Run: pip install "sa3train[mcp]"')
    from sa3train.cli.budget import Budget
    from sa3train.cli.mcp_tools import Tools
    from sa3train.studio.server.workspace import Workspace

    workspace = Workspace.create(arguments.workspace, arguments.folder, arguments.model)
    # What is cached counts as disk used, and nothing is downloaded.
    os.environ["SA3TRAIN_CACHE"] = str(workspace.home / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    budget = Budget(workspace.folder, arguments.minutes, arguments.gigabytes)
    with contextlib.closing(budget):
        build_server(Tools(workspace, budget)).run("stdio")
    return 0


def build_server(tools: "Tools") -> "MCPServer[Any]":
    """Build the server: each public method of `Tools` is a tool.

    Args:
        tools: The tools.

    Returns:
        The server.
    """
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    def explain(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except SA3Error as error:  # the words of any other error do not reach the client
                raise ToolError(str(error)) from error

        return call

    class StrictServer(MCPServer[Any]):
        """A server that refuses arguments that a tool does not have, which others ignore."""

        async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
            known = inspect.signature(methods[name]).parameters if name in methods else arguments
            if unknown := sorted(arguments.keys() - known.keys()):
                hint = suggest_name(unknown[0], known, f"It has: {', '.join(known)}.")
                raise ToolError(f"{name} has no argument {unknown[0]}. {hint}")
            return await super().call_tool(name, arguments, context)

    methods = {name: method for name, method in inspect.getmembers(tools, inspect.ismethod) if name[0] != "_"}
    server = StrictServer("sa3train", instructions=INSTRUCTIONS, log_level="WARNING")
    for method in methods.values():
        server.tool()(explain(method))
    return server


if __name__ == "__main__":
    sys.exit(main())
