"""What the web interface costs with many feeds: taking scores in, drawing cards, telling pages, adding up.

    python benchmarks/wall.py [--feeds 200] [--seconds 60] [--json FILE]

An embedded log holds a minute of scores of so many feeds at two pictures a second, with a face each, and is
read as `unmask serve` reads it. Costs are CPU time, which other work on the machine disturbs less than the
clock.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder holds a kafka.py of its own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stream.web.watching import Listeners
from tests.stream.web.serving import Served
from tests.stream.web.world import AUTHENTIC, World

TIMES = 20
"""Repetitions of what is done again and again; the mean counts."""


def cost_ms(work: Callable[[], Any], times: int = 1) -> float:
    begun = time.process_time()
    for _ in range(times):
        work()
    return round(1000 * (time.process_time() - begun) / times, 3)


def measure(folder: Path, feeds: int, seconds: int) -> dict[str, Any]:
    world = World(folder)
    world.copies(feeds, AUTHENTIC[0] * 2 * seconds)
    found: dict[str, Any] = {"feeds": feeds, "seconds_of_scores": seconds}
    found["start_ms"] = cost_ms(world.follower.look)
    found["coverage_ms"] = cost_ms(world.follower.add_up)

    def second() -> None:
        world.clock.advance(1.0)  # every rate falls, so every card changes
        world.view.tick()

    found["tick_ms"] = cost_ms(second, TIMES)
    listeners = Listeners(Served(world).service)
    found["changes_ms"] = cost_ms(lambda: (second(), listeners.text(world.view.version - 1)), TIMES)
    found["changes_bytes"] = len(listeners.text(world.view.version - 1)[1])
    found["whole_bytes"] = len(listeners.text(0)[1])
    world.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--feeds", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), given.feeds, given.seconds)
    text = json.dumps(found, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
