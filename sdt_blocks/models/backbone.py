"""The base class of the models: maps of their stages, a replaceable head, and the methods that training loops need."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ..blocks.units import statistics_aside
from ..neuron import Stream, find_neurons
from ..steps import fire, is_sequence, present
from .card import DataCard
from .hub import HubModel
from .options import check_option, options_of

WEIGHT_STD = 0.02
"""The standard deviation of the normal distribution of initial weights."""


class Backbone(HubModel, nn.Module):
    """A model that computes its membranes stage by stage, each at a lower resolution or with more channels.

    A subclass has `forward_stages`, `feature_info` and a `head` (`nn.Identity` without classes), and runs its blocks
    with `run_blocks`. The head gets the means over tokens, or the spikes of a `head_neuron` on them; a
    `distillation_head` gets the same, or the spikes of its own `distillation_neuron`. The methods have timm's names and
    arguments, so that code written for timm's models works.
    """

    config: dict[str, Any]
    card: DataCard | None
    in_channels: int
    num_classes: int
    time_steps: int
    head: nn.Module
    grad_checkpointing = False

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """The results of the stages one after another, `[T, B, C, H, W]` each; a caller may stop early."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_stages")

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each stage, as in timm: `num_chs`, `reduction` (image size over map size), `module` (its name)."""
        raise NotImplementedError(f"{type(self).__name__} has no feature_info")

    def run_stages(self, x: Tensor, before: nn.ModuleList, stages: nn.ModuleList) -> Iterator[Tensor]:
        """`forward_stages` for images or frames x, where each stage is a module of `before` and then its blocks."""
        x = present(x, self.time_steps, self.in_channels)
        for first, blocks in zip(before, stages, strict=True):
            x = self.run_blocks(blocks, first(x))
            yield x

    def stream(self) -> Stream:
        """This model for frames that come chunk by chunk: `stream(chunk)` continues where the last chunk ended."""
        return Stream(self)

    # ---- features and head

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The result of the last stage, `[T, B, C, H', W']`."""
        for membrane in self.forward_stages(x):  # noqa: B007
            pass
        return membrane

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The model's output for the result x of `forward_features`.

        With `pre_logits` it is the input of the head instead, averaged over time, `[B, num_features]`.
        """
        tokens = x.mean((-2, -1))
        neuron = getattr(self, "head_neuron", None)
        seen = tokens if neuron is None else fire(neuron, tokens)
        if pre_logits:
            return seen.mean(0)
        logits = self._over_steps(self.head(seen))
        second = getattr(self, "distillation_head", None)
        if second is None:
            return logits
        neuron = getattr(self, "distillation_neuron", None)
        distilled = self._over_steps(second(seen if neuron is None else fire(neuron, tokens)))
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def _over_steps(self, logits: Tensor) -> Tensor:
        return logits if getattr(self, "per_step", False) else logits.mean(0)

    def features(self, x: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
        """The mean over time of every stage, or of those numbered in `stages`, `[B, C, H, W]` each.

        Input is that of the model. Height and width are the image's divided by `reduction`, rounded up.

        Raises `ValueError` for a stage that does not exist, a stage that is given twice, or none at all, and
        `TypeError` for anything but a list of whole numbers.

        >>> model = create_model("sdt_v2_15m", dims=(16, 32, 48, 64), depths=(1, 1, 1, 1, 1))
        >>> [list(feature.shape) for feature in model.features(torch.rand(2, 3, 64, 48), stages=(1, 4))]
        [[2, 16, 16, 12], [2, 64, 4, 3]]
        """
        count = len(self.feature_info)
        wanted = list(range(count)) if stages is None else _listed(stages)
        if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(count)):
            raise ValueError(f"stages must be different numbers from 0 to {count - 1}, got {wanted}")
        found, _ = self._maps(x, wanted, stop=True)
        return found

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """`(result of the last stage, maps)`, or with `intermediates_only` only the maps, as timm asks for them.

        The maps are those of `features`: for the stages `indices` (negative ones counted from the end), for the last
        `indices` stages if it is a number, by default for all. The result of the last stage is the input of
        `forward_head`; with `stop_early` it is that of the last stage asked for. `norm` has no effect, since there is
        no norm after the stages.

        Raises `ValueError` for stages that do not exist and for another format, `TypeError` for what is no number.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"maps are [B, C, H, W], output_fmt='NCHW', got {output_fmt!r}")
        maps, last = self._maps(x, self.stages_of(indices), stop=stop_early or intermediates_only)
        return maps if intermediates_only else (last, maps)

    def stages_of(self, indices: int | Sequence[int] | None = None) -> list[int]:
        """The stage numbers that timm's `indices` stand for.

        Raises `ValueError` if they do not exist, `TypeError` for anything but whole numbers.
        """
        count = len(self.feature_info)
        if indices is None or isinstance(indices, int):
            last = count if indices is None else indices
            if not 1 <= last <= count:
                raise ValueError(f"the last {last} stages were asked for; the model has {count}")
            return list(range(count - last, count))
        wanted = _listed(indices)
        if not wanted or not all(-count <= index < count for index in wanted):
            raise ValueError(f"stages must be numbers from {-count} to {count - 1}, got {wanted}")
        return [index % count for index in wanted]

    def _maps(self, x: Tensor, wanted: Sequence[int], *, stop: bool) -> tuple[list[Tensor], Tensor]:
        """The maps of the wanted stages, and the result of the last stage that was computed."""
        found: dict[int, Tensor] = {}
        for stage, membrane in enumerate(self.forward_stages(x)):
            if stage in wanted:
                found[stage] = membrane.mean(0)
            if stop and stage == max(wanted):
                break
        return [found[stage] for stage in wanted], membrane

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the head if only features are needed; returns the stage numbers of `indices`.

        Later stages stay but are not computed. There is no norm to prune.
        """
        stages = self.stages_of(indices)
        if prune_head:
            self.reset_classifier(0)
        return stages

    # ---- the classifier

    @property
    def num_features(self) -> int:
        """Channels of the last stage, and of the head's input."""
        return int(self.feature_info[-1]["num_chs"])

    @property
    def head_hidden_size(self) -> int:
        """Channels of the head's input."""
        return self.num_features

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head, or `(head, distillation_head)` if there are two."""
        second = getattr(self, "distillation_head", None)
        return self.head if second is None else (self.head, second)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the heads by new ones for `num_classes`; 0 removes them, a second head for good.

        The model's options are updated, so that it can be saved; the class names are removed from its card.

        Raises `ValueError` or `TypeError` for a number that the model's constructor would refuse, and for a pooling
        other than "avg", the mean over tokens.

        >>> model = create_model("sdt_2_256")
        >>> model.reset_classifier(7)
        >>> model.get_classifier(), model.num_classes
        (Linear(in_features=256, out_features=7, bias=True), 7)
        """
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"the head sees the mean over tokens, global_pool='avg', got {global_pool!r}")
        num_classes = check_option("num_classes", num_classes, options_of(type(self))["num_classes"])
        like = next(self.parameters())
        self.head = self._new_head(num_classes, like)
        options: dict[str, Any] = {"num_classes": num_classes}
        if getattr(self, "distillation_head", None) is not None:
            self.distillation_head = self._new_head(num_classes, like) if num_classes else None
            if not num_classes:
                options["distillation"] = False
                for name in {"distillation", "distillation_neuron"} & {*vars(self), *self._modules}:
                    setattr(self, name, False if name == "distillation" else None)
        self.num_classes, self.config = num_classes, {**self.config, **options}
        if self.card is not None:
            self.card = self.card.without_names()

    def _new_head(self, num_classes: int, like: Tensor) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        initialize(head)
        return head.train(self.training)

    # ---- training

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the input of each block, and recomputes the rest in the backward pass.

        Gradients are the same, and the running statistics of norms count a batch once. Hooks within a block are called
        again. A stage whose `nn.Sequential` has a hook, or another forward, is recomputed as a whole, with a warning.
        """
        self.grad_checkpointing = enable

    def run_blocks(self, blocks: Any, membrane: Tensor) -> Tensor:
        """Runs the blocks of a stage, an `nn.Sequential`, one after another."""
        again = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        # Whoever traces the model decides for itself what to keep.
        if not again or isinstance(membrane, fx.Proxy) or torch.compiler.is_compiling():
            result: Tensor = blocks(membrane)
            return result
        if not is_sequence(blocks):
            name = next(name for name, module in self.named_modules() if module is blocks)
            warnings.warn(
                f"{name} has a hook, or a forward of its own: its blocks are recomputed all at once, which takes the "
                f"memory of all; hooks on each block do not prevent that one after another is",
                stacklevel=2,
            )
            return _checkpointed(blocks, membrane)
        for block in blocks:
            membrane = _checkpointed(block, membrane)
        return membrane

    def no_weight_decay(self) -> set[str]:
        """The names of the neurons' parameters: time constants, which decay would draw toward 2 steps."""
        return {f"{name}.{key}" for name, neuron in find_neurons(self).items() for key, _ in neuron.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Name patterns for the groups of layer decay, as in timm: stem, blocks in their order (or stages).

        The heads and the neurons before them match no pattern, and are the last group.
        """
        blocks: list[tuple[str, tuple[int] | None]]
        if coarse:
            blocks = [(r"^(?:blocks|stages|downsamplings|embeddings)\.(\d+)", None)]
        else:
            blocks = [
                (r"^(?:downsamplings|embeddings)\.(\d+)", (-1,)),
                (r"^stages\.(\d+)\.(\d+)", None),
                (r"^blocks\.(\d+)", None),
            ]
        return {"stem": r"^(?:patch|downsamplings\.0|embeddings\.0)\.", "blocks": blocks}


def _listed(stages: Iterable[int]) -> list[int]:
    """Stage numbers as a list. Raises `TypeError`."""
    found = list(stages) if isinstance(stages, Iterable) else [None]
    if not all(isinstance(stage, numbers.Integral) for stage in found):
        raise TypeError(f"stages must be a list of whole numbers, got {stages!r}")
    return [int(stage) for stage in found]  # type: ignore[arg-type]


def initialize(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Sets normally distributed weights and zero biases, for linear layers and modules of `kinds`."""
    if isinstance(module, (nn.Linear, *kinds)):
        nn.init.trunc_normal_(module.weight, std=WEIGHT_STD)  # type: ignore[arg-type]
        if module.bias is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def _checkpointed(block: nn.Module, membrane: Tensor) -> Tensor:
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), statistics_aside(norms, [_copied(norm) for norm in norms])

    result: Tensor = checkpoint(block, membrane, use_reentrant=False, context_fn=contexts)
    return result


def _copied(norm: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.clone() for name, value in norm._buffers.items()}


def stage_info(channels: Sequence[int], halved: Sequence[bool], modules: Sequence[str]) -> list[dict[str, Any]]:
    """The `feature_info` of stages with these channels, which halve height and width or not."""
    reduction, found = 1, []
    for width, halves, module in zip(channels, halved, modules, strict=True):
        reduction *= 2 if halves else 1
        found.append({"num_chs": width, "reduction": reduction, "module": module})
    return found
