"""Compute the experts with Transformer Engine (the engine `te`), which is imported when a layer is made."""
