"""Half-face students: occluders alike on both classes, the bridge's loss, half a network, routing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.backbones import Architecture, ArchitectureError, FaceNetwork
from detectors.calibration import Calibration, CalibrationKind, Scale, Sets
from detectors.crops import CropKind, CropPolicy
from detectors.readings import Image, Visible
from detectors.reference import portrait
from detectors.training import bridge, half
from detectors.training.bridge import Bridge, Positive, bridge_loss, covered_pairs
from detectors.training.distil import TeacherError
from detectors.training.half import ACCUSED, CLEARED, UNDECIDED, Read, System
from detectors.training.occluders import (
    COVERING,
    HELD_OUT,
    HIDDEN_FROM,
    SEEN_UNTIL,
    TRAINED,
    Kind,
    cover,
    cover_clip,
    draw_occluder,
    hidden_shares,
    mask_of,
)
from detectors.training.recipe import Mode, RecipeError, load_recipe

RECIPES = Path(bridge.__file__).parent / "recipes"
TIGHT = CropPolicy(CropKind.TIGHT, size=64, side=0.81, shift=0.06)
PLAIN = np.full((2, 64, 64, 3), 100, np.uint8)


def every_covering() -> list[tuple[Visible, Kind]]:
    return [(leaves, kind) for leaves, by in COVERING.items() for kinds in by.values() for kind in kinds]


@pytest.mark.parametrize(("leaves", "kind"), every_covering())
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_an_occluder_hides_the_one_half_and_leaves_the_other(leaves: Visible, kind: Kind, seed: int) -> None:
    above, below = hidden_shares(draw_occluder(np.random.default_rng(seed), kind, leaves))
    hidden, left = (above, below) if leaves is Visible.LOWER else (below, above)
    assert hidden > HIDDEN_FROM
    assert left < SEEN_UNTIL


@pytest.mark.parametrize("kind", Kind)
def test_only_what_lies_behind_it_changes(kind: Kind) -> None:
    face = np.random.default_rng(1).integers(0, 255, (96, 96, 3)).astype(np.uint8)
    before = face.copy()
    occluder = draw_occluder(np.random.default_rng(2), kind)
    covered = cover(face, occluder)
    alpha = mask_of(occluder, 96)
    assert np.array_equal(face, before)
    assert np.array_equal(covered, cover(face, occluder))
    assert np.array_equal(covered[alpha == 0], face[alpha == 0])
    assert (alpha > 0.5).any()


def test_kinds_that_measure_never_train() -> None:
    assert set(TRAINED).isdisjoint(HELD_OUT)
    assert set(TRAINED) | set(HELD_OUT) == set(Kind)
    for by in COVERING.values():
        assert set(by[False]) <= set(TRAINED)
        assert set(by[True]) <= set(HELD_OUT)
    with pytest.raises(ValueError, match="microphone: cannot leave the upper half alone"):
        draw_occluder(np.random.default_rng(0), Kind.MICROPHONE, Visible.UPPER)


@pytest.mark.parametrize("leaves", COVERING)
def test_partners_are_covered_alike(leaves: Visible) -> None:
    images = np.full((24, 64, 64, 3), 100, np.uint8)
    covered = covered_pairs(images, leaves, np.random.default_rng(4))
    assert np.array_equal(covered[:12], covered[12:])
    changed = (covered != images).any((1, 2, 3))
    assert 0 < changed.sum() < 24
    assert (images == 100).all()
    rows = (covered != images).any(3).mean((0, 2))
    seen, hidden = (rows[:24], rows[40:]) if leaves is Visible.UPPER else (rows[40:], rows[:24])
    assert seen.mean() < 0.3 * hidden.mean()


def test_the_bridge_draws_to_the_own_face_and_away_from_the_partner() -> None:
    #  student: authentic at 0 degrees, its fake at 60; both teachers at 0 degrees
    angles = torch.deg2rad(torch.tensor([0.0, 60.0]))
    student = 3 * torch.stack([angles.cos(), angles.sin()], dim=1)
    teacher = torch.tensor([[5.0, 0.0], [5.0, 0.0]])
    #  between the partners 1; authentic to its teacher 0, fake to its teacher 1
    loss = bridge_loss(student, teacher, 0.2, Positive.SAME_FACE)
    assert float(loss) == pytest.approx((0.0 + 0.2) / 2)
    assert float(bridge_loss(student, student, 0.2, Positive.SAME_FACE)) == 0
    moved = student.clone().requires_grad_()
    bridge_loss(moved, teacher, 0.2, Positive.SAME_FACE).backward()  # type: ignore[no-untyped-call]
    assert moved.grad is not None
    assert float(moved.grad.abs().sum()) > 0


def test_class_level_triplets_take_the_hardest() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 20.0, 90.0, 110.0]))
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    chord = [2 * np.sin(np.deg2rad(angle) / 2) for angle in (20, 70, 90)]
    #  nearest of the other class: 90, 70, 70, 90 degrees away; farthest teacher of the own class: 20
    wanted = np.mean([max(0, chord[0] - chord[k] + 1) for k in (2, 1, 1, 2)])
    found = bridge_loss(points, points, 1.0, Positive.SAME_CLASS)
    assert float(found) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("sees", COVERING)
@pytest.mark.parametrize("gate", [None, 1])
def test_a_network_of_half_a_face_sees_nothing_else(sees: Visible, gate: int | None) -> None:
    torch.manual_seed(0)
    network = FaceNetwork(Architecture("test_efficientnet", gate, mirrored=True, half=sees)).eval()
    faces = torch.randn(2, 3, 64, 64)
    other, own = faces.clone(), faces.clone()
    upper, lower = slice(0, 32), slice(32, 64)
    other[:, :, lower if sees is Visible.UPPER else upper] = 3.0
    own[:, :, upper if sees is Visible.UPPER else lower] += 1.0
    with torch.inference_mode():
        (logit, attention), (same, _), (changed, _) = network(faces), network(other), network(own)
    assert torch.equal(logit, same)
    assert not torch.allclose(logit, changed)
    rows = attention.shape[1] // 2
    hidden = attention[:, rows:] if sees is Visible.UPPER else attention[:, :rows]
    assert attention.shape[1] == attention.shape[2]
    assert not hidden.any()


def test_an_architecture_says_so_only_if_it_sees_half() -> None:
    assert "half" not in Architecture("test_efficientnet", 1).to_json()
    record = Architecture("test_efficientnet", 1, half=Visible.UPPER).to_json()
    assert Architecture(**record).half == "upper"
    with pytest.raises(ArchitectureError, match="half neither: expected upper or lower"):
        Architecture("test_efficientnet", 1, half=Visible.NEITHER)


@pytest.mark.parametrize("name", ["half-upper", "half-lower"])
def test_the_shipped_recipes(name: str, tmp_path: Path) -> None:
    path = RECIPES / f"{name}.yaml"
    recipe = load_recipe(path)
    assert recipe.mode is Mode.HALF
    assert recipe.architecture().half == name.split("-")[1]
    assert recipe.to_json()["half"] == name.split("-")[1]
    fields = yaml.safe_load(path.read_text())
    changed: list[tuple[dict[str, Any], str]] = [
        ({"half": "left"}, "half: 'left', expected upper or lower"),
        ({"mode": "pairs", "mask_weight": 0.0}, "no field of mode pairs"),
        ({"positive": "nobody"}, "expected one of same_face, same_class"),
    ]
    for change, sentence in changed:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields | change))
        with pytest.raises(RecipeError, match=sentence):
            load_recipe(tmp_path / "recipe.yaml")
    del fields["teachers"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(RecipeError, match="teachers: missing"):
        load_recipe(tmp_path / "recipe.yaml")


def test_recipes_of_other_modes_are_told_as_before() -> None:
    assert not {"half", "bridge_weight", "positive"} & set(load_recipe(RECIPES / "lite0-att.yaml").to_json())


def teacher(name: str, **change: Any) -> SimpleNamespace:
    network = FaceNetwork(Architecture("test_efficientnet", 1, **change)).eval()
    return SimpleNamespace(name=name, policy=TIGHT, module=network, half=change.get("half"))


def test_teachers_see_whole_faces_and_teach_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"one": teacher("one", mirrored=True), "two": teacher("two", mirrored=True),
             "half": teacher("half", half=Visible.UPPER), "foreign": teacher("foreign")}  # fmt: skip
    known["foreign"].module = torch.nn.Identity()
    monkeypatch.setattr("detectors.training.distil.load_member", known.__getitem__)
    student = FaceNetwork(Architecture("test_efficientnet", 1, half=Visible.UPPER))
    cpu = torch.device("cpu")
    found = Bridge(["one", "two"], TIGHT, student, cpu).lesson(PLAIN)
    assert found.features.shape == (2, student.net.num_features)
    alone = Bridge(["one"], TIGHT, student, cpu).lesson(PLAIN)
    assert torch.equal(found.features, alone.features)
    with torch.no_grad():
        two = Bridge(["two"], TIGHT, student, cpu).lesson(PLAIN).logits
    torch.testing.assert_close(found.logits, (alone.logits + two) / 2)
    for name, sentence in (("half", "sees half a face"), ("foreign", "expected a network of ours")):
        with pytest.raises(TeacherError, match=sentence):
            Bridge([name], TIGHT, student, cpu)
    larger = FaceNetwork(Architecture("tf_efficientnet_lite0", 4, half=Visible.UPPER))
    with pytest.raises(TeacherError, match="expected the student's 1280"):
        Bridge(["one"], TIGHT, larger, cpu)


def system(logits: list[float], said: list[int]) -> System:
    return System(np.array(logits), np.array(said))


def test_each_face_goes_to_who_can_read_it() -> None:
    whole = system([1.0, 2.0, 3.0, 4.0], [ACCUSED, ACCUSED, CLEARED, ACCUSED])
    upper = system([-1.0, -2.0, -3.0, -4.0], [CLEARED] * 4)
    visible = [Visible.BOTH, Visible.UPPER, Visible.LOWER, Visible.NEITHER]
    found = half.routed(whole, {Visible.UPPER: upper}, visible)
    assert found.logits.tolist() == [1.0, -2.0, 3.0, 4.0]
    assert found.said.tolist() == [ACCUSED, CLEARED, UNDECIDED, UNDECIDED]
    untouched = half.routed(whole, {Visible.UPPER: upper}, [Visible.BOTH] * 4)
    assert np.array_equal(untouched.logits, whole.logits)
    assert np.array_equal(untouched.said, whole.said)


def test_a_calibration_decides_as_at_run_time() -> None:
    levels = tuple(float(x) for x in np.linspace(-4, 4, 99))
    sets = Sets(0.05, 0.1, 200, 200, levels, tuple(x + 2 for x in levels))
    calibration = Calibration(CalibrationKind.SHIPPED, (Scale(1, 1.0, 0.0),), 0.5, 0.5, sets=sets)
    found = half.judged(calibration, np.array([-5.0, 0.0, 5.0]))
    assert found.said.tolist() == [CLEARED, UNDECIDED, ACCUSED]
    bare = Calibration(CalibrationKind.SHIPPED, (Scale(1, 2.0, 1.0),), 0.5, 0.5)
    assert half.judged(bare, np.array([4.0])).logits.tolist() == [3.0]
    assert half.judged(bare, np.array([4.0])).said.tolist() == [UNDECIDED]


def people_and_crops() -> Any:
    """Twenty people, each an authentic crop and its fake."""
    labels = np.tile([0, 1], 20)
    original = np.where(labels == 1, np.arange(40) - 1, -1)
    images = np.repeat(PLAIN[:1], 40, axis=0)
    return SimpleNamespace(
        labels=labels, identity=np.repeat(np.arange(20), 2), original=original, images=images
    )


def test_the_table_pairs_both_systems_on_the_same_crops() -> None:
    faces = people_and_crops()
    rng = np.random.default_rng(3)
    noise = rng.normal(size=40)
    poor = System(noise, np.where(noise > 1, ACCUSED, UNDECIDED))
    good = System(
        np.where(faces.labels == 1, 3.0, -3.0) + 0.1 * noise, np.where(faces.labels == 1, ACCUSED, CLEARED)
    )
    read = Read({}, [Visible.UPPER] * 40, np.arange(40) % 4 < 2)
    row = half.compared(poor, good, read, faces, Visible.UPPER)
    low, high = row["gain"]["interval"]
    assert 0.1 < low <= row["gain"]["auc"] <= high
    assert row["routed"]["auc"] == 1
    assert row["routed"]["false_accusations"]["share"] == 0
    assert row["routed"]["decided_authentic"]["share"] == 1
    assert row["estimate_right"]["share"] == 1
    assert set(row["gain_held_out_kinds"]) == {"auc", "interval"}
    same = half.compared(poor, poor, Read({}, [Visible.BOTH] * 40, np.zeros(40, bool)), faces, None)
    assert (same["gain"]["auc"], same["gain"]["interval"]) == (0, (0, 0))
    sets = {"uncovered": same, "lower half hidden": row, "upper half hidden": same}
    told = half.verdicts({"sets": sets})
    assert [line.rsplit(": ", 1)[1] for line in told[:3]] == ["met"] * 3
    assert any(line.startswith("upper half hidden: AUC") and line.endswith("missed") for line in told)
    assert told[-1].endswith("met")
    lines = half.table({"sets": sets})
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1


def test_covered_sets_are_the_same_each_time_and_alike_for_partners() -> None:
    faces = people_and_crops()
    group = half.pair_of(faces)
    crops, held_out = half.covered_crops(faces.images, group, Visible.UPPER)
    again, _ = half.covered_crops(faces.images, group, Visible.UPPER)
    assert np.array_equal(crops, again)
    assert np.array_equal(crops[::2], crops[1::2])
    assert np.array_equal(held_out[::2], held_out[1::2])
    assert 0 < held_out.sum() < 40
    assert (crops != 100).any((1, 2, 3)).all()


def video(path: Path, frames: int) -> Path:
    picture: Image = np.ascontiguousarray(portrait()[:320, :320])
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 320, "yuv420p"
        for _ in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return path


def test_a_video_gets_a_mask_over_every_face(tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.mp4", 6)
    occluder = draw_occluder(np.random.default_rng(0), Kind.MASK, Visible.UPPER)
    drawn = cover_clip(clip, tmp_path / "covered.mp4", occluder)
    assert drawn == 6
    pictures = []
    for path in (clip, tmp_path / "covered.mp4"):
        with av.open(str(path)) as file:
            pictures.append([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert len(pictures[0]) == len(pictures[1]) == 6
    changed = np.abs(pictures[0][2].astype(int) - pictures[1][2]).max(2) > 40
    assert 0.02 < changed.mean() < 0.5
