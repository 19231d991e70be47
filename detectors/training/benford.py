"""The forest of the Benford cue: `python -m detectors.training.benford --data DIR --cache DIR`.

Synthetic faces come from the generator in the PyPI package `random-face` (MobileStyleGAN, Apache-2.0), which
OpenVINO runs; authentic ones from LFW and `wide_faces`. A forest would gladly learn who compressed the
pictures instead of who made them, so each synthetic face takes an authentic partner and goes through what
that one went through: a camera's JPEG, a reduction to the partner's face size, a slight turn where the
partner was aligned, a JPEG with the partner's own quantisation tables and chroma subsampling; afterwards both
are cropped, reduced and compressed alike. What is left of the difference in file size, size and colour is
measured beside it, and a forest that is no better is not written.

Everything slow is cached picture by picture: a stopped run goes on where it was.
"""

import argparse
import importlib.util
import io
import json
import logging
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil
from PIL.JpegImagePlugin import get_sampling

from detectors.cues.benford import FEATURES, FOREST, LEAST_PX, MOST_PX, Forest, log_odds, write_forest
from detectors.cues.benford import features as benford_features
from detectors.mtcnn import MtcnnDetector
from detectors.readings import Box, Image
from detectors.training.data import DataError
from detectors.training.metrics import auc, bootstrap_by_identity
from detectors.training.people import FOLDS

logger = logging.getLogger(__name__)

SOURCES = ("lfw_faces", "wide_faces")
ALIGNED = "lfw_faces"
"""Its pictures were turned and scaled so that the eyes are level, which resampled them once more."""

GENERATOR = "random-face"
VERSION = "2021.7.21.1"
INSTALL = f"pip install --no-deps {GENERATOR}=={VERSION}"
"""Without what it depends on: its own code wants an OpenVINO of 2021, and it would bring the desktop OpenCV,
which breaks the headless one. Its two networks are all that is used."""

SYNTHETIC = 800
"""Faces made; a second or two each on two cores."""
KEPT_PX = 512
"""Synthetic faces are kept at this of the generator's 1024: far above every use."""
TRUNCATION = (0.5, 1.0)
"""How far a face may lie from the mean style: the package's own .5, and the variety of all."""
STYLES = 512
"""Styles that the mean is taken of."""

LOOKS = 2
"""Crops of each face, each with another size and quality."""
TURN_DEG = 8.0
CAMERA = (75, 99)
"""Quality of the first JPEG of a synthetic face, as a camera or a site stores it."""
LAST = (70, 99)
"""Quality of the last JPEG of either class; one look in four has none."""
LOSSLESS = 0.25

TREES, LEAVES, PER_LEAF = 200, 128, 4
"""A forest of this size is some 300 kB and is walked in a millisecond; more trees changed nothing in the
literature's setting (100 there)."""
SEED = 7
WEDGE = 0.02
"""Share of black pixels from which on a crop shows the wedge of an aligned picture."""


@dataclass(frozen=True, slots=True)
class Authentic:
    """An authentic picture as its file says: RGB (H, W, 3), quantisation tables and subsampling of its JPEG
    (None: it was none), and whether it was aligned."""

    name: str
    source: str
    image: Image
    tables: dict[int, list[int]] | None
    subsampling: int
    aligned: bool


@dataclass(frozen=True, slots=True)
class Set:
    """Looks: `features` float32 [N, 540], `trivial` float64 [N, T] (what must not separate), `labels` 1 for
    synthetic [N], `pair` a number for a face and its partner [N], `sources` where the partner is from."""

    features: NDArray[np.float32]
    trivial: NDArray[np.float64]
    labels: NDArray[np.int64]
    pair: NDArray[np.int64]
    sources: tuple[str, ...]


