"""Say from measured results where FP8 pays."""
