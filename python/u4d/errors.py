"""The one error type that means: the user can mend this."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message names what was given, what was wanted and what to do; the CLI exits with 2."""
