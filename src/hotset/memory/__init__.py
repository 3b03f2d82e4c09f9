"""What is where, and moving it."""
