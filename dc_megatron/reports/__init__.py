"""Pages and pictures about a machine, a run or a checkpoint, for people to read."""
