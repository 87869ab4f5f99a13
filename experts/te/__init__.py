"""The engine te: Transformer Engine computes the experts. It is imported when a layer is made."""
