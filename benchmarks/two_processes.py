"""Two processes train one model, on one GPU if there is one: DistributedDataParallel with the gloo backend."""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import Bench, ParityError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdt_blocks import create_model

ALLOCATORS = ["default"]
PROCESSES, PORTLESS = 2, "file://{}"
Settings = dict[str, Any]


def run(bench: Bench) -> None:
    name, options, side, batch = bench.pick(
        cpu=("sdt_2_256", {"dim": 64}, 32, 4),
        cuda=("sdt_8_384", {}, 224, 32),
        trial=("sdt_2_256", {"dim": 16}, 16, 2),
    )
    settings = {"name": name, "options": options, "side": side, "batch": batch, "device": str(bench.device)}
    settings["rounds"] = 2 if bench.size == "trial" else 10
    setting = f"{name}, {side} x {side}, batch {batch} for each of {PROCESSES} processes"
    found = started(settings)
    try:
        parity = judged(found["errors"])
    except ParityError as error:
        bench.failures.append(f"{bench.suite}: {setting}: {error}")
        return
    bench.record("training step of two processes", setting, "sdt_blocks", found["seconds"], parity=parity)
    images = PROCESSES * batch / found["seconds"]
    bench.record("images of two processes", setting, "sdt_blocks", images, unit="images/s", parity=parity)


def judged(errors: dict[str, float]) -> str:
    for expected, error in errors.items():
        if not error <= 1e-9:
            raise ParityError(f"gradients differ by {error:.1e} of their norm from {expected}")
    return "gradients within " + ", ".join(f"{error:.0e} of {expected}" for expected, error in errors.items())


def started(settings: Settings) -> dict[str, Any]:
    """The findings of the first process: seconds of a step, and the error of its gradients."""
    # By the file's own name, which another process can import: run.py imports the suite under another name.
    import two_processes

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(two_processes.work, (settings, folder), nprocs=PROCESSES)  # type: ignore[attr-defined]
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    return found


def work(rank: int, settings: Settings, folder: str) -> None:
    """The work of one process."""
    dist.init_process_group(
        "gloo", init_method=PORTLESS.format(Path(folder) / "store"), rank=rank, world_size=PROCESSES
    )
    device = torch.device(settings["device"])
    errors = {"the mean of both processes' own": error_of_gradients(rank, settings, device)}
    if device.type == "cuda":  # DistributedDataParallel supports no other joined norms.
        errors["the whole batch's, with joined norms"] = error_of_gradients(rank, settings, device, joined=True)
    found = {"errors": errors, "seconds": seconds_of_a_step(settings, device)}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def error_of_gradients(rank: int, settings: Settings, device: torch.device, joined: bool = False) -> float:
    """For a small model in float64, relative to the norm of the mean of each process's own gradients.

    With `joined`, norms use the processes' batches as one, and so does the expected gradient.
    """
    torch.manual_seed(0)
    plain = create_model(settings["name"], depth=1, dim=16, num_classes=4).to(device, torch.float64)
    halves = [torch.rand(2, 3, 32, 32, device=device, dtype=torch.float64) for _ in range(PROCESSES)]
    labels, worst = torch.tensor([0, 1], device=device), 0.0
    gradients = []
    for batch in [torch.cat(halves)] if joined else halves:
        model = copy.deepcopy(plain)
        F.cross_entropy(model(batch), labels.repeat(len(batch) // 2)).backward()
        gradients.append([p.grad for p in model.parameters()])
    together = wrapped(nn.SyncBatchNorm.convert_sync_batchnorm(plain) if joined else plain, device)
    F.cross_entropy(together(halves[rank]), labels).backward()
    expected = [sum(parts[1:], start=parts[0]) / len(gradients) for parts in zip(*gradients, strict=True)]
    least = 1e-4 * max(value.norm() for value in expected)
    for p, value in zip(together.parameters(), expected, strict=True):
        worst = max(worst, ((p.grad - value).norm() / value.norm().clamp(min=least)).item())
    return worst


def seconds_of_a_step(settings: Settings, device: torch.device) -> float:
    """The median of a few rounds."""
    model = wrapped(create_model(settings["name"], **settings["options"]).to(device), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.rand(settings["batch"], 3, settings["side"], settings["side"], device=device)
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    seconds = []
    for _ in range(2 + settings["rounds"]):
        dist.barrier()
        start = time.perf_counter()
        step(model, optimizer, images, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def wrapped(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    return DistributedDataParallel(model, device_ids=[device.index or 0] if device.type == "cuda" else None)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
