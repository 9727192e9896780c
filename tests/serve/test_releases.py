"""An exported folder in the releases of `transformers` that people have: it loads, sees our pixels,
writes our prompt and by default generates our greedy answer."""

import dataclasses
import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
import transformers
from packaging import version

from morer1_jax.data.images import ImageReader
from morer1_jax.model.special import SpecialIds
from morer1_jax.run.batch_sampler import BatchSampler
from morer1_jax.serve.export import export
from morer1_jax.serve.loaded import TASK, open_model
from morer1_jax.task import more
from morer1_jax.task.photos import PhotoFiles, photo_sizes
from morer1_jax.task.prompt import question

pytestmark = pytest.mark.usefixtures("quick_compiles")

# The first with Qwen2.5-VL's flat config in common use, the last of 4, two of 5.
RELEASES = ("4.51.3", "4.57.6", "5.4.0", "5.24.0")
# A folder of environments that are made once and used again, each in `transformers-<release>`.
ENVIRONMENTS = "MORER1_JAX_TRANSFORMERS"
LENGTH = 24
# As Qwen2.5-VL's own, without its ids of images and videos.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>"
    "system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>"
    "assistant\n{% endif %}"
)
PLAIN_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def save(reference, name, tokenizer, rows, folder):
    """Saves a random model with a tokenizer, as the installed release of `transformers` does."""
    special, config = SpecialIds.of(tokenizer), reference.CONFIGS[name]
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, vocab_size=rows),
        image_token_id=special.image,
        video_token_id=special.video,
        vision_start_token_id=special.vision_start,
        vision_end_token_id=special.vision_end,
    )
    reference.Reference(config).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return config


def edit(path, **changes):
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


