r"""Has a strong model write the reasoning that SFT learns from.

export OPENAI_API_KEY=…
python tools/write_reasoning.py --data=data/MORE --count=2000 --model=gpt-4o \
    --price-in=2.50 --price-out=10 --budget-dollars=30 --dry-run

Without --dry-run the requests are sent. A run that was killed, started again, goes on from there.
Ctrl-C waits for the requests in flight; a second Ctrl-C gives them up.

The cost printed is that of the answers that arrived. A request that timed out (--timeout) or was
cut off is sent again. The provider may bill both, so the budget is charged with the most it can
cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable
from typing import Any

# Nothing is computed here, and an accelerator may be in use by another process.
os.environ["JAX_PLATFORMS"] = "cpu"

from etils import epath

from morer1_jax.cli import ArgumentParser, run_main
from morer1_jax.hosts.alone import check_alone
from morer1_jax.model.config import ImageConfig
from morer1_jax.paths import any_path
from morer1_jax.teacher.endpoint import EndpointConfig
from morer1_jax.teacher.ledger import Prices
from morer1_jax.teacher.writer import Writer, WriterConfig


def _path(text: str) -> epath.Path:
    try:
        return any_path(text, "path")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}") from None


def _number(
    kind: type, at_least: float = -math.inf, above: float = -math.inf
) -> Callable[[str], Any]:
    """Returns an argparse type for a bounded number."""
    name = "a whole number" if kind is int else "a number"
    bound = f"above {above}" if above > -math.inf else f"of at least {at_least}"

    def parse_number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value >= at_least and value > above):
            raise argparse.ArgumentTypeError(f"expected {name} {bound}, found {text!r}")
        return value

    return parse_number


def parse(argv: list[str]) -> tuple[WriterConfig, bool]:
    """Returns the config, and whether it is a dry run."""
    parser = ArgumentParser(__doc__)
    images = ImageConfig()
    count, positive, amount = _number(int, 1), _number(float, above=0), _number(float, 0)
    add = parser.add_argument
    # What to ask for, and where the answers go.
    add("--data", type=_path, required=True, help="folder in MORE's released form")
    add("--out", type=_path, help="folder to write to, on a local disk (default: --data)")
    add("--count", type=count, help="number of training facts, balanced over the labels")
    add("--facts", type=_path, help="instead of --count: a file of fact ids, one a line")
    add("--seed", type=_number(int, 0), default=0, help="seed of the selection")
    # The endpoint, and how it is asked.
    add("--model", required=True, help="name of the model at the endpoint")
    add("--base-url", help="URL of the endpoint (default: OPENAI_BASE_URL, then OpenAI's)")
    add("--temperature", type=amount, default=1.0, help="sampling temperature")
    add("--max-tokens", type=count, default=1024, help="maximum number of tokens of an answer")
    add("--attempts", type=count, default=3, help="answers before a fact is set aside")
    add("--in-flight", type=count, default=16, help="maximum number of requests in flight")
    add("--retries", type=_number(int, 0), default=8, help="retries of a failed request")
    add("--timeout", type=positive, default=120.0, help="seconds to wait for an endpoint's answer")
    # What it may cost.
    add("--price-in", type=amount, default=0.0, help="dollars per million tokens of prompt")
    add("--price-out", type=amount, default=0.0, help="dollars per million tokens of answer")
    add("--budget-dollars", type=positive, help="limit for all runs with the same --out together")
    add("--budget-tokens", type=count, help="limit for all runs with the same --out together")
    # The images, as the student's config has them by default.
    pixels = _number(int, images.min_pixels)
    add("--max-pixels", type=pixels, default=images.max_pixels, help="scale larger images down")
    add("--crop-margin", type=amount, default=images.crop_margin, help="share of the box per side")
    add(
        "--crop-least", type=count, default=images.crop_least, help="minimum side of a crop, pixels"
    )
    add("--dry-run", action="store_true", help="print one prompt and the cost, send nothing")
    flags = vars(parser.parse_args(argv))

    # The configs, whose fields have the flags' names.
    def fields(kind: type) -> dict[str, Any]:
        """Returns the flags that are named as a dataclass's fields."""
        return {f.name: flags[f.name] for f in dataclasses.fields(kind) if f.name in flags}

    config = WriterConfig(
        endpoint=EndpointConfig(**fields(EndpointConfig)),
        images=ImageConfig(**fields(ImageConfig)),
        prices=Prices(flags["price_in"], flags["price_out"]),
        **fields(WriterConfig),
    )
    return config, flags["dry_run"]


def main(_: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    config, is_dry_run = parse(sys.argv[1:])
    check_alone(devices=False)
    writer = Writer(config)
    return writer.dry_run() if is_dry_run else writer.run()


if __name__ == "__main__":
    run_main(main, sys.argv[:1])
