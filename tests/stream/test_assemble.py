"""Settings become a reader that works, or one sentence says what is wrong with the weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detectors.backbones import FaceNetwork
from detectors.reference import portrait
from detectors.training.export import export_member
from stream import networks
from stream.assemble import build_reader, data_folder, open_log
from stream.clock import FakeClock
from stream.config import Config, Engines, Members
from stream.errors import Code, UnmaskError
from stream.log import TopicPartition, TopicSpec
from stream.networks import load_members
from stream.records import OutRecord
from tests.detectors.test_members import CALIBRATION, TINY


def make(folder: Path, name: str) -> Path:
    recipe = replace(TINY, name=name)
    torch.manual_seed(2)
    network = FaceNetwork(recipe.architecture()).eval()
    export_member(folder / name, network.state_dict(), recipe, CALIBRATION, {"licence": "Apache-2.0"})
    return folder / name


def settings(*members: Path | str) -> Config:
    return Config(engines=Engines(order=("eager",)), members=Members(names=tuple(map(str, members))))


def test_a_reader_with_two_members_reads_a_real_face(tmp_path: Path) -> None:
    parts = build_reader(settings(make(tmp_path, "one"), make(tmp_path, "two")))
    picture = portrait()
    ((face,),) = parts.reader.read([(picture, picture)])
    assert set(face.logits) == {"one", "two"}
    assert [model.name for model in parts.provenance.models] == ["one", "two"]
    assert parts.provenance.calibration == parts.calibration.kind
    assert (parts.reader.engine, parts.reader.precision) == ("eager", "fp32")


def test_no_member_named_means_every_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, "one")
    monkeypatch.setattr(networks, "list_members", lambda: (str(folder),))
    assert [member.name for member in load_members(())] == ["one"]
    monkeypatch.setattr(networks, "list_members", lambda: ())
    with pytest.raises(UnmaskError, match="no member is shipped") as caught:
        load_members(())
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
    folder = make(tmp_path, "one")
    with pytest.raises(UnmaskError, match="member one is named twice"):
        load_members((str(folder), str(folder)))


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
