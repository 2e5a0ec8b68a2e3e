"""Numbers as texts for people."""

from __future__ import annotations

import math
from datetime import datetime


def percent(value: float | None) -> str:
    """Format a share.

    Example:
        >>> percent(0.985), percent(1.0), percent(None)
        ('98.5 %', '100 %', '')
    """
    return "" if value is None or not math.isfinite(value) else f"{value * 100:.3g} %"


def number(value: float | None) -> str:
    """Format a number.

    Example:
        >>> number(8.1234), number(1500000.0), number(0.00012345), number(math.nan)
        ('8.12', '1,500,000', '0.000123', '')
    """
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def size(value: int | None) -> str:
    """Format a number of bytes.

    Example:
        >>> size(1500), size(61_000_000_000), size(None)
        ('1.5 kB', '61.0 GB', '')
    """
    if not value:
        return ""
    scaled, unit = float(value), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007 - used after the loop
        if scaled < 999.95:
            break
        scaled /= 1000
    return f"{scaled:.0f} B" if unit == "B" else f"{scaled:,.1f} {unit}"


def time_span(seconds: float | None) -> str:
    """Format a duration.

    Example:
        >>> time_span(4.21), time_span(42.0), time_span(750.0), time_span(7500.0), time_span(None)
        ('4.2 s', '42 s', '12 min 30 s', '2 h 5 min', '')
    """
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours:,} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def moment(time: datetime) -> str:
    """Format a point in time.

    Example:
        >>> from datetime import UTC
        >>> moment(datetime(2026, 3, 1, 9, 5, tzinfo=UTC))
        '2026-03-01 09:05 UTC'
    """
    return time.strftime("%Y-%m-%d %H:%M %Z")
