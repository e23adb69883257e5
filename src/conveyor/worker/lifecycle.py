"""The phases of a worker's end."""

from __future__ import annotations

import msgspec


class Lifecycle(msgspec.Struct):
    """Flags of one worker, each of them set once. The parts of the worker read them; the worker sets them."""

    stopping: bool = False
    """Nothing more is leased."""
    draining: bool = False
    """Nothing more is started either: what is leased and has not started goes back."""
    stopped: bool = False
    """Nothing more is sent."""
