"""Where the studio works: the folders it may touch, and no others."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sa3train.errors import SA3Error

HOME = ".sa3-studio"
FILE_ROUTE = "/gradio_api/file="


class StudioError(SA3Error):
    """A wish of the page's user that cannot be granted."""


@dataclass(frozen=True)
class Workplace:
    """The folders of a studio and what it starts with.

    `roots`: whole folders that may be read and written. `home`: the studio's own folder (history, uploads), inside one
    of them. `model`: the name or folder first chosen. `device` None: the best there is.
    """

    roots: tuple[Path, ...]
    home: Path
    model: str = "nano"
    device: str | None = None

    @classmethod
    def at(cls, folders: Iterable[str | Path], model: str = "nano", device: str | None = None) -> "Workplace":
        """A workplace of existing `folders`; its home is `.sa3-studio` in the first. Raises `StudioError`."""
        roots = tuple(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
        if not roots:
            raise StudioError("the studio needs a folder to work in: name one or more.")
        for root in roots:
            if not root.is_dir():
                raise StudioError(f"{root} is not a folder. Name folders that exist, or make it first.")
        home = roots[0] / HOME
        try:
            for part in ("history", "uploads"):
                (home / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudioError(
                f"cannot write into {roots[0]}: {error.strerror or error}. Results are kept there; name a folder "
                f"that you may write to first."
            ) from error
        return cls(roots, home.resolve(), model, device)

    @property
    def history(self) -> Path:
        """Where results are kept."""
        return self.home / "history"

    @property
    def uploads(self) -> Path:
        """Where files given through the page are kept."""
        return self.home / "uploads"

    def inside(self, path: str | Path) -> Path:
        """`path` in full, symbolic links followed; relative ones count from the first root.

        It need not exist. Raises `StudioError` when it lies, or a link on the way leads, outside the roots.
        """
        text = str(path).strip()
        if not text or "\0" in text:
            raise StudioError("give the path of a file or folder.")
        try:
            found = (self.roots[0] / Path(text).expanduser()).resolve()
        except (OSError, RuntimeError) as error:  # a loop of links, or a user that does not exist
            raise StudioError(f"{text} leads nowhere: {error}.") from error
        if not any(found.is_relative_to(root) for root in self.roots):
            folders = ", ".join(str(root) for root in self.roots)
            raise StudioError(
                f"{text} is outside the folders of this studio ({folders}). Copy it there, or start sa3-studio with "
                f"its folder too."
            )
        return found

    def file(self, path: str | Path, what: str = "file") -> Path:
        """As `inside`, for a file that must exist; `what` it is goes into the message."""
        found = self.inside(path)
        if not found.is_file():
            raise StudioError(f"there is no {what} {found}.")
        return found

    def folder(self, path: str | Path, what: str = "folder") -> Path:
        """As `inside`, for a folder that must exist."""
        found = self.inside(path)
        if not found.is_dir():
            raise StudioError(f"there is no {what} {found}.")
        return found

    def shown(self, path: str | Path) -> str:
        """`path` as short as it can be said: relative to the first root, or in full."""
        full = Path(path)
        return str(full.relative_to(self.roots[0])) if full.is_relative_to(self.roots[0]) else str(full)

    def url(self, path: str | Path) -> str:
        """The address at which the page finds the file `path`. Raises as `inside` does."""
        return FILE_ROUTE + quote(str(self.inside(path)))

    def served(self, path: str | Path) -> bool:
        """Whether the page may fetch `path`: in full, inside the roots, and no hidden file but the studio's own."""
        if not Path(path).is_absolute():  # also an address elsewhere, which Gradio would fetch
            return False
        try:
            found = self.inside(path)
        except StudioError:
            return False
        if found.is_relative_to(self.home):
            return True
        root = next(root for root in self.roots if found.is_relative_to(root))
        return not any(part.startswith(".") for part in found.relative_to(root).parts)

    def command(self, argv: Iterable[str | Path]) -> str:
        """A command line to paste into a shell."""
        return shlex.join(str(part) for part in argv)
