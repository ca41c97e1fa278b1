"""Models run to compare them with each other, and on benchmarks."""
