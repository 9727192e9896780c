"""Qwen2.5-VL as pure functions: vision tower, decoder, attention and its kernels, scorer."""
