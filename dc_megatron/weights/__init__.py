"""Names and tensors: between Hugging Face files and the shards of the megatron-core model, in both directions."""
