"""Define the command line. Each module has a group of commands; a command parses, calls one function and prints."""
