"""Routes of what was found: incidents, evidence, decisions, the audit sample, precision, the audit log."""

import csv
import io
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from typing import IO, Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import Field
from starlette.background import BackgroundTask

from stream.console import clean
from stream.copies import read_evidence
from stream.decisions import Choice, Decision, Sample, Subject, check_reason, record_of
from stream.errors import UnmaskError
from stream.evidence import SCHEME
from stream.records import FARTHEST_US, STREAM_ID, Topic
from stream.web import bundle, history
from stream.web.incidents import FIELDS, Incident, Wanted, decision_of
from stream.web.service import FieldError, Moderator, Operator, Service, Viewer
from stream.web.watching import Given

IncidentId = Annotated[str, Path(pattern="^[0-9a-z]{1,64}$", description="Id of an incident.")]
SampleId = Annotated[str, Path(pattern="^[0-9a-f]{24}$", description="Id of a face of the audit sample.")]
Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256 of the content.")]
Us = Annotated[int | None, Query(ge=0, le=FARTHEST_US, description="Media time, microseconds UTC.")]

PAGE = 100
MAX_PAGE = 500
MAX_EXPORT = 20_000
"""Incidents in one file: two weeks at 50 an hour. Beyond, narrow the search."""

AUDIT_PER_PARTITION = 200

TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
}
"""Of evidence files; anything else is a download."""

EVIDENCE_HEADERS = {
    "cache-control": "private, max-age=3600",
    "content-security-policy": "default-src 'none'; sandbox; frame-ancestors 'none'",
}
"""Content-addressed, so it never changes; opened by itself it may run nothing."""

CHUNK = 256 * 1024


class NewDecision(Given):
    """What somebody found. A dismissed incident is withdrawn from everybody who was told of it."""

    decision: Choice = Field(strict=False)
    reason: str = Field("", max_length=2000, description="Needed to dismiss; told to receivers then.")


