"""Models run to compare them: what two folders compute of the same input."""
