"""Energy that the machine counts: the processor's packages (RAPL on Linux), an NVIDIA card (NVML)."""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import final

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


class Meter(ABC):
    """A counter of energy: what is used from ``start`` on, by everything that runs there."""

    @abstractmethod
    def start(self) -> None:
        """Note the counter."""

    @abstractmethod
    def joules(self) -> float:
        """What was used since ``start``."""


@final
class Packages(Meter):
    """The processor's packages by RAPL, files on Linux, often for root alone; other processes count too."""

    def __init__(self, zones: tuple[Path, ...]):
        self._zones = zones
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self.start()

    def start(self) -> None:
        """Note each package's counter."""
        self._before = self._read()

    def joules(self) -> float:
        """What all packages used; a counter that began anew at its largest value is seen through."""
        pairs = zip(self._read(), self._before, self._ranges, strict=True)
        return sum((after - before) % (largest + 1) for after, before, largest in pairs) / 1e6

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]


@final
class Card(Meter):
    """The first NVIDIA card by NVML (``nvmlDeviceGetTotalEnergyConsumption``, millijoules)."""

    def __init__(self, library: ctypes.CDLL, device: ctypes.c_void_p):
        self._library, self._device = library, device
        self.start()

    def start(self) -> None:
        """Note the card's counter."""
        self._before = self._read()

    def joules(self) -> float:
        """What the card used."""
        return (self._read() - self._before) / 1e3

    def _read(self) -> int:
        value = ctypes.c_ulonglong()
        if self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value)):
            raise OSError("NVML tells no energy")
        return value.value


def find_meter(device: str = "cpu", powercap: Path = POWERCAP) -> tuple[Meter | None, str]:
    """The meter of a device (cpu, cuda, cuda:1, tensorrt …), or None and why there is none."""
    kind, _, number = device.partition(":")
    if kind in ("cuda", "tensorrt"):
        first = number in ("", "0") and os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] == "0"
        return _card() if first else (None, "NVML is read of the first card alone")
    return _packages(powercap) if kind == "cpu" else (None, f"no meter of {kind} is known")


def _packages(powercap: Path) -> tuple[Meter | None, str]:
    try:
        zones = tuple(sorted(zone for zone in powercap.glob("intel-rapl:*") if _is_package(zone)))
        return (Packages(zones), "") if zones else (None, "the machine shows no energy counters (RAPL)")
    except PermissionError:
        return None, "the energy counters (RAPL) are for root alone"
    except (OSError, ValueError) as error:
        return None, f"the energy counters (RAPL) cannot be read: {error}"


def _is_package(zone: Path) -> bool:
    """Not a part of one, nor psys, the whole platform, in which packages are counted."""
    named = zone / "name"
    return zone.name.count(":") == 1 and not (named.is_file() and named.read_text().startswith("psys"))


def _card() -> tuple[Meter | None, str]:
    try:
        library = ctypes.CDLL(NVML)
        device = ctypes.c_void_p()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
            return None, "NVML finds no card"
        return Card(library, device), ""
    except (OSError, AttributeError) as error:
        return None, f"NVML cannot be used: {error}"
