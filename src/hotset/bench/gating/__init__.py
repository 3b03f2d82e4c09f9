"""Static gating, dynamic gating and transformers' experts, side by side."""
