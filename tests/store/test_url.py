"""Invalid URLs, and valid ones of another kind of server: the error, blocking or not, and that nothing is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from conveyor import Conveyor
from conveyor.errors import ConfigurationError, ConveyorError, StoreUnavailable
from conveyor.store.transport.sentinel import Sentinel
from conveyor.store.transport.topology import topology_of
from testbed.server_groups import SentinelGroup, free_port
from testbed.server_process import Server

Start = Callable[..., Server]


@pytest.mark.parametrize(
    ("wrong", "code", "says"),
    [
        ("redis+sentinal://h/main", "E31", r"no topology 'sentinal'\. Did you mean redis\+sentinel://\?"),
        ("sentinel://h/main", "E31", r"not a Redis URL\. Did you mean redis\+sentinel://\?"),
        ("redis-cluster://h", "E31", r"Did you mean redis\+cluster://\?"),
        ("rediss+claster://h:26379", "E31", r"Did you mean rediss\+cluster://\?"),
        ("valky://h", "E02", r"not a Redis URL\. Write redis://"),
        ("valkeys+claster://h", "E31", r"Did you mean rediss\+cluster://\?"),
        ("redis+quorum://h", "E31", r"no topology 'quorum'\. Write .* redis\+cluster://host:6379,host:6379"),
        ("http://h", "E02", r"not a Redis URL\. Write redis://"),
        ("localhost:6379", "E02", r"not a Redis URL\. Write redis://host:6379/0"),
        ("redis://h/mail", "E02", r"the database must be a number, as in redis://host:6379/0"),
        ("redis+sentinel://h/main?db=x", "E02", r"the database must be a number"),
        ("redis+sentinel://h/main?db=-1", "E02", r"the database must be a number"),
        ("redis://u:se/cret@h:6379", "E02", r"quote it"),
        ("redis://u:12/cret@h:6379", "E02", r"quote it"),
        ("redis://h:99999", "E02", r"the port must be a number from 1 to 65535"),
        ("embedded://ada:secret@h:6379", "E02", r"'embedded://ada:\*\*\*@h:6379': .* no host and no password\. Write embedded:///"),
        ("embedded://here", "E02", r"no host and no password"),
        ("unix://", "E02", r"names no socket\. Write unix:///"),
        ("redis+cluster://h1 h2", "E02", r"'h1 h2' is not a host with a port"),
        ("redis+sentinel://h/main?sentinel_pasword=secret", "E02", r"'sentinel_pasword' is not one of its options.*sentinel_password"),
        ("rediss+cluster://h?ssl_cert_reqs=maybe", "E02", r"(?i)certificate requirements"),
        (6379, "E02", r"must be text such as 'redis://host:6379/0', not int"),
    ],
)  # fmt: skip
def test_wrong_url_is_refused_where_it_is_written(wrong: Any, code: str, says: str) -> None:
    """A URL that means nothing is refused when the app is made; the message says what to write and shows no secret."""
    with pytest.raises(ConfigurationError, match=says) as caught:
        Conveyor(wrong)
    assert caught.value.code == code
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("valkey://h:6380/2", "redis://h:6380/2"),
        ("valkeys://u:p@h", "rediss://u:p@h"),
        ("valkey+sentinel://h/main", "redis+sentinel://h/main"),
        ("valkeys+cluster://h", "rediss+cluster://h"),
    ],
)
def test_the_schemes_of_valkey_name_the_same_servers(given: str, meant: str) -> None:
    """A URL that a host of Valkey hands out is taken as it is."""
    assert (type(topology_of(given)), str(topology_of(given))) == (type(topology_of(meant)), str(topology_of(meant)))


def refusals(url: str, *, retry_for: float = 0.3) -> list[ConveyorError]:
    """Return what a blocking push and one of a loop raise."""

    async def push() -> None:
        async with Conveyor(url) as app:
            app.client.retry_for = retry_for
            await app.queue("q").apush(1)

    with Conveyor(url) as app:
        app.client.retry_for = retry_for
        with pytest.raises(ConveyorError) as blocking:
            app.queue("q").push(1)
    with pytest.raises(ConveyorError) as awaited:
        asyncio.run(push())
    return [blocking.value, awaited.value]


@pytest.mark.standalone_only(
    "misspells an option of one server's URL", on=("valkey", "redis6", "redis7", "redis8", "acl")
)
def test_option_nobody_knows_is_refused(url: str) -> None:
    """An option of a plain URL that redis-py does not know is an error of the URL, without its value."""
    for error in refusals(f"{url}&pasword=secret"):
        assert (type(error), error.code) == (ConfigurationError, "E02")
        assert "'pasword' is not one of its options" in str(error)
        assert "secret" not in str(error)


def test_a_password_file_is_read_where_it_is_named(tmp_path: Path) -> None:
    """A file that cannot be read, is empty, or stands beside a password is said with its path; sentinels have one of their own."""
    secret, empty = tmp_path / "secret", tmp_path / "empty"
    secret.write_text("cret\n")
    empty.touch()
    for url, says in (
        (f"redis://127.0.0.1:1/0?password_file={tmp_path}/none", "/none': No such file or directory"),
        (f"redis://127.0.0.1:1/0?password_file={empty}", "/empty': it is empty"),
        (f"redis://ada:secret@127.0.0.1:1/0?password_file={secret}", "both a password and a password_file"),
    ):
        for error in refusals(url):
            assert isinstance(error, ConfigurationError)
            assert says in str(error)
            assert "secret@" not in str(error)
    with pytest.raises(ConfigurationError, match="/none': No such file"):
        Conveyor(f"redis+sentinel://127.0.0.1:1/main?password_file={tmp_path}/none")

    place = Sentinel(f"redis+sentinel://ada@127.0.0.1:1/main?password_file={secret}&sentinel_password_file={empty}")
    assert f"ada:@127.0.0.1:2/?password_file={quote(str(secret), safe='')}" in place.server(("127.0.0.1", 2)).url
    [sentinel] = place.sentinels()
    assert sentinel.url == f"redis://127.0.0.1:1/?password_file={quote(str(empty), safe='')}"


def test_one_server_is_no_sentinel(start_server: Start) -> None:
    """A sentinel's URL on a single server, and a database that is not there, are refused at once and store nothing."""
    port = free_port()
    server = start_server("--port", str(port), "--bind", "127.0.0.1")
    for error in refusals(f"redis+sentinel://127.0.0.1:{port}/main"):
        assert error.code == "E33"
        assert f"127.0.0.1:{port} is no sentinel" in str(error)
        assert f"write redis://127.0.0.1:{port}," in str(error)
    for error in refusals(f"redis://127.0.0.1:{port}/99"):
        assert isinstance(error, ConfigurationError)
        assert "no database of that number" in str(error)
    with server.client() as client:
        assert client.info("keyspace") == {}


