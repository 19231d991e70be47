"""Members on the fastest correct engines, behind a face reader. Loads torch: import it only to build one."""

import logging
from collections.abc import Sequence
from pathlib import Path

from detectors.members import Member, list_members, load_member
from detectors.mtcnn import MtcnnDetector
from detectors.quality import QualityLimits
from detectors.reader import FaceReader
from detectors.reference import reference_crops
from engines.engine import Engine, Network, build
from stream.config import Config
from stream.errors import Code, UnmaskError

logger = logging.getLogger(__name__)


def face_reader(config: Config, members: Sequence[Member]) -> FaceReader:
    """Put each member on the first engine that serves it. Raises `UnmaskError` (ENGINE) if none does."""
    detector = MtcnnDetector(config.faces.min_face_px, config.faces.confidence)
    reader = FaceReader(
        detector=detector,
        members=tuple(members),
        engines={member.name: _engine(member, config, detector) for member in members},
        limits=QualityLimits(**config.quality.model_dump()),
        max_faces=config.faces.max_faces,
        batch=config.engines.batch,
        deterministic=config.deterministic,
    )
    for member in members:
        logger.info("member %s %s on %s %s", member.name, member.version, reader.engine, reader.precision)
    return reader


def load_members(names: Sequence[str]) -> tuple[Member, ...]:
    """Load members by name or folder; none named means every shipped one. Raises `UnmaskError` (WEIGHTS)."""
    wanted = tuple(names) or list_members()
    if not wanted:
        raise UnmaskError(
            Code.WEIGHTS, "no member is shipped with this installation; name a folder of one in members.names"
        )
    try:
        members = tuple(load_member(name) for name in wanted)
    except ValueError as error:  # every error of a member, its crop policy and its calibration is one
        raise UnmaskError(Code.WEIGHTS, str(error)) from error
    doubled = {member.name for member in members if sum(other.name == member.name for other in members) > 1}
    if doubled:
        raise UnmaskError(
            Code.WEIGHTS, f"member {min(doubled)} is named twice in members.names; once is right"
        )
    return members


def _engine(member: Member, config: Config, detector: MtcnnDetector) -> Engine:
    try:
        return build(
            Network(member.name, member.module, member.sha256),
            order=config.engines.order,
            precision=config.engines.precision,
            threads=config.engines.threads,
            cache_dir=Path(config.engines.cache_dir).expanduser(),
            reference=reference_crops(detector, member.policy),
            to_probability=member.calibration.probability,
        )
    except (ValueError, LookupError, OSError) as error:
        raise UnmaskError(Code.ENGINE, str(error)) from error
