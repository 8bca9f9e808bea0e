"""Networks rebuilt for evaluation: one plan of any network, and a dense or an event-driven form of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .choice import choose
from .dense import Dense
from .events import EventProduct, Events
from .plan import Plan
from .product import PATHS, Product
from .trace import plan

__all__ = ["PATHS", "Dense", "EventProduct", "Events", "Plan", "Product", "optimize_for_inference", "plan"]

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def optimize_for_inference(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    compile: bool = True,
    *,
    sparse: bool | str = False,
    calibrate: Iterable[Any] = (),
    paths: str = "auto",
) -> nn.Module:
    """A new module that answers as `model.eval()` does, faster; the model itself stays untouched.

    Any network goes in: one of the kit's, blocks mixed with modules of one's own, plain PyTorch layers. Its forward is
    traced once at the altitude of `sdt_blocks.steps` (see `plan`); what cannot be traced is kept as it is and named by
    one warning. Norms are folded into the convolutions, q, k and v are one, a still image's first layer is computed
    once, and every product takes the way that is fastest on this machine (see `Product`; measured when a shape comes
    first). With `compile`, neurons run fused with the pooling, mask or shortcut beside them: on a CPU in C++ kernels
    that are built once, in a few seconds, elsewhere through `torch.compile`. Without a compiler one warning says so.

    The membranes of neurons and shortcuts are float32 also for bfloat16, and so is the output. A spike can differ where
    a membrane lies within rounding of its threshold, as it can between two libraries' convolutions. `paths` pins the
    way of all products that know it ("convolution", "linear", "integers"; others are convolutions), so that two
    processes round alike.

    With `sparse=True`, on a CPU and in float32, products add the weights of active inputs instead, and spikes are one
    bit each (see `Events`). `sparse="auto"` returns the faster of the two on the batches of `calibrate` (tensors, or
    what a data loader gives), which should be of the size that is evaluated later; its `calibration` lists each layer's
    firing rate and choice.

    Raises `TypeError` for what is no module, and `ValueError` for a dtype that is not float32, bfloat16 or float64, an
    unknown way, or where `sparse` does not fit the other arguments.

    >>> fast = optimize_for_inference(create_model("sdt_2_256"), compile=False)
    >>> fast(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float64, got {dtype}")
    if (isinstance(sparse, str) and sparse != "auto") or not isinstance(sparse, bool | str):
        raise ValueError(f'sparse must be True, False or "auto", got {sparse!r}')
    if paths not in ("auto", *PATHS):
        raise ValueError(f"paths must be auto, {', '.join(PATHS)}, got {paths!r}")
    if sparse is True:
        if dtype != torch.float32:
            raise ValueError(f"event-driven inference computes in float32; leave sparse out for {dtype}")
        return Events(plan(model))
    with torch.no_grad():
        dense = Dense(plan(model), dtype, compile, paths)
    return choose(model, dense, calibrate) if sparse else dense
