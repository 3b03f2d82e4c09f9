"""Paged attention by FlashInfer, on NVIDIA GPUs."""
