"""Reads and actions on queues, jobs and workers: all that the command line uses."""

from conveyor.admin.admin import Admin
from conveyor.admin.blob_sweep import sweep

__all__ = ["Admin", "sweep"]
