"""List architectures of mixtures of experts that trellax does not have, and what it lacks to compute each.

They share keys and names of tensors with those that it has, so that their users may expect them to work.
"""

MISSING = {
    "deepseek_v32": "attention to tokens that an indexer chooses",
    "qwen2_moe": "shared experts with a gate of their own (shared_expert_gate)",
}
"""What trellax lacks for each, by `model_type`."""
