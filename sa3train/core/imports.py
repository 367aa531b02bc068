"""A library that cannot be loaded becomes one line: which versions belong together, or which variable to correct."""

import contextlib
import importlib.metadata
import linecache
import os
import re
from collections.abc import Iterator
from types import FrameType, TracebackType

from sa3train.core.errors import ConfigError, LibraryError, SA3Error
from sa3train.core.text import shorten

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
    """Turn failures to import a library into `LibraryError`, and to read an environment variable into `ConfigError`.

    Only failures that arise while a library of `PARTNERS` is being imported are translated, at any depth: where peft
    fails because it imports a broken torchaudio, torchaudio is named. Many libraries read numbers from the environment
    in their import, and every rank of a training reads its own.

    Yields:
        Nothing; import inside the block.

    Raises:
        LibraryError: A library is missing or cannot be loaded.
        ConfigError: An environment variable is not what is expected of it.
    """
    try:
        yield
    except ValueError as error:
        variable = None if isinstance(error, SA3Error) else _find_variable(error)
        if variable is None:
            raise
        raise ConfigError(
            f"the environment variable {variable}={shorten(repr(os.environ[variable]))} is not valid "
            f"({shorten(str(error), 200)}). Correct it or unset it."
        ) from error
    except (ImportError, OSError) as error:
        name = _find_library(error)
        if name is None:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        installed = ", ".join(f"{library} {get_version(library)}" for library in (*PARTNERS[name], name))
        raise LibraryError(
            f"{name} cannot be loaded ({reason[0].rstrip('.')[:200]}). Installed: {installed}. {_advise(name)}."
        ) from error


def _iterate_calls(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    step: TracebackType | None = error.__traceback__
    while step is not None:
        yield step.tb_frame, step.tb_lineno
        step = step.tb_next


def _find_library(error: ImportError | OSError) -> str | None:
    """Find the library that failed: the innermost one whose module was being executed."""
    found = error.name if isinstance(error, ModuleNotFoundError) else None
    for frame, _ in _iterate_calls(error):
        library = str(frame.f_globals.get("__name__")).partition(".")[0]
        if library in PARTNERS and frame.f_code.co_name == "<module>":
            found = library
    return found if found in PARTNERS else None


def _find_variable(error: ValueError) -> str | None:
    """Find the environment variable whose value is in the message, and whose name in a line of code that failed.

    Where no line names one (tqdm puts the names together), it is the only one with such a value in an import.
    """
    calls, message = list(_iterate_calls(error)), str(error)
    found = [name for name, value in os.environ.items() if value and repr(value) in message]
    lines = " ".join(linecache.getline(frame.f_code.co_filename, number) for frame, number in calls)
    named = [name for name in found if re.search(rf"\b{re.escape(name)}\b", lines)]
    is_import = any(frame.f_code.co_name == "<module>" for frame, _ in calls)
    return named[0] if named else found[0] if is_import and len(found) == 1 else None


def get_version(library: str) -> str:
    """Get the installed version of a library, without importing it.

    Args:
        library: Its name.

    Returns:
        The version, or "(none)".
    """
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
