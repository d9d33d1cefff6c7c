"""Low-bit weights: configurations, the quantizers that prepare() registers, and the quantizers as functions."""
