"""Linear layers: packed for the CPU, 8-bit, and merged where they read the same input."""
