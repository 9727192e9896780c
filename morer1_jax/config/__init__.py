"""A run's config: which keys there are, and what binds a workdir to their values."""
