"""Sizes as people write them."""

from __future__ import annotations

import re

from conveyor.errors import ConfigurationError

Size = int | str
"""Bytes, or a text: ``"256KiB"``, ``"16MiB"``."""

_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "kB": 1000, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
_TEXT = re.compile(r"(\d{1,12}) ?(B|[KMG]iB|[kKMG]B)")


def size(value: object, name: str) -> int:
    """Return a size of at least one byte; raises ConfigurationError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = _TEXT.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[1].strip("0") == "":
        raise ConfigurationError(f"{name} must be a number of bytes or a text such as '256KiB', not {value!r}.")
    return int(found[1]) * _UNITS[found[2]]
