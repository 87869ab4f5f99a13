"""Figures of results. `kinds` defines what each kind shows, and `figures` draws all of them."""
