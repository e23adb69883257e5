"""All routes of the HTTP API."""

from __future__ import annotations

from conveyor.dashboard.endpoint import ApiRoute
from conveyor.dashboard.job_routes import JOB_ENDPOINTS
from conveyor.dashboard.live_routes import LIVE_ENDPOINTS
from conveyor.dashboard.queue_routes import QUEUE_ENDPOINTS
from conveyor.dashboard.system_routes import SYSTEM_ENDPOINTS

ENDPOINTS: tuple[ApiRoute, ...] = (*LIVE_ENDPOINTS, *QUEUE_ENDPOINTS, *JOB_ENDPOINTS, *SYSTEM_ENDPOINTS)
