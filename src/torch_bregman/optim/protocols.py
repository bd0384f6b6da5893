"""What `Multilevel` and `TargetDensity` promise each other and the optimizer that both work on."""

from __future__ import annotations

from typing import Any, Protocol


class Levels(Protocol):
    """Exchanges weights by their live parts and back: `tb.Multilevel`."""

    @property
    def restricted(self) -> bool:
        """Whether the optimizer holds the live parts."""

    @property
    def sparse(self) -> bool:
        """Whether a layer computes with its live weights alone, now or in the step to come."""

    def leave(self) -> None:
        """Let the optimizer hold the weights themselves."""

    def control_counted(self) -> None:
        """A control has counted a step, which the next phase may have waited for."""


class Control(Protocol):
    """Moves λ: `tb.TargetDensity`."""

    total_steps: int | None
    #: Has it counted a step since `Levels` last did? They take turns: controls first, whoever is called first.
    counted: bool

    @property
    def moves(self) -> list[int]:
        """The numbers of the parameter groups whose λ it moves."""

    def leave_place(self, groups: list[dict[str, Any]]) -> None:
        """Write its place in the schedule into the groups of a `state_dict()`."""

    def take_place(self) -> None:
        """Go on from the place that a loaded state left in the groups of the optimizer."""

    def catch_up(self) -> None:
        """Move λ now if it should have been moved while only the live parts were there."""
