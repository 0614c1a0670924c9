"""To be written."""

from ..place import Place
from .format import Format, Hooks


def _read(place: Place, hooks: Hooks):  # type: ignore
    raise NotImplementedError


FORMAT = Format(recognizes=lambda place: False, read=_read)
