"""Passes that make a model smaller by taking coordinates, blocks and inputs of products away."""
