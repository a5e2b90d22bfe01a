"""The run directory: how what is in it is read, and what the run began with."""
