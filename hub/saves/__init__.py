"""A saved state on disk: arrays by path, and a sealed record of what they are."""
