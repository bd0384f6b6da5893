"""Numbers as people read them. Pure functions, shared by the report and the live display."""

import math

__all__ = ["ON_TARGET", "clean", "duration", "near", "number", "percent", "points", "short"]

ON_TARGET = 0.01  # a density is on target within ±1 % of the density that was asked for


def number(value: object) -> float | None:
    """`value` as a finite float, or None: the files may hold null, NaN, text, or nothing at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:  # JSON integers have no upper limit
        return None
    return result if math.isfinite(result) else None


def near(density: float | None, asked: float | None) -> bool:
    """Whether `density` is within `ON_TARGET`, relative, of `asked`. False where either is unknown."""
    return density is not None and asked is not None and abs(density - asked) <= ON_TARGET * asked * (1 + 1e-9)


def percent(fraction: float, digits: int = 2) -> str:
    """A fraction as "5.00 %"; below 1 % with three significant digits, "0.123 %", so that small densities differ."""
    value = 100 * fraction
    if 0 < abs(value) < 1:
        digits = min(8, max(digits, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, "−0.30 points"."""
    value = round(100 * difference, 2) + 0.0  # + 0.0: no "-0.00"
    sign = "±" if value == 0 else "+" if value > 0 else "−"
    return f"{sign}{abs(value):.2f} points"


def duration(seconds: float) -> str:
    """Seconds as "43.2 s", "12 min 05 s" or "2 h 13 min"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def short(value: float) -> str:
    """Four significant digits, as for λ and losses."""
    return f"{value:.4g}"


def clean(text: object, width: int = 60) -> str:
    """`text` on one line, without control characters (escape codes among them), cut to `width` characters."""
    line = "".join(c if c.isprintable() else " " for c in str(text)).strip()
    return line if len(line) <= width else line[: width - 1] + "…"
