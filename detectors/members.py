"""The registry of members: networks with their weights, crop policy and calibration, checked on loading.

A member is a directory `weights/<name>/`: `member.json` (what it is), `weights.safetensors` (fp16, without
pickle), `calibration.json`, and a model card in the documentation.
"""

import hashlib
import json
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
from detectors.readings import Image

SCHEMA = 1
SHIPPED = Path(__file__).parent / "weights"
DEFAULT_MEMBER = "lite0-att-dfdc"
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


@dataclass(frozen=True, slots=True)
class Scored:
    """A face crop's score: `probability` of manipulation and its 95 % `interval` in 0..1, and the raw
    `logit`."""

    probability: float
    logit: float
    interval: tuple[float, float]


def list_members() -> tuple[str, ...]:
    """Names of the members that are shipped, sorted."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/member.json")))


def load_member(name_or_path: str | Path) -> Member:
    """Loads a shipped member by name or any member by its directory.

    Raises UnknownMemberError, TamperedWeightsError, MisshapenWeightsError, MemberError for a broken
    `member.json`, CalibrationError for a broken calibration.
    """
    directory = _directory(name_or_path)
    record = _record(directory / "member.json")
    try:
        policy = CropPolicy.from_json(record["crop"])
        architecture = Architecture(**record["architecture"])
        expected = str(record["sha256"])
        name, version, licence = str(record["name"]), str(record["version"]), str(record["licence"])
    except (KeyError, TypeError, ValueError) as error:
        raise MemberError(f"{directory / 'member.json'}: {type(error).__name__}: {error}") from error
    tensors, found = _weights(directory / "weights.safetensors", expected)
    network = FaceNetwork(architecture)
    _fill(network, tensors, directory / "weights.safetensors")
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
        faces = np.stack([fit(image, member.policy.size) for image in images[start : start + BATCH]])
        with torch.inference_mode():
            logits, _ = member.module(to_tensor(faces, member.policy))
        out[start : start + BATCH] = logits.numpy()
    return out


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def _default_member() -> Member:
    return load_member(DEFAULT_MEMBER)


def _directory(name_or_path: str | Path) -> Path:
    for directory in (SHIPPED / name_or_path, Path(name_or_path)):
        if (directory / "member.json").is_file():
            return directory
    known = ", ".join(list_members()) or "none"
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


def _weights(path: Path, expected: str) -> tuple[dict[str, Tensor], str]:
    """Reads the file once, so that what is hashed is what is loaded."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MemberError(f"{path}: {error.strerror}; reinstall, or run `unmask train`") from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise TamperedWeightsError(path, found, expected)
    try:
        return parse_safetensors(content), found
    except SafetensorError as error:
        raise MemberError(f"{path}: not a safetensors file: {error}") from error


def _fill(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = network.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    unexpected = sorted(set(tensors) - set(wanted))
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(tensors))
        if tensors[name].shape != wanted[name].shape
    ]
    if missing or unexpected or misshapen:
        raise MisshapenWeightsError(path, missing, unexpected, misshapen)
    not_finite = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if not_finite:
        raise MemberError(f"{path}: {not_finite[0]} holds numbers that are not finite")
    network.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()})


def _calibration(path: Path) -> Calibration:
    """A member without a calibration file is uncalibrated, and every verdict says so."""
    return Calibration.load(path) if path.exists() else Calibration.identity()
