"""From prompts to token ids, and from token ids to text and tool calls."""
