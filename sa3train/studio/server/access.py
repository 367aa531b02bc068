"""Access control of the studio's server.

It serves files of its own folders only, answers requests to its own name only, and its pages load nothing from
elsewhere.
"""

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sa3train.core.config import check_settings, setting
from sa3train.core.errors import SA3Error
from sa3train.studio.server.workspace import StudioError, Workspace

FILE_MARKS = ("/file=", "/file/")
PAGE_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'self'"
)
"""The page talks to its server only."""
FILE_POLICY = "sandbox allow-scripts allow-downloads"
"""A served file, such as a run's report, may run its own scripts, apart from the studio."""
LOCAL = "127.0.0.1"
LOCAL_NAMES = (LOCAL, "localhost", "[::1]")
MIN_PASSWORD_LENGTH = 8


class AccessMiddleware:
    """ASGI middleware that refuses requests from other sites and for files outside the workspace.

    Args:
        app: The wrapped application.
        workspace: Says which files may be served.
        hosts: Names under which the server may be addressed, so that no web page elsewhere can pose as it by DNS. None:
            any, for a server that is open to others and has a password instead.
    """

    def __init__(self, app: ASGIApp, workspace: Workspace, hosts: tuple[str, ...] | None = LOCAL_NAMES) -> None:
        self.app, self.workspace, self.hosts = app, workspace, hosts
        self.page = GZipMiddleware(
            app
        )  # Gradio compresses all but the page; parts of audio files must stay as they are

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = _get_requested_file(scope["path"])
        headers = Headers(scope=scope)
        if self.hosts is not None and _strip_port(headers.get("host", "").lower()) not in self.hosts:
            await PlainTextResponse("unknown host name", 421)(scope, receive, send)
        elif self.hosts is not None and _is_from_elsewhere(scope["method"], headers.get("origin", ""), self.hosts):
            await PlainTextResponse("cross-site request refused", 403)(scope, receive, send)
        elif path is not None and not self.workspace.is_served(path):
            await PlainTextResponse("file outside the studio's folders", 403)(scope, receive, send)
        else:
            app = self.page if scope["path"] == "/" else self.app
            if path is not None:
                scope = await self._replace_unplayable(scope, receive, path)
            await app(scope, receive, _add_headers(send, PAGE_POLICY if path is None else FILE_POLICY))

    async def _replace_unplayable(self, scope: Scope, receive: Receive, path: str) -> Scope:
        """Ask for the WAV of audio that no browser plays in its place, for those who may have the file itself."""
        file = self.workspace.resolve(path)
        if await run_in_threadpool(_is_unplayable, file) and await self._is_answered(scope, receive):
            with contextlib.suppress(SA3Error, OSError):  # else the file is served as it is
                found = scope["path"].removesuffix(path) + await run_in_threadpool(_convert, self.workspace, file)
                return {**scope, "path": found, "raw_path": quote(found).encode()}
        return scope

    async def _is_answered(self, scope: Scope, receive: Receive) -> bool:
        """Check by a request for the head alone whether the application, which asks for the password, sends a file."""
        found: list[int] = []

        async def note_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                found.append(message["status"])

        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]  # which is of the WAV
        await self.app({**scope, "method": "HEAD", "headers": headers}, receive, note_status)
        return bool(found) and found[0] < 400


def _is_unplayable(file: Path) -> bool:
    from sa3train.studio.server.playable import is_playable  # loads torch, which --help must not

    return file.is_file() and not is_playable(file)


def _convert(workspace: Workspace, file: Path) -> str:
    from sa3train.studio.server.playable import convert_audio

    return str(convert_audio(workspace, file))


def _get_requested_file(path: str) -> str | None:
    for mark in FILE_MARKS:
        _, found, file = path.partition(mark)
        if found:
            return file  # the server has decoded it already
    return None


def _is_from_elsewhere(method: str, origin: str, hosts: tuple[str, ...]) -> bool:
    """Check whether another site's page makes the browser ask: it may neither upload nor start anything."""
    return bool(origin) and method != "GET" and _strip_port(origin.lower().partition("://")[2]) not in hosts


def _strip_port(address: str) -> str:
    name, colon, port = address.rpartition(":")
    return name if colon and port.isdigit() else address


def _add_headers(send: Send, policy: str) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            headers["content-security-policy"] = policy
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
        await send(message)

    return send_with_headers


@dataclass(frozen=True)
class AccessSettings:
    """Where the server listens: on this machine only by default, to others with a password only."""

    host: str = setting(LOCAL, help="Address to listen on.", text="filled", characters=255)
    port: int | None = setting(None, help="Port; None: the first free one.", min=1, max=65535)
    share: bool = setting(False, help="Also open a public link through Gradio's servers.")
    password: str | None = setting(None, help="Password to ask for; None: none.")

    @property
    def is_open(self) -> bool:
        """Whether others than this machine's users can reach the server."""
        return self.share or self.host not in (LOCAL, "localhost")

    def check(self) -> None:
        """Refuse an address that no server can have, and an open server without a proper password.

        Raises:
            StudioError: The port is out of range, the server is open without a password, the password is too short, or
                this machine cannot listen there.
        """
        check_settings(self, error=StudioError)
        if self.is_open and not self.password:
            raise StudioError(
                "A studio that others can reach needs a password. Set --password or SA3_STUDIO_PASSWORD. "
                "Without --host and --share it listens on this machine only."
            )
        if self.password is not None and len(self.password) < MIN_PASSWORD_LENGTH:
            raise StudioError(f"The password is too short. Use at least {MIN_PASSWORD_LENGTH} characters.")
        if ":" in self.host:  # of which Gradio makes an address that nothing can read
            raise StudioError(f"host={self.host} must be a name or an IPv4 address, such as {LOCAL}.")
        try:  # Gradio would try a hundred ports one after the other
            family, *_, address = socket.getaddrinfo(self.host, self.port or 0, type=socket.SOCK_STREAM)[0]
            socket.create_server(address[:2], family=family).close()
        except (OSError, UnicodeError) as error:
            where = self.host if self.port is None else f"{self.host}, port {self.port}"
            raise StudioError(f"Cannot listen on {where}: {error}. Choose another --host or --port.") from error
