"""The translation from flags to the engine, the model and data providers, and the hooks of a run."""
