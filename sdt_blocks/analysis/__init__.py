"""See inside a model: firing rates, energy, what multiplies and what only adds, attention maps, membranes."""

from .attention_maps import attention_maps, overlay, upsample
from .audit import Audit, NotSpikeDrivenError, audit
from .dataflow import Product
from .energy import E_AC, E_MAC, AttentionEnergy, EnergyReport, LayerEnergy, energy, energy_from_rates
from .rates import FiringRates, LayerRates, firing_rates
from .record import Recording, record
from .report import analyze_model

__all__ = [
    "E_AC",
    "E_MAC",
    "AttentionEnergy",
    "Audit",
    "EnergyReport",
    "FiringRates",
    "LayerEnergy",
    "LayerRates",
    "NotSpikeDrivenError",
    "Product",
    "Recording",
    "analyze_model",
    "attention_maps",
    "audit",
    "energy",
    "energy_from_rates",
    "firing_rates",
    "overlay",
    "record",
    "upsample",
]
