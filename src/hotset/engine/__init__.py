"""The step: who runs, how many tokens, and running it."""
