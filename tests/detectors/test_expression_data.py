"""The rule of FER+, its tables and pictures; recipes; batches; losses; the SVM; figures."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from detectors.expression import SIDE, ExpressionError, Method, arranged, enlarged, joined
from detectors.readings import EXPRESSIONS, Visible
from detectors.training.data import DataError
from detectors.training.expression.augment import augmented, batch_rows
from detectors.training.expression.evaluate import confusion, figures, interval, macro_f1, with_students
from detectors.training.expression.ferplus import NONE, agreed, distributions, load_votes, tables
from detectors.training.expression.objective import cross_entropy, cross_triplets, distillation, targets
from detectors.training.expression.recipe import (
    SHIPPED_RECIPES,
    AllRecipe,
    CombinedRecipe,
    Labels,
    NetworkRecipe,
    is_expression,
    load_expression_recipe,
    named,
)
from detectors.training.expression.svm import fit_svm
from detectors.training.recipe import RecipeError, Triplets
from tests.detectors.ferplus_faces import write_faces


def votes(**given: int) -> list[int]:
    columns = [*EXPRESSIONS, "unknown", "no_face"]
    assert set(given) <= set(columns)
    return [given.get(name, 0) for name in columns]


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (votes(neutral=10), "neutral"),
        (votes(anger=6, sadness=4), "anger"),
        (votes(anger=5, sadness=5), None),  # exactly half is not more than half
        (
            votes(happiness=5, neutral=4, fear=1),
            "happiness",
        ),  # 5 of the 9 that remain: the single vote is off
        (votes(happiness=4, neutral=1, fear=1, anger=1, disgust=1, sadness=1, surprise=1), "happiness"),
        (votes(fear=4, surprise=3, anger=3), None),
        (votes(unknown=6, neutral=4), None),
        (votes(no_face=10), None),
        (votes(neutral=1, happiness=1, surprise=1, sadness=1, anger=1, disgust=1, fear=1), None),
        (votes(contempt=6, unknown=3, no_face=1), "contempt"),
    ],
)
def test_label_rule(given: list[int], label: str | None) -> None:
    expected = NONE if label is None else EXPRESSIONS.index(label)
    assert agreed(np.array([given])).tolist() == [expected]


def test_distributions() -> None:
    shares = distributions(
        np.array([
            votes(anger=6, sadness=3, fear=1),
            votes(neutral=3, unknown=5, happiness=2),
            votes(neutral=5, unknown=4),
        ])
    )  # fmt: skip
    anger, sadness = EXPRESSIONS.index("anger"), EXPRESSIONS.index("sadness")
    assert shares.dtype == np.float32
    assert shares[0, anger] == pytest.approx(2 / 3)
    assert shares[0, sadness] == pytest.approx(1 / 3)
    assert shares[0].sum() == pytest.approx(1)
    assert not shares[1].any()  # more of them did not know
    assert shares[2, 0] == pytest.approx(1)


def test_both_layouts_give_the_same_faces(tmp_path: Path) -> None:
    write_faces(tmp_path / "mosaic", "val", 13, seed=1)
    write_faces(tmp_path / "single", "val", 13, seed=1, pictures=True)
    mosaic, single = (load_votes(tables(tmp_path / layout)) for layout in ("mosaic", "single"))
    assert mosaic.images.shape == (13, SIDE, SIDE)
    np.testing.assert_array_equal(mosaic.images, single.images)
    np.testing.assert_array_equal(mosaic.votes, single.votes)
    assert agreed(mosaic.votes).tolist() == [NONE, *(n % 3 for n in range(1, 13))]


def test_training_table_is_left_out_of_several(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ferplus_\*\.csv: no such file"):
        tables(tmp_path)
    write_faces(tmp_path, "train", 3, seed=1)
    assert [path.name for path in tables(tmp_path)] == ["ferplus_train.csv"]
    write_faces(tmp_path, "test", 3, seed=2)
    assert [path.name for path in tables(tmp_path)] == ["ferplus_test.csv"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("contempt", "contemt", "no column contempt"),
        (",8,2,0", ",eight,2,0", "line 3: happiness is 'eight'; expected a whole number"),
        ("val.png,0,1,", "val.png,9,1,", "line 3: row 9, column 1: outside of val.png"),
        ("val.png,0,1,", "other.png,0,1,", "line 3: neither a picture named 'val1.png'"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    write_faces(tmp_path, "val", 4, seed=1)
    table = tmp_path / "ferplus_val.csv"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=sentence):
        load_votes([table])


def test_shipped_recipes() -> None:
    every = load_expression_recipe(SHIPPED_RECIPES / "expression-all.yaml")
    assert isinstance(every, AllRecipe)
    runs = [load_expression_recipe(named(name, SHIPPED_RECIPES)) for name in every.runs]
    shipped = {path.stem for path in SHIPPED_RECIPES.glob("*.yaml") if is_expression(path)}
    assert shipped == {every.name, *every.runs}
    done: set[str] = set()
    for run in runs:
        assert isinstance(run, NetworkRecipe | CombinedRecipe)
        assert set(run.needs) <= done  # in an order in which nothing waits
        done.add(run.name)
        assert len(run.seeds) == (3 if run.reads == Visible.LOWER and "random" not in run.name else 1)
    assert {(run.reads, run.method) for run in runs if not isinstance(run, AllRecipe)} == {
        (Visible.BOTH, Method.TEACHER),
        *((half, method) for half in (Visible.LOWER, Visible.UPPER) for method in list(Method)[1:]),
    }


@pytest.mark.parametrize(
    ("recipe", "old", "new", "sentence"),
    [
        ("expression-teacher", "batch: 64", "batch: 1", "batch: .*greater than or equal to 2"),
        ("expression-teacher", "ema_decay", "ema", "ema_decay: Field required"),
        (
            "expression-teacher",
            "dropout: 0.2",
            "dropout: 0.2\nmargin: 1",
            "margin: not a field of method teacher",
        ),
        ("expression-teacher", "reads: both", "reads: lower", "reads: lower; a teacher reads both halves"),
        ("expression-lower-distilled", "teacher: expression-teacher", "", "teacher: missing"),
        ("expression-lower-triplet", "batch_hard", "hardest", "triplets: .*batch_hard"),
        ("expression-lower-combined", "[0.001, 0.01, 0.1, 1.0]", "[0]", "costs.0: .*greater than 0"),
        ("expression-teacher", "name: expression-teacher", "name: other", "expected 'expression-teacher'"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, recipe: str, old: str, new: str, sentence: str) -> None:
    text = (SHIPPED_RECIPES / f"{recipe}.yaml").read_text()
    assert old in text
    path = tmp_path / f"{recipe}.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(RecipeError, match=sentence):
        load_expression_recipe(path)


def faces(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)


def test_what_a_network_sees() -> None:
    grey = enlarged(faces(3), 64)
    whole = arranged(grey, Visible.BOTH, Visible.BOTH)
    assert whole.shape == (3, 3, 64, 64)
    assert whole.mean((1, 2, 3)).abs().max() < 1e-5
    assert whole.std((1, 2, 3)).sub(1).abs().max() < 1e-3
    lower = arranged(grey, Visible.LOWER, Visible.BOTH)
    assert lower.shape == (3, 3, 32, 64)
    changed = grey.clone()
    changed[:, :, :32] = 0
    assert torch.equal(lower, arranged(changed, Visible.LOWER, Visible.LOWER))
    covered = arranged(grey, Visible.BOTH, Visible.LOWER)
    assert not covered[:, :, :32].any()
    assert torch.equal(covered[:, :, 32:], lower)
    assert not arranged(grey, Visible.BOTH, Visible.UPPER)[:, :, 32:].any()
    with pytest.raises(ExpressionError, match="a network of lower for faces of which upper"):
        arranged(grey, Visible.LOWER, Visible.UPPER)
    with pytest.raises(ExpressionError, match="expected uint8"):
        enlarged(faces(2)[:, :40], 64)


def test_contrast_and_light_do_not_matter() -> None:
    dim = torch.from_numpy(faces(2)).float()[:, None] * 0.5
    bright = dim * 1.5 + 40
    torch.testing.assert_close(
        arranged(dim, Visible.UPPER, Visible.BOTH), arranged(bright, Visible.UPPER, Visible.BOTH)
    )


def test_batches() -> None:
    epoch = np.concatenate([batch_rows(10, 3, seed=1, step=step) for step in range(3)])
    assert len(set(epoch.tolist())) == 9
    np.testing.assert_array_equal(batch_rows(10, 3, 1, 4), batch_rows(10, 3, 1, 4))
    assert not np.array_equal(batch_rows(10, 3, 1, 0), batch_rows(10, 3, 1, 3))
    images = faces(16)
    first, again, other = (augmented(images, 64, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (16, 1, 64, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.min()) >= 0
    assert float(first.max()) <= 255


def test_targets() -> None:
    shares = torch.tensor([[0.75, 0.25, 0, 0, 0, 0, 0, 0]]).repeat(4000, 1)
    labels = torch.zeros(4000, dtype=torch.int64)
    rng = torch.Generator().manual_seed(0)
    assert torch.equal(targets(shares, labels, Labels.DISTRIBUTION, rng), shares)
    assert targets(shares, labels, Labels.MAJORITY, rng)[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    drawn = targets(shares, labels, Labels.PROBABILISTIC, rng)
    assert drawn.sum(1).eq(1).all()
    assert float(drawn[:, 0].mean()) == pytest.approx(0.75, abs=0.03)


def test_losses() -> None:
    logits = torch.tensor([[2.0, 0, 0, 0, 0, 0, 0, 0]])
    uniform = torch.full((1, 8), 1 / 8)
    assert float(cross_entropy(torch.zeros(1, 8), uniform)) == pytest.approx(math.log(8))
    assert float(distillation(logits, logits + 1, 4.0)) == pytest.approx(0, abs=1e-6)
    soft, own = torch.softmax(logits / 2, 1), torch.log_softmax(torch.zeros(1, 8), 1)
    expected = 4 * float((soft * (soft.log() - own)).sum())
    assert float(distillation(torch.zeros(1, 8), logits, 2.0)) == pytest.approx(expected, rel=1e-5)


def test_triplets_cross_from_student_to_teacher() -> None:
    """Two classes along two axes; the students stand where distances are known."""
    labels = torch.tensor([0, 0, 1, NONE])
    teacher = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1], [9, 9]])
    student = torch.tensor([[1.0, 0], [1, 0], [0, 1], [9, 9]], requires_grad=True)
    rng = torch.Generator().manual_seed(0)
    far = math.dist((1, 0), (0.6, 0.8))  # of the teacher's class 0, seen from both students of it
    apart = math.sqrt(2)
    hard = cross_triplets(student, teacher, labels, 1.0, Triplets.BATCH_HARD, rng)
    expected = (2 * max(0, far - apart + 1) + max(0, 0 - apart + 1)) / 3
    assert float(hard.detach()) == pytest.approx(expected, rel=1e-5)
    hard.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    any_of_them = cross_triplets(student, teacher, labels, 1.0, Triplets.RANDOM, rng)
    assert 0 <= float(any_of_them.detach()) <= expected + 1e-6
    alone = cross_triplets(student, teacher, torch.tensor([0, 0, 0, NONE]), 1.0, Triplets.BATCH_HARD, rng)
    assert float(alone.detach()) == 0


def test_svm_separates_and_agrees_with_its_optimum() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 120)
    features = (np.eye(3)[labels] * 2 + rng.normal(0, 0.3, (120, 3))).astype(np.float32)
    svm = fit_svm(features, labels.astype(np.int64), cost=1.0)
    assert (svm.scores(features).argmax(1) == labels).mean() > 0.97
    for k in range(3):  # where the loss has its minimum its slope is 0
        sign = np.where(labels == k, 1.0, -1.0)
        left = np.maximum(0, 1 - sign * (features @ svm.weight[k] + svm.bias[k]))
        slope = svm.weight[k] - 2 * (left * sign) @ features
        assert np.abs(slope).max() < 0.05 * np.abs((left * sign)[:, None] * features).sum(0).max()
    small = fit_svm(features, labels.astype(np.int64), cost=1e-3)
    assert np.linalg.norm(small.weight) < np.linalg.norm(svm.weight)


def test_figures() -> None:
    labels = np.array([0, 0, 1, 2])
    scores = np.eye(8, dtype=np.float32)[[0, 1, 1, 2]]
    found = figures(scores, labels)
    assert (found.accuracy, found.n) == (0.75, 4)
    assert found.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)  # classes that never occur do not count
    assert confusion(np.array([1]), np.array([0]))[0, 1] == 1
    assert macro_f1(np.diag([3] * 8)) == 1
    hits = np.array([0.0, 1.0] * 200)
    low, high = interval(hits)
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.2)


def test_students_of_both_halves_read_whole_faces() -> None:
    lower, upper = np.eye(8, dtype=np.float32)[[0]], np.eye(8, dtype=np.float32)[[1]]
    both = with_students({}, {Method.TRIPLET: lower, Method.DISTILLED: lower}, {Method.TRIPLET: upper})
    assert list(both["full"]) == [Method.TRIPLET]
    np.testing.assert_allclose(both["full"][Method.TRIPLET], (lower + upper) / 2)
    assert list(both["lower_half"]) == [Method.DISTILLED, Method.TRIPLET]


def test_embeddings_are_joined_at_one_length() -> None:
    left, right = np.full((2, 3), 5, np.float32), np.array([[3, 4], [0, 0]], np.float32)
    side_by_side = joined([left, right])
    np.testing.assert_allclose(np.linalg.norm(side_by_side[:, :3], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(side_by_side[:, 3:], [[0.6, 0.8], [0, 0]], rtol=1e-6)
