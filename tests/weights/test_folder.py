"""Folders of others: read as `transformers` does, or refused in a line that says what to do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.errors import ConfigError, WeightsError
from morer1_jax.run.setup import image_config, open_run, open_setup
from morer1_jax.serve.export import export
from morer1_jax.serve.loaded import TASK, open_model
from morer1_jax.weights import folder as weights
from morer1_jax.weights.names import canonical_name
from morer1_jax.weights.published import CONFIG, INDEX, SINGLE, Checkpoint

pytestmark = pytest.mark.usefixtures("quick_compiles", "one_device")

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


@pytest.fixture
def copy(published, tmp_path):
    return Path(shutil.copytree(published()[1], tmp_path / "copy"))


def change(folder, edit):
    """Replaces a folder's tensors by what `edit` makes of them."""
    save_file(edit(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})


def same_as_transformers(folder):
    """The tensors that we would load are those that `transformers` does."""
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    expected = {
        canonical_name(name): value.detach().numpy() for name, value in theirs.named_parameters()
    }
    checkpoint = Checkpoint(folder)
    found = {}
    for ours, stored in checkpoint._stored.items():
        if ours in checkpoint.slices:
            found[ours] = load_file(stored.file)[stored.name]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], name)


def refused(folder, match, error=WeightsError):
    with pytest.raises(error, match=match) as found:
        open_model(str(folder))
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 1500
    return str(found.value)


class TestTensors:
    def test_the_single_file_before_a_stale_index(self, copy):
        places = {"model.norm.weight": "model-00001-of-00002.safetensors"}
        (copy / INDEX).write_text(json.dumps({"weight_map": places}))
        same_as_transformers(copy)

    def test_rotary_frequencies_of_old_saves_are_passed_over(self, copy):
        rotary = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3)]
        rotary += ["model.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq"]
        change(copy, lambda t: t | {name: np.ones(4, np.float32) for name in rotary})
        same_as_transformers(copy)

    def test_a_model_saved_without_its_head(self, published, tmp_path):
        copy = Path(shutil.copytree(published("tied")[1], tmp_path / "copy"))

        def inner(name):
            name = canonical_name(name)
            return name if name.startswith("visual.") else name.replace("model.", "language_model.")

        change(copy, lambda t: {inner(n): v for n, v in t.items() if n != "lm_head.weight"})
        assert "language_model.norm.weight" in load_file(copy / SINGLE)
        same_as_transformers(copy)

    def test_a_tensor_under_two_names(self, copy):
        name, other = "model.norm.weight", "model.language_model.norm.weight"

        def both(tensors):
            norm = tensors[name] if name in tensors else tensors[other]
            return tensors | {name: norm, other: 2 * norm}

        change(copy, both)
        found = refused(copy, r"are one tensor under two names; remove the one that is stale")
        assert f"{copy / SINGLE}: " in found
        assert name in found
        assert other in found

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
    def test_a_foreign_prefix_is_named_once(self, copy, prefix):
        change(copy, lambda t: {prefix + name: value for name, value in t.items()})
        found = refused(copy, "names of tensors: expected no prefix")
        assert found.count(prefix) == 1
        assert len(found.removeprefix(str(copy))) < 200

    def test_of_very_many_faults_the_first_and_their_number(self, copy):
        change(copy, lambda t: {f"{name}.x": value for name, value in t.items()})
        tensors = len(load_file(copy / SINGLE))
        found = refused(copy, r"missing .* and \d+ more")
        assert found.count("; ") == 12 - 1
        assert f"and {2 * tensors - 12} more" in found

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "m-q4.gguf"])
    def test_tensors_in_another_form_are_named(self, copy, name):
        (copy / SINGLE).rename(copy / name)
        (copy / "training_args.bin").write_bytes(b"")
        refused(copy, rf"expected .*, found only {name}, which is not read")


