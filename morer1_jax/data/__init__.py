"""Facts to batches of fixed shapes, on the host, in NumPy."""
