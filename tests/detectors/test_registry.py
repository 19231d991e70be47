"""The records of published and shipped networks are complete, consistent, and honest about the disk."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from detectors.members import DEFAULT_MEMBER
from detectors.published import ARCHITECTURES
from detectors.registry import (
    DFDC,
    FFPP,
    PAPER_TABLE,
    PUBLISHED,
    SHIPPED,
    WEIGHTS,
    RegistryError,
    State,
    describe,
    file_sha256,
    find_published,
    is_baseline,
    paper_figures,
    part_of,
    shipped,
    short_name,
    state,
)


def test_ten_published_networks_of_five_layouts() -> None:
    assert len(PUBLISHED) == 10
    assert {record.layout for record in PUBLISHED.values()} == set(ARCHITECTURES)
    assert len({record.sha256 for record in PUBLISHED.values()}) == 10
    assert all(re.fullmatch("[0-9a-f]{64}", record.sha256) for record in PUBLISHED.values())


def test_the_paper_s_att_is_the_checkpoints_auto_att() -> None:
    record = find_published("published:EfficientNetAutoAttB4ST_DFDC")
    assert (record.paper_name, record.trained_on) == ("B4AttST", DFDC)
    assert record.path(Path("cache")) == Path(
        "cache/models/EfficientNetAutoAttB4ST_DFDC_bestval-"
        "4df0ef7d2f380a5955affa78c35d0942ac1cd65229510353b252737775515a33.pth"
    )


def test_unknown_names_are_answered_with_those_there_are() -> None:
    with pytest.raises(RegistryError, match="'B4' is unknown; there are: Xception_FFPP, EfficientNetB4_FFPP"):
        find_published("B4")


def test_every_row_of_the_paper_s_table_is_found() -> None:
    for short, data_set in (("FFPP", FFPP), ("DFDC", DFDC)):
        layouts = {record.paper_name: record.layout for record in PUBLISHED.values()}
        assert len(PAPER_TABLE[data_set]) == 9
        for names, row in PAPER_TABLE[data_set].items():
            assert paper_figures(frozenset(f"{layouts[name]}_{short}" for name in names)) == row


def test_figures_of_the_paper() -> None:
    four = {name for name in PUBLISHED if name.endswith("_DFDC") and not is_baseline(name)}
    row = paper_figures(frozenset("published:" + name for name in four))
    assert row is not None
    assert (str(row.frame), str(row.video)) == ("0.4658/0.8782", "0.2817/0.9473")


@pytest.mark.parametrize(
    "names",
    [
        {"EfficientNetB4_DFDC", "EfficientNetB4ST_FFPP"},
        {"EfficientNetB4_DFDC", DEFAULT_MEMBER},
        {"EfficientNetB4ST_DFDC", "EfficientNetAutoAttB4_DFDC"},
        {DEFAULT_MEMBER},
    ],
)
def test_no_figures_where_the_paper_has_none(names: set[str]) -> None:
    assert paper_figures(frozenset(names)) is None


def test_names_and_baseline() -> None:
    assert is_baseline("published:Xception_FFPP")
    assert not is_baseline("published:EfficientNetB4_FFPP")
    assert short_name("published:EfficientNetAutoAttB4_FFPP") == "B4Att"
    assert short_name(DEFAULT_MEMBER) == DEFAULT_MEMBER


def test_a_description_says_what_a_user_must_know() -> None:
    text = json.dumps(describe(PUBLISHED["EfficientNetB4ST_FFPP"]))
    assert "GPL-3.0" in text
    assert "no licence stated" in text
    assert "0.9337" in text
    assert "FaceForensics++ c23" in text


def test_shipped_weights_are_those_of_their_records() -> None:
    records = shipped()
    assert records
    for name, record in records.items():
        assert state(SHIPPED / name / WEIGHTS, record["sha256"]) is State.RIGHT


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "member.json").write_text("{")
    with pytest.raises(RegistryError, match=r"one/member\.json"):
        shipped(tmp_path)
    (tmp_path / "one" / "member.json").write_text("[]")
    with pytest.raises(RegistryError, match="expected an object"):
        shipped(tmp_path)


def test_states(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert state(path, sha256) is State.ABSENT
    part_of(path).write_bytes(b"wei")
    assert state(path, sha256) is State.PARTIAL
    path.write_bytes(b"weights")
    assert (state(path, sha256), file_sha256(path)) == (State.RIGHT, sha256)
    path.write_bytes(b"Weights")
    assert state(path, sha256) is State.DIFFERS
