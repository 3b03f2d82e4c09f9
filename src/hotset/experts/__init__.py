"""The experts of a Mixture-of-Experts layer, wherever they are."""
