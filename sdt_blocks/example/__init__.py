"""A small trained model and images for it, so that examples and first steps run on a network that fires."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ..models import SpikeDrivenTransformer, load_model

FOLDER = Path(__file__).parent
IMAGES = "images.safetensors"


def example_model() -> SpikeDrivenTransformer:
    """A Spike-Driven Transformer (2 blocks, 32 channels, 4 steps) that reads handwritten digits, in eval mode.

    Trained on scikit-learn's digits by the command in `sdt_blocks/example/README.md`; it takes gray images
    `[B, 1, 16, 16]` as `example_images` gives them, and its classes are the digits 0 to 9.

    >>> images, labels = example_images()
    >>> bool((example_model()(images).argmax(1) == labels).all())
    True
    """
    return load_model(FOLDER)


def example_images() -> tuple[Tensor, Tensor]:
    """Twenty test images that `example_model` has not seen in training, two per digit, prepared as in its recipe.

    Shapes: images `[20, 1, 16, 16]`, standardized; labels `[20]`, the digits.

    >>> [part.shape for part in example_images()]
    [torch.Size([20, 1, 16, 16]), torch.Size([20])]
    """
    content = load_file(FOLDER / IMAGES)
    return content["images"], content["labels"]
