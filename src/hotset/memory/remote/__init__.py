"""Payloads in stores that several machines share, over the Redis protocol. Imports no torch."""
