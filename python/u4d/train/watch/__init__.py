"""What can be seen of a run: its log, curves, validations, and the stop at the first NaN."""
