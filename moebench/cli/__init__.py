"""The command line. A module for each command, which parses, calls one function and prints. Nobody imports this."""
