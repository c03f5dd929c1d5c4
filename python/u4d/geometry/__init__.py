"""Cameras, depth, points and alignment: pure functions on torch tensors."""
