"""Neurons that take a whole sequence, a wrapper for single-step neurons, and streams that carry their state."""

from .integer import IntegerNeuron
from .lif import LIF, NEURONS, NeuronFactory, NeuronLike, ParametricLIF, make_neuron, neuron_options, neuron_spec
from .replacing import InSteps, find_neurons, replace_neurons
from .stepping import OverTime, clear_hidden, fires, over_time, remembers, spikes_of, states_of, takes_sequence
from .stream import Stream, Streamed

__all__ = [
    "LIF",
    "NEURONS",
    "InSteps",
    "IntegerNeuron",
    "NeuronFactory",
    "NeuronLike",
    "OverTime",
    "ParametricLIF",
    "Stream",
    "Streamed",
    "clear_hidden",
    "find_neurons",
    "fires",
    "make_neuron",
    "neuron_options",
    "neuron_spec",
    "over_time",
    "remembers",
    "replace_neurons",
    "spikes_of",
    "states_of",
    "takes_sequence",
]
