"""One stream's story: from scored frames and control records to scores, verdicts, incidents (DESIGN 3.3-3.6).

Pure in media time: the same events give the same outputs, however often the aggregate is turned into
`state` and restored in between. The evidence store is all it writes to: content-addressed, so repeatable.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from detectors.cues import Cue
from detectors.late import Late, Share, load_late
from detectors.readings import Box, FaceReading
from detectors.tracks import Tracker
from stream import alerts
from stream.alerts import Provenance
from stream.bursts import full_rate_of
from stream.config import Config
from stream.controls import End, Gap, Tick, from_body
from stream.drift import Drift
from stream.errors import Code, UnmaskError
from stream.evidence import ChunkIndex, EvidenceStore, png
from stream.feeds import Feed, FeedState
from stream.foreign import Place
from stream.frames import (
    Applied,
    Dropped,
    Failed,
    FollowedFrame,
    HeardSound,
    ResumePoint,
    SampledFrame,
    ScoredFrame,
)
from stream.gate import gated, quality_limits
from stream.incidents import (
    ClipRequest,
    CloseReason,
    Crop,
    Finding,
    IdSource,
    Incidents,
    Moment,
    Told,
    TrackView,
    best_crops,
    derived_id,
    random_id,
)
from stream.looked import Looked
from stream.overlay import overlay
from stream.people import people_of
from stream.records import SCHEMA, Control, Kind, is_replay
from stream.scores import DroppedRecord, ScoreRecord, VerdictRecord
from stream.verdicts import (
    CORRUPT,
    EVEN,
    NO_CALIBRATION,
    Calibration,
    Hysteresis,
    Judgement,
    correlation_s,
    judge,
    worst,
)
from stream.windows import MICRO, Sample, Window, pooled_sample, sample_of

logger = logging.getLogger(__name__)

Output = alerts.Output | ClipRequest

SUSPICION = EVEN
"""Calibrated probability at which a face is worth a closer look: more samples, and pictures kept."""

SUSPICION_HOLD_US = 2 * MICRO
"""A burst outlasts its cause by this, so that a score about the threshold does not toggle the sampling."""

MARGIN = 1.05
"""A face picture replaces a kept one only if it ranks this much higher: else most frames would write."""


@dataclass(slots=True)
class _Track:
    """One face being watched."""

    id: int
    attachment: str
    epoch: int
    first_us: int
    last_us: int
    box: Box
    samples: int
    window: Window
    hysteresis: Hysteresis
    judgement: Judgement
    crops: list[Crop] = field(default_factory=list)
    muted: bool = False
    """An incident about this face was retracted: it accuses no more."""
    compared_us: int | None = None
    """When it was last counted among the looks that tell of drift."""
    cues: dict[str, Cue] = field(default_factory=dict)
    """The newest reading of each cue."""
    doubted: bool = False
    """It was logged that it does not look like who it is said to be."""

    @property
    def key(self) -> str:
        return f"{self.attachment}/{self.epoch}/{self.id}"

    def view(self) -> TrackView:
        return TrackView(
            attachment=self.attachment,
            epoch=self.epoch,
            track=self.id,
            box=self.box,
            first_us=self.first_us,
            last_us=self.last_us,
            probability=self.judgement.probability,
            lower=self.judgement.lower,
            samples=self.samples,
        )


class StreamAggregate:
    """Everything known of one stream. Used by one thread.

    Tracks live within an epoch. The stream's own window pools all faces over `epoch_grace_s`, across cuts and
    epochs, and speaks only while no face on screen has evidence enough of its own: so a publisher that
    reconnects every other second is judged all the same.
    """

    def __init__(
        self,
        stream: str,
        settings: Config,
        calibration: Calibration,
        provenance: Provenance,
        evidence: EvidenceStore,
        new_id: IdSource | None = None,
        late: Late | None = None,
    ) -> None:
        """`late`: how cues are fused; else as shipped. Raises `LateError` if that is broken."""
        self.stream = stream
        self._late = late if late is not None else load_late()
        self._burst = full_rate_of(settings, self._late.names)
        self._ids: tuple[int, ...] = ()
        """Of the faces of the newest sampled frame: what a burst saw follows it."""
        self._people = people_of(settings, stream)
        self._settings = settings
        self._limits = quality_limits(settings)
        self._calibration = calibration
        self._provenance = provenance
        self._evidence = evidence
        self._window_us = round(settings.verdict.window_s * MICRO)
        self._correlation_s = correlation_s(calibration)
        self._grace_us = round(settings.incidents.epoch_grace_s * MICRO)
        self._lost_us = round(settings.faces.track_lost_s * MICRO)
        self._record_us = round(settings.verdict.record_every_s * MICRO)
        self._new_id = new_id or (derived_id if settings.deterministic else random_id)
        self._tracker = Tracker(settings.faces.track_iou, settings.faces.track_lost_s)
        self._tracks: dict[int, _Track] = {}
        self._pooled = Window(self._grace_us, self._correlation_s)
        self._pooled_phase = Hysteresis(settings.verdict)
        self._pooled_judgement = judge(None, calibration, settings.verdict)
        self._incidents = Incidents(
            stream,
            settings.verdict,
            settings.incidents,
            settings.evidence,
            self._new_id,
        )
        self._feed = FeedState(stream)
        self._drift = Drift(calibration.reference, provenance.calibration_version)
        self._chunks = ChunkIndex(settings.evidence)
        self._looked = Looked(max(self._grace_us, self._window_us), settings.sampling.idle_fps)
        self._idle_fps = settings.sampling.idle_fps
        self._gone_crops: list[Crop] = []
        self._resume = ResumePoint()
        self._applied = -1
        self._decode_from = 0
        self._place_at: Place | None = None
        self._kind = Kind.LIVE
        self._frame_us = 0
        self._frame_capture_us = 0
        self._now_us = 0
        self._capture_us = 0
        self._newest_offset = -1
        self._gap: str | None = None
        self._over = False
        self._pictured_us = 0
        self._apparatus = ("", "", "")
        self._cut = False
        self._suspect_until_us = 0
        self._said: tuple[str, tuple[str, ...]] | None = None
        self._said_us = 0
        self._sampled = self._dropped = 0
        self.pictures_failed = 0
        """Face pictures that the evidence store could not take, since this object was made."""
        self.ignored = 0
        """Events passed over because they were applied before, and control records that could not be read."""

    # What the worker asks

    @property
    def resume(self) -> ResumePoint:
        """Where a decoder is to take the stream up again."""
        return self._resume

    @property
    def decode_from(self) -> int:
        """Offset of the record from which a new owner must decode."""
        return self._decode_from

    @property
    def place(self) -> Place | None:
        """Where a stream of another producer stands before the record from which a new owner must decode."""
        return self._place_at

    def expect_foreign(self) -> None:
        """Note where a stream of another producer begins, before its first segment is applied.

        A state written in the middle of that segment would else place it a second time, behind itself.
        """
        if self._place_at is None:
            self._place_at = Place.behind(self._resume.attachment)

    @property
    def applied(self) -> int:
        """Offset of the newest record applied, -1 before the first."""
        return self._applied

    @property
    def media_us(self) -> int:
        """Media time as far as it is known, 0 before the first record."""
        return self._now_us

    @property
    def over(self) -> bool:
        """Whether the newest record was the last of its attachment (`end`)."""
        return self._over

    @property
    def feed(self) -> Feed:
        return self._feed.feed

    @property
    def live(self) -> bool:
        """Whether freshness means anything: not for files."""
        return self._kind is Kind.LIVE

    @property
    def drift(self) -> Mapping[str, float]:
        """Population stability index of scores and quality against the calibration, by part."""
        return self._drift.psi

    @property
    def open_incident(self) -> str | None:
        return self._incidents.open

    @property
    def judgement(self) -> Judgement:
        """What is said of the stream now."""
        return self._stream_judgement()

    def references(self) -> frozenset[str]:
        """Return the evidence that is or may yet be named, to be pinned against the sweep."""
        crops = [crop for track in self._tracks.values() for crop in track.crops] + self._gone_crops
        return self._incidents.references() | {ref for crop in crops for ref in (crop.crop, crop.overlay)}

    @property
    def suspect(self) -> bool:
        """Whether something looked wrong a moment ago: worth more pictures, and heavy members."""
        return self._now_us < self._suspect_until_us

    def wanted_fps(self) -> float:
        """Return the sampling rate in Hz: `burst_fps` while something looks wrong, else the idle one."""
        sampling = self._settings.sampling
        if self._settings.deterministic or not self.suspect:
            return self._idle_fps
        return max(sampling.burst_fps, self._idle_fps)

    @property
    def idle_fps(self) -> float:
        """The sampling rate while nothing looks wrong (Hz)."""
        return self._idle_fps

    def set_idle_fps(self, fps: float) -> None:
        """Sample a calm stream `fps` times a second from now on: its own rate, if its entry names one."""
        self._idle_fps = fps
        self._looked.set_fps(fps)

    def due_clip(self) -> ClipRequest | None:
        """Return the clip that was asked for and not answered: to be cut after a restart."""
        request = self._incidents.due_clip()
        return self._located(request) if request else None

    # What happens

    def on_frame(self, frame: ScoredFrame) -> list[Output]:
        """Apply one scored frame; frames come in presentation order, and each only once."""
        if not self._newer(frame.attachment, frame.epoch, frame.pts):
            self.ignored += 1
            return []
        frame = replace(frame, faces=gated(frame.faces, frame.qp, self._limits))
        outputs = self._begin_anew(frame.attachment)
        lost = self._enter(frame.attachment, frame.epoch)
        self._renew_if_changed(frame)
        outputs += self._gap_record(frame)
        media_us = self._reach(frame.offset, frame.pts, frame.media_us, frame.capture_us)
        self._looked.frame(media_us, self._place())
        self._sampled += 1

        cut, self._cut = frame.cut or self._cut, False
        ids = self._tracker.update(media_us, [face.detection.box for face in frame.faces], cut)
        self._ids = tuple(ids)
        lost |= self._end_tracks(self._tracker.ended)
        samples = [sample_of(face, media_us) for face in frame.faces]
        if self._people is not None:
            faces = self._people.look(media_us, ids, frame.faces)
            frame = replace(frame, faces=faces)
        for face, track_id, sample in zip(frame.faces, ids, samples, strict=True):
            self._look(track_id, face, sample)
        heard = [
            sample for sample, track_id in zip(samples, ids, strict=True) if not self._tracks[track_id].muted
        ]
        lost |= self._pool(media_us, heard)
        recorded, calibration = self._provenance.recorded, self._provenance.calibration_version
        cues = tuple(self._shares(self._tracks[track_id]) for track_id in ids)
        people, claims = self._who(ids)
        outputs.append(ScoreRecord(frame, tuple(ids), recorded, calibration, cues, people, claims))
        outputs += self._compare(frame.faces, ids, samples)
        return [*outputs, *self._settle(set(ids), lost)]

    def on_skipped(self, frame: SampledFrame, dropped: Dropped) -> list[Output]:
        """Apply a sampled frame that was not scored (too late, say)."""
        meta = frame.meta
        if not self._newer(meta.attachment, meta.epoch, frame.pts):
            self.ignored += 1
            return []
        told = self._begin_anew(meta.attachment)
        lost = self._enter(meta.attachment, meta.epoch)
        self._cut |= frame.cut
        self._reach(frame.offset, frame.pts, frame.media_us, meta.capture_us)
        return [*told, self._drop(dropped), *self._settle(set(), lost)]

    def on_applied(self, applied: Applied) -> list[Output]:
        """Apply a record that is wholly decoded, or a control record; each offset counts once."""
        if applied.offset <= self._applied:
            self.ignored += 1
            return []
        meta = applied.meta
        self._applied = applied.offset
        self._newest_offset = max(self._newest_offset, applied.offset)
        self._decode_from = applied.decode_from
        if applied.places is not None:
            # After an end its successor goes on with the next record, whatever `decode_from` says.
            ended = meta.control is Control.END
            self._place_at = applied.places.now if ended else applied.places.at
        if (meta.attachment, meta.epoch) < self._place():
            self.ignored += 1
            return []
        told = self._begin_anew(meta.attachment)
        self._kind = meta.kind
        self._over = meta.control is Control.END
        if applied.decoded or applied.warmup or meta.control is Control.START:
            self._pictured_us = meta.capture_us
        lost = self._enter(meta.attachment, meta.epoch)
        if applied.last_pts is not None:
            last_pts = max(applied.last_pts, self._resume.last_pts or applied.last_pts)
            self._resume = replace(self._resume, last_pts=last_pts)
        if meta.control is None and meta.part == 0 and meta.starts_on_keyframe and meta.pts is not None:
            self._chunks.add(applied.offset, meta.media_us(meta.pts), meta.attachment, meta.epoch)
        outputs = [*told, *(self._drop(dropped) for dropped in applied.dropped)]
        if meta.control is None:
            return [*self._seen(meta.capture_us), *outputs, *self._settle(set(), lost)]
        if meta.kind is Kind.LIVE:
            self._capture_us = max(self._capture_us, meta.capture_us)
        return [*outputs, *self._control(meta.control, applied.control_body, lost)]

    def on_failed(self, failed: Failed) -> list[Output]:
        """Apply a record that could not be decoded: a drop of unknown length."""
        if failed.offset <= self._applied:
            self.ignored += 1
            return []
        self._applied = failed.offset
        self._newest_offset = max(self._newest_offset, failed.offset)
        self._decode_from = failed.offset + 1
        if failed.places is not None:
            self._place_at = failed.places.now
        at_us = self._now_us
        if failed.meta is not None and failed.meta.pts is not None:
            at_us = max(at_us, failed.meta.media_us(failed.meta.pts))
        return [self._drop(Dropped(at_us, at_us, CORRUPT, None)), *self._settle(set(), False)]

    def on_clip(self, incident: str, ref: str | None, begins_us: int | None = None) -> list[Output]:
        """Take the answer to a `ClipRequest`: `evidence://...`, or None if nothing could be cut; `begins_us`:
        media time of its first picture."""
        return self._with_offsets(self._incidents.on_clip(self._moment(), incident, ref, begins_us))

    def on_cues(self, track_id: int, cues: Sequence[Cue]) -> None:
        """Take what cues read of a track over some time; heard with its next sample, unless it is gone."""
        track = self._tracks.get(track_id)
        if track is not None:
            track.cues |= {cue.name: cue for cue in cues}

    def on_followed(self, frame: FollowedFrame) -> None:
        """Take one picture of a burst at full rate. No score tells of it, only the cues do."""
        if self._burst is None:
            return
        placed = (frame.attachment, frame.epoch) == self._place()
        if not placed or not (frame.seeded or self._newer(frame.attachment, frame.epoch, frame.pts)):
            self.ignored += 1
            return
        if not frame.seeded:
            self._resume = replace(self._resume, last_pts=frame.pts)
        self._burst.look(frame.media_us, self._ids, frame.looks)

    @property
    def looks_passed_over(self) -> int:
        """Faces seen by bursts that no track or no series took, since this object was made."""
        return 0 if self._burst is None else self._burst.passed_over

    def on_heard(self, sound: HeardSound) -> None:
        """Take what was heard within a burst at full rate."""
        if self._burst is not None:
            self._burst.hear(sound.windows)

    def step_burst(self, allowed: bool) -> bool:
        """Open or end a burst at full rate: on suspicion, if `allowed`; return whether there is one."""
        if self._burst is None:
            return False
        for track_id, cues in self._burst.step(self._now_us, self.suspect, allowed).items():
            self.on_cues(track_id, cues)
        return self._burst.open

    def on_orphan(self) -> list[Output]:
        """Note that no record at all came for `orphan_s`: nobody watches. Incidents stay open."""
        if self._kind is Kind.FILE:
            return []
        sentence = (
            f"no record of this feed for {self._settings.incidents.orphan_s:g} s: nobody is watching it"
        )
        return [*self._feed.to(Feed.UNWATCHED, self._moment(), "orphan", sentence)]

    def stop(self) -> list[Output]:
        """Close the open incident because `watch` stops; the stop of a worker must not call this."""
        told = self._with_offsets(self._incidents.close(self._moment(), CloseReason.STOPPED))
        self._calm_down()
        return told

    def retract(self, incident: str, reason: str) -> list[Output]:
        """Withdraw the newest incident; its faces, while they stay on screen, accuse no more.

        Raises `ValueError` without a reason.
        """
        told = self._incidents.retract(self._moment(), incident, reason)
        if told:
            for track in self._tracks.values():
                track.muted |= track.hysteresis.accused
            self._calm_down()
            self._pooled.clear()
        return self._with_offsets(told)

    # State

    def state(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {
            "schema": SCHEMA,
            "stream": self.stream,
            "resume": asdict(self._resume),
            "applied": self._applied,
            "decode_from": self._decode_from,
            "place": self._place_at.state() if self._place_at else None,
            "kind": self._kind.value,
            "frame_us": self._frame_us,
            "frame_capture_us": self._frame_capture_us,
            "now_us": self._now_us,
            "capture_us": self._capture_us,
            "newest_offset": self._newest_offset,
            "gap": self._gap,
            "over": self._over,
            "pictured_us": self._pictured_us,
            "apparatus": list(self._apparatus),
            "cut": self._cut,
            "suspect_until_us": self._suspect_until_us,
            "said": [self._said[0], list(self._said[1])] if self._said else None,
            "said_us": self._said_us,
            "sampled": self._sampled,
            "dropped": self._dropped,
            "ignored": self.ignored,
            "tracker": self._tracker.state(),
            "tracks": [self._track_state(track) for track in self._tracks.values()],
            "pooled": self._pooled.state(),
            "pooled_phase": self._pooled_phase.state(),
            "pooled_judgement": asdict(self._pooled_judgement),
            "incident": self._incidents.state(),
            "feed": self._feed.state(),
            "drift": self._drift.state(),
            "chunks": self._chunks.state(),
            "looked": self._looked.state(),
            "gone_crops": [asdict(crop) for crop in self._gone_crops],
            **({"burst": self._burst.state()} if self._burst is not None else {}),
        }

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go on from a `state()` that may have been through JSON, and return the aggregate itself.

        Raises `UnmaskError` (SCHEMA) for the state of another version.
        """
        if state.get("schema") != SCHEMA:
            raise UnmaskError(
                Code.SCHEMA,
                f"state of stream {self.stream} has schema {state.get('schema')!r}; "
                f"this version of Unmask reads schema {SCHEMA} only",
            )
        self._resume = ResumePoint(**state["resume"])
        self._applied, self._decode_from = state["applied"], state["decode_from"]
        place = state.get("place")  # states of before there were other producers have none
        self._place_at = Place.restored(place) if place else None
        self._kind = Kind(state["kind"])
        self._frame_us, self._frame_capture_us = state["frame_us"], state["frame_capture_us"]
        self._now_us, self._capture_us = state["now_us"], state["capture_us"]
        self._newest_offset = state["newest_offset"]
        self._gap, self._over = state["gap"], state["over"]
        self._pictured_us = state["pictured_us"]
        models, engine, precision = state["apparatus"]
        self._apparatus = (models, engine, precision)
        self._cut = state["cut"]
        self._suspect_until_us = state["suspect_until_us"]
        said = state["said"]
        self._said = (said[0], tuple(said[1])) if said else None
        self._said_us = state["said_us"]
        self._sampled, self._dropped = state["sampled"], state["dropped"]
        self.ignored = state["ignored"]
        self._tracker.restore(state["tracker"])
        self._tracks = {fields["id"]: self._track_from(fields) for fields in state["tracks"]}
        self._pooled.restore(state["pooled"])
        self._pooled_phase.restore(state["pooled_phase"])
        self._pooled_judgement = Judgement.from_json(state["pooled_judgement"])
        self._incidents.restore(state["incident"])
        self._feed.restore(state["feed"])
        self._drift.restore(state.get("drift", {}))  # states of before have none
        self._chunks.restore(state["chunks"])
        self._looked.restore(state["looked"])
        self._gone_crops = [Crop(**crop) for crop in state["gone_crops"]]
        if self._burst is not None and "burst" in state:
            self._burst.restore(state["burst"])
        return self

    def _track_state(self, track: _Track) -> dict[str, Any]:
        return {
            "id": track.id,
            "attachment": track.attachment,
            "epoch": track.epoch,
            "first_us": track.first_us,
            "last_us": track.last_us,
            "box": list(track.box),
            "samples": track.samples,
            "window": track.window.state(),
            "hysteresis": track.hysteresis.state(),
            "judgement": asdict(track.judgement),
            "crops": [asdict(crop) for crop in track.crops],
            "muted": track.muted,
            "compared_us": track.compared_us,
            **({"cues": [asdict(cue) for cue in track.cues.values()]} if track.cues else {}),
        }

    def _track_from(self, fields: Mapping[str, Any]) -> _Track:
        x0, y0, x1, y1 = fields["box"]
        track = _Track(
            id=fields["id"],
            attachment=fields["attachment"],
            epoch=fields["epoch"],
            first_us=fields["first_us"],
            last_us=fields["last_us"],
            box=(x0, y0, x1, y1),
            samples=fields["samples"],
            window=Window(self._window_us, self._correlation_s),
            hysteresis=Hysteresis(self._settings.verdict),
            judgement=Judgement.from_json(fields["judgement"]),
            crops=[Crop(**crop) for crop in fields["crops"]],
            muted=fields["muted"],
            compared_us=fields.get("compared_us"),
            cues={cue["name"]: Cue(**cue) for cue in fields.get("cues", ())},
        )
        track.window.restore(fields["window"])
        track.hysteresis.restore(fields["hysteresis"])
        return track

    # Place and time

    def _place(self) -> tuple[str, int]:
        epoch = self._resume.epoch
        return self._resume.attachment, -1 if epoch is None else epoch

    def _newer(self, attachment: str, epoch: int, pts: int) -> bool:
        if (attachment, epoch) != self._place():
            return (attachment, epoch) > self._place()
        return self._resume.last_pts is None or pts > self._resume.last_pts

    def _enter(self, attachment: str, epoch: int) -> bool:
        """Note where in the stream we are: a new epoch ends all tracks. Return whether an accused one did."""
        if (attachment, epoch) == self._place():
            return False
        self._resume = ResumePoint(attachment, epoch, None, self._resume.last_sample_us)
        self._cut = False
        return self._end_tracks(self._tracker.end_all())

    def _begin_anew(self, attachment: str) -> list[Output]:
        """Forget the replay before this one: its media time may lie after ours, its faces are not these."""
        if not is_replay(self.stream) or self._place()[0] in ("", attachment):
            return []
        told = self._with_offsets(self._incidents.close(self._moment(), CloseReason.ENDED))
        due = self._incidents.due_clip()
        if due is not None:  # nobody is left to take its answer
            told = self._with_offsets(self._incidents.on_clip(self._moment(), due.incident, None))
        fresh = StreamAggregate(
            self.stream,
            self._settings,
            self._calibration,
            self._provenance,
            self._evidence,
            self._new_id,
            self._late,
        )
        kept = ("applied", "decode_from", "place", "newest_offset", "ignored")
        now = self.state()
        self._people = people_of(self._settings, self.stream)
        self.restore(fresh.state() | {name: now[name] for name in kept})
        return told

    def _reach(self, offset: int, pts: int, media_us: int, capture_us: int) -> int:
        """Note a sampled frame and return its media time.

        That is the time reached already where a foreign producer's clock steps back.
        """
        self._frame_us = self._now_us = max(self._frame_us, media_us)
        self._frame_capture_us = self._capture_us = capture_us
        self._newest_offset = max(self._newest_offset, offset)
        self._resume = replace(self._resume, last_pts=pts, last_sample_us=media_us)
        return self._frame_us

    def _pass_silence(self) -> None:
        """Let media time go on by the receiver's clock while a live feed shows nothing.

        Only then: of a feed that is alive frames alone tell the time, as HLS delivers seconds at once.
        """
        passed_us = max(0, self._capture_us - self._frame_capture_us)
        reached_us = self._frame_us + passed_us if self._frame_us else self._capture_us
        self._now_us = max(self._now_us, reached_us)

    def _moment(self) -> Moment:
        return Moment(
            media_us=self._now_us,
            attachment=self._place()[0],
            epoch=max(0, self._place()[1]),
            capture_us=None if self._kind is Kind.FILE else self._capture_us,
            engine=self._apparatus[1],
            precision=self._apparatus[2],
        )

    def _renew_if_changed(self, frame: ScoredFrame) -> None:
        """Begin new windows when engine or models are others: their scores must not be mixed (DESIGN 3.7)."""
        models = f"{self._provenance.versions} {self._provenance.calibration_version}"
        apparatus = (models, frame.engine, frame.precision)
        if apparatus == self._apparatus:
            return
        self._apparatus = apparatus
        self._pooled.clear()
        for track in self._tracks.values():
            track.window.clear()

    # What was not looked at

    def _gap_record(self, frame: ScoredFrame) -> list[DroppedRecord]:
        """Return, at the first frame after the feed was away, from when to when and why it was."""
        code, self._gap = self._gap, None
        if code is None or not 0 < self._frame_us < frame.media_us:
            return []
        gap = Dropped(self._frame_us, frame.media_us, code, None)
        return [DroppedRecord(self.stream, frame.attachment, frame.epoch, gap)]

    def _drop(self, dropped: Dropped) -> DroppedRecord:
        self._dropped += dropped.frames or 0
        self._now_us = max(self._now_us, dropped.last_us)
        self._looked.drop(dropped)
        attachment, epoch = self._place()
        return DroppedRecord(self.stream, attachment, epoch, dropped)

    # Faces

    def _look(self, track_id: int, face: FaceReading, sample: Sample) -> None:
        track = self._tracks.get(track_id) or self._new_track(track_id, sample.media_us)
        track.box = face.detection.box
        track.last_us = sample.media_us
        track.samples += 1
        track.window.add(sample)
        estimate = track.window.estimate()
        assert estimate is not None
        sampled = self._looked.since(estimate.first_us, self._now_us)
        track.cues |= {cue.name: cue for cue in face.cues}
        track.judgement = judge(
            estimate, self._calibration, self._settings.verdict, sampled, self._shares(track)
        )
        if not track.muted:
            track.hysteresis.step(sample.media_us, track.judgement)
        if not self._suspicious(track):
            return
        self._suspect_until_us = self._now_us + SUSPICION_HOLD_US
        if sample.good and sample.fused > 0:
            self._keep_crop(track, face, sample)

    def _who(self, ids: Sequence[int]) -> tuple[tuple[int | None, ...], tuple[tuple[str, bool] | None, ...]]:
        """Who the faces are, as far as settings ask; a claim that does not hold is logged once a track."""
        if self._people is None:
            return (), ()
        claims = tuple(self._people.claim(track_id) for track_id in ids)
        for track_id, claim in zip(ids, claims, strict=True):
            track = self._tracks[track_id]
            if claim is None or claim[1] or track.doubted:
                continue
            track.doubted = True
            logger.warning(
                "%s: face %d is said to be %s but does not look like it", self.stream, track_id, claim[0]
            )
        return tuple(self._people.person(track_id) for track_id in ids), claims

    def _shares(self, track: _Track) -> tuple[Share, ...]:
        return self._late.shares(track.cues.values())

    def _compare(
        self, faces: Sequence[FaceReading], ids: Sequence[int], samples: Sequence[Sample]
    ) -> list[Output]:
        """Count what the faces of a live feed look like; return what that changed."""
        if self._kind is Kind.FILE or is_replay(self.stream):
            return []
        told: list[Output] = []
        for face, track_id, sample in zip(faces, ids, samples, strict=True):
            track = self._tracks[track_id]
            if not self._drift.due(track.compared_us, sample.media_us):
                continue
            turn = self._drift.look(face, sample, new=track.compared_us is None)
            track.compared_us = sample.media_us
            if turn is not None:
                told.append(self._feed.turned(self._moment(), turn))
        return told

    def _new_track(self, track_id: int, media_us: int) -> _Track:
        track = _Track(
            id=track_id,
            attachment=self._place()[0],
            epoch=self._place()[1],
            first_us=media_us,
            last_us=media_us,
            box=(0.0, 0.0, 0.0, 0.0),
            samples=0,
            window=Window(self._window_us, self._correlation_s),
            hysteresis=Hysteresis(self._settings.verdict),
            judgement=judge(None, self._calibration, self._settings.verdict),
        )
        if self._burst is not None:
            track.cues |= {cue.name: cue for cue in self._burst.blank()}
        self._tracks[track_id] = track
        return track

    def _end_tracks(self, ids: Sequence[int]) -> bool:
        """Forget tracks that ended; return whether an accused one was among them."""
        if self._people is not None:
            self._people.end(ids)
        if self._burst is not None:
            self._burst.forget(ids)
        ended = [self._tracks.pop(track_id) for track_id in ids if track_id in self._tracks]
        crops = [crop for track in ended for crop in track.crops]
        if crops:
            self._gone_crops = best_crops([*self._gone_crops, *crops], self._settings.evidence.crops)
        return any(track.hysteresis.accused for track in ended)

    def _suspicious(self, track: _Track) -> bool:
        if self._calibration.kind == NO_CALIBRATION:
            return False
        probability = track.judgement.probability
        return track.hysteresis.accused or (probability is not None and probability >= SUSPICION)

    def _keep_crop(self, track: _Track, face: FaceReading, sample: Sample) -> None:
        """Write the face's picture if it is among the track's best: durable before anything names it."""
        limit = self._settings.evidence.crops
        score = sample.weight * sample.fused
        if len(track.crops) >= limit and score < MARGIN * track.crops[-1].score:
            return
        try:
            picture = self._evidence.put(png(face.crop), ".png")
            heat = self._evidence.put(
                png(overlay(face.crop, face.maps or {"attention": face.attention})), ".png"
            )
        except OSError as error:
            # A full disk costs the picture, not the watching.
            logger.warning("%s: picture of track %s not kept: %s", self.stream, track.key, error)
            self.pictures_failed += 1
            return
        crop = Crop(track.key, sample.media_us, score, picture, heat)
        track.crops = best_crops([*track.crops, crop], limit)

    def _pool(self, media_us: int, samples: Sequence[Sample]) -> bool:
        """Let the stream's own window follow; it accuses only while no face can speak for itself.

        And only on a picture that itself leans to manipulated: whoever comes on screen after a manipulated
        face is not accused for it. Return whether an accusation it held went without having been cleared.
        """
        leaning = False
        if samples:
            pooled = pooled_sample(samples)
            self._pooled.add(pooled)
            leaning = pooled.fused > 0
        self._pooled.evict(media_us)
        if any(track.judgement.sufficient for track in self._tracks.values()):
            return self._silence_pool()
        estimate = self._pooled.estimate()
        if estimate is None:
            return self._silence_pool()
        sampled = self._looked.since(estimate.first_us, media_us)
        self._pooled_judgement = judge(estimate, self._calibration, self._settings.verdict, sampled)
        if leaning or (samples and self._pooled_phase.accused):
            self._pooled_phase.step(media_us, self._pooled_judgement)
        elif samples:
            self._pooled_phase = Hysteresis(self._settings.verdict)
        return False

    def _silence_pool(self) -> bool:
        accused = self._pooled_phase.accused
        self._pooled_phase = Hysteresis(self._settings.verdict)
        self._pooled_judgement = judge(None, self._calibration, self._settings.verdict)
        return accused

    # What is said

    def _settle(self, seen: set[int], lost: bool) -> list[Output]:
        """Bring incidents and verdict up to date after something happened; `seen` tracks got a sample."""
        gone = [track.id for track in self._tracks.values() if self._now_us - track.last_us > self._lost_us]
        lost |= self._end_tracks(gone)
        self._gone_crops = [
            crop for crop in self._gone_crops if crop.media_us > self._now_us - self._grace_us
        ]
        was_open = self._incidents.ongoing
        told = self._incidents.observe(self._moment(), self._finding(seen, lost))
        if was_open and not self._incidents.ongoing:
            self._calm_down()
        return [*self._with_offsets(told), *self._verdict()]

    def _calm_down(self) -> None:
        """Drop accusations whose incident is over: they must not outlive it."""
        for track in self._tracks.values():
            if track.hysteresis.accused:
                track.hysteresis = Hysteresis(self._settings.verdict)
        self._silence_pool()

    def _finding(self, seen: set[int], lost: bool) -> Finding:
        accused = [track for track in self._tracks.values() if track.hysteresis.accused]
        if accused:
            chosen = max(accused, key=lambda track: track.judgement.lower)
            return Finding(
                judgement=chosen.hysteresis.apply(chosen.judgement),
                tracks=tuple(track.view() for track in accused),
                fresh=any(self._supports(track.judgement) for track in accused if track.id in seen),
                lost=lost,
                onset_us=_onset(track.window for track in accused),
                crops=tuple(crop for track in accused for crop in track.crops),
            )
        if not self._pooled_phase.accused:
            return Finding(lost=lost)
        crops = [crop for track in self._tracks.values() for crop in track.crops] + self._gone_crops
        return Finding(
            judgement=self._pooled_phase.apply(self._pooled_judgement),
            fresh=bool(seen) and self._supports(self._pooled_judgement),
            lost=lost,
            onset_us=_onset([self._pooled]),
            crops=tuple(crops),
        )

    def _supports(self, judgement: Judgement) -> bool:
        if not judgement.sufficient or judgement.probability is None:
            return False
        return judgement.probability >= self._settings.verdict.close_probability

    def _stream_judgement(self) -> Judgement:
        judgements = [track.hysteresis.apply(track.judgement) for track in self._tracks.values()]
        if self._pooled_phase.accused:
            judgements.append(self._pooled_phase.apply(self._pooled_judgement))
        if judgements:
            return worst(judgements)
        return judge(
            None,
            self._calibration,
            self._settings.verdict,
            self._looked.since(self._now_us - self._lost_us, self._now_us),
        )

    def _verdict(self) -> list[Output]:
        judgement = self._stream_judgement()
        said = (judgement.verdict.value, tuple(reason.value for reason in judgement.reasons))
        if said == self._said and self._now_us - self._said_us < self._record_us:
            return []
        self._said, self._said_us = said, self._now_us
        record = VerdictRecord(
            stream=self.stream,
            attachment=self._place()[0],
            epoch=max(0, self._place()[1]),
            media_us=self._now_us,
            judgement=judgement,
            tracks=len(self._tracks),
            sampled=self._sampled,
            dropped=self._dropped,
            incident=self._incidents.open,
            calibration=self._provenance.calibration_version,
        )
        self._sampled = self._dropped = 0
        return [record]

    def _with_offsets(self, told: Sequence[Told]) -> list[Output]:
        return [self._located(item) if isinstance(item, ClipRequest) else item for item in told]

    def _located(self, request: ClipRequest) -> ClipRequest:
        start = self._chunks.before(request.first_us, request.attachment, request.epoch)
        start_us = None if start is None else self._chunks.media_us(start)
        return replace(request, from_offset=start, from_us=start_us, to_offset=self._newest_offset + 1)

    # Control records

    def _control(self, control: Control, body: bytes, lost: bool) -> list[Output]:
        """Apply a control record; one that cannot be read is counted and still lets time pass."""
        handlers: Mapping[Control, Callable[[bytes], list[Output]]] = {
            Control.TICK: self._on_tick,
            Control.GAP: self._on_gap,
            Control.END: self._on_end,
        }
        handler = handlers.get(control)
        told: list[Output] = []
        try:
            told = handler(body) if handler else []
        except UnmaskError:
            self.ignored += 1
        return [*told, *self._settle(set(), lost)]

    def _on_tick(self, body: bytes) -> list[Output]:
        tick = from_body(Tick, body)
        if self._kind is Kind.FILE:
            return []
        dark_s = (self._capture_us - self._pictured_us) / MICRO
        if tick.video and dark_s > self._settings.ingest.silence_s:
            sentence = f"packets come, but no picture could be decoded from them for {dark_s:.0f} s"
            return [*self._feed.to(Feed.DOWN, self._moment(), Code.DECODE_FAILED.value, sentence)]
        if tick.video:
            return [*self._feed.to(Feed.UP, self._moment())]
        self._pass_silence()
        if tick.code is None and self._feed.feed is not Feed.UP:
            return []  # connecting, which is no news of a feed that was not up
        self._gap = tick.code or self._gap
        return [*self._feed.to(Feed.DOWN, self._moment(), tick.code, tick.sentence)]

    def _on_gap(self, body: bytes) -> list[Output]:
        self._gap = from_body(Gap, body).code
        return []

    def _on_end(self, body: bytes) -> list[Output]:
        end = from_body(End, body)
        self._end_tracks(self._tracker.end_all())
        self._pooled.clear()
        self._silence_pool()
        told = self._with_offsets(self._incidents.close(self._moment(), CloseReason.ENDED))
        if self._kind is Kind.FILE:
            return told
        sentence = end.sentence or f"watching this feed has ended: {end.reason}"
        return [*told, *self._feed.to(Feed.ENDED, self._moment(), end.code or end.reason, sentence)]

    def _seen(self, capture_us: int) -> list[Output]:
        """Note that media came: enough to be up again, except that a feed that is down waits for its tick.

        Other producers need not write any.
        """
        self._capture_us = max(self._capture_us, capture_us)
        if self._kind is Kind.FILE or (self._feed.feed is Feed.DOWN and self._place_at is None):
            return []
        return [*self._feed.to(Feed.UP, self._moment())]


def _onset(windows: Any) -> int | None:
    onsets = [estimate.onset_us for window in windows if (estimate := window.estimate())]
    return min((onset for onset in onsets if onset is not None), default=None)
