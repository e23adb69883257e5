"""
What lower layers offer to users but higher ones provide.

The package's `__init__`, which may know all layers, fills this in; so nothing below has to import upwards.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

embedded_worker: Callable[[], ModuleType] | None = None
"""Loads the module with `EmbeddedWorker(app, **options)`, an async context manager."""
