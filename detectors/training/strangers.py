"""Manipulated crops by generators that no member was trained on: what members and their fusion are chosen by.

Three families, each on authentic faces that no member trained on either: `cloned` (another person's face,
blended in the gradient domain), `restored` (another person's face through a denoiser and a detail filter, as
swappers with face restoration leave it) and `autoencoded` (a small convolutional autoencoder's face). A
figure on these says how a member does on what it has not met; one on `val` says how well it knows DFDC.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detectors.readings import Image
from detectors.training.augment import apply, draw
from detectors.training.blends import Blend, Face, laid, matched, mixed
from detectors.training.data import (
    CANDIDATES,
    Source,
    authentic_source,
    load_faces,
    load_source,
)
from detectors.training.eigenfaces import aligned, put_back
from detectors.training.faces import Shape, affine, filled, nearest, outline

SEED = 1041
AUTOENCODER_PX = 64
"""What the first autoencoder swappers worked at."""
AUTOENCODER_STEPS = 1200
AUTOENCODER_BATCH = 32
AUTOENCODER_FACES = 4000
LATENT = 256


class StrangerFamily(StrEnum):
    """Who made the manipulated crop."""

    CLONED = "cloned"
    RESTORED = "restored"
    AUTOENCODED = "autoencoded"


@dataclass(frozen=True, slots=True)
class Strangers:
    """Pairs of one family from one source, of length N.

    `real` and `fake` uint8 [N, P, P, 3] RGB after the same mild degradation; `side` of the crops in MTCNN box
    heights; `identity` a number per person.
    """

    family: StrangerFamily
    real: NDArray[np.uint8]
    fake: NDArray[np.uint8]
    side: float
    identity: NDArray[np.int64]


def stranger_pairs(data_dir: Path, cache_dir: Path, *, each: int) -> list[Strangers]:
    """The set: `each` pairs of every family from validation people of DFDC and from the people of LFW and
    `wide_faces` that are held out. Made once and cached; the same for the same data."""
    found = []
    for name, source, identity in _people(data_dir, cache_dir):
        for family in StrangerFamily:
            path = cache_dir / f"strangers_{name}_{family}_{each}.npz"
            if not path.exists():
                encoder = _autoencoder(data_dir, cache_dir) if family is StrangerFamily.AUTOENCODED else None
                _make(path, family, source, identity, each, encoder)
            with np.load(path) as saved:
                found.append(Strangers(family, saved["real"], saved["fake"], source.side, saved["identity"]))
    return found


def _people(data_dir: Path, cache_dir: Path) -> Iterator[tuple[str, Source, NDArray[np.int64]]]:
    faces = load_faces(data_dir, cache_dir, "val")
    source = authentic_source(faces, cache_dir, "val")
    yield "dfdc", source, faces.identity[source.rows]
    start = 1_000_000  # beyond the clusters of DFDC; one picture a person
    for name in ("lfw_faces", "wide_faces"):
        other = load_source(data_dir, cache_dir, name, held_out=True)
        yield name, other, start + np.arange(len(other.points))
        start += len(other.points)


def _make(
    path: Path,
    family: StrangerFamily,
    source: Source,
    identity: NDArray[np.int64],
    each: int,
    encoder: "Autoencoder | None",
) -> None:
    rng = np.random.default_rng((SEED, list(StrangerFamily).index(family), len(identity)))
    chosen = rng.permutation(len(identity))[:each]
    real, fake = [], []
    for index in chosen:
        target = source.face(int(index))
        others = rng.permutation(np.flatnonzero(identity != identity[index]))[:CANDIDATES]
        donor = source.face(int(others[nearest(target.points, source.points[others])]))
        made = _blend(family, target, donor, encoder, rng)
        side = target.image.shape[0]
        native = float(source.native[index])
        degradation = draw(rng, side, side, native=native, coded=True, mild=True)
        real.append(apply(made.real, degradation))
        fake.append(apply(made.fake, degradation))
    np.savez(path, real=np.stack(real), fake=np.stack(fake), identity=identity[chosen])


def _blend(
    family: StrangerFamily,
    target: Face,
    donor: Face,
    encoder: "Autoencoder | None",
    rng: np.random.Generator,
) -> Blend:
    side = target.image.shape[0]
    hull = filled(outline(target.points, Shape.LOW), side)
    if family is StrangerFamily.CLONED:
        return _cloned(target, donor, hull)
    width = 2 * round(0.12 * target.eyes) + 1
    soft = cv2.blur(cv2.erode(hull, np.ones((width, width), np.uint8)), (width, width))
    restored = family is StrangerFamily.RESTORED
    source = _restored(_donated(donor, target), rng) if restored else _rebuilt(target, encoder)
    return mixed(target.image, matched(source, target.image, soft), soft)


def _cloned(target: Face, donor: Face, hull: NDArray[np.float32]) -> Blend:
    """Another person's face in the gradient domain (Perez et al., "Poisson Image Editing")."""
    inner = hull.copy()
    inner[[0, 1, -2, -1]] = inner[:, [0, 1, -2, -1]] = 0  # the solver wants a border
    mask = (inner * 255).astype(np.uint8)
    x, y, w, h = cv2.boundingRect(mask)
    image = np.ascontiguousarray(target.image)
    fake = cv2.seamlessClone(
        _donated(donor, target),
        image,
        mask,
        (x + w // 2, y + h // 2),
        cv2.NORMAL_CLONE,
    )
    return Blend(image, np.where(inner[..., None] > 0, fake, image), inner)


def _donated(donor: Face, target: Face) -> Image:
    return laid(donor, target, affine(donor.points, target.points))


def _restored(image: Image, rng: np.random.Generator) -> Image:
    """Without noise, and with edges brought out: skin like wax."""
    clean = cv2.fastNlMeansDenoisingColored(
        np.ascontiguousarray(image), None, float(rng.uniform(4, 8)), 8.0, 5, 11
    )
    out: Image = cv2.detailEnhance(clean, sigma_s=float(rng.uniform(4, 10)), sigma_r=0.12)
    return out


def _rebuilt(face: Face, encoder: "Autoencoder | None") -> Image:
    if encoder is None:
        raise ValueError("autoencoder: none given")
    small, matrix = aligned(face, AUTOENCODER_PX)
    with torch.inference_mode():
        back = encoder(_tensor(small[None]))[0]
    rebuilt = (back.permute(1, 2, 0).numpy() * 255).clip(0, 255).astype(np.uint8)
    return put_back(rebuilt, matrix, face.image)


def _tensor(pictures: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


class Autoencoder(nn.Module):
    """float32 [N, 3, 64, 64] in 0..1 through 256 numbers and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            _down(3, 32),
            _down(32, 64),
            _down(64, 128),
            _down(128, 128),
            nn.Flatten(),
            nn.Linear(2048, LATENT),
        )
        self.grow = nn.Linear(LATENT, 2048)
        self.decode = nn.Sequential(
            _up(128, 128), _up(128, 64), _up(64, 32), _up(32, 16), nn.Conv2d(16, 3, 3, 1, 1)
        )

    def forward(self, faces: Tensor) -> Tensor:
        small = self.grow(self.encode(faces)).reshape(-1, 128, 4, 4)
        return torch.sigmoid(self.decode(small))


def _down(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.1))


def _up(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, 4 * outputs, 3, 1, 1), nn.LeakyReLU(0.1), nn.PixelShuffle(2))


def _autoencoder(data_dir: Path, cache_dir: Path) -> Autoencoder:
    """Trained on authentic faces of `train`, once."""
    path = cache_dir / "stranger_autoencoder.pt"
    torch.manual_seed(SEED)
    network = Autoencoder()
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    source = authentic_source(load_faces(data_dir, cache_dir, "train"), cache_dir, "train")
    rng = np.random.default_rng(SEED)
    chosen = rng.permutation(len(source.points))[:AUTOENCODER_FACES]
    pictures = np.stack([aligned(source.face(int(index)), AUTOENCODER_PX)[0] for index in chosen])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(AUTOENCODER_STEPS):
        batch = _tensor(pictures[rng.integers(len(pictures), size=AUTOENCODER_BATCH)])
        loss = (network(batch) - batch).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(network.state_dict(), path)
    return network.eval()
