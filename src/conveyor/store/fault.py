"""
What an error reply means, and what to do about it.

Redis 6.2 wraps the code of an error raised inside a script (``ERR Error running script …-READONLY``)
and 7 keeps it in front, so codes are searched for, not compared.
"""

from __future__ import annotations

import random
import re
from enum import Enum

from conveyor.errors import ConfigurationError, ConveyorError, QueueFull, StoreUnavailable

_CODE = re.compile(
    r"\b(NOSCRIPT|OOM|READONLY|NOREPLICAS|MISCONF|BUSY|LOADING|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|UNBLOCKED|NOPERM|NOAUTH|WRONGPASS"
    r"|WRONGTYPE|NOTBUSY)\b"
)
_FORBIDDEN = re.compile(r"ACL failure in script|user executing the script")  # 7 and 6.2, for a command in a script


class Remedy(Enum):
    """What the caller of a script does next."""

    LOAD = "send the script's text"
    WAIT = "repeat after a pause"
    RECONNECT = "connect again, then repeat"
    RAISE = "give up"


_REMEDY = {
    "NOSCRIPT": Remedy.LOAD, "BUSY": Remedy.WAIT, "LOADING": Remedy.WAIT, "TRYAGAIN": Remedy.WAIT, "CLUSTERDOWN": Remedy.WAIT,
    "MASTERDOWN": Remedy.WAIT, "UNBLOCKED": Remedy.WAIT, "NOREPLICAS": Remedy.WAIT, "MISCONF": Remedy.WAIT,
    "READONLY": Remedy.RECONNECT,
}  # fmt: skip


def remedy(text: str) -> Remedy:
    """Return what to do about an error reply."""
    found = _CODE.search(text)
    return _REMEDY.get(found[1], Remedy.RAISE) if found else Remedy.RAISE


def final(text: str, address: str) -> ConveyorError:
    """Return the error a person sees for a reply that repeating does not mend."""
    found = _CODE.search(text)
    code = found[1] if found else "NOPERM" if _FORBIDDEN.search(text) else ""
    if code == "OOM":
        return QueueFull(
            f"Redis at {address} is at its maxmemory and takes no more. Nothing was enqueued. "
            "Workers go on draining; give it more memory or try again later."
        )
    if code in {"NOPERM", "NOAUTH", "WRONGPASS"}:
        return ConfigurationError(
            f"Redis at {address} refuses this user: {text.rstrip('.')}. `conveyor acl` prints what each role needs.",
            code="E17",
        )
    if code == "WRONGTYPE":
        return ConfigurationError(
            f"A key of Conveyor at {address} holds something else: {text}. Use another namespace."
        )
    return ConveyorError(f"Redis at {address} answered: {text}")


def unreachable(address: str, cause: object) -> StoreUnavailable:
    """Return the error for a server that does not answer."""
    reason = str(cause).strip().rstrip(".") or type(cause).__name__
    return StoreUnavailable(
        f"Cannot reach Redis at {address}: {reason}.\n"
        "For development leave CONVEYOR_URL unset: an embedded server starts by itself.\n"
        "Elsewhere: export CONVEYOR_URL=redis://host:6379/0"
    )


def pause(attempt: int, *, cap: float = 2.0) -> float:
    """Return how long to wait before repeat number *attempt* (from 0): full jitter, so that a herd spreads out."""
    return random.uniform(0.005, min(cap, 0.02 * 2**attempt))  # noqa: S311  no secret
