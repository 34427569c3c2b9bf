"""Numbers and lists -> the words in which people read them: 39,385,344, 31.7%, 3.21 × 10⁻⁷, 2 steps."""

import math
from collections.abc import Sequence

MINUS = "\u2212"
SUPERSCRIPT = str.maketrans("-0123456789", "\u207b⁰¹²³⁴⁵⁶⁷⁸⁹")
UNKNOWN = "\u2013"


def count(value: float | None) -> str:
    """39385344 -> 39,385,344."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def counted(number: int, noun: str) -> str:
    """1 step, 2 steps, 1,234 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def significant(value: float | None, digits: int = 4) -> str:
    """0.119312 -> 0.1193, 12345.6 -> 12,346, 3.21e-07 -> 3.21 × 10⁻⁷; exactly 0 -> 0."""
    if value is None or not math.isfinite(value):
        return UNKNOWN if value is None else str(value)
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if exponent < -4:
        return f"{value / 10.0**exponent:.{digits - 1}f} × 10{str(exponent).translate(SUPERSCRIPT)}".replace("-", MINUS)
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", MINUS)


def percent(share: float | None, digits: int = 2) -> str:
    """0.3165 -> 31.7%, 0.0123 -> 1.2%, 0.00031 -> 0.031%, 2e-9 -> 2.0 × 10⁻⁷%; exactly 0 -> 0%."""
    if share is None:
        return UNKNOWN
    if share == 1:
        return "100%"
    text = f"{100 * share:,.1f}".replace("-", MINUS) if abs(share) >= 0.0995 else significant(100 * share, digits)
    return f"{text}%"


def megabytes(size: float, decimals: int = 0) -> str:
    """Bytes of memory or of files -> MB, which are 2^20 bytes wherever this package writes them: 785 MB."""
    return f"{size / 2**20:,.{decimals}f} MB"


def gigabytes(size: float, decimals: int = 1) -> str:
    """Bytes -> GB of 2^30 bytes: 9.4 GB."""
    return f"{size / 2**30:,.{decimals}f} GB"


def change(value: float, decimals: int = 3) -> str:
    """A difference with its sign: -0.5 -> −0.500, 0.5 -> +0.500, 0 -> 0.000."""
    text = f"{value:+,.{decimals}f}".replace("-", MINUS)
    return text[1:] if float(f"{value:.{decimals}f}") == 0 else text


def joined(words: Sequence[str], limit: int = 72) -> str:
    """Words with commas; where they take more than `limit` characters, the rest is counted."""
    shown = list(words)
    while len(shown) > 1 and len(", ".join(shown)) > limit:
        shown.pop()
    text = ", ".join(shown)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text if len(shown) == len(words) else f"{text} and {len(words) - len(shown)} more"
