"""The command line: one module per group of commands, which parses, calls one function and prints."""
