"""Energy counters of this machine: Linux' powercap (RAPL) for processors and memory, NVML for an NVIDIA GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")

UNIT_J = {"uj": 1e-6, "mj": 1e-3}


class Counter(Protocol):
    """Counts the joules used by a part of the machine, for all of its programs together."""

    name: str

    def joules(self) -> float:
        """The joules used since the counter was created."""


class PowercapZone:
    """One zone of powercap, such as a processor or its memory.

    `energy_uj` counts microjoules and wraps after `max_energy_range_uj`: between two readings it may wrap at most once,
    which takes minutes at a processor's power.
    """

    def __init__(self, folder: Path) -> None:
        self.name = (folder / "name").read_text(encoding="utf-8").strip()
        self._range = int((folder / "max_energy_range_uj").read_text(encoding="utf-8"))
        self._file = folder / "energy_uj"
        self._last, self._taken = self._read(), 0

    def _read(self) -> int:
        return int(self._file.read_text(encoding="utf-8"))

    def joules(self) -> float:
        now = self._read()
        self._taken += now - self._last if now >= self._last else now + self._range - self._last
        self._last = now
        return self._taken * UNIT_J["uj"]


class NvidiaGpu:
    """NVML's counter of a CUDA device, in millijoules since its driver was loaded; Volta and later have one."""

    def __init__(self, device: torch.device) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        found = torch.cuda.get_device_properties(device)
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{found.uuid}")
        self.name = found.name
        self._first = self._read()

    def _read(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def joules(self) -> float:
        return (self._read() - self._first) * UNIT_J["mj"]


def find_counters(device: torch.device, powercap: Path = POWERCAP) -> tuple[list[Counter], str]:
    """The counters that measure a network on this device, and why others are missing ("" if none is).

    From powercap: processors (`package-*`) and their memory (`dram`), which the processors' figures do not include.
    Cores are included in the processor's figure, and `psys` and the copies under `intel-rapl-mmio` would count twice.
    """
    counters, missing = _of_powercap(powercap)
    if device.type != "cuda":
        return counters, missing
    try:
        return [*counters, NvidiaGpu(device)], missing
    except ImportError:
        reason = "the GPU's counter needs NVML's bindings (pip install nvidia-ml-py)"
    except Exception as error:  # NVML's errors have no common base class, and the module may be a stand-in
        reason = f"the GPU's counter cannot be read ({error})"
    return counters, "; ".join(part for part in (missing, reason) if part)


def _of_powercap(powercap: Path) -> tuple[list[Counter], str]:
    if not powercap.is_dir():
        return [], f"this machine shows no energy counters ({powercap} is not there)"
    counters: list[Counter] = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        try:
            if (folder / "name").read_text(encoding="utf-8").startswith(("package", "dram")):
                counters.append(PowercapZone(folder))
        except PermissionError:
            return [], f"{folder / 'energy_uj'} can be read by root alone (sudo chmod a+r opens it until a restart)"
        except (OSError, ValueError) as error:
            return [], f"{folder} cannot be read as an energy counter ({error})"
    return counters, "" if counters else f"{powercap} has no processor's counter (intel-rapl:*)"
