"""The sharded model: frozen vision tower, dense connector and a megatron-core language model."""
