"""Fusion maths: alignment, losses, routing, merging, contributions. No wire and no database."""
