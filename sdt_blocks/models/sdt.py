"""The Spike-Driven Transformer (V1) and its published variants."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..blocks import MembraneShortcut, SpikeDrivenSelfAttention, SpikingMLP, SpikingPatchSplitting
from ..blocks.patch import WIDTHS
from ..blocks.sizes import check_heads, hidden_width
from ..neuron import LIF, NeuronLike, make_neuron
from ..steps import present
from .backbone import Backbone, initialize, stage_info
from .card import imagenet_card
from .family import ReleasedKeys, count_blocks, count_classes, read_mlp_ratio, shape_of
from .options import (
    Channels,
    Classes,
    Depth,
    DropPath,
    EventPooling,
    Heads,
    Neuron,
    PerStep,
    Pooling,
    Ratio,
    Steps,
    Width,
    keeps_options,
)
from .registry import register


class SpikeDrivenBlock(nn.Module):
    """Encoder block: SDSA and spiking MLP, each within a membrane shortcut.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4,
        neuron: NeuronLike = LIF,
        event_pooling: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = MembraneShortcut(
            SpikeDrivenSelfAttention(dim, num_heads=num_heads, neuron=neuron, event_pooling=event_pooling),
            drop_path=drop_path,
        )
        self.mlp = MembraneShortcut(
            SpikingMLP(dim, hidden=hidden_width(dim, mlp_ratio), neuron=neuron),
            drop_path=drop_path,
        )

    def forward(self, membrane: Tensor) -> Tensor:
        result: Tensor = self.mlp(self.attention(membrane))
        return result


class SpikeDrivenTransformer(Backbone):
    """Spike-Driven Transformer (Yao et al., NeurIPS 2023, https://arxiv.org/abs/2307.01694).

    Patch splitting, `depth` encoder blocks, mean over tokens, LIF, linear head, mean over time steps.

    Input: images `[B, in_channels, H, W]`, shown `time_steps` times, or frames `[B, T, in_channels, H, W]` with any T
    >= 1. Output: logits `[B, num_classes]`, or with `per_step` (TET training, Deng et al., 2022) `[T, B,
    num_classes]`. With `num_classes=0` there is no head, and the output is the mean of the head neuron's spikes.
    `drop_path` is the rate of the last block; it grows linearly from 0 at the first.

    Raises `ValueError` for dimensions that do not fit each other, and for input of another shape.

    >>> SpikeDrivenTransformer(depth=2, dim=64, num_classes=10, pooling="0011")(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    # Blocks stay whole when FSDP or device maps shard the model.
    _no_split_modules = ("SpikeDrivenBlock",)

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
        neuron: Neuron = "lif",
        event_pooling: EventPooling = False,
        per_step: PerStep = False,
        drop_path: DropPath = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.time_steps, self.per_step = time_steps, per_step
        self.patch = SpikingPatchSplitting(dim, in_channels=in_channels, pooling=pooling, neuron=neuron)
        self.blocks = nn.Sequential(
            *(
                SpikeDrivenBlock(
                    dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    neuron=neuron,
                    event_pooling=event_pooling,
                    drop_path=drop_path * i / max(depth - 1, 1),
                )
                for i in range(depth)
            )
        )
        self.head_neuron = make_neuron(neuron, channels=dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(lambda module: initialize(module, nn.Conv2d))

    def forward_features(self, x: Tensor) -> Tensor:
        """Membranes of the tokens, `[T, B, dim, H', W']`."""
        return self.run_blocks(self.blocks, self.patch(present(x, self.time_steps, self.in_channels)))

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Spikes after the pooling of the first three stages of the patch splitting, then the membranes of the tokens.

        The spikes' mean over time is a firing rate; there are no membranes of them, since norm and neuron are one op.
        """
        stages = self.patch.forward_stages(present(x, self.time_steps, self.in_channels))
        for stage, result in enumerate(stages, start=1):
            yield result if stage < len(WIDTHS) else self.run_blocks(self.blocks, result)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        dim, flags = self.config["dim"], self.config["pooling"]
        names = (*(f"patch.pools.{stage}" for stage in range(3)), "blocks")
        return stage_info([dim // width for width in WIDTHS], [flag == "1" for flag in flags], names)


VARIANTS: dict[str, dict[str, Any]] = {
    "sdt_8_384": {"depth": 8, "dim": 384},
    "sdt_10_384": {"depth": 10, "dim": 384},
    "sdt_6_512": {"depth": 6, "dim": 512},
    "sdt_8_512": {"depth": 8, "dim": 512},
    "sdt_10_512": {"depth": 10, "dim": 512},
    "sdt_8_768": {"depth": 8, "dim": 768},
    "sdt_2_256": {"depth": 2, "dim": 256, "pooling": "0011", "num_classes": 10},
    "sdt_2_512": {"depth": 2, "dim": 512, "pooling": "0011", "num_classes": 10},
    "sdt_2_256_dvs": {
        "depth": 2,
        "dim": 256,
        "pooling": "0011",
        "num_classes": 10,
        "in_channels": 2,
        "time_steps": 16,
        "event_pooling": True,
    },
    "sdt_2_256_gesture": {
        "depth": 2,
        "dim": 256,
        "pooling": "0111",
        "num_classes": 11,
        "in_channels": 2,
        "time_steps": 16,
    },
}
"""Published variants: what differs from the defaults of `SpikeDrivenTransformer`."""

_PARTS = {"conv": "{}.conv.", "bn": "{}.norm.", "lif": "{}_neuron."}
_PATCH = {"conv": "patch.stages.{}.conv.", "bn": "patch.stages.{}.norm.", "lif": "patch.neurons.{}."}
_MLP = {"conv": "fc{}.conv.", "bn": "fc{}.norm.", "lif": "neuron{}."}


def _attention(block: str) -> str:
    return f"blocks.{block}.attention.branch."


KEYS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"patch_embed\.proj_(conv|bn|lif)(\d?)\.", lambda m: _PATCH[m[1]].format(m[2] or 0)),
    (r"patch_embed\.rpe_(conv|bn)\.", lambda m: "patch." + _PARTS[m[1]].format("position")),
    (r"block\.(\d+)\.attn\.(q|k|v|proj)_(conv|bn|lif)\.", lambda m: _attention(m[1]) + _PARTS[m[3]].format(m[2])),
    (r"block\.(\d+)\.attn\.shortcut_lif\.", lambda m: f"{_attention(m[1])}neuron."),
    (r"block\.(\d+)\.attn\.talking_heads_lif\.", lambda m: f"{_attention(m[1])}mixer.neuron."),
    (r"block\.(\d+)\.mlp\.fc([12])_(conv|bn|lif)\.", lambda m: f"blocks.{m[1]}.mlp.branch." + _MLP[m[3]].format(m[2])),
    (r"head_lif\.", "head_neuron."),
    (r"head\.", "head."),
]
"""Released prefixes, and the names here."""

