"""`conveyor acl`: ACL rules of least privilege for Redis."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import click
from msgspec.structs import asdict

from conveyor.admin import acl as acl_rules
from conveyor.cli.command import LeafCommand
from conveyor.cli.output import Output
from conveyor.cli.target import Target, redis_options
from conveyor.units import digits

_FORMATS = ("redis-cli", "redis.conf", "users.acl")


@click.command(cls=LeafCommand, example="conveyor acl worker --user shop")
@click.argument("role", type=click.Choice(list(acl_rules.ROLES)), required=False)
@click.option("--user", metavar="NAME", help="Name of the user; needs a role.  [default: NAMESPACE-ROLE]")
@click.option("--format", "form", type=click.Choice(_FORMATS), default=_FORMATS[0], show_default=True)
@click.option("--list", "lists", metavar="NAME", multiple=True, help="A plain list; those of a known app are added.")
@click.option("--server", type=click.Choice(acl_rules.SERVERS), default=acl_rules.SERVERS[0], show_default=True,
              help="Oldest server that must accept the rules.")  # fmt: skip
@click.option("--topology", type=click.Choice(acl_rules.TOPOLOGIES), help="[default: as the URL says]")
@click.option("--durable", is_flag=True, help="For pushes with fsync or wait_replicas.")
@redis_options
def acl(
    target: Target, out: Output, role: str | None, user: str | None, form: str, lists: tuple[str, ...], server: str,
    topology: str | None, durable: bool,
) -> None:  # fmt: skip
    """
    Print the ACL rules of least privilege for one ROLE, or for all roles.

    Nothing is sent to Redis. Replace the placeholder with the SHA-256 of a password; Redis refuses it unchanged.
    """
    if user is not None and role is None:
        raise click.UsageError("--user names the user of one role: conveyor acl ROLE --user NAME.")
    admin = target.admin()
    url = urlsplit(admin.client.configured_url or "")
    topology = topology or _topology(url.scheme)
    chosen = [
        acl_rules.rules(
            name, admin.client.namespace, user=user, lists=[*dict.fromkeys([*admin.plain_lists, *lists])], server=server,
            topology=topology, database=_database(url.path, url.query, url.scheme), durable=durable,
        )
        for name in ([role] if role else acl_rules.ROLES)
        if role or name != "sentinel" or topology == "sentinel"
    ]  # fmt: skip
    if out.as_json:
        users = [{**asdict(one), "rules": one.text} for one in chosen]
        out.document("acl", namespace=admin.client.namespace, users=users)
        return
    for one in chosen:
        if role is None:
            out.say(f"# {one.role}: {acl_rules.ROLES[one.role].description}")
        out.line(one.command if form == "redis-cli" else one.line)
    out.say(f"# Replace {acl_rules.PASSWORD} by # and the output of:  printf %s 'the password' | sha256sum")


def _topology(scheme: str) -> str:
    topology = scheme.removeprefix("redis+").removeprefix("rediss+")
    return topology if topology in acl_rules.TOPOLOGIES else acl_rules.TOPOLOGIES[0]


def _database(path: str, query: str, scheme: str) -> int:
    named = parse_qs(query).get("db", ["0" if scheme == "unix" else path.rpartition("/")[2]])[0]
    return digits(named) or 0
