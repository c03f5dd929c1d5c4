"""Checks of a recipe's fields: each raises UserError with the field, what was wanted and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from u4d.errors import UserError


def require(good: bool, name: str, expected: str, got: object) -> None:
    """Raise UserError unless a field's value is good."""
    if not good:
        raise UserError(f"{name}: expected {expected}, got {got!r}")


def require_counts(settings: object, least: int, *names: str) -> None:
    """Raise UserError unless those fields are whole numbers from `least`."""
    for name in names:
        value = getattr(settings, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(whole and value >= least, name, f"a whole number from {least}", value)


def require_positive(settings: object, *names: str) -> None:
    """Raise UserError unless those fields are numbers above 0."""
    for name in names:
        value = getattr(settings, name)
        require(0 < value < math.inf, name, "a number above 0", value)


def require_shares(settings: object, *names: str) -> None:
    """Raise UserError unless those fields are from 0 to 1."""
    for name in names:
        value = getattr(settings, name)
        require(0 <= value <= 1, name, "a number from 0 to 1", value)


def require_odds(name: str, odds: Mapping[Any, float]) -> None:
    """Raise UserError unless these are relative frequencies, one of them at least above 0."""
    for key, value in odds.items():
        require(0 <= value < math.inf, f"{name}.{key}", "a relative frequency from 0", value)
    require(sum(odds.values()) > 0, name, "a frequency above 0 among them", dict(odds))
