"""Routes of what is watched: the wall, its live events, feeds, pictures, mutes, coverage."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from stream import attachments
from stream.decisions import LONGEST_MUTE_S, Mute, check_reason, record_of
from stream.errors import Code, UnmaskError
from stream.sources import check_fps
from stream.web.attaching import entry_from
from stream.web.follow import LOOK_S
from stream.web.guard import who
from stream.web.ledger import DAY_US
from stream.web.service import FieldError, Moderator, Operator, Service, Viewer
from stream.windows import MICRO

StreamId = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="Id of a feed.")]

MAX_LISTENERS = 64
"""Pages that follow live, all together: each costs a little of every second."""

BEAT_S = 5.0
"""A page that hears nothing for some times this knows that it is cut off."""

MAX_DAYS = 62
"""Days of coverage in one answer."""


class Given(BaseModel):
    """What a request brings: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NewFeed(Given):
    """A feed to attach. Without `id` it is made out of the address."""

    address: str = Field(max_length=2048)
    id: str | None = Field(None, max_length=64)
    fps: float | None = Field(None, description="Pictures a second looked at while calm; null: the default.")
    labels: dict[str, str] = Field(default_factory=dict, max_length=16)
    replace: bool = Field(False, description="Whether a feed of this id may be replaced.")


class NewRate(Given):
    fps: float | None = Field(description="Pictures a second looked at while calm; null: the default.")


class NewMute(Given):
    """Whom it may concern is not told of this feed for so long; incidents are recorded all the same."""

    seconds: float = Field(gt=0, le=LONGEST_MUTE_S)
    reason: str = Field(max_length=2000)


