"""Ranks that compute one model together: their group, what each has of a layer, and their sums."""
