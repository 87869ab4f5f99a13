"""Define what is measured: turn sweep files into cases and jobs, and cases into seeded inputs.

No module here imports another folder of moebench.
"""
