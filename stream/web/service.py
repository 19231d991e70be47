"""What the routes share: the view, the log, who asks, and the audit log (DESIGN 3.10)."""

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from pydantic import BaseModel

from stream.clock import Clock
from stream.config import Config
from stream.copies import Store
from stream.evidence import EvidenceStore
from stream.log import Log
from stream.records import SCHEMA, OutRecord, Topic
from stream.redact import redact
from stream.topics import topic_name
from stream.web.access import Person, Role, Sessions, Tokens
from stream.web.guard import Place
from stream.web.view import View

WRITE_S = 10.0
"""Longest wait until a command is durable."""

HEAVY = 4
"""Answers at once that read a stretch of the log or make a file: each takes memory for what it reads."""

HEAVY_WAIT_S = 5.0

MAX_DETAIL = 500
"""Characters of what the audit log says of an action."""


class Problem(BaseModel):
    """Why a request was refused; `field` is the one at fault, if it is one."""

    error: str
    field: str | None = None


class FieldError(Exception):
    """A request names something wrong: `sentence` belongs beside `field`."""

    def __init__(self, field: str, sentence: str, status: int = 422) -> None:
        super().__init__(sentence)
        self.field = field
        self.status = status


@dataclass(slots=True)
class Service:
    """One web interface."""

    config: Config
    log: Log
    clock: Clock
    view: View
    evidence: EvidenceStore
    tokens: Tokens
    sessions: Sessions
    place: Place
    csrf: str
    key_file: Path
    """Of the signatures under bundles."""
    copies: Store | None = None
    """Where evidence is that other machines found, and this one's after it expired here."""
    stopping: threading.Event = field(default_factory=threading.Event)
    _heavy: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(HEAVY))

    def topic(self, topic: Topic) -> str:
        return topic_name(self.config, topic)

    def put(self, *records: OutRecord) -> None:
        """Write and wait until all is durable. Raises `UnmaskError` as the log does."""
        # A name of its own each time: two requests must not end each other.
        with self.log.producer(f"web-{uuid.uuid4().hex[:12]}") as producer:
            for record in records:
                producer.send(record)
            producer.flush(WRITE_S)

    def audit(
        self, request: Request, person: Person | None, action: str, about: str, detail: str = ""
    ) -> OutRecord:
        """Return the record of who did what; to be written with what was done."""
        now_us = self.clock.now_us()
        name = person.name if person else ""
        value = {
            "schema": SCHEMA,
            "time_us": now_us,
            "who": name,
            "role": person.role.word if person else None,
            "address": request.client.host if request.client else None,
            "action": action,
            "about": about,
            "detail": redact(detail)[:MAX_DETAIL],
        }
        headers = {"schema": str(SCHEMA).encode(), "content-type": b"application/json"}
        return OutRecord(self.topic(Topic.AUDIT), name, json.dumps(value).encode(), headers, now_us)

    @contextmanager
    def heavy(self) -> Iterator[None]:
        """Let only a few such answers be made at a time; 503 for whoever would wait too long."""
        if not self._heavy.acquire(timeout=HEAVY_WAIT_S):
            raise HTTPException(503, "too many reports are being made; try again", {"retry-after": "5"})
        try:
            yield
        finally:
            self._heavy.release()


def person_of(request: Request) -> Person:
    """Return who asks. The guard has let nobody else through."""
    person: Person | None = request.scope["state"].get("person")
    if person is None:
        raise HTTPException(401, "a token is needed", {"www-authenticate": "Bearer"})
    return person


def _at_least(role: Role) -> Any:
    def check(request: Request) -> Person:
        person = person_of(request)
        if person.role < role:
            raise HTTPException(403, f"this needs the role {role.word}; yours is {person.role.word}")
        return person

    return check


Viewer = Annotated[Person, Depends(_at_least(Role.VIEWER))]
Moderator = Annotated[Person, Depends(_at_least(Role.MODERATOR))]
Operator = Annotated[Person, Depends(_at_least(Role.OPERATOR))]
