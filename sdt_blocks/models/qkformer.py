"""QKFormer and its published variants."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..blocks.sizes import check_heads, check_multiple, hidden_width
from ..blocks.spike_level import QKAttention, SpikeLevelMLP, SpikeShortcut, SpikingSelfAttention
from ..blocks.units import ConvNorm
from ..neuron import LIF, NeuronLike, make_neuron
from ..steps import check_sequence, fire, pool, project, project_and_fire, shortcut
from .backbone import Backbone, initialize
from .card import imagenet_card
from .family import ReleasedKeys, count_blocks, count_classes, read_mlp_ratio, shape_of
from .options import (
    Channels,
    Classes,
    Depths,
    Form,
    Heads,
    MixesImages,
    Neuron,
    PerStep,
    Ratio,
    Steps,
    Width,
    keeps_options,
)
from .registry import register


class Stem(NamedTuple):
    """A patch embedding: widths of its layers as divisors of its own, those that pool, the start of its shortcut."""

    shares: tuple[int, ...]
    pools: tuple[bool, ...]
    after: int
    """The number of layers before the shortcut starts."""


FORMS: dict[str, tuple[Stem, ...]] = {
    "imagenet": (Stem((2, 1, 1), (True, True, False), 1), *[Stem((1, 1), (True, False), 0)] * 2),
    "cifar": (Stem((2, 1), (False, False), 1), *[Stem((1, 1), (False, True), 0)] * 2),
    "events": (Stem((8, 4, 2, 1), (False, True, True, True), 2), Stem((1, 1), (False, True), 0)),
}
"""The stems of each form, one per stage. All stages but the last have token attention."""


class ShortcutEmbedding(nn.Module):
    """Patch embedding with a shortcut that is projected to the new width and size (SPEDS); its poolings see membranes.

        layers:   x = LIF(pool(BN(conv3x3(x))));   result = x + LIF(BN(conv1x1(y)))

    `y` is the input of the layer `stem.after`; the 1x1 convolution has the stride of all poolings from there on.

    Shapes: x `[T, B, in_channels, H, W]` to sums of spikes, 0 to 2, `[T, B, dim, H', W']`.
    """

    def __init__(self, in_channels: int, dim: int, stem: Stem, *, neuron: NeuronLike = LIF) -> None:
        super().__init__()
        check_multiple(dim, max(stem.shares), "the width of a stage")
        self.in_channels, self.after = in_channels, stem.after
        channels = [in_channels, *(dim // share for share in stem.shares)]
        self.layers = nn.ModuleList(ConvNorm(channels[i], channels[i + 1], 3) for i in range(len(stem.shares)))
        self.pools = nn.ModuleList(nn.MaxPool2d(3, 2, 1) if pools else nn.Identity() for pools in stem.pools)
        self.neurons = nn.ModuleList(make_neuron(neuron, channels=width) for width in channels[1:])
        self.residual = ConvNorm(channels[stem.after], dim, stride=2 ** sum(stem.pools[stem.after :]))
        self.residual_neuron = make_neuron(neuron, channels=dim)

    def forward(self, x: Tensor) -> Tensor:
        check_sequence(x, self.in_channels, "ShortcutEmbedding")
        source = x
        for i, (layer, after, neuron) in enumerate(zip(self.layers, self.pools, self.neurons, strict=True)):
            if i == self.after:
                source = x
            if isinstance(after, nn.Identity):
                x = project_and_fire(layer, neuron, x)
            else:
                x = fire(neuron, pool(after, project(layer, x)))
        return shortcut(x, project_and_fire(self.residual, self.residual_neuron, source))


class QKFormerBlock(nn.Module):
    """Token attention, or spiking self-attention if `full`, and MLP, each within a shortcut that adds spikes.

    Shapes: sums of spikes `[T, B, dim, H, W] -> [T, B, dim, H, W]`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4,
        full: bool = False,
        mixes_images: bool = False,
        neuron: NeuronLike = LIF,
    ) -> None:
        super().__init__()
        attention: nn.Module = QKAttention(dim, num_heads=num_heads, neuron=neuron)
        if full:
            attention = SpikingSelfAttention(dim, num_heads=num_heads, mixes_images=mixes_images, neuron=neuron)
        self.attention = SpikeShortcut(attention)
        self.mlp = SpikeShortcut(SpikeLevelMLP(dim, hidden=hidden_width(dim, mlp_ratio), neuron=neuron))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(self.attention(x))
        return result


