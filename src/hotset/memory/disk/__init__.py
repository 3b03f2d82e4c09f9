"""A file of equal slots as a tier, and its index. Imports no torch."""