UNUSED = r"block\.\d+\.attn\.(talking_heads\.weight|attn_lif\.w)|patch_embed\.rpe_lif\.w"


ARGUMENTS = {
    "num_heads": "num_heads",
    "time_steps": "time_steps",
    "pooling": "pooling_stat",
    "event_pooling": "dvs_mode",
    "per_step": "TET",
}
"""Options that the training arguments tell, and their names there."""

_HEADS = "block.0.attn.talking_heads.weight"
"""A weight that nothing uses, with as many rows as there are heads."""


def read_options(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a released model from its state_dict."""
    depth = count_blocks(state_dict, "block.")
    dim = shape_of(state_dict, "patch_embed.proj_conv3.weight")[0]
    options: dict[str, Any] = {
        "depth": depth,
        "dim": dim,
        "in_channels": shape_of(state_dict, "patch_embed.proj_conv.weight")[1],
        "num_classes": count_classes(state_dict),
        "neuron": "plif" if "head_lif.w" in state_dict else "lif",
    }
    if depth:
        options["mlp_ratio"] = read_mlp_ratio(state_dict, "block.0.mlp.fc1_conv.weight", dim)
    if _HEADS in state_dict:
        options["num_heads"] = state_dict[_HEADS].shape[0]
    return options


def unread(state_dict: Mapping[str, Tensor]) -> Sequence[str]:
    """Options that change the answers and that no weight tells; only models of events pool them."""
    events = shape_of(state_dict, "patch_embed.proj_conv.weight")[1] == 2
    of_events, heads = ("event_pooling",) if events else (), () if _HEADS in state_dict else ("num_heads",)
    return ("time_steps", "pooling", *of_events, *heads)


CARD = imagenet_card(crop_pct=0.95)
"""How the released ImageNet models were evaluated."""

FAMILY = register(
    SpikeDrivenTransformer,
    VARIANTS,
    keys=ReleasedKeys(KEYS, read_options, unread, ARGUMENTS, "Spike-Driven Transformer V1", UNUSED),
    card=CARD,
)
