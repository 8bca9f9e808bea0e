"""E-SpikeFormer (Spike-Driven Transformer V3): its base and its large family, and their published variants.

The masked pre-training from which the authors start the large family is out of scope: neither its decoder nor its
masked stem is here, and its files are not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..blocks import Downsampling, MembraneShortcut, SpikingMLP
from ..blocks.integer import (
    ConvolutionPair,
    IntegerAttention,
    LinearChain,
    RepBranch,
    ScaledShortcut,
    SeparableIntegerConvolution,
)
from ..blocks.sizes import check_heads, check_multiple, hidden_width
from ..blocks.units import ConvNorm
from ..neuron import IntegerNeuron, NeuronFactory
from .backbone import Backbone, initialize, stage_info
from .card import imagenet_card
from .family import ReleasedKeys, count_blocks, count_classes, read_mlp_ratio, shape_of
from .options import (
    Channels,
    Classes,
    Depths,
    DropPath,
    Heads,
    LayerScales,
    LevelNorm,
    Levels,
    Ratio,
    RepConvs,
    SecondHead,
    Steps,
    Widths,
    keeps_options,
)
from .registry import register

BASE_DEPTHS, LARGE_DEPTHS = (1, 1, 2, 6, 2), (1, 1, 2, 12)
"""The number of blocks in each stage; the first three stages have convolution blocks."""

CONVOLUTION_STAGES = 3


class ESpikeFormer(Backbone):
    """The base family of E-SpikeFormer (Yao et al., TPAMI 2025, https://arxiv.org/abs/2411.16061).

    Five stages, each a downsampling and its blocks: convolution blocks at 1/2, 1/4 and 1/8 of the image's size,
    attention blocks (separable convolution, attention, MLP) at 1/16; then mean over tokens, a neuron whose levels go to
    the linear head, mean over frames. Neurons emit integer levels l, 0 to `levels`, which stand for l spikes in
    `levels` binary steps ("1x4", "1x8"; the released weights do not say which, but their file names do). Frames are
    combined only in the last mean. The models for events differ in two ways: levels are divided by `level_norm` instead
    of `levels` (those of the last neuron are not divided), and with `layer_scale` each of the three branches of the
    attention blocks ends in a learned factor for each channel.

    Input: images `[B, in_channels, H, W]` of any size, shown `time_steps` times (1, as all of them are the same), or
    frames `[B, T, in_channels, H, W]`. Output: logits `[B, num_classes]`; `num_classes=0` leaves the head out.

    Raises `ValueError` for dimensions that do not fit each other, and for input of another shape.

    >>> ESpikeFormer(dims=(16, 32, 48, 64), depths=(1, 1, 1, 1, 1), num_classes=10)(torch.rand(2, 3, 64, 48)).shape
    torch.Size([2, 10])
    """

    @keeps_options
    def __init__(
        self,
        *,
        dims: Widths,
        depths: Depths = BASE_DEPTHS,
        num_heads: Heads = 8,
        mlp_ratio: Ratio = 4,
        in_channels: Channels = 3,
        num_classes: Classes = 1000,
        time_steps: Steps = 1,
        levels: Levels = 4,
        level_norm: LevelNorm = None,
        layer_scale: LayerScales = False,
    ) -> None:
        super().__init__()
        _check(dims, depths, BASE_DEPTHS, num_heads)
        self.in_channels, self.num_classes, self.time_steps = in_channels, num_classes, time_steps
        neuron = partial(IntegerNeuron, levels=levels, norm=level_norm)
        widths = (dims[0] // 2, *dims)
        self.downsamplings = _downsamplings(in_channels, widths, neuron)

        def block(stage: int) -> nn.Module:
            width = widths[stage]
            if stage < CONVOLUTION_STAGES:
                separable = SeparableIntegerConvolution(width, kernel_size=7, neuron=neuron)
                pair = ConvolutionPair(width, bias=False, neuron=neuron)
                return nn.Sequential(MembraneShortcut(separable), MembraneShortcut(pair))
            attention = IntegerAttention(
                width,
                num_heads=num_heads,
                scale=2 * (width // num_heads) ** -0.5,
                expansion=4,
                make_unit=ConvNorm,
                neuron=neuron,
            )
            branches = (
                SeparableIntegerConvolution(width, kernel_size=3, neuron=neuron),
                attention,
                SpikingMLP(width, hidden=hidden_width(width, mlp_ratio), neuron=neuron),
            )
            return nn.Sequential(
                *(ScaledShortcut(width, one) if layer_scale else MembraneShortcut(one) for one in branches)
            )

        self.stages = nn.ModuleList(
            nn.Sequential(*(block(stage) for _ in range(depth))) for stage, depth in enumerate(depths)
        )
        self.head_neuron = IntegerNeuron(levels=levels, norm=1)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(initialize)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Membranes of the stages, `[T, B, C, H, W]` each."""
        return self.run_stages(x, self.downsamplings, self.stages)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        dims = self.config["dims"]
        names = [f"stages.{stage}" for stage in range(len(self.stages))]
        return stage_info((dims[0] // 2, *dims), (True,) * 4 + (False,), names)


class LargeIntegerBlock(nn.Module):
    """A block of the large family: linear chains for q, k, v and the projection, branches scaled by channel.

    With `rep_conv` a linear chain comes first, within a shortcut of its own.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float,
        rep_conv: bool,
        drop_path: float,
        neuron: NeuronFactory,
    ) -> None:
        super().__init__()
        self.rep_conv = MembraneShortcut(RepBranch(dim, neuron=neuron)) if rep_conv else nn.Identity()
        attention = IntegerAttention(
            dim,
            num_heads=num_heads,
            scale=0.125,
            expansion=1,
            make_unit=lambda before, after: LinearChain(before, dim * 3 // 2),
            neuron=neuron,
        )
        self.attention = ScaledShortcut(dim, attention, drop_path=drop_path)
        mlp = SpikingMLP(dim, hidden=hidden_width(dim, mlp_ratio), neuron=neuron)
        self.mlp = ScaledShortcut(dim, mlp, drop_path=drop_path)

    def forward(self, membrane: Tensor) -> Tensor:
        result: Tensor = self.mlp(self.attention(self.rep_conv(membrane)))
        return result


class ESpikeFormerLarge(Backbone):
    """The large family of E-SpikeFormer (Yao et al., TPAMI 2025, https://arxiv.org/abs/2411.16061).

    Four stages, each a downsampling and its blocks: convolution blocks at 1/2, 1/4 and 1/8 of the image's size, and
    `LargeIntegerBlock`s at 1/16; then mean over tokens, a linear head on the membrane itself, mean over frames. With
    `distillation` a second head, after a neuron, learns from a teacher: in training the output is `(logits, logits of
    the second head)`, in evaluation their mean. Its neurons round halves up, those of the base family to even.

    Input and output are otherwise those of `ESpikeFormer`. `drop_path` is the rate of the last block.

    Raises `ValueError` for dimensions that do not fit each other, and for input of another shape.

    >>> ESpikeFormerLarge(dims=(16, 32, 48), depths=(1, 1, 1, 1), num_classes=10)(torch.rand(2, 3, 64, 48)).shape
    torch.Size([2, 10])
    """

    @keeps_options
    def __init__(
        self,
        *,
        dims: Widths,
        depths: Depths = LARGE_DEPTHS,
        num_heads: Heads = 8,
        mlp_ratio: Ratio = 4,
        in_channels: Channels = 3,
        num_classes: Classes = 1000,
        time_steps: Steps = 1,
        levels: Levels = 4,
        rep_conv: RepConvs = False,
        distillation: SecondHead = False,
        drop_path: DropPath = 0.0,
    ) -> None:
        super().__init__()
        _check(dims, depths, LARGE_DEPTHS, num_heads)
        if distillation and not num_classes:
            raise ValueError("distillation needs classes for its head, got num_classes=0")
        self.in_channels, self.num_classes, self.time_steps = in_channels, num_classes, time_steps
        neuron = partial(IntegerNeuron, levels=levels, rounding="up")
        widths = (dims[0] // 2, *dims)
        self.downsamplings = _downsamplings(in_channels, widths, neuron)

        def block(stage: int, number: int) -> nn.Module:
            if stage < CONVOLUTION_STAGES:
                return MembraneShortcut(ConvolutionPair(widths[stage], bias=True, neuron=neuron))
            return LargeIntegerBlock(
                widths[stage],
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                rep_conv=rep_conv,
                drop_path=drop_path * number / max(depths[-1] - 1, 1),
                neuron=neuron,
            )

        self.stages = nn.ModuleList(
            nn.Sequential(*(block(stage, number) for number in range(depth))) for stage, depth in enumerate(depths)
        )
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.distillation_neuron = IntegerNeuron(levels=levels, norm=1, rounding="up") if distillation else None
        self.distillation_head = nn.Linear(dims[-1], num_classes) if distillation else None
        self.apply(initialize)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Membranes of the stages, `[T, B, C, H, W]` each."""
        return self.run_stages(x, self.downsamplings, self.stages)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Name patterns for layer decay as in the released fine-tuning: the attention blocks, and the heads.

        Everything before the attention blocks is one group.
        """
        if coarse:
            return super().group_matcher(coarse)
        last = len(self.stages) - 1
        return {"stem": rf"^(?:downsamplings|stages\.[^{last}])\.", "blocks": [(rf"^stages\.{last}\.(\d+)", None)]}

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        dims = self.config["dims"]
        names = [f"stages.{stage}" for stage in range(len(self.stages))]
        return stage_info((dims[0] // 2, *dims), (True,) * 4, names)


def _downsamplings(in_channels: int, widths: Sequence[int], neuron: NeuronFactory) -> nn.ModuleList:
    """The first one sees the image; if there are five, the last one keeps the size."""
    first = Downsampling(in_channels, widths[0], kernel_size=7, neuron=None)
    strides = (2, 2, 2, 1)
    others = (Downsampling(*sizes, stride=strides[i], neuron=neuron) for i, sizes in enumerate(pairwise(widths)))
    return nn.ModuleList([first, *others])


def _check(dims: Sequence[int], depths: Sequence[int], published: Sequence[int], num_heads: int) -> None:
    if len(dims) != len(published) - 1 or len(depths) != len(published):
        raise ValueError(
            f"dims must be {len(published) - 1} widths and depths {len(published)} numbers of blocks, got {list(dims)} "
            f"and {list(depths)}"
        )
    check_multiple(dims[0], 2, "dims[0]")
    for width in dims[CONVOLUTION_STAGES - 1 :]:
        check_heads(width, num_heads)


_EVENTS: dict[str, Any] = {"dims": (64, 128, 256, 360), "in_channels": 2, "time_steps": 8, "layer_scale": True}

BASE: dict[str, dict[str, Any]] = {
    "sdt_v3_3m": {"dims": (24, 48, 96, 128)},
    "sdt_v3_5m": {"dims": (32, 64, 128, 192)},
    "sdt_v3_10m": {"dims": (48, 96, 192, 240)},
    "sdt_v3_19m": {"dims": (64, 128, 256, 360)},
    "sdt_v3_19m_har_dvs": {**_EVENTS, "depths": (1, 1, 2, 6, 2), "level_norm": 1, "num_classes": 300},
    "sdt_v3_6m_gesture": {**_EVENTS, "depths": (1, 1, 2, 1, 0), "level_norm": 8, "num_classes": 11},
}
"""Published variants of the base family, those for events last: what differs from the defaults of `ESpikeFormer`."""

LARGE: dict[str, dict[str, Any]] = {
    "sdt_v3_83m": {"dims": (128, 256, 512), "rep_conv": True},
    "sdt_v3_171m": {"dims": (196, 384, 768)},
}
"""Published variants of the large family: what differs from the defaults of `ESpikeFormerLarge`."""

_DOWNSAMPLINGS = ("1_1", "1_2", "2", "3", "4")
_BLOCKS = {"1_1": "0.0", "1_2": "1.0", "2_1": "2.0", "2_2": "2.1"}
_SEPARABLE = {"pwconv1": "expand", "dwconv": "depthwise", "pwconv2": "reduce"}
_LAYERS = ("conv", "norm")
_KINDS = {"conv": "conv", "bn": "norm"}
_CHAIN = {"1.0": "conv.pointwise1", "1.1": "conv.norm1", "2.0": "conv.pointwise2", "2.1": "conv.norm2"}
_REP = {**_CHAIN, "2.1": "norm"}

Keys = list[tuple[str, str | Callable[[re.Match[str]], str]]]

_SHARED: Keys = [
    (
        r"downsample(1_1|1_2|[234])\.encode_(conv|bn)\.",
        lambda m: f"downsamplings.{_DOWNSAMPLINGS.index(m[1])}.conv.{_KINDS[m[2]]}.",
    ),
    (r"head\.", "head."),
]

BASE_KEYS: Keys = [
    *_SHARED,
    (
        r"ConvBlock([12]_[12])\.0\.Conv\.(pwconv1|dwconv|pwconv2)\.([01])\.",
        lambda m: f"stages.{_BLOCKS[m[1]]}.0.branch.{_SEPARABLE[m[2]]}.{_LAYERS[int(m[3])]}.",
    ),
    (
        r"ConvBlock([12]_[12])\.0\.(conv|bn)([12])\.(?!\d)",
        lambda m: f"stages.{_BLOCKS[m[1]]}.1.branch.conv{m[3]}.{_KINDS[m[2]]}.",
    ),
    (
        r"block([34])\.(\d+)\.conv\.(pwconv1|dwconv|pwconv2)\.([01])\.",
        lambda m: f"stages.{m[1]}.{m[2]}.0.branch.{_SEPARABLE[m[3]]}.{_LAYERS[int(m[4])]}.",
    ),
    (
        r"block([34])\.(\d+)\.attn\.(q|k|v|proj)_conv\.([01])\.(?!conv|\d)",
        lambda m: f"stages.{m[1]}.{m[2]}.1.branch.{m[3]}.{_LAYERS[int(m[4])]}.",
    ),
    (
        r"block([34])\.(\d+)\.mlp\.fc([12])_(conv|bn)\.",
        lambda m: f"stages.{m[1]}.{m[2]}.2.branch.fc{m[3]}.{_KINDS[m[4]]}.",
    ),
    (r"block([34])\.(\d+)\.layer_scale([123])", lambda m: f"stages.{m[1]}.{m[2]}.{int(m[3]) - 1}.scale"),
]
"""Released prefixes of the base family, and the names here."""

LARGE_KEYS: Keys = [
    *_SHARED,
    (r"head_kd\.", "distillation_head."),
    (
        r"ConvBlock([12]_[12])\.0\.conv([12])\.0\.([01])\.",
        lambda m: f"stages.{_BLOCKS[m[1]]}.branch.conv{m[2]}.{_LAYERS[int(m[3])]}.",
    ),
    (
        r"block3\.(\d+)\.attn\.(q|k|v|proj)_conv\.0\.conv([12]\.[01])\.",
        lambda m: f"stages.3.{m[1]}.attention.branch.{m[2]}.{_CHAIN[m[3]]}.",
    ),
    (
        r"block3\.(\d+)\.attn\.(q|k|v|proj)_conv\.1\.",
        lambda m: f"stages.3.{m[1]}.attention.branch.{m[2]}.norm.",
    ),
    (r"block3\.(\d+)\.rep_conv\.conv([12]\.[01])\.", lambda m: f"stages.3.{m[1]}.rep_conv.branch.unit.{_REP[m[2]]}."),
    (
        r"block3\.(\d+)\.mlp\.fc([12])_(conv|bn)\.",
        lambda m: f"stages.3.{m[1]}.mlp.branch.fc{m[2]}.{_KINDS[m[3]]}.",
    ),
    (
        r"block3\.(\d+)\.layer_scale([12])",
        lambda m: f"stages.3.{m[1]}.{('attention', 'mlp')[int(m[2]) - 1]}.scale",
    ),
]
"""Released prefixes of the large family, and the names here."""

_SCALE = "block3.0.layer_scale1"
"""A factor that only the models for events have."""

NEVER_CALLED = r"block3\.\d+\.rep_conv\..*"
"""Released keys of layers that no model could run, since their norms have another width (see `weed`)."""


def weed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes `rep_conv` if its first norm does not have the width of its first convolution: it was never called."""
    conv, norm = (state_dict.get(f"block3.0.rep_conv.conv1.{layer}.weight") for layer in (0, 1))
    if conv is None or norm is None or norm.shape[0] == conv.shape[0]:
        return dict(state_dict)
    return {key: value for key, value in state_dict.items() if not re.fullmatch(NEVER_CALLED, key)}


def _options(state_dict: Mapping[str, Tensor], last: int) -> dict[str, Any]:
    dims = [shape_of(state_dict, f"downsample{name}.encode_conv.weight")[0] for name in _DOWNSAMPLINGS[1 : last + 1]]
    attention = [count_blocks(state_dict, f"block{stage}.") for stage in range(CONVOLUTION_STAGES, last + 1)]
    options: dict[str, Any] = {
        "dims": dims,
        "depths": [*BASE_DEPTHS[:CONVOLUTION_STAGES], *attention],
        "in_channels": shape_of(state_dict, "downsample1_1.encode_conv.weight")[1],
        "num_classes": count_classes(state_dict),
    }
    if attention[0]:
        options["mlp_ratio"] = read_mlp_ratio(state_dict, "block3.0.mlp.fc1_conv.weight", dims[2])
    return options


def read_base_options(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a released model of the base family from its state_dict."""
    return {**_options(state_dict, 4), "layer_scale": _SCALE in state_dict}


def unread_base(state_dict: Mapping[str, Tensor]) -> Sequence[str]:
    """Options that change the answers and that no weight tells; models for events, with factors, divide levels too."""
    return ("levels", "level_norm") if _SCALE in state_dict else ("levels",)


def read_large_options(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a released model of the large family from its state_dict."""
    return {
        **_options(state_dict, 3),
        "rep_conv": "block3.0.rep_conv.conv1.0.weight" in weed(state_dict),
        "distillation": "head_kd.weight" in state_dict,
    }


def unread_large(state_dict: Mapping[str, Tensor]) -> Sequence[str]:
    """Options that change the answers and that no weight tells."""
    return ("levels",)


ARGUMENTS = {"time_steps": "time_steps"}
"""Options that the training arguments tell, and their names there."""

CARD = imagenet_card(
    crop_pct=224 / 232,
    note="The weights do not say how many levels their neurons have: 4 in files named 1x4, 8 in those named 1x8 "
    "(levels=8). Files of 384 pixels see the whole image: input_size 384, crop_pct 1.",
)
"""How the released ImageNet models were evaluated."""

FAMILY = register(
    ESpikeFormer,
    BASE,
    keys=ReleasedKeys(BASE_KEYS, read_base_options, unread_base, ARGUMENTS, "E-SpikeFormer, base family"),
    card=CARD,
)
LARGE_FAMILY = register(
    ESpikeFormerLarge,
    LARGE,
    keys=ReleasedKeys(
        LARGE_KEYS, read_large_options, unread_large, ARGUMENTS, "E-SpikeFormer, large family", weed=weed
    ),
    card=CARD,
)
