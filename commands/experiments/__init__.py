"""Commands for several runs: list them, compare them, and train a grid of them."""
