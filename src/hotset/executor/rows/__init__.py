"""Steps on a CPU as calls into compiled code, one row for each token.

A model is run once, for one token, and what it computes is noted (`trace`). What is between two
products becomes a function that LLVM compiles (`code`); a step calls these functions and the
products one after another (`program`), without PyTorch's and Python's time for each operation.
"""
