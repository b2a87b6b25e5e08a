"""Numbers as people read them, with no line break between a number and its unit."""

import re

from ml.report.result import IN_PERCENT

MINUS = "−"
NO_BREAK = "\u00a0"
COUNTED = 0.05  # a p-value below it is marked


def title(metric: str) -> str:
    """macro_f1 → macro F1; the names of metrics are this project's own."""
    return re.sub(r"\bf1\b", "F1", metric.replace("_", " "))


def value(metric: str, number: float) -> str:
    """99.21 % for a share, 0.0827 for others."""
    return f"{100 * number:.2f}{NO_BREAK}%" if metric in IN_PERCENT else f"{number:.4f}"


def amount(metric: str, number: float) -> str:
    """A difference without its sign: 0.21 pp (percentage points), or 0.0827."""
    return f"{abs(100 * number):.2f}{NO_BREAK}pp" if metric in IN_PERCENT else f"{abs(number):.4f}"


def change(metric: str, number: float, unit: bool = True) -> str:
    """A difference with its sign: +0.21 pp, −0.0827; what rounds to nothing has none."""
    text = amount(metric, number) if unit or metric not in IN_PERCENT else f"{abs(100 * number):.2f}"
    if not any(digit in text for digit in "123456789"):
        return text
    return f"{MINUS if number < 0 else '+'}{text}"


def interval(metric: str, low: float, high: float) -> str:
    """+0.12 to +0.30 pp"""
    return f"{change(metric, low, unit=False)} to {change(metric, high)}".replace(" ", NO_BREAK)


def p_value(number: float) -> str:
    """< 0.001, or 0.008"""
    return "< 0.001" if number < 0.001 else f"{number:.3f}"


def p_equals(number: float) -> str:
    """p < 0.001, or p = 0.008"""
    return f"p {p_value(number)}" if number < 0.001 else f"p = {p_value(number)}"


def duration(seconds: float) -> str:
    """0.06 s, 27.5 s, 3 min 20 s, 2 h 5 min"""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def tick(number: float, unit: str = "", sign: bool = False) -> str:
    """97.5 %, −4.5, or with its sign: +0.2; 0 has none."""
    text = f"{abs(number):.6g}" + (f"{NO_BREAK}{unit}" if unit else "")
    return f"{MINUS if number < 0 else '+' if sign and number else ''}{text}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
