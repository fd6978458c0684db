"""Files that others made, read safely, and files of our own, written whole or not at all."""
