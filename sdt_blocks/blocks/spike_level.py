"""Blocks of transformers whose shortcuts add spikes: neurons come after the weights, and sums of spikes are passed on.

The sums are whole numbers, whose largest value grows by one with every shortcut. They are not spikes: a product with
them multiplies, and the analysis counts it as such.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..checks import check_flag
from ..neuron import LIF, NeuronLike, Streamed, make_neuron
from ..steps import check_sequence, fire, project_and_fire, project_and_mix, shortcut
from .mixers import ATTENTION_THRESHOLD, LinearSpikeMixer, QKMixer, of_neuron
from .shortcut import check_branch
from .sizes import check_widths
from .units import ConvNorm


class SpikeShortcut(nn.Module):
    """`x + branch(x)`: the branch ends in a neuron, so sums of spikes grow by at most one.

    Shapes: `[T, B, ...] -> [T, B, ...]`.

    Raises `ValueError` if the branch changes the shape, and `TypeError` if it is not a module.

    >>> SpikeShortcut(SpikeLevelMLP(64))(torch.ones(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        check_branch(branch)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return shortcut(x, self.branch(x))


class SpikeLevelMLP(nn.Module):
    """Two 1x1 convolutions, each followed by a neuron: `LIF(BN(W2 LIF(BN(W1 x))))`.

    Between them there are `hidden` channels, four times dim by default.

    Shapes: sums of spikes `[T, B, dim, H, W]` to spikes `[T, B, dim, H, W]`.

    >>> SpikeLevelMLP(64, hidden=256)(torch.ones(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    def __init__(self, dim: int, *, hidden: int | None = None, neuron: NeuronLike = LIF) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        check_widths(dim=dim, hidden=hidden)
        self.dim = dim
        self.fc1, self.neuron1 = ConvNorm(dim, hidden, bias=True), make_neuron(neuron, channels=hidden)
        self.fc2, self.neuron2 = ConvNorm(hidden, dim, bias=True), make_neuron(neuron, channels=dim)

    def forward(self, x: Tensor) -> Tensor:
        check_sequence(x, self.dim, "SpikeLevelMLP")
        return project_and_fire(self.fc2, self.neuron2, project_and_fire(self.fc1, self.neuron1, x))


class SpikingSelfAttention(nn.Module):
    """Spiking self-attention (SSA; Zhou et al., 2023, https://arxiv.org/abs/2209.15425).

        q, k, v = LIF(BN(W x))
        a = LIF_0.5(scale * q (k^T v))               per step and head, no softmax
        result = LIF(BN(W' a))

    `num_heads` and `scale` are those of `LinearSpikeMixer`; the published scale does not depend on the width of the
    heads. With `bias`, the convolutions of q, k and v have a bias, as in the released CIFAR models. `mixes_images`
    reproduces a fault of the released QKFormer: see `AcrossImages`.

    Shapes: sums of spikes `[T, B, dim, H, W]` to spikes `[T, B, dim, H, W]`.

    Raises `ValueError` if num_heads does not divide dim.

    >>> SpikingSelfAttention(64)(torch.ones(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        scale: float = 0.125,
        bias: bool = False,
        mixes_images: bool = False,
        neuron: NeuronLike = LIF,
    ) -> None:
        super().__init__()
        check_flag("mixes_images", mixes_images)
        self.dim = dim
        self.mixer = LinearSpikeMixer(dim, num_heads=num_heads, scale=scale)
        self.q, self.k, self.v = (ConvNorm(dim, dim, bias=bias) for _ in range(3))
        self.q_neuron, self.k_neuron, self.v_neuron = (make_neuron(neuron, channels=dim) for _ in range(3))
        self.mixer_neuron = make_neuron(neuron, channels=dim, threshold=ATTENTION_THRESHOLD)
        self.proj, last = ConvNorm(dim, dim, bias=True), make_neuron(neuron, channels=dim)
        self.proj_neuron = AcrossImages(last) if mixes_images else last

    def forward(self, x: Tensor) -> Tensor:
        check_sequence(x, self.dim, "SpikingSelfAttention")
        units, neurons = (self.q, self.k, self.v), (self.q_neuron, self.k_neuron, self.v_neuron)
        mixed = fire(self.mixer_neuron, project_and_mix(units, neurons, self.mixer, x))
        return project_and_fire(self.proj, self.proj_neuron, mixed)


class QKAttention(nn.Module):
    """Q-K attention: `LIF(BN(W' (k * a)))` with `a = LIF_0.5(sum of q)` and `q, k = LIF(BN(W x))`, in linear time.

    `num_heads` and `over` ("channels": token attention, "tokens": channel attention) are those of `QKMixer`.

    Shapes: sums of spikes `[T, B, dim, H, W]` to spikes `[T, B, dim, H, W]`.

    Raises `ValueError` if num_heads does not divide dim, or for another `over`.

    >>> QKAttention(64)(torch.ones(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    def __init__(self, dim: int, *, num_heads: int = 8, over: str = "channels", neuron: NeuronLike = LIF) -> None:
        super().__init__()
        self.dim = dim
        self.mixer = QKMixer(dim, num_heads=num_heads, over=over, neuron=neuron)
        self.q, self.k = ConvNorm(dim, dim), ConvNorm(dim, dim)
        self.q_neuron, self.k_neuron = (make_neuron(neuron, channels=dim) for _ in range(2))
        self.proj, self.proj_neuron = ConvNorm(dim, dim, bias=True), make_neuron(neuron, channels=dim)

    def forward(self, x: Tensor) -> Tensor:
        check_sequence(x, self.dim, "QKAttention")
        masked = project_and_mix((self.q, self.k), (self.q_neuron, self.k_neuron), self.mixer, x)
        return project_and_fire(self.proj, self.proj_neuron, masked)


class AcrossImages(nn.Module, Streamed):
    """A neuron that treats the images of a batch as further time steps, as one neuron of the released QKFormer does.

    Its membrane passes from image b to image b + 1 of the same step, and from the last image of a step to the first of
    the next. The model's answers then depend on the other images of the batch and on their order; with a single image
    it behaves like `neuron` itself.

    Shapes: `[T, B, ...] -> [T, B, ...]`.
    """

    emits = property(of_neuron)

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, membrane: Tensor) -> Tensor:
        if self.carrier is not None:
            raise TypeError("a neuron that goes from image to image has no state for a stream; use mixes_images=False")
        rows = membrane.flatten(0, 1).unsqueeze(1)
        return fire(self.neuron, rows).squeeze(1).unflatten(0, membrane.shape[:2])
