"""The text of answers as it is decoded, and conversations, for `trellax generate`."""
