"""Figures of results. `kinds` says what each kind shows, `figures` draws all of them."""
