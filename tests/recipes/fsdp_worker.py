"""Started by torchrun in two processes: a model divided by FSDP trains, is saved, restored, and trains on alike."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from accelerate.utils import DistributedType
from common.config import load_config
from common.models import build_model, fit_to_data, optimizer_state, restore_optimizer, whole_model
from common.optim import build_optimizer

from sdt_blocks import SpikeDrivenBlock

CONFIG = load_config(["model.dim=16", "model.depth=2", "model.pooling=0001"], default="digits")
CONFIG = fit_to_data(CONFIG, in_channels=1, num_classes=10)
# What Accelerate would be on GPUs; on CPUs it does not offer FSDP.
ACCELERATOR: Any = SimpleNamespace(
    distributed_type=DistributedType.FSDP, unwrap_model=lambda model: model, device=torch.device("cpu")
)


def divide(model: Any) -> tuple[Any, Any]:
    """The model's parameters over both processes, block by block, and an optimizer as Accelerate wraps it."""
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if isinstance(module, SpikeDrivenBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999))
    return model, SimpleNamespace(optimizer=optimizer)


def train(model: Any, optimizer: Any, updates: int) -> None:
    for update in range(updates):
        torch.manual_seed(10 * update + torch.distributed.get_rank())
        model(torch.rand(4, 1, 8, 8)).square().sum().backward()
        optimizer.optimizer.step()
        optimizer.optimizer.zero_grad()


def main(file: str) -> None:
    torch.distributed.init_process_group("gloo")
    model, optimizer = divide(build_model(CONFIG))
    train(model, optimizer, 2)
    weights = whole_model(ACCELERATOR, CONFIG, model).state_dict()
    assert all(type(value) is torch.Tensor for value in weights.values())
    state = optimizer_state(ACCELERATOR, model, optimizer)
    if torch.distributed.get_rank() == 0:
        torch.save({"weights": weights, "optimizer": state}, file)
    torch.distributed.barrier()

    saved = torch.load(file, weights_only=True)
    whole = build_model(CONFIG)
    whole.load_state_dict(saved["weights"])
    restored, its_optimizer = divide(whole)
    restore_optimizer(ACCELERATOR, restored, its_optimizer, saved["optimizer"])
    train(model, optimizer, 2)
    train(restored, its_optimizer, 2)
    for (name, ours), theirs in zip(model.named_parameters(), restored.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs.full_tensor()), name
    print("the restored model went on alike")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
