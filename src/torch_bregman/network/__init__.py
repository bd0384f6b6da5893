"""Reading a network: what its layers are (`kinds`), and which of their channels can go.

`Kind`, `WeightedSum` and `register` are for layers of one's own, see docs/layers.md.
"""

from .kinds import Exchange, Kept, Kind, WeightedSum, register

__all__ = ["Exchange", "Kept", "Kind", "WeightedSum", "register"]
