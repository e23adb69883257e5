"""Which releases of Redis and Valkey are too old, and which have a known hole."""

from __future__ import annotations

OLDEST = {"redis": (6, 2), "valkey": (7, 2)}

# Where CVE-2025-49844 is mended, with which a script of an authenticated user can run any code; all that came before it
# (CVE-2022-24735, CVE-2024-31228, -31449, -46981, CVE-2025-46817, -46818) is mended there too. Of 7.0 there is no such release.
_MENDED: dict[str, dict[tuple[int, ...], tuple[int, int, int]]] = {
    "redis": {(6, 2): (6, 2, 20), (7, 0): (7, 2, 11), (7, 2): (7, 2, 11), (7, 4): (7, 4, 6), (8, 0): (8, 0, 4), (8, 2): (8, 2, 2)},
    "valkey": {(7, 2): (7, 2, 11), (8, 0): (8, 0, 6), (8, 1): (8, 1, 4)},
}  # fmt: skip


def numbers(version: str) -> tuple[int, ...]:
    """Return the parts of a version."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def mended(family: str, version: str) -> str | None:
    """Return the first release without the hole that this one has; None when it has none."""
    own = numbers(version)
    found = _MENDED[family].get(own[:2])
    return ".".join(map(str, found)) if found is not None and len(own) > 2 and own < found else None
