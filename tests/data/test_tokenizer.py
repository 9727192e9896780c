"""The small tokenizer: any text comes back, and its special tokens are Qwen's."""

import json
import shutil
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from morer1_jax.data.grammar import token_bytes
from morer1_jax.data.tokenizer import check_labels, load_tokenizer, train_tokenizer
from morer1_jax.errors import DataError
from morer1_jax.model.special import SPECIAL_TOKENS, SpecialIds
from morer1_jax.task.answer import Special

CORPUS = [
    "<|im_start|>user\nHeat face Celtics<|im_end|>\n<|vision_start|><|image_pad|><|vision_end|>",
    "Step 1: The crop shows a player in a green shirt.\nStep 2: The title names the Celtics.",
    *(f"The {colour} hat belongs to Adler {n}." for colour in ("red", "blue") for n in range(40)),
]
# What a text may hold: anything but lone surrogates, which are no Unicode text.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    return train_tokenizer(CORPUS, 320, folder), folder


@given(text=texts)
@example(text="e\u0301 \u212b")
@example(text="<|im_end|> <|im_end|>x")
@example(text=" ,  .\r\n\t\x00\ufffd 'll DON'T 1234")
def test_any_text_comes_back_composed(text, trained):
    tokenizer, _ = trained
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@given(text=texts)
def test_the_tokens_bytes_are_the_texts(text, trained):
    tokenizer, _ = trained
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_bytes(tokenizer, len(tokenizer))
    if not any(isinstance(pieces[i], Special) for i in ids):
        joined = b"".join(pieces[i] for i in ids)
        assert joined == unicodedata.normalize("NFC", text).encode()


def test_special_tokens_are_single_known_and_last(trained):
    tokenizer, _ = trained
    special = SpecialIds.of(tokenizer)
    named = {
        special.pad: "<|endoftext|>",
        special.end_of_turn: "<|im_end|>",
        special.image: "<|image_pad|>",
        special.video: "<|video_pad|>",
        special.vision_start: "<|vision_start|>",
        special.vision_end: "<|vision_end|>",
        special.vision_pad: "<|vision_pad|>",
    }
    assert len(named) == 7
    for i, token in named.items():
        assert tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"][1] == i
    ids = [tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS]
    assert ids == list(range(len(tokenizer) - len(ids), len(tokenizer)))
    assert set(special.never_sampled) == named.keys() - {special.end_of_turn}
    assert tokenizer.pad_token_id == special.pad
    assert tokenizer.eos_token_id == special.end_of_turn


def test_the_vocabulary_has_the_size_asked_for(trained):
    tokenizer, _ = trained
    assert len(tokenizer) == 320
    assert sorted(tokenizer.get_vocab().values()) == list(range(320))


def test_a_small_corpus_gives_what_there_is(tmp_path):
    tokenizer = train_tokenizer(["aa"], 1000, tmp_path / "tokenizer")
    assert len(tokenizer) == 256 + 1 + len(SPECIAL_TOKENS)


def test_no_token_is_learnt_from_special_ones(trained):
    tokenizer, _ = trained
    words = [token for token in tokenizer.get_vocab() if token not in SPECIAL_TOKENS]
    assert not [word for word in words if "im_" in word or "<|" in word]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_texts_give_the_same_files(trained, tmp_path):
    _, folder = trained
    train_tokenizer(iter(CORPUS), 320, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    train_tokenizer(CORPUS[:-10], 320, tmp_path / "other")
    assert contents(tmp_path / "other") != contents(folder)


def test_what_was_saved_is_loaded(trained):
    tokenizer, folder = trained
    again = load_tokenizer(folder)
    assert again.get_vocab() == tokenizer.get_vocab()
    text = CORPUS[0] + CORPUS[1]
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert SpecialIds.of(again) == SpecialIds.of(tokenizer)


def test_a_folder_that_is_there_is_not_written_over(trained):
    _, folder = trained
    before = contents(folder)
    with pytest.raises(FileExistsError):
        train_tokenizer(["other"], 300, folder)
    assert contents(folder) == before


def test_labels_that_a_tokenizer_changes_are_named(trained):
    labels = ["none", "/per/org/\xe9quipe", "/a/b/\ufb01rst", "/a/b/\U00011938"]
    check_labels(trained[0], labels)
    # A tokenizer that takes more for the same than composing does, and one that drops marks.
    for normalizer, bad, written in (
        (normalizers.NFKC(), labels[2], "'/a/b/first'"),
        (
            normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
            labels[1],
            "equipe",
        ),
    ):
        other = load_tokenizer(trained[1])
        other.backend_tokenizer.normalizer = normalizer
        with pytest.raises(DataError) as error:
            check_labels(other, labels)
        assert str(error.value).startswith(f"label {bad!r}: the tokenizer ")
        assert written in str(error.value)


def test_a_tokenizer_of_another_family_is_refused():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(
        DataError, match=r"expected a token <\|endoftext\|>, found none; .* Qwen2.5-VL"
    ) as error:
        SpecialIds.of(plain)
    assert "\n" not in str(error.value)
    plain.add_special_tokens(
        {"additional_special_tokens": [t for t in SPECIAL_TOKENS if t != "<|video_pad|>"]}
    )
    with pytest.raises(DataError, match=r"expected a token <\|video_pad\|>"):
        SpecialIds.of(plain)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"no tokenizer: none of tokenizer\.json") as error:
            load_tokenizer(path)
        assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


def _newer_model(whole):
    whole["model"]["type"] = "BPE2"


def _newer_cuts(whole):
    whole["pre_tokenizer"] = {"type": "Cuts", "by": 3}


@pytest.mark.parametrize("edit", [_newer_model, _newer_cuts])
def test_a_tokenizer_of_another_release_is_refused_in_a_line(trained, tmp_path, edit):
    copy = shutil.copytree(trained[1], tmp_path / "copy")
    whole = json.loads((copy / "tokenizer.json").read_text())
    edit(whole)
    (copy / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(DataError, match=r"tokenizers [\d.]+ can read: update them, or") as error:
        load_tokenizer(copy)
    assert str(error.value).startswith(f"{copy}: no tokenizer could be loaded: data did not match")
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_is_a_program_is_not_run(trained, tmp_path, monkeypatch):
    copy = shutil.copytree(trained[1], tmp_path / "copy")
    described = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(described))
    (copy / "mine.py").write_text("raise SystemExit('it ran')")

    def asked(*_):
        raise AssertionError("a question to the user")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(DataError, match=r"no tokenizer could be loaded: .*custom code"):
        load_tokenizer(copy)
