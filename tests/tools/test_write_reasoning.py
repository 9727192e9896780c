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
        ([], "give --count or --facts, one of the two"),
        (["--count=2", "--facts=ids"], "give --count or --facts, one of the two"),
        (["--count=2", "--modle=x"], "unrecognized arguments: --modle=x; --help"),
        (["--count=two"], "argument --count: invalid int value: 'two'; --help"),
        (["--count=0"], "--count: 0 found, at least 1 expected"),
        (["--count=2", "--attempts=0"], "--attempts: 0 found, at least 1"),
        (["--count=2", "--in-flight=0"], "--in-flight: 0 found, at least 1"),
        (["--count=2", "--timeout=0"], "--timeout: 0.0 found, seconds above 0"),
        (["--count=2", "--temperature=nan"], "--temperature: nan found, at least 0"),
        (["--count=2", "--max-pixels=1"], "--max-pixels: 1 found, at least 3136"),
        (["--count=2", "--budget-dollars=1"], "--budget-dollars: needs the endpoint's --price-in"),
        (["--count=2", "--out=gs://team/out"], "--out: gs://team/out found, a folder on a local"),
        (["--count=2", "--data=gs://team/more"], "--out: none, and --data in a bucket found, a fo"),
        (["--count=2", "--data=foo://team"], "--data: 'foo://team' found, a path or gs://… expec"),
        (["--count=2", "--budget-tokens=-1"], "--budget-tokens: -1 found, at least 1"),
        (["--count=2", "--budget-tokens=0"], "--budget-tokens: 0 found, at least 1 expected"),
        (["--count=2", "--budget-dollars=0"], "--budget-dollars: 0.0 found, above 0 expected"),
    ],
)
def test_bad_flags_are_named_in_one_line(flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        parse(*flags)
    assert "\n" not in str(error.value)