class Listeners:
    """Counts pages that follow live, and makes what they are told once for all."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._told: tuple[int, int, bytes] = (-1, -1, b"")
        self.count = 0

    def text(self, since: int) -> tuple[int, bytes]:
        """Return the version that a page has after hearing this, and the event."""
        version = self._service.view.version
        if self._told[:2] != (since, version):
            changes = self._service.view.changes(since)
            body = json.dumps(changes, separators=(",", ":")).encode()
            self._told = (since, changes["version"], b"event: changes\ndata: " + body + b"\n\n")
        return self._told[1], self._told[2]

    async def follow(self, request: Request) -> AsyncIterator[bytes]:
        """Yield what changed, coalesced: a page that is slow misses nothing and gets only the newest."""
        service = self._service
        self.count += 1
        try:
            since, text = self.text(0)
            yield text
            silent_s, away = 0.0, service.view.away
            while not service.stopping.is_set():
                await asyncio.sleep(LOOK_S)
                silent_s += LOOK_S
                person = who(request, service.place, service.tokens, service.sessions, service.csrf)
                if person is None or await request.is_disconnected():
                    return
                if service.view.version != since or service.view.away != away:
                    since, text = self.text(since)
                    silent_s, away = 0.0, service.view.away
                    yield text
                elif silent_s >= BEAT_S:
                    silent_s = 0.0
                    yield b"event: beat\ndata: {}\n\n"
        finally:
            self.count -= 1


def routes(service: Service) -> APIRouter:
    """Return the routes."""
    api = APIRouter(prefix="/api", tags=["watching"])
    listeners = Listeners(service)
    view, config, clock = service.view, service.config, service.clock

    @api.get("/wall")
    def wall(person: Viewer, since: Annotated[int, Query(ge=0, lt=2**53)] = 0) -> dict[str, Any]:
        """Every feed as the wall shows it, or those that changed after version `since`."""
        return view.changes(since)

    @api.get("/events", response_class=StreamingResponse)
    async def events(request: Request, person: Viewer) -> StreamingResponse:
        """Server-sent events: `changes` with what `/api/wall` says, at most once a second; `beat` when
        nothing does."""
        if listeners.count >= MAX_LISTENERS:
            raise HTTPException(503, f"{MAX_LISTENERS} pages follow already", {"retry-after": "30"})
        return StreamingResponse(listeners.follow(request), media_type="text/event-stream")

    @api.get("/feeds")
    def feeds(person: Viewer) -> list[dict[str, Any]]:
        """The list of feeds, with what their entries say and how they stand."""
        return view.feeds()

    @api.post("/feeds", status_code=201)
    def attach(request: Request, person: Operator, new: NewFeed) -> dict[str, Any]:
        """List a feed, for ingest or a running watch to attach."""
        entry = entry_from(new.address, new.id, new.fps, new.labels, clock.now_us())
        name = entry["id"]
        if view.listed(name) is not None and not new.replace:
            raise FieldError("id", f"{name} is attached already; choose another id, or replace it", 409)
        attachments.enlist(service.log, config, name, entry, clock)
        service.put(service.audit(request, person, "attach", name, new.address))
        return {"id": name}

    @api.patch("/feeds/{stream}")
    def change(request: Request, person: Operator, stream: StreamId, new: NewRate) -> dict[str, Any]:
        """Give a feed another sampling rate."""
        try:
            check_fps(new.fps)
        except UnmaskError as error:
            raise FieldError("fps", str(error)) from error
        attachments.change_fps(service.log, config, stream, new.fps, clock)
        service.put(service.audit(request, person, "fps", stream, str(new.fps)))
        return {"id": stream, "fps": new.fps}

    @api.delete("/feeds/{stream}")
    def detach(request: Request, person: Operator, stream: StreamId) -> dict[str, Any]:
        """Take a feed out of the list: it is watched no more, and its open incident closes."""
        attachments.unlist(service.log, config, stream, clock)
        service.put(service.audit(request, person, "detach", stream))
        return {"id": stream}

    @api.get(
        "/feeds/{stream}/picture", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}}
    )
    def picture(person: Viewer, stream: StreamId) -> Response:
        """The newest small picture of a feed."""
        glimpse = view.glimpse(stream)
        if glimpse is None:
            raise HTTPException(404, f"there is no picture of {stream}")
        headers = {"cache-control": "private, max-age=60"}
        return Response(glimpse.data, media_type="image/jpeg", headers=headers)

    @api.post("/feeds/{stream}/mute")
    def mute(request: Request, person: Moderator, stream: StreamId, new: NewMute) -> dict[str, Any]:
        """Mute a feed for a while, with a reason."""
        _listed(service, stream)
        now_us = clock.now_us()
        said = _mute(stream, now_us, now_us + round(new.seconds * MICRO), new.reason, person.name)
        service.put(record_of(config, said), service.audit(request, person, "mute", stream, said.reason))
        return {"id": stream, "until_us": said.until_us}

    @api.delete("/feeds/{stream}/mute")
    def unmute(request: Request, person: Moderator, stream: StreamId) -> dict[str, Any]:
        """End the mute of a feed now."""
        before = view.mute(stream)
        if before is None:
            raise HTTPException(404, f"{stream} is not muted")
        now_us = clock.now_us()
        said = Mute(stream, before.from_us, now_us, "ended", person.name, now_us)
        service.put(record_of(config, said), service.audit(request, person, "unmute", stream))
        return {"id": stream, "until_us": now_us}

    @api.get("/coverage")
    def coverage(
        person: Viewer,
        first: Annotated[date | None, Query(alias="from", description="UTC; else six days ago.")] = None,
        last: Annotated[date | None, Query(alias="to", description="UTC, inclusive; else today.")] = None,
    ) -> dict[str, Any]:
        """Seconds per feed and day: decided, inconclusive, unwatched, each by reason. `share` tells how
        much of the scores that the log holds has been added up."""
        today = datetime.fromtimestamp(clock.now_us() / MICRO, UTC).date()
        last = last or today
        first = first or max(date.min + timedelta(6), last) - timedelta(6)
        days = (last - first).days + 1
        if not 1 <= days <= MAX_DAYS:
            raise FieldError("from", f"from {first} to {last} is {days} days; 1 to {MAX_DAYS} are right")
        from_us = (first - date(1970, 1, 1)).days * DAY_US
        live = view.live()
        with service.heavy(), view.ledger_lock:
            rows = view.ledger.rows(clock.now_us(), live, from_us, from_us + days * DAY_US)
        return {"from": str(first), "to": str(last), "share": round(view.ledger_share, 4), "rows": rows}

    return api


def _listed(service: Service, stream: str) -> None:
    if service.view.listed(stream) is None:
        raise UnmaskError(Code.SOURCE_NOT_FOUND, f"no stream {stream!r} is attached")


def _mute(stream: str, now_us: int, until_us: int, reason: str, author: str) -> Mute:
    try:
        return Mute(stream, now_us, until_us, check_reason(reason), author, now_us)
    except UnmaskError as error:
        raise FieldError("reason", str(error)) from error