class QKFormer(Backbone):
    """QKFormer (Zhou et al., NeurIPS 2024, https://arxiv.org/abs/2403.16552).

    Each stage has twice the width of the one before, the last has `dim`: a patch embedding and `depths` blocks, with
    token attention in all stages but the last, which has spiking self-attention. Then mean over tokens, linear head,
    mean over time steps. `form` chooses the stems: "imagenet" (stages at 1/4, 1/8, 1/16 of the image's size), "cifar"
    (1, 1/2, 1/4) or "events" (two stages at 1/8 and 1/16). Shortcuts add spikes, so the model is not spike-driven.

    `mixes_images=True` is the model as released: in the last stage a neuron carries its state from image to image of a
    batch (see `AcrossImages`), and answers depend on the batch. The published accuracies were measured like this; with
    the released ImageNet weights a user found 78.7 % with it, for images sorted by class, and 74.2 % without. Train
    without it.

    Input: images `[B, in_channels, H, W]`, shown `time_steps` times, or frames `[B, T, in_channels, H, W]` with any T
    >= 1. Output: logits `[B, num_classes]`, or with `per_step` `[T, B, num_classes]`. With `num_classes=0` there is no
    head, and the output is the mean of the sums of spikes.

    Raises `ValueError` for dimensions that do not fit each other, and for input of another shape.

    >>> QKFormer(depths=(1, 1, 1), dim=64, num_classes=10, form="cifar")(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    # Blocks stay whole when FSDP or device maps shard the model.
    _no_split_modules = ("QKFormerBlock", "ShortcutEmbedding")

    @keeps_options
    def __init__(
        self,
        *,
        depths: Depths,
        dim: Width,
        num_heads: Heads = 8,
        mlp_ratio: Ratio = 4,
        in_channels: Channels = 3,
        num_classes: Classes = 1000,
        time_steps: Steps = 4,
        form: Form = "imagenet",
        mixes_images: MixesImages = False,
        neuron: Neuron = "lif",
        per_step: PerStep = False,
    ) -> None:
        super().__init__()
        widths = _widths(form, depths, dim, num_heads)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.time_steps, self.per_step = time_steps, per_step
        before = (in_channels, *widths[:-1])
        self.embeddings = nn.ModuleList(
            ShortcutEmbedding(channels, width, stem, neuron=neuron)
            for channels, width, stem in zip(before, widths, FORMS[form], strict=True)
        )

        def block(stage: int) -> nn.Module:
            full = stage == len(widths) - 1
            options: dict[str, Any] = {"num_heads": num_heads, "mlp_ratio": mlp_ratio, "neuron": neuron}
            return QKFormerBlock(widths[stage], full=full, mixes_images=mixes_images, **options)

        self.stages = nn.ModuleList(
            nn.Sequential(*(block(stage) for _ in range(depth))) for stage, depth in enumerate(depths)
        )
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(lambda module: initialize(module, nn.Conv2d))

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Sums of spikes of the stages, `[T, B, C, H, W]` each."""
        return self.run_stages(x, self.embeddings, self.stages)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        stems, reduction, found = FORMS[self.config["form"]], 1, []
        for stage, stem in enumerate(stems):
            reduction *= 2 ** sum(stem.pools)
            width = self.config["dim"] // 2 ** (len(stems) - 1 - stage)
            found.append({"num_chs": width, "reduction": reduction, "module": f"stages.{stage}"})
        return found


