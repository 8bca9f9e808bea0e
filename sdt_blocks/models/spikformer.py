"""Spikformer and its published variants."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..blocks.patch import WIDTHS, pools_of
from ..blocks.sizes import check_multiple, hidden_width
from ..blocks.spike_level import SpikeLevelMLP, SpikeShortcut, SpikingSelfAttention
from ..blocks.units import ConvNorm
from ..neuron import LIF, NeuronLike, make_neuron
from ..steps import check_sequence, pool, present, project_and_fire, shortcut
from .backbone import Backbone, initialize
from .card import imagenet_card
from .family import ReleasedKeys, count_blocks, count_classes, read_mlp_ratio, shape_of
from .options import (
    Channels,
    Classes,
    Depth,
    Heads,
    Neuron,
    PerStep,
    Pooling,
    QKVBias,
    Ratio,
    Scale,
    Steps,
    Width,
    keeps_options,
)
from .registry import register


class SpikePatchSplitting(nn.Module):
    """Four 3x3 convolution stages from frames to tokens, whose poolings see spikes, and a position embedding.

        stages 0-3: conv -> BN -> LIF -> max pool where pooling[i] is "1" = p;   result = p + LIF(BN(conv(p)))

    Shapes: x `[T, B, in_channels, H, W]` to sums of spikes, 0 to 2, `[T, B, dim, H', W']`.

    Raises `ValueError` if dim is not a multiple of 8, pooling is not four flags, or x does not fit.
    """

    def __init__(self, dim: int, *, in_channels: int = 3, pooling: str = "1111", neuron: NeuronLike = LIF) -> None:
        super().__init__()
        check_multiple(dim, WIDTHS[0], "dim")
        self.in_channels = in_channels
        channels = [in_channels, *(dim // width for width in WIDTHS)]
        self.stages = nn.ModuleList(ConvNorm(before, after, 3) for before, after in pairwise(channels))
        self.neurons = nn.ModuleList(make_neuron(neuron, channels=after) for after in channels[1:])
        self.pools = pools_of(pooling)
        self.position, self.position_neuron = ConvNorm(dim, dim, 3), make_neuron(neuron, channels=dim)

    def forward(self, x: Tensor) -> Tensor:
        check_sequence(x, self.in_channels, "SpikePatchSplitting")
        for stage, neuron, layer in zip(self.stages, self.neurons, self.pools, strict=True):
            x = pool(layer, project_and_fire(stage, neuron, x))
        return shortcut(x, project_and_fire(self.position, self.position_neuron, x))


class SpikformerBlock(nn.Module):
    """Encoder block: spiking self-attention and MLP, each within a shortcut that adds spikes.

    Shapes: sums of spikes `[T, B, dim, H, W] -> [T, B, dim, H, W]`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4,
        scale: float = 0.125,
        qkv_bias: bool = False,
        neuron: NeuronLike = LIF,
    ) -> None:
        super().__init__()
        attention = SpikingSelfAttention(dim, num_heads=num_heads, scale=scale, bias=qkv_bias, neuron=neuron)
        self.attention = SpikeShortcut(attention)
        self.mlp = SpikeShortcut(SpikeLevelMLP(dim, hidden=hidden_width(dim, mlp_ratio), neuron=neuron))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(self.attention(x))
        return result


class Spikformer(Backbone):
    """Spikformer (Zhou et al., ICLR 2023, https://arxiv.org/abs/2209.15425).

    Patch splitting, `depth` encoder blocks, mean over tokens, linear head, mean over time steps. Shortcuts add spikes,
    so inner layers and the head see sums of them: the model is not spike-driven, as `sdt_blocks.analysis.audit` shows.

    Input: images `[B, in_channels, H, W]`, shown `time_steps` times, or frames `[B, T, in_channels, H, W]` with any T
    >= 1. Output: logits `[B, num_classes]`, or with `per_step` `[T, B, num_classes]`. With `num_classes=0` there is no
    head, and the output is the mean of the sums of spikes.

    Raises `ValueError` for dimensions that do not fit each other, and for input of another shape.

    >>> Spikformer(depth=2, dim=64, num_classes=10, pooling="0011")(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    # Blocks stay whole when FSDP or device maps shard the model.
    _no_split_modules = ("SpikformerBlock",)

    @keeps_options
    def __init__(
        self,
        *,
        depth: Depth,
        dim: Width,
        num_heads: Heads = 8,
        mlp_ratio: Ratio = 4,
        in_channels: Channels = 3,
        num_classes: Classes = 1000,
        time_steps: Steps = 4,
        pooling: Pooling = "1111",
        scale: Scale = 0.125,
        qkv_bias: QKVBias = False,
        neuron: Neuron = "lif",
        per_step: PerStep = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.time_steps, self.per_step = time_steps, per_step
        self.patch = SpikePatchSplitting(dim, in_channels=in_channels, pooling=pooling, neuron=neuron)
        options: dict[str, Any] = {"num_heads": num_heads, "mlp_ratio": mlp_ratio, "scale": scale, "qkv_bias": qkv_bias}
        self.blocks = nn.Sequential(*(SpikformerBlock(dim, neuron=neuron, **options) for _ in range(depth)))
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(lambda module: initialize(module, nn.Conv2d))

    def forward_features(self, x: Tensor) -> Tensor:
        """Sums of the tokens' spikes, `[T, B, dim, H', W']`."""
        return self.run_blocks(self.blocks, self.patch(present(x, self.time_steps, self.in_channels)))

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Sums of the tokens' spikes: all blocks are one stage."""
        yield self.forward_features(x)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        reduction = 2 ** self.config["pooling"].count("1")
        return [{"num_chs": self.config["dim"], "reduction": reduction, "module": "blocks"}]


