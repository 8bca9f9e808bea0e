"""Data cards: how a trained model's inputs were prepared, and the names of its classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from .options import Option, check_option, options_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

IMAGENET = "imagenet-1k"
_IMAGENET_CLASSES = 1000
_IDENTIFIER = re.compile(r"n\d{8}")
_PREPARATION = ("mean", "std", "interpolation", "crop_pct")
_ACTIVATIONS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class ImageNetClasses(Sequence[str]):
    """The identifiers of ImageNet's 1000 classes (n01440764, ...), taken from timm when one is needed."""

    def __len__(self) -> int:
        return _IMAGENET_CLASSES

    def __getitem__(self, index: Any) -> Any:
        return tuple(_imagenet())[index]


def _read_names(names: Any) -> Sequence[str] | None:
    """Class names in the form that a card keeps. Raises `TypeError` or `ValueError`."""
    if names is None or isinstance(names, ImageNetClasses):
        return names
    if names == IMAGENET:
        return ImageNetClasses()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        shown = repr(names)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise TypeError(f"class_names must be a list of texts, or {IMAGENET!r}, got {shown}")
    if not names:
        raise ValueError("class_names must name at least one class, got none")
    return tuple(names)


@dataclass(frozen=True)
class DataCard:
    """How a model's inputs are prepared and what its classes are called; kept as `model.card` and saved with the model.

    `mean`, `std`, `interpolation` and `crop_pct` describe the preparation of images (`transform_of` does it); event
    frames have none of the four. Raises `TypeError` or `ValueError` naming the value.

    >>> card = DataCard(class_names=["cat", "dog"], input_size=(32, 32))
    >>> card.class_names, card.input_size
    (('cat', 'dog'), (32, 32))
    """

    class_names: Annotated[Sequence[str] | None, Option(read=_read_names)] = None
    """In the order of the logits; "imagenet-1k" stands for ImageNet's identifiers."""
    input_size: Annotated[Sequence[int] | None, Option(least=1, most=65536)] = None
    """Height and width in pixels."""
    mean: Annotated[Sequence[float] | None, Option()] = None
    """Of values in 0..1: one for all channels, one for each, or three for the luma of an RGB image."""
    std: Annotated[Sequence[float] | None, Option(above=0)] = None
    interpolation: str | None = None
    crop_pct: Annotated[float | None, Option(above=0, most=1)] = None
    """The shorter side is resized to `input_size / crop_pct`, then the center is cropped."""
    activation: str | None = None
    """From logits to probabilities: "softmax", or "sigmoid" where training judged each class by itself."""
    note: str | None = None
    """Anything else that a user of the weights has to know, in a sentence."""

    def __post_init__(self) -> None:
        for name, keyword in options_of(DataCard).items():
            object.__setattr__(self, name, check_option(name, getattr(self, name), keyword))
        if self.input_size is not None and len(self.input_size) != 2:
            raise ValueError(f"input_size must be height and width, got {list(self.input_size)}")
        if self.activation not in (None, *_ACTIVATIONS):
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {self.activation!r}")
        missing = [name for name in _PREPARATION if getattr(self, name) is None]
        if missing and len(missing) < len(_PREPARATION):
            raise ValueError(f"{', '.join(_PREPARATION)} say together how images are prepared; {missing[0]} is missing")

    @property
    def labels(self) -> list[str] | None:
        """The class names for people: words for ImageNet's identifiers, any other name unchanged."""
        return None if self.class_names is None else words_of(self.class_names)

    @property
    def preparation(self) -> dict[str, Any]:
        """`mean`, `std`, `interpolation` and `crop_pct`; empty if the inputs are not images."""
        return {} if self.mean is None else {name: getattr(self, name) for name in _PREPARATION}

    def written(self) -> dict[str, Any]:
        """The card as plain data for a config.json."""
        names = IMAGENET if isinstance(self.class_names, ImageNetClasses) else self.class_names
        values = {**{item.name: getattr(self, item.name) for item in fields(self)}, "class_names": names}
        return {name: value for name, value in values.items() if value is not None}

    def without_names(self) -> DataCard:
        """The same card without class names."""
        return replace(self, class_names=None)


