"""What the models are compared with: the bare convolutions, the authors' arrangement, SpikingJelly's own model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdt_blocks import (
    LIF,
    ConvolutionBlock,
    MetaSpikeFormer,
    SpikeDrivenTransformer,
    calibrate_norms,
    create_model,
)
from sdt_blocks.blocks import RepConv


@torch.no_grad()
def firing_model(name: str, images: Tensor, **options: Any) -> Any:
    """A published variant with random weights in eval mode, its norms fitted to `images` so that every layer fires."""
    model = create_model(name, **options).to(images.device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.6, 1.4)
            nn.init.normal_(module.bias, 0.0, 0.2)
    model.train()(images)
    return model.eval()


@torch.no_grad()
def calibrated_model(name: str, images: Tensor, *, bias: float) -> Any:
    """A published variant with its initial weights in eval mode, norms fitted to `images` around this mean offset."""
    model = create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, bias, 0.3)
    calibrate_norms(model, images)
    return model


class ConvolutionFloor:
    """The bare convolutions of a Spike-Driven Transformer: channels-last, every 1x1 as a convolution, the first once.

    No norm, no neuron, no pooling, no mask, no head: only the cost of dense products in this dtype. Every layer reads
    one buffer of its input's shape. With `gradients` also those of the weights and, but for the first layer, of the
    inputs.
    """

    def __init__(
        self,
        model: SpikeDrivenTransformer,
        images: Tensor,
        dtype: torch.dtype = torch.float32,
        *,
        gradients: bool = False,
    ) -> None:
        self.gradients = gradients
        self.calls: list[tuple[Tensor, Tensor, int]] = []
        buffers: dict[torch.Size, Tensor] = {}
        hooks = []

        def note(module: nn.Conv2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            shape = inputs[0].shape
            if shape not in buffers:
                frames = (inputs[0] != 0) if len(self.calls) else inputs[0]
                buffers[shape] = frames.to(dtype).to(memory_format=torch.channels_last)
            weight = module.weight.detach().to(dtype).to(memory_format=torch.channels_last)
            self.calls.append((buffers[shape], weight, module.padding[0]))

        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                hooks.append(module.register_forward_hook(note))
        with torch.no_grad():
            model(images)
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def __call__(self) -> None:
        for number, (frames, weight, padding) in enumerate(self.calls):
            out = F.conv2d(frames, weight, padding=padding)
            if self.gradients:
                geometry = [1, 1], [padding, padding], [1, 1], False, [0, 0], 1
                torch.ops.aten.convolution_backward(out, frames, weight, None, *geometry, [number > 0, True, False])

    @property
    def multiply_adds(self) -> int:
        return sum(
            frames.shape[0] * frames.shape[2] * frames.shape[3] * weight.numel() for frames, weight, _ in self.calls
        )


class _OnSpikingJelly(nn.Module):
    """A model's neurons as SpikingJelly's, on frames `[T * B, C, H, W]`."""

    def __init__(self, model: SpikeDrivenTransformer | MetaSpikeFormer) -> None:
        super().__init__()
        self.time_steps = model.time_steps
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LIF)}
        self.neurons = nn.ModuleDict(
            {name.replace(".", "_"): _spikingjelly_lif(layer.threshold) for name, layer in layers.items()}
        )

    def _fire(self, name: str, frames: Tensor) -> Tensor:
        sequence = frames.view(self.time_steps, -1, *frames.shape[1:])
        spikes: Tensor = self.neurons[name.replace(".", "_")](sequence)
        return spikes.flatten(0, 1)

    def _rest(self) -> None:
        for neuron in self.neurons.values():
            neuron.reset()


class AuthorsArrangement(_OnSpikingJelly):
    """The order of work of the released model, with SpikingJelly's neurons: frames `[T * B, C, H, W]` in PyTorch's
    default layout, the image repeated T times before the first convolution, q, k and v separate, nothing folded.

    Takes its layers from one of our models, so that both compute the same; `forward` takes images `[B, C, H, W]`.
    """

    def __init__(self, model: SpikeDrivenTransformer) -> None:
        super().__init__(model)
        if model.config["event_pooling"] or model.config["neuron"] != "lif":
            raise ValueError("the authors' arrangement is written for images and LIF neurons without event pooling")
        self.per_step, self.heads = model.per_step, model.config["num_heads"]
        self.patch, self.blocks, self.head = model.patch, model.blocks, model.head

    def forward(self, images: Tensor) -> Tensor:
        self._rest()
        patch = self.patch
        x = images.unsqueeze(0).repeat(self.time_steps, 1, 1, 1, 1).flatten(0, 1)
        for stage in range(3):
            x = patch.stages[stage].norm(patch.stages[stage].conv(x))
            x = patch.pools[stage](self._fire(f"patch.neurons.{stage}", x))
        x = patch.pools[3](patch.stages[3].norm(patch.stages[3].conv(x)))
        x = x + patch.position.norm(patch.position.conv(self._fire("patch.neurons.3", x)))
        for index in range(len(self.blocks)):
            x = self._block(index, x)
        tokens = self._fire("head_neuron", x.flatten(-2).mean(-1))
        logits: Tensor = self.head(tokens).view(self.time_steps, -1, self.head.out_features)
        return logits if self.per_step else logits.mean(0)

    def _block(self, index: int, x: Tensor) -> Tensor:
        attention, mlp = self.blocks[index].attention.branch, self.blocks[index].mlp.branch
        name = f"blocks.{index}.attention.branch"
        spikes = self._fire(f"{name}.neuron", x)
        frames, channels, height, width = x.shape

        def heads(letter: str) -> Tensor:
            y = getattr(attention, letter).norm(getattr(attention, letter).conv(spikes))
            y = self._fire(f"{name}.{letter}_neuron", y).flatten(-2).transpose(-1, -2)
            return (
                y.reshape(frames, height * width, self.heads, channels // self.heads).permute(0, 2, 1, 3).contiguous()
            )

        q, k, v = heads("q"), heads("k"), heads("v")
        kv = k.mul(v).sum(-2, keepdim=True)
        masked = q.mul(self._fire(f"{name}.mixer.neuron", kv))
        masked = masked.transpose(2, 3).reshape(frames, channels, height, width).contiguous()
        x = x + attention.proj.norm(attention.proj.conv(masked))

        name = f"blocks.{index}.mlp.branch"
        hidden = mlp.fc1.norm(mlp.fc1.conv(self._fire(f"{name}.neuron1", x)))
        return x + mlp.fc2.norm(mlp.fc2.conv(self._fire(f"{name}.neuron2", hidden)))


class MetaArrangement(_OnSpikingJelly):
    """Meta-SpikeFormer with SpikingJelly's multi-step neurons, its layers on frames `[T * B, C, H, W]`.

    As efficient as possible without rewriting a layer: an image's first convolution is computed once, q, k and v read
    flattened frames, the attention multiplies k and v first. Takes copies of one of our models' layers; `forward` takes
    images `[B, C, H, W]`.
    """

    def __init__(self, model: MetaSpikeFormer) -> None:
        super().__init__(model)
        if model.config["neuron"] != "lif" or model.distillation:
            raise ValueError("this arrangement is written for LIF neurons and one head")
        self.layers = copy.deepcopy(model)
        for unit in self.layers.modules():
            # Autograd keeps what it needs of a chain, as it does in the authors' code.
            if isinstance(unit, RepConv):
                unit.conv = nn.Sequential(OrderedDict(unit.conv.named_children()))

    def forward(self, images: Tensor) -> Tensor:
        self._rest()
        net = self.layers
        x = net.downsamplings[0].conv(images).repeat(self.time_steps, 1, 1, 1)
        for stage, blocks in enumerate(net.stages):
            if stage:
                x = net.downsamplings[stage].conv(self._fire(f"downsamplings.{stage}.neuron", x))
            for i, block in enumerate(blocks):
                step = self._convolutions if isinstance(block, ConvolutionBlock) else self._attention
                x = step(f"stages.{stage}.{i}", block, x)
        spikes = self._fire("head_neuron", x.mean((-2, -1)))
        logits: Tensor = net.head(spikes).view(self.time_steps, len(images), -1)
        return logits.mean(0)

    def _convolutions(self, name: str, block: Any, x: Tensor) -> Tensor:
        separable, inner = block.separable.branch, f"{name}.separable.branch"
        wide = self._fire(f"{inner}.neuron2", separable.expand(self._fire(f"{inner}.neuron1", x)))
        x = x + separable.separable(wide)
        wide = self._fire(f"{name}.neuron2", block.conv1(self._fire(f"{name}.neuron1", x)))
        changed: Tensor = x + block.conv2(wide)
        return changed

    def _attention(self, name: str, block: Any, x: Tensor) -> Tensor:
        attention, inner = block.attention.branch, f"{name}.attention.branch"
        spikes, heads = self._fire(f"{inner}.neuron", x), attention.mixer.num_heads
        q, k, v = (
            self._fire(f"{inner}.{letter}_neuron", getattr(attention, letter)(spikes))
            .flatten(2)
            .unflatten(1, (heads, -1))
            for letter in "qkv"
        )
        counts = ((v @ k.mT) @ q * attention.mixer.scale).view(x.shape)
        x = x + attention.proj(self._fire(f"{inner}.mixer_neuron", counts))
        mlp, inner = block.mlp.branch, f"{name}.mlp.branch"
        hidden = self._fire(f"{inner}.neuron2", mlp.fc1(self._fire(f"{inner}.neuron1", x)))
        changed: Tensor = x + mlp.fc2(hidden)
        return changed


def _spikingjelly_lif(threshold: float) -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    lif: nn.Module = neuron.LIFNode(
        tau=2.0,
        v_threshold=threshold,
        surrogate_function=surrogate.Sigmoid(4.0),
        detach_reset=True,
        step_mode="m",
    )
    return lif


def spikingjelly_model(
    *, device: torch.device, compiled: bool, training: bool = False, dim: int = 384
) -> Callable[[Tensor], Tensor]:
    """SpikingJelly 2.0's own Spike-Driven Transformer of depth 8, freshly initialized; every call starts from rest."""
    from spikingjelly.activation_based import functional, model

    net = model.SpikeDrivenTransformer(embed_dims=dim).to(device).train(training)
    run = torch.compile(net) if compiled else net

    def call(images: Tensor) -> Tensor:
        functional.reset_net(net)
        logits: Tensor = run(images)
        return logits

    call.net = net  # type: ignore[attr-defined]
    return call
