"""Who does the arithmetic of an FP8 layer: torch anywhere, or a GPU's FP8 units."""
