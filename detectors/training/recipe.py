"""A training recipe: every choice that shapes the weights, read from YAML and checked."""

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from detectors.backbones import HALVES, Architecture
from detectors.crops import IMAGENET_MEAN, IMAGENET_STD, CropPolicy
from detectors.readings import Visible
from detectors.training.blends import Family
from detectors.training.bridge import Positive
from detectors.training.data import DFDC, Mix
from detectors.training.losses import RECOGNITION_SCALE
from detectors.training.start import IMAGENET


class RecipeError(ValueError):
    """A recipe that cannot be trained; names the file, the field and what would be right."""


class Mode(StrEnum):
    """What is trained.

    pairs: cross-entropy, and each manipulated crop above its own original. binary: one loss of the logit
    alone. triplet: the features, by distances; head: BatchNorm1d and Linear over the frozen features of a
    triplet run. half: pairs, of which the network sees half a crop and learns from teachers that see all of
    it (`detectors.training.bridge`). average: nothing; the mean of several runs' weights is measured and
    exported.
    """

    PAIRS = "pairs"
    BINARY = "binary"
    TRIPLET = "triplet"
    HEAD = "head"
    HALF = "half"
    AVERAGE = "average"


class Loss(StrEnum):
    """Of the logit, in mode binary."""

    CROSS_ENTROPY = "cross_entropy"
    AM_SOFTMAX = "am_softmax"
    ARCFACE = "arcface"


class Triplets(StrEnum):
    """Which triplets a batch gives."""

    RANDOM = "random"
    BATCH_HARD = "batch_hard"


class Schedule(StrEnum):
    """Of the learning rate: up and down once over the epochs, or down when validation no longer improves."""

    ONE_CYCLE = "one_cycle"
    PLATEAU = "plateau"


class Optimizer(StrEnum):
    """`sgd` has momentum .9."""

    ADAMW = "adamw"
    ADAM = "adam"
    SGD = "sgd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Fields as docs/training.md says. Those with a default belong to some modes or schedules only, and the
    default is what the others do."""

    name: str
    version: str
    backbone: str
    attention_block: int | None
    dropout: float
    mirrored: bool
    crop: CropPolicy
    mode: Mode = Mode.PAIRS
    average: tuple[str, ...] = ()
    seed: int = 0
    start: str = ""
    pairs: dict[str, int]
    sources: dict[str, float]
    views: tuple[float, float] = (1.0, 1.0)
    min_width: int = 0
    degraded: bool = True
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    optimizer: Optimizer = Optimizer.ADAMW
    sam_rho: float = 0.0
    schedule: Schedule = Schedule.ONE_CYCLE
    epochs: float = 0.0
    budget_minutes: float | None = None
    warmup: float = 0.0
    ema_decay: float = 0.0
    early_epoch: int = 0
    early_share: float = 0.0
    iterations: int = 0
    validate_every: int = 0
    patience: int | None = None
    loss: Loss = Loss.CROSS_ENTROPY
    label_smoothing: float = 0.0
    pair_weight: float = 0.0
    mask_weight: float = 0.0
    teachers: tuple[str, ...] = ()
    distil_temperature: float = 1.0
    distil_weight: float = 0.0
    triplets: Triplets = Triplets.RANDOM
    margin: float = 0.0
    half: Visible | None = None
    bridge_weight: float = 0.0
    positive: Positive = Positive.SAME_FACE

    def architecture(self) -> Architecture:
        return Architecture(
            self.backbone,
            self.attention_block,
            self.dropout,
            self.mirrored,
            siamese=self.mode in (Mode.TRIPLET, Mode.HEAD),
            cosine_range=None if self.loss is Loss.CROSS_ENTROPY else 2 * RECOGNITION_SCALE,
            half=self.half,
        )

    def mix(self) -> Mix:
        """What a batch is made of."""
        families = {Family(name): count for name, count in self.pairs.items() if name != DFDC}
        return Mix(self.pairs.get(DFDC, 0), families, self.sources, self.views, self.degraded)

    @property
    def authentic(self) -> tuple[str, ...]:
        """Sources of authentic faces beside DFDC."""
        return tuple(name for name in self.sources if name != DFDC)

    def to_json(self) -> dict[str, Any]:
        """Every field; later ones only where they say something, so that a checkpoint from before them is
        still its recipe's."""
        record = asdict(self)
        if self.mode is not Mode.HALF:
            for name in LATER:
                del record[name]
        if self.degraded:
            del record["degraded"]
        return record


LATER = ("half", "bridge_weight", "positive")
EVERY = {"name", "version", "backbone", "attention_block", "dropout", "mirrored", "crop"}
TRAINED = {"seed", "start", "pairs", "sources", "views", "min_width", "learning_rate", "weight_decay"}
CHOICES = {"mode", "schedule", "optimizer", "sam_rho", "degraded"}
"""Every training may have them, none must."""
TEACHING = {"teachers", "distil_temperature", "distil_weight"}
"""Optional, but all or none."""
OF_MODE = {
    Mode.PAIRS: {"label_smoothing", "pair_weight", "mask_weight"},
    Mode.BINARY: {"label_smoothing", "loss"},
    Mode.TRIPLET: {"triplets", "margin"},
    Mode.HEAD: {"label_smoothing"},
    Mode.HALF: {"label_smoothing", "pair_weight", "half", "bridge_weight", "margin", *TEACHING},
}
OF_SCHEDULE = {
    Schedule.ONE_CYCLE: {"epochs", "budget_minutes", "warmup", "ema_decay", "early_epoch", "early_share"},
    Schedule.PLATEAU: {"iterations", "validate_every"},
}
POSITIVE = (
    "epochs", "learning_rate", "early_epoch", "iterations", "validate_every", "margin", "sam_rho",
    "distil_temperature", "patience",
)  # fmt: skip
SHARES = ("dropout", "warmup", "label_smoothing", "ema_decay", "early_share", "distil_weight")
WEIGHTS = ("pair_weight", "mask_weight", "bridge_weight", "weight_decay", "min_width")
E = TypeVar("E", bound=StrEnum)


