"""A training recipe: every choice that shapes the weights, read from YAML and checked."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from detectors.backbones import Architecture
from detectors.crops import IMAGENET_MEAN, IMAGENET_STD, CropPolicy
from detectors.training.blends import Family
from detectors.training.data import DFDC, Mix


class RecipeError(ValueError):
    """A recipe that cannot be trained; names the file, the field and what would be right."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Fields as in `recipes/lite0-att-dfdc.yaml`, which says what each is for."""

    name: str
    version: str
    backbone: str
    attention_block: int
    dropout: float
    mirrored: bool
    crop: CropPolicy
    seed: int
    epochs: float
    budget_minutes: float | None
    start: str
    pairs: dict[str, int]
    sources: dict[str, float]
    views: tuple[float, float]
    min_width: int
    mask_weight: float
    learning_rate: float
    warmup: float
    weight_decay: float
    label_smoothing: float
    pair_weight: float
    ema_decay: float
    early_epoch: int
    early_share: float

    def architecture(self) -> Architecture:
        return Architecture(self.backbone, self.attention_block, self.dropout, self.mirrored)

    def mix(self) -> Mix:
        """What a batch is made of."""
        families = {Family(name): count for name, count in self.pairs.items() if name != DFDC}
        return Mix(self.pairs.get(DFDC, 0), families, self.sources, self.views)

    @property
    def authentic(self) -> tuple[str, ...]:
        """Sources of authentic faces beside DFDC."""
        return tuple(name for name in self.sources if name != DFDC)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


POSITIVE = ("epochs", "learning_rate", "early_epoch")
SHARES = ("dropout", "warmup", "label_smoothing", "ema_decay", "early_share")


def load_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe; RecipeError for a missing, unknown or impossible field."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected a mapping of fields")
    known = {field.name for field in fields(Recipe)}
    if unknown := set(raw) - known:
        raise RecipeError(f"{path}: {min(unknown)}: unknown field; known are {', '.join(sorted(known))}")
    if missing := known - set(raw):
        raise RecipeError(f"{path}: {min(missing)}: missing")
    policy = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | raw["crop"]
    typed = {"crop": CropPolicy.from_json(policy), "views": tuple(raw["views"])}
    recipe = Recipe(**(raw | typed))
    for name in POSITIVE:
        if getattr(recipe, name) <= 0:
            raise RecipeError(f"{path}: {name}: {getattr(recipe, name)}, expected more than 0")
    for name in SHARES:
        if not 0 <= getattr(recipe, name) < 1:
            raise RecipeError(f"{path}: {name}: {getattr(recipe, name)}, expected 0 <= {name} < 1")
    known_pairs = {DFDC, *Family}
    if not recipe.pairs or set(recipe.pairs) - known_pairs or min(recipe.pairs.values()) < 1:
        raise RecipeError(
            f"{path}: pairs: {recipe.pairs}, expected counts above 0 of {', '.join(sorted(known_pairs))}"
        )
    if set(recipe.pairs) != {DFDC} and not recipe.sources:
        raise RecipeError(f"{path}: sources: none, expected some where `pairs` names pseudo-fakes")
    return recipe
