"""Clips for training: where they come from, which one each place uses, and what is drawn for it."""