def load_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe; RecipeError for a missing, unknown or impossible field."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected a mapping of fields")
    try:
        return _recipe(raw)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error


def _recipe(raw: dict[str, Any]) -> Recipe:
    choices = {
        "mode": _choice(raw, "mode", Mode.PAIRS),
        "schedule": _choice(raw, "schedule", Schedule.ONE_CYCLE),
        "optimizer": _choice(raw, "optimizer", Optimizer.ADAMW),
        "loss": _choice(raw, "loss", Loss.CROSS_ENTROPY),
        "triplets": _choice(raw, "triplets", Triplets.RANDOM),
        "positive": _choice(raw, "positive", Positive.SAME_FACE),
    }
    _check_fields(raw, Mode(choices["mode"]), Schedule(choices["schedule"]))
    _check_numbers(raw)
    policy = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | raw["crop"]
    values: dict[str, Any] = {"pairs": {}, "sources": {}} | raw | choices
    if "half" in raw:
        values["half"] = _half(raw["half"])
    values |= {name: tuple(raw[name]) for name in ("views", "teachers", "average") if name in raw}
    recipe = Recipe(**values | {"crop": CropPolicy.from_json(policy)})
    _check_mix(recipe)
    return recipe


def _choice(raw: dict[str, Any], name: str, default: E) -> E:
    try:
        return type(default)(raw.get(name, default))
    except ValueError as error:
        raise RecipeError(f"{name}: {raw[name]!r}, expected one of {', '.join(type(default))}") from error


def _half(given: Any) -> Visible:
    if given not in HALVES:
        raise RecipeError(f"half: {given!r}, expected {' or '.join(HALVES)}")
    return Visible(given)


def _check_fields(raw: dict[str, Any], mode: Mode, schedule: Schedule) -> None:
    known = {field.name for field in fields(Recipe)}
    if unknown := set(raw) - known:
        raise RecipeError(f"{min(unknown)}: unknown field; known are {', '.join(sorted(known))}")
    if mode is Mode.AVERAGE:
        needed, allowed = EVERY | {"average"}, {"mode"}
    else:
        needed = EVERY | TRAINED | OF_MODE[mode] | OF_SCHEDULE[schedule]
        allowed = CHOICES | (TEACHING if mode in (Mode.PAIRS, Mode.BINARY) else set())
        allowed |= {"positive"} if mode is Mode.HALF else set()
        allowed |= {"patience"} if schedule is Schedule.PLATEAU else set()
    if foreign := set(raw) - needed - allowed:
        raise RecipeError(f"{min(foreign)}: no field of mode {mode} with schedule {schedule}")
    if TEACHING & set(raw):
        needed |= TEACHING
    if missing := needed - set(raw):
        raise RecipeError(f"{min(missing)}: missing; mode {mode} with schedule {schedule} needs it")


def _check_numbers(raw: dict[str, Any]) -> None:
    for name in (*POSITIVE, *SHARES, *WEIGHTS):
        value = raw.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RecipeError(f"{name}: {value!r}, expected a number (in YAML 1.0e-5, with a point)")
    if not isinstance(raw.get("degraded", True), bool):
        raise RecipeError(f"degraded: {raw['degraded']!r}, expected true or false")
    for name in POSITIVE:
        if name in raw and not raw[name] > 0:
            raise RecipeError(f"{name}: {raw[name]}, expected more than 0")
    for name in SHARES:
        if name in raw and not 0 <= raw[name] < 1:
            raise RecipeError(f"{name}: {raw[name]}, expected 0 <= {name} < 1")
    for name in WEIGHTS:
        if name in raw and not raw[name] >= 0:
            raise RecipeError(f"{name}: {raw[name]}, expected 0 or more")


def _check_mix(recipe: Recipe) -> None:
    if recipe.mode is Mode.AVERAGE:
        if len(recipe.average) < 2:
            raise RecipeError(f"average: {list(recipe.average)}, expected two files of weights or more")
        return
    known = {DFDC, *Family}
    if not recipe.pairs or set(recipe.pairs) - known or min(recipe.pairs.values()) < 1:
        raise RecipeError(
            f"pairs: {recipe.pairs}, expected counts above 0 for some of {', '.join(sorted(known))}"
        )
    if set(recipe.pairs) != {DFDC} and not recipe.sources:
        raise RecipeError("sources: none, expected some where `pairs` names pseudo-fakes")
    if recipe.triplets is Triplets.RANDOM and recipe.mode is Mode.TRIPLET and recipe.mix().pairs % 3:
        raise RecipeError(
            f"pairs: {recipe.mix().pairs} a batch, expected a multiple of 3, so that each crop has a triplet"
        )
    if recipe.mode is Mode.HEAD and recipe.start == IMAGENET:
        raise RecipeError("start: imagenet, expected the weights that a run of mode triplet left")
