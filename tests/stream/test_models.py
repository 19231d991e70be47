"""`unmask models`: terms first, nothing in the cache that is not what was published, sentences for people."""

import hashlib
import io
import json
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from detectors.members import DEFAULT_MEMBER
from detectors.published import build, layout_of
from detectors.registry import PUBLISHED, TERMS, Published, part_of
from stream import models
from stream.cli import app
from stream.config import Config
from stream.config_file import load
from stream.errors import UnmaskError
from tests.stream.test_download import Mirror, serving

NAME = "EfficientNetAutoAttB4ST_DFDC"
"""Of the layouts the one with every part: attention, siamese head, an unused classifier."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return load(None, [f"engines.cache_dir={tmp_path / 'cache'}"], {})


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """A checkpoint of the right layout, half as wide as a real one to be quick."""
    network = build(PUBLISHED[NAME].layout)
    state, layout = network.state_dict(), layout_of(network)
    filled = {theirs: state[ours] for theirs, ours in layout.names.items()}
    filled |= {theirs: torch.zeros(shape) for theirs, shape in layout.unused.items()}
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in filled.items()}


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, torch.Tensor]) -> bytes:
    return saved(tensors)


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def record_of(data: bytes) -> Published:
    return replace(PUBLISHED[NAME], sha256=hashlib.sha256(data).hexdigest())


def pull(settings: Config, record: Published, base: str, **changed: Any) -> tuple[int, str]:
    out = io.StringIO()
    arguments = {"names": [NAME], "every": False, "base": base, "accepted": True, "ask": None} | changed
    code = models.pull(settings, out=out, published={NAME: record}, **arguments)
    return code, out.getvalue()


def refused(settings: Config, data: bytes, record: Published, **changed: Any) -> str:
    with serving(Mirror(data=data)) as base, pytest.raises(UnmaskError) as caught:
        pull(settings, record, base, **changed)
    cached = record.path(models.cache_of(settings))
    assert not cached.exists()
    assert not part_of(cached).exists()
    return str(caught.value)


def test_a_checkpoint_is_pulled_verified_and_shown(settings: Config, checkpoint: bytes) -> None:
    record = record_of(checkpoint)
    with serving(Mirror(data=checkpoint)) as base:
        code, told = pull(settings, record, base)
    assert code == 0
    assert told.index("no licence stated") < told.index("pulled: ")
    assert "hash and layout are right" in told
    cached = record.path(models.cache_of(settings))
    assert cached.read_bytes() == checkpoint

    assert pull(settings, record, "http://127.0.0.1:9") == (0, f"published:{NAME} is there already\n")

    out = io.StringIO()
    assert models.verify(settings, out, {NAME: record}) == 0
    assert f"right     published:{NAME}\n" in out.getvalue()

    out = io.StringIO()
    models.show(settings, NAME, True, out, {NAME: record})
    shown = json.loads(out.getvalue())
    assert (shown["state"], shown["path"], shown["sha256"]) == ("pulled", str(cached), record.sha256)


def test_what_was_changed_in_the_cache_is_found_and_replaced(settings: Config, checkpoint: bytes) -> None:
    record = record_of(checkpoint)
    cached = record.path(models.cache_of(settings))
    cached.parent.mkdir(parents=True)
    cached.write_bytes(checkpoint[:-1] + b"x")
    (cached.parent / "other.pth").write_bytes(b"")
    out = io.StringIO()
    assert models.verify(settings, out, {NAME: record}) == 2
    assert (
        f"DIFFERS   published:{NAME}: {cached} has not SHA-256 {record.sha256}; do not use it"
        in out.getvalue()
    )
    assert "other.pth: of no network in the list" in out.getvalue()
    with serving(Mirror(data=checkpoint)) as base:
        code, told = pull(settings, record, base)
    assert (code, "another hash; pulled anew" in told) == (0, True)
    assert cached.read_bytes() == checkpoint


def test_shipped_weights_are_verified(settings: Config, tmp_path: Path) -> None:
    for name, data in (("right", b"weights"), ("changed", b"Weights"), ("gone", None)):
        folder = tmp_path / "weights" / name
        folder.mkdir(parents=True)
        sha256 = hashlib.sha256(b"weights").hexdigest()
        (folder / "member.json").write_text(json.dumps({"name": name, "sha256": sha256}))
        if data is not None:
            (folder / "weights.safetensors").write_bytes(data)
    out = io.StringIO()
    assert models.verify(settings, out, {}, tmp_path / "weights") == 2
    found = {line.split()[1].rstrip(":"): line.split()[0] for line in out.getvalue().splitlines()}
    assert found == {"right": "right", "changed": "DIFFERS", "gone": "MISSING"}


def test_a_tampered_checkpoint(settings: Config, checkpoint: bytes) -> None:
    sentence = refused(settings, checkpoint[:-1] + b"x", record_of(checkpoint))
    assert "not the published weights; deleted" in sentence


def test_a_truncated_checkpoint(settings: Config, checkpoint: bytes) -> None:
    """Wholly transferred, but not a whole file: the hash is of what was published broken."""
    short = checkpoint[: len(checkpoint) // 2]
    assert "not the published weights" in refused(settings, short, record_of(checkpoint))
    sentence = refused(settings, short, record_of(short))
    assert "has the right hash but does not load, so it was deleted" in sentence


def test_a_checkpoint_of_another_layout(settings: Config, tensors: dict[str, torch.Tensor]) -> None:
    left = {name: tensor for name, tensor in tensors.items() if "attconv" not in name}
    data = saved(left)
    assert "feat_ext.efficientnet.attconv.bias" in refused(settings, data, record_of(data))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("bare", [True, False])
def test_a_pickle_that_would_run_code(settings: Config, bare: bool) -> None:
    data = pickle.dumps({"weight": Bomb()}) if bare else saved({"weight": Bomb()})
    assert "does not load, so it was deleted" in refused(settings, data, record_of(data))
    assert not Path("exploded").exists()


def test_nothing_is_pulled_before_the_terms_are_accepted(settings: Config, checkpoint: bytes) -> None:
    record, mirror, asked = record_of(checkpoint), Mirror(data=checkpoint), list[str]()

    def no(question: str) -> bool:
        asked.append(question)
        return False

    with serving(mirror) as base:
        code, told = pull(settings, record, base, accepted=False, ask=no)
        assert (code, told) == (1, f"{TERMS}\ndeclined; nothing was pulled\n")
        assert asked == ["Accept these terms and pull 1 file?"]
        with pytest.raises(UnmaskError, match="nobody is there to accept these terms; --accept-terms does"):
            pull(settings, record, base, accepted=False)
        assert mirror.paths == []
    with pytest.raises(UnmaskError, match="cannot be reached"):
        pull(settings, record, "http://127.0.0.1:9", accepted=False, ask=lambda question: True)


@pytest.mark.parametrize(
    ("names", "every", "sentence"),
    [
        ([], False, "name the networks to pull, or --all"),
        (["a"], True, "name the networks to pull, or --all"),
        (["a"], False, f"network 'a' is not one that can be pulled; there are: {NAME}"),
        ([DEFAULT_MEMBER], False, "is not one that can be pulled"),
    ],
)
def test_what_cannot_be_asked_for(settings: Config, names: list[str], every: bool, sentence: str) -> None:
    with pytest.raises(UnmaskError, match=sentence):
        pull(settings, PUBLISHED[NAME], ".", names=names, every=every)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["models", *arguments])


def test_command_line(tmp_path: Path) -> None:
    cache = ("--set", f"engines.cache_dir={tmp_path / 'cache'}")
    part = part_of(PUBLISHED[NAME].path(tmp_path / "cache"))
    part.parent.mkdir(parents=True)
    part.write_bytes(b"some")
    listed = call("list", *cache)
    assert listed.exit_code == 0
    assert DEFAULT_MEMBER in listed.output
    assert f"published:{NAME}  partial  DFDC; the paper's LogLoss/AUC: frame 0.5507/0.8360" in listed.output
    records = [json.loads(line) for line in call("list", "--json", *cache).output.splitlines()]
    assert [record["state"] for record in records if record["name"] == f"published:{NAME}"] == ["partial"]
    assert sum(record["kind"] == "published" for record in records) == 10
    assert "name_in_paper: B4AttST" in call("show", NAME, *cache).output
    assert "licence: Apache-2.0" in call("show", DEFAULT_MEMBER, *cache).output
    assert call("show", "none", *cache).exit_code == 2
    verified = call("verify", *cache)
    assert (verified.exit_code, f"partial   published:{NAME}" in verified.output) == (0, True)


def test_pulling_without_a_person_or_a_network(tmp_path: Path) -> None:
    cache = ("--set", f"engines.cache_dir={tmp_path / 'cache'}")
    alone = call("pull", NAME, *cache)
    assert (alone.exit_code, "--accept-terms" in alone.output) == (2, True)
    away = call("pull", NAME, "--accept-terms", "--from", "http://ada:secret@127.0.0.1:9/x", *cache)
    assert (away.exit_code, "127.0.0.1:9 cannot be reached" in away.output) == (2, True)
    assert "secret" not in away.output
    assert not part_of(PUBLISHED[NAME].path(tmp_path / "cache")).exists()
    for arguments in (("list", "--help"), ("show", "--help"), ("pull", "--help"), ("verify", "--help")):
        assert f"unmask models {arguments[0]}" in call(*arguments).output
