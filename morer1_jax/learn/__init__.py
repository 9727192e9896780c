"""Losses and steps: SFT, GRPO, the optimizer, what trains."""
