"""Members on the engine that serves them at run time, which reads several times as fast as their network."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from detectors.members import Member
from detectors.mtcnn import MtcnnDetector
from detectors.readings import Box
from detectors.reference import reference_crops, reference_face
from engines.engine import Engine, Network, Plan, build


class Served(nn.Module):
    """A network on its engine; its features are its own."""

    def __init__(self, network: nn.Module, engine: Engine) -> None:
        super().__init__()
        self.network, self.engine = network, engine

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """As the network's: logits [N] and maps [N, h, w] of float32 [N, 3, S, S]."""
        logits, maps = self.engine(faces)
        return torch.from_numpy(logits), torch.from_numpy(maps)

    def features(self, faces: Tensor) -> Tensor:
        """As the network's: pooled features [N, C]."""
        features: Tensor = self.network.features(faces)  # type: ignore[operator]
        return features


def served(members: Sequence[Member], threads: int = 2) -> list[Member]:
    """The members on the first engine that agrees with their network on the portrait's face."""
    face = reference_face(MtcnnDetector())
    with tempfile.TemporaryDirectory(prefix="unmask-served-") as cache:
        return [
            replace(member, module=Served(member.module, _engine(member, face, threads, Path(cache))))
            for member in members
        ]


def _engine(member: Member, face: Box, threads: int, cache: Path) -> Engine:
    return build(
        Network(member.name, member.module, member.sha256),
        plan=Plan(order=("openvino", "eager"), precision="fp32", threads=threads),
        cache_dir=cache,
        reference=reference_crops(face, member.policy),
        to_probability=member.calibration.probability,
    )
