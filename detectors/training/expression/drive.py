"""Runs expression recipes, one or all of them: each seed in a folder of its own, unattended and resumable.

Several processes may run the same command over the same `--out`: each takes what nobody works on and nothing
unfinished is needed for.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from detectors.expression import ExpressionNetwork
from detectors.readings import Visible
from detectors.training.data import DataError
from detectors.training.expression import loop
from detectors.training.expression.ferplus import TRAIN, VAL, Voted, load_votes
from detectors.training.expression.recipe import (
    AllRecipe,
    CombinedRecipe,
    NetworkRecipe,
    load_expression_recipe,
    named,
)
from detectors.training.expression.runs import (
    agreed_only,
    embeddings,
    keep_answers,
    run_folder,
    taught,
    trained,
)
from detectors.training.expression.svm import fit_svm
from detectors.training.hardware import Hardware, choose_hardware, keep_freed_memory, make_deterministic
from detectors.training.imagenet import load_imagenet
from detectors.training.recipe import RecipeError
from detectors.training.start import IMAGENET

logger = logging.getLogger(__name__)

POLL_S = 10.0
"""Between looks at what other processes work on."""
LOCK = "lock"
SVM = "svm.safetensors"

Trainable = NetworkRecipe | CombinedRecipe


class UnfinishedError(ValueError):
    """A run needs another one that is not finished; says which command makes it."""


@dataclass(frozen=True, slots=True)
class Job:
    """One recipe with one seed."""

    recipe: Trainable
    seed: int

    def __str__(self) -> str:
        return f"{self.recipe.name} seed {self.seed}"


@dataclass(frozen=True)
class Shop:
    """Where everything is. `beside` is the folder of the recipe that was asked for."""

    out: Path
    data: Path
    beside: Path
    hardware: Hardware
    clock: Callable[[], float]
    on_progress: Callable[[str], None]

    @cached_property
    def train(self) -> Voted:
        return load_votes([self._table(TRAIN)])

    @cached_property
    def check(self) -> Voted:
        return load_votes([self._table(VAL)])

    def folder(self, job: Job) -> Path:
        return run_folder(self.out, job.recipe.name, job.seed)

    def network(self, name: str) -> NetworkRecipe:
        """The recipe of that name; RecipeError where it makes no network."""
        recipe = load_expression_recipe(named(name, self.beside))
        if not isinstance(recipe, NetworkRecipe):
            raise RecipeError(
                f"recipe {name}: method {recipe.method} makes no network; expected one that does"
            )
        return recipe

    def needs(self, job: Job) -> list[Job]:
        """What must be finished first: the first seed of a start and of a teacher, a part's own seed."""
        found = [self.network(name) for name in job.recipe.needs]
        if isinstance(job.recipe, NetworkRecipe):
            return [Job(recipe, recipe.seeds[0]) for recipe in found]
        for recipe in found:
            if job.seed not in recipe.seeds:
                raise RecipeError(f"recipe {job.recipe.name}: seeds: {job.seed}, which {recipe.name} has not")
        return [Job(recipe, job.seed) for recipe in found]

    def _table(self, name: str) -> Path:
        path = self.data / name
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; expected in the folder of --data: {TRAIN}, {VAL} and the mosaics "
                "that they name (docs/expression.md)"
            )
        return path


