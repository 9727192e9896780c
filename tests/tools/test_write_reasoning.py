"""The flags of `tools/write_reasoning.py`."""

import importlib.util
import re
from pathlib import Path

import pytest

from morer1_jax.errors import ConfigError
from morer1_jax.model.config import ImageConfig
from morer1_jax.teacher.endpoint import EndpointConfig
from morer1_jax.teacher.ledger import Prices
from morer1_jax.teacher.writer import WriterConfig

TOOL = Path(__file__).parents[2] / "tools" / "write_reasoning.py"


def parse(*flags):
    spec = importlib.util.spec_from_file_location("write_reasoning", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse(["--data=more", "--model=gpt-4o", *flags])


def test_flags_become_the_config():
    config, dry = parse(
        "--count=7", "--dry-run", "--out=o", "--budget-tokens=5", "--max-pixels=9999"
    )
    assert dry
    assert config.folder == Path("o")
    assert (config.count, config.budget_tokens, config.images.max_pixels) == (7, 5, 9999)
    config, _ = parse("--count=7", "--data=gs://team/more", "--out=o")
    assert str(config.data) == "gs://team/more"
    config, dry = parse("--facts=ids", "--base-url=http://h/v1", "--price-in=1", "--price-out=2")
    assert not dry
    assert config.folder == Path("more")
    assert config == WriterConfig(
        data=Path("more"),
        endpoint=EndpointConfig(model="gpt-4o", base_url="http://h/v1"),
        images=ImageConfig(),
        prices=Prices(1, 2),
        facts=Path("ids"),
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected one of --count and --facts, found both or none; give one"),
        (["--count=2", "--facts=ids"], "expected one of --count and --facts, found both or none"),
        (["--count=2", "--modle=x"], "unrecognized arguments: --modle=x; --help"),
        (["--count=two"], "--count: expected a whole number of at least 1, found 'two'; --help"),
        (["--count=0"], "--count: expected a whole number of at least 1, found '0'"),
        (["--count=2", "--attempts=0"], "--attempts: expected a whole number of at least 1, found"),
        (["--count=2", "--in-flight=0"], "--in-flight: expected a whole number of at least 1, fo"),
        (["--count=2", "--timeout=0"], "--timeout: expected a number above 0, found '0'"),
        (["--count=2", "--temperature=nan"], "--temperature: expected a number of at least 0, fo"),
        (["--count=2", "--max-pixels=1"], "--max-pixels: expected a whole number of at least 3136"),
        (["--count=2", "--budget-dollars=1"], "--budget-dollars: expected --price-in and --price"),
        (["--count=2", "--out=gs://team/out"], "--out: expected a folder on a local disk, which"),
        (["--count=2", "--data=gs://team/more"], "needs, found none, and --data in a bucket"),
        (
            ["--count=2", "--data=foo://team"],
            "--data: 'foo://team': expected a path or gs://…, found",
        ),
        (["--count=2", "--budget-tokens=-1"], "--budget-tokens: expected a whole number of at le"),
        (["--count=2", "--budget-tokens=0"], "--budget-tokens: expected a whole number of at lea"),
        (["--count=2", "--budget-dollars=0"], "--budget-dollars: expected a number above 0, foun"),
        *(
            (["--count=2", f"--{name}=-1"], f"--{name}: expected a ")
            for name in (
                *("seed", "retries", "max-tokens", "crop-margin", "crop-least"),
                *("price-in", "price-out"),
            )
        ),
    ],
)
def test_bad_flags_are_named_in_one_line(flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        parse(*flags)
    assert "\n" not in str(error.value)
