"""What may be attached from a page, checked field by field (DESIGN 3.9).

A page reaches further than a shell: it names no file of the machine that serves it, and no variable but those
that are meant for sources. Nothing is read to check an address.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from stream.errors import UnmaskError
from stream.ingest_service import check_public
from stream.records import check_stream_id
from stream.sources import PUSHED, check_fps, parse_source
from stream.web.service import FieldError

T = TypeVar("T")

REFERENCE = re.compile(r"env:UNMASK_SOURCE_[A-Z0-9_]{1,64}")
"""Other variables may hold other secrets, and complaints about an address quote it."""

MAX_LABELS = 16
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
MAX_LABEL_VALUE = 128

RIGHT = (
    "rtmp(s)://, rtsp(s)://, http(s)://, srt://, udp://, tcp://, env:UNMASK_SOURCE_NAME for an address with "
    "a secret, or push: for another producer"
)


def entry_from(
    address: str, name: str | None, fps: float | None, labels: Mapping[str, str], now_us: int
) -> dict[str, Any]:
    """Return the entry of `sources` that a form describes, `id` in it.

    Raises `FieldError` naming the field and what would be right.
    """
    address = address.strip()
    checked = None if not name else _field("id", lambda: check_stream_id(name))
    found = _addressed(address, checked)
    rate = _field("fps", lambda: check_fps(fps))
    own = {"labels": check_labels(labels), "attached_us": now_us} | ({} if rate is None else {"fps": rate})
    return {**found, **own}


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return labels that may stand in the list. Raises `FieldError`."""
    if len(labels) > MAX_LABELS:
        raise FieldError("labels", f"there are {len(labels)} labels; at most {MAX_LABELS} are right")
    for name, value in labels.items():
        if not LABEL.fullmatch(name) or len(value) > MAX_LABEL_VALUE or not value.isprintable():
            raise FieldError(
                "labels",
                f"label {name[:40]!r} must have a name of 1 to 32 letters, digits, . _ - and a value of at "
                f"most {MAX_LABEL_VALUE} characters",
            )
    return dict(labels)


def _addressed(address: str, name: str | None) -> dict[str, Any]:
    if address.startswith("env:"):
        if not REFERENCE.fullmatch(address):
            raise FieldError(
                "address", "a variable must be called env:UNMASK_SOURCE_ and capitals, digits, _"
            )
        if name is None:
            raise FieldError("id", "the id is empty; an address in a variable needs one")
        # Not looked up here: it is a variable of the processes that attach.
        return {"id": name, "secret_ref": address}
    known = "://" in address or address == PUSHED
    if not known or address.lower().startswith("file:"):
        raise FieldError(
            "address", f"the address must begin with {RIGHT}; files are attached by unmask attach"
        )
    if address == PUSHED and name is None:
        raise FieldError("id", "the id is empty; a feed of another producer needs the one that it writes")
    given = f"{name}={address}" if name else address
    source, _ = _field("address", lambda: parse_source(given, {}))
    if source.address != address:  # something before the first = was taken for an id
        raise FieldError("address", f"the address must begin with {RIGHT}")
    _field("address", lambda: check_public(replace(source, secret_ref=None)))
    return source.entry()


def _field(name: str, check: Callable[[], T]) -> T:
    try:
        return check()
    except UnmaskError as error:
        raise FieldError(name, str(error)) from error
