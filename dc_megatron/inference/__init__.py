"""Models built from folders or checkpoints without the training engine, and what they answer."""
