"""Bursts as the stream sees them, for training and judging the cues over time: cut from clips, followed by
the landmark networks, authentic or with a face swap simulated through time (SCIENCE C 1, E).

A simulated swap keeps its draw for the whole burst, mask, generator and colours, and takes its donor from
another person's clip, picture by picture; what trembles is what the landmarks of target and donor tremble, as
in a swapper. The authentic burst and its swaps go through one encoder setting alike, after the blending.
"""

import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from detectors.crops import crop, to_tensor
from detectors.cues.landmarks import LandmarkModel, Mesh, region_of
from detectors.cues.ratios import ratios
from detectors.cues.series import FaceSeries, look_of
from detectors.ensemble import Ensemble, load_ensemble
from detectors.members import Member, list_members, load_member
from detectors.mtcnn import MtcnnDetector
from detectors.readings import Box, Image
from detectors.training.blends import MAKERS, Face, Family
from detectors.training.data import DataError, load_source
from detectors.training.eigenfaces import Eigenfaces

logger = logging.getLogger(__name__)

BURST_S = 4.0
"""As long as at run time."""

MOST_BURSTS = 4
"""Of one clip, evenly apart: no person outweighs the others."""

SEED_S = 0.5
"""Between looks of the detector, and of the members: the ordinary sampling."""

SWAPS = 3
"""Simulated swaps of each authentic burst, each with a donor and a draw of its own."""

DONOR_PICTURES = 60
LONGEST_SIDE = 1280
"""Larger pictures are reduced, as for finding faces in clips elsewhere in training."""

CRF = (20, 34)
"""Quality of the encoder, drawn for a burst and all its swaps: from a good to a poor stream."""

LEAST_FOLLOWED = 0.9
"""Share of a burst's pictures in which the face must be followed."""

EIGENFACES_FROM = 1000
NOSE, LEFT_MOUTH, RIGHT_MOUTH = 4, 61, 291
"""Mesh points that stand for MTCNN's nose and mouth corners."""

SEED = 5041


@dataclass(frozen=True, slots=True)
class BurstOf:
    """One burst of one clip. `kind` is `authentic`, `simulated` (made of the authentic burst `index` of that
    clip) or `manipulated` (a clip that came so); `person` numbers the clip's person; `fused` is the
    ensemble's calibrated logit, meaned over the ordinary sampling."""

    clip: str
    person: int
    index: int
    kind: str
    series: FaceSeries
    fused: float

    @property
    def label(self) -> int:
        """1 for manipulated, simulated ones too."""
        return int(self.kind != "authentic")


def load_bursts(data_dir: Path, cache_dir: Path, landmarks: Path) -> list[BurstOf]:
    """Every burst of the clips; found once, burst by burst, then read from `cache_dir`. A stopped run goes
    on.

    Raises DataError without clips, LandmarksError without the networks in the folder `landmarks`.
    """
    members = [load_member(name) for name in list_members()]
    ensemble = load_ensemble(members)
    folder = cache_dir / f"bursts_{ensemble.digest[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    found = [*sorted((data_dir / "clips" / "authentic").glob("*.mp4"))]
    forged = sorted((data_dir / "clips").glob("manipulated*/*.mp4"))
    if not found:
        raise DataError(f"{data_dir / 'clips' / 'authentic'}: no clip; expected *.mp4")
    eyes = _Eyes(LandmarkModel(landmarks), members, ensemble)
    donors = _Donors(found, eyes)
    bursts: list[BurstOf] = []
    for person, path in enumerate([*found, *forged]):
        authentic = person < len(found)
        missing = [] if (folder / f"{path.stem}.done").exists() else list(_cut(path))
        for index, pictures in enumerate(missing):
            variants = _variants(pictures, person, index, donors, data_dir, cache_dir) if authentic else []
            for number, variant in enumerate([pictures, *variants]):
                place = folder / f"{path.stem}_{index}_{number}.json"
                if not place.exists():
                    place.write_text(json.dumps(eyes.read(_coded(variant, person, index))))
        (folder / f"{path.stem}.done").touch()
        bursts += _read(folder, path.stem, person, authentic)
        logger.info("%s: %d bursts so far", path.name, len(bursts))
    return bursts


