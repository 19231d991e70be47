"""How right alerts have been, and how much was missed, as people decided (FIELD 6.16, DESIGN 3.5)."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stream.decisions import Choice, Decision, Subject

Z = 1.96
"""Half width of a 95 % interval, in standard deviations."""


@dataclass(slots=True)
class Tally:
    """Decisions about one thing. `inconclusive` ones say nothing of right or wrong."""

    confirmed: int = 0
    dismissed: int = 0
    inconclusive: int = 0

    def add(self, choice: Choice) -> None:
        setattr(self, choice.value, getattr(self, choice.value) + 1)

    def as_json(self) -> dict[str, Any]:
        decided = self.confirmed + self.dismissed
        return {
            "confirmed": self.confirmed,
            "dismissed": self.dismissed,
            "inconclusive": self.inconclusive,
            "precision": round(self.confirmed / decided, 4) if decided else None,
            "interval": wilson(self.confirmed, decided),
        }


def wilson(hits: int, count: int) -> list[float] | None:
    """Return the 95 % Wilson score interval of a share (Wilson 1927), None of nothing."""
    if count == 0:
        return None
    share, square = hits / count, Z * Z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return [round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4)]


def precision(decisions: Iterable[Decision]) -> dict[str, Any]:
    """Return the share of decided incidents that were confirmed: in all, per feed, per model.

    A model answers for the incidents for which it spoke: its mean logit was above 0.
    """
    whole, feeds, models = Tally(), defaultdict[str, Tally](Tally), defaultdict[str, Tally](Tally)
    for decision in decisions:
        if decision.subject is not Subject.INCIDENT:
            continue
        whole.add(decision.choice)
        feeds[decision.stream].add(decision.choice)
        for name, logit in decision.logits.items():
            if logit > 0:
                models[f"{name} {decision.models.get(name, '')}".strip()].add(decision.choice)
    return {
        "all": whole.as_json(),
        "feeds": {name: tally.as_json() for name, tally in sorted(feeds.items())},
        "models": {name: tally.as_json() for name, tally in sorted(models.items())},
    }


def missed(decisions: Sequence[Decision]) -> dict[str, Any]:
    """Return what the audit sample says of faces that raised no alert.

    `share` estimates how many of all those faces are manipulated: each decision counts as the inverse of its
    probability of being drawn (Horvitz and Thompson 1952, as a ratio), so that rates that changed over
    time do no harm. `faces` is how many faces the decided sample stands for.
    """
    decided = [
        one for one in decisions if one.subject is Subject.SAMPLE and one.choice is not Choice.INCONCLUSIVE
    ]
    weight = sum(1 / one.probability for one in decided)
    bad = sum(1 / one.probability for one in decided if one.choice is Choice.CONFIRMED)
    return {
        "reviewed": len(decided),
        "found": sum(one.choice is Choice.CONFIRMED for one in decided),
        "faces": round(weight),
        "share": round(bad / weight, 6) if weight else None,
    }
