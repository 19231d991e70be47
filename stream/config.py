"""Every setting: read from config.yaml, overridden by environment and --set, validated on load (DESIGN 2)."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Bytes = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values never change after load."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Media(Section):
    chunk_ms: Annotated[int, Field(ge=50, le=5000)] = 500
    partitions: Count = 8
    max_message_bytes: Bytes = 8 * 1024 * 1024
    retention_s: Seconds = 3600.0
    retention_bytes: Bytes = 4 * 1024**3
    accept_unlisted: bool = False


class LogSettings(Section):
    synchronous: Literal["NORMAL", "FULL"] = "NORMAL"
    segment_bytes: Bytes = 64 * 1024 * 1024
    lease_s: Seconds = 5.0
    commit_ms: Count = 500
    records_retention_s: Seconds = 30 * 86400.0
    records_retention_bytes: Bytes = 1024**3


class Ingest(Section):
    shard_size: Count = 8
    silence_s: Seconds = 10.0
    first_frame_s: Seconds = 20.0
    tick_s: Seconds = 1.0
    backoff_first_s: Seconds = 0.5
    backoff_max_s: Seconds = 30.0
    backoff_jitter: Share = 0.3
    hls_min_lines: Count = 720
    program: int | None = None
    file_ahead_bytes: Bytes = 64 * 1024 * 1024


class Decode(Section):
    memory_limit_bytes: Bytes = 2 * 1024**3
    stall_s: Seconds = 10.0
    max_warmup_s: Seconds = 20.0
    slots: Annotated[int, Field(ge=2, le=64)] = 4
    queue_chunks: Count = 8
    detect_width: Annotated[int, Field(ge=160)] = 640
    threads: Count = 1


class Sampling(Section):
    idle_fps: Annotated[float, Field(gt=0, le=60)] = 2.0
    burst_fps: Annotated[float, Field(gt=0, le=60)] = 8.0
    burst_budget: Share = 0.5


class Faces(Section):
    min_face_px: Annotated[int, Field(ge=20)] = 40
    max_faces: Count = 8
    confidence: Share = 0.9
    track_iou: Share = 0.3
    track_lost_s: Seconds = 2.0


class QualityGate(Section):
    min_face_px: Annotated[float, Field(ge=0)] = 64.0
    min_sharpness: Annotated[float, Field(ge=0)] = 20.0
    min_brightness: Annotated[float, Field(ge=0, le=255)] = 35.0
    max_blockiness: Annotated[float, Field(ge=0)] = 3.0
    max_yaw_deg: Annotated[float, Field(ge=0, le=90)] = 50.0
    max_pitch_deg: Annotated[float, Field(ge=0, le=90)] = 40.0


class Verdict(Section):
    window_s: Seconds = 10.0
    min_track_s: Seconds = 2.0
    min_samples: Count = 5
    open_probability: Share = 0.9
    close_probability: Share = 0.6
    open_hold_s: Seconds = 1.5
    close_hold_s: Seconds = 8.0
    level: Share = 0.95
    min_sampled_share: Share = 0.5
    record_every_s: Seconds = 10.0


class Incidents(Section):
    epoch_grace_s: Seconds = 30.0
    orphan_s: Seconds = 30.0
    update_every_s: Seconds = 30.0
    suggested_action: Literal["none", "review", "block"] = "review"
    prevalence: Annotated[float, Field(gt=0, lt=1)] = 0.01


class Evidence(Section):
    clip_max_s: Seconds = 30.0
    pre_roll_s: Seconds = 5.0
    post_roll_s: Seconds = 5.0
    crops: Count = 4
    retention_s: Seconds = 30 * 86400.0
    max_bytes: Bytes = 10 * 1024**3


class Freshness(Section):
    on_late: Literal["skip", "score"] = "skip"
    max_staleness_s: Seconds = 15.0


class Engines(Section):
    order: tuple[Literal["openvino", "eager"], ...] = ("openvino", "eager")
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: Annotated[int, Field(ge=1, le=256)] = 16
    batch_wait_ms: Annotated[int, Field(ge=0, le=1000)] = 20
    threads: Annotated[int, Field(ge=0)] = 0
    cache_dir: str = "~/.cache/unmask"


class Members(Section):
    names: tuple[str, ...] = ()


class Worker(Section):
    stall_s: Seconds = 30.0
    shutdown_s: Seconds = 10.0
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0


class Config(Section):
    data_dir: str = "~/.local/share/unmask"
    prefix: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")] = "unmask"
    media: Media = Media()
    log: LogSettings = LogSettings()
    ingest: Ingest = Ingest()
    decode: Decode = Decode()
    sampling: Sampling = Sampling()
    faces: Faces = Faces()
    quality: QualityGate = QualityGate()
    verdict: Verdict = Verdict()
    incidents: Incidents = Incidents()
    evidence: Evidence = Evidence()
    freshness: Freshness = Freshness()
    engines: Engines = Engines()
    members: Members = Members()
    worker: Worker = Worker()
    deterministic: bool = False
