"""Errors a user may meet. Every message says what was wrong, where, and what to do."""


class SA3Error(ValueError):
    """Base of every error that a user can cause and mend; jobs print it without a traceback and exit with 1."""


class AudioError(SA3Error):
    """An audio file or array that cannot be read, written or used."""


class AdapterError(SA3Error):
    """An adapter file or setting that does not fit the model it is meant for."""


class CheckpointError(SA3Error):
    """A model folder, name or file that cannot be resolved or does not hold what it should."""


class ConfigError(SA3Error):
    """A setting that is unknown, out of range, or would have no effect."""


class DataError(SA3Error):
    """A dataset, caption or shard that is missing, damaged or does not match."""


class RequestError(SA3Error):
    """A generation request that cannot be carried out as asked."""


class MemoryShortageError(SA3Error):
    """A device whose memory does not suffice for what was asked."""
