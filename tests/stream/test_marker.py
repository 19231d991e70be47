"""The member `marker`: what it sees, and that it costs nothing to load."""

import subprocess
import sys

import numpy as np
import pytest

from stream.assemble import build_reader
from stream.config import Config, Members
from stream.errors import Code, UnmaskError
from stream.marker import GREEN, HEIGHT, RED, WIDTH, MarkerReader, draw

LOAD = """
import sys
from stream import worker
from stream.assemble import build_reader
from stream.config import Config, Members
build_reader(Config(members=Members(names=("marker",))))
sys.exit("torch" in sys.modules)
"""


@pytest.mark.parametrize(("colour", "logits"), [(RED, [6.0]), (GREEN, [-6.0]), (None, [])])
@pytest.mark.parametrize("scale", [1, 3])
def test_the_colour_of_the_square_is_the_truth(
    colour: tuple[int, int, int] | None, logits: list[float], scale: int
) -> None:
    picture = np.repeat(np.repeat(draw(7, colour), scale, axis=0), scale, axis=1)
    assert picture.shape == (HEIGHT * scale, WIDTH * scale, 3)
    (faces,) = MarkerReader().read([(picture, picture)])
    assert [face.fused for face in faces] == logits
    assert all(face.crop.shape == (64 * scale, 64 * scale, 3) for face in faces)


def test_a_crop_is_a_whole_square() -> None:
    crops = [np.full((40, 30, 3), colour, np.uint8) for colour in (RED, GREEN)]
    assert [face.fused for face in MarkerReader().read_crops(crops)] == [6.0, -6.0]


def test_its_alerts_name_it() -> None:
    parts = build_reader(Config(members=Members(names=("marker",))))
    assert [model.name for model in parts.provenance.models] == ["marker"]
    assert parts.calibration.kind == parts.provenance.calibration


def test_it_judges_alone() -> None:
    with pytest.raises(UnmaskError, match="must be the only one") as caught:
        build_reader(Config(members=Members(names=("marker", "lite0"))))
    assert caught.value.code is Code.CONFIG


def test_a_worker_with_it_never_loads_torch() -> None:
    assert subprocess.run([sys.executable, "-c", LOAD], check=False).returncode == 0
