"""Enrolled people: encrypted at rest, opened by their owner only, deleted for good; off by default."""

import hashlib
import io
import json
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from facenet_pytorch.models.inception_resnet_v1 import InceptionResnetV1
from matplotlib import cbook
from numpy.typing import NDArray
from typer.testing import CliRunner

from detectors.cues.identity import CLAIM, IDENTITY
from detectors.readings import Box, Image
from detectors.registry import FACENET
from stream.cli import app
from stream.clock import FakeClock
from stream.closer import Closer, looks_of, wanted_cues
from stream.config import Config
from stream.enroll import DELETE, LIST, enroll, run
from stream.errors import UnmaskError
from stream.frames import Applied, ScoredFrame
from stream.marker import RED, MarkerReader, draw
from stream.models import pull
from stream.people import people_of
from stream.scores import ScoreRecord
from stream.vault import Person, Vault
from tests.stream.story import Story
from tests.stream.test_late_fusion import RECORD

RNG = np.random.default_rng(0)


def somebody(pictures: int = 2) -> NDArray[np.float32]:
    one = RNG.normal(size=512)
    found = one + 0.2 * RNG.normal(size=(pictures, 512))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return Config(data_dir=str(tmp_path / "data"))


@pytest.fixture
def vault(settings: Config) -> Vault:
    return Vault.of(settings)


def folder_of(settings: Config) -> Path:
    return Path(settings.data_dir) / "identity"


def test_people_are_kept_and_found_again(vault: Vault) -> None:
    ada, ben = Person("Ada Äxample", somebody(), 5), Person("Ben", somebody(3), 6)
    vault.put(ben)
    vault.put(ada)
    assert [person.name for person in vault.people()] == ["Ada Äxample", "Ben"]
    found = vault.find("Ada Äxample")
    assert found is not None
    assert found.enrolled_us == 5
    assert np.array_equal(found.embeddings, ada.embeddings)
    vault.put(Person("Ben", somebody(1), 7))
    assert [len(person.embeddings) for person in vault.people()] == [2, 1]


def test_nothing_of_a_person_can_be_read_at_rest(vault: Vault, settings: Config) -> None:
    ada = Person("Ada Example", somebody(), 5)
    vault.put(ada)
    for path in folder_of(settings).iterdir():
        content = path.read_bytes()
        assert b"Ada" not in content
        assert "ada" not in path.name.lower()
        assert ada.embeddings.tobytes()[:16] not in content
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder_of(settings).stat().st_mode) == 0o700


def test_a_deleted_person_is_gone_and_the_last_takes_the_key_along(vault: Vault, settings: Config) -> None:
    vault.put(Person("Ada", somebody(), 5))
    vault.put(Person("Ben", somebody(), 5))
    held = {path.name for path in folder_of(settings).iterdir()}
    assert vault.delete("Ada")
    assert [person.name for person in vault.people()] == ["Ben"]
    assert len({path.name for path in folder_of(settings).iterdir()}) == len(held) - 1
    assert not vault.delete("Ada")
    assert vault.delete("Ben")
    assert list(folder_of(settings).iterdir()) == []
    assert vault.people() == []


@pytest.mark.parametrize("opened", ["key", "folder"])
def test_what_others_may_open_is_refused(vault: Vault, settings: Config, opened: str) -> None:
    vault.put(Person("Ada", somebody(), 5))
    folder = folder_of(settings)
    (folder / "key" if opened == "key" else folder).chmod(0o755 if opened == "folder" else 0o640)
    with pytest.raises(UnmaskError, match=r"permissions (640|755).*chmod (600|700) is right"):
        vault.people()


def test_another_key_or_none_opens_nothing(vault: Vault, settings: Config, tmp_path: Path) -> None:
    vault.put(Person("Ada", somebody(), 5))
    other = Vault(tmp_path / "other", tmp_path / "elsewhere" / "key")
    other.put(Person("Ben", somebody(), 5))
    assert stat.S_IMODE((tmp_path / "elsewhere" / "key").stat().st_mode) == 0o600
    with pytest.raises(UnmaskError, match=r"was not written with the key in .*elsewhere/key"):
        Vault(folder_of(settings), tmp_path / "elsewhere" / "key").people()
    (folder_of(settings) / "key").unlink()
    with pytest.raises(UnmaskError, match=r"their key .* is missing"):
        vault.put(Person("Eve", somebody(), 5))
    with pytest.raises(UnmaskError, match="No such file"):
        vault.people()
    (tmp_path / "elsewhere" / "key").write_bytes(b"no key")
    with pytest.raises(UnmaskError, match="holds no key"):
        other.people()


