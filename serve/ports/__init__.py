"""The process: start, run, stop."""