def test_what_leads_to_sentinels_and_their_master(sentinel_group: SentinelGroup) -> None:
    """A sentinel taken for a server or a cluster, a wrong password at the master, a replica: each is said, and nothing is stored."""
    sentinel, master = sentinel_group.sentinels[0].name, sentinel_group.master
    before = master.ask("DBSIZE")
    for url, code, says in (
        (f"redis://{sentinel}", "E33", "If it is a sentinel, write redis+sentinel://"),
        (f"redis+cluster://{sentinel}", "E33", f"write redis+sentinel://{sentinel}/mymaster"),
        (sentinel_group.url.replace("://", "://nobody:wrong@"), "E17", f"Redis at redis://nobody:***@{master.name}"),
        (f"{sentinel_group.url}?db=99", "E02", "no database of that number"),
    ):
        for error in refusals(url):
            assert isinstance(error, ConfigurationError), url
            assert error.code == code
            assert says in str(error)
    for error in refusals(f"redis://{sentinel_group.replica.name}"):
        assert isinstance(error, StoreUnavailable)
        assert "is a replica and accepts no writes" in str(error)
    assert master.ask("DBSIZE") == before


def test_refusal_for_now_is_no_absence(start_server: Start) -> None:
    """A server that refuses everything for now is not called unreachable: the error has its reason, and what to do."""
    server = start_server()
    with server.client() as client:
        client.config_set("min-replicas-to-write", 1)
    for error in refusals(server.url):
        assert isinstance(error, StoreUnavailable)
        assert "cannot do this now: NOREPLICAS" in str(error)
        assert "Bring its replicas back" in str(error)
        assert "Cannot reach" not in str(error)
