"""Golden vectors, and NaN in memory that a kernel forgot to write."""

from __future__ import annotations

import os

# Read when Triton is imported, and torch may import it: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import sdt_blocks

GOLDEN = Path(__file__).with_name("golden")
GOLDEN_NAMES = ("sdt_lif_static_64", "sdt_plif_static_32", "sdt_lif_dvs_64", "sdt_lif_dvsmode_tet_32")


@dataclass
class Golden:
    """One golden file: tensors by group, and a fresh model with its weights."""

    name: str
    config: dict
    firing_rates: dict[str, list[float]]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {key.split(".", 1)[1]: value for key, value in self.tensors.items() if key.startswith(f"{prefix}.")}

    def model(self, **overrides) -> sdt_blocks.SpikeDrivenTransformer:
        c = self.config
        options = {
            "depth": c["depth"],
            "dim": c["dim"],
            "num_heads": c["num_heads"],
            "mlp_ratio": c["mlp_ratio"],
            "in_channels": c["in_channels"],
            "num_classes": c["num_classes"],
            "time_steps": c["T"],
            "pooling": c["pooling_stat"],
            "neuron": c["spike_mode"],
            "event_pooling": c["dvs_mode"],
            "per_step": c["TET"],
        }
        model = sdt_blocks.SpikeDrivenTransformer(**{**options, **overrides})
        model.load_state_dict(sdt_blocks.convert_released_state_dict(self.group("state")))
        return model.eval()


def load_golden(name: str) -> Golden:
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for layer, shape in json.loads(metadata["hook_shapes"]).items():
        bits = np.unpackbits(tensors[f"hook.{layer}"].numpy(), count=int(np.prod(shape)))
        tensors[f"hook.{layer}"] = torch.from_numpy(bits).view(shape)
    return Golden(name, json.loads(metadata["config"]), json.loads(metadata["firing_rates"]), tensors)


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each of the four golden files in turn."""
    return load_golden(request.param)


@pytest.fixture
def static_golden() -> Golden:
    """The golden file with images, pooling 1111 and LIF."""
    return load_golden("sdt_lif_static_64")


@pytest.fixture
def released_file() -> Path:
    """A checkpoint in the released pickle format, with the weights of `static_golden`."""
    return GOLDEN / "released_format.pth.tar"


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan():
    """`torch.empty` gives NaN, so that a result nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
