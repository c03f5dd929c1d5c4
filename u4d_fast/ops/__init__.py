"""The public ops: each checks its arguments, chooses a backend and runs it."""
