"""A model of the smallest preset shrunk further, as the benchmark writes it."""

import dataclasses

import pytest

from bench.cases import PRESETS
from bench.model import write_model


@pytest.fixture(scope="session")
def preset():
    tiny = PRESETS["tiny"]
    # Wide inside, for its depth: products of layers are to be most of the work, as in a real model,
    # or the two sides' counts differ by what each computes besides.
    text = dataclasses.replace(
        tiny.text,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=2,
        mrope_section=(2, 3, 3),
    )
    vision = dataclasses.replace(
        tiny.vision, hidden_size=32, intermediate_size=192, out_hidden_size=text.hidden_size
    )
    shrunk = {"tokenizer": 512, "batch": 2, "group": 2, "completion": 32, "mixed": 8, "micro": 4}
    return dataclasses.replace(tiny, text=text, vision=vision, **shrunk)


@pytest.fixture(scope="session")
def folder(preset, once):
    return once("bench_model", lambda made: write_model(preset, made / "model")) / "model"
