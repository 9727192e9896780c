from morer1_jax.errors import DataError, one_line
from morer1_jax.task.fact import Fact

FACT = Fact(
    id="train:12",
    tokens=("Heat", "and", "New", "York", "are", "tied"),
    entity_name="new york",
    entity_span=(2, 4),
    object_name="[OBJ0]",
    box=(0.5, 0.5, 0.2, 0.4),
    image="7.jpg",
    label="none",
)


def test_properties():
    assert FACT.split == "train"
    assert FACT.photo == "train/7.jpg"
    assert FACT.title == "Heat and New York are tied"
    assert FACT.entity_text == "New York"


def test_one_line_keeps_a_message_on_one_line_and_is_never_empty():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(MemoryError()) == "MemoryError"
    assert issubclass(DataError, ValueError)
