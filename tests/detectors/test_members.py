"""Loading members, refusing tampered ones, scoring crops; and the shipped member itself."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from detectors.backbones import Architecture, FaceNetwork
from detectors.calibration import Calibration, CalibrationKind, Scale
from detectors.crops import CropKind, CropPolicy, Resampling, fit
from detectors.ensemble import load_ensemble
from detectors.members import (
    DEFAULT_MEMBER,
    MemberError,
    MisshapenWeightsError,
    TamperedWeightsError,
    UnknownMemberError,
    crop_logits,
    list_members,
    load_member,
    score_crop,
    score_crops,
)
from detectors.readings import Image
from detectors.registry import file_sha256
from detectors.training.export import export_member

ARCHITECTURE = Architecture("test_efficientnet", attention_block=1)
POLICY = CropPolicy(CropKind.TIGHT, size=32, side=0.8)


@dataclass(frozen=True)
class Tiny:
    """What the export reads of a recipe."""

    name: str = "tiny"
    version: str = "3"
    crop: CropPolicy = POLICY
    built: Architecture = ARCHITECTURE

    def architecture(self) -> Architecture:
        return self.built


CALIBRATION = Calibration(CalibrationKind.SHIPPED, (Scale(1, 2.0, -0.5),), tau=0.5, sigma=0.5, data="made up")


def export(directory: Path, tensors: dict[str, torch.Tensor], tiny: Tiny) -> None:
    facts = {"licence": "Apache-2.0"}
    export_member(directory, tensors, tiny, CALIBRATION, facts)  # type: ignore[arg-type]


@pytest.fixture
def network() -> FaceNetwork:
    torch.manual_seed(2)
    return FaceNetwork(ARCHITECTURE).eval()


@pytest.fixture
def directory(tmp_path: Path, network: FaceNetwork) -> Path:
    export(tmp_path / "tiny", network.state_dict(), Tiny())
    return tmp_path / "tiny"


def faces(count: int, size: int = 40) -> list[Image]:
    rng = np.random.default_rng(3)
    return [rng.integers(256, size=(size, size, 3), dtype=np.uint8) for _ in range(count)]


def rewrite(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Changes tensors and makes the recorded hash fit, so that only the shapes are wrong."""
    path = directory / "weights.safetensors"
    tensors = load_file(path)
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)
    record = json.loads((directory / "member.json").read_text()) | {"sha256": file_sha256(path)}
    (directory / "member.json").write_text(json.dumps(record))


def test_comes_back_as_it_was_written(directory: Path, network: FaceNetwork) -> None:
    member = load_member(directory)
    assert (member.name, member.version, member.licence) == ("tiny", "3", "Apache-2.0")
    assert member.policy == POLICY
    assert member.sha256 == file_sha256(directory / "weights.safetensors")
    assert member.calibration.kind is CalibrationKind.SHIPPED
    assert not member.module.training
    batch = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(member.module(batch)[0], network(batch)[0], atol=1e-2, rtol=1e-2)


def test_weights_are_half_as_wide_on_disk_and_float32_in_memory(directory: Path) -> None:
    stored = load_file(directory / "weights.safetensors")
    assert {t.dtype for t in stored.values() if t.ndim > 1} == {torch.float16}
    assert stored["net.bn1.running_var"].dtype == torch.float32
    assert {p.dtype for p in load_member(directory).module.parameters()} == {torch.float32}


