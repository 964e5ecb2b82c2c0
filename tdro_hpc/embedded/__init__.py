"""A small retrieval data set made on the spot from the documentation that a Python installation carries."""
