"""Do some people get more false alarms than others? A check by group, after InsideBias.

Source: Serna et al., "InsideBias: Measuring Bias in Deep Networks and Application to Face Gender Biometrics":
a network that learned a group badly activates less for it, which shows from about 15 images. Here: the mean
of a member's pooled features over authentic faces of each group, and the least of them divided by the
greatest (1 is equal); beside it what counts in the end, false positives, coverage and recall of the decided
verdict.

Groups: thirds by brightness of the skin, and sex where the user gives labels. Brightness of skin in a picture
is complexion and light together; nothing here tells one from the other.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detectors.members import BATCH, Member
from detectors.readings import Image
from detectors.training.data import DataError
from detectors.training.explain import inputs
from detectors.training.probes import Probe
from detectors.training.robustness import Decision, Rate, bootstrapped, mean, share, told

CHEEKS = ((0.18, 0.34), (0.66, 0.82))
CHEEK_ROWS = (0.50, 0.66)
"""The inner cheeks as shares of a tight crop's side: between eye line and mouth line, beside the nose.
Neither hair, brows, beard nor most glasses reach there on a frontal face."""
LUMA = np.array([0.299, 0.587, 0.114])
FEWEST = 15
"""Images of a group below which its activation says nothing (InsideBias)."""
THIRDS = ("dark third", "middle third", "bright third")


@dataclass(frozen=True, slots=True)
class Group:
    """One group's figures. `authentic` and `manipulated` count crops, `people` those of the authentic ones;
    `logit` is the authentic crops' mean; `few` says that there are too few to rest on."""

    name: str
    authentic: int
    manipulated: int
    people: int
    activation: Rate
    logit: Rate
    false_positives: Rate
    coverage: Rate
    recall: Rate
    few: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Check:
    """Groups that divide the crops by one thing. `ratio`: the least mean activation over the greatest, NaN
    when only one group has enough crops."""

    by: str
    groups: Sequence[Group]
    ratio: Rate

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def skin_brightness(image: Image) -> float:
    """Median grey level, 0..255, of the inner cheeks of a tight crop; the brighter cheek is in light, the
    darker in shade, and both count alike."""
    height, width = image.shape[:2]
    top, bottom = (round(edge * height) for edge in CHEEK_ROWS)
    cheeks = [image[top:bottom, round(left * width) : round(right * width)] for left, right in CHEEKS]
    return float(np.mean([np.median(cheek.reshape(-1, 3) @ LUMA) for cheek in cheeks]))


def thirds(values: Sequence[float], of: NDArray[np.bool_]) -> NDArray[np.int64]:
    """0, 1 or 2 for each value, by the tertiles of those in `of` (the authentic ones, so that manipulation
    moves no border)."""
    levels = np.asarray(values, np.float64)
    edges = np.quantile(levels[of], (1 / 3, 2 / 3)) if of.any() else np.zeros(2)
    return np.searchsorted(edges, levels, side="right").astype(np.int64)


def read_sexes(path: Path) -> dict[str, str]:
    """Labels by crop name from a CSV with columns `name` and `sex`, in the user's own words.

    Raises DataError for a missing file or column.
    """
    try:
        with path.open(newline="") as file:
            return {row["name"]: row["sex"].strip() for row in csv.DictReader(file) if row["sex"].strip()}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (KeyError, AttributeError):
        raise DataError(f"{path}: expected the columns name,sex") from None


def activations(member: Member, probes: Sequence[Probe]) -> NDArray[np.float64]:
    """Mean of the member's pooled features of each crop, float64 [N]: what InsideBias compares."""
    means = []
    for start in range(0, len(probes), BATCH):
        part = probes[start : start + BATCH]
        faces = inputs([probe.image for probe in part], member.policy)
        with torch.inference_mode():
            features: Tensor = member.module.features(faces)  # type: ignore[operator]
        means.append(features.mean(1).double().numpy())
    return np.concatenate(means) if means else np.empty(0)


def check(
    by: str,
    names: Sequence[str | None],
    probes: Sequence[Probe],
    activation: NDArray[np.float64],
    logits: NDArray[np.floating],
    said: Sequence[Decision],
) -> Check:
    """Figures of every group named in `names` (one entry a crop, None for a crop of no group).

    `activation`, `logits` and `said` are of the same crops, one each.
    """
    labels = np.array([probe.label for probe in probes])
    identity = np.array([probe.identity for probe in probes])
    order = sorted({name for name in names if name is not None}, key=_place)
    inside = {name: np.array([one == name for one in names]) for name in order}
    groups = [_group(name, inside[name], labels, identity, activation, logits, said) for name in order]
    enough = [inside[group.name] & (labels == 0) for group in groups if not group.few]
    return Check(by, groups, _ratio(enough, activation, identity))


def _group(
    name: str,
    inside: NDArray[np.bool_],
    labels: NDArray[np.int64],
    identity: NDArray[np.int64],
    activation: NDArray[np.float64],
    logits: NDArray[np.floating],
    said: Sequence[Decision],
) -> Group:
    authentic, manipulated = inside & (labels == 0), inside & (labels == 1)
    accused = np.array([decision is Decision.MANIPULATED for decision in said])
    decided = np.array([decision is not Decision.INCONCLUSIVE for decision in said])
    return Group(
        name=name,
        authentic=int(authentic.sum()),
        manipulated=int(manipulated.sum()),
        people=len(np.unique(identity[authentic])),
        activation=mean(activation[authentic], identity[authentic]),
        logit=mean(logits[authentic], identity[authentic]),
        false_positives=share(accused, authentic, identity),
        coverage=share(decided, inside, identity),
        recall=share(accused, manipulated, identity),
        few=int(authentic.sum()) < FEWEST,
    )


def _ratio(
    inside: Sequence[NDArray[np.bool_]], activation: NDArray[np.float64], identity: NDArray[np.int64]
) -> Rate:
    if len(inside) < 2:
        return Rate(float("nan"), float("nan"), float("nan"))

    def least_over_greatest(i: NDArray[np.integer]) -> float:
        means = [activation[i][group[i]].mean() for group in inside if group[i].any()]
        return float(min(means) / max(means)) if len(means) == len(inside) else float("nan")

    return bootstrapped(least_over_greatest, identity)


def table(checks: Mapping[str, Sequence[Check]]) -> list[str]:
    """By name of what judged (members, the ensemble), as lines of Markdown."""
    lines = [
        "| judged by | group | authentic crops (people) | mean activation | mean logit, authentic "
        "| false positives | coverage | recall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for judge, found in checks.items():
        for one in found:
            lines += [_line(judge, group) for group in one.groups]
            lines.append(
                f"| {judge} | by {one.by}: least activation over greatest | | {told(one.ratio)} | | | | |"
            )
    if any(group.few for found in checks.values() for one in found for group in one.groups):
        lines.append(f"\n(!) fewer than {FEWEST} authentic crops: too few to say anything about this group.")
    return lines


def _line(judge: str, group: Group) -> str:
    name = f"{group.name} (!)" if group.few else group.name
    return (
        f"| {judge} | {name} | {group.authentic} ({group.people}) | {told(group.activation)} "
        f"| {told(group.logit)} | {told(group.false_positives)} | {told(group.coverage)} "
        f"| {told(group.recall)} |"
    )


def _place(name: str) -> tuple[int, str]:
    return (THIRDS.index(name) if name in THIRDS else len(THIRDS), name)
