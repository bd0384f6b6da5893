"""How many steps a loop has done, seen by something that it calls after each of them."""

from __future__ import annotations

from .regularized import RegularizedOptimizer


class StepCount:
    """The steps that an optimizer took between the calls of `count`, which need not be one each.

    A call that finds none is one of a loop that a `GradScaler` made skip a step, and that counts it too; but where more
    calls than not find none, gradients are accumulated, and such a call is no step.
    """

    def __init__(self, optimizer: RegularizedOptimizer) -> None:
        self.optimizer = optimizer
        self.taken = self.skipped = 0
        self._seen = optimizer.steps_taken
        self._first = True  # the first call may be for a step that was taken before this was made
        self._before = 0

    def count(self) -> int:
        """The number of steps since the last call."""
        found = self.uncounted or int(self._first and self.optimizer.steps_taken > 0)
        self._first, self._seen, self._before = False, self.optimizer.steps_taken, self.now
        self.taken += found
        self.skipped += not found
        return found

    @property
    def now(self) -> int:
        """Steps so far."""
        return self.taken + (self.skipped if self.skipped < self.taken else 0)

    @property
    def uncounted(self) -> int:
        """Steps that no call of `count` has seen yet."""
        return self.optimizer.steps_taken - self._seen

    def completes(self, period: int) -> bool:
        """Whether the last call completed another `period` steps."""
        return self.now // period > self._before // period

    def load(self, taken: int, skipped: int = 0, uncounted: int = 0) -> None:
        """Go on where these numbers were saved."""
        self.taken, self.skipped, self._first = taken, skipped, False
        self._seen = self.optimizer.steps_taken - uncounted
