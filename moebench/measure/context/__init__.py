"""Put a layer into the context of a case: checkpointing, compilation, FSDP, offloading, main gradients."""
