"""Bytes, seconds and the choices between them, for planner and engine alike. Imports no torch."""
