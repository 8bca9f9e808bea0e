"""NeuroBench's metrics (Yik et al., 2025, https://arxiv.org/abs/2304.04640) for the kit's models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..evaluation import evaluating
from ..neuron import LIF, find_neurons, spikes_of
from .probe import unwrap
from .record import trajectory


def neurobench_model(model: nn.Module) -> Any:
    """The model as NeuroBench's `Benchmark` takes it. Needs `pip install neurobench`.

    NeuroBench's own wrapper for snnTorch expects one step per call and keeps only the first step of a neuron that takes
    a whole sequence; here every neuron layer reports all its steps, spikes and membranes, under its full name.

    Of its metrics, Footprint, ParameterCount, ConnectionSparsity, ActivationSparsity and MembraneUpdates mean what
    their names say. SynapticOperations counts what reaches a weight: for 1x1 convolutions and linear layers that is
    `synaptic_operations` of `energy`; for 3x3 convolutions it excludes the padding, which the paper's formula includes.
    A first layer that is computed once for a still image is counted once. The sums of k * v are not counted.

    Raises `ImportError` if NeuroBench is not installed.

    >>> benchmark = Benchmark(neurobench_model(model), loader, [], [lambda logits: logits.argmax(-1)],
    ...     [[Footprint, ConnectionSparsity], [ActivationSparsity, SynapticOperations]])  # doctest: +SKIP
    >>> benchmark.run()  # doctest: +SKIP
    """
    try:
        from neurobench.hooks.layer import LayerHook
        from neurobench.hooks.neuron import NeuronHook
        from neurobench.models import TorchModel
    except ImportError as error:
        raise ImportError(f"NeuroBench is not installed ({error}); pip install neurobench") from error

    class SequenceHook(NeuronHook):  # type: ignore[misc]
        """All steps of one call of a neuron: spikes, and the membranes before and after each step."""

        def pre_hook_fn(self, layer: nn.Module, inputs: Any) -> None:
            self.activation_inputs.append(inputs)

        def hook_fn(self, layer: nn.Module, inputs: Any, output: Any) -> None:
            self.activation_outputs.append(spikes_of(output))
            if isinstance(layer, LIF):
                after, _ = trajectory(layer, inputs[0])
                self.post_fire_mem_potential += after.unbind()
                self.pre_fire_mem_potential += [torch.zeros_like(after[0]), *after[:-1].unbind()]

    class Adapter(TorchModel):  # type: ignore[misc]
        """A NeuroBench model whose activation layers are the neuron layers."""

        def __call__(self, batch: Any) -> Any:
            with torch.no_grad(), evaluating(self.net):
                return self.net(batch)

        def activation_layers(self) -> list[dict[str, Any]]:
            return [{"layer_name": name, "layer": layer} for name, layer in find_neurons(self.net).items()]

        def register_hooks(self) -> None:
            self.activation_hooks = [SequenceHook(x["layer"], x["layer_name"]) for x in self.activation_layers()]
            self.connection_hooks = [LayerHook(layer) for layer in self.connection_layers()]

    return Adapter(unwrap(model))
