"""Measure, check and compare the expert layers of Mixture-of-Experts models."""

__version__ = "0.1.0"
