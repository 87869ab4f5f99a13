"""Runs the jobs of a sweep: makes the plan, supervises the worker processes, and writes the journal."""
