"""Networks rebuilt for evaluation: a plan of any network, and a dense or an event-driven form of it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.dispatch import by_triton
from .bytes import ByteProduct, Bytes
from .choice import choose
from .dense import Dense
from .early import Early, EarlyAnswers
from .events import Events
from .forms import EventProduct
from .graphs import Graphed
from .integers import FLOAT32, INT8, INT24, IntegerProduct
from .nir import export_to_nir, simulate_nir
from .plan import Form, Plan
from .product import PATHS, Product
from .trace import plan

__all__ = [
    "PATHS",
    "ByteProduct",
    "Bytes",
    "Dense",
    "Early",
    "EarlyAnswers",
    "EventProduct",
    "Events",
    "Graphed",
    "IntegerProduct",
    "Plan",
    "Product",
    "export_to_nir",
    "optimize_for_inference",
    "plan",
    "simulate_nir",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8)


def optimize_for_inference(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    compile: bool = True,
    *,
    sparse: bool | str = False,
    calibrate: Tensor | Iterable[Any] | None = None,
    paths: str = "auto",
    exact: bool = False,
    cuda_graph: bool = False,
) -> nn.Module:
    """A new, faster module with the answers of `model.eval()`; the model itself stays unchanged.

    It takes any network: one of the kit's, blocks mixed with your own modules, plain PyTorch layers. The forward is
    traced once at the level of `sdt_blocks.steps` (see `plan`); parts that cannot be traced are kept as they are, and
    one warning names them. Norms are folded into the convolutions, q, k and v become one product, the first layer of a
    still image is computed once, and every product is computed in the way that is fastest on this machine (see
    `Product`; measured when a shape first comes). With `compile`, neurons are fused with an adjacent pooling, mask or
    shortcut: on a CPU in C++ kernels that are built once, in a few seconds, on a CUDA device in Triton kernels,
    elsewhere by `torch.compile`. Without a compiler one warning says so.

    Products are computed in `dtype`, whatever the model's own is. The membranes of neurons and shortcuts, and the
    output, are float32 even for bfloat16; autocast around a call changes nothing. A spike can differ where a membrane
    lies within rounding of its threshold, as it can between the convolutions of two libraries. `paths` fixes the way in
    which products are computed ("convolution", "linear", "integers", "digits"; a product that cannot is a convolution),
    so that two processes round alike.

    With `sparse=True`, on a CPU and in float32, products add the weights of active inputs instead, and spikes are one
    bit each (see `Events`). `sparse="auto"` returns the faster of the two on the batches of `calibrate` (a tensor, or a
    data loader), which should have the size that is evaluated later; the `calibration` of the result lists each layer's
    firing rate and choice.

    With `torch.int8`, weights that are multiplied by spikes and levels have 8 bits, symmetric, with one scale for each
    output channel: a quarter of the size, also in `state_dict()`. Spikes are whole numbers, so nothing else is rounded:
    sums are exact, and the same for every value of `sparse`. Layers on real values stay in float32 (the first
    convolution, depthwise ones, the head). On a CUDA device with Triton (see `Bytes`; not measured on a GPU yet) spikes
    are a byte each, and products multiply bytes on the tensor cores and fire: weights and sums have the CPU's bits, and
    answers agree up to the rounding of what follows. Leave `sparse` out there.

    `exact=True`, on a CPU, gives the same bits for every batch, number of threads and value of `sparse`, since the
    order of sums is fixed: weights of spikes are whole numbers of 24 bits (8 with `torch.int8`), summed without
    rounding; layers on real values are summed term by term in one order. Other layers are refused.

    With `cuda_graph`, on a CUDA device, all launches of a call become one (see `Graphed`), which helps at small
    batches, where a GPU waits for Python.

    Raises `TypeError` if the model is not a module, and `ValueError` for a dtype that is not float32, bfloat16, float64
    or int8, an unknown path, or options that do not fit each other or the model.

    >>> fast = optimize_for_inference(create_model("sdt_2_256"), compile=False)
    >>> fast(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    _check_options(dtype, sparse, paths, exact)
    if sparse != "auto" and calibrate is not None:
        raise ValueError(f'calibrate is what sparse="auto" measures on; leave it out for sparse={sparse}')
    if cuda_graph:
        _check_graph(model, sparse, exact)
    weights = INT8 if dtype == torch.int8 else INT24 if exact else FLOAT32
    make = partial(_events, model, weights, exact)
    form: Form
    if sparse is True:
        form = make()
    elif dtype == torch.int8 and not exact and _on_triton(model):
        with torch.no_grad():
            form = Bytes(plan(model))
    elif weights != FLOAT32:
        # The event-driven form, with its sums computed densely.
        form = make(events=False)
    else:
        with torch.no_grad():
            form = Dense(plan(model), dtype, compile, paths)
    form.tell_unfolded()
    if cuda_graph:
        return Graphed(form)
    return choose(make, form, () if calibrate is None else calibrate) if sparse == "auto" else form


def _on_triton(model: nn.Module) -> bool:
    """Whether Triton's kernels compute on the model's device."""
    held = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return held is not None and by_triton(torch.empty(0, device=held.device))


def _events(model: nn.Module, weights: str, exact: bool, events: bool = True) -> Events:
    form = Events(plan(model), weights, exact)
    for _, product in form.products():
        product.break_even = float(events)
    return form


def _check_options(dtype: torch.dtype, sparse: bool | str, paths: str, exact: bool) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16, torch.float64 or torch.int8, got {dtype}")
    if (isinstance(sparse, str) and sparse != "auto") or not isinstance(sparse, bool | str):
        raise ValueError(f'sparse must be True, False or "auto", got {sparse!r}')
    if paths not in ("auto", *PATHS):
        raise ValueError(f"paths must be auto, {', '.join(PATHS)}, got {paths!r}")
    if sparse is True and dtype not in (torch.float32, torch.int8):
        raise ValueError(f"event-driven inference computes in float32 or int8; leave sparse out for {dtype}")
    if exact and dtype not in (torch.float32, torch.int8):
        raise ValueError(f"exact=True computes in whole numbers and float32; leave it or {dtype} out")
    if paths != "auto" and (exact or dtype == torch.int8):
        raise ValueError(f"paths={paths!r} pins how products of floating point are computed; leave it out here")


def _check_graph(model: nn.Module, sparse: bool | str, exact: bool) -> None:
    if sparse or exact:
        raise ValueError("cuda_graph=True is for dense products; leave sparse and exact out")
    devices = {str(p.device) for p in model.parameters()} if isinstance(model, nn.Module) else {"cuda"}
    if any(not device.startswith("cuda") for device in devices):
        raise ValueError(
            f"cuda_graph=True needs the model on a CUDA device, it is on {', '.join(sorted(devices))}; call "
            'model.to("cuda"), or leave it out'
        )