def routes(service: Service) -> APIRouter:
    """Return the routes."""
    api = APIRouter(prefix="/api", tags=["deciding"])
    view, config, log = service.view, service.config, service.log

    def wanted(
        feed: Annotated[str | None, Query(pattern=rf"^{STREAM_ID.pattern}(~replay)?$")] = None,
        status: Annotated[str | None, Query(pattern="^(open|closed|retracted)$")] = None,
        severity: Annotated[str | None, Query(pattern="^(low|medium|high)$")] = None,
        verdict: Annotated[str | None, Query(pattern="^(manipulated|inconclusive)$")] = None,
        decision: Annotated[str | None, Query(pattern="^(none|confirmed|dismissed|inconclusive)$")] = None,
        from_us: Us = None,
        to_us: Us = None,
        q: Annotated[str, Query(max_length=200, description="Words that must all occur.")] = "",
    ) -> Wanted:
        return Wanted(feed, status, severity, verdict, decision, from_us, to_us, q)

    Search = Annotated[Wanted, Depends(wanted)]  # noqa: N806

    @api.get("/incidents")
    def incidents(
        person: Viewer,
        search: Search,
        before: Annotated[
            str, Query(pattern="^[0-9a-z]{0,64}$", description="Older than this incident.")
        ] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = PAGE,
    ) -> dict[str, Any]:
        """Incidents, the newest first."""
        found, total = view.incidents(search, limit, before)
        return {"incidents": found, "total": total}

    @api.get("/incidents.csv", response_class=Response, responses={200: {"content": {"text/csv": {}}}})
    def as_csv(request: Request, person: Viewer, search: Search) -> Response:
        """The same as a table, at most 20000 lines; times in microseconds UTC."""
        found, _ = view.incidents(search, MAX_EXPORT)
        headers = {"content-disposition": 'attachment; filename="incidents.csv"'}
        return Response(_csv(found), media_type="text/csv; charset=utf-8", headers=headers)

    @api.get("/incidents.json")
    def as_json(person: Viewer, search: Search) -> list[dict[str, Any]]:
        """The same as one JSON list, at most 20000 incidents."""
        return view.incidents(search, MAX_EXPORT)[0]

    @api.get("/incidents/{name}")
    def incident(person: Viewer, name: IncidentId) -> dict[str, Any]:
        """All that was told of an incident: its newest event whole, the others in short, decisions."""
        found = _incident(service, name)
        told = history.events(log, found)
        return {
            **found.as_json(),
            "newest": told[-1]["data"] if told else None,
            "events": [_short(event) for event in told],
            "decisions": [_decision_json(one) for one in view.decisions(name)],
            "thresholds": {
                "open_probability": config.verdict.open_probability,
                "close_probability": config.verdict.close_probability,
                "own_calibration": bool(config.verdict.calibration),
            },
            "muted": view.mute(found.stream) is not None,
        }

    @api.get("/incidents/{name}/timeline")
    def timeline(person: Viewer, name: IncidentId) -> dict[str, Any]:
        """The scores about an incident, as far as the log still holds them."""
        with service.heavy():
            found, whole = history.scores(log, service.topic(Topic.SCORES), _incident(service, name))
        return history.timeline(found, whole)

    @api.get(
        "/incidents/{name}/bundle",
        response_class=StreamingResponse,
        responses={200: {"content": {"application/zip": {}}}},
    )
    def download(request: Request, person: Viewer, name: IncidentId) -> StreamingResponse:
        """The evidence as a ZIP with a signed manifest."""
        found = _incident(service, name)
        with service.heavy():
            file = _bundle(service, signer(), found)
        service.put(service.audit(request, person, "bundle", name))
        headers = {"content-disposition": f'attachment; filename="incident-{name}.zip"'}
        return StreamingResponse(_parts(file), media_type="application/zip", headers=headers)

    @cache
    def signer() -> bundle.Signer:
        return bundle.Signer(service.key_file)

    @api.get(
        "/bundle-key", response_class=Response, responses={200: {"content": {"application/x-pem-file": {}}}}
    )
    def bundle_key(person: Viewer) -> Response:
        """The public key (Ed25519, PEM) that manifests of bundles are signed with."""
        return Response(signer().public, media_type="application/x-pem-file")

    @api.post("/incidents/{name}/decision", status_code=201)
    def decide(request: Request, person: Moderator, name: IncidentId, new: NewDecision) -> dict[str, Any]:
        """Say what an incident was. The newest decision holds; a withdrawal cannot be taken back."""
        found = _incident(service, name)
        reason = _reason(new)
        decision = decision_of(found, new.decision, reason, person.name, service.clock.now_us())
        action = f"incident {new.decision.value}"
        service.put(record_of(config, decision), service.audit(request, person, action, name, reason))
        return _decision_json(decision)

    @api.get("/evidence/{digest}", response_class=FileResponse)
    def evidence(person: Viewer, digest: Digest) -> FileResponse:
        """A picture or clip that an event names; ranges are answered, as players ask for them."""
        reference, drop = f"{SCHEME}{digest}", None
        try:
            try:
                path = service.evidence.path(reference)
            except FileNotFoundError:
                path = _fetched(service, reference)
                drop = BackgroundTask(path.unlink)
        except FileNotFoundError as error:
            raise HTTPException(404, "this evidence is not here; it may have expired") from error
        kind = TYPES.get(path.suffix, "application/octet-stream")
        return FileResponse(path, media_type=kind, headers=EVIDENCE_HEADERS, background=drop)

    @api.get("/samples")
    def samples(person: Viewer) -> dict[str, Any]:
        """Faces that raised no alert and were drawn for review, the oldest first."""
        found = view.samples()
        return {
            "total": len(found),
            "rate": config.web.audit_rate,
            "samples": [_sample_json(one) for one in found[:PAGE]],
        }

    @api.get(
        "/samples/{name}/picture", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}}
    )
    def sample_picture(person: Viewer, name: SampleId) -> Response:
        """The face."""
        return Response(_sample(service, name).crop, media_type="image/jpeg", headers=EVIDENCE_HEADERS)

    @api.post("/samples/{name}/decision", status_code=201)
    def review(request: Request, person: Moderator, name: SampleId, new: NewDecision) -> dict[str, Any]:
        """Say what a face of the sample was: `confirmed` that it is manipulated and was missed, `dismissed`
        that it is not."""
        found = _sample(service, name)
        decision = Decision(
            found.stream,
            Subject.SAMPLE,
            found.id,
            new.decision,
            " ".join(new.reason.split())[:500],
            person.name,
            service.clock.now_us(),
            found.probability,
            logits=dict(found.logits),
            models=dict(found.models),
            calibration=found.calibration,
        )
        action = f"sample {new.decision.value}"
        service.put(
            record_of(config, decision), service.audit(request, person, action, name, decision.reason)
        )
        return _decision_json(decision)

    @api.get("/precision")
    def precision(person: Viewer) -> dict[str, Any]:
        """How many alerts were right, in all, per feed and per model, with 95 % intervals; and what the audit
        sample says of what was missed."""
        return view.record_of_decisions()

    @api.get("/audit")
    def audit(person: Operator) -> list[dict[str, Any]]:
        """Who did what, the newest first."""
        with service.heavy():
            records = list(history.newest(log, service.topic(Topic.AUDIT), AUDIT_PER_PARTITION))
        found = [value for record in records if isinstance(value := _loaded(record.value), dict)]
        return sorted(found, key=lambda one: one.get("time_us", 0), reverse=True)

    return api


