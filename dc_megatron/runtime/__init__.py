"""Where a run happens: the device, the patches that let megatron-core run there, and its process groups."""
