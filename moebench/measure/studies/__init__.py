"""Measurements of parts of a layer, each a program of its own: `python -m moebench.measure.studies.NAME --help`."""
