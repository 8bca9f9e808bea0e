"""What the training ops ask of a runtime: modules of kernels, `training.py` and `levels.py`, in `cpu` and `triton`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from .spec import Affine, Arriving, Layout, LevelSpec, Masks, NeuronSpec, Norm, Spikes


class Kernels(Protocol):
    """The kernels for the tensors of one device; a module's functions.

    `NeuronSpec` has numbers alone here; an `inv_tau` that is given stands in its place, a 0-d tensor or `[channels]`.
    """

    def lif_forward(
        self,
        x: Tensor,
        layout: Layout,
        neuron: NeuronSpec,
        norm: Affine | None,
        inv_tau: Tensor | None,
        membrane: Tensor | None,
        *,
        keep_membrane: bool = False,
        bits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Spikes `[steps, ...]` for the input x, normalized, and the last membrane.

        Fills bits (see `Layout.empty_bits`), if given, with what `pack_bits` makes of the spikes.
        """
        ...

    def lif_backward(
        self,
        arriving: Arriving,
        x: Tensor,
        layout: Layout,
        neuron: NeuronSpec,
        norm: Affine | None,
        inv_tau: Tensor | None,
        membrane: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of the neurons' input (like x), of the first membrane, and sums `[1, 3, n, channels]`.

        These are over all neurons of a channel and all steps, in n parts, of the gradient of the input times: what
        multiplies it in the gradient of `inv_tau`, if one is given; and where there is a norm, 1 and `x - mean`.
        """
        ...

    def attend(
        self,
        x: Sequence[Tensor],
        out: Spikes,
        codes: Tensor | None,
        sums: Tensor,
        layout: Layout,
        neurons: Sequence[NeuronSpec],
        norm: Affine,
        inv_tau: Tensor | None,
    ) -> None:
        """Fills out with the masked spikes of q, for the inputs x of q, k and v; and sums, `[2, T, B, C]`.

        These are the sums over tokens, and then what their neurons fired. All else is dense `[T, B, C, ...]`, B
        outermost in a frame. `neurons` are those of q, k and v, alike, and of the sum; inv_tau `[4, C]`. `codes`, if
        given, gets what fired: q, k and v as bits 0, 1 and 2.
        """
        ...

    def mask_gradient(self, grad: Tensor, codes: Tensor, result: Tensor, layout: Layout) -> None:
        """Fills result `[T, B, C]` with `(grad * q).sum(tokens)`, for the codes of `attend` and grad in their order."""
        ...

    def attend_backward(
        self,
        grad: Tensor,
        masks: Masks,
        x: Sequence[Tensor],
        layout: Layout,
        neurons: Sequence[NeuronSpec],
        norm: Affine,
        inv_tau: Tensor | None,
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Gradients of the neurons' inputs of q, k and v, and sums `[3, 3, n, channels]` as `lif_backward` has them."""
        ...

    def channel_statistics(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of every channel `[channels]`, in float64."""
        ...

    @property
    def batch_statistics(
        self,
    ) -> Callable[[Sequence[Tensor], Layout, Sequence[Norm], int, Tensor, Tensor], None] | None:
        """Fills mean and inv_std from x, layout, norms, repeats, updates running statistics and counts.

        That is what `norm_lif.statistics` does, for a momentum that is a number; `None` where launches cost nothing
        that one kernel would save. x are one input or three that lie alike, with norms that differ in their tensors
        alone, and mean and inv_std `[channels]` or `[3, channels]`.
        """
        ...

    def norm_gradients(
        self,
        grad: Sequence[Tensor],
        x: Sequence[Tensor],
        layout: Layout,
        norm: Affine,
        sums: Tensor,
        count: int | None,
        of_weight: Tensor,
        of_bias: Tensor,
    ) -> None:
        """From the gradient of the normalized x, in place, to that of x; fills those of weight and bias, like the mean.

        x are one input or three that lie alike; `sums` are those of `lif_backward`; `count` is the number of values of
        a channel where mean and deviation are theirs, `None` where these do not depend on x.
        """
        ...

    def max_pool(self, x: Tensor, out: Tensor, places: Tensor | None, bits: Tensor | None = None) -> None:
        """Fills out with the 3x3 maxima of stride 2 of x `[N, C, H, W]`, and places with where in its window each lies.

        All are contiguous, or all are channels-last. Bits, if given, gets what `pack_bits` makes of out, whose channels
        or, contiguous, whose columns are a multiple of 8.
        """
        ...

    def max_pool_backward(self, grad: Tensor, places: Tensor, grad_x: Tensor) -> None:
        """Fills grad_x from the gradient of the maxima; all are contiguous, or all are channels-last."""
        ...

    @property
    def writes_bits(self) -> bool:
        """Whether bits cost less where spikes are made than by `pack_bits`: what `bits.wants_bits` goes by."""
        ...

    def pack_bits(self, x: Tensor) -> Tensor | None:
        """One bit for each element of x in the order of memory, `[ceil(n / 8)]`.

        x must be all 0 and 1: `None` tells where it is not, but on a GPU, where that is not checked.
        """
        ...

    def unpack_bits(self, bits: Tensor, x: Tensor) -> None:
        """Fills x with the elements that `pack_bits` packed."""
        ...


class LevelKernels(Protocol):
    """The kernels of integer neurons for the tensors of one device; a module's functions."""

    def levels(self, x: Tensor, neuron: LevelSpec, values: Tensor, inside: Tensor | None) -> None:
        """Fills values from x, and inside with where the gradient passes, one bit an element, `[ceil(n / 8)]`.

        x and values lie alike, without gaps.
        """
        ...

    def levels_backward(self, grad: Tensor, inside: Tensor, neuron: LevelSpec, grad_x: Tensor) -> None:
        """Fills grad_x from the gradient of the values; both lie as x did."""
        ...

    def norm_levels(self, x: Tensor, layout: Layout, neuron: LevelSpec, norm: Affine, values: Tensor) -> None:
        """Fills the values of the normalized x."""
        ...

    def norm_levels_backward(
        self, grad: Tensor, x: Tensor, layout: Layout, neuron: LevelSpec, norm: Affine, grad_x: Tensor
    ) -> Tensor:
        """Fills the gradient of the normalized x, and gives the sums that `norm_gradients` takes."""
        ...
