"""Augmentation and evaluation transforms of images through timm, with every random draw tied to a key."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import auto_augment as timm_ops
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import Compose

ERASING_MODES = ("const", "pixel")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "random")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
"""The formats that are read, whatever the file's name: only pictures, not documents that a program would render."""

LARGEST_IMAGE = 89_478_485
"""Pixels of an image as stored, and as resized for evaluation; Pillow's own limit, a quarter of a GiB in RGB."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a gray image (ITU-R BT.601), as in Pillow's own conversion."""

# timm ignores a section that it does not know, and fails inside on others; this is the grammar of those that it knows.
_NUMBER = r"\d+(\.\d+)?"
_AUTO_AUGMENT = re.compile(
    rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3a|3aw)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(v0|v0r|original|originalr|3a)(-mstd{_NUMBER})?"
)

MAGNITUDES = 10
"""The magnitude to which timm limits any larger one, if no other limit is set."""

Transform = Callable[[Image.Image], Tensor]


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within it, Python's, NumPy's and torch's CPU generators are seeded by `key`; afterwards they are restored.

    timm's transforms draw from all three. Raises `ValueError` for a negative key.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - timm draws from this one
    try:
        random.seed(int(words[0]))
        np.random.seed(words)  # noqa: NPY002
        torch.random.default_generator.manual_seed(int(words[1]) << 32 | int(words[2]))
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])  # noqa: NPY002
        torch.set_rng_state(saved[2])


class Finish:
    """The end of every pipeline: an RGB image to a normalized tensor, `[3, H, W]` uint8 -> float32 `[C, H, W]`.

    One channel is the luma of the three. Random erasing, if enabled, sets a rectangle to 0, the mean ("const"), or to
    Gaussian noise ("pixel").
    """

    def __init__(
        self,
        *,
        in_channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        random_erasing: float = 0.0,
        erasing_mode: str = "const",
    ) -> None:
        self.in_channels = in_channels
        self.mean = _per_channel("mean", mean, in_channels)
        self.std = _per_channel("std", std, in_channels)
        if not bool((self.std > 0).all()):
            raise ValueError(f"std must be positive in each channel, got {list(std)}")
        # In float32, as images are: a network would not fire for an infinite pixel, and say nothing.
        if not bool(torch.stack([-self.mean, 1 - self.mean]).div(self.std).isfinite().all()):
            raise ValueError(
                f"with mean {list(mean)} and std {list(std)} pixels are beyond float32; give those of pixels in 0..1"
            )
        self.erase = RandomErasing(random_erasing, mode=erasing_mode, device="cpu") if random_erasing else None

    def __call__(self, image: Tensor) -> Tensor:
        x = image.to(torch.float32).div_(255)
        if self.in_channels == 1:
            x = (x * torch.tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)
        x = (x - self.mean) / self.std
        return self.erase(x) if self.erase else x


class _Bounded:
    """Refuses an image so narrow that it would be huge once its shorter side is resized."""

    def __init__(self, shorter_side: float) -> None:
        self.shorter_side = shorter_side

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = self.shorter_side / min(image.size)
        check_pixels("resized, it would have", *(round(side * scale) for side in image.size))
        return image


def build_transforms(
    *,
    img_size: int,
    in_channels: int = 3,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    scale: Sequence[float] = (1.0, 1.0),
    ratio: Sequence[float] = (1.0, 1.0),
    hflip: float = 0.0,
    color_jitter: float = 0.0,
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
    erasing_mode: str = "const",
) -> tuple[Transform, Transform]:
    """The training and the evaluation transform, RGB image -> float32 `[in_channels, img_size, img_size]`.

    Training: a random crop of `scale` of the area and of aspect `ratio`, resized; flip; auto-augment or, without it,
    color jitter (timm's rule, and so the released models'; only 3a uses both); random erasing. Evaluation: resize the
    shorter side to `img_size / crop_pct`, crop the center. Each call draws from the global generators: see `seeded`.

    Raises `ValueError` that names the value for anything out of range.
    """
    check_auto_augment(auto_augment)
    _check_augmentation(scale=scale, ratio=ratio, hflip=hflip, color_jitter=color_jitter, random_erasing=random_erasing)
    if erasing_mode not in ERASING_MODES:
        raise ValueError(f"erasing_mode {erasing_mode!r} is unknown; choose one of {', '.join(ERASING_MODES)}")
    evaluation = build_evaluation(
        img_size=img_size, in_channels=in_channels, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation
    )
    # Color operations fill with the mean; they see RGB even if the network sees gray.
    fill_mean = tuple(mean) if len(mean) == 3 else (mean[0],) * 3
    posterize = {name: _posterize for name, operation in timm_ops.NAME_TO_OP.items() if operation is timm_ops.posterize}
    with mock.patch.dict(timm_ops.NAME_TO_OP, posterize):
        augment = create_transform(
            img_size,
            is_training=True,
            scale=(scale[0], scale[1]),
            ratio=(ratio[0], ratio[1]),
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment or None,
            interpolation=interpolation,
            mean=fill_mean,
            normalize=False,
        )
    erase = Finish(
        in_channels=in_channels, mean=mean, std=std, random_erasing=random_erasing, erasing_mode=erasing_mode
    )
    train = Compose([augment, erase])
    with seeded(0):
        try:
            train(Image.new("RGB", (img_size, img_size), (128, 64, 32)))
        except Exception as error:  # report any option that timm fails on before training starts
            raise ValueError(f"the augmentation cannot be applied (auto_augment={auto_augment!r}): {error}") from error
    return train, evaluation


