"""What was trained, published: `transformers` loads it, and it says the same."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.data.collate import Collator
from morer1_jax.data.images import ImageReader
from morer1_jax.data.shapes import Shape
from morer1_jax.errors import ConfigError, DataError, WeightsError
from morer1_jax.learn.trainable import ADAPTER
from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.scorer import embed_prompts
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.setup import open_run, open_setup
from morer1_jax.serve.export import export
from morer1_jax.serve.loaded import LABELS, TASK, open_model
from morer1_jax.task import more
from morer1_jax.task.photos import PhotoFiles, photo_sizes
from morer1_jax.task.prompt import student_prompt
from morer1_jax.train import train
from morer1_jax.weights.published import Checkpoint

pytestmark = pytest.mark.usefixtures("quick_compiles")

VALUE_BOUND = 2e-5


@pytest.fixture(scope="module", autouse=True)
def on_one_device(devices):
    with devices(1):
        yield


@pytest.fixture(scope="module")
def config(small_world, request):
    config = read_config(request.config.rootpath / "tests" / "configs" / "tiny.py")
    config.stages = "sft"
    config.data.folder = str(small_world)
    config.mesh.update(data=1, fsdp=1, tensor=-1)
    config.sft.update(steps=3, eval_every=3, save_every=3)
    return config


@pytest.fixture(scope="module")
def whole(small_run, tmp_path_factory):
    """(workdir, exported folder) of a run in which everything trained."""
    workdir = tmp_path_factory.mktemp("whole")
    shutil.copytree(small_run, workdir / "run")
    export(open_model(str(workdir / "run")), workdir / "out", shard_bytes=100_000)
    return workdir / "run", workdir / "out"


@pytest.fixture(scope="module")
def adapted(config, whole, tmp_path_factory):
    """As `whole`, of adapters trained on what that run exported."""
    workdir = tmp_path_factory.mktemp("adapted")
    config = config.copy_and_resolve_references()
    config.model.path = str(whole[1])
    config.tune.update(vision=0.0, merger=0.0)
    config.tune.lora.update(rank=2, alpha=8.0)
    train(config, workdir / "run")
    export(open_model(str(workdir / "run")), workdir / "out")
    return workdir / "run", workdir / "out"


@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_logits_of_the_export_are_our_own(request, small_world, pixels, kind):
    workdir, out = request.getfixturevalue(kind)
    loaded = open_model(str(workdir))
    ontology = more.read_ontology(small_world)
    facts = more.read_split(small_world, "test", ontology)[:3]
    reader = loaded.reader(
        PhotoFiles(small_world), facts, photo_sizes(facts, PhotoFiles(small_world))
    )
    shape = Shape(reader.limits.prompt, reader.limits.slots)
    batch = Collator.of(reader).prompts([reader.read(fact) for fact in facts], range(3), shape)
    model = loaded.model

    def logits(params, batch):
        def run(module):
            positions = jnp.moveaxis(batch.positions, 1, 0)
            attend = PackedCausal(batch.mask.astype(jnp.int32))
            return module.logits(module.forward(embed_prompts(module, batch), positions, attend))

        return model.apply({"params": params}, method=run)

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(logits)(loaded.params, batch))
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        out, attn_implementation="eager"
    ).eval()
    assert theirs.dtype == torch.float32
    for row, fact in enumerate(facts):
        sample = reader.read(fact)
        theirs.model.rope_deltas = None
        with torch.no_grad():
            expected = theirs(
                input_ids=torch.as_tensor(sample.prompt[None].astype(np.int64)),
                attention_mask=torch.ones(1, len(sample.prompt), dtype=torch.long),
                mm_token_type_ids=torch.as_tensor(
                    (sample.prompt == reader.special.image)[None].astype(np.int32)
                ),
                pixel_values=torch.as_tensor(pixels.values(sample.images, loaded.images)),
                image_grid_thw=torch.as_tensor(sample.images.grids),
            ).logits[0]
        expected = expected.numpy()
        error = np.abs(ours[row, : len(expected)] - expected).max() / np.abs(expected).max()
        assert error < VALUE_BOUND


def test_a_disk_without_room_for_the_tensors_is_named_before_any_is_written(
    whole, tmp_path, monkeypatch
):
    loaded = open_model(str(whole[0]))
    tensors = sum(x.size for x in jax.tree.leaves(loaded.params)) * 2
    free = types.SimpleNamespace(free=tensors - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(ConfigError, match=r"expected 0\.\d MB free, .*name another --out"):
        export(loaded, tmp_path / "out", dtype="bfloat16")
    assert not list(tmp_path.iterdir())
    # What a killed export has left makes room for the next.
    (left := tmp_path / ".out.tmp").mkdir()
    (left / "x").write_bytes(b"x")
    export(loaded, tmp_path / "out", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_adapters_trained_and_the_rest_is_as_it_was(adapted, whole, config):
    base, loaded = open_model(str(whole[1])), open_model(str(adapted[0]))
    layers = loaded.params["language"]["layers"]
    assert np.abs(layers["q"]["lora_b"]).max() > 0

    def check(path, value):
        ours = loaded.params
        for key in path:
            ours = ours[key.key]
        np.testing.assert_array_equal(np.asarray(ours, value.dtype), value)

    jax.tree_util.tree_map_with_path(check, base.params)
    merged = open_model(str(adapted[1])).params["language"]["layers"]["q"]["kernel"]
    assert np.abs(np.asarray(merged) - np.asarray(layers["q"]["kernel"])).max() > 1e-4
    saved = sum(p.stat().st_size for p in (adapted[0] / "sft").rglob("*") if p.is_file())
    everything = sum(p.stat().st_size for p in (whole[0] / "sft").rglob("*") if p.is_file())
    assert saved < everything / 4


def test_a_folder_says_how_it_is_to_be_asked(whole, config, small_world):
    out = whole[1]
    assert json.loads((out / TASK).read_text()) == {
        "crop_margin": config.data.crop_margin,
        "crop_least": config.data.crop_least,
        "completion_length": config.data.completion_length,
    }
    assert more.read_ontology(out) == more.read_ontology(small_world)
    loaded, trained = open_model(str(out)), open_model(str(whole[0]))
    assert loaded.images == trained.images
    assert loaded.completion == trained.completion
    assert {*loaded.dtypes.values()} == {"float32"}


def test_its_processor_gives_the_pixels_it_was_trained_on(whole, small_world, pixels):
    folder = str(whole[1])
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    loaded = open_model(folder)
    fact = more.read_split(small_world, "test", more.read_ontology(small_world))[0]
    reader = ImageReader(PhotoFiles(small_world), loaded.images)
    theirs = processor(images=list(reader.pair(fact)), return_tensors="np")
    ours = reader.patches(fact)
    pixels.assert_same(pixels.values(ours, loaded.images), theirs["pixel_values"])
    np.testing.assert_array_equal(theirs["image_grid_thw"], ours.grids)


def test_its_chat_template_writes_our_conversation(whole, small_world):
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole[1])
    ontology = more.read_ontology(small_world)
    fact = more.read_split(small_world, "test", ontology)[0]
    expected = student_prompt(fact, ontology)
    text = expected.split("<|vision_end|>")[-1].split("<|im_end|>")[0]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
    system = {"role": "system", "content": "You are a helpful assistant."}
    for messages in ([], [system]):
        messages = [*messages, {"role": "user", "content": content}]
        made = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert made == expected


def test_a_template_is_replaced_for_what_it_writes_only(whole, tmp_path, monkeypatch, capsys):
    """And not because it could not be tried."""
    loaded = open_model(str(whole[1]))
    export(loaded, tmp_path / "again")
    assert "replaced" not in capsys.readouterr().out

    def without_jinja(*args, **more):
        raise ImportError("no jinja2")

    monkeypatch.setattr(type(loaded.tokenizer), "apply_chat_template", without_jinja)
    with pytest.raises(ImportError, match="no jinja2"):
        export(loaded, tmp_path / "untried")
    assert "replaced" not in capsys.readouterr().out


def test_its_generation_ends_with_the_turn(whole):
    generation = transformers.GenerationConfig.from_pretrained(whole[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole[1])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generation.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == generation.pad_token_id
    text = transformers.AutoConfig.from_pretrained(whole[1]).text_config
    assert (text.bos_token_id, text.eos_token_id) == (None, generation.eos_token_id[0])


def test_an_export_never_overwrites(whole):
    with pytest.raises(FileExistsError):
        export(open_model(str(whole[1])), whole[1])


def opened(config, folder):
    return open_run(open_setup(settings(config), folder / "run"), reasoning_needed=True)


def test_the_sizes_are_the_checkpoints(config, whole, tmp_path):
    changed = config.copy_and_resolve_references()
    changed.model.path = str(whole[1])
    changed.model.text.update(intermediate_size=49, tie_word_embeddings=False)
    changed.model.vision.update(depth=4, patch_size=2)
    run = opened(changed, tmp_path)
    assert run.trainee.policy.model.config == open_model(str(whole[1])).model.config
    assert run.images.patch_size == config.model.vision.patch_size


def test_a_base_is_not_rounded_by_the_way(config, whole, tmp_path):
    changed = config.copy_and_resolve_references()
    changed.model.path = str(whole[1])
    changed.tune.frozen_dtype = "bfloat16"
    with pytest.raises(ConfigError, match=r"tune\.frozen_dtype: expected 'float32', found"):
        train(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_model_at_the_same_place_is_refused(config, whole, tmp_path):
    folder = tmp_path / "base"
    export(open_model(str(whole[1])), folder)
    changed = config.copy_and_resolve_references()
    changed.model.path = str(folder)
    opened(changed, tmp_path)
    moved = folder.rename(tmp_path / "moved")
    changed.model.path = str(moved)
    opened(changed, tmp_path)
    tensors = load_file(moved / "model.safetensors")
    save_file({name: 1.5 * value for name, value in tensors.items()}, moved / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.path changed since the run began"):
        opened(changed, tmp_path)


def test_a_small_change_of_a_rounded_base_is_in_a_float32_export(adapted, tmp_path):
    """What an adapter adds is often less than a rounding of the kernel it is added to."""
    loaded = open_model(str(adapted[0]))

    def held(path, leaf):
        return leaf if path[-1].key in ADAPTER else leaf.astype(jnp.bfloat16)

    loaded.params = jax.tree_util.tree_map_with_path(held, loaded.params)
    layer = loaded.params["language"]["layers"]["q"]
    layer["lora_b"] = layer["lora_b"] * 0.02
    export(loaded, tmp_path / "out", dtype="float32")
    exported = open_model(str(tmp_path / "out")).params
    merged = np.asarray(exported["language"]["layers"]["q"]["kernel"])
    kernel, a, b = (np.asarray(layer[k], np.float64) for k in ("kernel", "lora_a", "lora_b"))
    scale = loaded.model.lora.scale
    added = scale * np.einsum("ldr,lrhe->ldhe", a, b)
    assert np.abs(added).max() < 2e-3
    np.testing.assert_allclose(merged - kernel, added, atol=1e-7)


def test_a_folder_without_labels_says_how_to_give_them(whole, tmp_path):
    folder = tmp_path / "bare"
    export(open_model(str(whole[1])), folder)
    (folder / LABELS).unlink()
    loaded = open_model(str(folder))
    with pytest.raises(
        ConfigError, match=r"expected a file rel2id\.json, found none; name one with --lab"
    ):
        loaded.policy  # noqa: B018
    assert "params" not in vars(loaded)  # No tensor was read for that.
    assert open_model(str(folder), labels=whole[1] / LABELS).policy.ontology


def test_a_tokenizer_that_is_gone_is_named_before_a_tensor_is_read(whole, tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("tensors were read")

    monkeypatch.setattr(Checkpoint, "load", read)
    monkeypatch.setattr(Checkpointer, "restore_best", read)
    published = shutil.copytree(whole[1], tmp_path / "published")
    (published / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=rf"^{published}: no tokenizer: none of tokenizer\.json, "):
        export(open_model(str(published)), tmp_path / "out")
    run = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(WeightsError, match=rf"^{run / 'tokenizer'}: .* found no such folder; copy"):
        open_model(str(run))
    assert not (run / "tokenizer").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "path", "found"),
    [
        ("{", "run/sft", "expected a JSON object, found .*; copy it anew"),
        ("{", "run", ".*expected a JSON object"),
        ("3", "run", "expected a JSON object, found int"),
        ('{"stages": "sft"}', "run/sft", r"config\.\w+: the key is missing"),
    ],
)
def test_a_runs_config_that_is_none_is_named(tmp_path, text, path, found):
    (tmp_path / "run" / "sft" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises((ConfigError, WeightsError), match=rf"run/config\.json: {found}") as error:
        open_model(str(tmp_path / path))
    assert "\n" not in str(error.value)


def test_a_run_that_trained_nothing(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ConfigError, match="found one that has trained nothing yet"):
        open_model(str(tmp_path))
