"""A trained or published model: opened, asked, exported."""
