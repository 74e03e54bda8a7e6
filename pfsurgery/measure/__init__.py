"""What a model costs: parameters, MACs, element operations, activations, latency, memory."""

from pfsurgery.measure.compare import Comparison, Measurement, compare, measure
from pfsurgery.measure.count import Count, count
from pfsurgery.measure.latency import Latency, Setting, latency
from pfsurgery.measure.memory import Memory, peak_memory
from pfsurgery.measure.structures import draw_structures, operation_shares

__all__ = [
    "Comparison",
    "Count",
    "Latency",
    "Measurement",
    "Memory",
    "Setting",
    "compare",
    "count",
    "draw_structures",
    "latency",
    "measure",
    "operation_shares",
    "peak_memory",
]