def _incident(service: Service, name: str) -> Incident:
    found = service.view.incident(name)
    if found is None:
        raise HTTPException(404, f"there is no incident {name}")
    return found


def _sample(service: Service, name: str) -> Sample:
    found = service.view.sample(name)
    if found is None:
        raise HTTPException(404, f"there is no face {name} in the sample")
    return found


def _reason(new: NewDecision) -> str:
    """Return the reason; to dismiss takes one, since everybody is told."""
    if new.decision is not Choice.DISMISSED and not new.reason.strip():
        return ""
    try:
        return clean(check_reason(new.reason))
    except UnmaskError as error:
        raise FieldError("reason", str(error)) from error


def _short(event: dict[str, Any]) -> dict[str, Any]:
    data = event["data"]
    names = ("number", "event", "severity", "probability", "interval", "last_media_us", "changes", "reason")
    return {"id": event.get("id"), "time": event.get("time"), **{name: data.get(name) for name in names}}


def _decision_json(decision: Decision) -> dict[str, Any]:
    return {
        "about": decision.about,
        "stream": decision.stream,
        "decision": decision.choice.value,
        "reason": decision.reason,
        "author": decision.author,
        "time_us": decision.time_us,
    }


def _sample_json(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.id,
        "stream": sample.stream,
        "media_us": sample.media_us,
        "probability": sample.probability,
        "fused": sample.fused,
        "logits": dict(sample.logits),
    }


def _csv(found: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(FIELDS)
    table.writerows([_cell(one[name]) for name in FIELDS] for one in found)
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _fetched(service: Service, reference: str) -> pathlib.Path:
    """Return a file, to be deleted by who asked, of evidence that only the store of copies has."""
    data, suffix = read_evidence(reference, service.evidence, service.copies)
    descriptor, name = tempfile.mkstemp(suffix)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return pathlib.Path(name)


def _bundle(service: Service, signer: bundle.Signer, found: Incident) -> IO[bytes]:
    told = history.events(service.log, found)
    scores, whole = history.scores(service.log, service.topic(Topic.SCORES), found)
    facts = {
        "incident": found.as_json(),
        "events": told,
        "decisions": [_decision_json(one) for one in service.view.decisions(found.id)],
        "scores": {"whole": whole, "records": scores},
    }
    file = tempfile.SpooledTemporaryFile(bundle.SPOOL_BYTES)  # noqa: SIM115  closed by who reads it
    try:
        read = partial(read_evidence, local=service.evidence, store=service.copies)
        bundle.write(file, signer, read, facts, service.clock.now_us())
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while part := file.read(CHUNK):
            yield part


def _loaded(value: bytes | None) -> Any:
    try:
        return json.loads(value or b"null")
    except ValueError:
        return None
