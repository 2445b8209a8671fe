"""Arithmetic on weights alone, done once instead of at every call."""
