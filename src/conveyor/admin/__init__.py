"""Administration: questions about queues, jobs and workers, and actions on them. The command line uses nothing else."""

from conveyor.admin.admin import Admin
from conveyor.admin.blob_sweep import sweep

__all__ = ["Admin", "sweep"]
