"""See inside a model: firing rates, energy, what multiplies and what only adds, attention maps, membranes."""

from .attention_maps import attention_maps, overlay, upsample
from .audit import Audit, NotSpikeDrivenError, audit
from .dataflow import Product
from .energy import E_AC, E_MAC, AttentionEnergy, EnergyReport, LayerEnergy, energy, energy_from_rates
from .energy_models import ENERGY_MODELS, Cost, EnergyModel, Estimate, RowEstimate, read_energy_models
from .rates import FiringRates, LayerRates, firing_rates
from .record import Recording, record
from .report import analyze_model

__all__ = [
    "ENERGY_MODELS",
    "E_AC",
    "E_MAC",
    "AttentionEnergy",
    "Audit",
    "Cost",
    "EnergyModel",
    "EnergyReport",
    "Estimate",
    "FiringRates",
    "LayerEnergy",
    "LayerRates",
    "NotSpikeDrivenError",
    "Product",
    "Recording",
    "RowEstimate",
    "analyze_model",
    "attention_maps",
    "audit",
    "energy",
    "energy_from_rates",
    "firing_rates",
    "overlay",
    "read_energy_models",
    "record",
    "upsample",
]
