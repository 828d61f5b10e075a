"""Digits as a training set (digit_set.py)."""
