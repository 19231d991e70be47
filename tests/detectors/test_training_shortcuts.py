"""Nothing but the manipulation may tell the two halves of a batch apart (SCIENCE C, checks)."""

from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray

from detectors.training.augment import apply, draw
from detectors.training.blends import Face, Family, blend
from detectors.training.data import Faces
from detectors.training.eigenfaces import Eigenfaces
from detectors.training.evaluate import shortcut
from detectors.training.faces import AVERAGE

SIDE = 96
PEOPLE = 60
MOST = 0.55
"""AUC of a logistic regression on file size and mean colour: what SCIENCE C allows."""


@pytest.fixture(scope="module")
def people() -> list[Face]:
    """One portrait under many lights, lenses and sensors, so that sizes and colours differ widely."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)[40:290, 150:400]
    points = (np.array([48, 46]) + 19 * AVERAGE).astype(np.float32)
    rng = np.random.default_rng(3)
    made = []
    for _ in range(PEOPLE):
        small = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        blurred = cv2.GaussianBlur(small, (0, 0), float(rng.uniform(0.3, 1.5)))
        lit = blurred * rng.uniform(0.4, 1.1, 3) + rng.uniform(0, 30, 3)
        seen = np.clip(lit + rng.normal(0, rng.uniform(0, 8), lit.shape), 0, 255).astype(np.uint8)
        made.append(Face(seen, points + rng.normal(0, 1, (5, 2)).astype(np.float32)))
    return made


def as_set(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> Faces:
    images = np.stack([image for pair in pairs for image in pair])
    labels = np.tile([0, 1], len(pairs))
    coded = [cv2.imencode(".jpg", image)[1] for image in images]
    return Faces(
        images=images,
        labels=labels,
        original=np.where(labels == 1, np.arange(len(labels)) - 1, -1),
        identity=np.arange(len(labels)) // 2,
        source_width=np.full(len(labels), SIDE),
        file_bytes=np.array([len(data) for data in coded]),
    )


@pytest.mark.parametrize("family", list(Family))
def test_size_and_colour_tell_nothing_of_a_blend(family: Family, people: list[Face]) -> None:
    eigenfaces = Eigenfaces.fitted(people[:20])
    rng = np.random.default_rng(11)
    pairs = []
    for number, person in enumerate(people):
        made = blend(family, person, people[number - 1], eigenfaces, rng)
        degradation = draw(rng, SIDE, 64, coded=True)
        pairs.append((apply(made.real, degradation), apply(made.fake, degradation)))
    found = shortcut(as_set(pairs))
    assert max(found.values()) <= MOST, found


def test_the_check_finds_a_class_that_was_degraded_alone(people: list[Face]) -> None:
    rng = np.random.default_rng(12)
    pairs = []
    for person in people:
        degradation = draw(rng, SIDE, 64, coded=True)
        real = apply(person.image, degradation)
        pairs.append((real, cv2.GaussianBlur(real, (0, 0), 2.0)))
    assert shortcut(as_set(pairs))["both"] > MOST
