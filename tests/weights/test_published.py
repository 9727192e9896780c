"""Checkpoints of others: read tensor by tensor onto the mesh, and written as they were."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from morer1_jax import stores
from morer1_jax.errors import ConfigError, DataError, WeightsError
from morer1_jax.learn.state import abstract_params
from morer1_jax.model.config import Runtime
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.run import mesh as meshes
from morer1_jax.run.mesh import like
from morer1_jax.serve.export import export
from morer1_jax.serve.loaded import open_model
from morer1_jax.weights.published import CONFIG, INDEX, SINGLE, Checkpoint, save_tensors

pytestmark = pytest.mark.usefixtures("quick_compiles", "one_device")

CONVERT = str(Path(__file__).parents[2] / "tools" / "convert.py")
VALUE_BOUND = 2e-5


def wanted(config, dtype="float32", **axes):
    model = Qwen25VL(config, Runtime(param_dtype=dtype))
    count = int(np.prod(list(axes.values()) or [1]))
    mesh = meshes.make_mesh(axes or {"data": 1}, jax.local_devices()[:count])
    abstract = abstract_params(model)
    return like(abstract, meshes.param_shardings(mesh, abstract))


@pytest.mark.parametrize(
    ("tied", "dtype", "shard"),
    [
        ("tied", "float32", "10GB"),
        ("tied", "bfloat16", "30KB"),
        ("untied", "float32", "30KB"),
        ("untied", "bfloat16", "10GB"),
        pytest.param("tied", "float32", "30KB", marks=pytest.mark.soak),
        pytest.param("tied", "bfloat16", "10GB", marks=pytest.mark.soak),
        pytest.param("untied", "float32", "10GB", marks=pytest.mark.soak),
        pytest.param("untied", "bfloat16", "30KB", marks=pytest.mark.soak),
    ],
)
def test_a_saved_checkpoint_gives_the_same_logits_and_goes_back_as_it_came(
    reference, published, tmp_path, command, tied, dtype, shard
):
    case, folder = published(tied, dtype, shard)
    assert (folder / INDEX).exists() == (shard == "30KB")
    checkpoint = Checkpoint(folder)
    assert checkpoint.config == case.config
    assert checkpoint.dtype == dtype
    params = checkpoint.load(wanted(checkpoint.config))
    rows = reference.lay_out(case.config, case.samples, [[3, 0], [1, 2]])
    _, logits = reference.evaluate(case.model, params, rows)
    assert reference.relative_error(logits, reference.reference_logits(case)) < VALUE_BOUND
    out = tmp_path / "out"
    if (dtype, shard) == ("bfloat16", "30KB"):
        command(CONVERT, f"--checkpoint={folder}", f"--out={out}", code=0)
    else:
        export(open_model(str(folder)), out, shard_bytes=int(shard[:2]) * 1000)
    theirs, ours = tensors_of(folder), tensors_of(out)
    names = {reference.names.canonical_name(name): name for name in theirs}
    names.pop("lm_head.weight", None) if tied == "tied" else None
    assert ours.keys() == names.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[names[name]].dtype
        assert value.tobytes() == theirs[names[name]].tobytes(), name
    again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32
    ).eval()
    inputs = case.reference.inputs(case.samples[1:2])
    banned = list(SpecialIds.of(transformers.AutoTokenizer.from_pretrained(out)).never_sampled)
    told = {"max_new_tokens": 64, "do_sample": False, "suppress_tokens": banned}
    case.reference.model.generation_config.eos_token_id = None
    again.generation_config.eos_token_id = None
    case.reference.model.model.rope_deltas = None
    expected = case.reference.model.generate(**inputs, **told)
    assert expected.shape[1] == inputs["input_ids"].shape[1] + 64
    assert torch.equal(again.generate(**inputs, **told), expected)


def tensors_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_each_leaf_lands_in_its_sharding_and_dtype(published):
    case, folder = published()
    whole = Checkpoint(folder).load(wanted(case.config))
    split = Checkpoint(folder).load(wanted(case.config, "bfloat16", data=1, fsdp=2, tensor=2))
    target = wanted(case.config, "bfloat16", data=1, fsdp=2, tensor=2)

    def check(leaf, want, plain):
        assert leaf.sharding == want.sharding
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(plain.astype(jnp.bfloat16)))

    jax.tree.map(check, split, target, whole)
    kernel = split["language"]["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel.sharding, NamedSharding)
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


def test_some_leaves_alone(published):
    case, folder = published()
    like_all = wanted(case.config)
    some = Checkpoint(folder).load({"vision": like_all["vision"]})
    assert some.keys() == {"vision"}
    whole = Checkpoint(folder).load(like_all)
    jax.tree.map(np.testing.assert_array_equal, some["vision"], whole["vision"])


class TestFaults:
    """Each is one line that names the file and the tensor."""

    @pytest.fixture
    def copy(self, published, tmp_path):
        _, folder = published()
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    def change(self, folder, edit):
        tensors = load_file(folder / SINGLE)
        edit(tensors)
        save_file(tensors, folder / SINGLE)

    def refused(self, folder, match):
        with pytest.raises(WeightsError, match=match) as error:
            Checkpoint(folder).load({})
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)

    def test_missing_unexpected_and_misshapen_tensors(self, copy):
        def edit(tensors):
            first = next(name for name in tensors if name.endswith("input_layernorm.weight"))
            del tensors[first]
            tensors["model.extra"] = np.zeros(3, np.float32)
            head = next(name for name in tensors if name.endswith("lm_head.weight"))
            tensors[head] = tensors[head][:-1]

        self.change(copy, edit)
        self.refused(copy, r"lm_head.weight: expected shape \(576, 24\), found \(575, 24\)")
        self.refused(copy, r"missing model\.layers\.\d+\.input_layernorm\.weight \(24,\)")
        self.refused(copy, r"unexpected model\.extra")

    @pytest.mark.parametrize(
        ("dtype", "found"), [("int32", "I32"), ("float64", "F64"), ("float8_e4m3fn", "F8_E4M3")]
    )
    def test_a_dtype_that_is_none(self, copy, dtype, found):
        def edit(tensors):
            name = next(iter(tensors))
            tensors[name] = tensors[name].astype(dtype)

        self.change(copy, edit)
        self.refused(copy, rf"expected dtype F32, BF16, F16, found {found}; save it as one of")

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_a_tensor_that_is_not_finite(self, published, tmp_path, dtype, value):
        case, folder = published("untied", dtype)
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        name = next(n for n in load_file(copy / SINGLE) if n.endswith("self_attn.v_proj.weight"))
        size = load_file(copy / SINGLE)[name].size

        def edit(tensors):
            tensors[name].reshape(-1)[[1, -1]] = value

        self.change(copy, edit)
        with pytest.raises(WeightsError) as error:
            Checkpoint(copy).load(wanted(case.config))
        message = str(error.value)
        assert message.startswith(
            f"{copy / SINGLE}: {name}: expected finite values, found 2 of {size} that are not; "
        )
        assert "\n" not in message
        # What is not asked for is not read.
        Checkpoint(copy).load({"vision": wanted(case.config)["vision"]})

    def test_a_truncated_file(self, copy):
        data = (copy / SINGLE).read_bytes()
        (copy / SINGLE).write_bytes(data[:-10])
        self.refused(copy, r"model\.safetensors: .*expected a whole safetensors file")

    def test_a_file_the_index_names_and_is_not_there(self, published, tmp_path):
        _, folder = published("untied", "float32", "30KB")
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        first = min(copy.glob("*.safetensors"))
        first.unlink()
        self.refused(copy, rf"{first.name}: ")

    def test_no_tensors(self, copy):
        (copy / SINGLE).unlink()
        self.refused(copy, r"expected model\.safetensors or .*index\.json, .* found neither")

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_a_config_that_is_none(self, copy, text):
        (copy / CONFIG).write_text(text)
        self.refused(copy, r"config\.json: .*a JSON object")

    @pytest.mark.parametrize(
        ("changes", "found"),
        [
            ({"model_type": "llama"}, r"model_type: expected one of qwen2_5_vl, found 'llama'"),
            ({"vision_config": None}, r"vision_config: missing"),
            ({"vision_config": 3}, r"'int' object"),
            (
                {"hidden_size": "wide", "text_config": None},
                r"; expected Qwen2\.5-VL's, copy it anew",
            ),
        ],
    )
    def test_a_config_of_something_else(self, copy, changes, found):
        described = json.loads((copy / CONFIG).read_text())
        text = described.get("text_config") or {}
        (copy / CONFIG).write_text(json.dumps(text | described | changes))
        with pytest.raises(ConfigError, match=found) as error:
            Checkpoint(copy)
        assert str(error.value).startswith(f"{copy / CONFIG}: ")
        assert "\n" not in str(error.value)

    def test_an_index_without_a_map(self, copy):
        (copy / SINGLE).unlink()
        (copy / INDEX).write_text("{}")
        self.refused(copy, r"index\.json: expected a weight_map")

    def test_no_folder(self, tmp_path):
        with pytest.raises(WeightsError, match=r"nowhere: expected .*, found no such folder"):
            Checkpoint(tmp_path / "nowhere")

    def test_a_tied_head_that_is_not_the_embedding(self, published, tmp_path):
        case, folder = published("tied")
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        name = next(n for n in load_file(copy / SINGLE) if n.endswith("embed_tokens.weight"))

        def add(scale):
            def edit(tensors):
                tensors["lm_head.weight"] = tensors[name] * scale

            return edit

        self.change(copy, add(1))
        Checkpoint(copy).load(wanted(case.config))
        self.change(copy, add(2))
        with pytest.raises(WeightsError, match=r"lm_head\.weight: expected model\.embed_tokens"):
            Checkpoint(copy).load(wanted(case.config))


def test_shards_hold_what_they_may_and_the_index_says_where(published, tmp_path):
    case, folder = published()
    params = Checkpoint(folder).load(wanted(case.config))
    save_tensors(tmp_path, params, case.config, dtype="float32", shard_bytes=40_000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)
    ]
    total = 0
    for file in files:
        sizes = {name: value.nbytes for name, value in load_file(file).items()}
        total += sum(sizes.values())
        assert sum(sizes.values()) <= 40_000 or len(sizes) == 1
        assert all(index["weight_map"][name] == file.name for name in sizes)
        with safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("bfloat16", 3.4e38)])
def test_what_overflows_in_an_exports_dtype_is_named_and_not_written(
    published, tmp_path, dtype, value
):
    _, folder = published()
    loaded = open_model(str(folder))
    bias = loaded.params["language"]["layers"]["q"]["bias"]
    loaded.params["language"]["layers"]["q"]["bias"] = bias.at[1, 0, :2].set(value)
    with pytest.raises(DataError) as error:
        export(loaded, tmp_path / "out", dtype=dtype)
    assert str(error.value).startswith(
        f"model.layers.1.self_attn.q_proj.bias: expected finite values as {dtype}, found 2 of "
        f"{bias[0].size} that are not; "
    )
    assert not list(tmp_path.iterdir())
    export(loaded, tmp_path / "out", dtype="float32")


def test_tensors_of_two_dtypes_are_loaded_unrounded_and_go_back_as_they_came(
    published, tmp_path, monkeypatch
):
    """Split over all devices."""
    monkeypatch.setattr("morer1_jax.run.mesh.jax.devices", jax.local_devices)
    _, source = published("untied", "bfloat16")
    folder = shutil.copytree(source, tmp_path / "mixed")
    tensors = load_file(folder / SINGLE)
    (name,) = [name for name in tensors if name.endswith(("model.norm.weight",))]
    tensors[name] = np.full(tensors[name].shape, 1.001, np.float32)
    save_file(tensors, folder / SINGLE)
    assert Checkpoint(folder).dtype == "float32"
    export(open_model(str(folder)), tmp_path / "out")
    theirs, ours = tensors_of(folder), tensors_of(tmp_path / "out")
    assert {str(value.dtype) for value in ours.values()} == {"bfloat16", "float32"}
    for ours_name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[ours_name], ours_name)


def test_float16_is_computed_in_float32_and_goes_back_as_it_came(reference, published, tmp_path):
    """Of a model whose activations float16 could not hold; the config's word is not asked."""
    _, source = published("untied", "float16")
    folder = shutil.copytree(source, tmp_path / "half")
    tensors = load_file(folder / SINGLE)
    for name, value in tensors.items():
        if "language_model.layers" in name or name.startswith("model.layers"):
            # What is lost below at last is lost to both: some become less than a normal number.
            factor = {"up_proj": 3000, "gate_proj": 30, "down_proj": 1 / 90000}
            scale = next((by for part, by in factor.items() if part in name), 1)
            tensors[name] = (value.astype(np.float32) * scale).astype(np.float16)
    assert all(np.isfinite(value).all() for value in tensors.values())
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    case, _ = published("untied")
    given = reference.Reference(case.config)
    given.model = theirs
    half = dataclasses.replace(case, reference=given)
    loaded = open_model(str(folder))
    assert loaded.model.runtime.dtype == loaded.model.runtime.param_dtype == "float32"
    rows = reference.lay_out(case.config, case.samples, [[3, 0], [1, 2]])
    _, logits = reference.evaluate(loaded.model, loaded.params, rows)
    assert reference.relative_error(logits, reference.reference_logits(half)) < VALUE_BOUND
    export(loaded, tmp_path / "out")
    ours, before = tensors_of(tmp_path / "out"), tensors_of(folder)
    assert {str(value.dtype) for value in ours.values()} == {"float16"}
    assert {name: v.tobytes() for name, v in ours.items()} == {
        name: v.tobytes() for name, v in before.items()
    }


