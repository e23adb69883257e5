"""Divides turns among queues by their weights: smooth weighted round robin, as nginx does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

K = TypeVar("K")


class WeightedTurns(Generic[K]):
    """
    Decides which of several queues has its turn, so that each gets turns by its weight.

    Each call names the rivals, which are the queues that may have work now, with their weights. A queue that has none
    gathers no claim meanwhile.
    """

    def __init__(self) -> None:
        self._credit: dict[K, float] = {}

    def next(self, rivals: Mapping[K, float]) -> K:
        """Return the queue whose turn it is: the first of those with the most credit. Nothing is counted."""
        return max(rivals, key=lambda one: self._credit.get(one, 0.0))

    def pick(self, rivals: Mapping[K, float]) -> K:
        """Return the queue whose turn it is, and count that turn."""
        credit = self._credit
        for one, weight in rivals.items():
            credit[one] = credit.get(one, 0.0) + weight
        picked = self.next(rivals)
        credit[picked] -= sum(rivals.values())
        return picked

    def count(self, rivals: Mapping[K, float], taken: K, turns: int) -> None:
        """Count *turns* of the queue *taken*, one of *rivals*, that were not picked here."""
        credit = self._credit
        for one, weight in rivals.items():
            credit[one] = credit.get(one, 0.0) + turns * weight
        credit[taken] -= turns * sum(rivals.values())

    def split(self, turns: int, rivals: Mapping[K, float]) -> dict[K, int]:
        """Return how many of so many *turns* each of *rivals* may have: its part, and what is left over by credit."""
        total = sum(rivals.values())
        parts = {one: turns * weight / total for one, weight in rivals.items()}
        shares = {one: int(part) for one, part in parts.items()}
        claims = {one: self._credit.get(one, 0.0) + (part - shares[one]) * total for one, part in parts.items()}
        for one in sorted(claims, key=claims.__getitem__, reverse=True)[: turns - sum(shares.values())]:
            shares[one] += 1
        return shares