class TestAdapters:
    def test_an_adapter_alone(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Q"}')
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        found = refused(
            tmp_path, "expected a whole model, found .*, so an adapter of Qwen/Q; merge it"
        )
        assert "merge_and_unload" in found

    def test_an_adapter_beside_a_model(self, copy):
        (copy / "adapter_config.json").write_text("{}")
        refused(copy, r"an adapter beside a model; .* or remove adapter_config\.json")


def test_the_file_that_transformers_5_saves_is_read_before_the_older_one(copy):
    size = {"shortest_edge": 800, "longest_edge": 8000}
    nested = {"size": size, "image_mean": [0.5, 0.4, 0.3]}
    (copy / PROCESSOR).write_text(json.dumps({"image_processor": nested}))
    (copy / PREPROCESSOR).write_text(json.dumps({"min_pixels": 700, "max_pixels": 7000}))
    images = open_model(str(copy)).images
    assert (images.min_pixels, images.max_pixels) == (800, 8000)
    assert images.image_mean == (0.5, 0.4, 0.3)
    # The tower's own, which no file here says.
    assert images.patch_size == 4


def test_training_has_the_folder_s_mean_and_says_where_limits_differ(
    copy, tmp_path, request, capsys, small_world
):
    found = {"min_pixels": 3136, "max_pixels": 7000, "image_std": [0.2, 0.3, 0.4]}
    (copy / PREPROCESSOR).write_text(json.dumps(found))
    config = read_config(request.config.rootpath / "tests" / "configs" / "tiny.py")
    config.model.path = str(copy)
    config.data.update(min_pixels=3136, max_pixels=6400)
    setup = open_setup(settings(config), tmp_path / "run")
    vision = setup.checkpoint.config.vision
    images = image_config(setup.settings.data, vision, setup.checkpoint)
    assert images.image_std == (0.2, 0.3, 0.4)
    assert (images.min_pixels, images.max_pixels) == (3136, 6400)
    assert images.crop_margin == config.data.crop_margin
    # Who only asks the model, as `predict --json` does, is told nothing of it.
    assert capsys.readouterr().out == ""
    config.data.update(
        folder=str(small_world), windows=400, prompt_length=900, completion_length=300
    )
    config.mesh.update(data=1, fsdp=1, tensor=-1)
    open_run(open_setup(settings(config), tmp_path / "run"), reasoning_needed=True)
    said = "data.max_pixels: 6400, though the processor of model.path has 7000"
    assert [line for line in capsys.readouterr().out.splitlines() if "pixels" in line] == [said]


def test_limits_that_are_none_are_refused(copy):
    (copy / PREPROCESSOR).write_text(json.dumps({"size": 448}))
    refused(copy, "size: expected least and most pixels .* found 448")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("crop_margin", "0.1", "a number, at least 0"),
        ("crop_margin", -0.1, "a number, at least 0"),
        ("crop_margin", float("nan"), "a number, at least 0"),
        ("crop_least", True, "a whole number, at least 1"),
        ("crop_least", 2.5, "a whole number, at least 1"),
        ("completion_length", [40], "a whole number, at least 1"),
    ],
)
def test_what_our_own_file_says_must_be_of_its_kind(copy, key, value, expected):
    (copy / TASK).write_text(json.dumps({key: value}))
    found = refused(copy, f"{key}: expected {expected}, found .*; copy it anew")
    assert found.startswith(f"{copy / TASK}: ")


