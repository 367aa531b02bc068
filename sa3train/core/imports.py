"""A library that is installed but cannot be loaded becomes one line that says which versions belong together."""

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator
from types import TracebackType

from sa3train.core.errors import LibraryError

PARTNERS = {
    "lightning": ("torch",),
    "peft": ("torch", "transformers"),
    "soundfile": (),
    "torch": (),
    "torchaudio": ("torch",),
    "transformers": ("torch",),
}
"""Libraries that are explained, and those whose versions have to suit them."""

ADVICE = {
    "soundfile": "It needs libsndfile: reinstall soundfile with pip, or install libsndfile (apt install libsndfile1)",
    "torchaudio": "torchaudio 2.11.1 belongs with torch 2.14 or 2.15, and torchaudio 2.11.0 with torch 2.11.0: install "
    "one of these pairs with pip",
}
"""What to do, where that is not simply to install what sa3train requires."""


@contextlib.contextmanager
def explain_imports() -> Iterator[None]:
    """Turn failures to import a library into `LibraryError`.

    Only failures that arise while a library of `PARTNERS` is being imported are translated, at any depth: where peft
    fails because it imports a broken torchaudio, torchaudio is named.

    Yields:
        Nothing; import inside the block.

    Raises:
        LibraryError: A library is missing or cannot be loaded.
    """
    try:
        yield
    except (ImportError, OSError) as error:
        name = _find_library(error)
        if name is None:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        installed = ", ".join(f"{library} {_get_version(library)}" for library in (*PARTNERS[name], name))
        raise LibraryError(
            f"{name} cannot be loaded ({reason[0].rstrip('.')[:200]}). Installed: {installed}. {_advise(name)}."
        ) from error


def _find_library(error: ImportError | OSError) -> str | None:
    """Find the library that failed: the innermost one whose module was being executed."""
    found = error.name if isinstance(error, ModuleNotFoundError) else None
    step: TracebackType | None = error.__traceback__
    while step is not None:
        library = str(step.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if library in PARTNERS and step.tb_frame.f_code.co_name == "<module>":
            found = library
        step = step.tb_next
    return found if found in PARTNERS else None


def _get_version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(none)"


def _advise(library: str) -> str:
    if library in ADVICE:
        return ADVICE[library]
    requirements = importlib.metadata.requires("sa3train") or []
    wanted = [text.partition(";")[0].strip() for text in requirements if re.match(rf"{library}\b", text)]
    return f"sa3train needs {wanted[0] if wanted else library}: reinstall sa3train with pip"
