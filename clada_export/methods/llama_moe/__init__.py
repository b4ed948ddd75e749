"""LLaMA-MoE: the best experts, weighted."""
