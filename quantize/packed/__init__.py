"""Inference on packed weights: convert, save, load, and what they take."""
