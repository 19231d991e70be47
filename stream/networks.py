"""Members on the fastest correct engines, behind a face reader. Loads torch: import it only to build one."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from detectors.ensemble import Ensemble, load_ensemble
from detectors.members import Member, list_halves, list_members, load_member
from detectors.mtcnn import MtcnnDetector
from detectors.reader import FaceReader, Role, Runner, Usage
from detectors.readings import Box
from detectors.reference import reference_crops, reference_face
from engines.engine import Engine, Network, Plan, Refusal, build
from engines.hardware import find_device
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.gate import quality_limits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cast:
    """The members that the settings name, by what they are asked for. `refused` are shadows that cannot be
    loaded: they are missed, and nothing else is. `halves` read half-hidden faces, at most one a half."""

    voters: tuple[Member, ...]
    heavy: tuple[Member, ...]
    shadows: tuple[Member, ...]
    refused: tuple[Usage, ...]
    halves: tuple[Member, ...] = ()

    @property
    def fused(self) -> tuple[Member, ...]:
        """Those that read whole faces and are fused."""
        return self.voters + self.heavy

    @property
    def with_a_say(self) -> tuple[Member, ...]:
        return self.fused + self.halves


@dataclass(frozen=True, slots=True)
class Networks:
    """A reader with its members, and how their logits become one."""

    reader: FaceReader
    cast: Cast
    ensemble: Ensemble
    refused: tuple[Usage, ...]
    """Shadows that were switched off before they read anything."""
    refusals: Sequence[Refusal] = ()
    """Engines that did not serve a member, so that the next one does; on a GPU there may be more later."""


def build_networks(config: Config, cascade: bool) -> Networks:
    """Load the settings' members and put each on the first engine that serves it.

    Without `cascade`, or when the settings are deterministic, heavy members read every face like the others:
    what they are asked for would depend on time. Raises `UnmaskError` (WEIGHTS, ENGINE, CONFIG), except for
    what is wrong with a shadow: that is logged, and it is left out.
    """
    cast = load_cast(config)
    try:
        ensemble = load_ensemble(cast.fused)
    except ValueError as error:
        raise UnmaskError(Code.WEIGHTS, str(error)) from error
    detector = MtcnnDetector(config.faces.min_face_px, config.faces.confidence)
    engines = Engines(config, find_face(detector))
    sparing = cascade and not config.deterministic
    runners = [Runner(member, engines.of(member)) for member in cast.voters]
    runners += [
        Runner(member, engines.of(member), Role.HEAVY if sparing else Role.VOTER) for member in cast.heavy
    ]
    runners += [Runner(member, engines.of(member), Role.HALF) for member in cast.halves]
    shadows, refused = _shadows(cast.shadows, engines)
    reader = FaceReader(
        detector=detector,
        runners=[*runners, *shadows],
        fuse=ensemble.fuse,
        limits=quality_limits(config),
        max_faces=config.faces.max_faces,
        batch=config.engines.batch,
        deterministic=config.deterministic,
    )
    for runner in [*runners, *shadows]:
        member, engine = runner.member, runner.engine
        logger.info(
            "%s %s %s on %s %s", runner.role, member.name, member.version, engine.name, engine.precision
        )
    own = {member.name: member.calibration for member in cast.halves}
    ensemble = replace(ensemble, calibration=replace(ensemble.calibration, halves=own))
    return Networks(reader, cast, ensemble, (*cast.refused, *refused), engines.refusals)


def load_cast(config: Config) -> Cast:
    """Load the members that the settings name. Raises `UnmaskError` (WEIGHTS, CONFIG)."""
    folder = Path(config.engines.cache_dir).expanduser()
    names = config.members.names or list_members()
    if not names:
        raise UnmaskError(
            Code.WEIGHTS, "no member is shipped with this installation; name a folder of one in members.names"
        )
    voters = _loaded(names, folder)
    heavy = _loaded(config.members.heavy, folder)
    shadows, refused = [], []
    for name in config.members.shadow:
        try:
            shadows.append(load_member(name, folder))
        except Exception as error:  # whatever is wrong with it: nobody needs it
            logger.error("shadow member %s is left out: %s", name, error)
            refused.append(Usage(name, Role.SHADOW, off=True))
    halves = _halves(config, folder)
    _check_distinct([*voters, *heavy, *shadows, *halves])
    _check_whole([*voters, *heavy, *shadows])
    return Cast(voters, heavy, tuple(shadows), tuple(refused), halves)


def _halves(config: Config, folder: Path) -> tuple[Member, ...]:
    """Members for half-hidden faces: none where nobody asks which those are."""
    if not config.quality.max_covered:
        return ()
    halves = _loaded(config.members.half or list_halves(), folder)
    for member in halves:
        if member.half is None:
            raise UnmaskError(
                Code.CONFIG, f"members.half: {member.name} reads whole faces; it belongs in members.names"
            )
    seen = [member.half for member in halves]
    if len(set(seen)) < len(seen):
        names = ", ".join(member.name for member in halves)
        raise UnmaskError(Code.CONFIG, f"members.half: {names}: two of them read the same half; one is right")
    return halves


def _check_whole(members: Sequence[Member]) -> None:
    for member in members:
        if member.half is not None:
            raise UnmaskError(
                Code.CONFIG,
                f"member {member.name} reads the {member.half} half alone; it belongs in members.half",
            )


def _loaded(names: Iterable[str], cache: Path) -> tuple[Member, ...]:
    try:
        return tuple(load_member(name, cache) for name in names)
    except (ValueError, OSError) as error:  # every error of a member, its policy, its calibration is one
        raise UnmaskError(Code.WEIGHTS, str(error)) from error


def _check_distinct(members: Sequence[Member]) -> None:
    names = [member.name for member in members]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise UnmaskError(
            Code.CONFIG,
            f"member {min(doubled)} is named twice in members.names, members.heavy and members.shadow; "
            "once is right",
        )


def _shadows(members: Iterable[Member], engines: "Engines") -> tuple[list[Runner], list[Usage]]:
    runners, refused = [], []
    for member in members:
        try:
            runners.append(Runner(member, engines.of(member), Role.SHADOW))
        except Exception as error:
            logger.error("shadow member %s is left out: %s", member.name, error)
            refused.append(Usage(member.name, Role.SHADOW, off=True))
    return runners, refused


def plan_of(config: Config) -> Plan:
    """Return how the settings want networks to run here. Raises `UnmaskError` (CONFIG) without their GPU."""
    wanted, found = config.engines, find_device()
    if wanted.device == "cuda" and found != "cuda":
        raise UnmaskError(
            Code.CONFIG, "engines.device is cuda and PyTorch finds no GPU here; auto or cpu is right"
        )
    return Plan(
        device=found if wanted.device == "auto" else wanted.device,
        order=wanted.order,
        precision=wanted.precision,
        batch=1 if config.deterministic else wanted.batch,
        threads=wanted.threads,
        mode=wanted.mode,
    )


def find_face(detector: MtcnnDetector) -> Box:
    """Return the reference portrait's face. Raises `UnmaskError` (ENGINE) for a broken installation."""
    try:
        return reference_face(detector)
    except (LookupError, OSError) as error:
        raise UnmaskError(Code.ENGINE, str(error)) from error


class Engines:
    """The settings' engine for each member; `face` is the reference portrait's. Collects `refusals`."""

    def __init__(self, config: Config, face: Box) -> None:
        self._plan = plan_of(config)
        self._cache = Path(config.engines.cache_dir).expanduser()
        self._face = face
        self.refusals: list[Refusal] = []

    def of(self, member: Member) -> Engine:
        """Build the member's engine. Raises `UnmaskError` (ENGINE) when its numbers cannot be used."""
        try:
            return build(
                Network(member.name, member.module, member.sha256),
                plan=self._plan,
                cache_dir=self._cache,
                reference=reference_crops(self._face, member.policy),
                to_probability=member.calibration.probability,
                on_refused=self.refusals.append,
            )
        except (ValueError, OSError) as error:
            raise UnmaskError(Code.ENGINE, str(error)) from error
