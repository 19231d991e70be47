"""Trains the occlusion estimate: `python -m detectors.training.occlusion --data DIR --cache DIR`.

Faces of both classes alike, from DFDC's train split and the other sources, with drawn occluders of the kinds
that may train. Measured on validation people and held-out faces under kinds and draws that it never saw. A
minute of one core; writes `detectors/occlusion.json`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from detectors.crops import CropPolicy
from detectors.occlusion import ARRAYS, FEATURES, FILE, POLICY, SCHEMA, Estimate, features_of
from detectors.readings import Visible
from detectors.training.augment import apply, draw
from detectors.training.data import load_authentic, load_faces, resized
from detectors.training.metrics import auc
from detectors.training.occluders import (
    HELD_OUT,
    HIDDEN_FROM,
    SEEN_UNTIL,
    TRAINED,
    Occluder,
    cover,
    hidden_shares,
    random_occluder,
)
from detectors.training.people import share

SEED = 71
FACES = 2600
"""Of DFDC, beside those of the other sources."""
EACH = 4
"""Draws a face: uncovered, with anything anywhere, with its lower and with its upper half hidden."""
DRAWN_PX = 80
"""Side at which occluders are drawn: more than the estimate sees, and cheap."""
SOURCES = ("lfw_faces", "wide_faces")
UNITS = 24
STEPS = 500
BATCH = 512
WEIGHT_DECAY = 0.05
RATE = 3e-3
FALSE_COVERED = 0.01
"""Of uncovered faces in the worst source, taken for covered: their verdict is what it would cost."""
CHECKED = 800
"""Validation faces of DFDC that it is measured on."""


@dataclass(frozen=True, slots=True)
class Examples:
    """`features` float32 [N, FEATURES]; `hidden` [N, 2] is 1 or 0 for the upper and the lower half, NaN where
    it is neither hidden nor seen; `person` a number per person [N]; `covered` whether anything was drawn."""

    features: NDArray[np.float32]
    hidden: NDArray[np.float32]
    person: NDArray[np.int64]
    covered: NDArray[np.bool_]


def examples(
    crops: NDArray[np.uint8], person: NDArray[np.int64], *, seed: int, held_out: bool, each: int = EACH
) -> Examples:
    """Draws on crops uint8 [N, S, S, 3], tightly framed, people by number [N]; `held_out` kinds or others.

    All of them are degraded, mildly, as training crops are.
    """
    rows = [
        (crop, int(who), turn, np.random.default_rng((seed, index, turn)))
        for index, (crop, who) in enumerate(zip(resized(crops, DRAWN_PX), person, strict=True))
        for turn in range(each)
    ]
    found = [_example(crop, turn, rng, held_out=held_out) for crop, _, turn, rng in rows]
    return Examples(
        np.stack([features for features, _, _ in found]),
        np.stack([hidden for _, hidden, _ in found]),
        np.array([who for _, who, _, _ in rows], np.int64),
        np.array([drawn for _, _, drawn in found]),
    )


def _example(
    crop: NDArray[np.uint8], turn: int, rng: np.random.Generator, *, held_out: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32], bool]:
    leaves = (None, None, Visible.UPPER, Visible.LOWER)[turn % EACH]
    occluder: Occluder | None = None
    if turn % EACH:
        occluder = random_occluder(rng, leaves, held_out=held_out)
        crop = cover(crop, occluder)
    degraded = draw(rng, DRAWN_PX, POLICY.size, mild=True)
    # H.264 of such small pictures costs more than all the rest, and a patch would be an unlabelled occluder
    seen = apply(crop, replace(degraded, crf=0, patch=None))
    if occluder is None:
        return features_of(seen), np.zeros(2, np.float32), False
    shares = np.array(hidden_shares(occluder), np.float32)
    hidden = np.where(shares >= HIDDEN_FROM, 1, np.where(shares <= SEEN_UNTIL, 0, np.nan))
    return features_of(seen), hidden.astype(np.float32), True


def fitted(train: Examples, *, seed: int = SEED, units: int = UNITS, steps: int = STEPS) -> Estimate:
    """One hidden layer by AdamW, cross-entropy of both answers where they are known; its margins' zero is
    where it came out. The same seed gives the same numbers on one machine."""
    mean, spread = train.features.mean(0), train.features.std(0)
    scale = 1 / np.maximum(spread, 1e-3)
    x = torch.from_numpy((train.features - mean) * scale).float()
    y = torch.from_numpy(train.hidden)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(FEATURES, units), nn.ReLU(), nn.Dropout(0.2), nn.Linear(units, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = torch.from_numpy(rng.integers(len(x), size=min(BATCH, len(x))))
        known = torch.isfinite(y[chosen])
        each = nn.functional.binary_cross_entropy_with_logits(
            net(x[chosen]), y[chosen].nan_to_num(), reduction="none"
        )
        loss = (each * known).sum() / known.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    first, last = net[0], net[3]
    numbers = [mean, scale, first.weight.T, first.bias, last.weight.T, last.bias]
    arrays = {
        name: np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, np.float64)
        for name, value in zip(ARRAYS, numbers, strict=True)
    }
    return Estimate(**arrays, record={})


def with_zero(estimate: Estimate, uncovered: Sequence[Examples], most: float = FALSE_COVERED) -> Estimate:
    """The estimate with each answer's zero moved to where `most` of the uncovered faces of the worst source
    lie above it; `uncovered` is one set a source and a state (as it is, degraded)."""
    margins = [estimate.margins(found.features[~found.covered]) for found in uncovered]
    zero = np.max([np.quantile(values, 1 - most, axis=0) for values in margins], axis=0)
    return replace(estimate, out_bias=estimate.out_bias - zero)


def measured(estimate: Estimate, found: Examples) -> dict[str, Any]:
    """What it is worth on these: AUC of each half, how often a hidden half is found (of people, with
    intervals), and how often with it the other one, that is seen; and `false_covered`."""
    margins = estimate.margins(found.features)
    report: dict[str, Any] = {"uncovered": false_covered(estimate, found)}
    other_too = []
    for k, name in enumerate(("upper", "lower")):
        known, hidden = np.isfinite(found.hidden[:, k]), found.hidden[:, k] == 1
        report[name] = {
            "auc": auc(margins[known, k], found.hidden[known, k].astype(np.int64)),
            "found": share(margins[hidden, k] > 0, found.person[hidden]),
        }
        other_too.append(margins[hidden, 1 - k] > 0)
    report["other_half_too"] = float(np.concatenate(other_too).mean())
    return report


def false_covered(estimate: Estimate, found: Examples) -> dict[str, float]:
    """How often a face behind nothing is taken for covered: of people, with intervals, and of crops."""
    plain = ~found.covered
    taken = np.asarray((estimate.margins(found.features[plain]) > 0).any(1), bool)
    return share(taken, found.person[plain]) | {"of_crops": float(taken.mean())}


def rounded(estimate: Estimate, digits: int = 4) -> Estimate:
    """With numbers as they are written; the margins move by less than .01."""
    return replace(estimate, **{name: np.round(getattr(estimate, name), digits) for name in ARRAYS})


def write(estimate: Estimate, path: Path) -> None:
    """What `detectors.occlusion.load_estimate` reads."""
    numbers = {name: getattr(estimate, name).tolist() for name in ARRAYS}
    record = {**estimate.record, "schema": SCHEMA, "numbers": numbers}
    path.write_text(json.dumps(record) + "\n")


def train(data_dir: Path, cache: Path, *, faces: int = FACES, seed: int = SEED) -> Estimate:
    """Everything of the module's first lines but the writing; `record` holds provenance and measurements."""
    policy = CropPolicy(POLICY.kind, size=2 * DRAWN_PX, side=POLICY.side, shift=POLICY.shift)
    rng = np.random.default_rng(seed)
    dfdc = load_faces(data_dir, cache, "train")
    chosen = np.sort(rng.choice(len(dfdc.labels), min(faces, len(dfdc.labels)), replace=False))
    others = [load_authentic(data_dir, cache, name, policy, held_out=False) for name in SOURCES]
    crops = [resized(dfdc.images[chosen], policy.size), *others]
    sets = [examples(one, np.arange(len(one)), seed=seed + k, held_out=False) for k, one in enumerate(crops)]
    estimate = fitted(_joined(sets), seed=seed)

    val = load_faces(data_dir, cache, "val")
    drawn = np.sort(rng.choice(len(val.labels), min(CHECKED, len(val.labels)), replace=False))
    checked = {"dfdc": (resized(val.images[drawn], policy.size), val.identity[drawn])}
    for name in SOURCES:
        held = load_authentic(data_dir, cache, name, policy, held_out=True)
        checked[name] = (held, np.arange(len(held)))
    new = {name: examples(*found, seed=seed + 100, held_out=True) for name, found in checked.items()}
    plain = {name: _uncovered(*found) for name, found in checked.items()}
    worse = [examples(*found, seed=seed + 200, held_out=False, each=1) for found in checked.values()]
    zeroed = rounded(with_zero(estimate, [*plain.values(), *worse]))
    record = {
        "made_by": "python -m detectors.training.occlusion",
        "data": f"{len(chosen)} DFDC train crops of both classes, "
        + ", ".join(f"{len(one)} of {name}" for one, name in zip(others, SOURCES, strict=True)),
        "seed": seed,
        "recipe": {"draws": EACH, "units": UNITS, "steps": STEPS, "batch": BATCH, "rate": RATE,
                   "weight_decay": WEIGHT_DECAY, "false_covered": FALSE_COVERED},
        "kinds": {"trained": list(TRAINED), "held_out": list(HELD_OUT)},
        "measured_on": "validation people, held-out faces, degraded, under kinds held out and other draws; "
        "the zero of both margins was set on the same people uncovered, in other draws",
        "measured": {name: measured(zeroed, found) for name, found in new.items()},
        "uncovered_as_they_are": {name: false_covered(zeroed, found) for name, found in plain.items()},
    }  # fmt: skip
    return replace(zeroed, record=record)


def _uncovered(crops: NDArray[np.uint8], person: NDArray[np.int64]) -> Examples:
    """The crops as they are, with nothing in front and no degradation."""
    features = np.stack([features_of(face) for face in resized(crops, POLICY.size)])
    return Examples(features, np.zeros((len(crops), 2), np.float32), person, np.zeros(len(crops), bool))


def _joined(sets: Sequence[Examples]) -> Examples:
    return Examples(
        np.concatenate([one.features for one in sets]),
        np.concatenate([one.hidden for one in sets]),
        np.concatenate([one.person for one in sets]),
        np.concatenate([one.covered for one in sets]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the occlusion estimate.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    estimate = train(given.data, given.cache)
    write(estimate, given.out)
    print(json.dumps(estimate.record["measured"], indent=1))


if __name__ == "__main__":
    main()
