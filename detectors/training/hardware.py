"""Where a training runs and with how many bits it computes."""

import ctypes
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum

import torch


class Precision(StrEnum):
    """Of the forward pass; weights, losses and the optimiser stay float32.

    auto: on a GPU bf16 where it computes in that, else fp16 with a scaled loss; on a CPU fp32. Measured with
    Lite0 at 160 px on a Xeon that has AVX512-BF16: 26 crops a second of one core in fp32, 15 in bf16.
    """

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class HardwareError(ValueError):
    """A device or precision that cannot be had here; names it and what can."""


DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@dataclass(frozen=True, slots=True)
class Hardware:
    """`precision` is never `auto`."""

    device: torch.device
    precision: Precision

    def autocast(self) -> AbstractContextManager[None]:
        """The context of a forward pass."""
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=DTYPES[self.precision], enabled=self.precision is not Precision.FP32
        )
        return context

    def scaler(self) -> "torch.amp.GradScaler":
        """Scales losses of half precision so that small gradients do not vanish; else does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision is Precision.FP16)

    def __str__(self) -> str:
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {self.precision}"
        return f"{self.device.type} with {torch.get_num_threads()} threads, {self.precision}"


def choose_hardware(device: str, precision: str) -> Hardware:
    """`device`: auto (a GPU if there is one), cpu, cuda, cuda:1 ...; HardwareError for what is not here."""
    try:
        wanted, found = Precision(precision), torch.device(_best_device() if device == "auto" else device)
    except (ValueError, RuntimeError) as error:
        raise HardwareError(
            f"device {device!r}, precision {precision!r}: expected auto, cpu or cuda, and one of "
            f"{', '.join(Precision)}"
        ) from error
    if found.type not in ("cpu", "cuda"):
        raise HardwareError(f"device {device!r}: expected auto, cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise HardwareError(f"device {device!r}: this machine has {torch.cuda.device_count()} GPUs")
    if found.type == "cpu" and wanted is Precision.FP16:
        raise HardwareError("precision 'fp16' on a CPU: expected auto, fp32 or bf16")
    if wanted is Precision.AUTO:
        wanted = _best_precision(found)
    return Hardware(found, wanted)


def make_deterministic() -> None:
    """Makes CUDA choose the algorithms that give the same bits each time, where there are any."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def keep_freed_memory() -> None:
    """Keeps glibc from returning every freed activation to the kernel: 29 crops/s became 50 on two cores."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _best_precision(device: torch.device) -> Precision:
    if device.type == "cpu":
        return Precision.FP32
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    return Precision.BF16 if native else Precision.FP16
