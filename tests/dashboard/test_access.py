"""Access to the dashboard: every route with every role, other sites and other hosts, and what is left out of documents."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest

from conveyor import Conveyor
from conveyor.dashboard import Access, BasicAuth, dashboard, wsgi_dashboard
from conveyor.dashboard.access import ACTIONS
from conveyor.dashboard.endpoint import ApiRoute
from conveyor.dashboard.routes import ENDPOINTS
from conveyor.errors import ConfigurationError
from support.dashboard_client import OWN_PAGE, ask, ask_all, inputs_of

ROLES = {
    "all": Access.ALL, "read-only": Access.READ_ONLY, "nobody": Access.DENY, "no payloads": Access.only(),
    **{action: Access.only(action) for action in ACTIONS},
}  # fmt: skip


def _cases() -> list[tuple[ApiRoute, Mapping[str, Any]]]:
    """Return every route with inputs; one that needs other rights for other actions with each of them."""
    found: list[tuple[ApiRoute, Mapping[str, Any]]] = []
    for one in ENDPOINTS:
        choices = list(one.action) if isinstance(one.action, Mapping) else [None]
        found += [(one, inputs_of(one, choice)) for choice in choices]
    return found


@pytest.mark.leaves_keys("a role pulls what another has pushed")
def test_every_route_with_every_role_and_method(app: Conveyor) -> None:
    """A route is refused to whoever lacks its right, before anything is read or done, and to other methods than its own."""
    wrong = []
    methods = {one.path: {each.method for each in ENDPOINTS if each.path == one.path} for one in ENDPOINTS}
    for name, access in ROLES.items():
        site = dashboard(app, lambda _, access=access: access)
        calls = [(one.method, one.path, inputs, access.allows(one.needed(inputs))) for one, inputs in _cases()]
        answers = ask_all(site, [call[:3] for call in calls])
        wrong += [
            (name, *call, status)
            for call, status in zip(calls, answers, strict=True)
            if (status == 403) is call[3] or status == 500
        ]
        others = [
            (method, path, {})
            for path, taken in methods.items()
            for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - taken
        ]
        refused = 403 if name == "nobody" else 405
        wrong += [
            (name, *call, status)
            for call, status in zip(others, ask_all(site, others), strict=True)
            if status != refused
        ]
    assert wrong == []


def test_a_dashboard_is_closed_until_it_is_opened(app: Conveyor) -> None:
    """Without `authorize` every route and page is refused; files of the pages hold nothing, and are not."""
    site = dashboard(app)
    assert {ask(site, one.method, one.path, inputs).status_code for one, inputs in _cases()} == {403}
    assert httpx_get(site, "/").status_code == 403
    assert ask(dashboard(app, lambda _: "all"), "GET", "session", {}).status_code == 403  # type: ignore[arg-type,return-value]


def test_read_only_takes_every_right_to_change(app: Conveyor) -> None:
    """A read-only dashboard refuses every change, whatever the visitor may do elsewhere, and shows everything."""
    site = dashboard(app, lambda _: Access.ALL, tokens={"secret": Access.ALL}, read_only=True)
    for endpoint, inputs in _cases():
        if endpoint.method == "POST":
            assert ask(site, endpoint.method, endpoint.path, inputs).status_code == 403, endpoint.path
            assert (
                ask(site, endpoint.method, endpoint.path, inputs, {"authorization": "Bearer secret"}).status_code == 403
            )
    assert ask(site, "GET", "session", {}).json()["read_only"] is True


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "same-origin", "origin": "http://evil.example"}, True),  # the browser is believed
        ({"sec-fetch-site": "cross-site", "origin": "http://here"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"origin": "http://here"}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://here.evil.example"}, False),
        ({}, False),
        ({"authorization": "Bearer secret"}, True),
        ({"authorization": "Bearer secret", "sec-fetch-site": "cross-site"}, True),  # no page of another site knows it
    ],
)
def test_changes_come_from_the_own_pages_or_with_a_token(app: Conveyor, headers: dict[str, str], allowed: bool) -> None:
    """A change is taken from a page of the same origin, or from a program with a token, and from nowhere else."""
    app.queue("mail").push(1)
    site = dashboard(app, lambda _: Access.ALL, tokens={"secret": Access.ALL})
    status = ask(site, "POST", "queues/pause", {"queue": "mail"}, headers).status_code
    assert status == (200 if allowed else 403)
    assert app.queue("mail").stats().paused is allowed


def test_a_form_of_another_site_changes_nothing(app: Conveyor) -> None:
    """A body that a form could send is refused, whatever its origin."""
    site = dashboard(app, lambda _: Access.ALL)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = ask(site, "POST", "queues/pause", {"queue": "mail"}, {**OWN_PAGE, "content-type": kind})
        assert answer.status_code == 422
        assert "application/json" in answer.json()["error"]["message"]


def test_only_names_that_are_allowed_are_answered(app: Conveyor) -> None:
    """A request for another host name, as a rebound DNS name sends, gets nothing."""
    site = dashboard(app, lambda _: Access.ALL, hosts=["localhost", "jobs.example"])
    for host, status in {
        "localhost": 200, "localhost:7070": 200, "JOBS.example": 200, "evil.example": 421, "localhost.evil.example": 421,
        "": 421, "localhost:7070:1": 421,
    }.items():  # fmt: skip
        assert ask(site, "GET", "session", {}, {"host": host}).status_code == status, host


def test_strict_headers_on_every_response(app: Conveyor) -> None:
    """Pages, files, documents and errors all carry the policy that lets no foreign script run and no page frame them."""
    site = dashboard(app, lambda _: Access.ALL)
    paths = ["/", "/queues/x", "/static/none.js", "/api/v1/session", "/api/v1/none", "/api/v1/job?id=none"]
    for answer in [*(httpx_get(site, path) for path in paths), httpx_get(dashboard(app), "/")]:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
    assert httpx_get(site, "/api/v1/session").headers["cache-control"] == "no-store"


def test_files_outside_the_folder_are_not_served(app: Conveyor) -> None:
    """A path that leaves the folder of the pages finds nothing."""
    site = dashboard(app, lambda _: Access.ALL)
    for path in (
        "../web.py",
        "%2e%2e/web.py",
        "..%2fweb.py",
        "/etc/passwd",
        "index.html/../../web.py",
        "x%00y",
        "x" * 5_000,
    ):
        assert httpx_get(site, f"/static/{path}").status_code in {200, 404}
        assert "def dashboard" not in httpx_get(site, f"/static/{path}").text
        assert "root:" not in httpx_get(site, f"/static/{path}").text


def test_passwords(app: Conveyor) -> None:
    """A known name and password let in with their role; others are asked, and after twenty wrong ones no more."""
    site = dashboard(app, BasicAuth({"ada": "secret", "bob": ("other", Access.READ_ONLY)}))

    def enter(name: str, password: str) -> httpx.Response:
        return ask(site, "GET", "session", {}, auth=(name, password))

    assert ask(site, "GET", "session", {}).headers["www-authenticate"].startswith("Basic")
    assert enter("ada", "secret").json()["user"] == "ada"
    assert enter("bob", "other").json()["read_only"] is True
    for _ in range(20):
        assert enter("ada", "wrong").status_code == 401
    assert enter("ada", "secret").status_code == 429
    for users in ({}, {"ada": ""}):
        with pytest.raises(ConfigurationError):
            BasicAuth(users)
    with pytest.raises(ConfigurationError, match="no action 'fly'"):
        Access.only("fly")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"authorize": Access.READ_ONLY}, "takes a function of the request"),
        ({"tokens": {"SECRET": "all"}}, "takes tokens and their Access"),
        ({"tokens": {"": Access.ALL}}, "takes tokens and their Access"),
        ({"hosts": "jobs.example"}, "takes a list of names"),
    ],
)
def test_who_may_do_what_is_checked_where_it_is_written(app: Conveyor, options: dict[str, Any], says: str) -> None:
    """An option that cannot say it is refused when the dashboard is made, and not by an error of each request."""
    with pytest.raises(ConfigurationError, match=says):
        dashboard(app, **options)


def test_unknown_token_is_refused(app: Conveyor) -> None:
    """A token that is not known is a 401, not an anonymous visit."""
    site = dashboard(app, lambda _: Access.ALL, tokens={"secret": Access.ALL})
    assert ask(site, "GET", "session", {}, {"authorization": "Bearer wrong"}).status_code == 401
    assert ask(site, "GET", "session", {}, {"authorization": "Bearer secret"}).json()["user"] == "token"
    assert ask(dashboard(app, tokens={"secret": Access.ALL}), "GET", "session", {}).status_code == 401


def test_payloads_are_left_out_everywhere(app: Conveyor) -> None:
    """Without `view_payloads` no document holds anything of arguments, errors or results, and no filter searches in them."""
    failing(app)
    whole, part = (dashboard(app, lambda _, access=access: access) for access in (Access.ALL, Access.only()))
    shown = [ask(site, "GET", "jobs", {}).text + _job_pages(site) for site in (whole, part)]
    assert shown[0].count("CANARY") >= 4
    assert "CANARY" not in shown[1]
    everything = [ask(part, one.method, one.path, inputs).text for one, inputs in _cases() if one.method == "GET"]
    assert "CANARY" not in "".join(everything)
    for text in ("args.word:CANARY", "error:CANARY", '"CANARY"', "-args:x", "header.x:CANARY"):
        answer = ask(part, "GET", "jobs", {"filter": text})
        assert (answer.status_code, answer.json()["error"]["action"]) == (403, "view_payloads"), text


def failing(app: Conveyor) -> None:
    """Leave a dead job and a waiting one, with a canary in arguments, headers and error."""

    @app.task(queue="mail", retry=1)
    def send(word: str) -> None:
        raise ValueError(word)

    async def run() -> None:
        await send.options(headers={"x": "CANARY"}).aenqueue("CANARY")
        async with app.worker(queues={"mail": 1}):
            for _ in range(200):
                if (await app.queue("mail").astats()).dead:
                    break
                await asyncio.sleep(0.05)
        await send.aenqueue("CANARY")
        await app.aclose()

    asyncio.run(run())


def _job_pages(site: Any) -> str:
    rows, cursor = [], ""
    while cursor is not None:  # a page ends after a time
        page = ask(site, "GET", "jobs", {"cursor": cursor}).json()
        rows, cursor = rows + page["jobs"], page["next"]
    assert len(rows) == 2
    return "".join(ask(site, "GET", "job", {"id": row["id"]}).text for row in rows)


def httpx_get(site: Any, path: str) -> httpx.Response:
    """Return the response to a GET of any path."""

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://here") as client:
            return await client.get(path)

    return asyncio.run(get())


def test_wsgi_answers_as_asgi_does(app: Conveyor) -> None:
    """The dashboard below a WSGI server answers, and tells its pages to ask instead of being told."""
    site: Callable[..., Any] = wsgi_dashboard(app, lambda _: Access.ALL)
    with httpx.Client(transport=httpx.WSGITransport(site), base_url="http://here") as client:
        assert client.get("/api/v1/session").json()["live"] == "poll"


def test_a_mounted_dashboard_knows_its_path(app: Conveyor) -> None:
    """Below a prefix of the application around it the page and its files are found below that prefix."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    around = Starlette(routes=[Mount("/ops/jobs", dashboard(app, lambda _: Access.ALL))])
    assert httpx_get(around, "/ops/jobs/api/v1/session").json()["namespace"] == "conveyor"
    page = httpx_get(around, "/ops/jobs/")
    assert page.status_code == 404 or '"/ops/jobs/"' in page.text
    assert re.search(r"api/v1", httpx_get(around, "/ops/jobs/api/v1/nothing").text)


