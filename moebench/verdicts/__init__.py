"""Decide whether a change of the code made a backend slower, larger in memory, or wrong."""
