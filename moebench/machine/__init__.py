"""Where it is measured: GPUs and CPUs, library versions, and what tells two environments apart.

Nothing here imports another folder of moebench.
"""
