"""Who may reach the studio, and what its server lets through.

Files of its folders alone, requests to its own name alone, pages that load nothing from elsewhere.
"""

from dataclasses import dataclass
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sa3train.studio.server.workspace import StudioError, Workspace

FILE_MARKS = ("/file=", "/file/")
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'self'"
)
"""The page talks to its server only."""
SANDBOX = "sandbox allow-scripts allow-downloads"
"""A served file, such as a run's report, may run its own scripts, apart from the studio."""
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """ASGI middleware. `hosts`: names under which the server may be addressed, so that no web page elsewhere can pose
    as it by DNS; None: any (an open server has a password instead).
    """

    def __init__(self, app: ASGIApp, workspace: Workspace, hosts: tuple[str, ...] | None = LOCAL_NAMES) -> None:
        self.app, self.workspace, self.hosts = app, workspace, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        wanted = _wanted_file(scope["path"])
        if self.hosts is not None and _host(scope) not in self.hosts:
            await PlainTextResponse("this name is not the studio's", 421)(scope, receive, send)
        elif self.hosts is not None and _from_elsewhere(scope, self.hosts):
            await PlainTextResponse("this comes from another page", 403)(scope, receive, send)
        elif wanted is not None and not self.workspace.served(wanted):
            await PlainTextResponse("not a file of this studio's folders", 403)(scope, receive, send)
        else:
            policy = POLICY if wanted is None else SANDBOX
            await self.app(scope, receive, _with_policy(send, policy))


def _wanted_file(path: str) -> str | None:
    for mark in FILE_MARKS:
        _, found, wanted = path.partition(mark)
        if found:
            return wanted  # the server has decoded it already
    return None


def _host(scope: Scope) -> str:
    """The name the request was addressed to, without its port."""
    return _without_port(_header(scope, b"host"))


def _from_elsewhere(scope: Scope, hosts: tuple[str, ...]) -> bool:
    """Whether a page of another site makes the browser ask: such may neither upload nor start anything."""
    origin = _header(scope, b"origin")
    return bool(origin) and scope["method"] != "GET" and _without_port(origin.partition("://")[2]) not in hosts


def _header(scope: Scope, wanted: bytes) -> str:
    return next((value.decode("latin-1").lower() for name, value in scope["headers"] if name == wanted), "")


def _without_port(address: str) -> str:
    name, colon, port = address.rpartition(":")
    return name if colon and port.isdigit() else address


def _with_policy(send: Send, policy: str) -> Any:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = [
                (b"content-security-policy", policy.encode()),
                (b"x-content-type-options", b"nosniff"),
                (b"referrer-policy", b"no-referrer"),
            ]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sent


LOCAL = "127.0.0.1"
SHORTEST_PASSWORD = 8


@dataclass(frozen=True)
class Opening:
    """Where the server listens: to others with a `password` only, and not at all by default."""

    host: str = LOCAL
    port: int | None = None
    share: bool = False
    password: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether others than this machine's users can reach it."""
        return self.share or self.host not in (LOCAL, "localhost", "::1")

    def check(self) -> None:
        """Raise `StudioError` for an open server without a password worth the name."""
        if self.is_open and not self.password:
            raise StudioError(
                "a studio that others can reach needs a password: give --password, or set SA3_STUDIO_PASSWORD. "
                "Without --host and --share it listens on this machine only."
            )
        if self.password is not None and len(self.password) < SHORTEST_PASSWORD:
            raise StudioError(f"the password is too short: give {SHORTEST_PASSWORD} characters or more.")
