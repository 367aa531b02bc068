"""Access control of the studio's server.

It serves files of its own folders only, answers requests to its own name only, and its pages load nothing from
elsewhere.
"""

from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
            await self.app(scope, receive, _add_headers(send, PAGE_POLICY if path is None else FILE_POLICY))


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
    """Where the server listens: on this machine only by default, to others with a password only.

    Args:
        host: Address to listen on.
        port: Port. None: the first free one.
        share: Also open a public link through Gradio's servers.
        password: Password to ask for. None: none.
    """

    host: str = LOCAL
    port: int | None = None
    share: bool = False
    password: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether others than this machine's users can reach the server."""
        return self.share or self.host not in (LOCAL, "localhost", "::1")

    def check(self) -> None:
        """Refuse an open server without a proper password.

        Raises:
            StudioError: The server is open and has no password, or the password is too short.
        """
        if self.is_open and not self.password:
            raise StudioError(
                "A studio that others can reach needs a password. Set --password or SA3_STUDIO_PASSWORD. "
                "Without --host and --share it listens on this machine only."
            )
        if self.password is not None and len(self.password) < MIN_PASSWORD_LENGTH:
            raise StudioError(f"The password is too short. Use at least {MIN_PASSWORD_LENGTH} characters.")
