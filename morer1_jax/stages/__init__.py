"""The stages of a run, a file each; the table of them; how far a workdir is; the disk's room."""
