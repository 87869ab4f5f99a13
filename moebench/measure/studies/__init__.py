"""Programs that each measure one part of a layer: `python -m moebench.measure.studies.NAME --help`."""