def build_evaluation(
    *,
    img_size: int,
    in_channels: int = 3,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
) -> Transform:
    """Only the evaluation transform of `build_transforms`. Raises `ValueError` that names the value."""
    if img_size < 1:
        raise ValueError(f"img_size must be a positive number of pixels, got {img_size}")
    if in_channels not in (1, 3):
        raise ValueError(f"images have 1 channel (gray) or 3 (RGB), got in_channels={in_channels}")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation {interpolation!r} is unknown; choose one of {', '.join(INTERPOLATIONS)}")
    resize = create_transform(
        img_size, crop_pct=crop_pct, interpolation=evaluation_interpolation(interpolation), normalize=False
    )
    finish = Finish(in_channels=in_channels, mean=mean, std=std)
    return Compose([_Bounded(img_size / crop_pct), resize, finish])


def evaluation_interpolation(interpolation: str) -> str:
    """How images are resized for evaluation if training uses `interpolation`, which may be random."""
    return "bicubic" if interpolation == "random" else interpolation


def check_auto_augment(auto_augment: str | None) -> None:
    """Raise `ValueError` for a string that timm would not understand, or would silently misread."""
    if auto_augment and not _AUTO_AUGMENT.fullmatch(auto_augment):
        raise ValueError(
            f"auto_augment {auto_augment!r} is unknown; write rand followed by any of -m9 -n2 -p0.5 -mstd0.5 -mmax10 "
            f"-inc1 -tweights (as in rand-m9-n1-mstd0.4-inc1), augmix with -m -w -d -a -b -mstd, or v0, v0r, original, "
            f"originalr, 3a with -mstd"
        )
    sections = re.findall(r"-([a-z]+)([^-]*)", auto_augment or "")
    said = [name for name, _ in sections]
    if twice := next((name for name in said if said.count(name) > 1), None):
        raise ValueError(f"auto_augment {auto_augment!r} says {twice} twice; timm would take one of the two")
    numbers = {name: float(value) for name, value in sections if name in ("m", "mmax", "p")}
    most = numbers.get("mmax") or MAGNITUDES
    if numbers.get("m", 0) > most:
        hint = " or a larger -mmax" if (auto_augment or "").startswith("rand") else ""
        raise ValueError(
            f"auto_augment {auto_augment!r}: timm would cut the magnitude to {most:g}; say -m{most:g}{hint}"
        )
    if numbers.get("p", 0) > 1:
        raise ValueError(f"auto_augment {auto_augment!r}: p is a probability, at most 1")


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's operation, except that the image is black if no bit is kept, as before Pillow refused this."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    result: Image.Image = timm_ops.posterize(image, bits_to_keep, **options)
    return result


def open_image(file: str | IO[bytes]) -> Image.Image:
    """The image in a file, in RGB: see `to_rgb`.

    Raises `OSError` if the file is damaged or in none of `FORMATS`, `ValueError` for more than `LARGEST_IMAGE` pixels,
    which is known before any of them is decoded.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise OSError(f"it is none of {', '.join(FORMATS)}") from None
    with image:
        check_pixels("its size is", *image.size)
        return to_rgb(image)


def check_pixels(what: str, width: int, height: int) -> None:
    """Raise `ValueError` for more than `LARGEST_IMAGE` pixels; `what` begins the message."""
    if width * height > LARGEST_IMAGE:
        raise ValueError(f"{what} {width} x {height} pixels; at most {LARGEST_IMAGE} are read")


def to_rgb(image: Image.Image) -> Image.Image:
    """The decoded image in RGB: gray repeated, transparency dropped, 16 bits reduced to 8, EXIF orientation ignored.

    Raises `OSError` if the file is damaged, `ValueError` for pixels without a fixed range, and `TypeError` if it is not
    an image.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected an image of PIL, got {type(image).__name__}; PIL.Image.open reads a file")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} outside 0 ... 65535")
        image = Image.fromarray((pixels // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels; store the image with 8 or 16 bits")
    return image.convert("RGB")


def _per_channel(name: str, values: Sequence[float], in_channels: int) -> Tensor:
    """`[C, 1, 1]` from one value for all channels, from one each, or from three for the luma of an RGB image."""
    tensor = torch.tensor([float(value) for value in values])
    if len(tensor) == 3 and in_channels == 1:
        tensor = (tensor * torch.tensor(LUMA)).sum(0, keepdim=True)
    elif len(tensor) == 1:
        tensor = tensor.repeat(in_channels)
    if len(tensor) != in_channels or not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{name} needs one finite value, or one for each of {in_channels} channels, got {list(values)}"
        )
    return tensor.view(in_channels, 1, 1)


def _check_augmentation(
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
    hflip: float,
    color_jitter: float,
    random_erasing: float,
) -> None:
    for name, pair, most in (("scale", scale, 1.0), ("ratio", ratio, float("inf"))):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most:
            raise ValueError(
                f"{name} must be (least, most) with 0 < least <= most{' <= 1' * (most == 1)}, got {list(pair)}"
            )
    for name, value in (("hflip", hflip), ("random_erasing", random_erasing)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a probability, got {value}")
    if not 0 <= color_jitter < float("inf"):
        raise ValueError(f"color_jitter must be 0 (off) or positive, got {color_jitter}")
