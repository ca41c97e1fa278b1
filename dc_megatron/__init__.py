"""Dense Connector multimodal LLMs on megatron-core."""
