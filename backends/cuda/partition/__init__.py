"""A program in regions: which parts of it become kernels."""

from graphopt.backends.cuda.partition.partition import partition, products

__all__ = ["partition", "products"]
