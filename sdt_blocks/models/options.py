"""The options of models: their types and bounds are in the annotations of a constructor and nowhere else."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from ..neuron import NeuronLike, neuron_spec

Init = TypeVar("Init", bound=Callable[..., None])

MOST = 10**9
"""The largest number that is allowed if the annotation has no upper bound."""


@dataclass(frozen=True)
class Option:
    """Bounds and a description for an annotation of an option."""

    help: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    read: Callable[[Any], Any] | None = None
    """Converts the value to the plain data that is kept in a config.json."""

    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        named = {"least": self.least, "above": self.above, "most": self.most, "below": self.below}
        return {name: bound for name, bound in named.items() if bound is not None}

    def check(self, name: str, number: float) -> None:
        """Raises `ValueError` for a number out of bounds."""
        words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
        inside = {
            "least": lambda bound: number >= bound,
            "above": lambda bound: number > bound,
            "most": lambda bound: number <= bound,
            "below": lambda bound: number < bound,
        }
        bounds = self.bounds()
        if self.below is None:
            bounds.setdefault("most", MOST)
        if not all(inside[key](bound) for key, bound in bounds.items()):
            expected = " and ".join(f"{words[key]} {bound:g}" for key, bound in bounds.items())
            raise ValueError(f"{name} must be {expected}, got {_shown(number)}")


Depth = Annotated[int, Option("encoder blocks", least=0, most=1000)]
Width = Annotated[int, Option("channels per token", least=1, most=65536)]
Widths = Annotated[Sequence[int], Option("channels of the stages", least=1, most=65536)]
Depths = Annotated[Sequence[int], Option("blocks of the stages", least=0, most=1000)]
Heads = Annotated[int, Option("attention heads", least=1, most=65536)]
Ratio = Annotated[float, Option("hidden width of the MLP over dim", above=0, most=64)]
Channels = Annotated[int, Option("channels of the input", least=1, most=65536)]
Classes = Annotated[int, Option("classes; 0 leaves the head out", least=0, most=10**7)]
Steps = Annotated[int, Option("number of time steps; an image is shown at each", least=1, most=4096)]
DropPath = Annotated[float, Option("stochastic depth of the last block", least=0, below=1)]
Pooling = Annotated[str, Option('four flags, quoted in YAML: "0011"')]
EventPooling = Annotated[bool, Option("3 x 3 max inside the attention")]
Scale = Annotated[float, Option("factor of the attention", above=0, most=1e6)]
QKVBias = Annotated[bool, Option("biases in front of the norms of q, k and v")]
MixesImages = Annotated[bool, Option("a neuron of the last attentions continues from image to image, as released")]
Levels = Annotated[int, Option("largest level of the integer neurons", least=1, most=1024)]
LevelNorm = Annotated[float | None, Option("divisor of the levels; null: the largest level", above=0, most=1024)]
LayerScales = Annotated[bool, Option("a learned factor per channel behind the attention blocks' branches")]
RepConvs = Annotated[bool, Option("a linear chain in front of each attention")]
Form = Annotated[str, Option("data for which the stems are made: imagenet, cifar or events")]
SecondHead = Annotated[bool, Option("a second head, which learns from a teacher")]
PerStep = Annotated[bool, Option("return the logits of every step, for training with TET")]
Neuron = Annotated[NeuronLike, Option("spiking neuron: lif or plif", read=neuron_spec)]


@dataclass(frozen=True)
class Keyword:
    """A keyword of a constructor; its default is `inspect.Parameter.empty` if it has none."""

    kind: Any
    option: Option
    default: Any


def options_of(model: type) -> dict[str, Keyword]:
    """The keywords of a model's constructor."""
    hints = typing.get_type_hints(model.__init__, include_extras=True)  # type: ignore[misc]
    keywords = {}
    for name, parameter in inspect.signature(model).parameters.items():
        hint = hints.get(name, Any)
        # Python 3.10 wraps the type of an argument whose default is None in Optional.
        hint = next((one for one in typing.get_args(hint) if typing.get_origin(one) is Annotated), hint)
        kind, *said = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        option = next((one for one in said if isinstance(one, Option)), Option())
        keywords[name] = Keyword(kind, option, parameter.default)
    return keywords


def keeps_options(init: Init) -> Init:
    """Decorates a constructor: its arguments are first checked against their annotations, and kept as `self.config`.

    Raises `TypeError` or `ValueError` that names the option, the value and what is expected.
    """
    signature = inspect.signature(init)
    _, *parameters = signature.parameters.values()
    if any(parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters):
        raise TypeError("a constructor with @keeps_options states each option by its name, not as *args or **kwargs")

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        bound = signature.bind(self, *args, **options)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        owner = next(kind for kind in type(self).__mro__ if vars(kind).get("__init__") is checked)
        keywords = options_of(owner)
        config = {name: check_option(name, value, keywords[name]) for name, value in given}
        init(self, **config)
        self.config, self.card = config, None

    checked.keeps_options = True  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def check_option(name: str, value: Any, keyword: Keyword) -> Any:
    """The value as plain Python data. Raises `TypeError` or `ValueError` if the keyword does not allow it."""
    return _read(name, value, keyword.kind, keyword.option)


def _read(name: str, value: Any, kind: Any, option: Option) -> Any:
    if option.read is not None:
        return option.read(value)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if value is None and type(None) in typing.get_args(kind):
            return None
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} must be a list of numbers, got {_shown(value)}")
        return tuple(_read(f"{name}[{i}]", one, typing.get_args(kind)[0], option) for i, one in enumerate(value))
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, number):
            expected = "a whole number" if kind is int else "a number"
            raise TypeError(f"{name} must be {expected}, got {_shown(value)}")
        plain = int(value) if isinstance(value, numbers.Integral) else float(value)
        if isinstance(plain, float) and not math.isfinite(plain):
            raise ValueError(f"{name} must be finite, got {plain}")
        option.check(name, plain)
        return plain
    if kind in (bool, str) and not isinstance(value, kind):
        raise TypeError(f"{name} must be {'True or False' if kind is bool else 'text'}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value and its type for an error message."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a whole number of more than 30 digits"
    text = repr(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return text
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
