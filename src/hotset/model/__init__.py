"""Loading a transformers model and running it over a paged KV cache."""