@pytest.mark.parametrize("mount", ["/jobs", ""])
def test_a_part_that_a_proxy_takes_away_is_named(app: Conveyor, mount: str) -> None:
    """Where a proxy takes a part of the path away and the application names it, as `FastAPI(root_path=)` does, all is found too."""
    site: Any = dashboard(app, lambda _: Access.ALL)

    async def around(scope: Any, receive: Any, send: Any) -> None:
        await site({**scope, "root_path": f"/shop{mount}"}, receive, send)

    assert httpx_get(around, f"{mount}/api/v1/session").json()["namespace"] == "conveyor"
    assert httpx_get(around, f"{mount}/static/app.js").status_code == 200
    for page in ("/", "/queue"):
        assert f'"/shop{mount}/"' in httpx_get(around, f"{mount}{page}").text


@pytest.mark.parametrize("prefix", ["/ops/jobs", ""])
def test_a_mount_that_cuts_the_path_is_honoured(app: Conveyor, prefix: str) -> None:
    """Where the application around it takes its prefix from the path and names no root, as Litestar does, all is found too."""
    site: Any = dashboard(app, lambda _: Access.ALL)

    async def around(scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].removeprefix(prefix).rstrip("/") + "/"
        await site({**scope, "path": path, "root_path": "", "raw_path": scope["path"].encode()}, receive, send)

    assert httpx_get(around, f"{prefix}/api/v1/session").json()["namespace"] == "conveyor"
    assert httpx_get(around, f"{prefix}/static/app.js").status_code == 200
    for page in ("/", "/queue"):
        assert f'"{prefix}/"' in httpx_get(around, f"{prefix}{page}").text
