"""The token tables against the plain reader, over small, random and real vocabularies."""

import base64
import collections
import dataclasses
import importlib.util
import pathlib
import random
import time

import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from morer1_jax.data.grammar import UNREACHABLE, GrammarTables, build_tables, run, token_bytes
from morer1_jax.task.answer import Special, format_answer, read

# MORE's successor's list, longer than MORE's own, with labels that begin alike.
LABELS = (
    "none",
    "/per/loc/place_of_governance",
    "/per/misc/party",
    "/per/org/member_of",
    "/per/per/self",
    "/per/misc/nationality",
    "/loc/loc/self",
    "/per/misc/present_in",
    "/per/loc/place_of_residence",
    "/org/org/self",
    "/misc/misc/self",
    "/per/per/opponent",
    "/per/loc/place_of_birth",
    "/per/per/partner",
    "/per/org/opposed_to",
    "/loc/loc/contain",
    "/org/loc/locate_at",
    "/per/misc/president",
    "/misc/loc/held_on",
    "/per/org/leader_of",
    "/org/org/subsidiary",
    "/per/per/relatives",
    "/per/misc/awarded",
    "/misc/misc/part_of",
    "/per/misc/race",
    "/per/per/alumni",
    "/per/misc/religion",
    "/org/misc/present_in",
)
LABELS_BYTES = [label.encode() for label in LABELS]
SPECIALS = (Special.END, Special.OTHER)


# What bodies are written from: prose, and what almost is a tag or a header.
WORDS = (
    *(b"a", b"two", b"three, ", b"none", b" ", b"\t\n", b"\r", b"fu\xcc\x88r", b"\xc3", b"\xff\n"),
    *(b"<", b"</", b"</thin", b"Step 2:", b"\nStep 3", b"\n Step 4:"),
)


