"""The kernels that the training ops need: modules `training.py` and `levels.py`, each in `cpu` and in `triton`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from .spec import Affine, Arriving, Layout, LevelSpec, Masks, NeuronSpec, Norm, Spikes


class Kernels(Protocol):
    """The kernels for the tensors of one device: the functions of a module.

    Here `NeuronSpec` has numbers only; an `inv_tau` argument, a 0-d tensor or `[channels]`, replaces its value.
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
        """Spikes `[steps, ...]` for the normalized input x, and the last membrane.

        Fills bits (see `Layout.empty_bits`), if given, with the result of `pack_bits` for the spikes.
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
        """Gradients of the neurons' input (like x) and of the first membrane, and sums `[1, 3, n, channels]`.

        The sums are over all neurons of a channel and all steps, in n parts, of the gradient of the input times three
        factors: the one in the gradient of `inv_tau`, if given; and, if there is a norm, 1 and `x - mean`.
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

        `sums` are the sums over tokens, followed by the spikes of their neurons. All other tensors are dense
        `[T, B, C, ...]` with B outermost in a frame. `neurons` are those of q, k and v, which are equal, and of the
        sum; inv_tau `[4, C]`. `codes`, if given, is filled with the spikes of q, k and v as bits 0, 1 and 2.
        """
        ...

    def mask_gradient(self, grad: Tensor, codes: Tensor, result: Tensor, layout: Layout) -> None:
        """Fills result `[T, B, C]` with `(grad * q).sum(tokens)`; codes are those of `attend`, grad has their order."""
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
        """Gradients of the neurons' inputs of q, k and v, and sums `[3, 3, n, channels]` as in `lif_backward`."""
        ...

    def channel_statistics(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of every channel `[channels]`, in float64."""
        ...

    @property
    def batch_statistics(
        self,
    ) -> Callable[[Sequence[Tensor], Layout, Sequence[Norm], int, Tensor, Tensor], None] | None:
        """Fills mean and inv_std from x, layout, norms and repeats, updates running statistics and counts.

        The same as `norm_lif.statistics`, for a momentum that is a number; `None` on devices where a launch costs too
        little for one kernel to save time. x are one input or three with the same memory layout, whose norms differ in
        their tensors only; mean and inv_std are `[channels]` or `[3, channels]`.
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
        """Turns the gradient of the normalized x into that of x, in place; fills those of weight and bias, like mean.

        x are one input or three with the same memory layout; `sums` are those of `lif_backward`; `count` is the number
        of values of a channel that mean and deviation are computed from, `None` if these do not depend on x.
        """
        ...

    def max_pool(self, x: Tensor, out: Tensor, places: Tensor | None, bits: Tensor | None = None) -> None:
        """Fills out with the 3x3 maxima of stride 2 of x `[N, C, H, W]`, and places with their places in the windows.

        All are contiguous, or all are channels-last. `bits`, if given, gets the result of `pack_bits` for out; the
        number of its channels (if contiguous, of its columns) is then a multiple of 8.
        """
        ...

    def max_pool_backward(self, grad: Tensor, places: Tensor, grad_x: Tensor) -> None:
        """Fills grad_x from the gradient of the maxima; all are contiguous, or all are channels-last."""
        ...

    @property
    def depthwise_weights(self) -> Callable[[Tensor, Tensor, Tensor], None] | None:
        """Fills weights `[C, 1, K, K]` with their gradient in a depthwise convolution of stride 1 and padding K / 2.

        The others are its input x and the gradient of its result, channels-last `[N, C, H, W]`; weights are contiguous,
        in the state's dtype, and K is one of `convolution.DEPTHWISE`. `None` on devices where PyTorch does this.
        """
        ...

    @property
    def writes_bits(self) -> bool:
        """Whether writing bits along with the spikes costs less than `pack_bits`; used by `bits.wants_bits`."""
        ...

    def pack_bits(self, x: Tensor) -> Tensor | None:
        """One bit for each element of x in memory order, `[ceil(n / 8)]`.

        x must hold only 0 and 1: otherwise the result is `None`, except on a GPU, where this is not checked.
        """
        ...

    def unpack_bits(self, bits: Tensor, x: Tensor) -> None:
        """Fills x with the elements that `pack_bits` has packed."""
        ...


class LevelKernels(Protocol):
    """The kernels of integer neurons for the tensors of one device: the functions of a module."""

    def levels(self, x: Tensor, neuron: LevelSpec, values: Tensor, inside: Tensor | None) -> None:
        """Fills values from x, and inside with where the gradient passes, one bit per element, `[ceil(n / 8)]`.

        x and values have the same memory layout, without gaps.
        """
        ...

    def levels_backward(self, grad: Tensor, inside: Tensor, neuron: LevelSpec, grad_x: Tensor) -> None:
        """Fills grad_x from the gradient of the values; both have the memory layout of x."""
        ...

    def norm_levels(self, x: Tensor, layout: Layout, neuron: LevelSpec, norm: Affine, values: Tensor) -> None:
        """Fills values with those of the normalized x."""
        ...

    def norm_levels_backward(
        self, grad: Tensor, x: Tensor, layout: Layout, neuron: LevelSpec, norm: Affine, grad_x: Tensor
    ) -> Tensor:
        """Fills grad_x with the gradient of the normalized x, and returns the sums that `norm_gradients` takes."""
        ...
