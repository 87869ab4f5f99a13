"""Decide whether a backend is right: the oracle, its rounding, the judge, and the search for a case that fails.

`space` says what is tried, `play` tries it, and `checks` names parts of the space. Only `space` and `checks` do not
import torch, because the supervisor plans with them.
"""
