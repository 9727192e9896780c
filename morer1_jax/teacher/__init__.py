"""Reasoning written by a strong model: asked for, checked, journalled, paid for."""
