"""The lines that the jobs of a scenario write, read while they are written."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """One note of a job: `start 17 4711 123456789`."""

    kind: str
    number: int
    pid: int
    value: int


class Record:
    """The notes since this object was made."""

    def __init__(self, path: Path) -> None:
        """Begin at the present end of the file."""
        path.touch()
        self._path = path
        self._position = path.stat().st_size
        self._rest = b""

    def read(self) -> list[Line]:
        """Return the notes that are new since the last call, in the order written."""
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = self._rest + file.read()
            self._position = file.tell()
        *lines, self._rest = data.split(b"\n")
        fields = (line.decode().split() for line in lines)
        return [Line(kind, int(number), int(pid), int(value)) for kind, number, pid, value in fields]
