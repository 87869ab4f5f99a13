"""Is a backend right? References, budgets, and the checks of `moebench parity`.

`checks` alone is free of torch: a supervisor plans with it.
"""
