"""Training that alternates between the full network and its live part: the cycle, and what it needs.

| file | idea |
|---|---|
| `cycle` | the phases, their counts, the state that is saved |
| `supports` | which weights can be restricted, and to what |
| `exchange` | the optimizer holds live parts in place of weights |
| `live`, `restricted`, `gradient` | a weight and its live part: its values and gradient, shown when somebody looks |
| `off_support` | how v moves further in the fine steps |
| `contest`, `choice`, `limits`, `report` | what computes how, decided by timing, and what cannot |
| `hooks` | hooks of the user: heeded where they change gradients, silent where a pass is only timed |
| `modules`, `watch`, `layers`, `sequential`, `network_watch` | standing between modules and their calls |
| `forms`, `linear`, `conv`, `twice` | layers that compute with live entries alone, and gradients of their gradients |
| `compact` | the smaller dense network where whole units are dead |
| `averages` | the ranks of a DistributedDataParallel |
"""

from .cycle import Multilevel
from .report import Report

__all__ = ["Multilevel", "Report"]