class Writer:
    """Writes completions: well-formed ones, and broken ones of every kind."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def body(self):
        return b"".join(self.random.choices(WORDS, k=self.random.randrange(1, 6)))

    def space(self):
        return self.random.choice((b"", b"", b"\n", b" ", b"\r\n\t"))

    def parts(self):
        parts = [b"<think>", self.space()]
        for k in range(1, 7):
            parts += [b"Step %d:" % k, b" x", self.body(), self.random.choice((b"\n", b"\r\n"))]
        label = self.random.choice(LABELS).encode()
        parts += [b"</think>", self.space(), b"<answer>", self.space(), label, self.space()]
        return [*parts, b"</answer>", self.space(), Special.END]

    def break_one(self, parts):
        r = self.random
        at = r.randrange(len(parts))
        block = [b"<answer>", r.choice(LABELS_BYTES), b"</answer>"]
        kind = r.choice(("missing", "moved", "cut off", "added", "added", "added", "added"))
        if kind == "missing":
            del parts[at]
        elif kind == "moved":
            parts.insert(r.randrange(len(parts)), parts.pop(at))
        elif kind == "cut off":
            del parts[at:]
        else:
            parts[at:at] = r.choice(
                (
                    parts[at : at + r.randrange(4)],  # repeated
                    self.parts()[: r.randrange(28)],  # nested
                    block,
                    [r.choice((b"<think>", b"</think>", *block))],
                    [b" or ".join(r.sample(LABELS_BYTES, 2))],
                    [b"\nStep %d:" % r.randrange(10)],
                    [b"\xff\xfe"],
                    [r.choice(SPECIALS)],
                )
            )

    def completion(self):
        parts = self.parts()
        for _ in range(self.random.choice((0, 1, 1, 2, 4))):
            if parts:
                self.break_one(parts)
        return parts


def random_vocabulary(writer, size):
    """All single bytes, and longer pieces cut out of completions, across tags and headers."""
    r = writer.random
    words = {bytes([b]) for b in range(256)}
    while len(words) < size:
        text = b"".join(p for p in writer.completion() if isinstance(p, bytes))
        begin = r.randrange(len(text) + 1)
        words.add(text[begin : begin + r.randrange(1, 14)])
    words = [*words - {b""}, Special.END, Special.OTHER, Special.OTHER]
    r.shuffle(words)
    return words


def index(vocabulary):
    return {piece: i for i, piece in enumerate(vocabulary)}


def tokenise(parts, ids, rng):
    """Cuts a completion into tokens of the vocabulary at random."""
    tokens, text = [], b""
    for part in [*parts, None]:
        if isinstance(part, bytes):
            text += part
            continue
        while text:
            size = rng.randrange(1, 14)
            while text[:size] not in ids:
                size -= 1
            tokens.append(ids[text[:size]])
            text = text[size:]
        if part is not None:
            tokens.append(ids[part])
    return tokens


def compare(count, vocabularies, seed):
    writer = Writer(seed)
    kinds = collections.Counter()
    for n in range(vocabularies):
        vocabulary = random_vocabulary(writer, 256 if n == 0 else 700)
        tables, ids = build_tables(vocabulary, LABELS), index(vocabulary)
        for _ in range(count // vocabularies):
            tokens = tokenise(writer.completion(), ids, writer.random)
            expected = read((vocabulary[t] for t in tokens), LABELS)
            assert run(tables, tokens) == expected, [vocabulary[t] for t in tokens]
            kinds[expected.format, expected.answer >= 0, expected.effort > 0] += 1
    return kinds


def test_ten_thousand_completions_equal_the_plain_reader():
    kinds = compare(10_000, 5, seed=0)
    assert sum(kinds.values()) == 10_000
    # Every combination that can occur does, often; format never without an answer.
    for kind in (
        (True, True, True),
        (False, True, True),
        (False, True, False),
        (False, False, True),
        (False, False, False),
    ):
        assert kinds[kind] > 100, kinds
    assert len(kinds) == 5


@pytest.mark.soak
def test_two_hundred_thousand_completions_equal_the_plain_reader():
    compare(200_000, 40, seed=1)


def test_bytes_after_the_end_change_nothing():
    vocabulary = [bytes([b]) for b in range(256)] + list(SPECIALS)
    tables = build_tables(vocabulary, LABELS)
    good = [*format_answer(["x"] * 6, "none").encode(), 256]
    assert run(tables, [*good, 257, 257, 60, 256]) == run(tables, good)
    assert run(tables, good).format


def test_tokens_that_act_alike_share_a_class():
    vocabulary = [bytes([b]) for b in range(256)] + [
        *SPECIALS,
        Special.OTHER,
        b"xyz",
        b"qqq",
        b"qq",
    ]
    classes = build_tables(vocabulary, LABELS).token_class
    assert classes[ord("X")] == classes[ord("Z")] == classes[0xFF]
    assert classes[257] == classes[258] != classes[256]
    assert classes[259] == classes[260] != classes[261]
    assert classes.max() < 60


def guided(tables, vocabulary, budget, rng):
    """Tokens chosen at random among those from which the end still fits the budget."""
    steps = answer = 0
    tokens = []
    for left in reversed(range(budget)):
        to_steps, to_answer = tables.steps_next[:, steps], tables.answer_next[:, answer]
        distance = tables.steps_distance[to_steps].astype(int)
        distance = np.where(distance > 0, distance, tables.answer_distance[to_answer])
        (allowed,) = np.nonzero(distance[tables.token_class] <= left)
        tokens.append(int(rng.choice(allowed)))
        c = tables.token_class[tokens[-1]]
        steps, answer = to_steps[c], to_answer[c]
        if vocabulary[tokens[-1]] is Special.END:
            break
    return tokens


@pytest.mark.parametrize("size", [256, 700])
def test_distances_are_reached_and_are_the_least(size):
    writer = Writer(2)
    vocabulary = random_vocabulary(writer, size)
    tables = build_tables(vocabulary, LABELS)
    shortest = int(tables.steps_distance[0])
    if size == 256:
        least = format_answer(["x"] * 6, "none").replace("answer>\n", "answer>").encode()
        # Neither the optional white space nor the space after a header is needed.
        for spare in (b"\nStep 1", b"\n</think>\n"):
            least = least.replace(spare, spare.strip())
        assert shortest == len(least.replace(b": ", b":")) + 1
    rng = np.random.default_rng(0)
    for budget in (shortest, shortest + 1, shortest + 40):
        for _ in range(10):
            tokens = guided(tables, vocabulary, budget, rng)
            assert len(tokens) <= budget
            assert read((vocabulary[t] for t in tokens), LABELS).format
    assert len(guided(tables, vocabulary, shortest, rng)) == shortest
    # Where a completion with the format ends, its distances count down to it, at most one a token.
    for _ in range(50):
        tokens = tokenise(writer.parts(), index(vocabulary), writer.random)
        steps = answer = 0
        before = []
        for token in tokens:
            before.append(tables.steps_distance[steps] or tables.answer_distance[answer])
            c = tables.token_class[token]
            steps, answer = tables.steps_next[c, steps], tables.answer_next[c, answer]
        if tables.steps_accept[steps]:
            assert (np.diff(before) >= -1).all()
            assert all(b <= len(tokens) - i for i, b in enumerate(before))


def test_distance_of_a_broken_completion_is_unreachable():
    vocabulary = [bytes([b]) for b in range(256)] + list(SPECIALS)
    tables = build_tables(vocabulary, LABELS)
    good = format_answer(["x"] * 6, "none").encode()
    for bad in (
        b"x",
        good.replace(b"Step 2", b"Step 3"),
        good + b".",
        good.replace(b"none", b"/x"),
    ):
        steps = answer = 0
        for byte in bad:
            c = tables.token_class[byte]
            steps, answer = tables.steps_next[c, steps], tables.answer_next[c, answer]
        assert (tables.steps_distance[steps] or tables.answer_distance[answer]) == UNREACHABLE


def test_annotated_shapes_and_types_hold():
    checked = jaxtyped(typechecker=beartype)(
        dataclasses.make_dataclass("Checked", GrammarTables.__annotations__.items())
    )
    tables = build_tables([bytes([b]) for b in range(256)] + list(SPECIALS), LABELS)
    checked(*tables)
    with pytest.raises(TypeError):
        checked(*tables._replace(steps_next=tables.answer_next))


def test_refuses_a_vocabulary_without_end_of_turn():
    with pytest.raises(ValueError, match="expected at least one end-of-turn token"):
        build_tables([b"a", Special.OTHER], LABELS)


@pytest.fixture(scope="module")
def qwen_vocabulary(qwen_tokenizer):
    """What each row of the larger models' embedding stands for: Qwen's tokens, then nothing."""
    return token_bytes(qwen_tokenizer, 152_064)


@pytest.fixture(scope="module")
def qwen_tables(qwen_vocabulary):
    return build_tables(qwen_vocabulary, LABELS)


@pytest.mark.parametrize("rows", [151_936, 152_064])
def test_real_vocabulary_fits_the_limits(qwen_vocabulary, capsys, rows):
    began = time.perf_counter()
    tables = build_tables(qwen_vocabulary[:rows], LABELS)
    seconds = time.perf_counter() - began
    with capsys.disabled():
        print(f"\n{rows:,} rows: {tables.nbytes:,} bytes, built in {seconds:.1f} s ", end="")
    assert tables.token_class.shape == (rows,)
    assert tables.nbytes <= 2_000_000
    assert seconds < 20


@pytest.mark.parametrize(
    "completions", [500, pytest.param(100_000, marks=pytest.mark.soak)], ids=str
)
def test_automaton_and_reader_agree_over_the_real_vocabulary(
    qwen_vocabulary, qwen_tables, completions
):
    """On random splits of the bytes into tokens, most of which no tokenizer would make."""
    writer, ids = Writer(3), index(qwen_vocabulary)
    formatted = 0
    for _ in range(completions):
        tokens = tokenise(writer.completion(), ids, writer.random)
        expected = read((qwen_vocabulary[t] for t in tokens), LABELS)
        assert run(qwen_tables, tokens) == expected
        formatted += expected.format
    assert formatted > completions / 10


def test_pieces_of_the_real_vocabulary(qwen_tokenizer, qwen_vocabulary):
    words = base64_words()
    assert qwen_vocabulary[: len(words)] == words
    named = dict(enumerate(qwen_vocabulary[len(words) : len(qwen_tokenizer)], len(words)))
    assert [i for i, piece in named.items() if piece is Special.END] == [151_645]
    assert named[151_655] is Special.OTHER  # <|image_pad|>
    assert named[151_657] == b"<tool_call>"
    assert set(qwen_vocabulary[len(qwen_tokenizer) :]) == {Special.OTHER}


def base64_words():
    package = importlib.util.find_spec("dashscope").submodule_search_locations[0]
    lines = (pathlib.Path(package) / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    return [base64.b64decode(line.split()[0]) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>", "<|image_pad|>"],
    )
    inner.train_from_iterator(["<think>\nStep 1: the Celtics play\n</think> é " * 20], trainer)
    inner.add_tokens([AddedToken("<tool_call>é", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_token_bytes_of_a_tokenizer(tokenizer):
    pieces = token_bytes(tokenizer, 500)
    text = "<think>\nStep 1: Ünïcödé 你好 \u00ad\x00\x7f\t 🙂<tool_call>é"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(pieces[i] for i in ids) == text.encode()
    assert any(len(pieces[i]) > 3 for i in ids)
    assert pieces[tokenizer.convert_tokens_to_ids("<tool_call>é")] == "<tool_call>é".encode()
    assert pieces.count(Special.END) == 1
    assert pieces[tokenizer.convert_tokens_to_ids("<|im_end|>")] is Special.END
    for special in ("<|endoftext|>", "<|image_pad|>"):
        assert pieces[tokenizer.convert_tokens_to_ids(special)] is Special.OTHER
    assert pieces[len(tokenizer) :] == [Special.OTHER] * (500 - len(tokenizer))
    assert {bytes([b]) for b in range(256)} <= set(pieces)


def test_token_bytes_refuses(tokenizer):
    with pytest.raises(ValueError, match="expected more rows in the embedding, found 100"):
        token_bytes(tokenizer, 100)
    with pytest.raises(ValueError, match="expected an added token '</s>'"):
        token_bytes(tokenizer, 500, end_of_turn="</s>")
    with pytest.raises(ValueError, match="expected an added token 'play'"):
        token_bytes(tokenizer, 500, end_of_turn="play")
    inner = Tokenizer(models.BPE(vocab={"▁a": 0}, merges=[]))
    inner.add_special_tokens(["<|im_end|>"])
    with pytest.raises(
        ValueError, match="token 0: expected a token of a byte-level BPE, found '▁a'"
    ):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=inner), 10)
