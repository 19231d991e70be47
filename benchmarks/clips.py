"""Runs `unmask watch` on every video of a folder: wall time against length, and what it said.

    python benchmarks/clips.py CLIPS [--json FILE] [--set A.B=VALUE ...]

One process per clip, start of Python and loading of networks included, one after the other.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av

SUFFIXES = {".mp4", ".mkv", ".mov", ".webm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    clips = sorted(path for path in arguments.clips.rglob("*") if path.suffix in SUFFIXES)
    rows = [measure(clip, arguments.settings) for clip in clips]
    for row in rows:
        print(
            f"{row['clip']:40} {row['length_s']:6.1f} s in {row['wall_s']:6.1f} s  "
            f"{row['speed']:5.1f}x  {told(row)}"
        )
    speeds = sorted(row["speed"] for row in rows)
    print(f"{len(rows)} clips, slowest {speeds[0]:.1f}x real time, median {speeds[len(speeds) // 2]:.1f}x")
    if arguments.json:
        machine = {"machine": platform.machine(), "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"machine": machine, "clips": rows}, indent=2) + "\n")


def measure(clip: Path, settings: list[str]) -> dict[str, Any]:
    """Return length, wall time, events and coverage of one clip."""
    unmask = Path(sys.executable).parent / "unmask"
    with av.open(str(clip)) as container:
        length_s = (container.duration or 0) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        options = [part for text in [*settings, f"data_dir={folder}"] for part in ("--set", text)]
        begun = time.monotonic()
        done = subprocess.run(
            [unmask, "watch", f"clip={clip}", "--json", *options], capture_output=True, text=True, check=True
        )
        wall_s = time.monotonic() - begun
        covered = subprocess.run(
            [unmask, "coverage", "clip", "--json", *options], capture_output=True, text=True, check=True
        )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        "clip": f"{clip.parent.name}/{clip.name}",
        "length_s": round(length_s, 2),
        "wall_s": round(wall_s, 2),
        "speed": round(length_s / wall_s, 2),
        "incidents": sum(event["type"] == "unmask.incident.opened.v1" for event in events),
        "coverage": json.loads(covered.stdout),
    }


def told(row: dict[str, Any]) -> str:
    """Return what was said of a clip, in seconds."""
    covered = row["coverage"]
    parts = [f"{name} {seconds:.1f} s" for name, seconds in covered.get("decided_s", {}).items()]
    parts += [f"{name} {seconds:.1f} s" for name, seconds in covered.get("inconclusive_s", {}).items()]
    return f"{row['incidents']} incidents; {', '.join(parts) or 'nothing watched'}"


if __name__ == "__main__":
    main()
