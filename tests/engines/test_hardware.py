"""What compiled code depends on: this CPU, this card, this driver."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engines import hardware

CPUINFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 amx_bf16\n"


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (16, 8)])
def test_half_the_cores_are_left_to_the_decoders(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert hardware.default_threads() == threads


def test_a_cpu_is_its_model_and_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_text", lambda _: CPUINFO)
    found = hardware.cpu()
    assert found["model"] == "Some CPU @ 2 GHz"
    monkeypatch.setattr(hardware, "_text", lambda _: CPUINFO.replace("avx2 amx_bf16", "amx_bf16 avx2"))
    assert hardware.cpu() == found
    monkeypatch.setattr(hardware, "_text", lambda _: CPUINFO.replace(" amx_bf16", ""))
    assert hardware.cpu() != found


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("", ""),
    ],
)
def test_a_gpu_is_its_model_its_slice_and_its_driver(
    monkeypatch: pytest.MonkeyPatch, line: str, driver: str
) -> None:
    card = SimpleNamespace(name="Card", major=9, minor=0, multi_processor_count=132, total_memory=150 * 2**30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(hardware, "_text", lambda _: line)
    found = hardware.gpu()
    assert found["driver"][0] == driver
    card.multi_processor_count = 16
    assert hardware.gpu() != found
    assert hardware.facts("cuda") == hardware.gpu()


def test_what_cannot_be_read_is_empty(tmp_path: Path) -> None:
    assert hardware._text(tmp_path / "none") == ""
