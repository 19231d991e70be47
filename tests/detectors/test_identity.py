"""Who a face looks like: drift, the same person after a cut, a claim; embeddings that stay in memory."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from facenet_pytorch.models.inception_resnet_v1 import InceptionResnetV1

from detectors.cues.embedding import Embedder, EmbeddingError, cut
from detectors.cues.identity import CLAIM, IDENTITY, MISMATCH, Claimed, Embedding, People
from detectors.readings import Box, Detection, FaceReading, Quality, Reason

LEFT: Box = (0.0, 0.0, 50.0, 50.0)
RIGHT: Box = (100.0, 0.0, 130.0, 30.0)
SECOND = 1_000_000
RNG = np.random.default_rng(0)


def somebody() -> Embedding:
    found = RNG.normal(size=512)
    return (found / np.linalg.norm(found)).astype(np.float32)


ADA, BEN = somebody(), somebody()


def looks_like(person: Embedding, noise: float = 0.3) -> Embedding:
    found = person + noise * somebody()
    return (found / np.linalg.norm(found)).astype(np.float32)


def face(embedding: Embedding | None, box: Box = LEFT, reasons: tuple[Reason, ...] = ()) -> FaceReading:
    eye = (0.0, 0.0)
    return FaceReading(
        detection=Detection(box, (eye, eye, eye, eye, eye), 1.0),
        quality=Quality(1.0, {}, reasons),
        logits={"m": 0.0},
        fused=0.0,
        crop=np.zeros((2, 2, 3), np.uint8),
        attention=np.zeros((2, 2), np.float32),
        embedding=embedding,
    )


def watch(people: People, track: int, persons: list[Embedding], start: int = 0) -> FaceReading:
    for k, person in enumerate(persons):
        (told,) = people.look((start + k) * SECOND, [track], [face(looks_like(person))])
    return told


def value_of(told: FaceReading, name: str) -> float:
    value = {cue.name: cue.value for cue in told.cues}[name]
    assert value is not None
    return value


def test_a_track_that_becomes_somebody_else_drifts() -> None:
    same = value_of(watch(People(), 0, [ADA] * 12), IDENTITY)
    swapped = value_of(watch(People(), 0, [ADA] * 6 + [BEN] * 6), IDENTITY)
    assert same < 0.1
    assert swapped > 0.8


def test_the_begin_is_not_forgotten() -> None:
    people = People()
    watch(people, 0, [ADA] * 10)
    told = watch(people, 0, [BEN] * 30, start=20)
    assert value_of(told, IDENTITY) > 0.8


def test_a_few_looks_say_why_there_is_no_number() -> None:
    told = watch(People(), 0, [ADA] * 7)
    assert [(cue.name, cue.value, cue.reason) for cue in told.cues] == [
        (IDENTITY, None, "fewer than 8 good looks at this face")
    ]


def test_bad_pictures_are_not_looked_at_and_embeddings_go_no_further() -> None:
    people = People()
    for k in range(20):
        (told,) = people.look(k * SECOND, [0], [face(ADA, reasons=(Reason.BLUR,))])
        assert told.embedding is None
    assert told.cues[0].value is None
    assert people.person(0) is None
    assert watch(people, 0, [ADA], start=30).embedding is None


def test_a_person_is_linked_over_a_cut_and_a_stranger_is_not() -> None:
    people = People()
    watch(people, 0, [ADA] * 5)
    assert people.person(0) == 0
    people.end([0])
    watch(people, 1, [BEN] * 5, start=10)
    watch(people, 2, [ADA] * 5, start=10)
    assert (people.person(1), people.person(2)) == (1, 0)
    people.end([1, 2])
    assert people.person(2) is None
    watch(people, 3, [ADA] * 5, start=1000)  # more than ten minutes later
    assert people.person(3) == 2


def test_two_faces_at_once_are_two_people() -> None:
    people = People()
    for k in range(5):
        people.look(k * SECOND, [0, 1], [face(looks_like(ADA)), face(looks_like(ADA), RIGHT)])
    assert (people.person(0), people.person(1)) == (0, 1)


def test_a_claim_holds_or_not_for_the_largest_face() -> None:
    claimed = Claimed("Ada", np.stack([looks_like(ADA), looks_like(ADA)]))
    true = watch(People(claimed), 0, [ADA] * 4)
    false = watch(People(claimed), 0, [BEN] * 4)
    assert value_of(true, CLAIM) < 0.3 < MISMATCH < value_of(false, CLAIM)

    people = People(claimed, drift=False)
    for k in range(5):
        large, small = people.look(k * SECOND, [0, 1], [face(BEN), face(ADA, RIGHT)])
    assert [cue.name for cue in large.cues] == [CLAIM]
    assert value_of(large, CLAIM) > MISMATCH
    assert small.cues[0].reason == "fewer than 4 good looks at it as the largest face"


def test_a_claim_about_nobody_says_so() -> None:
    told = watch(People(Claimed("Eve", None, "not enrolled"), drift=False), 0, [ADA] * 5)
    assert told.cues[0].reason == "not enrolled"
    with pytest.raises(ValueError, match="Eve has no embeddings"):
        Claimed("Eve", None, "not enrolled").distance(ADA)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the published one: a bare state with its classifier."""
    torch.manual_seed(0)
    network = InceptionResnetV1()
    path = tmp_path_factory.mktemp("models") / "facenet.pt"
    torch.save({**network.state_dict(), "logits.weight": torch.zeros(3, 512)}, path)
    return path


def test_the_network_gives_directions_for_faces(weights: Path) -> None:
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    embedder = Embedder.load(weights, sha256)
    pictures = RNG.integers(0, 255, (2, 160, 160, 3), np.uint8)
    found = embedder(list(pictures))
    assert found.shape == (2, 512)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.allclose(embedder([pictures[1]])[0], found[1], atol=1e-4)
    assert embedder([]).shape == (0, 512)
    with pytest.raises(EmbeddingError, match="has SHA-256"):
        Embedder.load(weights, "0" * 64)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    with pytest.raises(EmbeddingError, match="No such file"):
        Embedder.load(path, "0" * 64)
    torch.save({"weight": torch.zeros(1)}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(EmbeddingError, match="not the weights of InceptionResnetV1"):
        Embedder.load(path, sha256)


def test_a_face_is_cut_with_its_margin_inside_of_the_picture() -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    image[100:246, 100:246] = 200
    face = cut(image, (100.0, 100.0, 246.0, 246.0))
    assert face.shape == (160, 160, 3)
    assert (face[:5] == 0).all()  # 7 of 160 pixels on each side are margin
    assert (face[9:-9, 9:-9] == 200).all()
    assert cut(image, (-50.0, -50.0, 80.0, 80.0)).shape == (160, 160, 3)
    with pytest.raises(ValueError, match="outside of a picture of 300 x 300"):
        cut(image, (400.0, 0.0, 500.0, 100.0))
