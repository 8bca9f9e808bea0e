"""The common part of all suites: timing in alternation, parity checks, and the rows that every suite writes."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import datetime
import gc
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
COLUMNS = [
    *(
        "suite",
        "figure",
        "setting",
        "contestant",
        "unit",
        "median",
        "p20",
        "p80",
        "runs",
        "baseline",
        "ratio",
        "parity",
    ),
    *("elsewhere", "device", "machine", "torch", "snntorch", "spikingjelly", "threads", "allocator", "date"),
]

# Fresh pages cost more than a neuron's arithmetic: the process keeps large blocks instead of returning them.
REUSED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1099511627776", "MALLOC_TOP_PAD_": "268435456"}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "reused": REUSED}
"""Environment of a suite's process: glibc's defaults, and freed memory kept for reuse."""


class ParityError(AssertionError):
    """A contestant's answer differs from the reference: its time is not worth reporting."""


@dataclass
class Sample:
    """Seconds (or another unit) of one contestant, one value per round."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Bench:
    """The argument of a suite: the device, the time per figure, and the file of its rows."""

    suite: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    allocator: str = "default"
    seconds: float = 8.0
    options: frozenset[str] = frozenset()
    size: str = ""
    """Whose sizes are measured, see `pick`; by default those of the device."""
    path: Path | None = None
    """The file of the rows; until all are there, they are in `NAME.part.csv` next to it."""
    doubt: str = ""
    """Why no row can be trusted; precedes the result of a parity check."""
    rows: list[dict[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    elsewhere: float = 0.0
    """Cores that other processes kept busy during the latest timing."""

    def pick(self, *, cpu: Any, cuda: Any, trial: Any) -> Any:
        """The sizes for the device, or those with which every line of a suite runs in a minute or two."""
        return {"cpu": cpu, "cuda": cuda, "trial": trial}[self.size or self.device.type]

    def race(
        self,
        figure: str,
        setting: str,
        contestants: dict[str, Callable[[], object]],
        *,
        baseline: str,
        parity: dict[str, Callable[[], str]] | None = None,
        rounds: int = 30,
        warmup: int = 2,
    ) -> dict[str, Sample]:
        """Time the contestants in alternation, round by round, so that a slow moment of the machine affects all.

        `ratio` is the median over the rounds of time / `baseline`'s time in that round. `parity` maps a contestant to a
        check that returns its finding ("equal") or raises `ParityError`; a contestant that fails is not timed.
        """
        if baseline not in contestants:
            raise ValueError(f"the baseline {baseline!r} is not among the contestants {', '.join(contestants)}")
        checked, sound = {}, {}
        for name, function in contestants.items():
            check = (parity or {}).get(name)
            with self.spared(figure, setting, name):
                with full_precision():
                    found = check() if check else "not checked"
                function()
                self.synchronize()
                checked[name], sound[name] = found, function
        samples = self.time(sound, rounds=rounds, warmup=warmup - 1) if sound else {}
        for name, sample in samples.items():
            ratio = None
            if baseline in samples:
                pairs = zip(sample.values, samples[baseline].values, strict=True)
                ratio = statistics.median(own / other for own, other in pairs)
            self.record(figure, setting, name, sample, baseline=baseline, ratio=ratio, parity=checked[name])
        return samples

    @contextlib.contextmanager
    def spared(self, figure: str, setting: str, contestant: str) -> Iterator[None]:
        """An error within it makes the suite fail, with its traceback, but does not stop what follows."""
        try:
            yield
        except ParityError as error:
            self._fail(figure, setting, contestant, str(error))
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            self._fail(figure, setting, contestant, f"{type(error).__name__}: {str(error).split(chr(10))[0][:200]}")
            # Its memory must not be counted for those that follow.
            traceback.clear_frames(error.__traceback__)
            del error
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def time(
        self, contestants: dict[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 2
    ) -> dict[str, Sample]:
        """Seconds of each contestant, in alternation, round by round, for about `seconds` and at least three rounds."""
        for function in contestants.values():
            for _ in range(warmup):
                function()
        samples = {name: Sample([]) for name in contestants}
        start, before = time.perf_counter(), busy_elsewhere()
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - start > self.seconds:
                break
            for name, function in contestants.items():
                self.synchronize()
                begin = time.perf_counter()
                function()
                self.synchronize()
                samples[name].values.append(time.perf_counter() - begin)
        self.elsewhere = (busy_elsewhere() - before) / (time.perf_counter() - start)
        if self.elsewhere > 0.1:
            print(f"  other processes kept {self.elsewhere:.1f} cores busy: these times are not to be trusted")
        return samples

    def record(
        self,
        figure: str,
        setting: str,
        contestant: str,
        sample: Sample | float,
        *,
        unit: str = "s",
        baseline: str = "",
        ratio: float | None = None,
        parity: str = "not checked",
    ) -> None:
        """Add one row and print it."""
        sample = Sample([float(sample)]) if isinstance(sample, int | float) else sample
        row = {
            "figure": figure,
            "setting": setting,
            "contestant": contestant,
            "unit": unit,
            "median": f"{sample.median:.6g}",
            "p20": f"{sample.percentile(0.2):.6g}",
            "p80": f"{sample.percentile(0.8):.6g}",
            "runs": str(len(sample.values)),
            "baseline": baseline,
            "ratio": "" if ratio is None else f"{ratio:.4g}",
            "parity": f"{self.doubt}{parity}",
            "elsewhere": f"{self.elsewhere:.2f}" if unit == "s" else "",
        }
        self._add(row)
        against = f"{float(row['ratio']):8.2f} x {baseline}" if ratio is not None else ""
        print(f"  {figure:34} {contestant:38} {float(row['median']):11.5g} {unit:8}{against}", flush=True)

    def absent(self, figure: str, setting: str, contestant: str, reason: str) -> None:
        """Add a row for a figure that this machine cannot measure, with the reason in place of the parity."""
        self._add({"figure": figure, "setting": setting, "contestant": contestant, "parity": reason})
        print(f"  {figure:34} {contestant:38} not measured: {reason}", flush=True)

    def _fail(self, figure: str, setting: str, contestant: str, found: str) -> None:
        self.failures.append(f"{self.suite}: {figure}, {setting}: {contestant}: {found}")
        self._add({"figure": figure, "setting": setting, "contestant": contestant, "parity": f"FAILED: {found}"})
        print(f"  {figure:34} {contestant:38} NOT TIMED: {found}", flush=True)

    def _add(self, row: dict[str, str]) -> None:
        self.rows.append({"suite": self.suite, **row, **facts(self.device, self.allocator)})
        if self.path is not None:
            write_rows(self.rows, self.part)

    @property
    def part(self) -> Path:
        """The file of the rows until all are there: a run that is cut off keeps those."""
        assert self.path is not None
        return self.path.with_suffix(".part.csv")

    def finish(self) -> None:
        """Move the rows to their final file."""
        if self.path is not None and self.rows:
            self.part.replace(self.path)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within it, convolutions on a GPU multiply float32 in full precision.

    PyTorch's default, which is what is timed, rounds it to the 10 bits of TF32: two orders of the same sums then differ
    by more than any neuron's distance from its threshold.
    """
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def busy_elsewhere() -> float:
    """Core seconds that other processes have used so far; 0 if the system does not say."""
    if not Path("/proc/stat").is_file():
        return 0.0
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process that is in RAM now, or the most since `reset_peak`."""
    wanted = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(wanted))


def reset_peak() -> None:
    """Return freed memory to the system and forget the peak so far."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(device: torch.device, function: Callable[[], object]) -> tuple[int, int]:
    """Bytes that `function` adds at its peak, and bytes that its result still occupies afterwards.

    On a CPU this is the process's memory in RAM: run it with glibc's default allocator, which returns large blocks.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        after, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    else:
        reset_peak()
        before = resident_bytes()
        result = function()
        peak = resident_bytes(peak=True)
        gc.collect()
        after = resident_bytes()
    del result
    return peak - before, after - before


def facts(device: torch.device, allocator: str) -> dict[str, str]:
    """Machine, versions, threads and allocator, without which a figure means nothing."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": device.type,
        "machine": name,
        "torch": torch.__version__,
        "snntorch": package_version("snntorch"),
        "spikingjelly": package_version("spikingjelly"),
        "threads": str(torch.get_num_threads()),
        "allocator": allocator,
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """The name of the processor, and its vector instructions: virtual machines often hide the model."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split("\t", 1) for line in info.splitlines() if "\t" in line)
    name = fields.get("model name", platform.processor()).lstrip("\t: ") or platform.machine()
    flags = set(fields.get("flags", "").split())
    wide = [
        label
        for flag, label in (("avx512f", "AVX-512"), ("avx512_bf16", "AVX-512 BF16"), ("amx_bf16", "AMX"))
        if flag in flags
    ]
    return f"{name}, {os.cpu_count()} cores" + (f" ({', '.join(wide)})" if wide else "")


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def write_rows(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Write the rows of one suite as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_bits(by_events: Callable[..., Any], densely: Callable[..., Any], images: torch.Tensor) -> str:
    """Parity of two forms that sum whole numbers. Raises `ParityError` if their answers differ in a bit."""
    if not torch.equal(by_events(images), densely(images)):
        raise ParityError("events and dense products of whole numbers differ")
    return "the same bits as densely"


def same_spikes(found: torch.Tensor, expected: torch.Tensor, most: float = 1e-6) -> str:
    """Parity of spike tensors: a share of at most `most` may differ, for ties at the threshold."""
    if found.shape != expected.shape:
        raise ParityError(f"shape {list(found.shape)}, expected {list(expected.shape)}")
    share = (found.float() != expected.float()).float().mean().item()
    if not share <= most:
        raise ParityError(f"{share:.2e} of the spikes differ, allowed {most:.0e}")
    return "equal" if share == 0 else f"{share:.1e} of the spikes differ"


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, most: float = 0.0) -> str:
    """Parity of real values: the largest difference, as a share of the largest expected value.

    A share of `most` of the elements may differ more: if a membrane is within rounding of its threshold, the neuron of
    one library fires and the other's does not, and the gradients of its steps differ.
    """
    if found.shape != expected.shape:
        raise ParityError(f"shape {list(found.shape)}, expected {list(expected.shape)}")
    errors = (found.double() - expected.double()).abs() / expected.double().abs().max()
    error, off = errors.max().item(), errors > tolerance
    share = off.float().mean().item()
    # Not `>`: a NaN must not pass.
    if not (error <= tolerance or share <= most) or errors.isnan().any():
        raise ParityError(f"relative error {error:.2e}, allowed {tolerance:.0e} (off: {share:.1e} of the elements)")
    if share:
        return f"relative error {errors[~off].max().item():.1e}, but for {share:.1e} of the elements"
    return f"relative error {error:.1e}"
