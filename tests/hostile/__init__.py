"""Callers that mean harm, and one that does not."""
