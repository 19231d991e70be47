"""Every setting with its default, unit, range and reason (DESIGN 2); `config_file` reads and writes them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from detectors.cues import NAMES
from detectors.limits import QualityLimits

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Bytes = Annotated[int, Field(ge=1)]

SHIPPED = QualityLimits()
"""The measured limits of the quality gate (`python -m detectors.training.gate`)."""


def setting(default: Any, unit: str, reason: str, **bounds: Any) -> Any:
    """Declare one setting with its unit ("" where it has none) and the reason it exists or has its value."""
    return Field(default, description=reason, json_schema_extra={"unit": unit}, **bounds)


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values never change after load."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def _need(self, holds: bool, sentence: str) -> Self:
        if not holds:
            raise ValueError(sentence)
        return self


class Media(Section):
    """The media topic: packets as they arrived, cut into chunks."""

    chunk_ms: int = setting(
        500,
        "ms",
        "Longest piece of a stream in one record, so latency never waits for a keyframe.",
        ge=50,
        le=5000,
    )
    partitions: Count = setting(
        8, "partitions", "Bounds how many detect workers can share the work; fixed once the topic exists."
    )
    max_message_bytes: Bytes = setting(
        8 * 1024 * 1024,
        "bytes",
        "Largest record; a larger packet travels in parts. A Kafka broker must allow the same.",
    )
    retention_s: Seconds = setting(
        3600.0, "s", "Media is kept this long: enough to cut an incident's clip and to restart a worker."
    )
    retention_bytes: Bytes = setting(
        4 * 1024**3, "bytes", "Media never takes more disk than this, whichever bound is reached first."
    )
    accept_unlisted: bool = setting(
        False,
        "",
        "Whether streams missing from the sources topic are read; off, strangers cannot add feeds.",
    )


class LogSettings(Section):
    """The embedded log: SQLite for positions, state and events, segment files for media."""

    synchronous: Literal["NORMAL", "FULL"] = setting(
        "NORMAL",
        "",
        "NORMAL survives the death of the process, FULL also the loss of power, at a sync per commit.",
    )
    segment_bytes: Bytes = setting(
        64 * 1024 * 1024,
        "bytes",
        "Retention unlinks whole segment files; smaller ones follow the bounds more closely.",
    )
    lease_s: Seconds = setting(
        5.0, "s", "A worker silent for this long has lost its place in the group to one that waits."
    )
    commit_ms: Count = setting(
        500, "ms", "Outputs and position are committed at least this often; an incident is committed at once."
    )
    records_retention_s: Seconds = setting(
        30 * 86400.0,
        "s",
        "Scores, alerts and dead letters are kept this long, so coverage can be proved later.",
    )
    records_retention_bytes: Bytes = setting(
        1024**3, "bytes", "Scores, alerts and dead letters never take more disk than this, each."
    )


class Kafka(Section):
    """A Kafka cluster as the log. A password comes from UNMASK_KAFKA_PASSWORD or a file, never from here."""

    bootstrap_servers: str = setting(
        "", "host:port,host:port", "Some brokers of the cluster, the others are found; empty: embedded log."
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = setting(
        "PLAINTEXT", "", "SSL is TLS; what the brokers demand on that port."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = setting(
        "SCRAM-SHA-512", "", "PLAIN sends the password itself: only with SASL_SSL."
    )
    username: str = setting("", "", "Who we are to brokers that demand SASL.")
    password_file: str = setting(
        "", "file", "Holds the password, as orchestrators mount it; empty: environment variable."
    )
    ca_file: str = setting(
        "", "PEM file", "Authorities that the brokers' certificates are checked with; empty: the system's."
    )
    cert_file: str = setting("", "PEM file", "Our certificate, for brokers that demand one.")
    key_file: str = setting("", "PEM file", "Its key without passphrase; empty: in cert_file.")
    compression: Literal["none", "gzip", "lz4"] = setting(
        "lz4", "", "States and scores shrink to a fifth; video is compressed already and costs lz4 little."
    )
    replication: int = setting(
        3,
        "copies",
        "Copies of each record, all but one written before it counts: a broker may die. A lone broker has 1.",
        ge=1,
        le=7,
    )
    session_s: float = setting(
        10.0,
        "s",
        "A member silent for this long is dead, its partitions go to others; brokers refuse less than 6.",
        ge=6,
        le=300,
    )
    member_id: str = setting(
        "",
        "",
        "Name of this process's slot if it keeps one over restarts (a StatefulSet's pod name): "
        "it then comes back without a rebalance. Unique in the cluster.",
        pattern=r"^[A-Za-z0-9._-]{0,100}$",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.security_protocol.startswith("SASL"):
            self._need(
                self.username != "",
                f"kafka.username is empty; kafka.security_protocol {self.security_protocol} needs one",
            )
        return self._need(
            self.cert_file != "" or self.key_file == "",
            "kafka.key_file is set without kafka.cert_file; both or none would be right",
        )


class Ingest(Section):
    """Attaching to feeds."""

    shard_size: Count = setting(
        8, "feeds", "Feeds in one process: few enough that a crash of one costs few others a reattach."
    )
    partitions: Count = setting(
        8,
        "partitions",
        "Bounds how many ingest processes can share the feeds; fixed once the topic sources exists.",
    )
    silence_s: Seconds = setting(
        10.0, "s", "No video for this long and the feed is down: an event, and a new attempt."
    )
    first_frame_s: Seconds = setting(
        20.0,
        "s",
        "Longest wait for the first picture of a feed; HLS needs a playlist and a whole segment first.",
    )
    tick_s: Seconds = setting(
        1.0, "s", "How often a feed says it is alive; silence is noticed no sooner than this."
    )
    backoff_first_s: Seconds = setting(
        0.5, "s", "First wait before a lost feed is attached again; then it doubles."
    )
    backoff_max_s: Seconds = setting(
        30.0, "s", "Longest wait between attempts: a feed that comes back is seen within this."
    )
    backoff_jitter: Share = setting(
        0.3,
        "share of the wait",
        "Random spread of the waits, so that many feeds do not knock at the same moment.",
    )
    hls_min_lines: Count = setting(
        720,
        "lines",
        "Of HLS variants the lowest with this many lines is taken: faces need pixels, more cost traffic.",
    )
    program: int | None = setting(
        None,
        "program number",
        "Program of a transport stream that carries several; null takes the first with video.",
        ge=0,
    )
    file_ahead_bytes: Bytes = setting(
        64 * 1024 * 1024,
        "bytes",
        "How far reading a file may run ahead of detection, so a file never fills the disk.",
    )
    spool_max_bytes: Bytes = setting(
        2 * 1024**3,
        "bytes",
        "Disk a shard may fill while Kafka is away, then the oldest goes: 7 minutes of 8 feeds at 5 Mbit/s.",
    )


class Decode(Section):
    """Decoder processes."""

    memory_limit_bytes: Bytes = setting(
        2 * 1024**3,
        "bytes",
        "Memory of one decoder process; a hostile stream kills its decoder and nothing else.",
    )
    stall_s: Seconds = setting(
        10.0, "s", "A decoder that makes no progress for this long is killed, its chunk retried once."
    )
    max_warmup_s: Seconds = setting(
        20.0,
        "s",
        "After a restart at most this much is decoded again without scoring; beyond, a keyframe is awaited.",
    )
    slots: int = setting(
        4,
        "pictures",
        "Shared-memory pictures per stream between decoder and detector; full means the decoder waits.",
        ge=2,
        le=64,
    )
    queue_chunks: Count = setting(
        8, "chunks", "Chunks waiting per decoder; full means reading of that stream pauses."
    )
    detect_width: int = setting(
        640,
        "pixels",
        "Width of the reduced picture in which faces are looked for; crops come from full resolution.",
        ge=160,
    )
    threads: Count = setting(1, "threads", "Threads of one decoder; streams already run beside each other.")


class Sampling(Section):
    """Which frames are looked at."""

    idle_fps: float = setting(
        2.0, "frames/s", "Sampling of a calm stream: finds a face within half a second.", gt=0, le=60
    )
    burst_fps: float = setting(
        8.0, "frames/s", "Sampling of a stream that looks wrong: more evidence sooner.", gt=0, le=60
    )
    burst_budget: Share = setting(
        0.5,
        "share of device time",
        "Bursts take no more than this, so one suspect feed does not starve the calm ones.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        return self._need(
            self.burst_fps >= self.idle_fps,
            f"sampling.burst_fps is {self.burst_fps:g}; "
            f"it must be at least sampling.idle_fps ({self.idle_fps:g})",
        )


class Faces(Section):
    """Finding and following faces."""

    min_face_px: int = setting(
        40, "pixels", "Faces narrower than this are not looked for: nothing could be said of them.", ge=20
    )
    max_faces: Count = setting(8, "faces", "Largest faces read per picture; bounds the cost of a crowd.")
    confidence: Share = setting(0.9, "confidence", "MTCNN's own confidence below which a find is no face.")
    track_iou: Share = setting(
        0.3, "overlap", "Least overlap (IoU) with its last place for a face to be the same one."
    )
    track_lost_s: Seconds = setting(
        2.0, "s", "A face unseen for this long has left; what comes back is a new track."
    )


class QualityGate(Section):
    """Below these a face is inconclusive, with the reason: bad pictures accuse nobody."""

    min_face_px: float = setting(SHIPPED.min_face_px, "pixels", "SMALL_FACE below this width.", ge=0)
    min_sharpness: float = setting(
        SHIPPED.min_sharpness,
        "ratio",
        "BLUR below this: blurred authentic faces score as fakes.",
        ge=0,
    )
    min_brightness: float = setting(
        SHIPPED.min_brightness, "grey level", "LOW_LIGHT below this mean.", ge=0, le=255
    )
    max_noise: float = setting(
        SHIPPED.max_noise, "ratio", "LOW_LIGHT above this ratio of noise to the face's contrast.", ge=0
    )
    max_blockiness: float = setting(
        SHIPPED.max_blockiness,
        "ratio",
        "COMPRESSION above this ratio of steps at block edges to steps elsewhere.",
        ge=0,
    )
    max_grid: float = setting(
        SHIPPED.max_grid,
        "ratio",
        "COMPRESSION above this: more changes across 8 px blocks than across 4 px ones, as H.264 leaves it.",
        ge=0,
    )
    max_qp: float = setting(
        SHIPPED.max_qp,
        "quantiser",
        "COMPRESSION above this mean of a picture, where the codec tells it (H.264); 51 never bites.",
        ge=0,
        le=51,
    )
    max_yaw_deg: float = setting(
        SHIPPED.max_yaw_deg,
        "degrees",
        "POSE beyond this turn of the head: half the face is not seen.",
        ge=0,
        le=90,
    )
    max_pitch_deg: float = setting(SHIPPED.max_pitch_deg, "degrees", "POSE beyond this nod.", ge=0, le=90)
    max_moire: float = setting(
        SHIPPED.max_moire,
        "peak of the spectrum",
        "SCREEN_IN_PICTURE above this: the pattern of a filmed screen; 0: off.",
        ge=0,
    )
    max_covered: float = setting(
        SHIPPED.max_covered,
        "share",
        "A half of the face more surely hidden than this goes to members.half, or is OCCLUSION; 0: off.",
        ge=0,
        le=1,
    )
    max_flat_colour: float = setting(
        SHIPPED.max_flat_colour,
        "roughness of the histogram",
        "NOT_A_PERSON above this: filled with few colours; 0: off, since stretched contrast looks alike.",
        ge=0,
    )


class Policy(Section):
    """What to make of what is no forgery."""

    retouch: Literal["ignore", "flag"] = setting(
        "ignore",
        "",
        "flag: a face whose skin is smoothed is inconclusive, EDITED; ignore: it is only measured.",
    )


class Verdict(Section):
    """From scores over time to a verdict."""

    window_s: Seconds = setting(
        6.0,
        "s",
        "How far back a verdict looks, in media time; a change within a track shows after about as long. "
        "Doubling it narrows the interval by a tenth only: the spread between people stays.",
    )
    min_track_s: Seconds = setting(2.0, "s", "SHORT_TRACK below this: a glimpse decides nothing.")
    min_samples: Count = setting(
        5, "samples", "SHORT_TRACK below this many readings of a face in the window."
    )
    open_probability: Share = setting(
        0.9,
        "probability",
        "A face is called manipulated from this on, and only if authentic people hardly score so; high, "
        "because the first fear is a false accusation.",
    )
    close_probability: Share = setting(
        0.6,
        "probability",
        "Below this the suspicion is over; the gap to open_probability keeps incidents from flapping.",
    )
    open_hold_s: Seconds = setting(1.5, "s", "Suspicion must last this long before an incident opens.")
    close_hold_s: Seconds = setting(8.0, "s", "Calm must last this long before an incident closes.")
    level: float = setting(
        0.9,
        "probability",
        "Coverage of the interval, which holds the spread between people. An incident needs its lower end "
        "above one half: at .9 a score that the faces of 19 of 20 people do not explain.",
        gt=0,
        lt=1,
    )
    min_sampled_share: Share = setting(
        0.5, "share", "STALE when fewer of the wanted samples than this were really taken."
    )
    record_every_s: Seconds = setting(
        10.0, "s", "A verdict record is written this often even when nothing changes."
    )
    calibration: str = setting(
        "",
        "file",
        "Written by unmask calibrate on your own footage; its thresholds replace those here. Empty: shipped.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        return self._need(
            self.close_probability < self.open_probability,
            f"verdict.close_probability is {self.close_probability:g}; "
            f"it must be below verdict.open_probability ({self.open_probability:g})",
        )


class Incidents(Section):
    """Incidents and what they tell the receiver."""

    epoch_grace_s: Seconds = setting(
        30.0, "s", "Suspicion outlives a break in the stream by this: a looping publisher buys no amnesty."
    )
    orphan_s: Seconds = setting(
        30.0, "s", "No record at all of a feed for this long is UNWATCHED, and an event."
    )
    update_every_s: Seconds = setting(
        30.0, "s", "An open incident reports new evidence no more often than this."
    )
    suggested_action: Literal["none", "review", "block"] = setting(
        "review", "", "Strongest action an alert ever suggests; block only if you decide so here."
    )
    prevalence: float = setting(
        0.01,
        "share of streams",
        "How common manipulation is where you watch; the expected precision depends on it.",
        gt=0,
        lt=1,
    )


class Evidence(Section):
    """What is kept of an incident."""

    clip_max_s: Seconds = setting(30.0, "s", "Longest clip about the peak of an incident.")
    pre_roll_s: Seconds = setting(5.0, "s", "Clip time before the incident opened: the way into it.")
    post_roll_s: Seconds = setting(5.0, "s", "Clip time after it; the clip is cut once this has passed.")
    crops: Count = setting(4, "pictures", "Best face crops kept per incident.")
    retention_s: Seconds = setting(
        30 * 86400.0, "s", "Evidence is deleted after this: faces are personal data."
    )
    max_bytes: Bytes = setting(
        10 * 1024**3, "bytes", "Evidence never takes more disk than this; the oldest goes first."
    )
    store: str = setting(
        "",
        "fsspec address",
        "Copies of all evidence go here too, like s3://bucket/unmask; its credentials come from the "
        "environment. Empty: the data folder alone.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._need(
            "@" not in self.store,
            "evidence.store holds what looks like a credential; its driver takes those from the environment",
        )
        return self._need(
            self.pre_roll_s + self.post_roll_s <= self.clip_max_s,
            f"evidence.clip_max_s is {self.clip_max_s:g}; "
            f"it must hold pre_roll_s and post_roll_s ({self.pre_roll_s + self.post_roll_s:g} together)",
        )


class Freshness(Section):
    """What happens when detection falls behind a live feed."""

    on_late: Literal["skip", "score"] = setting(
        "skip",
        "",
        "skip keeps alerts current and counts what was left out; score looks at everything, however late.",
    )
    max_staleness_s: Seconds = setting(15.0, "s", "A live picture older than this is late.")


class Engines(Section):
    """How the networks run on this machine."""

    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "", "auto takes the GPU if PyTorch finds one; which, CUDA_VISIBLE_DEVICES says."
    )
    order: tuple[Literal["tensorrt", "inductor", "openvino", "eager"], ...] = setting(
        (),
        "",
        "Tried in this order (empty: as suits the device); one that differs from eager PyTorch on real faces "
        "is refused.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "", "Tried before fp32, checked for parity. auto: fp16 on a GPU, fp32 on a CPU."
    )
    mode: Literal["latency", "throughput"] = setting(
        "latency", "", "throughput splits a batch over OpenVINO's streams; `unmask engines bench` compares."
    )
    batch: int = setting(16, "faces", "Most faces in one call of the network.", ge=1, le=256)
    batch_wait_ms: int = setting(20, "ms", "Longest wait for a batch to fill.", ge=0, le=1000)
    threads: int = setting(0, "threads", "Threads of the network; 0 leaves the choice to the engine.", ge=0)
    cache_dir: str = setting(
        "~/.cache/unmask", "folder", "Compiled networks are kept here, so the next start is quick."
    )


class Members(Section):
    """The networks that judge a face."""

    names: tuple[str, ...] = setting(
        (),
        "",
        "Members that read every face: shipped names, folders, published:NAME; empty: every shipped one.",
    )
    shadow: tuple[str, ...] = setting(
        (), "", "Members on trial: they read every face and are recorded, but have no say in any verdict."
    )
    heavy: tuple[str, ...] = setting(
        (), "", "Costly members that read only feeds under suspicion, and have a say there."
    )
    half: tuple[str, ...] = setting(
        (),
        "",
        "Members that read faces of which half is hidden; empty: every shipped one. See quality.max_covered.",
    )
    heavy_budget: float = setting(
        0.25,
        "share of device time",
        "Heavy members take no more than this, so that one suspect feed does not delay all others.",
        gt=0,
        le=1,
    )


class Cues(Section):
    """What is looked at beside the members; which have a say is measured and shipped (docs/verdicts.md)."""

    record: tuple[str, ...] = setting(
        (), "", f"Cues on trial: recorded, without a say. There are: {', '.join(NAMES)}; see docs/cues.md."
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        unknown = [name for name in self.record if name not in NAMES]
        return self._need(
            not unknown, f"cues.record names {', '.join(unknown)}; there are: {', '.join(NAMES)}"
        )


class Identity(Section):
    """Who a face looks like, from the cues identity and claim. Off unless cues.record names one of them."""

    folder: str = setting(
        "", "folder", "Enrolled people lie here, encrypted; empty: the folder identity in data_dir."
    )
    key_file: str = setting(
        "",
        "file",
        "Holds their key, readable by its owner only, made at the first enrolment; empty: key in that "
        "folder. On another disk it is worth more.",
    )
    claims: tuple[str, ...] = setting(
        (), "STREAM=NAME", "Who is said to be on a feed: its largest face is compared with that person."
    )

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        bad = [claim for claim in self.claims if not all(claim.partition("="))]
        return self._need(not bad, f"identity.claims has {bad}; STREAM=NAME would be right")


class Worker(Section):
    """The detect process."""

    stall_s: Seconds = setting(
        30.0, "s", "Work queued and nothing done for this long: the process exits to be restarted."
    )
    shutdown_s: Seconds = setting(10.0, "s", "An orderly stop takes at most this long.")
    metrics_port: int = setting(
        0, "port", "Prometheus metrics are served here; 0 serves none.", ge=0, le=65535
    )
    metrics_host: str = setting(
        "127.0.0.1", "address", "Where they are served; 0.0.0.0 in a container, for probes from outside."
    )


class Canary(Section):
    """A marked clip that travels the real path, so that a silent stop is noticed (`unmask canary`)."""

    every_s: float = setting(60.0, "s", "A canary is sent to each partition this often; 0 sends none.", ge=0)
    within_s: Seconds = setting(
        30.0, "s", "No answer for this long is an alarm; a worker that died is replaced in less."
    )


class Sinks(Section):
    """Where alerts go besides the topic (`unmask serve`)."""

    file: str = setting(
        "", "YAML file", "Names the sinks: webhooks, files, commands, topics (docs/sinks.md); empty: none."
    )


class Web(Section):
    """The web interface, of `unmask serve` and inside `unmask watch` (docs/dashboard.md)."""

    listen: str = setting(
        "127.0.0.1:8470",
        "",
        "Address and port, or off. Beyond loopback nobody gets in without a token.",
        pattern=r"^(off|\[[0-9a-fA-F:.]+\]:[0-9]{1,5}|[A-Za-z0-9.-]+:[0-9]{1,5})$",
    )
    auth: Literal["auto", "always"] = setting(
        "auto", "", "auto asks for a token unless it listens on loopback; always asks there too."
    )
    tokens_file: str = setting(
        "", "file", "Names, roles and hashes, by unmask tokens; empty: web/tokens in data_dir."
    )
    public_url: str = setting(
        "",
        "",
        "Where browsers find it if not where it listens, as behind a proxy: https://unmask.example.org.",
        pattern=r"^(https?://[A-Za-z0-9.:\[\]-]+)?$",
    )
    tls_cert: str = setting("", "PEM file", "Certificate to serve HTTPS with; empty: HTTP.")
    tls_key: str = setting("", "PEM file", "Its key; empty: in tls_cert.")
    picture_every_s: float = setting(
        5.0,
        "s",
        "How often detect keeps a small picture of each live feed, for the wall; 0 keeps none.",
        ge=0,
    )
    audit_rate: Share = setting(
        0.005,
        "share of faces",
        "Random share of the faces that raised no alert put up for review: only so are misses seen.",
    )

    @field_validator("listen", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        """YAML takes a bare off for false."""
        return "off" if value is False else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        return self._need(
            self.tls_cert != "" or self.tls_key == "",
            "web.tls_key is set without web.tls_cert; both or none would be right",
        )


class Config(Section):
    """Every setting of Unmask."""

    data_dir: str = setting(
        "~/.local/share/unmask", "folder", "Log, evidence and reports live here; a local file system."
    )
    prefix: str = Field(
        "unmask",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$",
        description="Begins every topic name and every event's source, so installations can share a broker.",
    )
    deterministic: bool = setting(
        False,
        "",
        "Fixed sampling and batches, nothing skipped: the same input gives the same incidents, more slowly.",
    )
    expression: bool = setting(
        False,
        "",
        "Whether the expression of each face is recorded among the scores; off, its networks are not loaded. "
        "Read docs/expression.md on privacy first.",
    )
    media: Media = Media()
    log: LogSettings = LogSettings()
    kafka: Kafka = Kafka()
    ingest: Ingest = Ingest()
    decode: Decode = Decode()
    sampling: Sampling = Sampling()
    faces: Faces = Faces()
    quality: QualityGate = QualityGate()
    policy: Policy = Policy()
    verdict: Verdict = Verdict()
    incidents: Incidents = Incidents()
    evidence: Evidence = Evidence()
    freshness: Freshness = Freshness()
    engines: Engines = Engines()
    members: Members = Members()
    cues: Cues = Cues()
    identity: Identity = Identity()
    worker: Worker = Worker()
    canary: Canary = Canary()
    sinks: Sinks = Sinks()
    web: Web = Web()
