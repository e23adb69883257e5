"""Where the commands and replies of a Redis connection begin and end, without understanding them."""

from __future__ import annotations

_LINES = b"+-:_#,("
_BULKS = b"$=!"
_AGGREGATES = {ord("*"): 1, ord("~"): 1, ord(">"): 1, ord("%"): 2, ord("|"): 2}


class RespSplitter:
    """Follows one direction of a connection, RESP2 or RESP3, however its bytes are cut into chunks."""

    def __init__(self) -> None:
        """Begin with the connection."""
        self._line = bytearray()  # a header whose end has not come yet
        self._skip = 0  # bytes of a bulk that are still to come, its line end included
        self._need = 0  # values still missing to the whole; 0 between two wholes
        self._first: bytes | None = None  # the first bulk: a command's name
        self._naming = False
        self._push = False

    def feed(self, data: bytes) -> list[tuple[int, str, bool]]:
        """Return `(offset, name, push)` for each whole that ends within *data*: it ends before that offset.

        The name is that of a command, in capitals; of a reply it means nothing. A push is a message nobody asked for.
        """
        found: list[tuple[int, str, bool]] = []
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                if self._naming and self._first is not None:
                    self._first += data[at : at + step]
                self._skip -= step
                at += step
                if self._skip:
                    break
                self._naming = False
                self._settle(at, found)
                continue
            end = data.find(b"\n", at)
            if end < 0:
                self._line += data[at:]
                break
            line = bytes(self._line) + data[at:end]
            self._line.clear()
            at = end + 1
            if self._header(line.rstrip(b"\r")):
                self._settle(at, found)
        return found

    def _header(self, line: bytes) -> bool:
        # Read the head of a value; True when the value is complete with it.
        begins = self._need == 0
        if begins:
            self._need, self._first, self._push = 1, None, False
        kind = line[0] if line else 0
        if kind in _AGGREGATES:
            size = int(line[1:])
            if begins:
                self._push = kind == ord(">")
            # An attribute stands before the value it describes and is none itself.
            self._need += max(size, 0) * _AGGREGATES[kind] + (kind == ord("|"))
            return True
        if kind in _BULKS:
            size = int(line[1:])
            if size < 0:
                return True
            self._skip = size + 2
            self._naming = self._first is None
            if self._naming:
                self._first = b""
            return False
        if begins and kind not in _LINES:
            self._first = line.split(b" ")[0]  # a command typed by hand
        return True

    def _settle(self, at: int, found: list[tuple[int, str, bool]]) -> None:
        self._need -= 1
        if self._need == 0:
            name = (self._first or b"").strip().upper().decode("latin-1")
            found.append((at, name, self._push))
