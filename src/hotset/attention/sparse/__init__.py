"""Sparse attention: which earlier tokens each token attends to, and attending to those alone."""
