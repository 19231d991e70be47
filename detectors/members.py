"""The registry of members: networks with their weights, crop policy and calibration, checked on loading.

A member is a directory `weights/<name>/`: `member.json` (what it is), `weights.safetensors` (fp16, without
pickle), `calibration.json`, and a model card in the documentation.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn

from detectors.backbones import Architecture, FaceNetwork
from detectors.calibration import Calibration
from detectors.crops import CropPolicy, fit, to_tensor
from detectors.readings import Image, Visible
from detectors.registry import PREFIX, SHIPPED, RegistryError, find_published

SCHEMA = 1
DEFAULT_MEMBER = "lite0-att"
DEFAULT_CACHE = Path("~/.cache/unmask")
"""Where pulled checkpoints lie unless `engines.cache_dir` says otherwise."""

BATCH = 32
"""Crops a batch when many are scored: more gains nothing on a CPU."""


class MemberError(ValueError):
    """A member that cannot be used; the message names the file and what would be right."""


class UnknownMemberError(MemberError):
    """No such member; the message lists those there are."""


class TamperedWeightsError(MemberError):
    """The weights are not those the member was made with."""

    def __init__(self, path: Path, found: str, expected: str) -> None:
        super().__init__(
            f"{path}: SHA-256 {found}, expected {expected}: not the weights this member was made with"
        )
        self.path, self.found, self.expected = path, found, expected


class MisshapenWeightsError(MemberError):
    """The weights do not fit the network, tensor by tensor."""

    def __init__(self, path: Path, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
        parts = [
            f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
            if names
        ]
        super().__init__(f"{path}: weights do not fit the network; {'; '.join(parts)}")
        self.path, self.missing, self.unexpected, self.misshapen = path, missing, unexpected, misshapen


@dataclass(frozen=True, slots=True)
class Member:
    """A loaded member.

    `module` is in evaluation mode, float32: normalised float32 [N, 3, S, S] in, (logit [N], attention [N,
    h, w]) out. `sha256` is that of the weights file. `record` is all of `member.json`, metrics included.
    """

    name: str
    version: str
    policy: CropPolicy
    module: nn.Module
    calibration: Calibration
    sha256: str
    licence: str
    record: dict[str, Any]

    @property
    def half(self) -> Visible | None:
        """The half that it reads of faces whose other one is hidden; None: it reads whole faces."""
        half = self.record.get("architecture", {}).get("half")
        return None if half is None else Visible(half)


@dataclass(frozen=True, slots=True)
class Scored:
    """A face crop's score: `probability` of manipulation and its 95 % `interval` in 0..1, and the raw
    `logit`."""

    probability: float
    logit: float
    interval: tuple[float, float]


def list_members() -> tuple[str, ...]:
    """Names of the members that are shipped and read whole faces, sorted."""
    return tuple(sorted(path.parent.name for path in _shipped() if not _reads_half(path)))


def list_halves() -> tuple[str, ...]:
    """Names of those that read half of a face whose other half is hidden, sorted."""
    return tuple(sorted(path.parent.name for path in _shipped() if _reads_half(path)))


def load_member(name_or_path: str | Path, cache: Path = DEFAULT_CACHE) -> Member:
    """Loads a shipped member by name, any member by its directory, or `published:NAME`, a checkpoint that
    `unmask models pull` brought to `cache`.

    Raises UnknownMemberError, TamperedWeightsError, MisshapenWeightsError, MemberError for a broken
    `member.json`, CalibrationError for a broken calibration.
    """
    if str(name_or_path).startswith(PREFIX):
        return _published(str(name_or_path), cache)
    directory = _directory(name_or_path)
    record = _record(directory / "member.json")
    try:
        policy = CropPolicy.from_json(record["crop"])
        network = FaceNetwork(Architecture(**record["architecture"]))
        expected = str(record["sha256"])
        name, version, licence = str(record["name"]), str(record["version"]), str(record["licence"])
    except (KeyError, TypeError, ValueError) as error:
        raise MemberError(f"{directory / 'member.json'}: {type(error).__name__}: {error}") from error
    weights = directory / "weights.safetensors"
    content, found = read_checked(weights, expected)
    fill(network, parse(content, weights), weights)
    return Member(
        name=name,
        version=version,
        policy=policy,
        module=network.eval().requires_grad_(False),
        calibration=_calibration(directory / "calibration.json"),
        sha256=found,
        licence=licence,
        record=record,
    )


def score_crop(image: Image, member: Member | None = None) -> Scored:
    """Scores one face that is already cropped: uint8 [H, W, 3] RGB in, probability, logit and interval out.

    Without a member the default one is loaded, once. Of a picture that is not square the middle square is
    taken.
    """
    return score_crops([image], member)[0]


def score_crops(images: list[Image], member: Member | None = None) -> list[Scored]:
    """Scores many cropped faces, of any sizes, in batches; the order is kept."""
    chosen = member or _default_member()
    logits = crop_logits(images, chosen)
    return [
        Scored(
            probability=chosen.calibration.probability(logit),
            logit=logit,
            interval=chosen.calibration.interval(logit),
        )
        for logit in map(float, logits)
    ]


def crop_logits(images: list[Image], member: Member) -> NDArray[np.float32]:
    """Raw logits float32 [N] of cropped faces by the member's own module."""
    out = np.empty(len(images), np.float32)
    for start in range(0, len(images), BATCH):
        faces = np.stack(
            [
                fit(image, member.policy.size, member.policy.resampling)
                for image in images[start : start + BATCH]
            ]
        )
        with torch.inference_mode():
            logits, _ = member.module(to_tensor(faces, member.policy))
        out[start : start + BATCH] = logits.numpy()
    return out


