"""What is measured: sweep files become cases and jobs, and cases become seeded inputs.

No module here imports another folder of moebench.
"""
