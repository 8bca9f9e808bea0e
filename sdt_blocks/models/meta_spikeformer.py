"""Meta-SpikeFormer (Spike-Driven Transformer V2) and its published variants."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..blocks import ConvolutionBlock, Downsampling, LinearSpikeAttention, MembraneShortcut, SpikingMLP
from ..blocks.sizes import check_heads, check_multiple, hidden_width
from ..neuron import LIF, NeuronLike, make_neuron
from .backbone import Backbone, initialize, stage_info
from .card import imagenet_card
from .family import ReleasedKeys, count_blocks, count_classes, read_mlp_ratio, shape_of
from .options import Channels, Classes, Depths, Heads, Neuron, PerStep, Ratio, SecondHead, Steps, Widths, keeps_options
from .registry import register

DEPTHS = (1, 1, 2, 6, 2)
"""The number of blocks in each stage, the same in every published variant."""

CONVOLUTION_STAGES = 3
"""The first stages have convolution blocks, the others attention blocks."""


class LinearAttentionBlock(nn.Module):
    """Linear spike attention and spiking MLP, each within a membrane shortcut.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.
    """

    def __init__(self, dim: int, *, num_heads: int = 8, mlp_ratio: float = 4, neuron: NeuronLike = LIF) -> None:
        super().__init__()
        self.attention = MembraneShortcut(LinearSpikeAttention(dim, num_heads=num_heads, neuron=neuron))
        self.mlp = MembraneShortcut(SpikingMLP(dim, hidden=hidden_width(dim, mlp_ratio), neuron=neuron))

    def forward(self, membrane: Tensor) -> Tensor:
        result: Tensor = self.mlp(self.attention(membrane))
        return result


class MetaSpikeFormer(Backbone):
    """Meta-SpikeFormer (Yao et al., ICLR 2024, https://arxiv.org/abs/2404.03663).

    Five stages, each a downsampling and its blocks: convolution blocks of `dims[0] / 2`, `dims[0]` and `dims[1]`
    channels at 1/2, 1/4 and 1/8 of the image's size, attention blocks of `dims[2]` and `dims[3]` at 1/16. Then mean
    over tokens, LIF, linear head, mean over time steps.

    Input: images `[B, in_channels, H, W]` of any size, shown `time_steps` times, or frames `[B, T, in_channels, H, W]`
    with any T >= 1. Output: logits `[B, num_classes]`, or with `per_step` (TET training, Deng et al., 2022) `[T, B,
    num_classes]`. With `distillation` a second head learns from a teacher: in training the output is `(logits, logits
    of the second head)`, in evaluation their mean. With `num_classes=0` there is no head, and the output is the mean of
    the head neuron's spikes.

    Raises `ValueError` for dimensions that do not fit each other, and for input of another shape.

    >>> MetaSpikeFormer(dims=(16, 32, 48, 64), depths=(1, 1, 1, 1, 1), num_classes=10)(torch.rand(2, 3, 64, 48)).shape
    torch.Size([2, 10])
    """

    # Blocks stay whole when FSDP or device maps shard the model.
    _no_split_modules = ("ConvolutionBlock", "LinearAttentionBlock")

    @keeps_options
    def __init__(
        self,
        *,
        dims: Widths,
        depths: Depths = DEPTHS,
        num_heads: Heads = 8,
        mlp_ratio: Ratio = 4,
        in_channels: Channels = 3,
        num_classes: Classes = 1000,
        time_steps: Steps = 4,
        neuron: Neuron = "lif",
        distillation: SecondHead = False,
        per_step: PerStep = False,
    ) -> None:
        super().__init__()
        _check(dims, depths, num_heads, num_classes, distillation)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.time_steps, self.per_step, self.distillation = time_steps, per_step, distillation
        widths = (dims[0] // 2, *dims)
        self.downsamplings = nn.ModuleList(
            [
                Downsampling(in_channels, widths[0], kernel_size=7, neuron=None),
                Downsampling(widths[0], widths[1], neuron=neuron),
                Downsampling(widths[1], widths[2], neuron=neuron),
                Downsampling(widths[2], widths[3], neuron=neuron),
                Downsampling(widths[3], widths[4], stride=1, neuron=neuron),
            ]
        )

        def block(stage: int) -> nn.Module:
            if stage < CONVOLUTION_STAGES:
                return ConvolutionBlock(widths[stage], neuron=neuron)
            return LinearAttentionBlock(widths[stage], num_heads=num_heads, mlp_ratio=mlp_ratio, neuron=neuron)

        self.stages = nn.ModuleList(
            nn.Sequential(*(block(stage) for _ in range(depth))) for stage, depth in enumerate(depths)
        )
        self.head_neuron = make_neuron(neuron, channels=dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.distillation_head = nn.Linear(dims[-1], num_classes) if distillation else None
        self.apply(initialize)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Membranes of the five stages, `[T, B, C, H, W]` each; the released segmentation uses 0, 1, 2 and 4."""
        return self.run_stages(x, self.downsamplings, self.stages)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        dims = self.config["dims"]
        names = [f"stages.{stage}" for stage in range(len(self.stages))]
        return stage_info((dims[0] // 2, *dims), (True,) * 4 + (False,), names)


def _check(dims: Sequence[int], depths: Sequence[int], num_heads: int, num_classes: int, distillation: bool) -> None:
    if len(dims) != 4 or len(depths) != len(DEPTHS) or min(depths) < 0:
        raise ValueError(
            f"dims must be four widths and depths {len(DEPTHS)} numbers of blocks, none negative, got {list(dims)} and "
            f"{list(depths)}"
        )
    if distillation and not num_classes:
        raise ValueError("distillation needs classes for its head, got num_classes=0")
    check_multiple(dims[0], 2, "dims[0]")
    for width in dims[CONVOLUTION_STAGES - 1 :]:
        check_heads(width, num_heads)


VARIANTS: dict[str, dict[str, Any]] = {
    "sdt_v2_15m": {"dims": (64, 128, 256, 360)},
    "sdt_v2_31m": {"dims": (96, 192, 384, 480)},
    "sdt_v2_55m": {"dims": (128, 256, 512, 640)},
    "sdt_v2_124m": {"dims": (192, 384, 768, 960)},
}
"""Published variants: what differs from the defaults of `MetaSpikeFormer`."""

_DOWNSAMPLINGS = ("1_1", "1_2", "2", "3", "4")
_BLOCKS = {"1_1": "0.0", "1_2": "1.0", "2_1": "2.0", "2_2": "2.1"}
_SEPARABLE = {
    "pwconv1": "expand.conv",
    "bn1": "expand.norm",
    "dwconv": "separable.conv.depthwise",
    "pwconv2": "separable.conv.pointwise",
    "bn2": "separable.norm",
}
_REP_CONV = {
    "0.body.0": "conv.pointwise1",
    "0.body.1.bn": "conv.border.norm",
    "0.body.2.0": "conv.depthwise",
    "0.body.2.1": "conv.pointwise2",
    "0.body.2.2": "conv.norm",
    "1": "norm",
}
_KINDS = {"conv": "conv", "bn": "norm"}
_ATTENTION = r"block([34])\.(\d+)\."

KEYS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (
        r"downsample(1_1|1_2|[234])\.encode_(conv|bn)\.",
        lambda m: f"downsamplings.{_DOWNSAMPLINGS.index(m[1])}.conv.{_KINDS[m[2]]}.",
    ),
    (
        r"ConvBlock([12]_[12])\.0\.Conv\.(pwconv1|bn1|dwconv|pwconv2|bn2)\.(?!\d)",
        lambda m: f"stages.{_BLOCKS[m[1]]}.separable.branch.{_SEPARABLE[m[2]]}.",
    ),
    (r"ConvBlock([12]_[12])\.0\.(conv|bn)([12])\.", lambda m: f"stages.{_BLOCKS[m[1]]}.conv{m[3]}.{_KINDS[m[2]]}."),
    (
        _ATTENTION + r"attn\.(q|k|v|proj)_conv\.(0\.body\.(?:0|1\.bn|2\.[012])|1)\.",
        lambda m: f"stages.{m[1]}.{m[2]}.attention.branch.{m[3]}.{_REP_CONV[m[4]]}.",
    ),
    (_ATTENTION + r"mlp\.fc([12])_(conv|bn)\.", lambda m: f"stages.{m[1]}.{m[2]}.mlp.branch.fc{m[3]}.{_KINDS[m[4]]}."),
    (r"head\.", "head."),
    (r"head_kd\.", "distillation_head."),
]
"""Released prefixes, and the names here."""


def read_options(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a released model from its state_dict."""
    dims = [shape_of(state_dict, f"downsample{name}.encode_conv.weight")[0] for name in _DOWNSAMPLINGS[1:]]
    attention = [count_blocks(state_dict, f"block{stage}.") for stage in (3, 4)]
    options: dict[str, Any] = {
        "dims": dims,
        "depths": [*DEPTHS[:CONVOLUTION_STAGES], *attention],
        "in_channels": shape_of(state_dict, "downsample1_1.encode_conv.weight")[1],
        "num_classes": count_classes(state_dict),
        "distillation": "head_kd.weight" in state_dict,
    }
    if attention[0]:
        options["mlp_ratio"] = read_mlp_ratio(state_dict, "block3.0.mlp.fc1_conv.weight", dims[2])
    return options


def unread(state_dict: Mapping[str, Tensor]) -> Sequence[str]:
    """Options that change the answers and that no weight tells."""
    return ("time_steps",)


CARD = imagenet_card(crop_pct=0.875)
"""How the released ImageNet models were evaluated."""

FAMILY = register(
    MetaSpikeFormer,
    VARIANTS,
    keys=ReleasedKeys(KEYS, read_options, unread, {"time_steps": "time_steps"}, "Spike-Driven Transformer V2"),
    card=CARD,
)
