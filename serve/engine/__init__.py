"""Runs a model: arrays in, arrays out. Knows neither the queue nor a transport."""
