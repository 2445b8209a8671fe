"""Backends, one folder each: target profiles, lowering, verification and measurement."""
