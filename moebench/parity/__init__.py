"""Decide whether a backend is right: define references, budgets, and the checks of `moebench parity`.

Only the module `checks` works without torch, because the supervisor plans with it.
"""
