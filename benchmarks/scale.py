"""Fills the figures of docs/scale.md: what a profile measured, and what `unmask plan` makes of it.

python benchmarks/scale.py stream/profiles/NAME.json            # prints them
python benchmarks/scale.py stream/profiles/NAME.json --write    # puts them into docs/scale.md
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stream.config import Config
from stream.plan import Asked, Plan, Prices, broker_measured, plan
from stream.profile import Figure, Profile, read

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

PRICES = Prices(core_hour=0.04, disk_gb_month=0.05)
"""Round numbers to show the sum with, nobody's offer."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One of the sizes that the page argues about."""

    name: str
    options: str
    asked: Asked


LAYOUTS = (
    Layout("10 feeds", "--streams 10 --bitrate 5", Asked(10, 2.0, 5.0, 1.0)),
    Layout("1,000 feeds", "--streams 1000 --bitrate 5 --cores 16", Asked(1000, 2.0, 5.0, 1.0, cores=16)),
    Layout(
        "100,000 feeds",
        "--streams 100000 --regions 50 --lines 720 --bitrate 2.5 --cores 32 --nic-gbit 25",
        Asked(100_000, 2.0, 2.5, 1.0, lines=720, regions=50, cores=32, nic_gbit=25.0),
    ),
    Layout(
        "1,000 feeds of 50 Mbit/s",
        "--streams 1000 --bitrate 50 --cores 16",
        Asked(1000, 2.0, 50.0, 1.0, cores=16),
    ),
)


def figures(profile: Profile) -> Iterator[str]:
    yield f"Profile `{profile.name}` of {profile.made}: {profile.machine()}."
    members = ", ".join(profile.members)
    yield f"Members {members} on {profile.engine}. Median (lowest to highest) of the repeats:"
    yield ""
    yield "| figure | what one is | ms of a core each | a second, by the clock |"
    yield "|---|---|---|---|"
    for name, figure in profile.figures.items():
        yield f"| `{name}` | {figure.unit} | {_cpu(figure)} | {_rate(figure)} |"
    yield ""


def _cpu(figure: Figure) -> str:
    low, middle, high = (1000 * value for value in (figure.cpu_s.low, figure.cpu_s.median, figure.cpu_s.high))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _rate(figure: Figure) -> str:
    rate = f"{figure.per_s.median:,.0f}"
    return f"{rate}, {figure.per_s.median * figure.size / 1e6:.0f} MB/s" if figure.size else rate


def layouts(profile: Profile) -> Iterator[str]:
    plans = [plan(layout.asked, profile, Config(), PRICES) for layout in LAYOUTS]
    prices = f"a core {PRICES.core_hour} an hour, a GB of disk {PRICES.disk_gb_month} a month"
    yield f"What `unmask plan` makes of that; prices to show the sum with, nobody's offer: {prices}."
    yield ""
    yield "| | " + " | ".join(layout.name for layout in LAYOUTS) + " |"
    yield "|---|" + "---|" * len(LAYOUTS)
    for name, cells in _rows(plans):
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""


def _rows(plans: list[Plan]) -> Iterator[tuple[str, list[str]]]:
    regions = [made.region for made in plans]
    yield "regions", [str(made.asked.regions) for made in plans]
    yield "cores, all regions", [f"{made.region.cores * made.asked.regions:,}" for made in plans]
    yield "per stream-hour", [f"{made.cost['per_stream_hour']:.4f}" for made in plans]
    yield "**in each region**", ["" for _ in plans]
    yield "ingest machines / shards", [f"{r.ingest_machines} / {r.ingest_shards}" for r in regions]
    yield "partitions of `sources`", [str(r.source_partitions) for r in regions]
    yield "detect machines / workers", [f"{r.detect_machines} / {r.workers}" for r in regions]
    yield "streams a worker can do", [str(r.streams_per_worker) for r in regions]
    yield "partitions of `media`", [f"{r.partitions:,}" for r in regions]
    yield "brokers, decided by", [f"{r.brokers}, {r.brokers_for}" for r in regions]
    yield "transactions a second, each broker", [f"{r.transactions_per_s / r.brokers:,.0f}" for r in regions]
    if all(broker_measured(made.profile) for made in plans):
        yield (
            "of a broker's cores, transactions take",
            [
                f"{r.transaction_cores / r.brokers:.2f} of {made.asked.cores or made.profile.cores}"
                for r, made in zip(regions, plans, strict=True)
            ],
        )
    yield (
        "into brokers / copies / out, Gbit/s",
        [f"{r.to_brokers_gbit:.3g} / {r.copies_gbit:.3g} / {r.from_brokers_gbit:.3g}" for r in regions],
    )
    yield "disk, TB", [f"{r.disk_bytes / 1e12:.3g}" for r in regions]
    yield (
        "default `media.retention_bytes` lasts",
        [
            f"{Config().media.retention_bytes / (made.region.streams * made.stream.media_bytes):,.0f} s"
            for made in plans
        ],
    )
    yield "a takeover reads, each partition", [f"{r.takeover_bytes / 1e6:.1f} MB" for r in regions]


def outputs(path: Path) -> Iterator[str]:
    program = Path(sys.executable).with_name("unmask")
    prices = f"--price-core-hour {PRICES.core_hour} --price-disk-gb-month {PRICES.disk_gb_month}"
    told: set[str] = set()
    for layout in LAYOUTS[:3]:
        command = f"{layout.options} --fps 2 --faces 1 {prices} --profile"
        words = [str(program), "plan", *command.split(), str(path.resolve())]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd="/")
        lines = [line.rstrip() for line in done.stdout.rstrip().split("\n")]
        assumed = lines.index("assumed:")
        repeated = [line for line in lines[assumed + 1 :] if line in told]
        shown = [line for line in lines if line not in repeated]
        told.update(lines[assumed + 1 :])
        yield from ("```text", f"$ unmask plan {command} {path.stem}", *shown, "```")
        if repeated:
            yield f"({len(repeated)} assumptions are those above.)"
        yield ""


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/scale.md")
    chosen = parser.parse_args()
    profile = read(chosen.profile)
    text = "\n".join([*figures(profile), *layouts(profile), *outputs(chosen.profile)])
    if not chosen.write:
        print(text)
        return 0
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"scale.py: {PAGE.name} has no {BEGIN} and {END}; both must be there")
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
