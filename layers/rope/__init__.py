"""Rotary positions (RoPE), and how they are scaled to sequences longer than those first trained on."""
