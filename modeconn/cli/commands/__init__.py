"""The commands, each of which reads files, calls one function and writes files."""