def _widths(form: str, depths: Sequence[int], dim: int, num_heads: int) -> list[int]:
    """The widths of the stages. Raises `ValueError`."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    stages = len(FORMS[form])
    if len(depths) != stages:
        raise ValueError(f"depths must be the numbers of blocks of {stages} stages ({form}), got {list(depths)}")
    check_multiple(dim, 2 ** (stages - 1), "dim")
    widths = [dim // 2**halvings for halvings in reversed(range(stages))]
    for width in widths:
        check_heads(width, num_heads)
    return widths


_CIFAR: dict[str, Any] = {"depths": (1, 1, 2), "dim": 384, "form": "cifar"}
_EVENTS: dict[str, Any] = {
    "depths": (1, 1),
    "dim": 256,
    "num_heads": 16,
    "mlp_ratio": 1,
    "in_channels": 2,
    "time_steps": 16,
    "form": "events",
}

VARIANTS: dict[str, dict[str, Any]] = {
    "qkformer_10_384": {"depths": (1, 2, 7), "dim": 384, "num_heads": 6},
    "qkformer_10_512": {"depths": (1, 2, 7), "dim": 512, "num_heads": 8},
    "qkformer_10_768": {"depths": (1, 2, 7), "dim": 768, "num_heads": 12},
    "qkformer_4_384": {**_CIFAR, "num_classes": 10},
    "qkformer_2_256_dvs": {**_EVENTS, "num_classes": 10},
    "qkformer_2_256_gesture": {**_EVENTS, "num_classes": 11},
}
"""Published variants: what differs from the defaults of `QKFormer`. The MLP ratio of the Gesture model is the one that
gives the published size; the released file has 4."""

_KINDS = {"conv": "conv", "bn": "norm"}


def _part(owner: str, unit: str, kind: str, neuron: str) -> str:
    return f"{owner}.{neuron}." if kind == "lif" else f"{owner}.{unit}.{_KINDS[kind]}."


def _embedding(m: re.Match[str]) -> str:
    stage, name, kind = int(m[1]) - 1, m[2], m[3]
    owner = f"embeddings.{stage}"
    if name == "proj_res":
        return _part(owner, "residual", kind, "residual_neuron")
    # After the first stage the released names start again with "proj3" or "proj".
    number = int(name.removeprefix("proj") or 0) if stage == 0 else int(name == "proj4")
    return _part(owner, f"layers.{number}", kind, f"neurons.{number}")


def _attention(m: re.Match[str]) -> str:
    owner = f"stages.{int(m[1]) - 1}.{m[2]}.attention.branch"
    if m[4] == "attn":
        return f"{owner}.mixer.neuron." if m[3] == "tssa" else f"{owner}.mixer_neuron."
    return _part(owner, m[4], m[5], f"{m[4]}_neuron")


KEYS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"patch_embed([123])\.(proj(?:\d|_res)?)_(conv|bn|lif)\.", _embedding),
    (r"stage([123])\.(\d+)\.(tssa|attn|ssa)\.(attn)_(lif)\.", _attention),
    (r"stage([123])\.(\d+)\.(tssa|attn|ssa)\.(q|k|v|proj)_(conv|bn|lif)\.", _attention),
    (
        r"stage([123])\.(\d+)\.mlp\.(?:fc|mlp)([12])_(conv|bn|lif)\.",
        lambda m: _part(f"stages.{int(m[1]) - 1}.{m[2]}.mlp.branch", f"fc{m[3]}", m[4], f"neuron{m[3]}"),
    ),
    (r"head\.", "head."),
]
"""Released prefixes, and the names here."""


ARGUMENTS = {"num_heads": "num_heads", "time_steps": "time_steps"}
"""Options that the training arguments tell, and their names there."""


def _form(state_dict: Mapping[str, Tensor]) -> str:
    events = not any(key.startswith("patch_embed3.") for key in state_dict)
    return "events" if events else "cifar" if "stage3.0.ssa.q_conv.weight" in state_dict else "imagenet"


def read_options(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a released model from its state_dict; heads are those of the published one."""
    form = _form(state_dict)
    last = len(FORMS[form])
    depths = [count_blocks(state_dict, f"stage{stage}.") for stage in range(1, last + 1)]
    dim = shape_of(state_dict, f"patch_embed{last}.proj4_conv.weight")[0]
    options: dict[str, Any] = {
        "depths": depths,
        "dim": dim,
        "in_channels": shape_of(state_dict, "patch_embed1.proj_conv.weight")[1],
        "num_classes": count_classes(state_dict),
        "form": form,
        "num_heads": {"events": 16, "cifar": 8}.get(form, max(dim // 64, 1)),
        "neuron": "plif" if "patch_embed1.proj_lif.w" in state_dict else "lif",
    }
    if depths[-1]:
        layer = "mlp1" if f"stage{last}.0.mlp.mlp1_conv.weight" in state_dict else "fc1"
        options["mlp_ratio"] = read_mlp_ratio(state_dict, f"stage{last}.0.mlp.{layer}_conv.weight", dim)
    return options


def unread(state_dict: Mapping[str, Tensor]) -> Sequence[str]:
    """Options that change the answers and that no weight tells.

    The heads of the event and CIFAR models are fixed in the released code, whatever the argument says.
    """
    return ("num_heads", "time_steps") if _form(state_dict) == "imagenet" else ("time_steps",)


CARD = imagenet_card(
    crop_pct=0.875,
    note="The released weights were trained and evaluated with mixes_images=True: a neuron of the last stage "
    "continues from image to image of a batch, and the published accuracies are for batches of images sorted by class. "
    "mixes_images=False, the default, answers each image independently, and less accurately with these weights.",
)
"""How the released ImageNet models were trained and evaluated."""

FAMILY = register(QKFormer, VARIANTS, keys=ReleasedKeys(KEYS, read_options, unread, ARGUMENTS, "QKFormer"), card=CARD)
