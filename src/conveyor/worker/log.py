"""What a worker tells people: lines on standard error through `logging`, under the name ``conveyor.worker``."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

LOG = logging.getLogger("conveyor.worker")
AGAIN = 60.0
"""Seconds until what goes on being wrong is said again."""
_said: dict[str, float] = {}


def complain(text: str, *arguments: Any) -> None:
    """Log as an error what is tried again every second and fails: the same words once a minute."""
    words, now = text % arguments, monotonic()
    if now - _said.get(words, -AGAIN) < AGAIN:
        return
    if len(_said) >= 100:
        _said.clear()
    _said[words] = now
    LOG.error("%s", words)


def configure_log(*, verbose: bool = False) -> None:
    """Send lines of INFO and above (DEBUG with *verbose*) to standard error, unless the program has its own way."""
    if not logging.getLogger().handlers:
        logging.basicConfig(format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    logger = logging.getLogger("conveyor")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
