"""What is measured: sweep files are read into cases and jobs, and cases into seeded inputs.

Nothing here imports another folder of moebench.
"""
