"""The proof sheet: a sparse network beside its dense twin, in accuracy, size and speed, all measured in one run."""

from .figures import Fact, Latency, Units
from .measure import prove
from .sheet import Proof
from .words import Line

__all__ = ["Fact", "Latency", "Line", "Proof", "Units", "prove"]
