"""What a worker tells people: lines on standard error through `logging`, under the name ``conveyor.worker``."""

from __future__ import annotations

import logging

LOG = logging.getLogger("conveyor.worker")


def configure_log(*, verbose: bool = False) -> None:
    """Send lines of INFO and above (DEBUG with *verbose*) to standard error, unless the program has its own way."""
    if not logging.getLogger().handlers:
        logging.basicConfig(format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    logger = logging.getLogger("conveyor")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
