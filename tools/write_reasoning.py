r"""Has a strong model write the reasoning that SFT learns from.

export OPENAI_API_KEY=…
python tools/write_reasoning.py --data=more --count=2000 --model=gpt-4o \
    --price-in=2.50 --price-out=10 --budget-dollars=30 --dry-run

Without --dry-run it asks. Killed at any time and started again, it goes on. Ctrl-C lets what is on
its way arrive, and a second one gives it up.

Costs are those of the answers that came. A request whose answer was late (--timeout) or cut off is
sent again; as the provider may bill both, the budget is charged with the most it can have cost.
"""

from __future__ import annotations

import argparse
import os
import sys

# Nothing is computed here, and an accelerator may be another process's.
os.environ["JAX_PLATFORMS"] = "cpu"

from etils import epath

from morer1_jax.cli import ArgumentParser, run_main
from morer1_jax.files import any_path
from morer1_jax.model.config import ImageConfig
from morer1_jax.processes import check_alone
from morer1_jax.teacher.endpoint import EndpointConfig
from morer1_jax.teacher.ledger import Prices
from morer1_jax.teacher.writer import Writer, WriterConfig


def _path(text: str) -> epath.Path:
    try:
        return any_path(text, "path")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} found, {error.strerror}") from None


def parse(argv: list[str]) -> tuple[WriterConfig, bool]:
    """The config, and whether to ask nothing."""
    parser = ArgumentParser(__doc__)
    add, images = parser.add_argument, ImageConfig()
    add("--data", type=_path, required=True, help="a folder in MORE's released form")
    add("--out", type=_path, help="where to write, on a local disk; by default --data")
    add("--count", type=int, help="training facts, balanced over the labels")
    add("--facts", type=_path, help="instead of --count: a file of fact ids, one a line")
    add("--seed", type=int, default=0, help="of the choice")
    add("--model", required=True)
    add("--base-url", help="of the endpoint; else OPENAI_BASE_URL, else OpenAI's")
    add("--temperature", type=float, default=1.0)
    add("--max-tokens", type=int, default=1024, help="of an answer")
    add("--attempts", type=int, default=3, help="answers before a fact is set aside")
    add("--in-flight", type=int, default=16, help="requests on their way at once")
    add("--retries", type=int, default=8, help="of a request that failed, with backoff")
    add("--timeout", type=float, default=120.0, help="seconds")
    add("--price-in", type=float, default=0.0, help="dollars for a million tokens of prompt")
    add("--price-out", type=float, default=0.0, help="dollars for a million tokens of answer")
    add("--budget-dollars", type=float, help="for all runs into --out together")
    add("--budget-tokens", type=int, help="for all runs into --out together")
    add("--max-pixels", type=int, default=images.max_pixels, help="larger images are scaled down")
    add("--crop-margin", type=float, default=images.crop_margin, help="share of the box a side")
    add("--crop-least", type=int, default=images.crop_least, help="least side of a crop, pixels")
    add("--dry-run", action="store_true", help="print one prompt and the cost, ask nothing")
    flags = parser.parse_args(argv)
    config = WriterConfig(
        data=flags.data,
        out=flags.out,
        endpoint=EndpointConfig(
            model=flags.model,
            base_url=flags.base_url,
            temperature=flags.temperature,
            max_tokens=flags.max_tokens,
            retries=flags.retries,
            timeout=flags.timeout,
        ),
        images=ImageConfig(
            max_pixels=flags.max_pixels,
            crop_margin=flags.crop_margin,
            crop_least=flags.crop_least,
        ),
        count=flags.count,
        facts=flags.facts,
        seed=flags.seed,
        attempts=flags.attempts,
        in_flight=flags.in_flight,
        prices=Prices(flags.price_in, flags.price_out),
        budget_dollars=flags.budget_dollars,
        budget_tokens=flags.budget_tokens,
    )
    return config, flags.dry_run


def main(_: list[str]) -> int:
    config, dry = parse(sys.argv[1:])
    check_alone(devices=False)
    writer = Writer(config)
    return writer.dry_run() if dry else writer.run()


if __name__ == "__main__":
    run_main(main, sys.argv[:1])
