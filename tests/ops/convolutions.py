"""Spikes and shapes of convolutions that the tests of products share."""

import torch
from torch import Tensor

SHAPES = [
    # steps, images, height, width, in, out, kernel
    (4, 2, 14, 14, 64, 96, 1),
    (4, 2, 7, 5, 48, 33, 3),
    (1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 3, 7, 64, 3),
    (3, 1, 9, 2, 65, 31, 3),
    (64, 1, 3, 4, 130, 70, 1),
    (300, 1, 2, 1, 5, 40, 1),
    (2, 1, 3, 3, 500, 32, 3),  # 4500 inputs: entries of the lists in units of rows
]


def draw(*shape: int, density: float, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).float()
