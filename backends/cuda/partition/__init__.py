"""A program in regions: which parts of it become kernels."""

from graphopt.backends.cuda.partition.partition import kernel_share, partition, products

__all__ = ["kernel_share", "partition", "products"]
