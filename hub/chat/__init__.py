"""Turn messages into the prompt, or the training tokens, of a model."""
