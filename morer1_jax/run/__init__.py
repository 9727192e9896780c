"""What surrounds a step: mesh, kernels, checkpoints, the loop, logs, instruments."""
