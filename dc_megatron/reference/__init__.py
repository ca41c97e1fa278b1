"""The plain Hugging Face / PyTorch model in fp32: oracle of the tests and baseline of the benchmarks."""
