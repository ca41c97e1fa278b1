"""Pure arithmetic about a run: what a step costs. No torch, no GPU, no weights."""
