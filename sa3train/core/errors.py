"""Errors that a user may meet. Every message says what was wrong, where, and what to do."""

from collections.abc import Mapping
from typing import Any


class SA3Error(ValueError):
    """Base class of all errors that a user can cause and fix.

    Raised directly when no subclass fits, such as for a folder that cannot be written. Commands print such errors
    without a traceback and exit with code 1.
    """


class AudioError(SA3Error):
    """Raised when an audio file or array cannot be read, written or processed."""


class AdapterError(SA3Error):
    """Raised when an adapter file is damaged, or an adapter or its settings do not fit the model."""


class MissingBaseError(AdapterError):
    """Raised when an adapter needs its base model, and none was given."""


class CheckpointError(SA3Error):
    """Raised when a model name, folder or file cannot be resolved, or its tensors are not those of its config."""


class ConfigError(SA3Error):
    """Raised when a setting is unknown, of the wrong type, out of range, or would have no effect."""


class ConflictError(ConfigError):
    """Raised when settings exclude each other.

    Args:
        message: What is wrong, and what to do.
        off: The settings by full key, each with the value in which it leaves the others alone, or `...` for one that
            has no such value.
    """

    def __init__(self, message: str, off: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.off = dict(off)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.off)


class DataError(SA3Error):
    """Raised when a dataset, caption or shard is missing, damaged, or does not match the model or the run."""


class GenerationError(SA3Error):
    """Raised when settings of a generation are invalid, contradict each other, or do not suit the model."""


class LibraryError(SA3Error):
    """Raised when an installed library cannot be imported, or lacks an operator on a device."""


class MemoryShortageError(SA3Error):
    """Raised when the memory of a device or of the machine is exhausted; the message suggests fixes."""
