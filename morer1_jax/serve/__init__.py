"""Opens, queries and exports a trained or published model."""
