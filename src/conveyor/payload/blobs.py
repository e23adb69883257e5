"""Stores of large bodies outside Redis: the protocol, and a store that keeps files."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from conveyor.errors import ConfigurationError, StoreUnavailable

_NAME = re.compile(r"[0-9a-f]{32}")


class BlobUnavailable(StoreUnavailable):
    """The store of large bodies did not answer; nothing was pushed, and a job that needs it is tried again."""


@runtime_checkable
class BlobStore(Protocol):
    """
    A store of large bodies. Names are 32 hexadecimal digits.

    The methods block and are called from several threads. Every exception in them counts as a passing fault.
    """

    def put(self, name: str, data: bytes) -> None:
        """Store *data* so that it survives a power cut, then return."""

    def get(self, name: str, most: int) -> bytes | None:
        """Return the first *most* bytes, None when the name is not there."""

    def delete(self, name: str) -> None:
        """Remove a name. One that is not there is no error."""

    def old(self, seconds: float) -> Iterator[str]:
        """Yield the names of bodies that were stored more than *seconds* ago."""


class FileStore:
    """A store of large bodies as files of one directory, which producers and workers share (one machine, or NFS)."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Use a directory, which is created when it is missing. Raises ConfigurationError."""
        self.directory = Path(directory).expanduser().resolve()
        try:
            missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in missing:
                _sync(path.parent)
        except OSError as error:
            raise ConfigurationError(f"FileStore({str(directory)!r}) cannot be used: {error.strerror}.") from None

    def __repr__(self) -> str:
        return f"FileStore({str(self.directory)!r})"

    def put(self, name: str, data: bytes) -> None:
        """Write a draft, sync it, and rename it: no reader ever gets half of a file."""
        path = self._path(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        draft = path.with_name(f".{name}.{secrets.token_hex(4)}")
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        for folder in (path.parent, self.directory):
            _sync(folder)

    def get(self, name: str, most: int) -> bytes | None:
        """Return the first *most* bytes of a file, None when the file is missing and the directory is there."""
        try:
            with self._path(name).open("rb") as file:
                return file.read(most)
        except FileNotFoundError:
            if self.directory.is_dir():
                return None
            raise  # the directory is not mounted, which says nothing about the file

    def delete(self, name: str) -> None:
        """Remove a file."""
        self._path(name).unlink(missing_ok=True)

    def old(self, seconds: float) -> Iterator[str]:
        """Yield the names of files written more than *seconds* ago; remove old drafts of dead writers on the way."""
        before = time.time() - seconds
        for path in self.directory.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    if path.name.startswith("."):
                        path.unlink(missing_ok=True)
                    elif _NAME.fullmatch(path.name):
                        yield path.name

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):  # it may come from Redis, and must not lead out of the directory
            raise ValueError("a name in this store is 32 hexadecimal digits")
        return self.directory / name[:2] / name


def new_name() -> str:
    """Return a new random name."""
    return secrets.token_hex(16)


def is_name(name: str) -> bool:
    """Tell whether *name* has the form of a name."""
    return _NAME.fullmatch(name) is not None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