LIMITS = {"min_pixels": 24 * 24, "max_pixels": 64 * 64}
SIZE = {"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]}


def newest(reference, small_tokenizer, folder):
    """Nested config, one file for all processors with another mean, a template not ours."""
    save(reference, "odd heads, untied, periodic", small_tokenizer, 576, folder)
    images = {"image_processor_type": "Qwen2VLImageProcessor", "size": SIZE, "patch_size": 4}
    images |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    edit(
        folder / "processor_config.json",
        image_processor=images,
        processor_class="Qwen2_5_VLProcessor",
    )
    edit(folder / "preprocessor_config.json", min_pixels=64, max_pixels=128)
    (folder / "chat_template.jinja").write_text(PLAIN_TEMPLATE)


def oldest(reference, tokenizer, folder):
    """The flat form of first releases, with what is left over of others' work."""
    rows = -(-len(tokenizer) // 64) * 64
    config = save(reference, "odd kv heads, tied, aperiodic", tokenizer, rows, folder)
    left = {"use_cache": False, "torch_dtype": "bfloat16", "bos_token_id": tokenizer.pad_token_id}
    left["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").unlink()
    edit(folder / "config.json", **config.to_hf(), **left)
    edit(folder / "preprocessor_config.json", **LIMITS, patch_size=2)
    edit(
        folder / "generation_config.json",
        do_sample=True,
        repetition_penalty=1.5,
        temperature=0.7,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", chat_template=TEMPLATE)
    edit(folder / "chat_template.json", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def exported(reference, small_tokenizer, small_world, pixels, tmp_path_factory):
    """What we make of the exported folders, by folder, and the facts asked about."""
    # The older one is only written here, and asked with all tokens.
    makers = ((oldest, small_tokenizer, False), (newest, small_tokenizer, True))
    return make_exported(
        makers, reference, small_world, pixels, tmp_path_factory.mktemp("exported")
    )


@pytest.fixture(scope="module")
def exported_with_all_tokens(reference, qwen_tokenizer, small_world, pixels, tmp_path_factory):
    """As `exported`, of Qwen's own tokenizer."""
    makers = ((oldest, qwen_tokenizer, True),)
    return make_exported(
        makers, reference, small_world, pixels, tmp_path_factory.mktemp("all_tokens")
    )


@pytest.fixture(scope="module", autouse=True)
def on_one_device(devices):
    with devices(1):
        yield


def make_exported(makers, reference, small_world, pixels, base):
    """Exports what `makers` (what saves a folder, a tokenizer, whether it is asked) give."""
    ontology = more.read_ontology(small_world)
    facts = more.read_split(small_world, "test", ontology)[:2]
    sizes = photo_sizes(facts, PhotoFiles(small_world))
    asked, ours = [], {}
    for make, tokenizer, asks in makers:
        source, out = base / make.__name__, base / f"{make.__name__}-out"
        make(reference, tokenizer, source)
        edit(source / TASK, completion_length=LENGTH)
        more.write_ontology(source, ontology)
        export(open_model(str(source)), out)
        if not asks:
            continue
        loaded = open_model(str(source))
        reader = loaded.reader(PhotoFiles(small_world), facts, sizes)
        sampler = BatchSampler(loaded.policy, reader, batch=2, group=1, temperature=0.0)
        drawn = [rollout for _, rollout in sampler.sample(loaded.params, facts, "ask")]
        samples = [reader.read(fact) for fact in facts]
        ours[str(out)] = [
            {
                "ids": sample.prompt,
                "pixels": pixels.values(sample.images, loaded.images),
                "grids": np.array(sample.images.grids),
                "answer": rollout.tokens[0][rollout.mask[0]],
            }
            for sample, rollout in zip(samples, drawn, strict=True)
        ]
        reader = ImageReader(PhotoFiles(small_world), loaded.images)
    for number, fact in enumerate(facts):
        files = [str(base / f"{number}-{what}.png") for what in ("photo", "crop")]
        for image, file in zip(reader.pair(fact), files, strict=True):
            image.save(file)
        asked.append({"photo": files[0], "crop": files[1], "question": question(fact, ontology)})
    return ours, asked


def check(ours, found, release, pixels):
    """The same prompts, pixels and answers."""
    for folder, answers in ours.items():
        for number, expected in enumerate(answers):
            for key, value in expected.items():
                theirs = found[f"{folder}|{number}|{key}"]
                message = f"{release}: {key} of {Path(folder).name}, fact {number}"
                if key == "pixels":
                    pixels.assert_same(value, theirs, message)
                else:
                    np.testing.assert_array_equal(theirs, value, err_msg=message)


def test_the_installed_release_answers_as_we_do(exported, other_release, pixels):
    ours, asked = exported
    found = {}
    for folder in ours:
        for number, values in enumerate(other_release.ask(folder, asked)):
            found |= {f"{folder}|{number}|{key}": value for key, value in values.items()}
    check(ours, found, transformers.__version__, pixels)
    # More than a token or two of each, and not of one kind.
    answers = [expected["answer"] for several in ours.values() for expected in several]
    assert max(map(len, answers)) == LENGTH
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_what_is_written_is_for_all_releases(exported):
    base = Path(next(iter(exported[0]))).parent

    def read(name, file):
        return json.loads((base / name / file).read_text())

    for name, tied in (("newest-out", False), ("oldest-out", True)):
        config = read(name, "config.json")
        assert config["tie_word_embeddings"] is tied
        assert config["dtype"] == config["torch_dtype"] == "float32"
        assert version.parse(config["transformers_version"]) <= version.parse("4.57.2")
        assert config["vision_config"]["tokens_per_second"] == 1
        assert not {"quantization_config", "use_cache", "text_config"} & config.keys()
        generation = read(name, "generation_config.json")
        assert generation["do_sample"] is False
        assert generation["max_new_tokens"] == LENGTH
        assert not {"repetition_penalty", "temperature"} & generation.keys()
        described = read(name, "preprocessor_config.json")
        assert described["size"] == SIZE
        assert {key: described[key] for key in LIMITS} == LIMITS
        tokenizer = read(name, "tokenizer_config.json")
        assert tokenizer["chat_template"] == (base / name / "chat_template.jinja").read_text()
        assert not (base / name / "chat_template.json").exists()
    nested = read("newest-out", "processor_config.json")["image_processor"]
    assert {key: nested[key] for key in (*LIMITS, "size")} == LIMITS | {"size": SIZE}
    assert nested["image_mean"] == [0.5, 0.4, 0.3]
    # A template that writes our conversation is kept, another is not.
    assert read("newest-out", "tokenizer_config.json")["chat_template"] != PLAIN_TEMPLATE
    assert read("oldest-out", "tokenizer_config.json")["chat_template"] == TEMPLATE
    assert read("newest-out", "tokenizer_config.json")["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    assert read("oldest-out", "config.json")["bos_token_id"] is not None


def python_with(release, folder):
    """The Python of an environment with that release; made if it is not there."""
    path = folder / f"transformers-{release}"
    python = path / "bin" / "python"
    if not (path / "made").exists():
        shutil.rmtree(path, ignore_errors=True)
        venv.create(path, with_pip=True)
        packages = [f"transformers=={release}", "torch==2.13.0", "pillow", "jinja2", "numpy"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (path / "made").touch()
    return python


@pytest.mark.soak
@pytest.mark.parametrize("release", RELEASES)
def test_other_releases_answer_as_we_do(
    exported, exported_with_all_tokens, pixels, release, tmp_path, tmp_path_factory
):
    (ours, asked), (more_of_ours, _) = exported, exported_with_all_tokens
    ours = ours | more_of_ours
    given = os.environ.get(ENVIRONMENTS)
    python = python_with(release, Path(given) if given else tmp_path_factory.getbasetemp())
    (tmp_path / "job.json").write_text(json.dumps({"folders": list(ours), "facts": asked}))
    script = Path(__file__).parents[1] / "other_release.py"
    command = [python, script, tmp_path / "job.json", tmp_path / "found.npz"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{release}: {done.stderr[-4000:]}"
    found = np.load(tmp_path / "found.npz")
    assert str(found["release"]) == release
    check(ours, found, release, pixels)