@lru_cache(maxsize=1)
def _default_member() -> Member:
    return load_member(DEFAULT_MEMBER)


def _shipped() -> list[Path]:
    return list(SHIPPED.glob("*/member.json"))


def _reads_half(path: Path) -> bool:
    """A record that cannot be read is told of by whoever loads it."""
    try:
        return bool(_record(path).get("architecture", {}).get("half"))
    except (MemberError, AttributeError):
        return False


def _directory(name_or_path: str | Path) -> Path:
    for directory in (SHIPPED / name_or_path, Path(name_or_path)):
        if (directory / "member.json").is_file():
            return directory
    known = ", ".join([*list_members(), *list_halves()]) or "none"
    raise UnknownMemberError(
        f"member {str(name_or_path)!r}: expected a directory with member.json or one of: {known}"
    )


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MemberError(f"{path}: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise MemberError(f"{path}: expected an object with schema {SCHEMA}")
    return record


def read_checked(path: Path, sha256: str | None, at_most: int | None = None) -> tuple[bytes, str]:
    """Returns the bytes of a weights file and their SHA-256; read once, so that what is hashed is what is
    loaded.

    Raises MemberError when it cannot be read or is larger than `at_most` bytes, TamperedWeightsError when its
    hash is not `sha256`.
    """
    try:
        size = path.stat().st_size
        if at_most is not None and size > at_most:
            raise MemberError(f"{path}: {size} bytes; expected at most {at_most}")
        content = path.read_bytes()
    except OSError as error:
        raise MemberError(f"{path}: {error.strerror}; expected a file of weights") from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise TamperedWeightsError(path, found, sha256)
    return content, found


def parse(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; MemberError names `path` when it is none."""
    try:
        return parse_safetensors(content)
    except SafetensorError as error:
        raise MemberError(f"{path}: not a safetensors file: {error}") from error


def fill(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    names: Mapping[str, str] | None = None,
    unused: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Fills every parameter and buffer of `network`, and uses every tensor, or raises naming those of `path`
    that do not fit.

    `names` gives the network's name of each of the file's; None: they are the same. `unused` are tensors
    that must be there, of that shape, and go nowhere.
    """
    state = network.state_dict()
    names = {name: name for name in state} if names is None else names
    wanted = {theirs: state[ours] for theirs, ours in names.items()}
    wanted |= {name: torch.empty(shape, device="meta") for name, shape in (unused or {}).items()}
    missing = sorted(set(wanted) - set(tensors))
    unexpected = sorted(set(tensors) - set(wanted))
    misshapen = [
        f"{name} {_described(tensors[name])} instead of {_described(wanted[name])}"
        for name in sorted(set(wanted) & set(tensors))
        if _described(tensors[name]) != _described(wanted[name])
    ]
    if missing or unexpected or misshapen:
        raise MisshapenWeightsError(path, missing, unexpected, misshapen)
    not_finite = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if not_finite:
        raise MemberError(f"{path}: {not_finite[0]} holds numbers that are not finite")
    network.load_state_dict({ours: tensors[theirs].to(state[ours].dtype) for theirs, ours in names.items()})


def _described(tensor: Tensor) -> str:
    """The shape, and what else keeps a tensor from standing for another; half and double widths do not."""
    kind = "" if tensor.layout is torch.strided else f" {tensor.layout}"
    if tensor.is_floating_point():
        return f"{tuple(tensor.shape)}{kind}"
    return f"{tuple(tensor.shape)}{kind} of {'complex numbers' if tensor.is_complex() else 'integers'}"


def _calibration(path: Path) -> Calibration:
    """A member without a calibration file is uncalibrated, and every verdict says so."""
    return Calibration.load(path) if path.exists() else Calibration.identity()


def _published(name: str, cache: Path) -> Member:
    from detectors.published import load_published  # it builds on this module

    try:
        published = find_published(name)
    except RegistryError as error:
        raise UnknownMemberError(str(error)) from error
    path = published.path(cache.expanduser())
    if not path.is_file():
        raise UnknownMemberError(
            f"member {name!r} is not in {path.parent}: run `unmask models pull {published.name}` first"
        )
    return load_published(published.name, path, published.sha256)