class TestPlaces:
    @pytest.fixture(autouse=True)
    def no_hub(self, monkeypatch, tmp_path):
        def looked(*args, **_):
            raise AssertionError(f"looked for {args} on the hub")

        monkeypatch.setattr(weights, "snapshot_download", looked)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "demo").mkdir(parents=True)

    @pytest.mark.parametrize(
        ("path", "found"),
        [
            ("./qwen", "no such folder"),
            ("runs/dmeo", "no such folder; is it runs/demo?"),
            ("run/demo", "no such folder; is it runs/demo?"),
            ("qwen/model.safetensors", "no such folder"),
            ("qwen/exported.zip", "no such folder"),
        ],
    )
    def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(self, path, found):
        for look in (open_model, Checkpoint):
            with pytest.raises((WeightsError, ConfigError)) as error:
                look(path)
            assert str(error.value).startswith(f"{path}: expected ")
            assert str(error.value).endswith(f", found {found}")

    @pytest.mark.parametrize(
        ("path", "here"), [("run/demo", "runs/demo"), ("runs/Qwen2.5-VL-3B", "runs")]
    )
    def test_why_it_is_not_is_said_and_how_to_have_it(self, path, here):
        for look in (open_model, Checkpoint):
            with pytest.raises(WeightsError) as error:
                look(path)
            assert (
                f"or a name on the hub (not looked for there, as {here} is on this machine; if it "
                f"is meant, hf download {path}, and name the folder that it prints), found no such "
            ) in str(error.value)

    @pytest.mark.parametrize("path", ["./qwen", "qwen/model.safetensors", "runs", "a/b/c"])
    def test_of_what_is_no_name_of_the_hub_nothing_is_said(self, path):
        for look in (open_model, Checkpoint):
            with pytest.raises((WeightsError, ConfigError)) as error:
                look(path)
            assert "hf download" not in str(error.value)

    def test_a_name_of_the_hub_is(self):
        for look in (open_model, Checkpoint):
            with pytest.raises(AssertionError, match=r"Qwen/Qwen2\.5-VL-3B-Instruct"):
                look("Qwen/Qwen2.5-VL-3B-Instruct")


def test_a_config_that_leaves_the_ids_out_has_the_defaults(copy):
    described = json.loads((copy / CONFIG).read_text())
    for key in ("image_token_id", "video_token_id", "vision_start_token_id"):
        del described[key]
    (copy / CONFIG).write_text(json.dumps(described))
    theirs = transformers.AutoConfig.from_pretrained(copy)
    ours = Checkpoint(copy).config
    assert ours.image_token_id == theirs.image_token_id == 151655
    assert ours.video_token_id == theirs.video_token_id == 151656


IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def run_of(folder, workdir, request, small_world):
    config = read_config(request.config.rootpath / "tests" / "configs" / "tiny.py")
    config.model.path, config.data.folder = str(folder), str(small_world)
    config.data.update(windows=400, prompt_length=900, completion_length=300)
    config.mesh.update(data=1, fsdp=1, tensor=-1)
    return open_run(open_setup(settings(config), workdir), reasoning_needed=True)


@pytest.mark.parametrize("key", IDS)
def test_ids_that_are_not_the_tokenizer_s_are_refused_wherever_the_folder_is_used(
    copy, key, tmp_path, request, small_world
):
    described = json.loads((copy / CONFIG).read_text())
    expected, described[key] = described[key], 7
    (copy / CONFIG).write_text(json.dumps(described))
    problem = f"{copy / CONFIG}: {key}: expected the tokenizer's {expected}, found 7; take"
    for use in (
        lambda: open_model(str(copy)),
        lambda: run_of(copy, tmp_path / "run", request, small_world),
    ):
        with pytest.raises(WeightsError) as error:
            use()
        assert str(error.value).startswith(problem)


def test_ids_that_are_left_out_are_the_tokenizer_s(copy, tmp_path, request, small_world):
    described = json.loads((copy / CONFIG).read_text())
    expected = {key: described.pop(key) for key in IDS}
    (copy / CONFIG).write_text(json.dumps(described))
    loaded = open_model(str(copy))
    run = run_of(copy, tmp_path / "run", request, small_world)
    export(loaded, tmp_path / "out")
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    for key, value in expected.items():
        assert getattr(loaded.model.config, key) == value
        assert getattr(run.trainee.policy.model.config, key) == value
        assert written[key] == value
