"""Limits and keys as values."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from conveyor.errors import ConfigurationError
from conveyor.messaging.limits import Concurrency, Rate


def test_values_keep_what_they_were_given() -> None:
    """Durations are read once, when the value is made; equal values are equal and can be keys; none can be changed."""
    rate = Rate(100, "1s", by="tenant", cost="tokens")

    assert rate.per_ms == 1000
    assert {rate, Rate(100, "1s", by="tenant", cost="tokens")} == {rate}
    value: Any = rate
    with pytest.raises(FrozenInstanceError):
        value.n = 5


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Rate, {"n": 0, "per": 1}), (Rate, {"n": 1.5, "per": 1}), (Rate, {"n": 1, "per": 0}),
        (Rate, {"n": 1, "per": "x"}), (Rate, {"n": 1, "per": 1, "by": "not a name"}), (Concurrency, {"n": True}),
        (Concurrency, {"n": 1, "by": 5}), (Rate, {"n": 5, "per": 1, "cost": "c", "smooth": True}),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    """A limit that no queue could enforce is refused where it is written."""
    with pytest.raises(ConfigurationError):
        kind(**wrong)
