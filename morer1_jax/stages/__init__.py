"""The stages of a run, one per file; their table; a workdir's status; the disk's room."""
