"""Measure jobs in a worker process: build a job's backend, check it, time it and measure its memory.

Only the module `protocol` works without torch, because the supervisor uses it.
"""
