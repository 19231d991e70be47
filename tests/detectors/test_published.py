"""The published networks: complete loading, parity with the public package, and what is refused."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import detectors.published
from detectors.backbones import FaceNetwork
from detectors.calibration import CalibrationKind
from detectors.members import (
    MemberError,
    MisshapenWeightsError,
    TamperedWeightsError,
    UnknownMemberError,
    crop_logits,
    load_member,
)
from detectors.published import (
    ARCHITECTURES,
    PAPER_CROP,
    build,
    layout_of,
    load_checkpoint,
    load_published,
)
from detectors.registry import PUBLISHED, RegistryError, file_sha256
from tests.detectors.reference_nets import REFERENCES, ReferenceXception, checkpoint, randomise, settle

LAYOUTS = list(ARCHITECTURES)
COUNTS = {
    "EfficientNetB4": 706,
    "EfficientNetB4ST": 713,
    "EfficientNetAutoAttB4": 708,
    "EfficientNetAutoAttB4ST": 715,
    "Xception": 276,
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def faces() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def saved(folder: Path, tensors: object, name: str = "net.pth") -> Path:
    torch.save(tensors, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def b4st(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    tensors = checkpoint("EfficientNetB4ST")
    return tensors, saved(tmp_path_factory.mktemp("b4st"), tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_used_and_every_parameter_filled(layout: str, tmp_path: Path) -> None:
    tensors = checkpoint(layout)
    assert len(tensors) == COUNTS[layout]
    network, _, found = load_checkpoint(layout, saved(tmp_path, tensors))
    filled = network.state_dict()
    assert set(found.names) | set(found.unused) == set(tensors)
    assert sorted(found.names.values()) == sorted(filled)
    for theirs, ours in found.names.items():
        assert torch.equal(filled[ours], tensors[theirs]), theirs


def test_what_no_forward_pass_reads_is_the_triplet_stages_classifier_alone() -> None:
    leftovers = {"feat_ext.classifier.weight": (1, 1792), "feat_ext.classifier.bias": (1,)}
    assert {name: dict(layout_of(build(name)).unused) for name in LAYOUTS} == {
        name: leftovers if name.endswith("ST") else {} for name in LAYOUTS
    }


@pytest.mark.parametrize("layout", list(REFERENCES))
def test_efficientnets_agree_with_the_public_package(layout: str, tmp_path: Path, faces: Tensor) -> None:
    reference = REFERENCES[layout]()
    reference.load_state_dict(randomise(reference.state_dict(), seed=3))
    settle(reference, faces, seed=4)
    tensors = reference.state_dict()
    save_file(tensors, tmp_path / "net.safetensors")
    network, _, _ = load_checkpoint(layout, tmp_path / "net.safetensors")
    with torch.no_grad():
        features, attention = reference.read(faces)
        expected = reference.classifier(features)[:, 0]
        logits, heat = network(faces)
        ours = network.features(faces)
    assert ours.shape == (2, 1792)
    assert (features[0] - features[1]).abs().max() > 100 * TOLERANCE  # the faces tell apart
    assert (expected[0] - expected[1]).abs() > 100 * TOLERANCE
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours, features, atol=TOLERANCE, rtol=0)
    if attention is None:
        assert heat.shape == (2, 7, 7)
        return
    assert attention.std() > 100 * TOLERANCE
    assert heat.shape == (2, 28, 28)
    torch.testing.assert_close(heat, attention, atol=TOLERANCE, rtol=0)


def test_xception_agrees_with_the_paper_worked_out_by_hand(tmp_path: Path, faces: Tensor) -> None:
    tensors = checkpoint("Xception")
    reference = ReferenceXception(tensors)
    network, _, _ = load_checkpoint("Xception", saved(tmp_path, tensors))
    with torch.no_grad():
        logits, heat = network(faces)
        ours, features, expected = network.features(faces), reference.features(faces), reference(faces)
    assert (features[0] - features[1]).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(ours, features, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert heat.shape == (2, 7, 7)


def test_tensors_that_do_not_fit_are_named_as_the_checkpoint_names_them(
    b4st: tuple[dict[str, Tensor], Path], tmp_path: Path
) -> None:
    tensors = dict(b4st[0])
    del tensors["feat_ext.efficientnet._blocks.31._se_expand.bias"]
    tensors["stray"] = torch.zeros(1)
    tensors["feat_ext.classifier.weight"] = torch.zeros(1, 1000)
    tensors["classifier.0.num_batches_tracked"] = torch.tensor(1.0)
    with pytest.raises(MisshapenWeightsError) as caught:
        load_checkpoint("EfficientNetB4ST", saved(tmp_path, tensors))
    assert caught.value.missing == ["feat_ext.efficientnet._blocks.31._se_expand.bias"]
    assert caught.value.unexpected == ["stray"]
    assert caught.value.misshapen == [
        "classifier.0.num_batches_tracked () instead of () of integers",
        "feat_ext.classifier.weight (1, 1000) instead of (1, 1792)",
    ]


def test_a_checkpoint_of_another_network_is_refused(b4st: tuple[dict[str, Tensor], Path]) -> None:
    with pytest.raises(MisshapenWeightsError, match=r"missing: feat_ext.efficientnet.attconv.bias"):
        load_checkpoint("EfficientNetAutoAttB4ST", b4st[1])


def test_a_truncated_checkpoint_is_refused(b4st: tuple[dict[str, Tensor], Path], tmp_path: Path) -> None:
    short = tmp_path / "short.pth"
    short.write_bytes(b4st[1].read_bytes()[:100_000])
    with pytest.raises(MemberError, match=r"short\.pth: truncated, or no PyTorch checkpoint"):
        load_checkpoint("EfficientNetB4ST", short)


class Bomb:
    """Unpickled without care, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(tmp_path: Path, protocol: int | None) -> None:
    trace, path = tmp_path / "trace", tmp_path / "bomb.pth"
    if protocol is None:
        torch.save({"classifier.weight": torch.zeros(1), "bomb": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace), protocol))
    what = "it is no pickle of tensors alone" if protocol == 4 else r"it would run \w+\.mkdir"
    with pytest.raises(MemberError, match=rf"bomb\.pth: refused: {what}; expected a bare state dict"):
        load_checkpoint("EfficientNetB4", path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"epoch": 3, "net": {}}, "'epoch' is a int"),
        ({3: torch.zeros(1)}, "3 is a Tensor"),
    ],
)
def test_what_is_no_bare_state_dict_is_refused(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(MemberError, match=rf"{said}; expected a bare state dict"):
        load_checkpoint("EfficientNetB4", saved(tmp_path, content))


def test_a_file_far_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.pth"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(MemberError, match=r"huge\.pth: 1099511627776 bytes; expected at most"):
        load_checkpoint("EfficientNetB4", path)


def test_an_unknown_layout_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(MemberError, match=r"'B9'.*EfficientNetAutoAttB4ST"):
        load_checkpoint("B9", tmp_path / "net.pth")


def test_a_published_network_is_a_member_without_calibration(
    b4st: tuple[dict[str, Tensor], Path],
) -> None:
    member = load_published("EfficientNetB4ST_FFPP", b4st[1])
    assert member.name == "published:EfficientNetB4ST_FFPP"
    assert member.sha256 == file_sha256(b4st[1])
    assert member.calibration.kind is CalibrationKind.NONE
    assert member.policy == PAPER_CROP
    assert member.record["unused_tensors"] == ["feat_ext.classifier.bias", "feat_ext.classifier.weight"]
    assert not member.module.training
    assert isinstance(member.module, FaceNetwork)
    image = torch.arange(50 * 60 * 3).reshape(50, 60, 3).numpy().astype("uint8")
    assert crop_logits([image], member).shape == (1,)


def test_it_is_read_from_the_cache_by_name_and_hash(
    b4st: tuple[dict[str, Tensor], Path], tmp_path: Path
) -> None:
    name = "EfficientNetB4ST_DFDC"
    path = PUBLISHED[name].path(tmp_path)
    with pytest.raises(UnknownMemberError, match=rf"unmask models pull {name}"):
        load_member(f"published:{name}", tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b4st[1].read_bytes())
    with pytest.raises(TamperedWeightsError) as caught:
        load_member(f"published:{name}", tmp_path)
    assert caught.value.expected == PUBLISHED[name].sha256
    with pytest.raises(UnknownMemberError, match="EfficientNetB9"):
        load_member("published:EfficientNetB9_DFDC", tmp_path)


def test_an_unknown_name_is_refused(b4st: tuple[dict[str, Tensor], Path]) -> None:
    with pytest.raises(RegistryError, match="Xception_FFPP"):
        load_published("EfficientNetB4ST", b4st[1])


def test_the_mapping_written_down_is_the_one_used() -> None:
    written = detectors.published.__doc__ or ""
    found = layout_of(build("EfficientNetAutoAttB4ST"))
    for start in ("feat_ext.efficientnet", "feat_ext.classifier"):
        assert f"`{start}.*`" in written
    assert {name.split(".")[0] for name in found.names} == {"feat_ext", "classifier"}
    assert found.names["feat_ext.efficientnet.attconv.bias"] == "attention.conv.bias"
    assert found.names["classifier.1.weight"] == "head.1.weight"
    assert found.names["feat_ext.efficientnet._blocks.2._bn0.weight"] == "net.blocks.1.0.bn1.weight"
