"""What one pass over memory is told about each tensor, by name: the same for the loops of CPUs and of GPUs.

After a change here touch step.py and gpu.py: Numba's file cache looks at a kernel's own file only.
"""

from __future__ import annotations

#: the number of entries, and the addresses of θ, its gradient, v and the two moments (int64)
ADDRESSES = ("SIZE", "THETA", "GRAD", "V", "FIRST", "SECOND")
SIZE, THETA, GRAD, V, FIRST, SECOND = range(len(ADDRESSES))
#: the numbers of a step (float64). θ = δ·(v − clamp(v, low, high)), with 0 as the last step wrote it
NUMBERS = (
    "LOW0", "HIGH0", "DELTA0", "LOW", "HIGH", "DELTA", "LR", "BETA1", "BETA2", "EPS", "ROOT", "PACE", "DECAY", "SIGN",
    "SHRINK",
)  # fmt: skip
LOW0, HIGH0, DELTA0, LOW, HIGH, DELTA, LR, BETA1, BETA2, EPS, ROOT, PACE, DECAY, SIGN, SHRINK = range(len(NUMBERS))
#: what moves v. HOLD leaves it, so that only θ is written
RULES = ("HOLD", "PLAIN", "PAPER", "SGD", "NESTEROV", "ADAM", "ADAMW")
HOLD, PLAIN, PAPER, SGD, NESTEROV, ADAM, ADAMW = range(len(RULES))
#: DUAL: v is moved and θ left to a prox that needs more than one entry. BOTH: θ is written as well. PRIMAL: there is no
#: v, θ moves and is thresholded (ProxSGD)
MODES = ("DUAL", "BOTH", "PRIMAL")
DUAL, BOTH, PRIMAL = range(len(MODES))
