"""GPU kernels for what the libraries do not have; each wrapper names its reference."""
