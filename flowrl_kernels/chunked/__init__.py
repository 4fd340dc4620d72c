"""Torch on any device, with memory bounded by a tile instead of the vocabulary."""
