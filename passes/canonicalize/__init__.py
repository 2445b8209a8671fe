"""One form for each thing: what later passes need not know how to read."""
