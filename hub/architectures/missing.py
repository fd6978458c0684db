"""List architectures that trellax does not have, and what it lacks to compute each.

They share keys and names of tensors with those that it has, so that their users may expect them to work.
"""

MISSING = {
    "deepseek_v32": "attention to tokens that an indexer chooses",
    "gemma3": "images; the text alone is a model of type gemma3_text",
    "gemma3n_text": "embeddings of each layer, and layers that share keys and values",
    "qwen2_moe": "shared experts with a gate of their own (shared_expert_gate)",
}
"""What trellax lacks for each, by `model_type`."""
