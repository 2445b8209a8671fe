"""What `tools/bench/cuda.py` measures on a GPU."""
