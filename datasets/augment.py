"""Augmentations of event frames, one operation for all frames of a sample, and their names for the recipes.

Each is a callable `(frames, rng) -> frames` on float frames `[T, C, H, W]`; only the generator decides what it does, so
a sample's augmentation can be repeated from its seed. The published originals are Cutout (arXiv:1708.04552) and
SNNAugment (Neuromorphic Data Augmentation, arXiv:2203.06145).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor
from torchvision.transforms.functional import affine, rotate

from sdt_datasets.events import DropAtRandom, DropByArea, DropByTime, EventDrop

EventAugmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
FrameAugmentation = Callable[[Tensor, np.random.Generator], Tensor]


OPERATION_LIMITS = {"identity": 0.0, "shear_x": 0.3, "translate_x": 5.0, "translate_y": 5.0, "rotate": 30.0}
CUTOUT_AREAS = (0.001, 0.11)
MAGNITUDE_BINS = 31


class HorizontalFlip:
    """Mirrors left and right with the given probability: `[T, C, H, W]` -> `[T, C, H, W]`."""

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be within [0, 1], got {probability!r}")
        self.probability = probability

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        return frames.flip(-1) if rng.random() < self.probability else frames


class Roll:
    """Shifts by up to `max_shift` pixels each way; pixels that leave at one border enter at the opposite one.

    `[T, C, H, W]` -> `[T, C, H, W]`.
    """

    def __init__(self, max_shift: int = 5) -> None:
        if max_shift < 0:
            raise ValueError(f"max_shift must be >= 0 pixels, got {max_shift!r}")
        self.max_shift = max_shift

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        down, right = rng.integers(-self.max_shift, self.max_shift + 1, size=2).tolist()
        return frames.roll((down, right), dims=(-2, -1))


class Cutout:
    """Sets `holes` squares of `length` pixels to zero, with centers anywhere in the frame (arXiv:1708.04552).

    `[T, C, H, W]` -> `[T, C, H, W]`; a square that extends over the border is clipped there.
    """

    def __init__(self, holes: int = 1, length: int = 16) -> None:
        if holes < 1 or length < 1:
            raise ValueError(f"holes and length must be >= 1, got {holes!r} and {length!r}")
        self.holes, self.length = holes, length

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        frames = frames.clone()
        height, width = frames.shape[-2:]
        for _ in range(self.holes):
            top, left = (int(rng.integers(side)) - self.length // 2 for side in (height, width))
            frames[..., max(top, 0) : top + self.length, max(left, 0) : left + self.length] = 0
        return frames


class RandomOperation:
    """One operation, drawn at random, with one of 31 magnitudes (SNNAugment, arXiv:2203.06145).

    `[T, C, H, W]` -> `[T, C, H, W]`, nearest neighbor about the center, zeros from outside. The operations and
    the largest magnitude of each: `identity`; `shear_x` by an angle of 0.3 rad; `translate_x` and
    `translate_y` by 5 whole pixels; `rotate` by 30 degrees; `cutout`, which sets a square of 0.1 to 11 % of the
    frame's area to zero.
    """

    def __init__(self, operations: Sequence[str] = ("identity", "shear_x", "translate_x", "rotate")) -> None:
        known = (*OPERATION_LIMITS, "cutout")
        if set(operations) - set(known) or not operations:
            raise ValueError(f"operations must be among {', '.join(known)}, got {tuple(operations)!r}")
        self.operations = tuple(operations)

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        operation, place = self.operations[rng.integers(len(self.operations))], rng.integers(MAGNITUDE_BINS)
        if operation == "cutout":
            return _cut_out(frames, float(np.linspace(*CUTOUT_AREAS, MAGNITUDE_BINS)[place]), rng)
        magnitude = OPERATION_LIMITS[operation] * float(np.linspace(-1, 1, MAGNITUDE_BINS)[place])
        return transform_frames(frames, operation, magnitude)


def transform_frames(frames: Tensor, operation: str, magnitude: float) -> Tensor:
    """Apply one operation of `RandomOperation` with the given magnitude to all frames `[T, C, H, W]`.

    A positive magnitude turns counter-clockwise, moves right or down, and shears the upper half to the right.
    """
    if operation == "identity":
        return frames
    if operation == "rotate":
        return rotate(frames, magnitude)
    offset = {"translate_x": [int(magnitude), 0], "translate_y": [0, int(magnitude)]}.get(operation, [0, 0])
    shear = [math.degrees(magnitude) if operation == "shear_x" else 0.0, 0.0]
    return affine(frames, 0.0, offset, 1.0, shear)


def _cut_out(frames: Tensor, area: float, rng: np.random.Generator) -> Tensor:
    """Set a square with this share of the frame's area to zero; it lies within the frame."""
    height, width = frames.shape[-2:]
    side = min(max(round(math.sqrt(area * height * width)), 1), height, width)
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    frames = frames.clone()
    frames[..., top : top + side, left : left + side] = 0
    return frames


EVENT_AUGMENTATIONS: dict[str, Callable[[tuple[int, int, int]], EventAugmentation]] = {
    "drop_by_time": lambda sensor_size: DropByTime(),
    "drop_by_area": lambda sensor_size: DropByArea(sensor_size=sensor_size),
    "drop_at_random": lambda sensor_size: DropAtRandom(),
    "event_drop": lambda sensor_size: EventDrop(sensor_size=sensor_size),
}
FRAME_AUGMENTATIONS: dict[str, Callable[[], FrameAugmentation]] = {
    "hflip": HorizontalFlip,
    "roll": Roll,
    "cutout": Cutout,
    "random_op": RandomOperation,
    "random_op_wide": lambda: RandomOperation((*OPERATION_LIMITS, "cutout")),
}


def build_augmentations(
    names: Sequence[str], sensor_size: tuple[int, int, int]
) -> tuple[list[EventAugmentation], list[FrameAugmentation]]:
    """The named augmentations of events, and those of frames, each group in the given order.

    Raises `ValueError` for a name that is in neither `EVENT_AUGMENTATIONS` nor `FRAME_AUGMENTATIONS`.
    """
    known = [*EVENT_AUGMENTATIONS, *FRAME_AUGMENTATIONS]
    unknown = [name for name in names if name not in known]
    if isinstance(names, str) or unknown:
        raise ValueError(f"augment must be a list of names among {', '.join(known)}; got {names!r}")
    of_events = [EVENT_AUGMENTATIONS[name](sensor_size) for name in names if name in EVENT_AUGMENTATIONS]
    of_frames = [FRAME_AUGMENTATIONS[name]() for name in names if name in FRAME_AUGMENTATIONS]
    return of_events, of_frames
