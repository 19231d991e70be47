"""Settings become a reader that works, or one sentence says what is wrong with the weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from detectors.backbones import Architecture, FaceNetwork
from detectors.calibration import Calibration, CalibrationKind, Scale
from detectors.crops import CropKind, CropPolicy, crop
from detectors.mtcnn import MtcnnDetector
from detectors.occlusion import POLICY
from detectors.reader import Role
from detectors.readings import Reason, Visible
from detectors.reference import portrait, reference_face
from detectors.registry import file_sha256
from engines import engine
from engines.engine import Engine, Network
from stream import networks
from stream.assemble import build_reader, data_folder, open_log
from stream.clock import FakeClock
from stream.config import Config, Engines, Members, QualityGate
from stream.errors import Code, UnmaskError
from stream.log import TopicPartition, TopicSpec
from stream.networks import load_cast
from stream.records import OutRecord

CALIBRATION = Calibration(CalibrationKind.SHIPPED, (Scale(1, 2.0, -0.5),), tau=0.5, sigma=0.5, data="made up")
TIGHT = CropPolicy(CropKind.TIGHT, size=32, side=0.8)
SQUARE = CropPolicy(CropKind.MARGIN_SQUARE, size=48, side=0.2, top=0.4)


def make(
    folder: Path, name: str, policy: CropPolicy = TIGHT, seed: int = 2, half: Visible | None = None
) -> Path:
    """Write a member with random weights."""
    architecture = Architecture("test_efficientnet", attention_block=1, half=half)
    torch.manual_seed(seed)
    directory = folder / name
    directory.mkdir()
    save_file(FaceNetwork(architecture).eval().state_dict(), directory / "weights.safetensors")
    record = {
        "schema": 1,
        "name": name,
        "version": "1",
        "architecture": architecture.to_json(),
        "crop": policy.to_json(),
        "sha256": file_sha256(directory / "weights.safetensors"),
        "licence": "Apache-2.0",
        "tested_for": ["swaps"] if seed == 2 else [],
        "not_tested_for": ["swaps", "stills"],
    }
    (directory / "member.json").write_text(json.dumps(record))
    (directory / "calibration.json").write_text(json.dumps(CALIBRATION.to_json()))
    return directory


def settings(
    *members: Path | str,
    shadow: tuple[Path | str, ...] = (),
    heavy: tuple[Path | str, ...] = (),
    half: tuple[Path | str, ...] = (),
    deterministic: bool = False,
) -> Config:
    named = Members(
        names=tuple(map(str, members)),
        shadow=tuple(map(str, shadow)),
        heavy=tuple(map(str, heavy)),
        half=tuple(map(str, half)),
    )
    return Config(engines=Engines(order=("eager",)), members=named, deterministic=deterministic)


def test_a_reader_with_two_members_reads_a_real_face(tmp_path: Path) -> None:
    parts = build_reader(settings(make(tmp_path, "one"), make(tmp_path, "two", SQUARE, seed=3)))
    picture = portrait()
    ((face,),) = parts.reader.read([(picture, picture)])
    assert set(face.logits) == {"one", "two"}
    assert face.fused == pytest.approx(sum(logit / 2 - 0.5 for logit in face.logits.values()) / 2)
    assert [model.name for model in parts.provenance.models] == ["one", "two"]
    assert parts.provenance.calibration == parts.calibration.kind == CalibrationKind.NONE
    assert (parts.provenance.tested_for, parts.provenance.not_tested_for) == (("swaps",), ("stills",))
    assert (parts.reader.engine, parts.reader.precision) == ("eager", "fp32")
    assert parts.heavy is None
    assert [(used.name, used.faces) for used in parts.usage()] == [("one", 1), ("two", 1)]


def test_a_member_alone_has_its_own_calibration(tmp_path: Path) -> None:
    parts = build_reader(settings(make(tmp_path, "one")))
    assert parts.calibration.scales == CALIBRATION.scales
    assert parts.provenance.calibration == CalibrationKind.SHIPPED


def test_a_shadow_changes_nothing_but_what_is_recorded(tmp_path: Path) -> None:
    one, two = make(tmp_path, "one"), make(tmp_path, "two", SQUARE, seed=3)
    picture = portrait()
    alone = build_reader(settings(one))
    beside = build_reader(settings(one, shadow=(two,)))
    ((mine,),) = alone.reader.read([(picture, picture)])
    ((theirs,),) = beside.reader.read([(picture, picture)])
    assert (mine.logits, mine.fused) == (theirs.logits, theirs.fused)
    assert set(theirs.shadow) == {"two"}
    assert beside.calibration == alone.calibration
    assert beside.provenance.versions == alone.provenance.versions
    assert set(beside.provenance.recorded) == {"one", "two"}


@pytest.mark.parametrize("broken", ["nowhere", "tampered", "published:EfficientNetB4_DFDC", "published:no"])
def test_a_shadow_that_cannot_be_loaded_is_left_out(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder: Path | str = broken
    if broken == "tampered":
        folder = make(tmp_path, "two")
        (folder / "weights.safetensors").write_bytes(b"no weights")
    config = settings(make(tmp_path, "one"), shadow=(folder,))
    config = config.model_copy(
        update={"engines": config.engines.model_copy(update={"cache_dir": str(tmp_path)})}
    )
    parts = build_reader(config)
    assert [(used.name, used.role, used.off) for used in parts.usage()] == [
        ("one", Role.VOTER, False),
        (str(folder), Role.SHADOW, True),
    ]
    assert "is left out" in caplog.text


def test_a_shadow_that_no_engine_serves_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make(tmp_path, "one"), make(tmp_path, "two", seed=3)

    def build(network: Network, **settings: Any) -> Engine:
        if network.name == "two":
            raise RuntimeError("no memory for it")
        return engine.build(network, **settings)

    monkeypatch.setattr(networks, "build", build)
    parts = build_reader(settings(one, shadow=(two,)))
    assert [(used.name, used.off) for used in parts.usage()] == [("one", False), ("two", True)]


def test_heavy_members_wait_to_be_asked_where_somebody_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = make(tmp_path, "one"), make(tmp_path, "two", SQUARE, seed=3)
    picture = portrait()
    waiting = build_reader(settings(one, heavy=(two,)))
    assert "never reads" in caplog.text  # together they are uncalibrated
    ((face,),) = waiting.reader.read([(picture, picture)])
    assert set(face.logits) == {"one"}
    assert waiting.heavy is not None
    (deeper,) = waiting.heavy.deepen(picture, [face])
    assert set(deeper.logits) == {"one", "two"}
    assert [model.name for model in waiting.provenance.models] == ["one", "two"]
    for always in (
        build_reader(settings(one, heavy=(two,)), cascade=False),
        build_reader(settings(one, heavy=(two,), deterministic=True)),
    ):
        ((whole,),) = always.reader.read([(picture, picture)])
        assert whole.logits == pytest.approx(deeper.logits, abs=1e-4)
        assert whole.fused == pytest.approx(deeper.fused, abs=1e-4)
        assert always.heavy is None


def test_a_face_behind_a_mask_goes_to_the_member_for_its_upper_half(tmp_path: Path) -> None:
    one, upper = make(tmp_path, "one"), make(tmp_path, "up", seed=3, half=Visible.UPPER)
    masked = crop(portrait(), reference_face(MtcnnDetector(40, 0.9)), POLICY.at_size(192))
    masked[96:] = (180, 205, 220)
    plain = build_reader(settings(one))
    (alone,) = plain.reader.read_crops([masked])
    assert (alone.visible, alone.half) == (Visible.UPPER, "")
    assert Reason.OCCLUSION in alone.quality.reasons
    routed = build_reader(settings(one, half=(upper,)))
    (face,) = routed.reader.read_crops([masked])
    assert (face.half, face.fused) == ("up", face.logits["up"])
    assert face.logits["one"] == alone.logits["one"]
    assert Reason.OCCLUSION not in face.quality.reasons
    assert routed.calibration.of("up").scales == CALIBRATION.scales
    assert replace(routed.calibration, halves={}) == plain.calibration
    assert [model.name for model in routed.provenance.models] == ["one", "up"]


def test_half_members_are_named_where_they_belong(tmp_path: Path) -> None:
    one, upper = make(tmp_path, "one"), make(tmp_path, "up", seed=3, half=Visible.UPPER)
    again = make(tmp_path, "again", seed=4, half=Visible.UPPER)
    for config, sentence in (
        (settings(one, upper), "up reads the upper half alone; it belongs in members.half"),
        (settings(one, half=(one,)), "one reads whole faces; it belongs in members.names"),
        (settings(one, half=(upper, again)), "two of them read the same half"),
    ):
        with pytest.raises(UnmaskError, match=sentence) as caught:
            load_cast(config)
        assert caught.value.code is Code.CONFIG
    off = settings(one, half=(upper,)).model_copy(update={"quality": QualityGate(max_covered=0)})
    assert load_cast(off).halves == ()


def test_a_published_member_that_was_not_pulled_is_one_sentence(tmp_path: Path) -> None:
    config = Config(
        engines=Engines(cache_dir=str(tmp_path)), members=Members(names=("published:EfficientNetB4_DFDC",))
    )
    with pytest.raises(UnmaskError, match="unmask models pull") as caught:
        load_cast(config)
    assert caught.value.code is Code.WEIGHTS


def test_no_member_named_means_every_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, "one")
    monkeypatch.setattr(networks, "list_members", lambda: (str(folder),))
    assert [member.name for member in load_cast(Config()).voters] == ["one"]
    monkeypatch.setattr(networks, "list_members", lambda: ())
    with pytest.raises(UnmaskError, match="no member is shipped") as caught:
        load_cast(Config())
    assert caught.value.code is Code.WEIGHTS


def test_weights_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, "one")
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    for wanted, sentence in ((folder, "not the weights this member was made with"), ("nobody", "'nobody'")):
        with pytest.raises(UnmaskError, match=sentence) as caught:
            build_reader(settings(wanted))
        assert caught.value.code is Code.WEIGHTS


def test_a_member_is_named_once(tmp_path: Path) -> None:
    folder = str(make(tmp_path, "one"))
    for members in (
        Members(names=(folder, folder)),
        Members(names=(folder,), heavy=(folder,)),
        Members(names=(folder,), shadow=(folder,)),
    ):
        with pytest.raises(UnmaskError, match="member one is named twice"):
            load_cast(Config(members=members))


def test_the_log_lies_in_the_data_folder(tmp_path: Path) -> None:
    config = Config(data_dir=str(tmp_path / "data"))
    log = open_log(config, FakeClock())
    log.create_topics([TopicSpec("t", 1)])
    with log.producer("test") as producer:
        producer.send(OutRecord("t", "k", b"v", {}, 1))
        producer.flush(10)
    assert [record.value for record in log.read(TopicPartition("t", 0), 0)] == [b"v"]
    log.close()
    assert (data_folder(config) / "log").is_dir()


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder(Config(data_dir="~/unmask")) == tmp_path / "unmask"
