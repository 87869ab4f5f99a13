"""Estimate the memory of a job from the shapes of its case."""
