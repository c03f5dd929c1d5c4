"""What a run costs: memory, FLOPs, and the time they take."""