def train_expression(
    recipe_path: Path,
    out: Path,
    data: Path,
    *,
    threads: int,
    device: str,
    precision: str,
    on_progress: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Train what a recipe says below `out`, or go on where that was interrupted; returns what was found.

    Every seed leaves its run in `out/NAME/seed-N`; method `all` then leaves the networks to ship in
    `out/models` and the tables in `out/report.md` and `.json` (`detectors.training.expression.ship`). Raises
    RecipeError, DataError, HardwareError, UnfinishedError, and what `loop.fit` raises.
    """
    recipe = load_expression_recipe(recipe_path)
    shop = Shop(out, data, recipe_path.parent, choose_hardware(device, precision), clock, on_progress)
    torch.set_num_threads(threads)
    keep_freed_memory()
    make_deterministic()
    recipes = _recipes(recipe, shop)
    _work(jobs_of(recipes), shop, sleep)
    if isinstance(recipe, AllRecipe):
        from detectors.training.expression.ship import publish

        with _locked(out) as free:
            if free:
                return publish(shop.out, recipes, shop.check, on_progress)
        on_progress("another process writes the report")
        return {}
    return {str(seed): _record(shop.folder(Job(recipe, seed))) for seed in recipe.seeds}


def _recipes(recipe: Trainable | AllRecipe, shop: Shop) -> list[Trainable]:
    if not isinstance(recipe, AllRecipe):
        return [recipe]
    found = []
    for name in recipe.runs:
        one = load_expression_recipe(named(name, shop.beside))
        if isinstance(one, AllRecipe):
            raise RecipeError(f"recipe {recipe.name}: runs: {name} is of method all itself; expected others")
        found.append(one)
    return found


def jobs_of(recipes: list[Trainable]) -> list[Job]:
    """The first seed of every recipe before the second of any: the table is whole early, then sharper."""
    rounds = max(len(one.seeds) for one in recipes)
    return [Job(one, one.seeds[n]) for n in range(rounds) for one in recipes if n < len(one.seeds)]


def _work(jobs: list[Job], shop: Shop, sleep: Callable[[float], None]) -> None:
    """Do all jobs; what another process works on, or what needs that, is waited for."""
    left, waited = jobs, False
    while left:
        busy = False
        still: list[Job] = []
        for job in left:
            with _locked(shop.folder(job)) as free:
                if loop.is_finished(shop.folder(job)):
                    _check_same(job, shop)
                    continue
                if free and all(loop.is_finished(shop.folder(need)) for need in shop.needs(job)):
                    _do(job, shop)
                    continue
            busy |= not free
            still.append(job)
        if len(still) == len(left):
            _check_possible(still, shop, busy)
            if not waited:
                shop.on_progress(f"{still[0]}: waiting for what another process works on")
            waited = True
            sleep(POLL_S)
        left = still


def _check_possible(jobs: list[Job], shop: Shop, busy: bool) -> None:
    """Raises UnfinishedError when waiting will not help: nobody makes what is needed."""
    for job in jobs:
        for need in shop.needs(job):
            if busy or loop.is_finished(shop.folder(need)):
                continue
            with _locked(shop.folder(need)) as free:
                if free:
                    raise UnfinishedError(
                        f"{job} needs {need}, which is not finished in {shop.out}: run `unmask train "
                        f"{need.recipe.name} --data {shop.data} --out {shop.out}` first"
                    )


def _check_same(job: Job, shop: Shop) -> None:
    loop.check_recipe(shop.folder(job), job.recipe)


def _do(job: Job, shop: Shop) -> None:
    shop.on_progress(f"{job}: begun")
    if isinstance(job.recipe, NetworkRecipe):
        _train(job.recipe, job.seed, shop)
    else:
        _combine(job.recipe, job.seed, shop)
    shop.on_progress(f"{job}: finished")


def _train(recipe: NetworkRecipe, seed: int, shop: Shop) -> None:
    loop.check_recipe(shop.folder(Job(recipe, seed)), recipe)
    torch.manual_seed(seed)
    network = ExpressionNetwork(recipe.backbone, recipe.dropout)
    if recipe.start == IMAGENET:
        load_imagenet(network)
    else:
        before = shop.network(recipe.start)
        network.load_state_dict(trained(shop.out, before, before.seeds[0]).network.state_dict())
    told = None
    if recipe.teacher is not None:
        shop.on_progress(f"{recipe.name}: what {recipe.teacher} says of the training pictures")
        told = taught(shop.out, shop.network(recipe.teacher), shop.hardware.device, shop.train)
    lesson = loop.lesson(recipe, shop.train, shop.check, told)
    folder = run_folder(shop.out, recipe.name, seed)
    loop.fit(
        recipe,
        seed,
        folder,
        lesson,
        network,
        shop.hardware,
        clock=shop.clock,
        on_progress=shop.on_progress,
        at_end=lambda: _answer(recipe, seed, shop),
    )


def _answer(recipe: NetworkRecipe, seed: int, shop: Shop) -> None:
    """Keep what a trained network says of the validation pictures: the teacher also of covered ones."""
    model = trained(shop.out, recipe, seed)
    images, _ = agreed_only(shop.check)
    views = (Visible.BOTH, Visible.LOWER, Visible.UPPER) if recipe.reads == Visible.BOTH else (recipe.reads,)
    folder = run_folder(shop.out, recipe.name, seed)
    keep_answers(folder, {view: model.read(images, view).logits for view in views})


def _combine(recipe: CombinedRecipe, seed: int, shop: Shop) -> None:
    """Fit the SVM at every cost; keep the best one, and answers each half of which the other half chose."""
    folder, parts = (
        run_folder(shop.out, recipe.name, seed),
        tuple(shop.network(name) for name in recipe.parts),
    )
    if wrong := [part.name for part in parts if part.reads != recipe.reads]:
        raise RecipeError(f"recipe {recipe.name}: parts: {wrong[0]} does not read {recipe.reads}, as it does")
    begun = shop.clock()
    images, labels = agreed_only(shop.train)
    features = embeddings(shop.out, parts, seed, images)
    check_images, check_labels = agreed_only(shop.check)
    check = embeddings(shop.out, parts, seed, check_images)
    fitted = {cost: fit_svm(features, labels, cost) for cost in recipe.costs}
    right = {cost: svm.scores(check).argmax(1) == check_labels for cost, svm in fitted.items()}
    for cost, hits in right.items():
        shop.on_progress(f"{recipe.name} seed {seed}: cost {cost:g}: val accuracy {hits.mean():.4f}")
    even = np.arange(len(check)) % 2 == 0
    by_other = {
        half: max(recipe.costs, key=lambda cost: float(right[cost][~chosen].mean()))
        for half, chosen in ((True, even), (False, ~even))
    }
    answers = np.where(even[:, None], *(fitted[by_other[half]].scores(check) for half in (True, False)))
    keep_answers(folder, {recipe.reads: answers.astype(np.float32)})
    best = max(recipe.costs, key=lambda cost: float(right[cost].mean()))
    save_file(
        {"weight": torch.from_numpy(fitted[best].weight), "bias": torch.from_numpy(fitted[best].bias)},
        folder / SVM,
    )
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "seed": seed,
        "finished": True,
        "cost": best,
        "val_accuracy": {f"{cost:g}": float(hits.mean()) for cost, hits in right.items()},
        "val_accuracy_cross_fitted": loop.accuracy(answers, check_labels),
        "minutes": (shop.clock() - begun) / 60,
    }
    loop.write_record(folder, record)


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / loop.RECORD).read_text())
    return record


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process may work in a folder for now; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
