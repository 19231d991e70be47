"""How many events of a kind there may be in truth, after so few were counted: limits of a Poisson rate.

Source: F. Garwood, "Fiducial limits for the Poisson distribution" (Biometrika 28, 1936): the upper limit
after k events is the quantile of a gamma distribution of shape k + 1 (half a chi-square's, 2k + 2 degrees).
"""

import math
from functools import lru_cache

CONFIDENCE = 0.95
"""Of every claim about false alarms: 19 of 20 such limits lie above the truth."""

PRECISION = 1e-13
"""Relative error at which series and fraction stop: beyond what a bisection in doubles can use."""

STEPS = 10_000
"""Most terms of series and fraction: both need about sqrt(shape) of them."""


@lru_cache(maxsize=4096)
def upper_limit(events: float, confidence: float = CONFIDENCE) -> float:
    """Return the number of events expected at most, one-sided at `confidence` (0..1), when `events` came.

    2.996 for none at 95 %: H hours without an alarm claim 3/H an hour. `events` need not be whole: for a sum
    of counts with weights of at most 1 the same quantile is a limit on the safe side (M. P. Fay and E. J.
    Feuer, Statistics in Medicine 16, 1997: their gamma limit with its largest weight, and no less spread).
    Raises `ValueError` for a negative count, or a confidence that is no share.
    """
    if not (math.isfinite(events) and events >= 0):
        raise ValueError(f"events: {events}, expected a finite number >= 0")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence}, expected a share between 0 and 1")
    shape = events + 1.0
    low, high = 0.0, 2.0 * shape
    while below(high, shape) < confidence:
        low, high = high, 2.0 * high
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return middle
        if below(middle, shape) < confidence:
            low = middle
        else:
            high = middle


def below(x: float, shape: float) -> float:
    """Return the share of a gamma distribution of `shape` (> 0, scale 1) below `x` >= 0.

    The series of the incomplete gamma function below its turning point, Lentz's continued fraction above.
    """
    if x <= 0:
        return 0.0
    front = math.exp(shape * math.log(x) - x - math.lgamma(shape))
    if x < shape + 1:
        return front * _series(x, shape)
    return 1.0 - front * _fraction(x, shape)


def _series(x: float, shape: float) -> float:
    term = total = 1.0 / shape
    for step in range(1, STEPS):
        term *= x / (shape + step)
        total += term
        if term < total * PRECISION:
            break
    return total


def _fraction(x: float, shape: float) -> float:
    tiny = 1e-300
    b = x + 1.0 - shape
    c, d = 1.0 / tiny, 1.0 / b
    value = d
    for step in range(1, STEPS):
        a = -step * (step - shape)
        b += 2.0
        d = a * d + b
        c = b + a / c
        d = 1.0 / (d if abs(d) > tiny else tiny)
        c = c if abs(c) > tiny else tiny
        change = d * c
        value *= change
        if abs(change - 1.0) < PRECISION:
            break
    return value
