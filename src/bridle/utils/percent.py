"""Shares in percent, as targets and bounds are written."""

from decimal import ROUND_CEILING, Context, Decimal


def percent(share: float) -> str:
    """A given share, with all of its digits."""
    return f"{100 * share:.10g}%"


def percent_up(bound: float) -> str:
    """A bound, rounded up to four significant digits, so that it says no more than was shown."""
    return f"{Context(prec=4, rounding=ROUND_CEILING).create_decimal(100 * Decimal(repr(float(bound)))).normalize():f}%"


def percent_of(rate: float) -> str:
    """A measured rate: one digit after the point, and of a small one two significant digits."""
    return f"{rate:.1%}" if rate >= 0.01 or rate == 0 else f"{100 * rate:.2g}%"
