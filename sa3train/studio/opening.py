"""Who may reach the studio."""

from dataclasses import dataclass

from sa3train.studio.workplace import StudioError

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
