"""FP8 numerics and the one training loop."""