def _read(folder: Path, clip: str, person: int, authentic: bool) -> Iterator[BurstOf]:
    for place in sorted(folder.glob(f"{clip}_*_*.json")):
        record = json.loads(place.read_text())
        if record is None:  # the face was not followed well enough
            continue
        index, number = map(int, place.stem.rsplit("_", 2)[1:])
        kind = ("simulated" if number else "authentic") if authentic else "manipulated"
        yield BurstOf(clip, person, index, kind, FaceSeries.restored(record["series"]), record["fused"])


Pictures = Sequence[tuple[int, Image]]
"""Media time in microseconds and picture, in order."""


def _cut(path: Path) -> Iterator[Pictures]:
    """Yield a clip's bursts, evenly apart."""
    with av.open(str(path)) as container:
        length = (container.duration or 0) / 1e6
    whole = max(1, min(MOST_BURSTS, int(length // BURST_S)))
    for begin in np.linspace(0, max(0.0, length - BURST_S), whole) if length > BURST_S else [0.0]:
        pictures = [(us, image) for us, image in _decoded(path) if 0 <= us - begin * 1e6 < BURST_S * 1e6]
        if len(pictures) > 1:
            yield pictures


def _decoded(source: Any) -> Iterator[tuple[int, Image]]:
    with av.open(str(source) if isinstance(source, Path) else source) as container:
        for frame in container.decode(video=0):
            if frame.time is None:
                continue
            scale = min(1.0, LONGEST_SIDE / max(frame.width, frame.height))
            small = frame.reformat(round(frame.width * scale), round(frame.height * scale), format="rgb24")
            yield round(frame.time * 1e6), small.to_ndarray().astype(np.uint8, copy=False)


def _coded(pictures: Pictures, person: int, index: int) -> Pictures:
    """Return the pictures after an encoder, set alike for every variant of a burst."""
    crf = int(np.random.default_rng((SEED, person, index)).integers(*CRF))
    height, width = (side // 2 * 2 for side in pictures[0][1].shape[:2])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream: Any = out.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, (_, image) in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    file.seek(0)
    times = [us for us, _ in pictures]
    return [(us, image) for us, (_, image) in zip(times, _decoded(file), strict=False)]


class _Eyes:
    """Follows the largest face and lets the members read it."""

    def __init__(self, model: LandmarkModel, members: Sequence[Member], ensemble: Ensemble) -> None:
        self._model = model
        self._members = members
        self._ensemble = ensemble
        self._detector = MtcnnDetector(40, 0.9)

    def follow(self, pictures: Pictures) -> Iterator[tuple[int, Image, Mesh | None, Box | None]]:
        """Yield time, picture, mesh, and where the detector looked the largest face's box."""
        region, due = None, -1.0
        for us, image in pictures:
            box = None
            if us >= due:
                due = us + SEED_S * 1e6
                faces = self._detector.detect([image])[0]
                region, box = (region_of(faces[0]), faces[0].box) if faces else (None, None)
            mesh = None if region is None else self._model.look(image, region)
            region = None if mesh is None else mesh.region()
            yield us, image, mesh, box

    def read(self, pictures: Pictures) -> dict[str, Any] | None:
        """Return series and fused logit of a burst, None if its face was not followed."""
        series, crops = FaceSeries(), list[tuple[Image, Box]]()
        for us, image, mesh, box in self.follow(pictures):
            if mesh is not None:
                series.add(us, look_of(mesh, True, None if box is None else ratios(image, mesh.points)))
            if box is not None:
                crops.append((image, box))
        if not crops or len(series.times) < LEAST_FOLLOWED * len(pictures):
            return None
        return {"series": series.state(), "fused": self._fused(crops)}

    def _fused(self, crops: Sequence[tuple[Image, Box]]) -> float:
        logits = {}
        for member in self._members:
            cut = np.stack([crop(image, box, member.policy) for image, box in crops])
            found, _ = member.module(to_tensor(cut, member.policy))
            logits[member.name] = found.detach().numpy()
        each = [
            self._ensemble.fuse({name: float(of[k]) for name, of in logits.items()})
            for k in range(len(crops))
        ]
        return float(self._ensemble.calibration.calibrated(float(np.mean(each))))


class _Donors:
    """The faces of every authentic clip's first seconds, found when first asked for."""

    def __init__(self, clips: Sequence[Path], eyes: _Eyes) -> None:
        self._clips = clips
        self._eyes = eyes
        self._faces: dict[int, list[Face]] = {}

    @property
    def people(self) -> int:
        return len(self._clips)

    def faces(self, person: int) -> list[Face]:
        """The faces of one person, in order; empty if none could be followed."""
        if person not in self._faces:
            found: list[Face] = []
            for _, image, mesh, _ in self._eyes.follow(list(_first(self._clips[person]))):
                if mesh is not None:
                    found.append(face_of(image, mesh)[0])
            self._faces[person] = found
        return self._faces[person]

    def follow(self, pictures: Pictures) -> list[Mesh | None]:
        return [mesh for _, _, mesh, _ in self._eyes.follow(pictures)]


def _first(path: Path) -> Iterator[tuple[int, Image]]:
    for number, item in enumerate(_decoded(path)):
        if number == DONOR_PICTURES:
            return
        yield item


def _variants(
    pictures: Pictures, person: int, index: int, donors: _Donors, data_dir: Path, cache_dir: Path
) -> Iterator[Pictures]:
    """Yield simulated swaps of a burst."""
    meshes = donors.follow(pictures)
    eigenfaces = _eigenfaces(data_dir, cache_dir)
    rng = np.random.default_rng((SEED, person, index, 1))
    others = rng.permutation([other for other in range(donors.people) if other != person])
    for number in range(SWAPS):
        faces = donors.faces(int(others[number % len(others)]))
        if faces:
            yield list(swapped(pictures, meshes, faces, eigenfaces, int(rng.integers(2**31))))


def swapped(
    pictures: Pictures,
    meshes: Sequence[Mesh | None],
    donor: Sequence[Face],
    eigenfaces: Eigenfaces,
    seed: int,
) -> Iterator[tuple[int, Image]]:
    """Yield the pictures with the donor's face in place of theirs; those without a mesh stay as they are.

    The donor's pictures go forth and back, so that none jumps.
    """
    for number, ((us, image), mesh) in enumerate(zip(pictures, meshes, strict=True)):
        if mesh is None:
            yield us, image
            continue
        turn = number % (2 * len(donor))
        face = donor[turn if turn < len(donor) else 2 * len(donor) - 1 - turn]
        target, (x, y) = face_of(image, mesh)
        # one draw for the whole burst: the same generator, mask and colours in every picture
        made = MAKERS[Family.SWAP](target, face, eigenfaces, np.random.default_rng(seed))
        side = target.image.shape[0]
        changed = image.copy()
        changed[y : y + side, x : x + side] = made.fake
        yield us, changed


def face_of(image: Image, mesh: Mesh) -> tuple[Face, tuple[int, int]]:
    """Return the square about a face as the swap simulator takes it, and its corner (x, y) in the picture."""
    region = mesh.region()
    side = max(2, min(round(region.side), *image.shape[:2]))
    x = int(np.clip(round(region.x - side / 2), 0, image.shape[1] - side))
    y = int(np.clip(round(region.y - side / 2), 0, image.shape[0] - side))
    points = np.stack([mesh.irises[0][0], mesh.irises[1][0], *mesh.points[[NOSE, LEFT_MOUTH, RIGHT_MOUTH]]])
    cut = np.ascontiguousarray(image[y : y + side, x : x + side])
    return Face(cut, (points - (x, y)).astype(np.float32)), (x, y)


def _eigenfaces(data_dir: Path, cache_dir: Path) -> Eigenfaces:
    path = cache_dir / "eigenfaces_bursts.npz"
    if not path.exists():
        source = load_source(data_dir, cache_dir, "lfw_faces", held_out=False)
        chosen = np.linspace(0, len(source.points) - 1, min(EIGENFACES_FROM, len(source.points))).astype(int)
        fitted = Eigenfaces.fitted([source.face(int(index)) for index in chosen])
        np.savez(path, mean=fitted.mean, basis=fitted.basis)
    with np.load(path) as saved:
        return Eigenfaces(saved["mean"], saved["basis"])


def people(bursts: Sequence[BurstOf]) -> NDArray[np.int64]:
    """The person of each burst, int64 [N]."""
    return np.array([burst.person for burst in bursts], np.int64)


def labels(bursts: Sequence[BurstOf]) -> NDArray[np.int64]:
    """1 for manipulated, int64 [N]."""
    return np.array([burst.label for burst in bursts], np.int64)
