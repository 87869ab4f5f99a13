"""Rows of results: journal, frame, folder, and what is read from them without a verdict. No torch."""
