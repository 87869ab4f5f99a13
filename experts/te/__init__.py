"""Experts by Transformer Engine, which is imported when a layer is made."""
