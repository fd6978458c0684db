"""Commands that make tokens of texts, and that compute losses of them."""
