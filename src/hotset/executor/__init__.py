"""A model step: from token ids to the token ids that follow."""
