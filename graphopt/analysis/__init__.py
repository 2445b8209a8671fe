"""Analyses: what can be said about a Program without changing it."""

from graphopt.analysis.cost import macs, node_macs, parameter_bytes, parameters, resources, weight_bits

__all__ = ["macs", "node_macs", "parameter_bytes", "parameters", "resources", "weight_bits"]