_CIFAR: dict[str, Any] = {"num_heads": 12, "pooling": "0011", "qkv_bias": True, "num_classes": 10}
_EVENTS: dict[str, Any] = {"depth": 2, "dim": 256, "scale": 0.25, "in_channels": 2, "time_steps": 16}

VARIANTS: dict[str, dict[str, Any]] = {
    "spikformer_8_384": {"depth": 8, "dim": 384},
    "spikformer_6_512": {"depth": 6, "dim": 512},
    "spikformer_8_512": {"depth": 8, "dim": 512},
    "spikformer_10_512": {"depth": 10, "dim": 512},
    "spikformer_8_768": {"depth": 8, "dim": 768},
    "spikformer_4_256": {**_CIFAR, "depth": 4, "dim": 256, "num_heads": 8},
    "spikformer_2_384": {**_CIFAR, "depth": 2, "dim": 384},
    "spikformer_4_384": {**_CIFAR, "depth": 4, "dim": 384},
    "spikformer_2_256_dvs": {**_EVENTS, "num_heads": 16, "num_classes": 10},
    "spikformer_2_256_gesture": {**_EVENTS, "num_heads": 8, "num_classes": 11},
}
"""Published variants: what differs from the defaults of `Spikformer`. The numbers of heads are published only for
8-512, 4-384 and the event models. The Gesture model's code is not published; in the paper it has a pooling that is not
here."""

_KINDS = {"conv": "conv", "linear": "conv", "bn": "norm"}
_BLOCK = r"block\.(\d+)\."


def _stage(m: re.Match[str]) -> str:
    stage = m[2] or 0
    return f"patch.neurons.{stage}." if m[1] == "lif" else f"patch.stages.{stage}.{_KINDS[m[1]]}."


def _part(branch: str, unit: str, kind: str, neuron: str) -> str:
    return f"{branch}.branch.{neuron}." if kind == "lif" else f"{branch}.branch.{unit}.{_KINDS[kind]}."


KEYS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"patch_embed\.proj_(conv|bn|lif)(\d?)\.", _stage),
    (r"patch_embed\.rpe_lif\.", "patch.position_neuron."),
    (r"patch_embed\.rpe_(conv|bn)\.", lambda m: f"patch.position.{_KINDS[m[1]]}."),
    (_BLOCK + r"attn\.attn_lif\.", lambda m: f"blocks.{m[1]}.attention.branch.mixer_neuron."),
    (
        _BLOCK + r"attn\.(q|k|v|proj)_(conv|linear|bn|lif)\.",
        lambda m: _part(f"blocks.{m[1]}.attention", m[2], m[3], f"{m[2]}_neuron"),
    ),
    (
        _BLOCK + r"mlp\.fc([12])_(conv|linear|bn|lif)\.",
        lambda m: _part(f"blocks.{m[1]}.mlp", f"fc{m[2]}", m[3], f"neuron{m[2]}"),
    ),
    (r"head\.", "head."),
]
"""Released prefixes, and the names here."""

UNUSED = r"block\.\d+\.(norm[12]\.(weight|bias)|attn\.res_lif\.w)|norm\.(weight|bias)|pos_embed"


ARGUMENTS = {"num_heads": "num_heads", "time_steps": "time_steps"}
"""Options that the training arguments tell, and their names there."""


def read_options(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a released model from its state_dict; poolings, heads and the scale are those of the published one."""
    depth = count_blocks(state_dict, "block.")
    dim = shape_of(state_dict, "patch_embed.proj_conv3.weight")[0]
    cifar, events = "block.0.attn.q_linear.weight" in state_dict, "pos_embed" in state_dict
    options: dict[str, Any] = {
        "depth": depth,
        "dim": dim,
        "in_channels": shape_of(state_dict, "patch_embed.proj_conv.weight")[1],
        "num_classes": count_classes(state_dict),
        "pooling": "0011" if cifar else "1111",
        "scale": 0.25 if events else 0.125,
        "qkv_bias": "block.0.attn.q_linear.bias" in state_dict or "block.0.attn.q_conv.bias" in state_dict,
        "neuron": "plif" if "patch_embed.proj_lif.w" in state_dict else "lif",
        "num_heads": 16 if events else 12 if cifar and dim % 12 == 0 else 8,
    }
    if depth:
        layer = "linear" if "block.0.mlp.fc1_linear.weight" in state_dict else "conv"
        options["mlp_ratio"] = read_mlp_ratio(state_dict, f"block.0.mlp.fc1_{layer}.weight", dim)
    return options


def unread(state_dict: Mapping[str, Tensor]) -> Sequence[str]:
    """Options that change the answers and that no weight tells; the released code fixes poolings and scale."""
    return ("num_heads", "time_steps")


CARD = imagenet_card(crop_pct=1.0)
"""How the published ImageNet models were trained and evaluated."""

FAMILY = register(
    Spikformer, VARIANTS, keys=ReleasedKeys(KEYS, read_options, unread, ARGUMENTS, "Spikformer", UNUSED), card=CARD
)
