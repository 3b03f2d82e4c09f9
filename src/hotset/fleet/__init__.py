"""Fronts that speak HTTP, and replicas that each run an engine, joined by links.

Imports no torch.
"""
