"""Networks of the kit's neurons for other simulators and chips, as graphs of NIR (Pedersen et al., 2024)."""

from __future__ import annotations

from typing import Any

import torch
from snntorch._neurons.neurons import SpikingNeuron
from torch import Tensor, nn

from .lif import LIF
from .stepping import OverTime, spikes_of

DT = 1e-4
"""Seconds of a time step, as snnTorch's own export has it."""

LEADING = 2
"""Axes of time and batch, which a graph does not have."""


@torch.no_grad()
def export_to_nir(model: nn.Module, x: Tensor) -> Any:
    """The NIR graph (`nir.NIRGraph`, https://doi.org/10.1038/s41467-024-52259-9) of a network of modules.

    Layers are what snnTorch's exporter knows (linear ones and flattening, of those that take `[T, B, ...]`) and the
    kit's neurons: a `nir.LIF` with the layer's tau in steps of 0.1 ms, resistance 1 and reset to 0. snnTorch's own
    `export_to_nir` does not know that `LIF` scales its input, and stops at one. NIR's neuron fires above its threshold,
    as with `strict=True`; a membrane at it exactly is the simulator's to judge. x is `[T, B, ...]`.

    Raises `ValueError` for another reset than "zero", `TypeError` for layers that NIR does not have, such as attention,
    and `ImportError` without the packages nir and nirtorch.

    >>> net = nn.Sequential(nn.Linear(8, 5), LIF(tau=2.0), nn.Linear(5, 3))  # doctest: +SKIP
    >>> export_to_nir(net, torch.rand(4, 1, 8)).nodes["1"].r  # doctest: +SKIP
    array([1., 1., 1., 1., 1.], dtype=float32)
    """
    try:
        import nir
        import nirtorch
        from snntorch.export_nir import _extract_snntorch_module
    except ImportError as error:
        raise ImportError(
            f"the export needs the packages nir and nirtorch (pip install 'sdt_blocks[export]'): {error}"
        ) from None
    mixers = [
        name for name, module in model.named_modules() if hasattr(module, "emits") and hasattr(module, "additions")
    ]
    if mixers:
        raise TypeError(
            f"NIR has no attention, nor any other product of spikes with spikes, and the network has {len(mixers)} "
            f"({mixers[0]} for one); ONNX and torch.export hold it"
        )
    shapes = _shapes(model, x)

    def node(module: nn.Module) -> Any:
        if isinstance(module, OverTime | SpikingNeuron) and not isinstance(module, LIF):
            raise TypeError(f"{type(module).__name__} has no form here; networks of snnTorch alone have its own export")
        if isinstance(module, nn.Flatten) and module.start_dim >= LEADING:
            end = module.end_dim - LEADING if module.end_dim > 0 else module.end_dim
            return nir.Flatten(input_type=None, start_dim=module.start_dim - LEADING, end_dim=end)
        if not isinstance(module, LIF):
            made = _extract_snntorch_module(module)
            if made is None:
                raise TypeError(f"NIR has no {type(module).__name__}; norms fold into the layer before them")
            return made
        if module.reset_mechanism != "zero":
            raise ValueError(f"a neuron of NIR is reset to zero, got one with reset={module.reset_mechanism!r}")
        like = torch.ones(shapes[module], dtype=torch.float32)
        leak = torch.as_tensor(module.inv_tau, dtype=torch.float32)
        per_channel = leak.view(-1, *(1,) * (like.ndim - 1)) if leak.ndim else leak
        zero = (0 * like).numpy()
        threshold = (module.threshold * like).numpy()
        return nir.LIF(
            tau=(DT / per_channel * like).numpy(), r=like.numpy(), v_leak=zero, v_threshold=threshold, v_reset=zero
        )

    graph = nirtorch.extract_nir_graph(
        model, node, x, model_name=type(model).__name__, ignore_dims=list(range(LEADING))
    )
    graph.infer_types()
    return graph


def _shapes(model: nn.Module, x: Tensor) -> dict[nn.Module, torch.Size]:
    """The shape of one sample and step of each of the kit's neurons."""
    shapes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        shapes[module] = spikes_of(output).shape[LEADING:]

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, LIF)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
