"""Describe the machine that measures jobs: GPUs and CPUs, library versions, and how two environments differ.

No module here imports another folder of moebench.
"""
