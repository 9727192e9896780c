"""Eight virtual CPU devices for every test, and what the tests of several folders share."""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# Programs compile on one thread, because each core has its worker. Before jaxlib 0.11, of whose
# releases some end at a flag that they do not know, fused loops compile the older way of XLA's, in
# half the time. The long counts are compiled as users' programs are.
QUICK = ["--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")


def pytest_configure(config):
    flags = ["--xla_force_host_platform_device_count=8", *([] if _soak(config) else QUICK)]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    # Read when the client of buckets is imported: else it asks the real service, with what
    # credentials the machine has, what kind of bucket a test's is.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    # Compiled programs are shared by the tests, by the workers and by the commands that they start,
    # but nothing is kept from one run of the tests to the next.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-of-tests-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        # Where in Python each operation of a program comes from takes long to write down.
        os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"


def _soak(config):
    return config.option.markexpr == "soak"


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_xdist_auto_num_workers(config):
    """One worker a core; the long counts alone, because they fill memory and watch the clock."""
    return 0 if _soak(config) else min(os.cpu_count() or 1, 8)


# Files that take longest, so that no worker is left with one of them at the end.
LONGEST = (
    "hosts/test_runs.py",
    "hosts/test_join.py",
    "test_resume.py",
    "test_predict.py",
    "test_published.py",
    "test_steady.py",
    "tools/bench/test_ours.py",
    "test_meshes.py",
    "learn/test_grpo_update.py",
    "model/test_scorer.py",
    "model/test_parity.py",
    "teacher/test_writer_killed.py",
    "learn/test_sft.py",
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first; the others stay in their order."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_ignore_collect(collection_path):
    """Leaves out, where there is no PyTorch (`.ci/versions`), the files that compare with it."""
    if importlib.util.find_spec("torch") is None and collection_path.suffix == ".py":
        text = collection_path.read_text(encoding="utf-8")
        return (
            True if re.search(r"^(import|from) (torch|bench\.peers)", text, re.MULTILINE) else None
        )
    return None


@contextlib.contextmanager
def _quick():
    import jax

    name = "jax_disable_most_optimizations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")
        before = jax.config.values[name]
        jax.config.update(name, True)
        try:
            yield
        finally:
            jax.config.update(name, before)


@pytest.fixture(scope="module")
def quick_compiles():
    """Hardly optimised programs, here and in processes started from here.

    For a file whose tests run every program a few times on a tiny model, so that compiling is most
    of their time, and that check what is done rather than to how many digits.
    """
    with _quick():
        yield


