"""Typed errors: each has a stable code for machines and one sentence for people."""

from enum import StrEnum


class Code(StrEnum):
    """Stable error codes, used in events, metrics and exit messages."""

    SOURCE_SYNTAX = "source_syntax"
    SOURCE_NOT_FOUND = "source_not_found"
    SOURCE_REFUSED = "source_refused"
    SOURCE_UNAUTHORISED = "source_unauthorised"
    SOURCE_PROTOCOL = "source_protocol"
    SOURCE_NO_VIDEO = "source_no_video"
    SOURCE_DRM = "source_drm"
    SOURCE_TIMEOUT = "source_timeout"
    SOURCE_SILENT = "source_silent"
    SOURCE_ENDED = "source_ended"
    SOURCE_LOST = "source_lost"
    SOURCE_INVALID = "source_invalid"
    PROGRAM_MISSING = "program_missing"
    CONFIG = "config"
    WEIGHTS = "weights"
    ENGINE = "engine"
    LOG_LEASE = "log_lease"
    LOG_FENCED = "log_fenced"
    LOG_POSITION = "log_position"
    LOG_FULL = "log_full"
    LOG_UNUSABLE = "log_unusable"
    LOG_AWAY = "log_away"
    SCHEMA = "schema"
    CHUNK_INVALID = "chunk_invalid"
    DECODE_FAILED = "decode_failed"
    DECODER_DIED = "decoder_died"
    DECODER_STALLED = "decoder_stalled"
    STAGE_WEDGED = "stage_wedged"


class UnmaskError(Exception):
    """Something went wrong that a user or operator can act on.

    `code` is stable; `str(error)` is one sentence that names the field, the value and what would be
    right, with every secret already redacted.
    """

    def __init__(self, code: Code, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
