"""Requests to a dashboard without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from conveyor.dashboard.endpoint import ApiRoute
from conveyor.dashboard.web import Dashboard

OWN_PAGE = {"sec-fetch-site": "same-origin"}
"""Headers that a browser sends with a request of the dashboard's own page."""
_SAMPLES: dict[str, Any] = {
    "text": "x",
    "number": 1,
    "flag": False,
    "texts": ["x"],
    "object": {},
    "list": [{}],
}


def ask(
    site: Any, method: str, path: str, inputs: Mapping[str, Any], headers: Mapping[str, str] | None = None,
    auth: tuple[str, str] | None = None,
) -> httpx.Response:  # fmt: skip
    """Return the response to one call of the API; a POST is one of the dashboard's own page unless *headers* say otherwise."""

    async def send() -> httpx.Response:
        async with _client(site, auth) as client:
            answer = await _send(client, method, path, inputs, headers)
        await _close(site)
        return answer

    return asyncio.run(send())


def get(site: Any, path: str, **inputs: Any) -> Any:
    """Return the document at a path."""
    response = ask(site, "GET", path, inputs)
    assert response.status_code == 200, response.text
    return response.json()


def ask_all(site: Any, calls: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[int]:
    """Return the status codes of several calls, made one after the other."""

    async def send() -> list[int]:
        async with _client(site, None) as client:
            codes = [(await _send(client, *call, None)).status_code for call in calls]
        await _close(site)
        return codes

    return asyncio.run(send())


async def _close(site: Any) -> None:
    """Close the connections of this event loop, which ends."""
    if isinstance(site, Dashboard):
        await site.service.admin.client.aclose()


def _client(site: Any, auth: tuple[str, str] | None) -> httpx.AsyncClient:
    if isinstance(site, Dashboard):
        site.service.streams = False  # the transport waits for the end of a response, and a stream has none
    transport = httpx.ASGITransport(site, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://here", auth=auth)


async def _send(
    client: httpx.AsyncClient, method: str, path: str, inputs: Mapping[str, Any], headers: Mapping[str, str] | None
) -> httpx.Response:
    if method == "GET":
        return await client.get(f"/api/v1/{path}", params={k: str(v) for k, v in inputs.items()}, headers=headers)
    given = {"content-type": "application/json", **(OWN_PAGE if headers is None else headers)}
    return await client.request(method, f"/api/v1/{path}", content=json.dumps(inputs), headers=given)


def inputs_of(endpoint: ApiRoute, choice: str | None = None) -> dict[str, Any]:
    """Return the inputs that a route needs, of something that is not there; *choice*: of its actions."""
    inputs = {
        name: one.choices[0] if one.choices else _SAMPLES[one.kind]
        for name, one in endpoint.fields.items()
        if one.required
    }
    return inputs if choice is None else {**inputs, "action": choice}