@pytest.fixture(scope="session")
def devices():
    """`with devices(count)`: meshes are made of so many of the devices.

    For what does not depend on how arrays are split: programs for several devices take longer to
    compile and to run.
    """
    import jax

    @contextlib.contextmanager
    def only(count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("morer1_jax.run.mesh.jax.devices", lambda: jax.local_devices()[:count])
            yield

    return only


@pytest.fixture
def one_device(devices):
    """Meshes of one device."""
    with devices(1):
        yield


@pytest.fixture(scope="session")
def served():
    """`with served(faults=…) as root`: a bucket's server of the block's own; see `bucket.py`."""
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    import bucket

    return bucket.served


@pytest.fixture(scope="session")
def _bucket_server(served):
    """The environment of clients of a worker's bucket, a server on loopback."""
    import bucket

    with bucket.started() as environment:
        yield environment


@pytest.fixture(scope="module")
def bucket(_bucket_server):
    """`gs://…`: a bucket that this machine's memory holds, for names of a file's own."""
    from bucket import ROOT, asked_at

    with asked_at(_bucket_server):
        yield ROOT


@pytest.fixture(scope="session")
def without_torch():
    """Gives the environment of a quickly started process: on one device, without PyTorch."""

    def environment():
        paths = (str(Path(__file__).with_name("without_torch")), os.environ.get("PYTHONPATH"))
        flags = os.environ["XLA_FLAGS"].partition(" ")[2]
        given = {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        return {**os.environ, **given}

    return environment


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process, which has imported already what takes seconds."""
    import runpy

    from absl import flags

    def defined(target):
        """The flags of this project's commands and of a config's keys, `{name: (flag, module)}`."""
        return {
            flag.name: (flag, module)
            for module, found in flags.FLAGS.flags_by_module_dict().items()
            for flag in found
            if module == target
            or module.startswith("morer1_jax")
            or flag.name.startswith("config.")
        }

    def run(target, *args, code):
        monkeypatch.setattr(sys, "argv", [target, *map(str, args)])
        start = runpy.run_path if target.endswith(".py") else runpy.run_module
        # The flags of a command that another test imported are put aside: two may share a name.
        aside = defined(target)
        for name in aside:
            delattr(flags.FLAGS, name)
        try:
            with pytest.raises(SystemExit) as done:
                start(target, run_name="__main__")
        finally:
            for name in defined(target):
                delattr(flags.FLAGS, name)
            for flag, module in aside.values():
                flags.DEFINE_flag(flag, module_name=module)
        out, err = capsys.readouterr()
        assert (done.value.code or 0) == code, err
        return out, err

    return run


@pytest.fixture
def file_limit():
    """`with file_limit(bytes)`: no file may grow beyond, as on a full disk, for all of a process's
    threads and without rights."""

    @contextlib.contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def _beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny():
    """The module `tiny.py` beside this file: a tiny model, its prompts, its compiled programs."""
    return _beside("tiny")


@pytest.fixture(scope="session")
def pixels():
    """The module `pixels.py` beside this file: patches as the vision tower reads them."""
    return _beside("pixels")


@pytest.fixture(scope="session")
def reference():
    """The module `reference.py` beside this file: small models as `transformers` has them."""
    pytest.importorskip("torch")
    return _beside("reference")


@pytest.fixture(params=range(4))
def case(request, reference):
    """Each config in turn."""
    assert len(reference.CONFIGS) == 4
    return reference.case(list(reference.CONFIGS)[request.param])


@pytest.fixture(scope="session")
def small_case(reference):
    """The first config alone."""
    return reference.case(next(iter(reference.CONFIGS)))


@pytest.fixture(scope="session")
def other_release():
    """The module `other_release.py` beside this file: asks an exported folder."""
    return _beside("other_release")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: a folder that `make(folder)` fills, once for all workers together; tests
    must not change what is in it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def folder(name, make):
        made = shared / name
        with open(shared / f"{name}.lock", "a+", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if lock.read() != "made":
                # What an error left of it.
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
                make(made)
                lock.write("made")
        return made

    return folder


@pytest.fixture(scope="session")
def small_world(once):
    """The folder of a small synthetic dataset; tests must not change it."""
    from morer1_jax.world.synthesise import WorldConfig, synthesise

    config = WorldConfig(train=48, valid=16, test=16, written=0.5)
    return once("small_world", lambda folder: synthesise(folder / "data", config, seed=0)) / "data"


@pytest.fixture(scope="session")
def small_run(once, small_world, devices):
    """The workdir of a run on `small_world` that trained for three steps, and has learnt nothing;
    tests must not change it."""
    from morer1_jax.config.binding import read_config
    from morer1_jax.train import train

    def make(folder):
        config = read_config(Path(__file__).parent / "configs" / "tiny.py")
        config.stages = "sft"
        config.data.folder = str(small_world)
        config.mesh.update(data=1, fsdp=1, tensor=-1)
        config.sft.update(steps=3, eval_every=3, save_every=3)
        with _quick(), devices(1):
            train(config, folder / "run")

    return once("small_run", make) / "run"


@pytest.fixture(scope="session")
def small_tokenizer(small_world, tmp_path_factory):
    """A tokenizer of 512 tokens trained on `small_world`."""
    from morer1_jax.data.tokenizer import train_tokenizer
    from morer1_jax.task import more
    from morer1_jax.task.prompt import student_prompt

    ontology = more.read_ontology(small_world)
    facts = more.read_split(small_world, "train", ontology)
    texts = [student_prompt(fact, ontology) for fact in facts]
    texts += more.read_reasoning(small_world / "reasoning.jsonl", facts, ontology).values()
    return train_tokenizer(texts, 512, tmp_path_factory.mktemp("small_tokenizer") / "tokenizer")


@pytest.fixture(scope="session")
def qwen_tokenizer(tmp_path_factory):
    """Qwen2.5's own tokenizer of 151,665 tokens, in a folder of its own (`name_or_path`)."""
    from morer1_jax.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("qwen") / "tokenizer"
    _beside("qwen").build(folder)
    return load_tokenizer(folder)
