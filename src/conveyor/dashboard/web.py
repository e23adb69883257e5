"""The dashboard as an ASGI application, and as one for WSGI servers."""

from __future__ import annotations

import gzip
import html
import json
import logging
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from hashlib import sha256
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from conveyor.admin.admin import Admin
from conveyor.dashboard import documents
from conveyor.dashboard.access import (
    Access,
    Authorize,
    LoginRequired,
    TooManyAttempts,
    check_access,
    is_allowed_host,
    is_own_page,
)
from conveyor.dashboard.endpoint import MOST_BODY, ApiCall, ApiRoute, NotAllowed, never
from conveyor.dashboard.live_routes import METRICS, first_view
from conveyor.dashboard.routes import ENDPOINTS
from conveyor.dashboard.service import Service
from conveyor.errors import (
    ConfigurationError,
    ConveyorError,
    InvalidFilter,
    JobNotFound,
    QueueFull,
    QueueNotFound,
    ScheduleNotFound,
    StoreUnavailable,
    WorkerNotFound,
)
from conveyor.store.transport.url import redact

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from conveyor.jobs.app import Conveyor

logger = logging.getLogger("conveyor.dashboard")
STATIC = Path(__file__).with_name("static")
_SHOWN_NAMES = ("index.html",)
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'none'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
"""The headers of every response."""
_NOT_FOUND = (JobNotFound, QueueNotFound, ScheduleNotFound, WorkerNotFound)
_IN_USE = "E35"


def dashboard(
    app: Conveyor | Admin,
    authorize: Authorize | None = None,
    *,
    tokens: Mapping[str, Access] | None = None,
    read_only: bool = False,
    hosts: Sequence[str] | None = None,
) -> ASGIApp:
    """
    Return the dashboard and HTTP API of an app as an ASGI application, to be mounted anywhere.

    Nothing is shown before *authorize* or *tokens* allow it.

    Args:
        app: the app; an `Admin` shows a namespace without one.
        authorize: who may do what: gets the request and returns an `Access`, or is awaitable. `BasicAuth` is one.
        tokens: bearer token → `Access`, for programs.
        read_only: nothing can be changed, whatever *authorize* allows.
        hosts: names by which it may be asked (the Host header). None: any; the application around it checks that.

    """
    admin, owner = (app, None) if isinstance(app, Admin) else (Admin.of_app(app), app)
    return make_dashboard(admin, owner, authorize=authorize, tokens=tokens or {}, read_only=read_only, hosts=hosts)


def make_dashboard(
    admin: Admin, app: Any, *, authorize: Authorize | None, tokens: Mapping[str, Access], read_only: bool,
    hosts: Sequence[str] | None,
) -> Dashboard:  # fmt: skip
    """Return the dashboard of what *admin* administers; *app* knows its tasks, None: no app is known."""
    check_access(authorize, tokens, hosts)
    return Dashboard(Service(admin, app, authorize=authorize, tokens=tokens, read_only=read_only, hosts=hosts))


def wsgi_dashboard(
    app: Conveyor | Admin,
    authorize: Authorize | None = None,
    *,
    tokens: Mapping[str, Access] | None = None,
    read_only: bool = False,
    hosts: Sequence[str] | None = None,
) -> Callable[..., Any]:
    """Return the dashboard as a WSGI application (Flask, Django); the pages ask every two seconds instead of being told."""
    from a2wsgi import ASGIMiddleware

    asgi = dashboard(app, authorize, tokens=tokens, read_only=read_only, hosts=hosts)
    assert isinstance(asgi, Dashboard)
    asgi.service.streams = False
    return ASGIMiddleware(asgi)  # type: ignore[arg-type]


