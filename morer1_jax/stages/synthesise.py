"""The stage `synthesise`: writes the synthetic dataset and trains the tokenizer."""

from __future__ import annotations

from morer1_jax.data.dataset import open_dataset
from morer1_jax.data.tokenizer import load_tokenizer
from morer1_jax.run.setup import Setup, make_tokenizer
from morer1_jax.world.synthesise import synthesise


def run_synthesise(setup: Setup) -> None:
    """Writes the dataset, unless the config names one, and the run's tokenizer."""
    settings = setup.settings
    if settings.data.folder is None and not setup.data.exists():
        synthesise(setup.data, settings.world, settings.seed)
    dataset = open_dataset(
        setup.data,
        reasoning=settings.data.reasoning,
        reasoning_needed=setup.trains_tokenizer,
        photos=False,
    )
    make_tokenizer(setup, dataset)
    print(f"tokenizer: {len(load_tokenizer(setup.tokenizer))} tokens")
