"""Trains vision-language models to reason about relations in news photos: SFT, then GRPO."""

import os

# transformers advises whoever imports it without PyTorch to install it; we never run its models.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
