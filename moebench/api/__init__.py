"""Define the functions that scripts and notebooks call. The package `moebench` exports their names.

Each function takes results as a path, a frame or an object that another function returned, and answers anything else
with a ResultsError that says what to give.
"""
