"""Questions about queues, jobs and workers, and actions on them. The one source of the command line."""

from conveyor.admin.admin import Admin
from conveyor.admin.blob_sweep import sweep

__all__ = ["Admin", "sweep"]
