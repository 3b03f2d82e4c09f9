"""Tokens to blocks: prefixes by hash, the device's blocks, and the block table of a sequence.

Imports no torch.
"""
