"""Reads and actions on queues, jobs and workers: all that the command line uses."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conveyor.admin.admin import Admin
    from conveyor.admin.blob_sweep import sweep

__all__ = ["Admin", "sweep"]


def __getattr__(name: str) -> Any:  # at its first use: most programs that read a queue sweep nothing
    if name == "Admin":
        from conveyor.admin.admin import Admin

        return Admin
    if name == "sweep":
        from conveyor.admin.blob_sweep import sweep

        return sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
