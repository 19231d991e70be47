"""The shipped members say the same at run time as in their training code: same crop, same logit."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from detectors.crops import crop
from detectors.ensemble import load_ensemble
from detectors.members import Member, list_members, load_member
from detectors.readings import Image
from detectors.reference import portrait
from detectors.training.data import CACHE_PX, resized
from detectors.training.objective import score
from stream.config import Config
from stream.score import run

PARITY = 1e-3
"""Issue of what is shipped: same crop, same logit to this."""

FACE = (170.0, 108.0, 353.0, 331.0)
"""Where MTCNN finds the portrait's face, about."""


def faces(member: Member) -> list[Image]:
    """Crops of a real face as the training data hold them: bright, dark, blurred, mirrored."""
    picture = portrait()
    face = crop(picture, FACE, member.policy.at_size(CACHE_PX))
    return [
        face,
        cv2.convertScaleAbs(face, alpha=0.5),
        np.asarray(cv2.GaussianBlur(face, (0, 0), 2.0), np.uint8),
        np.ascontiguousarray(face[:, ::-1]),
    ]


def settings(tmp_path: Path) -> Config:
    config = Config()
    return config.model_copy(
        update={
            "engines": config.engines.model_copy(update={"cache_dir": str(tmp_path / "cache")}),
        }
    )


def scored(tmp_path: Path, pictures: list[Image]) -> list[dict]:
    """What `unmask score --crops --json` prints."""
    paths = [tmp_path / f"{number}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        cv2.imwrite(str(path), picture[:, :, ::-1])
    out = io.StringIO()
    assert run(settings(tmp_path), paths, crops=True, as_json=True, out=out) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.timeout(300)  # every member is compiled
def test_the_shipped_members_score_and_are_fused_as_in_training(tmp_path: Path) -> None:
    members = [load_member(name) for name in list_members()]
    ensemble = load_ensemble(members)
    pictures = faces(members[0])
    results = scored(tmp_path, pictures)
    for member in members:
        trained = score(member.module, resized(np.stack(pictures), member.policy.size), member.policy)
        found = [result["members"][member.name] for result in results]
        assert np.allclose(found, trained, atol=PARITY, rtol=0), member.name
        assert np.ptp(trained) > 10 * PARITY, "the pictures must tell a right member from a wrong one"
    for result in results:
        fused = ensemble.fuse(result["members"])
        assert result["probability"] == pytest.approx(ensemble.calibration.probability(fused), abs=PARITY)
