"""Recipes of expression networks: every choice, read from YAML and checked."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from detectors.expression import SIDE, Method
from detectors.readings import Visible
from detectors.training.recipe import RecipeError, Triplets
from detectors.training.start import IMAGENET

TASK = "expression"
"""How a recipe says that it is one of these."""

SHIPPED_RECIPES = Path(__file__).parents[1] / "recipes"

Seen = Literal[Visible.BOTH, Visible.UPPER, Visible.LOWER]
Above = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
"""Of a recipe: also its folder's name below `--out`."""


class Labels(StrEnum):
    """What a network is told of a picture on which ten people voted: how they voted, what most of them said
    (only of pictures on which they agree), or one vote drawn anew each time."""

    DISTRIBUTION = "distribution"
    MAJORITY = "majority"
    PROBABILISTIC = "probabilistic"


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["expression"]
    name: Name


class NetworkRecipe(_Fields):
    """One network, trained once for each of `seeds`. `reads` is what it sees of a face.

    `start`: imagenet, or the recipe whose network (of its first seed) it goes on from. `sizes`: side of a
    whole face in pixels; the schedule is shared evenly among them, so that it begins with quick steps. Half a
    face is half as high. `teacher`, for the methods that have one: its recipe.
    """

    method: Literal[Method.TEACHER, Method.OCCLUSION_TRAINED, Method.DISTILLED, Method.TRIPLET]
    reads: Seen
    labels: Labels
    backbone: str
    start: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    batch: Annotated[int, Field(ge=2)]
    sizes: Annotated[tuple[int, ...], Field(min_length=1)]
    epochs: Above
    budget_minutes: Above | None
    learning_rate: Above
    weight_decay: Annotated[float, Field(ge=0)]
    warmup: Part
    ema_decay: Part
    dropout: Part
    teacher: Name | None = None
    distil_weight: Part | None = None
    distil_temperature: Above | None = None
    triplets: Triplets | None = None
    triplet_weight: Above | None = None
    margin: Above | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needed = {
            Method.DISTILLED: {"teacher", "distil_weight", "distil_temperature"},
            Method.TRIPLET: {"teacher", "triplets", "triplet_weight", "margin"},
        }.get(self.method, set())
        for name in (
            "teacher",
            "distil_weight",
            "distil_temperature",
            "triplets",
            "triplet_weight",
            "margin",
        ):
            if (getattr(self, name) is not None) != (name in needed):
                verb = "missing" if name in needed else "not a field"
                raise ValueError(f"{name}: {verb} of method {self.method}")
        if (self.method is Method.TEACHER) != (self.reads is Visible.BOTH):
            raise ValueError(f"reads: {self.reads}; a teacher reads both halves, every other method one")
        if bad := [size for size in self.sizes if size < SIDE or size % 2]:
            raise ValueError(f"sizes: {bad[0]}; expected even numbers from {SIDE} on")
        return self

    @property
    def size(self) -> int:
        """The one it ends with, and is read at."""
        return self.sizes[-1]

    @property
    def needs(self) -> tuple[str, ...]:
        """Recipes that must be finished first."""
        named = [self.start if self.start != IMAGENET else None, self.teacher]
        return tuple(dict.fromkeys(name for name in named if name is not None))


class CombinedRecipe(_Fields):
    """A linear SVM over the embeddings of the networks of `parts`, seed by seed.

    `costs`: how dear an error is against a small weight, to choose from on validation pictures.
    """

    method: Literal[Method.COMBINED]
    reads: Literal[Visible.UPPER, Visible.LOWER]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    parts: Annotated[tuple[Name, ...], Field(min_length=2)]
    costs: Annotated[tuple[Above, ...], Field(min_length=1)]

    @property
    def needs(self) -> tuple[str, ...]:
        return self.parts


class AllRecipe(_Fields):
    """Several recipes, in order; then the networks to ship and the report."""

    method: Literal["all"]
    runs: Annotated[tuple[Name, ...], Field(min_length=1)]


ExpressionRecipe = NetworkRecipe | CombinedRecipe | AllRecipe
_READER: TypeAdapter[ExpressionRecipe] = TypeAdapter(
    Annotated[NetworkRecipe | CombinedRecipe | AllRecipe, Field(discriminator="method")]
)


def is_expression(path: Path) -> bool:
    """Whether a file is one of these recipes; False also for what is no recipe at all."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(raw, dict) and raw.get("task") == TASK


def load_expression_recipe(path: Path) -> ExpressionRecipe:
    """Read and check a recipe; RecipeError names the file, the field and what would be right."""
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe = _READER.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "recipe"
        raise RecipeError(f"{path}: {where}: {first['msg']}, not {first['input']!r}") from error
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if recipe.name != path.stem:
        raise RecipeError(f"{path}: name: {recipe.name!r}, expected {path.stem!r}, as the file is called")
    return recipe


def named(name: str, beside: Path) -> Path:
    """The file of a recipe that another one (in the folder `beside`) names: there, or a shipped one."""
    for path in (beside / f"{name}.yaml", SHIPPED_RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise RecipeError(f"recipe {name}: no {name}.yaml in {beside}, and none of that name is shipped")
