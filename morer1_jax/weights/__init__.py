"""Checkpoint folders in the published form, read onto the mesh and written."""
