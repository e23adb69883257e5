"""`conveyor dashboard`: the web pages and the HTTP API of one namespace, as a server of their own."""

from __future__ import annotations

import getpass
import os
import socket
from typing import TYPE_CHECKING, Any

import click

from conveyor.cli.command import LeafCommand
from conveyor.cli.output import Output
from conveyor.cli.target import Target, redis_options
from conveyor.errors import ConfigurationError

if TYPE_CHECKING:
    from conveyor.dashboard.access import Access

PORT = 7070
AUTH_VARIABLE, TOKENS_VARIABLE = "CONVEYOR_DASHBOARD_AUTH", "CONVEYOR_DASHBOARD_TOKENS"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command(cls=LeafCommand, example="conveyor dashboard shop.app --port 7070 --read-only")
@click.argument("app_argument", metavar="[APP]", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="The port; 0: any free one."
)
@click.option(
    "--auth", metavar="NAME:PASSWORD[:read-only]", help=f"Who may log in; several by commas.  [env: {AUTH_VARIABLE}]"
)
@click.option("--read-only", is_flag=True, help="Nothing can be changed.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="A name by which it may be asked besides.")
@click.option("--root-path", default="", metavar="/PREFIX", help="The path below which a proxy shows it.")
@click.option("--insecure", is_flag=True, help="Let everybody in who reaches the address.")
@redis_options
def dashboard(
    target: Target, out: Output, app_argument: str | None, host: str, port: int, auth: str | None, read_only: bool,
    hosts: tuple[str, ...], root_path: str, insecure: bool,
) -> int:  # fmt: skip
    """
    Serve the dashboard and the HTTP API until it is stopped.

    APP is module:object, or a module with one app; without one the namespace alone is shown. At 127.0.0.1 everybody on this
    machine may do everything; another address needs --auth. Tokens for programs stand in CONVEYOR_DASHBOARD_TOKENS, as
    NAME:TOKEN or NAME:TOKEN:read-only.
    """
    if app_argument and target.app_name and app_argument != target.app_name:
        raise click.UsageError(f"APP is {app_argument!r} and --app is {target.app_name!r}: give one of them.")
    target.app_name = app_argument or target.app_name
    given, tokens = auth or os.environ.get(AUTH_VARIABLE), os.environ.get(TOKENS_VARIABLE)
    if host not in _LOOPBACK and not given and not insecure:
        raise ConfigurationError(
            f"Everybody who reaches {host} could look and act. Give --auth NAME:PASSWORD (or {AUTH_VARIABLE}), or --insecure.\n"
            "Nothing was started."
        )
    from conveyor.dashboard.access import Access, BasicAuth, parse_auth
    from conveyor.dashboard.web import make_dashboard

    def let_in(_: Any) -> Access:
        return Access.ALL.named(getpass.getuser())

    admin = target.admin()
    application = make_dashboard(
        admin, target.app_in_place, authorize=BasicAuth(parse_auth(given)) if given else let_in,
        tokens={} if not tokens else {token: access.named(name) for name, (token, access) in parse_auth(tokens).items()},
        read_only=read_only, hosts=_names(host, hosts),
    )  # fmt: skip
    return _serve(out, application, host, port, root_path.rstrip("/"))


def _names(host: str, hosts: tuple[str, ...]) -> list[str] | None:
    """Return the names by which the dashboard may be asked; None: any, since the address is one of all."""
    if host in {"0.0.0.0", "::"}:  # noqa: S104  compared, not bound
        return [*hosts, *_LOOPBACK, "[::1]"] if hosts else None
    return [host, *hosts, *_LOOPBACK, "[::1]"]


def _serve(out: Output, application: Any, host: str, port: int, root_path: str) -> int:
    try:
        import uvicorn
    except ImportError:
        raise ConfigurationError("The dashboard needs uvicorn.  pip install 'conveyor[web]'") from None

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"Cannot listen at {host}:{port}: {error.strerror or error}. Give another --port."
        ) from None
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}{root_path}/"
    if out.as_json:
        out.document("dashboard", url=url)
    else:
        out.line(url)
        out.say("The dashboard answers there until ctrl-C.")
    config = uvicorn.Config(
        application, log_level="warning", access_log=False, root_path=root_path, server_header=False,
        timeout_graceful_shutdown=2, lifespan="on",
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])
    return 0
