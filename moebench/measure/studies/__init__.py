"""Measure one part of a layer with each of these programs: `python -m moebench.measure.studies.NAME --help`."""
