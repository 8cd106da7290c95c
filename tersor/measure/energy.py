"""Energy that the machine counts: the processor's packages (RAPL on Linux), an NVIDIA card (NVML)."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from pathlib import Path
from typing import final

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


class Meter(ABC):
    """A counter of energy: what is used between ``start`` and ``stop``, by everything that runs there."""

    name: str

    @abstractmethod
    def start(self) -> None:
        """Note the counter."""

    @abstractmethod
    def joules(self) -> float:
        """What was used since ``start``."""


@final
class Packages(Meter):
    """The processor's packages by RAPL, files on Linux, often for root alone; other processes count too."""

    name = "RAPL, processor packages"

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

    name = "NVML, first card"

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
    """The meter of a kind of device, or None and why there is none."""
    return _card() if device.startswith("cuda") else _packages(powercap)


def _packages(powercap: Path) -> tuple[Meter | None, str]:
    zones = tuple(sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1))
    if not zones:
        return None, "the machine shows no energy counters (RAPL)"
    try:
        return Packages(zones), ""
    except PermissionError:
        return None, "the energy counters (RAPL) are for root alone"
    except (OSError, ValueError) as error:
        return None, f"the energy counters (RAPL) cannot be read: {error}"


def _card() -> tuple[Meter | None, str]:
    try:
        library = ctypes.CDLL(NVML)
        device = ctypes.c_void_p()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
            return None, "NVML finds no card"
        return Card(library, device), ""
    except (OSError, AttributeError) as error:
        return None, f"NVML cannot be used: {error}"