def test_one_flipped_bit_is_refused_with_both_hashes(directory: Path) -> None:
    path = directory / "weights.safetensors"
    expected = file_sha256(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(TamperedWeightsError) as caught:
        load_member(directory)
    assert caught.value.expected == expected
    assert caught.value.found == file_sha256(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_missing_weights_are_refused(directory: Path) -> None:
    (directory / "weights.safetensors").unlink()
    with pytest.raises(MemberError, match=r"weights\.safetensors"):
        load_member(directory)


def test_tensors_that_do_not_fit_are_named(directory: Path) -> None:
    rewrite(
        directory,
        {"attention.conv.bias": None, "stray": torch.zeros(1), "net.classifier.weight": torch.zeros(2, 7)},
    )
    with pytest.raises(MisshapenWeightsError) as caught:
        load_member(directory)
    assert caught.value.missing == ["attention.conv.bias"]
    assert caught.value.unexpected == ["stray"]
    assert "net.classifier.weight (2, 7)" in str(caught.value)


def test_numbers_that_are_not_finite_are_refused_by_name(directory: Path) -> None:
    rewrite(directory, {"attention.conv.bias": torch.tensor([float("nan")])})
    with pytest.raises(MemberError, match=r"attention\.conv\.bias"):
        load_member(directory)


def test_garbage_with_the_right_hash_is_refused(directory: Path) -> None:
    path = directory / "weights.safetensors"
    path.write_bytes(b"no tensors here")
    record = json.loads((directory / "member.json").read_text()) | {"sha256": file_sha256(path)}
    (directory / "member.json").write_text(json.dumps(record))
    with pytest.raises(MemberError, match="not a safetensors file"):
        load_member(directory)


def test_a_broken_record_is_refused(directory: Path) -> None:
    (directory / "member.json").write_text("{}")
    with pytest.raises(MemberError, match="schema 1"):
        load_member(directory)


def test_a_record_without_crop_policy_is_refused(directory: Path) -> None:
    record = json.loads((directory / "member.json").read_text())
    del record["crop"]
    (directory / "member.json").write_text(json.dumps(record))
    with pytest.raises(MemberError, match="crop"):
        load_member(directory)


def test_a_record_of_a_network_that_cannot_be_built_is_refused(directory: Path) -> None:
    record = json.loads((directory / "member.json").read_text())
    record["architecture"]["backbone"] = "resnet18"
    (directory / "member.json").write_text(json.dumps(record))
    with pytest.raises(
        MemberError, match=r"member\.json: .*'resnet18' is a ResNet: expected an EfficientNet"
    ):
        load_member(directory)


def test_an_unknown_name_lists_those_known() -> None:
    with pytest.raises(UnknownMemberError, match=r"'nobody'.*one of: .*"):
        load_member("nobody")


def test_without_a_calibration_the_member_says_so(directory: Path) -> None:
    (directory / "calibration.json").unlink()
    assert load_member(directory).calibration.kind is CalibrationKind.NONE


def test_a_member_without_attention_and_with_a_siamese_head_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(2)
    siamese = Architecture("test_efficientnet", attention_block=None, siamese=True)
    tensors = FaceNetwork(siamese).state_dict()
    export(tmp_path / "tiny", tensors, Tiny(built=siamese))
    module = load_member(tmp_path / "tiny").module
    torch.testing.assert_close(
        module.state_dict()["head.1.weight"], tensors["head.1.weight"], atol=1e-4, rtol=0
    )


def test_a_recorded_resampling_is_the_one_that_scores(directory: Path) -> None:
    member = load_member(directory)
    other = replace(member, policy=replace(member.policy, resampling=Resampling.PIL_BILINEAR))
    images = faces(2, size=90)
    expected = [fit(image, 32, Resampling.PIL_BILINEAR) for image in images]
    assert crop_logits(images, other) == pytest.approx(crop_logits(expected, member), abs=1e-5)
    assert crop_logits(images, other) != pytest.approx(crop_logits(images, member), abs=1e-5)


def test_scores_carry_the_calibration(directory: Path) -> None:
    member = load_member(directory)
    image = faces(1)[0]
    scored = score_crop(image, member)
    assert scored.logit == pytest.approx(float(crop_logits([image], member)[0]))
    assert scored.probability == pytest.approx(CALIBRATION.probability(scored.logit))
    assert scored.interval == pytest.approx(CALIBRATION.interval(scored.logit))


def test_a_batch_scores_as_its_faces_do_one_by_one(directory: Path) -> None:
    member = load_member(directory)
    images = [*faces(33), *faces(2, size=70)]
    together = [scored.logit for scored in score_crops(images, member)]
    alone = [score_crop(image, member).logit for image in images]
    assert together == pytest.approx(alone, abs=1e-4)
    assert score_crops([], member) == []


def test_the_shipped_members_are_one_ensemble_and_small_enough_to_ship() -> None:
    assert DEFAULT_MEMBER in list_members()
    members = [load_member(name) for name in list_members()]
    house = Path(__file__).parents[2]
    shipped = house / "detectors" / "weights"
    for member in members:
        assert member.calibration.kind is CalibrationKind.SHIPPED
        weights = shipped / member.name / "weights.safetensors"
        assert weights.stat().st_size < 10_000_000
        assert member.sha256 in (house / member.record["card"]).read_text()
    assert sum(path.stat().st_size for path in shipped.rglob("*.safetensors")) < 40e6
    assert load_ensemble(members).calibration.kind is CalibrationKind.SHIPPED


def test_the_shipped_member_does_not_accuse_an_authentic_portrait() -> None:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    scored = score_crop(np.ascontiguousarray(picture[95:255, 190:350]))
    assert scored.interval[0] < 0.5
