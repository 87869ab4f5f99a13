"""Getting the jobs of a sweep measured: a plan, worker processes under a supervisor, a journal. No torch."""
