"""A small network whose layers all fire; untrained ones are nearly silent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdt_blocks import SpikeDrivenTransformer


def lively(**options) -> SpikeDrivenTransformer:
    """The same network each time: one block of 32 channels, three steps, five classes, unless said otherwise."""
    torch.manual_seed(0)
    defaults = {"depth": 1, "dim": 32, "num_classes": 5, "pooling": "0011", "time_steps": 3}
    return enliven(SpikeDrivenTransformer(**{**defaults, **options}))


def enliven(model):
    """The model in eval mode with random norms and weights such that it fires everywhere."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1, 3)
            nn.init.uniform_(module.bias, 0, 1)
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


@pytest.fixture(name="enliven")
def enliven_():
    """The function `enliven`."""
    return enliven


@pytest.fixture
def small():
    """Makes the network of `lively`."""
    return lively


@pytest.fixture
def inputs_of_layers():
    """Hooks a model, and gives the latest inputs of its convolutions and linear layers by name."""

    def hooked(model):
        inputs = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(lambda m, args, output, name=name: inputs.update({name: args[0]}))
        return inputs

    return hooked
