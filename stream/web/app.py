"""The application: pages, REST, live events (DESIGN 3.6, 3.9, 3.10). `build_app` is what a server serves."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.staticfiles import StaticFiles

from stream.errors import Code, UnmaskError
from stream.web import deciding, watching
from stream.web.access import SESSION_S, Person, Sessions
from stream.web.guard import App, Guard
from stream.web.service import FieldError, Problem, Service
from stream.web.watching import Given

STATIC = Path(__file__).parent / "static"

PAGES = ("/", "/incident/{name}", "/feeds", "/coverage", "/history", "/review", "/audit")
"""All are one file, which shows what its address says."""

STATUS = {
    Code.SOURCE_NOT_FOUND: 404,
    Code.LOG_AWAY: 503,
    Code.LOG_FULL: 503,
    Code.LOG_UNUSABLE: 503,
    Code.LOG_FENCED: 503,
    Code.LOG_POSITION: 503,
}
"""Of errors that name no field; others are the request's."""

PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in (
        (400, "not understood"),
        (401, "a token is needed"),
        (403, "the role does not reach so far, or the request was forged"),
        (404, "there is no such thing"),
        (409, "it is there already"),
        (411, "a body must come with its length"),
        (413, "the body is too large"),
        (421, "the host name is not ours"),
        (422, "a field is wrong"),
        (429, "too many requests"),
        (503, "the log is away, or too much is asked at once"),
    )
}


class Login(Given):
    token: str = Field(max_length=256)


class Who(BaseModel):
    """Who asks. `csrf` belongs into the header x-csrf-token of requests that change something."""

    name: str | None
    role: str | None
    csrf: str
    open: bool = Field(description="Whether nobody need log in here.")


def build_app(service: Service) -> App:
    """Return the ASGI application of one web interface."""
    app = FastAPI(
        title="Unmask",
        version=version("unmask"),
        summary="Live video watched for manipulated faces.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        responses=PROBLEMS,
    )
    app.include_router(_session_routes(service))
    app.include_router(watching.routes(service))
    app.include_router(deciding.routes(service))
    app.include_router(_health_routes(service), include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC))
    for page in PAGES:
        app.add_api_route(page, _page, include_in_schema=False, response_class=FileResponse)
    app.add_exception_handler(UnmaskError, _unmask_error)
    app.add_exception_handler(FieldError, _field_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    return Guard(app, service.place, service.tokens, service.sessions, service.csrf, service.clock)


def _page() -> FileResponse:
    return FileResponse(STATIC / "index.html", media_type="text/html", headers={"cache-control": "no-cache"})


def _session_routes(service: Service) -> APIRouter:
    api = APIRouter(prefix="/api", tags=["session"])

    @api.get("/session")
    def session(request: Request) -> Who:
        """Who asks."""
        return _who(service, request.scope["state"].get("person"))

    @api.post("/session")
    def login(request: Request, response: Response, given: Login) -> Who:
        """Log a browser in: the token becomes a cookie that scripts cannot read."""
        entry = service.tokens.find(given.token)
        if entry is None:
            service.put(service.audit(request, None, "login refused", ""))
            raise HTTPException(401, "this token is not known")
        cookie = service.sessions.begin(entry)
        response.set_cookie(
            Sessions.COOKIE,
            cookie,
            max_age=round(SESSION_S),
            httponly=True,
            samesite="strict",
            secure=service.place.secure,
        )
        person = service.sessions.person(cookie)
        service.put(service.audit(request, person, "login", entry.name))
        return _who(service, person)

    @api.delete("/session")
    def logout(request: Request, response: Response) -> Who:
        """Log out."""
        service.sessions.end(request.cookies.get(Sessions.COOKIE, ""))
        response.delete_cookie(Sessions.COOKIE)
        return _who(service, None)

    return api


def _who(service: Service, person: Person | None) -> Who:
    return Who(
        name=person.name if person else None,
        role=person.role.word if person else None,
        csrf=person.csrf if person else "",
        open=service.place.open,
    )


def _health_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/healthz")
    def healthy() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @routes.get("/readyz")
    def ready() -> PlainTextResponse:
        view = service.view
        if view.ready and view.away is None:
            return PlainTextResponse("ok\n")
        return PlainTextResponse("no\n", 503)

    return routes


def _problem(status: int, error: str, field: str | None = None, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": error, "field": field}, status, headers)


def _unmask_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UnmaskError)
    status = STATUS.get(error.code, 422)
    return _problem(status, str(error), headers={"retry-after": "5"} if status == 503 else None)


def _field_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FieldError)
    return _problem(error.status, str(error), error.field)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    field = place[1] if len(place) > 1 else None
    return _problem(422, f"{'.'.join(place[1:]) or place[0]}: {first['msg']}", field)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return _problem(error.status_code, str(error.detail), headers=error.headers)
