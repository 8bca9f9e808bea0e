"""The machine code of Triton kernels for a GPU that need not be present, and a model of how fast it can be at best.

Launches are recorded instead of run, built for a target with Triton's own specialization of their arguments, and one
thread's path through the machine code is followed (see `machine`). `predict` compares the result with a GPU's
datasheet. Nothing is measured.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import machine
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclass(frozen=True)
class Gpu:
    """A GPU according to its datasheet; `reached` is the share of the bandwidth that a copy gets, an assumption."""

    name: str
    multiprocessors: int
    clock: float
    """Hz under load, an assumption between base and boost."""
    bandwidth: float
    """Bytes/s of the memory."""
    reached: float
    cache: float
    """Bytes/s of the L2 cache, an assumption from published microbenchmarks."""
    float_lanes: int
    wide_conversions: int
    """64-bit conversions per clock and multiprocessor, from the CUDA C++ Programming Guide's table of throughputs."""
    warps: int
    """Resident warps per multiprocessor; with `blocks` and `shared` from the guide's table of capabilities."""
    blocks: int
    shared: int
    tensor: dict[str, float]
    """Operations/s of the tensor cores on dense matrices, by the dtype of the products; float32 as TF32."""

    @property
    def copy(self) -> float:
        return self.bandwidth * self.reached


_TENSOR = {
    80: {"int8": 624e12, "bfloat16": 312e12, "float32": 156e12},
    90: {"int8": 1979e12, "bfloat16": 989e12, "float32": 495e12},
    120: {"int8": 838e12, "bfloat16": 209.5e12, "float32": 104.8e12},
}
GPUS = {
    80: Gpu("A100 80 GB", 108, 1.41e9, 2.039e12, 0.88, 4.0e12, 64, 16, 64, 32, 163 << 10, _TENSOR[80]),
    90: Gpu("H100 SXM", 132, 1.70e9, 3.35e12, 0.90, 5.5e12, 128, 16, 64, 32, 227 << 10, _TENSOR[90]),
    120: Gpu("RTX 5090", 170, 2.41e9, 1.792e12, 0.90, 7.0e12, 128, 2, 48, 24, 99 << 10, _TENSOR[120]),
}
"""By compute capability."""
BUSY = 0.75
"""The share of its busiest pipe's throughput that a kernel is assumed to reach."""
REACHED = 0.6
"""The share of the tensor cores' throughput that any library's products are assumed to reach."""
REGISTERS, WARP = 65536, 32
PARAMETERS = {0: 0x160, 90: 0x210, 100: 0x380}
"""The position of a kernel's arguments in the constant bank, by the compute capability from which on it holds."""


