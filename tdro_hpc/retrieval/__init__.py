"""Texts and vectors in, ranked documents out."""
