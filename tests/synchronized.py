"""Norms whose batch is that of two processes: what each of them finds, and what one process finds for the whole batch.

`python synchronized.py RANK MEETING_POINT RESULT` is one of the processes.
"""

import sys

import torch
from safetensors.torch import save_file
from torch import distributed, nn

from sdt_blocks import LIF, ParametricLIF, create_model, steps
from sdt_blocks.neuron import IntegerNeuron
from sdt_blocks.ops import attend
from sdt_blocks.ops.dispatch import forced

CHANNELS = 6
PARTS = (slice(0, 3), slice(3, 8))
"""The images of each process."""
BACKENDS = ("compiled", "triton")


def results(part=slice(None), synchronized=False, names=None):
    """Values, gradients and running statistics of each case, for some of the images; in float64."""
    kind = nn.SyncBatchNorm if synchronized else nn.BatchNorm2d
    return {
        f"{name}.{of}": value.detach().contiguous().clone()
        for name in names or CASES
        for of, value in CASES[name](part, kind).items()
    }


def trained(values, x, modules):
    """The gradients of a weighted sum of values, and all that the modules keep."""
    weights = torch.randn(values.shape[0], 8, *values.shape[2:], generator=torch.Generator().manual_seed(5))
    parameters = {f"{i}.{name}": p for i, module in enumerate(modules) for name, p in module.named_parameters()}
    kept = {f"kept.{i}.{name}": b for i, module in enumerate(modules) for name, b in module.named_buffers()}
    gradients = torch.autograd.grad((values * weights[:, x.part]).sum(), [*x.tensors, *parameters.values()])
    inputs = {f"of_x.{i}": gradient for i, gradient in enumerate(gradients)}
    ours = {f"of_parameter.{name}": g for name, g in zip(parameters, gradients[len(x.tensors) :], strict=True)}
    return {"values": values, **dict(list(inputs.items())[: len(x.tensors)]), **ours, **kept}


class Inputs:
    """Tensors `[T, B, C, H, W]` with another mean for each image, of which a process has a part."""

    def __init__(self, part, number=1, frames=3):
        torch.manual_seed(number)
        whole = [
            torch.randn(frames, 8, CHANNELS, 3, 4).double() + torch.arange(8).view(8, 1, 1, 1) for _ in range(number)
        ]
        self.part, self.tensors = part, [x[:, part].clone().requires_grad_() for x in whole]


def norm_of(kind, **options):
    norm = kind(CHANNELS, **options).double()
    nn.init.uniform_(norm.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(1))
    nn.init.constant_(norm.bias, 0.5)
    return norm


def neurons(part, kind, neuron=LIF):
    x, norm, layer = Inputs(part), norm_of(kind), neuron()
    return trained(steps.normalize_and_fire(norm, layer, x.tensors[0]), x, [norm])


def one_frame(part, kind):
    """Shown at four steps, to a norm that averages over all batches."""
    x, norm, layer = Inputs(part, frames=1), norm_of(kind, momentum=None), ParametricLIF(channels=CHANNELS).double()
    for _ in range(2):
        values = steps.normalize_and_fire(norm, layer, x.tensors[0], time_steps=4)
    return trained(values, x, [norm, layer])


def attention(part, kind):
    x, norms, layers = Inputs(part, number=3), [norm_of(kind) for _ in range(3)], [LIF() for _ in range(4)]
    values = attend(x.tensors, [steps.norm_settings(norm) for norm in norms], [layer.spec for layer in layers])
    return trained(values, x, norms)


def attention_of_groups(part, kind):
    """v is normalized by each process for itself, between q and k, which are normalized by both."""
    x, norms, layers = Inputs(part, number=3), [norm_of(kind) for _ in range(3)], [LIF() for _ in range(4)]
    norms[2] = norm_of(nn.BatchNorm2d, track_running_stats=False)
    if kind is nn.SyncBatchNorm:
        values = attend(x.tensors, [steps.norm_settings(norm) for norm in norms], [layer.spec for layer in layers])
    else:
        q, k = (steps.normalize_and_fire(*of) for of in zip(norms[:2], layers, x.tensors, strict=False))
        halves = [steps.normalize_and_fire(norms[2], layers[2], x.tensors[2][:, images]) for images in PARTS]
        values = q * layers[3]((k * torch.cat(halves, 1)).sum((-2, -1), keepdim=True))
    return trained(values, x, norms)


class Gathering(nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` on a CPU, which PyTorch has none for; without a gradient."""

    def forward(self, x):
        found = [None, None]
        distributed.all_gather_object(found, x.detach())
        parameters = (self.running_mean, self.running_var, self.weight, self.bias)
        whole = nn.functional.batch_norm(torch.cat(found), *parameters, True, self.momentum, self.eps)
        self.num_batches_tracked += 1
        return whole[PARTS[distributed.get_rank()]]


def no_neuron(part, kind):
    """A norm alone, on images that are shown at four steps."""
    norm = norm_of(Gathering if kind is nn.SyncBatchNorm else kind)
    values = steps.repeat_frame(norm, Inputs(part, frames=1).tensors[0], 4)
    return {"values": values, **{f"kept.{name}": value for name, value in norm.named_buffers()}}


def network(part, kind):
    """A whole Spike-Driven Transformer, on images."""
    torch.manual_seed(0)
    model = create_model("sdt_2_256", depth=1, dim=16, num_classes=CHANNELS, pooling="0011", num_heads=2).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.bias, 0.5)
    if kind is nn.SyncBatchNorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)).double()
    x = Inputs(part, number=0)
    x.tensors = [images[part].requires_grad_()]
    return trained(model(x.tensors[0])[None], x, [model])


CASES = {
    "network": network,
    "no_neuron": no_neuron,
    "neurons": neurons,
    "levels": lambda part, kind: neurons(part, kind, IntegerNeuron),
    "one_frame": one_frame,
    "attention": attention,
    "attention_of_groups": attention_of_groups,
}


def cases_of(backend):
    """Triton's interpreter is slow: it is asked for what its kernels compute, and no whole network."""
    return [name for name in CASES if backend == "compiled" or name not in ("network", "no_neuron")]


def main():
    rank, meeting, result = int(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    found = {}
    for backend in BACKENDS:
        with forced(backend):
            own = results(PARTS[rank], True, cases_of(backend))
        found |= {f"{backend}.{name}": value for name, value in own.items()}
    save_file(found, result)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
