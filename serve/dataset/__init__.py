"""Data sets of any size, shard by shard (command.py)."""
