"""Experts with frozen weights and trainable low-rank adapters (LoRA)."""