class Dashboard:
    """The ASGI application: `service` is what its requests share."""

    def __init__(self, service: Service) -> None:
        self.service = service
        routes = [
            Route(f"/api/v1/{one.path}", partial(self._answer, one), methods=[one.method], name=one.path)
            for one in ENDPOINTS
        ]
        # A method that a path does not take is a 405; a path that is none of the API's is not a page either.
        routes += [
            Route("/api/{path:path}", self._unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
            Route("/static/{path:path}", self._file, methods=["GET"]),
            Route("/metrics", partial(self._answer, METRICS), methods=["GET"]),  # where scrapers look
            Route("/{path:path}", self._page, methods=["GET"]),
        ]
        self._app = Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> Any:
        yield
        await self.service.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, with the headers that every response has."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *(one for one in added if one[0] not in names)]}
            await send(message)

        scope = _with_root(scope)
        request = Request(scope, receive)
        if not is_allowed_host(request, self.service.hosts):
            response = _error(
                421, "E00", "This host name is not allowed. Give it with --host, or hosts= of dashboard()."
            )
            await response(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    # -- pages and files ------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        """Return the page, which is one for all paths, to whoever may look."""
        try:
            access, _ = await self.service.access(request)
        except (LoginRequired, TooManyAttempts) as error:
            return _refusal(error)
        if not access.allows(None):
            return Response(
                "The dashboard is closed. Open it with authorize= of dashboard(), or --auth of conveyor dashboard.\n",
                403, media_type="text/plain",
            )  # fmt: skip
        file = STATIC / "index.html"
        if not file.is_file():
            return Response("The pages of the dashboard are not installed.\n", 404, media_type="text/plain")
        text = file.read_text("utf-8").replace("{{base}}", html.escape(_base(request), quote=True))
        call = ApiCall(self.service, self.service.admin_for(access), access, {}, _base(request))
        first = partial(first_view, call, hour=_path(request).strip("/") == "")
        headers = {"cache-control": "no-store", "vary": "accept-encoding"}
        packs = "gzip" in request.headers.get("accept-encoding", "")
        if packs:
            headers["content-encoding"] = "gzip"
        parts = _page_parts(text, first)
        return StreamingResponse(_gzipped(parts) if packs else parts, headers=headers, media_type="text/html")

    async def _file(self, request: Request) -> Response:
        """Return a file of the pages. They hold nothing of the server, so anybody may have them."""
        try:
            file = (STATIC / request.path_params["path"]).resolve()
            found = file.is_relative_to(STATIC.resolve()) and file.is_file() and file.name not in _SHOWN_NAMES
        except (ValueError, OSError):  # a zero byte; a name longer than those of files
            found = False
        if not found:
            return Response("Not found.\n", 404, media_type="text/plain")
        kind = "text/javascript" if file.suffix in {".js", ".mjs"} else guess_type(file.name)[0]
        kind = kind or "application/octet-stream"
        return _cached(request, file.read_bytes(), f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)

    # -- the API --------------------------------------------------------------------------------------------------

    async def _unknown(self, request: Request) -> Response:
        try:
            access, _ = await self.service.access(request)
        except (LoginRequired, TooManyAttempts) as error:
            return _refusal(error)
        if not access.allows(None):
            return _error(403, "E00", "You may not see this.")
        known = [one.method for one in ENDPOINTS if f"/api/v1/{one.path}" == _path(request)]
        if known:
            return _error(405, "E02", f"{request.method} is not taken here: {', '.join(known)} is.")
        return _error(404, "E02", "There is nothing of this name. The API is described at api/v1/openapi.json.")

    async def _answer(self, endpoint: ApiRoute, request: Request) -> Response:
        """Carry out one call of the API; every error becomes a document."""
        try:
            access, by_token = await self.service.access(request)
            if not access.allows(None):
                raise NotAllowed("")
            given = await _inputs(endpoint, request, by_token=by_token)
            action = endpoint.needed(given)
            if not access.allows(action):
                raise NotAllowed(action or "")
            call = ApiCall(
                self.service,
                self.service.admin_for(access),
                access,
                endpoint.read(given),
                _base(request),
                partial(_gone, request) if self.service.streams else never,
                partial(self.service.access_now, request),
            )
            found = await endpoint.answer(call)
        except (LoginRequired, TooManyAttempts) as error:
            return _refusal(error)
        except NotAllowed as error:
            what = f"You may not do this: it needs {error.action}." if error.action else "You may not see this."
            return _error(403, "E00", what, action=error.action)
        except ClientDisconnect:
            return Response(status_code=499)
        except ConveyorError as error:
            return _error_of(error)
        except TimeoutError as error:  # a worker that does not answer
            return _error(504, "E00", str(error))
        except Exception:
            logger.exception("the call %s %s failed", endpoint.method, endpoint.path)
            return _error(500, "E00", "This is an error of the dashboard itself; its log has the traceback.")
        if isinstance(found, Response):
            return found
        body = documents.encoded(endpoint.schema, found)
        if endpoint.method == "GET":
            return _cached(request, body, "application/json", store=False)
        return Response(body, endpoint.status, {"cache-control": "no-store"}, "application/json")


async def _inputs(endpoint: ApiRoute, request: Request, *, by_token: bool) -> dict[str, Any]:
    """Return the parameters, or the members of the body. Raises NotAllowed for a change from another site."""
    if endpoint.method == "GET":
        return dict(_each_once(request.query_params.multi_items()))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ConfigurationError("The body must be JSON, with Content-Type: application/json.")
    if not by_token and not is_own_page(request):
        raise NotAllowed("a request from the dashboard's own pages, or a bearer token")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise ConfigurationError(f"The body is larger than {MOST_BODY // 2**20} MiB.")
    try:
        given = json.loads(bytes(body) or b"{}", object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"The body is not JSON: {str(error)[:200]}.") from None
    if not isinstance(given, dict):
        raise ConfigurationError("The body must be a JSON object.")
    return given


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return named values. Raises ConfigurationError where a name stands twice, since it is not known which of them is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ConfigurationError(f"{twice[:100]!r} is given twice: give it once. Nothing was done.")
    return found


def _with_root(scope: Scope) -> Scope:
    """
    Return a scope whose path begins with its `root_path`, as ASGI and Starlette have it.

    Litestar takes the path of a mount away, ends the rest with a slash, and does not say which path it took. Behind a proxy that
    takes a part away the application may name that part, as `FastAPI(root_path=)` does: then the path has the mount alone.
    """
    path, raw = scope["path"], unquote(scope.get("raw_path", b"").decode("latin-1"))
    named, rest = scope.get("root_path", "").rstrip("/"), path.rstrip("/")
    if named:
        mounts = [named[at:] for at, sign in enumerate(named) if sign == "/"]
        mount = next((one for one in mounts if f"{path}/".startswith(f"{one}/")), "")
        return scope if mount == named else {**scope, "path": named + (path.removeprefix(mount) or "/")}
    if raw in {"", path} or not raw.rstrip("/").endswith(rest):
        return scope
    root = raw.rstrip("/").removesuffix(rest)
    return {**scope, "root_path": root, "path": root + (rest or "/")}


async def _gone(request: Request) -> None:
    """Return when the client of a request, whose body was read, has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _base(request: Request) -> str:
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/") + "/"


def _path(request: Request) -> str:
    root = request.scope.get("root_path", "")
    path: str = request.scope["path"]
    return path.removeprefix(root) if root else path


def _cached(request: Request, body: bytes, kind: str, *, store: bool = True) -> Response:
    """Return a response with an ETag, or that the visitor has it already. It is asked each time; of the API nothing is stored."""
    tag = f'"{sha256(body).hexdigest()[:32]}"'
    headers = {"etag": tag, "cache-control": "no-cache" if store else "no-store"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if store and "gzip" in request.headers.get("accept-encoding", ""):
        body, headers = _compressed(body), {**headers, "content-encoding": "gzip", "vary": "accept-encoding"}
    return Response(body, headers=headers, media_type=kind)


@lru_cache(64)
def _compressed(body: bytes) -> bytes:
    """Return a page or file compressed; each is compressed once."""
    return gzip.compress(body, 9, mtime=0)


async def _page_parts(text: str, first: Callable[[], Awaitable[dict[str, Any]]]) -> AsyncIterator[bytes]:
    """Yield the page, and then what it shows first: the browser loads style and modules while that is read."""
    head, _, rest = text.partition("<!-- first -->")
    yield head.encode()
    data = documents.encoded("", await first()).replace(b"<", b"\\u003c")  # no text in it ends the element
    yield b'<script type="application/json" id="first">' + data + b"</script>" + rest.encode()


async def _gzipped(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the parts compressed, each whole for its reader."""
    packer = zlib.compressobj(wbits=31)
    async for part in parts:
        yield packer.compress(part) + packer.flush(zlib.Z_SYNC_FLUSH)
    yield packer.flush()


def _refusal(error: LoginRequired | TooManyAttempts) -> Response:
    if isinstance(error, TooManyAttempts):
        return _error(429, "E00", "Too many wrong passwords from this address. Wait a minute.", {"retry-after": "60"})
    challenge = f'{error.scheme} realm="Conveyor", charset="UTF-8"' if error.scheme == "Basic" else error.scheme
    return _error(401, "E00", "Log in, or send a bearer token that is known.", {"www-authenticate": challenge})


def _error_of(error: ConveyorError) -> Response:
    extra: dict[str, Any] = {}
    if isinstance(error, InvalidFilter):
        extra["position"] = error.position
    if isinstance(error, StoreUnavailable):
        extra["retry_after"] = 2
        return _error(503, error.code, str(error), {"retry-after": "2"}, **extra)
    status = (
        404 if isinstance(error, _NOT_FOUND) else 409 if error.code == _IN_USE or isinstance(error, QueueFull) else 422
    )
    return _error(status, error.code, str(error), **extra)


def _error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None, **extra: Any) -> Response:
    document = {"error": {"code": code, "message": redact(message), "status": status, **extra}}
    return Response(
        documents.encoded("error", document),
        status,
        {"cache-control": "no-store", **(headers or {})},
        "application/json",
    )
