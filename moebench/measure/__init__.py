"""The code of a worker process: it builds the backend of a job, checks it, times it and measures its memory.

Only the module `protocol` works without torch, because the supervisor uses it.
"""
