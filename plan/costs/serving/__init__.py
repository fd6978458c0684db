"""What an inference server holds on a device: weights and cache, in the formats in which it keeps them."""
