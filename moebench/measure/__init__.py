"""What happens in a worker process: one job is built, checked, timed and weighed.

`protocol` alone is free of torch: the supervisor speaks it too.
"""
