"""Ten thousand mutated chunks: no crash, no hang, each one counted, and what follows decodes as ever."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stream.media import has_encoder, make_clip

CODECS = {"h264": ".mp4", "hevc": ".mp4", "mpeg2": ".ts", "vp9": ".mkv", "av1": ".mkv"}
CHUNKS = 2000
"""For each of the five codecs."""

HANG_S = 300.0
"""It takes some ten seconds; a hang takes for ever."""


@pytest.mark.timeout(HANG_S + 60)
@pytest.mark.parametrize("codec", CODECS)
def test_mutated_chunks_do_no_harm(tmp_path: Path, codec: str) -> None:
    if not has_encoder(codec):
        pytest.skip(f"this PyAV has no encoder for {codec}")
    clip = make_clip(
        tmp_path / f"clip{CODECS[codec]}", codec=codec, seconds=3.2, gop=16, size=(64, 48), audio=None
    )
    command = [sys.executable, "-m", "tests.stream.fuzz_chunks", str(clip), str(CHUNKS), "1"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, f"ended with {done.returncode} (negative: a signal)\n{done.stderr[-3000:]}"
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["mutated"] >= CHUNKS
    assert sum(told["outcome"].values()) == told["records"]
    assert told["counted"] == told["records"] - told["outcome"].get("refused", 0)
    assert told["outcome"].get("chunk_invalid", 0) > CHUNKS // 20
    assert told["unharmed"]
    assert told["megabytes"] < 1500
