"""What a run saves to go on from, and the checkpoint or adapter that comes of it."""