def generate(folder: Path, count: int) -> list[Path]:
    """`count` synthetic faces as lossless files in `folder`; those that are there stay. Face k depends on k
    alone. Raises DataError without the package."""
    paths = [folder / f"{index:05d}.png" for index in range(count)]
    wanted = [(index, path) for index, path in enumerate(paths) if not path.exists()]
    if not wanted:
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    style_of, face_of = _networks()
    draws = [np.random.default_rng((SEED, 0, index)).normal(size=(1, 512)) for index in range(STYLES)]
    mean = np.mean([style_of(draw.astype(np.float32)) for draw in draws], axis=0)
    for done, (index, path) in enumerate(wanted):
        rng = np.random.default_rng((SEED, 1, index))
        style = style_of(rng.normal(size=(1, 512)).astype(np.float32))
        picture = face_of(mean + rng.uniform(*TRUNCATION) * (style - mean))
        small = cv2.resize(picture, (KEPT_PX, KEPT_PX), interpolation=cv2.INTER_AREA)
        part = path.with_suffix(".part.png")
        cv2.imwrite(str(part), cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        part.replace(path)
        if done % 50 == 0:
            logger.info("%d of %d synthetic faces", done + 1, len(wanted))
    return paths


def _networks() -> tuple[Any, Any]:
    found = importlib.util.find_spec("random_face")
    if found is None or not found.submodule_search_locations:
        raise DataError(f"the package {GENERATOR} is not installed; {INSTALL}")
    import openvino

    data = Path(found.submodule_search_locations[0]) / "data"
    core = openvino.Core()
    mapping = core.compile_model(data / "MappingNetwork.xml", "CPU")
    synthesis = core.compile_model(data / "SynthesisNetwork.xml", "CPU")

    def style_of(noise: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.array(mapping(noise)[0])

    def face_of(style: NDArray[np.float32]) -> Image:
        values = np.clip(synthesis(style.astype(np.float32))[0][0], -1, 1)
        return np.ascontiguousarray(((values + 1) * 127.5 + 0.5).astype(np.uint8).transpose(1, 2, 0))

    return style_of, face_of


def _files(data_dir: Path) -> Iterator[tuple[str, str, bytes]]:
    """Source, name and content of every authentic picture. Raises DataError for a missing source."""
    for source in SOURCES:
        path = data_dir / f"{source}.tar"
        if not path.exists():
            raise DataError(f"{path}: no such file")
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    yield source, Path(member.name).stem, file.read()


def opened(name: str, source: str, data: bytes) -> Authentic:
    """A picture from its file's bytes. Raises DataError for what is none."""
    try:
        with Pil.open(io.BytesIO(data)) as picture:
            # read before `convert`, which forgets them
            tables = getattr(picture, "quantization", None)
            subsampling = get_sampling(picture) if tables else -1
            image = np.array(picture.convert("RGB"))
    except OSError as error:
        raise DataError(f"{name}: not a picture: {error}") from error
    found = {number: list(table) for number, table in tables.items()} if tables else None
    return Authentic(name, source, image, found, subsampling, source == ALIGNED)


def with_history(made: Image, partner: Authentic, side: int, found: Box, rng: np.random.Generator) -> Image:
    """A synthetic face brought through what its partner went through: uint8 [side, side, 3], as large as the
    partner's face. `made` uint8 [P, P, 3] with the face at `found`.

    A camera's JPEG at full size, the reduction, a turn if the partner was aligned, the partner's own JPEG.
    """
    image = _opened(_encoded(Pil.fromarray(made), quality=int(rng.integers(CAMERA[0], CAMERA[1] + 1))))
    scale = side / _longer(found)
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = np.asarray(cv2.resize(image, size, interpolation=way), np.uint8)
    x0, y0, x1, y1 = (edge * scale for edge in found)
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    if partner.aligned:
        turn = cv2.getRotationMatrix2D(middle, float(rng.uniform(-TURN_DEG, TURN_DEG)), 1.0)
        image = np.asarray(cv2.warpAffine(image, turn, size, borderMode=cv2.BORDER_REFLECT_101), np.uint8)
    if partner.tables is not None:
        # Pillow tells tables in the order in which it takes them
        subsampling = max(0, partner.subsampling)
        image = _opened(_encoded(Pil.fromarray(image), qtables=partner.tables, subsampling=subsampling))
    left = min(max(0, round(middle[0] - side / 2)), size[0] - side)
    top = min(max(0, round(middle[1] - side / 2)), size[1] - side)
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def _opened(data: bytes) -> Image:
    return np.array(Pil.open(io.BytesIO(data)).convert("RGB"))


def _longer(box: Box) -> float:
    return max(box[2] - box[0], box[3] - box[1])


def _encoded(picture: Pil.Image, **settings: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", **settings)
    return out.getvalue()


@dataclass(frozen=True, slots=True)
class Treatment:
    """What a look at either of a pair goes through at the end: the side of its crop and the quality of its
    JPEG, None for none."""

    side: int
    quality: int | None

    @classmethod
    def drawn(cls, rng: np.random.Generator, most: int) -> "Treatment":
        """`most`: the side of both faces; nothing is enlarged."""
        side = int(rng.integers(LEAST_PX, min(most, MOST_PX) + 1))
        quality = None if rng.random() < LOSSLESS else int(rng.integers(LAST[0], LAST[1] + 1))
        return cls(side // 8 * 8, quality)

    def apply(self, face: Image) -> tuple[NDArray[np.uint8], list[float]]:
        """The grey face [side, side], and what must not tell the classes apart (TRIVIAL)."""
        way = cv2.INTER_AREA if self.side < len(face) else cv2.INTER_LINEAR
        small = np.asarray(cv2.resize(face, (self.side, self.side), interpolation=way), np.uint8)
        encoded = _encoded(Pil.fromarray(small), quality=self.quality or 100)
        if self.quality is not None:
            small = np.array(Pil.open(io.BytesIO(encoded)).convert("RGB"))
        grey = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)
        return grey, [len(encoded), *small.mean((0, 1)).tolist(), self.side, self.quality or 0]


TRIVIAL = ("file bytes", "mean red", "mean green", "mean blue", "side", "quality")


def face_in(image: Image, detector: MtcnnDetector) -> Box | None:
    """The largest face's box; None where there is none, it is too small, or its square (`square_of`) reaches
    beyond the picture."""
    faces = detector.detect([image])[0]
    if not faces:
        return None
    x0, y0, x1, y1 = faces[0].box
    left, top, side = _square(faces[0].box)
    inside = min(left, top) >= 0 and left + side <= image.shape[1] and top + side <= image.shape[0]
    return (x0, y0, x1, y1) if inside and side >= LEAST_PX else None


def square_of(image: Image, box: Box) -> Image:
    """The square about a box, as `detectors.cues.benford.grey_face` frames it."""
    left, top, side = _square(box)
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def _square(box: Box) -> tuple[int, int, int]:
    """Left, top and side in whole pixels."""
    side = int(_longer(box))
    return round((box[0] + box[2] - side) / 2), round((box[1] + box[3] - side) / 2), side


def collect(data_dir: Path, cache_dir: Path, synthetic: int) -> Set:
    """The looks at every pair; features are cached pair by pair."""
    faces = generate(cache_dir / "synthetic", synthetic)
    partners = _partners(data_dir, len(faces))
    folder = cache_dir / f"benford_{LOOKS}"
    folder.mkdir(parents=True, exist_ok=True)
    detector = MtcnnDetector(40, 0.9)
    found: list[tuple[int, str, NDArray[np.float64]]] = []
    for index, (path, partner) in enumerate(zip(faces, partners, strict=True)):
        cached = folder / f"{index:05d}_{partner.name}.npy"
        if not cached.exists():
            np.save(cached, _pair(path, partner, detector, index))
        rows = np.load(cached)
        if len(rows):
            found.append((index, partner.source, rows))
        if index % 100 == 0:
            logger.info("%d of %d pairs", index + 1, len(faces))
    if len(found) < 2 * FOLDS:
        raise DataError(f"{len(found)} pairs have a face in both pictures, expected at least {2 * FOLDS}")
    rows = np.concatenate([rows for _, _, rows in found])
    repeats = [len(rows) for _, _, rows in found]
    sources = np.repeat([source for _, source, _ in found], repeats)
    return Set(
        features=rows[:, 1 + len(TRIVIAL) :].astype(np.float32),
        trivial=rows[:, 1 : 1 + len(TRIVIAL)],
        labels=rows[:, 0].astype(np.int64),
        pair=np.repeat([index for index, _, _ in found], repeats).astype(np.int64),
        sources=tuple(sources.tolist()),
    )


def _partners(data_dir: Path, count: int) -> list[Authentic]:
    """As many authentic pictures, drawn from all sources, each once at most."""
    files = list(_files(data_dir))
    if len(files) < count:
        raise DataError(f"{len(files)} authentic pictures, expected {count}, one for each synthetic face")
    order = np.random.default_rng((SEED, 2)).permutation(len(files))[:count]
    return [opened(name, source, data) for source, name, data in (files[int(index)] for index in order)]


def _pair(path: Path, partner: Authentic, detector: MtcnnDetector, index: int) -> NDArray[np.float64]:
    """Rows of label, TRIVIAL and features of both of a pair; none where a face is missing."""
    rng = np.random.default_rng((SEED, 3, index))
    picture = cv2.imread(str(path))
    if picture is None:
        raise DataError(f"{path}: not a picture; delete it")
    made = np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
    found, box = face_in(made, detector), face_in(partner.image, detector)
    if found is None or box is None:
        return np.zeros((0, 1 + len(TRIVIAL) + FEATURES))
    real = square_of(partner.image, box)
    if (real.max(axis=2) < 4).mean() > WEDGE:
        return np.zeros((0, 1 + len(TRIVIAL) + FEATURES))
    fake = with_history(made, partner, len(real), found, rng)
    rows = []
    for _ in range(LOOKS):
        treatment = Treatment.drawn(rng, len(real))
        for label, crop in enumerate((real, fake)):
            grey, trivial = treatment.apply(crop)
            rows.append(np.concatenate([[label], trivial, benford_features(grey)]))
    return np.stack(rows)


def fit(features: NDArray[np.float32], labels: NDArray[np.int64], trees: int = TREES) -> Any:
    """A random forest (scikit-learn) over float32 [N, 540]. Raises DataError without the package."""
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError as error:
        raise DataError("scikit-learn is not installed; pip install 'unmask[train]'") from error
    forest = RandomForestClassifier(
        trees, max_leaf_nodes=LEAVES, min_samples_leaf=PER_LEAF, random_state=SEED, n_jobs=1
    )
    return forest.fit(features, labels)


def exported(forest: Any, record: dict[str, Any]) -> Forest:
    """A scikit-learn forest of two classes as the arrays that numpy walks; values are shares of class 1."""
    parts: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("feature", "threshold", "left", "right", "value")
    }
    roots, start = [], 0
    for tree in (estimator.tree_ for estimator in forest.estimators_):
        inner = tree.children_left >= 0
        counts = tree.value[:, 0, :]
        parts["feature"].append(np.where(inner, tree.feature, -1).astype(np.int32))
        # rounded down: scikit-learn compares float32 features with float64 thresholds
        threshold = _down(np.where(inner, tree.threshold, 0.0))
        parts["threshold"].append(threshold)
        parts["left"].append(np.where(inner, tree.children_left + start, -1).astype(np.int32))
        parts["right"].append(np.where(inner, tree.children_right + start, -1).astype(np.int32))
        parts["value"].append((counts[:, 1] / counts.sum(1)).astype(np.float32))
        roots.append(start)
        start += tree.node_count
    arrays = {name: np.concatenate(pieces) for name, pieces in parts.items()}
    return Forest(**arrays, roots=np.array(roots, np.int32), record=record)


def _down(thresholds: NDArray[np.float64]) -> NDArray[np.float32]:
    """The largest float32 that is not above: for float32 x, x <= t holds for both or for neither."""
    near = thresholds.astype(np.float32)
    above = near.astype(np.float64) > thresholds
    return np.where(above, np.nextafter(near, np.float32(-np.inf)), near).astype(np.float32)


def examined(found: Set, trees: int = TREES) -> dict[str, Any]:
    """Cross-fitted figures: five folds by pair, so that a face, its looks and its partner are in one."""
    fold = np.random.default_rng((SEED, 4)).permutation(int(found.pair.max()) + 1)[found.pair] % FOLDS
    scores = np.zeros(len(found.labels))
    trivial = np.zeros(len(found.labels))
    alone = {name: auc(found.trivial[:, k], found.labels) for k, name in enumerate(TRIVIAL)}
    for k in range(FOLDS):
        train, held = fold != k, fold == k
        forest = exported(fit(found.features[train], found.labels[train], trees), {})
        scores[held] = log_odds(forest, found.features[held])
        trivial[held] = _linear(found.trivial[train], found.labels[train], found.trivial[held])
    sources = np.array(found.sources)

    def against(source: str) -> dict[str, Any]:
        rows = sources == source
        return _with_interval("auc", scores[rows], found.labels[rows], found.pair[rows])

    limit = float(np.quantile(scores[found.labels == 0], 0.98))
    return {
        "pairs": len(np.unique(found.pair)),
        "looks": len(found.labels),
        **_with_interval("auc", scores, found.labels, found.pair),
        "by_source": {source: against(source) for source in SOURCES if (sources == source).any()},
        "recall_at_2_percent_false": float((scores[found.labels == 1] > limit).mean()),
        "trivial": {
            **_with_interval("auc", trivial, found.labels, found.pair),
            "alone": {name: max(value, 1 - value) for name, value in alone.items()},
        },
        "generator": f"{GENERATOR} {VERSION}",
        "sources": list(SOURCES),
    }


def _with_interval(
    name: str, scores: NDArray[np.float64], labels: NDArray[np.int64], pair: NDArray[np.int64]
) -> dict[str, Any]:
    low, high = bootstrap_by_identity(lambda rows: auc(scores[rows], labels[rows]), pair, draws=300)
    return {name: auc(scores, labels), "interval": [low, high]}


def _linear(
    train: NDArray[np.float64], labels: NDArray[np.int64], held: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A linear classifier of standardised numbers and their squares, by least squares."""
    mean, spread = train.mean(0), train.std(0) + 1e-9

    def lifted(x: NDArray[np.float64]) -> NDArray[np.float64]:
        z = (x - mean) / spread
        return np.concatenate([z, z**2, np.ones((len(z), 1))], axis=1)

    x = lifted(train)
    solved = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (2.0 * labels - 1))
    scored: NDArray[np.float64] = lifted(held) @ solved
    return scored


def told(record: dict[str, Any]) -> list[str]:
    """The figures as a table of Markdown."""

    def row(name: str, figures: dict[str, Any]) -> str:
        low, high = figures["interval"]
        return f"| {name} | {figures['auc']:.3f} ({low:.3f}-{high:.3f}) |"

    return [
        f"{record['pairs']} pairs, {record['looks']} looks, five folds by pair; 95 % intervals over pairs.",
        "",
        "| | AUC |",
        "|---|---|",
        row("Benford features, forest", record),
        *(row(f"against {source}", figures) for source, figures in record["by_source"].items()),
        row("file size, colour, size and quality alone", record["trivial"]),
        "",
        f"Recall at 2 % false positives: {record['recall_at_2_percent_false']:.2f}.",
    ]


def worth(record: dict[str, Any]) -> bool:
    """Whether the forest tells generated faces beyond chance, and beyond what file size and colour tell."""
    return bool(record["interval"][0] > max(0.5, record["trivial"]["auc"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect, examine, fit on everything, write the forest if it is worth it; else exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of lfw_faces.tar and wide_faces.tar")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is slow to make")
    parser.add_argument("--synthetic", type=int, default=SYNTHETIC, help="synthetic faces")
    parser.add_argument("--out", type=Path, default=FOREST, help="where the forest is written")
    given = parser.parse_args(arguments)
    found = collect(given.data, given.cache, given.synthetic)
    record = examined(found)
    print("\n".join(told(record)))
    print(json.dumps(record), file=sys.stderr)
    if not worth(record):
        sys.exit("not written: its AUC is not beyond chance and beyond what file size and colour alone reach")
    write_forest(given.out, exported(fit(found.features, found.labels), record))


if __name__ == "__main__":
    main()
