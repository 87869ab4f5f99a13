"""Run the jobs of a sweep: make the plan, supervise the worker processes, and write the journal."""
