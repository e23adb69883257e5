"""The options of every command that uses Redis, and the client and app that they name."""

from __future__ import annotations

import functools
import getpass
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from conveyor.cli.app import Settings, load, read_settings, reference
from conveyor.cli.command import shared_option, verbose_option
from conveyor.cli.output import Output
from conveyor.errors import ConfigurationError
from conveyor.store.audit_log import write_audit

if TYPE_CHECKING:
    from conveyor.admin.admin import Admin
    from conveyor.jobs.core import AppCore
    from conveyor.store.client.client import Client

RETRY_FOR = 1.0
"""Seconds for which a command repeats a call before it reports an unreachable server."""


class Target:
    """The server, namespace and app of a command: given by flags, or looked up."""

    def __init__(
        self,
        url: str | None = None,
        namespace: str | None = None,
        app_name: str | None = None,
        retry_for: float = RETRY_FOR,
    ) -> None:
        self.url, self.namespace, self.app_name, self.retry_for = url, namespace, app_name, retry_for
        self._settings: Settings | None = None
        self._app: Any = None
        self._opened: Any = None

    @property
    def settings(self) -> Settings:
        """The settings in ``[tool.conveyor]``, read once."""
        if self._settings is None:
            self._settings = read_settings()
        return self._settings

    @property
    def server_url(self) -> str | None:
        """The URL without that of the app; None: the embedded server."""
        return self.url or os.environ.get("CONVEYOR_URL") or self.settings.url

    def load_app(self) -> tuple[str, Any]:
        """
        Import the app and return (reference, app).

        The app's own URL and namespace are those of its workers and producers, so a command must not use others: flags
        that contradict its code raise ConfigurationError.
        """
        name, app = self._import_app()
        app.client.retry_for = self.retry_for
        wanted = self._namespace()
        if wanted is not None and wanted != app.client.namespace:
            raise ConfigurationError(
                f"{name} sets namespace {app.client.namespace!r} in its code, not {wanted!r}. Change one of them."
            )
        if self.url and not self.url.startswith("embedded:") and app.client.address.url != self.url:
            raise ConfigurationError(
                f"{name} sets {app.client.address} in its code, and --url cannot change that. Write Conveyor() there."
            )
        click.get_current_context().call_on_close(app.close)
        self._opened = _without_buffer(app)
        return name, app

    def client(self) -> Client:
        """
        Return the client.

        Its URL comes from the flags, else the app, else the environment, else the embedded server.
        """
        self._opened = client = self._client()
        return client

    def note(
        self, what: str, target: str = "", *, count: int | None = None, detail: str = "", quiet: bool = False
    ) -> None:
        """
        Note in the audit what a command did that does it without `admin`.

        *quiet*: say nothing where the user of Redis may not write there, as one who only sends. Nothing is imported for it: an
        interrupt amid an import, of a command that waits for its job now, may be swallowed or end Python by the signal.
        """
        write_audit(self._opened, who(), what, target, count=count, detail=detail, quiet=quiet)

    def _client(self) -> Client:
        from conveyor.store.client.client import Client

        url, namespace = self.url, self._namespace()
        if (url is None or namespace is None) and reference(self.app_name, self.settings) is not None:
            _, app = self._import_app()
            self._app = app
            if url in {None, app.client.address.url} and namespace in {None, app.client.namespace}:
                app.client.retry_for = self.retry_for
                return _close_at_exit(_without_buffer(app))
            namespace = namespace or app.client.namespace
            url = url or app.client.address.url
            _close_at_exit(app.client)  # it may hold the embedded server
        return _close_at_exit(
            Client(url or self.server_url, namespace=namespace or "conveyor", retry_for=self.retry_for)
        )

    def _import_app(self) -> tuple[str, Any]:
        """Import the app and return (reference, app). One that leaves its URL to the environment takes that of ``--url``."""
        if self.url:
            before = os.environ.get("CONVEYOR_URL")
            os.environ["CONVEYOR_URL"] = self.url
            click.get_current_context().call_on_close(functools.partial(_restore_url, before))
        return load(self.app_name, self.settings)

    @property
    def app(self) -> Any:
        """The app that `client` had to load; None: flags and environment were enough."""
        return self._app

    @property
    def app_in_place(self) -> Any:
        """
        The app whose own client is that of the command; None: there is none, or it is of another server or namespace.

        What acts through an app (its schedules, its topics, a job of its tasks) acts at the app's own place.
        """
        return self._app if self._app is not None and self._app.client is self._opened else None

    def app_or_client(self) -> Any:
        """Return the app, or where none is named one without tasks on the server: for what a handle of a job does."""
        if reference(self.app_name, self.settings) is not None:
            return self.load_app()[1]
        return self.empty_app()

    def empty_app(self) -> Any:
        """Return an app without tasks on the server."""
        from conveyor.jobs.app import Conveyor

        app = Conveyor(self.url or self.server_url, namespace=self._namespace() or "conveyor")
        app.client.retry_for = self.retry_for
        click.get_current_context().call_on_close(app.close)
        return app

    def core(self) -> AppCore:
        """Return the inside of an app that declares nothing, on the client; it opens what the app of the command seals."""
        from conveyor.jobs.core import AppCore, core_of

        client = self.client()
        if self._app is None:
            return AppCore.without_declarations(client)
        known = core_of(self._app)
        return AppCore.without_declarations(
            client, max_payload=known.max_payload, sealing=known.sealing, formats=known.formats
        )

    def admin(self) -> Admin:
        """Return the administration interface of the client."""
        from conveyor.admin.admin import Admin

        client = self.client()
        admin = Admin(client) if self._app is None else Admin.of_app(self._app, client)
        return admin.acting_as(who())

    def admin_of(self, app: Any) -> Admin:
        """Return the administration interface of an app that was loaded."""
        from conveyor.admin.admin import Admin

        return Admin.of_app(app).acting_as(who())

    def _namespace(self) -> str | None:
        return self.namespace or os.environ.get("CONVEYOR_NAMESPACE") or self.settings.namespace


def _restore_url(before: str | None) -> None:
    if before is None:
        os.environ.pop("CONVEYOR_URL", None)
    else:
        os.environ["CONVEYOR_URL"] = before


def who() -> str:
    """Return who runs the command, for the audit: the account and the machine."""
    return f"{account()}@{socket.gethostname()}"


def account() -> str:
    """Return the name of the account that runs the command."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no account of that number, as in some containers
        return f"uid {os.getuid()}"


def _without_buffer(app: Any) -> Client:
    """
    Return the client of an app, with a buffer that accepts nothing.

    A command ends at once, so it fails when Redis is away.
    """
    client: Client = app.client
    if client.buffer is not None:
        client.buffer.most = 0
    return client


def _close_at_exit(client: Client) -> Client:
    click.get_current_context().call_on_close(client.close)
    return client


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json``; the command gets an `Output` as its first argument."""

    @functools.wraps(function)
    def command(*args: Any, as_json: bool, **options: Any) -> Any:
        return function(Output(as_json=as_json), *args, **options)

    return shared_option("--json")(command)


def redis_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    Add the options of commands that use Redis, ``--json`` and ``-v``.

    The command gets a `Target` and an `Output`.
    """

    @shared_option("--url")
    @shared_option("--namespace")
    @shared_option("--app")
    @verbose_option
    @json_option
    @functools.wraps(function)
    def command(
        out: Output, *args: Any, url: str | None, namespace: str | None, app_name: str | None, **options: Any
    ) -> Any:
        from conveyor.acting import acting_as

        with acting_as(who()):  # in the histories of jobs
            return function(Target(url, namespace, app_name), out, *args, **options)

    return command