@pytest.mark.parametrize(
    ("said", "held", "dtype"),
    [
        ("float16", {"bfloat16"}, "bfloat16"),
        ("bfloat16", {"float16"}, "float32"),
        ("float16", {"float16", "bfloat16"}, "float32"),
        ("float16", {"float16", "float32"}, "float32"),
    ],
)
def test_what_tensors_have_decides_and_is_never_float16(published, tmp_path, said, held, dtype):
    _, source = published("untied", "float32")
    folder = shutil.copytree(source, tmp_path / "folder")
    kinds = sorted(held)
    tensors = {
        name: value.astype(kinds[i % len(kinds)])
        for i, (name, value) in enumerate(load_file(folder / SINGLE).items())
    }
    save_file(tensors, folder / SINGLE)
    described = json.loads((folder / CONFIG).read_text())
    for key in ("dtype", "torch_dtype"):
        (folder / CONFIG).write_text(json.dumps(described | {key: said}))
        checkpoint = Checkpoint(folder)
        assert {*checkpoint.dtypes.values()} == held
        assert checkpoint.dtype == dtype
        assert open_model(str(folder)).model.runtime.dtype == dtype


def test_a_buckets_checkpoint_can_be_asked_and_exported(published, bucket, tmp_path):
    """No file of tensors is copied to this machine."""
    _, folder = published("untied", "float32", "30KB")
    there = stores.absolute(f"{bucket}/asked")
    stores.copy({there / path.name: path for path in folder.iterdir()})
    loaded = open_model(f"{bucket}/asked")
    assert loaded.policy.allowed.any()
    export(loaded, tmp_path / "out")
    copied = {path.name for path in loaded.checkpoint.local_files.iterdir()}
    assert {CONFIG, "tokenizer.json"} <= copied
    assert not any(name.endswith(".safetensors") for name in copied)
    assert tensors_of(tmp_path / "out").keys() == tensors_of(folder).keys()


def test_a_tokenizer_larger_than_the_embedding_is_named(published, tmp_path):
    _, source = published("untied", "float32")
    folder = shutil.copytree(source, tmp_path / "grown")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more {k}>" for k in range(100)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(WeightsError, match=r"tokenizer's 6\d\d tokens, found 576 rows"):
        open_model(str(folder)).policy  # noqa: B018