@dataclass
class Launch:
    """One launch of a kernel, as requested."""

    kernel: JITFunction
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    def tensors(self) -> dict[str, Tensor]:
        """The given tensors, each once: an argument that is not read has one of the others in its place."""
        found: dict[str, Tensor] = {}
        for name, value in self.arguments.items():
            if isinstance(value, Tensor) and all(value is not other for other in found.values()):
                found[name] = value
        return found


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it, launches of Triton kernels are recorded in the list that it yields, and nothing runs."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names = [parameter.name for parameter in self.params]
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: options.pop(name) for name in names if name in options}
        sizes = grid(arguments) if callable(grid) else grid
        launches.append(Launch(self, arguments, tuple(int(size) for size in sizes), options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


class _Aligned:
    """Replaces a tensor where Triton asks for dtype and alignment."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 256

    def ptr_range(self) -> int:
        return 0


@dataclass
class Binary:
    """A kernel built for a target."""

    assembly: str
    capability: int
    registers: int
    spilled: int
    shared: int
    warps: int


_built: dict[tuple[Any, ...], Binary] = {}
_of_amd: dict[tuple[Any, ...], str] = {}


def key(launch: Launch, capability: int | str) -> tuple[Any, ...]:
    """The values that determine which build a launch uses: arguments by their types, alignments and constants."""
    return _specialized(launch, capability)[0]


def build(launch: Launch, capability: int) -> Binary:
    """The launch's kernel as machine code; equal launches are built once."""
    of, (signature, constants, attributes, options) = _specialized(launch, capability)
    if of not in _built:
        target = GPUTarget("cuda", capability, WARP)
        source = ASTSource(launch.kernel, signature, constants, attributes)
        kernel = triton.compile(source, target=target, options=options.__dict__)
        _built[of] = _disassembled(kernel, capability)
    return _built[of]


def executed(launch: Launch, binary: Binary, trips: int, outer: int | None = None) -> Counter[str]:
    """The instructions that one thread of a launch executes, by opcode; see `machine.executed`."""
    return machine.executed(binary.assembly, trips, outer, numbers(launch, binary.capability))


def numbers(launch: Launch, capability: int) -> dict[int, int]:
    """The integers of a launch, by their place in the constant bank."""
    signature = _specialized(launch, capability)[1][0]
    at = max((number, place) for number, place in PARAMETERS.items() if number <= capability)[1]
    found = {}
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        size = 8 if kind.startswith("*") or kind.endswith("64") else 4
        at = (at + size - 1) // size * size
        value = launch.arguments[name]
        if kind.startswith(("i", "u")):
            found |= {at + i: int(value) >> 8 * i & 0xFFFFFFFF for i in range(0, size, 4)}
        at += size
    return found


def spilled_by_amd(launch: Launch, architecture: str) -> int:
    """The number of registers that the launch's kernel spills on an AMD GPU, such as `gfx942`."""
    return sum(map(int, re.findall(r"[sv]gpr_spill_count:\s+(\d+)", _by_amd(launch, architecture))))


def products_by_amd(launch: Launch, architecture: str) -> list[str]:
    """The matrix instructions of the launch's kernel on an AMD GPU."""
    return sorted(set(re.findall(r"v_s?mfmac?_\w+", _by_amd(launch, architecture))))


def _by_amd(launch: Launch, architecture: str) -> str:
    of, (signature, constants, attributes, options) = _specialized(launch, architecture)
    if of not in _of_amd:
        source = ASTSource(launch.kernel, signature, constants, attributes)
        _of_amd[of] = triton.compile(source, target=_target(architecture), options=options.__dict__).asm["amdgcn"]
    return _of_amd[of]


def _target(of: int | str) -> GPUTarget:
    """NVIDIA's compute capability, or an architecture of AMD."""
    return GPUTarget("cuda", of, WARP) if isinstance(of, int) else GPUTarget("hip", of, 64)


def _specialized(launch: Launch, of: int | str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The key of a build for a target, and the arguments of Triton's compiler for it."""
    target = _target(of)
    backend = make_backend(target)
    given = {
        name: _Aligned(value.dtype) if isinstance(value, Tensor) else value for name, value in launch.arguments.items()
    }
    settings = {"debug": False, "instrumentation_mode": "", **launch.options}
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = binder(**given, **settings)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, settings, bound, specialization, options
    )
    parts = (
        signature,
        sorted(constants.items()),
        sorted(attributes.items()),
        sorted(options.__dict__.items(), key=str),
    )
    return (launch.kernel.__module__, launch.name, target.arch, *map(str, parts)), (
        signature,
        constants,
        attributes,
        options,
    )


def _disassembled(kernel: Any, capability: int) -> Binary:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        assembly = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stderr
    registers, stack = map(int, found.groups())
    return Binary(assembly.stdout, capability, registers, stack, kernel.metadata.shared, kernel.metadata.num_warps)


DIVISION = r"CALL.*(?:div|rem)_[su]64"


KINDS = {
    "memory": "LDG LDGSTS STG RED ATOM ATOMG LDS STS LDSM STSM LDL STL",
    "float": "FADD FMUL FFMA FSETP FSEL FMNMX FSET FCHK HADD2 HFMA2 HMUL2 HSETP2 FFMA2 FADD2 FMUL2 F2FP DADD DMUL DFMA "
    "DSETP HMNMX2",
    "special": "MUFU I2F F2I F2F I2FP",
    "control": "BAR WARPSYNC BRA EXIT CALL RET BSSY BSYNC SHFL NOP LDC ULDC S2R S2UR CS2R LDCU",
}
_KIND = {op: kind for kind, ops in KINDS.items() for op in ops.split()}
_INTEGER = """
    LOP3 IADD3 ISETP SEL SHF PLOP3 LEA VIADD FSETP FSEL FMNMX PRMT P2R R2P FSET IABS IMNMX VIMNMX LOP POPC BREV FLO I2FP
    VIMNMX3 VIADDMNMX FCHK ISCADD SGXT BMSK F2FP HSETP2 HMNMX2
"""
ALU = frozenset(_INTEGER.split())
"""Instructions of the integer pipe, which is half as wide as the issue."""


def kinds(counts: Counter[str]) -> Counter[str]:
    """Instructions by kind; those that are not listed are integer arithmetic."""
    found: Counter[str] = Counter()
    for op, count in counts.items():
        found[_KIND.get(op.split(".")[0], "integer")] += count
    return found


def accesses(counts: Counter[str]) -> Counter[str]:
    """Loads and stores of global memory by their width in bits: L128, S64, ..."""
    found: Counter[str] = Counter()
    for op, count in counts.items():
        if op.startswith(("LDG", "STG")):
            parts = op.split(".")
            width = next((part for part in ("128", "64") if part in parts), None)
            width = width or ("8" if {"U8", "S8"} & set(parts) else "16" if {"U16", "S16"} & set(parts) else "32")
            found[op[0] + width] += count
    return found


def cycles(counts: Counter[str], gpu: Gpu) -> tuple[float, str]:
    """Clocks of a multiprocessor that a thread needs on the busiest of its pipes, and the name of that pipe."""
    lanes = {"issue": 128.0, "integer": 64.0, "float": gpu.float_lanes, "special": 16.0, "load/store": 32.0}
    lanes |= {"64-bit conversion": gpu.wide_conversions, "multiply": 64.0}
    used: Counter[str] = Counter()
    for op, count in counts.items():
        parts = op.split(".")
        base, words = parts[0], 4 if "128" in parts else 2 if "64" in parts else 1
        used["issue"] += count
        if base in ALU:
            used["integer"] += count
        elif base in ("IMAD", "IDP"):
            used["multiply"] += count
            used["float"] += count
        elif base in ("FADD", "FMUL", "FFMA", "HADD2", "HFMA2", "HMUL2", "MOV"):
            used["float"] += count
        elif _KIND.get(base) == "special":
            used["64-bit conversion" if any("64" in part for part in parts) else "special"] += count
        elif base in ("LDG", "LDGSTS", "LDSM", "STG", "LDS", "STS", "LDL", "STL"):
            used["load/store"] += count * words
    pipe = max(used, key=lambda name: used[name] / lanes[name])
    return used[pipe] / lanes[pipe], pipe


def resident(binary: Binary, gpu: Gpu) -> int:
    """Number of programs that a multiprocessor runs at once."""
    warps = min(gpu.warps, REGISTERS // (math.ceil(max(binary.registers, 16) / 8) * 8 * WARP))
    blocks = min(gpu.blocks, warps // binary.warps)
    return min(blocks, gpu.shared // (binary.shared + 1024)) if binary.shared else blocks


@dataclass
class Work:
    """The work of a launch."""

    elements: int
    """Elements and steps."""
    moved: int
    """Bytes of memory that it has to move: each tensor once, twice if it is changed."""
    cached: int = 0
    """Further bytes that the cache moves."""
    trips: int = 1
    """Number of iterations of its loops."""
    products: int = 0
    """Multiplications with an addition on the tensor cores, of 8 bits."""
    persistent: int = 0
    """Programs per multiprocessor for a launch whose programs do the work of several, block by block."""


@dataclass
class Prediction:
    """A launch on a GPU, as predicted."""

    seconds: float
    bound: str
    share: float
    """The share of the speed at which a copy moves `Work.moved`."""
    counts: Counter[str]
    divisions: int
    """Number of divisions of 64-bit integers, each a call in the code."""
    per_element: float
    """Threads per element and step: with it, a thread's instructions become those of an element."""


def predict(launch: Launch, work: Work, binary: Binary, gpu: Gpu, counts: Counter[str]) -> Prediction:
    """The slowest of memory, cache and pipes, times the last wave's idle part if programs are persistent.

    A program that has a multiprocessor for itself first multiplies, and then finishes its sums: its times on tensor
    cores and pipes add up, and whole waves count.

    `counts` are the instructions of a thread, see `executed`.
    """
    programs = launch.arguments["blocks"] if work.persistent else launch.programs
    threads = programs * binary.warps * WARP
    clocks, pipe = cycles(counts, gpu)
    times = {
        "memory": work.moved / gpu.copy,
        "cache": (work.moved + work.cached) / gpu.cache,
        pipe: clocks * threads / (gpu.multiprocessors * gpu.clock * BUSY),
    }
    if work.products:
        waves = launch.programs / (gpu.multiprocessors * max(1, resident(binary, gpu)))
        alone = times.pop(pipe) if resident(binary, gpu) <= 1 else 0.0
        times["tensor cores"] = 2 * work.products / (gpu.tensor["int8"] * REACHED) + alone
        times["tensor cores"] *= math.ceil(waves) / waves
    bound = max(times, key=lambda name: times[name])
    seconds = times[bound]
    if work.persistent:
        waves = work.persistent / min(work.persistent, resident(binary, gpu))
        seconds *= math.ceil(waves) / waves
    divisions = len(re.findall(DIVISION, binary.assembly))
    return Prediction(seconds, bound, times["memory"] / seconds, counts, divisions, threads / work.elements)


def check(launch: Launch, work: Work, binary: Binary, found: Prediction) -> None:
    """Raise `RuntimeError` if the path that was followed through a kernel moves too little.

    Masked accesses count as made, so the threads' bytes are at least those of the work.
    """
    bits = sum(int(width[1:]) * count for width, count in accesses(found.counts).items())
    moved = bits // 8 * launch.programs * binary.warps * WARP
    if not work.persistent and not 0.9 * work.moved <= moved:
        raise RuntimeError(
            f"a launch moves {work.moved} bytes, and {moved} on the way found through its machine code: a loop is "
            "not gone round as often as it is"
        )
