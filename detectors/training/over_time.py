"""The cues over time, trained and measured: `python -m detectors.training.over_time --data DIR --cache DIR
--landmarks DIR --out DIR`.

Bursts are cut and followed (slow, resumable), then each cue is fitted without one person after the other and
judged on the person left out. Into --out go `eyes.json`, `ratios.json`, `motion.json` and
`motion.safetensors`, fitted on everybody; `over-time.json` with the measurement; and `readings.json`, the
left-out readings for `detectors.training.cues --readings`, which alone lets a cue have a say. To ship what
was trained, copy the first four into `detectors/cues/trained`.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detectors.cues.blink import blinks
from detectors.cues.burst import BLINK, EYES, MOTION, RATIOS
from detectors.training.bursts import BurstOf, labels, load_bursts, people
from detectors.training.eyes import eye_features, fit_eyes, fit_ratios
from detectors.training.metrics import auc, bootstrap_by_identity
from detectors.training.motion import fit_motion, logit_of, windows_of, write_motion

logger = logging.getLogger(__name__)


def trainable(bursts: Sequence[BurstOf]) -> list[BurstOf]:
    """Authentic bursts and the swaps simulated of them; clips that came manipulated only judge."""
    return [burst for burst in bursts if burst.kind != "manipulated"]


def eyes_without(bursts: Sequence[BurstOf], held: int | None) -> Any:
    """The eye machine fitted without one person (None: on all)."""
    rows = [(eye_features(b.series), b) for b in trainable(bursts) if b.person != held]
    kept = [(x, b) for x, b in rows if x is not None]
    return fit_eyes(
        np.stack([x for x, _ in kept]), labels([b for _, b in kept]), people([b for _, b in kept])
    )


def ratios_without(bursts: Sequence[BurstOf], held: int | None) -> Any:
    """The regression fitted without one person (None: on all)."""
    kept = [b for b in trainable(bursts) if b.person != held and len(b.series.ratios)]
    return fit_ratios(np.stack([b.series.ratios.mean(axis=0) for b in kept]), labels(kept))


def motion_without(bursts: Sequence[BurstOf], held: int | None) -> Any:
    """The network fitted without one person (None: on all)."""
    cut = [(windows_of(b.series), b.label) for b in trainable(bursts) if b.person != held]
    x = np.concatenate([windows for windows, _ in cut])
    y = np.concatenate([np.full(len(windows), label, np.int64) for windows, label in cut])
    return fit_motion(x, y)


def value_of(name: str, fitted: Any, burst: BurstOf) -> float:
    """What a cue says of a burst; NaN where it is missing."""
    series = burst.series
    if name == BLINK:
        found = blinks(series.seconds, series.numbers[:, :2])
        return np.nan if found is None else 60 * len(found.lengths) / max(found.seconds, 1e-3)
    if name == EYES:
        described = eye_features(series)
        return np.nan if described is None else float(fitted.log_odds(described))
    if name == RATIOS:
        found_ratios = series.ratios
        return float(fitted.log_odds(found_ratios.mean(axis=0))) if len(found_ratios) else np.nan
    cut = windows_of(series)
    net, mean, spread = fitted
    return logit_of(net, mean, spread, cut) if len(cut) else np.nan


FITS = {EYES: eyes_without, RATIOS: ratios_without, MOTION: motion_without}


def left_out(bursts: Sequence[BurstOf], folder: Path) -> dict[str, NDArray[np.float64]]:
    """Each cue's value of each burst, by what was fitted without its person; kept cue by cue in `folder`."""
    values: dict[str, NDArray[np.float64]] = {}
    for name in (BLINK, *FITS):
        path = folder / f"left-out-{name}.json"
        if path.exists():
            values[name] = np.array(json.loads(path.read_text()), np.float64)
            if len(values[name]) == len(bursts):
                continue
        logger.info("%s: fitting without one person after the other", name)
        found = np.full(len(bursts), np.nan)
        trained_on = {burst.person for burst in trainable(bursts)}
        whole = FITS[name](bursts, None) if name in FITS else None
        for person in sorted({burst.person for burst in bursts}):
            fitted = FITS[name](bursts, person) if name in FITS and person in trained_on else whole
            for index, burst in enumerate(bursts):
                if burst.person == person:
                    found[index] = value_of(name, fitted, burst)
        path.write_text(json.dumps([None if np.isnan(value) else value for value in found]))
        values[name] = found
    return values


