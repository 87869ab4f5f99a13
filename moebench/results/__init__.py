"""Rows of results: the journal, the data frame, the results folder, and what reads them without a verdict."""
