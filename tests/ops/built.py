"""Builds the Triton kernels for a GPU that need not be there and prints what came of it, a line of JSON for each.

`python built.py CAPABILITY DTYPE CASES`, in a process without Triton's interpreter. What it prints is read by
test_triton_builds.py.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_offline
import offline
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdt_blocks.ops.spec import (
    Affine,
    Arriving,
    ByteLayer,
    LevelSpec,
    Masks,
    NeuronSpec,
    Norm,
    Spikes,
    arrange,
    state_dtype,
)
from sdt_blocks.ops.triton import bytes as of_bytes
from sdt_blocks.ops.triton import dense, levels, training
from sdt_blocks.surrogate import KINDS, Surrogate

PLAIN = NeuronSpec()


class Layer:
    """A layer's input `[T, B, C, H, W]` without data, and what its kernels are called with."""

    def __init__(self, shape, dtype, channels_last=False, frames=None, gaps=False, per_channel=True):
        steps, images, channels, *inner = shape
        frames, wide = frames or steps, 2 * channels if gaps else channels
        size = (frames, images, *inner, wide) if channels_last else (frames, images, wide, *inner)
        x = torch.empty(size, dtype=dtype)
        x = x.movedim(-1, 2) if channels_last else x
        self.x, self.layout = arrange(x[:, :, :channels], steps, per_channel)
        self.grad = self.layout.empty(self.x, steps)
        self.of_channel = torch.empty(channels, dtype=state_dtype(x))
        self.norm = Affine(self.of_channel, self.of_channel, [self.of_channel], [self.of_channel], True)

    def forward(self, neuron=PLAIN, norm=True, inv_tau=None, membrane=None, keep=False):
        norm = self.norm if norm else None
        for bits in self.bits():
            training.lif_forward(self.x, self.layout, neuron, norm, inv_tau, membrane, keep_membrane=keep, bits=bits)

    def bits(self):
        """Where bits are to go: nowhere, and if there are any in this layout into a tensor."""
        bits = self.layout.empty_bits(self.x, wanted=True)
        return (None, bits) if bits.numel() else (None,)

    def backward(self, neuron=PLAIN, norm=True, inv_tau=None, membrane=None, last=None):
        norm, arriving = self.norm if norm else None, Arriving(self.grad, last)
        training.lif_backward(arriving, self.x, self.layout, neuron, norm, inv_tau, membrane)

    def levels(self, neuron):
        levels.norm_levels(self.x, self.layout, neuron, self.norm, self.grad)
        levels.norm_levels_backward(self.grad, self.x, self.layout, neuron, self.norm, torch.empty_like(self.grad))

    def levels_alone(self, neuron):
        inside = torch.empty((self.x.numel() + 7) // 8, dtype=torch.uint8)
        levels.levels(self.x, neuron, self.grad, inside)
        levels.levels(self.x, neuron, self.grad, None)
        levels.levels_backward(self.grad, inside, neuron, torch.empty_like(self.grad))

    def statistics(self, parts=2048):
        of, number = self.of_channel, torch.empty((), dtype=torch.int64)
        for n in (1, 3):
            running = [Norm(of, of, training=True, batches=number)] * n
            training.batch_statistics([self.x] * n, self.layout, running, 1, of.expand(n, -1), of.expand(n, -1).clone())
            sums = torch.empty(n, 3, parts, len(of), dtype=of.dtype)
            into, norm = torch.empty(2, n, len(of), dtype=of.dtype), Affine(of, of, [of] * n, [of] * n, True)
            training.norm_gradients([self.grad] * n, [self.x] * n, self.layout, norm, sums, 100, *into)

    def attention(self, keep=True, inv_tau=None, neurons=(PLAIN,) * 4):
        codes = self.layout.empty(self.x, self.layout.steps, torch.uint8) if keep else None
        sums = torch.empty(2, *self.x.shape[:3], dtype=state_dtype(self.x))
        rows = torch.empty(3, len(self.of_channel), dtype=state_dtype(self.x))
        norm, x = Affine(rows, rows, [self.of_channel] * 3, [self.of_channel] * 3, True), [self.x] * 3
        for bits in self.bits():
            training.attend(x, Spikes(self.grad, bits), codes, sums, self.layout, neurons, norm, inv_tau)
        if codes is not None:
            training.mask_gradient(self.grad, codes, sums[0], self.layout)
            training.attend_backward(self.grad, Masks(*sums, codes), x, self.layout, neurons, norm, inv_tau)

    def pool(self, keep=True):
        frames = self.x.flatten(0, 1)
        channels_last = not frames.is_contiguous()
        size = (*frames.shape[:2], *((n + 1) // 2 for n in frames.shape[2:]))
        order = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(size, dtype=frames.dtype, memory_format=order)
        places = torch.empty(size, dtype=torch.uint8, memory_format=order) if keep else None
        whole = (size[1] if channels_last else size[3]) % 8 == 0
        for bits in (None, torch.empty(out.numel() // 8, dtype=torch.uint8)) if whole else (None,):
            training.max_pool(frames, out, places, bits)
        if places is not None:
            training.max_pool_backward(out, places, frames)


def usual(dtype, batch=32, size=224, alpha=4.0, tau=0.5):
    """The layers of sdt_8_384 and of sdt_v3_19m, both orders of memory."""
    neuron = NeuronSpec(surrogate=Surrogate("sigmoid", alpha), inv_tau=tau)
    for channels_last in (False, True):
        small = size // 16
        hidden = Layer((4, batch, 1536, small, small), dtype, channels_last)
        hidden.forward(neuron)
        hidden.backward(neuron)
        hidden.statistics()
        Layer((4, batch, 384, small, small), dtype, channels_last).attention()
        Layer((4, batch, 96, size // 2, size // 2), dtype, channels_last).pool()
        large = Layer((4, batch, 96, size // 2, size // 2), dtype, channels_last)
        training.batch_statistics([large.x], large.layout, [Norm()], 1, large.of_channel, large.of_channel.clone())
    whole = Layer((4, batch, 384, small, small), dtype, per_channel=False)
    whole.forward(neuron, norm=False)
    whole.backward(neuron, norm=False)
    whole.levels_alone(LevelSpec(rounding="up"))
    for channels_last in (False, True):
        Layer((1, batch, 1440, small, small), dtype, channels_last).levels(LevelSpec())
    bits = training.pack_bits(whole.x)
    training.unpack_bits(bits, whole.x)


def options(dtype):
    """What neurons and tensors may be besides: every reset and surrogate, learned time constants, membranes, gaps."""
    for i, reset in enumerate(("zero", "subtract", "none")):
        for kind in KINDS:
            neuron = NeuronSpec(reset=reset, strict=i == 1, detach_reset=i == 0, surrogate=Surrogate(kind, 2.0))
            layer = Layer((3, 2, 6, 5, 7), dtype, channels_last=i == 1, gaps=i == 2)
            membrane = torch.empty(layer.x.shape[1:], dtype=state_dtype(layer.x))
            inv_tau = layer.of_channel if i else torch.empty((), dtype=state_dtype(layer.x))
            layer.forward(neuron, inv_tau=inv_tau, membrane=membrane, keep=True)
            layer.backward(neuron, inv_tau=inv_tau, membrane=membrane, last=membrane)
    for neuron in (LevelSpec(8, 3.0, "up", 0.7), LevelSpec(8, 3.0, "even", 0.7)):
        layer = Layer((3, 2, 6, 5, 7), dtype, gaps=neuron.rounding == "up")
        layer.levels(neuron)
        Layer((3, 2, 6, 5, 7), dtype, per_channel=False).levels_alone(neuron)
    for steps in (1, 8, 16, 11):
        layer = Layer((steps, 2, 64, 14, 14), dtype, frames=1 if steps == 8 else None)
        layer.forward()
        layer.backward()
        Layer((steps, 2, 64, 14, 14), dtype, channels_last=True).attention(inv_tau=torch.empty(4, 64))
        Layer((steps, 2, 24, 7, 7), dtype).attention(keep=False)
    Layer((1, 2, 3, 7, 9), dtype).pool()
    Layer((1, 2, 24, 7, 9), dtype, channels_last=True).pool(keep=False)


def pooling(dtype):
    """Both orders of memory."""
    for channels_last in (False, True):
        Layer((1, 2, 8, 8, 8), dtype, channels_last).pool()


def long(dtype):
    """Sequences with time constants learned a channel: what takes the most registers."""
    for steps in (8, 11, 16):
        for channels_last in (False, True):
            layer = Layer((steps, 32, 384, 14, 14), dtype, channels_last)
            inv_tau = torch.empty(4, 384, dtype=state_dtype(layer.x))
            layer.attention(inv_tau=inv_tau)
            layer.forward(inv_tau=inv_tau[0])
            layer.backward(inv_tau=inv_tau[0])


def evaluation(dtype, batch=32, size=224):
    """What stands between the products of sdt_8_384 in evaluation; and one image, long sequences, odd channels."""
    tau, taus = torch.empty(()), torch.empty(4, 384)
    small = size // 16
    for images in (batch, 1):
        membrane = torch.empty(4, images, small, small, 384)
        product = membrane.to(dtype)
        dense.fire(product, PLAIN, tau, dtype, None)
        dense.fire(product, PLAIN, torch.empty(384), dtype, membrane)
        levels.fire_levels(product, LevelSpec(), dtype, membrane)
        dense.fire_and_pool(torch.empty(4, images, size // 2, size // 2, 96, dtype=dtype), PLAIN, tau, dtype)
        dense.attend(torch.empty(4, images, small, small, 3 * 384, dtype=dtype), (PLAIN,) * 4, taus, dtype)
    for channels in (384, 50):
        product = torch.empty(16, 2, 7, 7, channels, dtype=dtype)
        dense.fire(product[:1].expand(16, 2, 7, 7, channels), PLAIN, tau, torch.uint8, None)
        dense.fire_and_pool(product, PLAIN, tau, dtype)


def in_bytes(dtype, batch=32):
    """The layers of sdt_8_384 in evaluation in 8 bits: what fires, what is added to the shortcut, 3x3, q, k and v."""
    for into, out, side, kernel in ((384, 1536, 14, 1), (1536, 384, 14, 1), (96, 192, 56, 3), (384, 384, 14, 1)):
        x = torch.empty(4, batch, side, side, into, dtype=torch.int8)
        weight, channels = torch.empty(out, kernel, kernel, into, dtype=torch.int8), torch.empty(out)
        layer = ByteLayer(weight, channels, channels.clone(), ((1, 1), (kernel // 2,) * 2, (1, 1)))
        residual = torch.empty(4, batch, side, side, out)
        neuron = PLAIN._replace(inv_tau=torch.empty(()))
        for shortcut, membrane in ((None, None), (residual, torch.float32)):
            for fires in (neuron, LevelSpec()):
                of_bytes.spike_layer(x, layer, (side, side), shortcut, membrane, fires)
    of_bytes.spike_layer(x, layer, (side, side), None, torch.float32, None)


def facts(launch, capability):
    if isinstance(capability, str):
        return {
            "kernel": launch.name,
            "spilled": offline.spilled_by_amd(launch, capability),
            "products": offline.products_by_amd(launch, capability),
        }
    binary = offline.build(launch, capability)
    counts = offline.executed(launch, binary, launch.arguments.get("rounds", 1))
    vector = launch.arguments.get("V", launch.arguments.get("LANES", 0))
    return {
        "kernel": launch.name,
        "norm": launch.arguments.get("AFFINE", False),
        "masked": bool(launch.arguments.get("MASK", False)),
        "bits": bool(launch.arguments.get("PACK", False)),
        # Whether a byte is of more than one thread's elements.
        "joined": min(vector, 16 // next(iter(launch.tensors().values())).element_size()) < 8,
        "group": vector * next(iter(launch.tensors().values())).element_size(),
        "registers": binary.registers,
        "spilled": binary.spilled,
        "divisions": len(re.findall(offline.DIVISION, binary.assembly)),
        "barriers": sum(count for op, count in counts.items() if op.startswith("BAR")),
        "accesses": dict(offline.accesses(counts)),
        "products": sorted({op for op in counts if "MMA" in op}),
        "copies": sorted({op for op in counts if op.startswith("LDGSTS")}),
        "fused": sum(count for op, count in counts.items() if op.startswith(("FFMA", "DFMA"))),
    }


def build_unspecialized(launches, capability):
    """Builds each kernel of the launches by Triton 3.2, and yields its name."""
    from triton.runtime.jit import mangle_type

    distinct = {}
    for launch in launches:
        given = {parameter: launch.arguments[parameter.name] for parameter in launch.kernel.params}
        constants = {parameter.name: value for parameter, value in given.items() if parameter.is_constexpr}
        signature = {p.name: mangle_type(value) for p, value in given.items() if not p.is_constexpr}
        distinct[launch.name, str(signature), str(constants), str(launch.options)] = launch, signature, constants
    for launch, signature, constants in distinct.values():
        source = ASTSource(launch.kernel, signature, constants)
        triton.compile(source, target=GPUTarget("cuda", capability, offline.WARP), options=launch.options)
        yield launch.name


def recorded(case, *arguments, **settings):
    with FakeTensorMode(), offline.recorded() as launches:
        case(*arguments, **settings)
    return launches


def main():
    target, dtype, cases = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]
    capability = int(target) if target.isdigit() else target
    if isinstance(capability, str):
        of_bytes.STAGES = 2  # as where PyTorch is built for AMD's GPUs
    if cases == "launches":
        for channels_last in (False, True):
            print(json.dumps(gpu_offline.launches_of_block(dtype, channels_last)), flush=True)
        return
    if cases == "of a model":
        of_model = gpu_offline.record_folded("sdt_2_256", dtype), gpu_offline.record_bytes("sdt_2_256")
        for launches, products in of_model:
            print(json.dumps([Counter(launch.name for launch in launches), len(products)]))
        return
    if cases == "unspecialized":
        print("\n".join(map(json.dumps, build_unspecialized(recorded(pooling, dtype), capability))))
        return
    if cases == "keys":
        for settings in ({}, {"batch": 33}, {"alpha": 2.5}, {"tau": 0.25}, {"size": 160}):
            launches = recorded(usual, dtype, **settings)
            sizes = {name: value for name, value in settings.items() if name in ("batch", "size")}
            launches += recorded(evaluation, dtype, **sizes)
            print(json.dumps(sorted({str(offline.key(launch, capability)) for launch in launches})))
        return
    of_name = {"usual": usual, "options": options, "long": long, "evaluation": evaluation, "bytes": in_bytes}
    launches = recorded(of_name[cases], dtype)
    distinct = {offline.key(launch, capability): launch for launch in launches}
    for launch in distinct.values():
        print(json.dumps(facts(launch, capability)), flush=True)


if __name__ == "__main__":
    main()
