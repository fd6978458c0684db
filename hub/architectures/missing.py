"""List architectures of mixtures of experts that trellax does not have, and what it lacks to compute each.

They share keys and names of tensors with those that it has, so that their users may expect them to work.
"""

_LATENT_ATTENTION = "attention with keys and values from a latent vector (MLA), dense layers before those of experts"

MISSING = {
    "deepseek_v2": f"{_LATENT_ATTENTION}, and choosing groups by their best expert",
    "deepseek_v3": f"{_LATENT_ATTENTION}, and the bias of its router (e_score_correction_bias)",
    "qwen2_moe": "shared experts with a gate of their own (shared_expert_gate)",
}
"""What trellax lacks for each, by `model_type`."""
