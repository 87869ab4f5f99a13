"""Show results and verdicts as tables in a terminal. Each table is an object that rich can print."""
