"""Analyses: what can be said about a Program without changing it."""

from graphopt.analysis.cost import file_bytes, macs, node_macs, parameter_bytes, parameters, resources, weight_bits

__all__ = ["file_bytes", "macs", "node_macs", "parameter_bytes", "parameters", "resources", "weight_bits"]
