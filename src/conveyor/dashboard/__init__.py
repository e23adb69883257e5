"""The dashboard and the HTTP API: `dashboard(app, authorize=…)` is an ASGI application, `wsgi_dashboard` one for WSGI."""

from __future__ import annotations

from conveyor.errors import ConfigurationError

try:
    import starlette as _starlette  # noqa: F401  said here by name, before a module fails for it
except ImportError as error:
    raise ConfigurationError(
        "The dashboard needs packages that are not installed.  pip install 'conveyor[web]'"
    ) from error

from conveyor.dashboard.access import Access, BasicAuth
from conveyor.dashboard.web import dashboard, wsgi_dashboard

__all__ = ["Access", "BasicAuth", "dashboard", "wsgi_dashboard"]
