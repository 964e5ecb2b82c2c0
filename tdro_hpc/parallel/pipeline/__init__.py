"""A model spread over the ranks of a replica: by layers, and by the columns of its matrices."""
