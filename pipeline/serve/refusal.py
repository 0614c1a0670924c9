"""What is refused to whoever asks over HTTP, and by which status."""

from __future__ import annotations

from ...stores.errors import CorruptStore, DiskFull, ForebayError, SchemaError, StorageError


class Refused(SchemaError):
    """Something that was asked for and cannot be given, with the status of HTTP that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: Exception) -> int | None:
    """The status for an error whose message tells all there is to tell; None for a fault of forebay's own."""
    from ...stages.dictionaries.errors import DictionaryError
    from ...stages.models.errors import HookError, ModelError

    if isinstance(error, Refused):
        return error.status
    if isinstance(error, CorruptStore | StorageError | DiskFull | OSError):
        return 500
    return 409 if isinstance(error, ForebayError | ModelError | HookError | DictionaryError) else None