def imagenet_card(crop_pct: float, note: str | None = None) -> DataCard:
    """The card of a model of ImageNet at 224 x 224 pixels, cropped to this share of the shorter side."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return DataCard(IMAGENET, (224, 224), mean=mean, std=std, interpolation="bicubic", crop_pct=crop_pct, note=note)


def read_card(content: Any) -> DataCard | None:
    """The card from the data that `DataCard.written` returned. Raises `TypeError` or `ValueError`."""
    if content is None:
        return None
    if not isinstance(content, dict):
        raise TypeError(f"card must be an object of {', '.join(options_of(DataCard))}, got {type(content).__name__}")
    unknown = [str(name)[:80] for name in content if name not in options_of(DataCard)]
    if unknown:
        raise TypeError(f"card: unknown {', '.join(unknown)}; it has {', '.join(options_of(DataCard))}")
    return DataCard(**content)


def check_card(card: Any, num_classes: int) -> None:
    """Raises `TypeError` if it is not a card, `ValueError` if it names more or fewer classes than the model has."""
    if card is not None and not isinstance(card, DataCard):
        raise TypeError(f"model.card must be a DataCard or None, got {type(card).__name__}")
    if card is not None and card.class_names is not None and num_classes not in (0, len(card.class_names)):
        raise ValueError(f"card has {len(card.class_names)} class_names, but the model has {num_classes} classes")


def words_of(names: Iterable[str]) -> list[str]:
    """Class names for people: words for ImageNet's identifiers, any other name unchanged."""
    listed = list(names)
    words = _imagenet() if any(map(_IDENTIFIER.fullmatch, listed)) else {}
    return [words.get(name, name) for name in listed]


@cache
def _imagenet() -> dict[str, str]:
    """ImageNet's 1000 classes in order: identifiers, and their words. Raises `ImportError`."""
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise ImportError(
            f"the names of ImageNet's classes come with timm, which cannot be imported: {error}"
        ) from None
    info = ImageNetInfo(IMAGENET)
    return {name: info.label_name_to_description(name) for name in info.label_names()}


def transform_of(model: nn.Module) -> Callable[[Image], Tensor]:
    """The evaluation transform of a model's images, according to its card: a PIL image -> float32 `[C, H, W]`.

    Gray, 16-bit and transparent images become RGB first. Raises `ValueError` for a model without a card for images, and
    `ImportError` without torchvision or timm.

    >>> from PIL import Image
    >>> model = example_model()
    >>> x = transform_of(model)(Image.new("L", (40, 30)))
    >>> x.shape, model.card.class_names[model(x[None]).argmax()] in "0123456789"
    (torch.Size([1, 16, 16]), True)
    """
    card = getattr(model, "card", None)
    if not isinstance(card, DataCard):
        raise ValueError(
            f"{type(model).__name__} does not say how its images are prepared: a model from load_model or a released "
            f"file of ImageNet does (in a wrapper: the model inside), any other takes model.card = DataCard(...)"
        )
    if not card.preparation or card.input_size is None or len(set(card.input_size)) > 1:
        raise ValueError(
            f"the card of {type(model).__name__} is not one of square images (input_size, {', '.join(_PREPARATION)}): "
            f"{card.written() | {'class_names': '...'}}; sdt_datasets.events makes the frames of event recordings"
        )
    try:
        from torchvision.transforms import Compose

        from sdt_datasets.image_transforms import build_evaluation, to_rgb
    except ImportError as error:
        raise ImportError(
            f"transform_of needs torchvision and timm (pip install 'sdt_blocks[recipes]'): {error}"
        ) from None
    channels = getattr(model, "in_channels", 3)
    resize = build_evaluation(img_size=card.input_size[0], in_channels=channels, **card.preparation)
    return Compose([to_rgb, resize])  # type: ignore[no-any-return]
