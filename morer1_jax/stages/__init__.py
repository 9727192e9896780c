"""The stages of a run, a file each, and what they depend on."""
