"""The benchmark: the same work with and without tiers, side by side, and against other servers."""
