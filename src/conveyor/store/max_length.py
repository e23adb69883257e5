"""The maximum length of a queue as a push carries it, and a producer's place in the line of those that wait for room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self, TypeVar

T = TypeVar("T")
Full = Literal["raise", "block", "drop-oldest"]


class MaxLength(int):
    """
    A maximum length, 0: none. `full` is what a push beyond it does, `place` where its producer stands in the line.

    `argument` is what push.lua reads.
    """

    full: Full
    place: str
    argument: str

    def __new__(cls, count: int, full: Full = "raise", place: str = "") -> Self:
        """Make one."""
        made = super().__new__(cls, count)
        made.full, made.place = full, place
        words = [f"{count:d}"] if full == "raise" else [f"{count:d}", full]
        made.argument = " ".join([*words, place] if place else words)
        return made

    def at(self, place: str) -> MaxLength:
        """Return the same for a producer that stands at *place*."""
        return MaxLength(self, self.full, place)

    def parts(self, entries: Sequence[T]) -> list[Sequence[T]]:
        """Return *entries* as one part, or in small ones where they are more than the queue ever takes."""
        step = max(1, len(entries) if len(entries) <= self else self // 4)
        return [entries[first : first + step] for first in range(0, len(entries), step)]

    def part(self, partitions: int) -> MaxLength:
        """Return the maximum length of each of so many partitions."""
        return MaxLength(self // partitions, self.full)


UNBOUNDED = MaxLength(0)
AS_DECLARED = -1
"""For a push by a program that declares no maximum length: the one that other producers have declared."""
NO_LIMIT = -2
"""For a push that no maximum length refuses, an operator's neither."""
_WORDS = {AS_DECLARED: "?", NO_LIMIT: "!"}


def declared_length(max_length: int) -> int:
    """Return a maximum length as it was declared, without a place in the line."""
    return (
        MaxLength(max_length, max_length.full) if isinstance(max_length, MaxLength) and max_length.place else max_length
    )


def argument_of(max_length: int) -> str:
    """Return the argument of push.lua for a maximum length."""
    return max_length.argument if isinstance(max_length, MaxLength) else _WORDS.get(max_length) or str(max_length)
