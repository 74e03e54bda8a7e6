"""What a model costs: parameters, MACs, element operations, activations, latency, memory."""

from pfsurgery.measure.compare import Comparison, Measurement, compare, measure
from pfsurgery.measure.count import Count, count
from pfsurgery.measure.latency import Latency, Setting, latency
from pfsurgery.measure.memory import Memory, peak_memory

__all__ = [
    "Comparison",
    "Count",
    "Latency",
    "Measurement",
    "Memory",
    "Setting",
    "compare",
    "count",
    "latency",
    "measure",
    "peak_memory",
]