def measured(bursts: Sequence[BurstOf], values: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """AUC of each cue against simulated swaps and against clips that came manipulated, with intervals over
    people; blinking is taken as manipulated where it is rare."""
    kind, person, label = np.array([b.kind for b in bursts]), people(bursts), labels(bursts)
    out: dict[str, Any] = {}
    for name, found in values.items():
        out[name] = {"missing": float(np.isnan(found).mean())}
        score = -found if name == BLINK else found
        for forged in ("simulated", "manipulated"):
            rows = np.flatnonzero(np.isin(kind, ["authentic", forged]) & ~np.isnan(found))
            if len(np.unique(label[rows])) < 2:
                continue

            def of(chosen: NDArray[np.integer], rows: Any = rows, score: Any = score) -> float:
                return auc(score[rows][chosen], label[rows][chosen])

            low, high = bootstrap_by_identity(of, person[rows])
            out[name][forged] = {
                "auc": of(np.arange(len(rows))),
                "interval": [low, high],
                "bursts": len(rows),
                "people": len(np.unique(person[rows])),
            }
    return out


def readings(
    bursts: Sequence[BurstOf], values: Mapping[str, NDArray[np.float64]], milliseconds: Mapping[str, float]
) -> dict[str, Any]:
    """What `detectors.training.cues.Readings.from_json` reads: authentic and simulated bursts."""
    looks = [
        {
            "family": "simulated over time",
            "label": burst.label,
            "identity": burst.person,
            "fused": burst.fused,
            "cues": {n: None if np.isnan(v[k]) else float(v[k]) for n, v in values.items()},
        }
        for k, burst in enumerate(bursts)
        if burst.kind != "manipulated"
    ]
    return {"milliseconds": dict(milliseconds), "looks": looks}


def cost(bursts: Sequence[BurstOf], out: Path) -> dict[str, float]:
    """Milliseconds that a burst's cue takes once the landmarks are there, by cue."""
    from detectors.cues.burst import BurstCues, Tally
    from detectors.cues.series import SoundSeries

    spent = {}
    for name in (BLINK, *FITS):
        cues = BurstCues([name], trained=out)
        begun = time.perf_counter()
        for burst in bursts:
            series = burst.series
            cues.add(Tally(), series, SoundSeries(), series.length_s, len(series.times))
        spent[name] = 1000 * (time.perf_counter() - begun) / len(bursts)
    return spent


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the module."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the training data")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is slow to make")
    parser.add_argument("--landmarks", type=Path, required=True, help="where face-mesh was pulled to")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained cues and tables")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--ensemble-ms", type=float, default=None, help="the ensemble's milliseconds a face")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    bursts = load_bursts(given.data, given.cache, given.landmarks)
    values = left_out(bursts, given.out)
    table = measured(bursts, values)
    (given.out / "eyes.json").write_text(json.dumps(eyes_without(bursts, None).to_json()) + "\n")
    (given.out / "ratios.json").write_text(json.dumps(ratios_without(bursts, None).to_json()) + "\n")
    net, mean, spread = motion_without(bursts, None)
    write_motion(given.out, net, mean, spread, table[MOTION])
    milliseconds = cost(bursts, given.out)
    table = {"cues": table, "milliseconds_a_burst": milliseconds}
    (given.out / "over-time.json").write_text(json.dumps(table, indent=2) + "\n")
    if given.ensemble_ms is not None:
        told = readings(bursts, values, {**milliseconds, "ensemble": given.ensemble_ms})
        (given.out / "readings.json").write_text(json.dumps(told) + "\n")
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
