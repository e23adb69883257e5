"""Limits and keys as values."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from conveyor.errors import ConfigurationError
from conveyor.messaging.limits import Concurrency, Debounce, Rate, Unique


def test_values_keep_what_they_were_given() -> None:
    """Durations are read once, when the value is made; equal values are equal and can be keys; none can be changed."""
    rate = Rate(100, "1s", by="tenant", cost="tokens")

    assert (rate.per_ms, Debounce("5s", by="page", max_wait="1m").max_wait_ms, Debounce(2).wait_ms) == (
        1000,
        60_000,
        2000,
    )
    assert {rate, Rate(100, "1s", by="tenant", cost="tokens")} == {rate}
    assert Unique(by=("user",), until="5m", conflict="raise") != Unique()
    value: Any = rate
    with pytest.raises(FrozenInstanceError):
        value.n = 5


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Rate, {"n": 0, "per": 1}), (Rate, {"n": 1.5, "per": 1}), (Rate, {"n": 1, "per": 0}),
        (Rate, {"n": 1, "per": "x"}), (Rate, {"n": 1, "per": 1, "by": "not a name"}), (Concurrency, {"n": True}),
        (Concurrency, {"n": 1, "by": 5}), (Unique, {"by": "user"}), (Unique, {"by": (1,)}), (Unique, {"until": "end"}),
        (Unique, {"conflict": "drop"}), (Debounce, {"wait": 0}), (Debounce, {"wait": "1m", "max_wait": "1s"}),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    """A limit that no queue could enforce is refused where it is written."""
    with pytest.raises(ConfigurationError):
        kind(**wrong)
