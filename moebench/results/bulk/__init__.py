"""Read, check and merge the rows of results as columns of an Arrow table.

A run of many jobs has many rows, and Python takes a twentieth of the time for columns that it takes for one `Record`
after the other. These modules know only what is usual: whatever is not usual goes through `Record` row by row, which
decides what is valid and has the messages.
"""
