"""
Sees changes of source files, for `--reload`: a look at the times of all Python files, twice a second.

No notification by the kernel is used: those do not cross into containers and shared folders, and a look at some thousand
files takes milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

LOOK_EVERY = 0.5
MOST_FILES = 20_000
_SKIPPED = {"node_modules", "site-packages", "__pycache__", "venv", "build", "dist"}


class SourceWatcher:
    """The Python files below some folders, and when each was changed."""

    def __init__(self, folders: tuple[Path, ...]) -> None:
        self._folders = folders
        self._times = dict(self._look())
        self._looked_at = monotonic()

    def changed(self) -> list[str]:
        """Return the files that came, went or changed since the last look; [] where it was less than `LOOK_EVERY` ago."""
        now = monotonic()
        if now - self._looked_at < LOOK_EVERY:
            return []
        before, self._times, self._looked_at = self._times, dict(self._look()), now
        return sorted(path for path in before.keys() | self._times.keys() if before.get(path) != self._times.get(path))

    def _look(self) -> Iterator[tuple[str, tuple[int, int]]]:
        folders, left = [str(folder) for folder in self._folders], MOST_FILES
        while folders and left > 0:
            try:
                entries = list(os.scandir(folders.pop()))
            except OSError:
                continue  # it went meanwhile
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _SKIPPED:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.endswith(".py"):
                    left -= 1
                    try:
                        facts = entry.stat()
                    except OSError:
                        continue
                    yield entry.path, (facts.st_mtime_ns, facts.st_size)
