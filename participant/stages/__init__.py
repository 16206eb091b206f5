"""The stages of a private expert: continual pre-training today."""
