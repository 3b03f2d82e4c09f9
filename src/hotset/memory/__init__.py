"""Payloads of bytes by key, in tiers, and moving them. Knows neither tokens nor layers."""
