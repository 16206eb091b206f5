"""The stages of a private expert: pre-training, fine-tuning, reinforcement."""


class StageError(ValueError):
    """A stage cannot go on, nor would it if begun again; the message says what to do."""