def pictures(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{k}.png" for k in range(count)]
    for k, path in enumerate(paths):
        assert cv2.imwrite(str(path), np.full((40, 40, 3), 60 * (k + 1), np.uint8))
    return paths


def whole(picture: Image) -> Box | None:
    """Takes the darkest for a wall."""
    return (0.0, 0.0, 40.0, 40.0) if picture.mean() > 70 else None


def test_enrolling_listing_and_deleting(vault: Vault, settings: Config, tmp_path: Path) -> None:
    known = somebody(3)

    def embed(faces: Sequence[tuple[Image, Box]]) -> NDArray[np.float32]:
        return known[: len(faces)]

    out = io.StringIO()
    (tmp_path / "faces").mkdir()
    paths = pictures(tmp_path / "faces", 3)
    with pytest.raises(UnmaskError, match=r"0.png shows no face"):
        enroll(vault, "Ada", paths, whole, embed, FakeClock(), out)
    assert vault.people() == []
    enroll(vault, "Ada", paths[1:], whole, embed, FakeClock(), out)
    assert run(settings, [LIST], False, out) == 0
    assert run(settings, [LIST], True, out) == 0
    told = out.getvalue().splitlines()
    assert told[:2] == ["Ada enrolled by 2 pictures", "Ada  2"]
    assert json.loads(told[2])["pictures"] == 2
    assert run(settings, [DELETE, "Ada"], False, out) == 0
    assert run(settings, [DELETE, "Ada"], False, out) == 1
    assert vault.people() == []


def test_pictures_of_two_people_are_refused(vault: Vault, tmp_path: Path) -> None:
    mixed = np.concatenate([somebody(3)[:1], somebody(3)])
    (tmp_path / "faces").mkdir()
    paths = pictures(tmp_path / "faces", 4)
    with pytest.raises(UnmaskError, match=r"0.png does not look like the others"):
        enroll(vault, "Ada", paths, lambda _: (0, 0, 40, 40), lambda _: mixed, FakeClock(), io.StringIO())
    assert vault.people() == []


def call(settings: Config, tmp_path: Path, *words: str) -> tuple[int, str]:
    options = ["--set", f"data_dir={settings.data_dir}", "--set", f"engines.cache_dir={tmp_path / 'cache'}"]
    found = CliRunner().invoke(app, ["enroll", *words, *options])
    return found.exit_code, found.output


def test_the_command(settings: Config, vault: Vault, tmp_path: Path) -> None:
    vault.put(Person("Ada", somebody(), 5))
    assert call(settings, tmp_path, "list") == (0, "Ada  2\n")
    assert call(settings, tmp_path, "delete", "Ada") == (0, "Ada deleted\n")
    assert call(settings, tmp_path, "delete", "Ada") == (1, "nobody named Ada is enrolled\n")
    code, told = call(settings, tmp_path, "Ada", "a.jpg")
    assert (code, "unmask models pull facenet" in told) == (2, True)
    code, told = call(settings, tmp_path, "Ada")
    assert (code, "NAME PATH..., list, or delete NAME is right" in told) == (2, True)


def test_nobody_is_looked_at_by_default(settings: Config) -> None:
    assert wanted_cues(settings) & {IDENTITY, CLAIM} == set()
    assert looks_of(settings) == []
    assert people_of(settings, "studio") is None


def test_without_weights_the_cue_is_off_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = Config.model_validate(
        {"cues": {"record": ("identity",)}, "engines": {"cache_dir": str(tmp_path / "none")}}
    )
    picture = draw(0, RED)
    reader = Closer(MarkerReader(), looks_of(asked))
    (faces,) = reader.read([(picture, picture)])
    assert faces
    assert all("unmask models pull facenet" in str(face.cues[0].reason) for face in faces)
    assert "its weights are not there" in caplog.text
    people = people_of(asked, "studio")
    assert people is not None
    (told,) = people.look(0, [0], faces[:1])
    assert [cue.name for cue in told.cues] == [IDENTITY]  # the reason stays the one that was given


def test_a_claim_finds_who_is_enrolled(settings: Config, vault: Vault) -> None:
    vault.put(Person("Ada", somebody(), 5))
    identity = {"claims": ("studio=Ada", "desk=Eve")}
    asked = Config.model_validate(
        {"data_dir": settings.data_dir, "cues": {"record": ("claim",)}, "identity": identity}
    )
    for stream, reason in (
        ("studio", "fewer than 4 good looks"),
        ("desk", "is not enrolled"),
        ("roof", None),
    ):
        people = people_of(asked, stream)
        assert people is not None
        picture = draw(0, RED)
        (faces,) = MarkerReader().read([(picture, picture)])
        (told,) = people.look(0, [0], faces[:1])
        reasons = [cue.reason for cue in told.cues]
        assert reasons == [] if reason is None else reason in str(reasons[0])


@pytest.mark.parametrize("claim", ["studio", "=Ada", "studio="])
def test_a_claim_is_a_pair(claim: str) -> None:
    with pytest.raises(ValueError, match="STREAM=NAME would be right"):
        Config.model_validate({"identity": {"claims": (claim,)}})


def test_an_unknown_cue_is_named() -> None:
    with pytest.raises(ValueError, match="names gait; there are: benford"):
        Config.model_validate({"cues": {"record": ("gait",)}})


def test_from_pulling_the_weights_to_enrolling_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights of the published layout, whatever they say of a face."""
    torch.manual_seed(0)
    torch.save(InceptionResnetV1().state_dict(), tmp_path / FACENET.file_name)
    sha256 = hashlib.sha256((tmp_path / FACENET.file_name).read_bytes()).hexdigest()
    record = replace(FACENET, sha256=sha256)
    settings = Config.model_validate(
        {"data_dir": str(tmp_path / "data"), "engines": {"cache_dir": str(tmp_path / "cache")}}
    )
    out = io.StringIO()
    assert pull(settings, ["facenet"], False, str(tmp_path), True, out, None, recogniser=record) == 0
    told = out.getvalue()
    assert told.index("tell people apart by their faces") < told.index("facenet pulled: ")
    for module in ("stream.enroll", "stream.closer"):
        monkeypatch.setattr(f"{module}.FACENET", record)
    portrait = Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    assert run(settings, ["Grace", str(portrait)], False, out) == 0
    grace = Vault.of(settings).find("Grace")
    assert grace is not None
    assert np.allclose(np.linalg.norm(grace.embeddings, axis=1), 1, atol=1e-5)

    asked = Config.model_validate({**settings.model_dump(), "cues": {"record": ("identity",)}})
    reader = Closer(MarkerReader(), looks_of(asked))
    picture = draw(0, RED)
    ((face,),) = reader.read([(picture, picture)])
    assert face.embedding is not None
    assert face.embedding.shape == (512,)
    record.path(tmp_path / "cache").write_bytes(b"changed")
    with pytest.raises(UnmaskError, match="unmask models pull facenet replaces it"):
        looks_of(asked)


class Seen(Story):
    """A story whose every face looks like `looks`."""

    looks: NDArray[np.float32]

    def apply(self, event: ScoredFrame | Applied) -> None:
        if isinstance(event, ScoredFrame):
            faces = tuple(replace(face, embedding=self.looks) for face in event.faces)
            event = replace(event, faces=faces)
        super().apply(event)


def test_a_feed_tells_who_is_seen_and_whether_a_claim_holds(
    settings: Config, vault: Vault, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ada, ben = somebody(1), somebody(1)
    vault.put(Person("Ada", ada, 5))
    asked = Config.model_validate(
        {
            "data_dir": settings.data_dir,
            "cues": {"record": ("identity", "claim")},
            "identity": {"claims": ("studio=Ada",)},
        }
    )
    for looks, holds in ((ada[0], True), (ben[0], False)):
        caplog.clear()
        story = Seen(tmp_path / str(holds), settings=asked)
        story.looks = looks
        story.tell("aaaa aaaa aaaa aaaa | aaaa aaaa $")
        records = [json.loads(json.dumps(o.as_json())) for o in story.said if isinstance(o, ScoreRecord)]
        for record in records:
            RECORD.validate(record)
        faces = [face for record in records for face in record["faces"]]
        assert "claim" not in faces[0]
        assert faces[-1]["claim"] == {"name": "Ada", "looks_like": holds}
        assert faces[15]["cues"]["identity"]["value"] == pytest.approx(0, abs=1e-4)
        # after the cut: another track, the same person
        assert [faces[index]["person"] for index in (10, -1)] == [0, 0]
        assert faces[10]["track"] != faces[-1]["track"]
        doubts = [line for line in caplog.messages if "does not look like it" in line]
        assert len(doubts) == (0 if holds else 2)  # once a track
        assert "embedding" not in json.dumps(story.aggregate.state())
