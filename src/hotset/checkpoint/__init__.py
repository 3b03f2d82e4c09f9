"""The forms that checkpoints come in, each read or refused by name."""
