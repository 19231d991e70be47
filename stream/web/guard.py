"""What every request passes: host, origin, size, rate, who asks; and the headers of every answer (DESIGN
3.10)."""

import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from stream.clock import Clock
from stream.web.access import Person, Rates, Role, Sessions, Tokens, is_loopback, same

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 64 * 1024
"""Bytes of a request's body: commands are a few hundred."""

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/api/session"})
"""Beside pages and their files, which hold nothing about any feed."""

CSRF = "x-csrf-token"

ANYBODY_PER_S, ANYBODY_BURST = 20.0, 200.0
"""Requests of callers who have not said who they are: pages and logins."""
PERSON_PER_S, PERSON_BURST = 60.0, 600.0
"""A wall shows some thirty pictures at once, every five seconds; a page asks for a handful of things."""
COMMAND_PER_S, COMMAND_BURST = 2.0, 30.0
"""Requests that change something: faster than people, slower than a loop gone wrong."""
LOGIN_PER_S, LOGIN_BURST = 0.2, 10.0
ALL_LOGINS_PER_S, ALL_LOGINS_BURST = 5.0, 100.0
"""Tokens cannot be guessed; this keeps the audit log readable."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where we are found. `host` is what we listen on; `open`: whoever reaches us may do everything."""

    host: str
    open: bool
    public_url: str = ""
    secure: bool = False
    """Whether browsers see HTTPS."""

    def knows(self, host: str) -> bool:
        """Whether the Host header is ours. On loopback another name means that a page of a stranger has made
        its own name point here (DNS rebinding)."""
        name = urlsplit(f"//{host}").hostname or ""
        if self.public_url and host == urlsplit(self.public_url).netloc:
            return True
        if is_loopback(self.host):
            return is_loopback(name)
        return not self.public_url or is_loopback(name) or name == self.host.strip("[]")


class Guard:
    """An ASGI application around the one that answers. Puts a `Person` or None into `scope["state"]`."""

    def __init__(
        self, app: App, place: Place, tokens: Tokens, sessions: Sessions, csrf: str, clock: Clock
    ) -> None:
        """`csrf`: what pages send back where there are no sessions."""
        self._app = app
        self._place = place
        self._tokens = tokens
        self._sessions = sessions
        self._csrf = csrf
        self._anybody = Rates(ANYBODY_PER_S, ANYBODY_BURST, clock)
        self._persons = Rates(PERSON_PER_S, PERSON_BURST, clock)
        self._commands = Rates(COMMAND_PER_S, COMMAND_BURST, clock)
        self._logins = Rates(LOGIN_PER_S, LOGIN_BURST, clock)
        self._all_logins = Rates(ALL_LOGINS_PER_S, ALL_LOGINS_BURST, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = _headers(message.get("headers", []), scope["path"], self._place.secure)
            await send(message)

        found = self._refusal(scope)
        if found is not None:
            await _refuse(with_headers, *found)
            return
        await self._app(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str, dict[str, str]] | None:
        """Return status, sentence and headers of a refusal, or None. Notes who asks."""
        request = HTTPConnection(scope)
        if not self._place.knows(request.headers.get("host", "")):
            return 421, "this host name is not ours; web.public_url names the one behind a proxy", {}
        person = who(request, self._place, self._tokens, self._sessions, self._csrf)
        scope.setdefault("state", {})["person"] = person
        wait_s = self._wait_s(scope, request, person)
        if wait_s > 0:
            again = str(math.ceil(wait_s))
            return 429, f"too many requests; try again in {again} s", {"retry-after": again}
        if scope["path"].startswith("/api/") and scope["path"] not in OPEN_PATHS and person is None:
            return 401, "a token is needed", {"www-authenticate": "Bearer"}
        if scope["method"] in SAFE:
            return None
        return _bad_body(request) or self._forged(request, person, scope["path"])

    def _wait_s(self, scope: Scope, request: HTTPConnection, person: Person | None) -> float:
        address = request.client.host if request.client else ""
        changes = scope["method"] not in SAFE
        if changes and scope["path"] == "/api/session" and scope["method"] == "POST":
            return max(self._logins.wait_s(address), self._all_logins.wait_s(""))
        if person is None:
            return self._anybody.wait_s(address)
        if changes:
            return self._commands.wait_s(person.name)
        return self._persons.wait_s(person.name)

    def _forged(
        self, request: HTTPConnection, person: Person | None, path: str
    ) -> tuple[int, str, dict[str, str]] | None:
        """Refuse what a page of somebody else's may have sent with our user's cookie."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc not in self._netlocs(request):
            return 403, "this request comes from another site", {}
        if path == "/api/session" and request.scope["method"] == "POST":
            return None  # brings its own token, and a foreign page cannot read what comes back
        if person is not None and person.csrf and not same(request.headers.get(CSRF, ""), person.csrf):
            return 403, f"header {CSRF} is missing or wrong; /api/session tells it", {}
        return None

    def _netlocs(self, request: HTTPConnection) -> set[str]:
        return {request.headers.get("host", ""), urlsplit(self._place.public_url).netloc} - {""}


def who(
    request: HTTPConnection, place: Place, tokens: Tokens, sessions: Sessions, csrf: str
) -> Person | None:
    """Return who asks: a bearer token, else a session, else, where nobody need say so, the operator."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        entry = tokens.find(token.strip())
        return Person(entry.name, entry.role) if entry else None
    cookie = request.cookies.get(Sessions.COOKIE)
    person = sessions.person(cookie) if cookie else None
    if person is None and place.open:
        return Person("local", Role.OPERATOR, csrf)
    return person


def _bad_body(request: HTTPConnection) -> tuple[int, str, dict[str, str]] | None:
    length = request.headers.get("content-length")
    if length is None:
        if "transfer-encoding" in request.headers:
            return 411, "a body must come with its length", {}
        return None
    if not length.isdigit() or int(length) > MAX_BODY:
        return 413, f"a body has at most {MAX_BODY} bytes", {}
    return None


def _headers(found: list[tuple[bytes, bytes]], path: str, secure: bool) -> list[tuple[bytes, bytes]]:
    names = {name.lower() for name, _ in found}
    wanted = dict(HEADERS)
    if path.startswith("/api/"):
        wanted["cache-control"] = "no-store"
    if secure:
        wanted["strict-transport-security"] = "max-age=31536000"
    extra = [(name.encode(), value.encode()) for name, value in wanted.items() if name.encode() not in names]
    return [*found, *extra]


async def _refuse(send: Send, status: int, sentence: str, headers: dict[str, str]) -> None:
    body = json.dumps({"error": sentence}).encode()
    found = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    raw = [(name.encode(), value.encode()) for name, value in found.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
