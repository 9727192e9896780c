"""Ways to start several hosts: what the files say, and what the scripts do when a run ends."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "tools" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# Of Kubernetes: the oldest whose schema the Job should fit, and a newer one.
RELEASES = ("1.28", "1.31")
# Codes with which a run goes on if it is started again: saved, another died, ended by a signal.
AGAIN = (75, 3, 134, 137, 139, 143)


def stub(folder, name, text):
    """Puts a program before all others of its name."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def environment(tmp_path, **given):
    """Of a user whose home is empty, with the programs of `stub` first."""
    paths = os.pathsep.join([str(tmp_path / "bin"), "/usr/bin", "/bin"])
    return {"PATH": paths, "HOME": str(tmp_path), "CALLS": str(tmp_path / "calls"), **given}


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def program(name):
    """Returns the path of a program of the virtual environment."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"no {name}")


# What holds of all files.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = program("shellcheck")
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_files_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"(?:configs|tools|tests)/[\w./]+\.(?:py|sh|yaml)", text):
        assert (ROOT / name).exists(), name


# The JobSet.


@pytest.fixture
def jobset():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def job(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.mark.parametrize("release", RELEASES)
def test_job_fits_the_schema_of_kubernetes(job, release):
    validate = pytest.importorskip("kubernetes_validate").validate
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, "spec": job}
    validate(whole, release, strict=True)


def test_jobset_fits_its_own_schema(jobset):
    models = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set")

    def read(manifest):
        return models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()

    # Types are checked; names that the schema does not know are left out.
    assert read(jobset) == jobset
    policy = jobset["spec"]["failurePolicy"]
    policy["maxRestart"] = policy.pop("maxRestarts")
    assert read(jobset) != jobset


def test_jobset_has_values_that_its_schema_knows(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    policy = jobset["spec"]["failurePolicy"]
    assert policy["restartStrategy"] in ("Recreate", "BlockingRecreate", "InPlaceRestart")
    for rule in policy["rules"]:
        assert rule["action"] in ("FailJobSet", "RestartJobSet")
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def test_a_users_error_ends_the_jobset_and_all_else_restarts_it(jobset, job):
    # A Job that fails by its podFailurePolicy has this reason; the first rule that fits decides,
    # and without one the JobSet restarts.
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (pod_rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert pod_rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
        "onPodConditions": [],
    }
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_jobset_has_a_process_on_each_host_of_the_slice(job):
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == hosts == 4
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    # The config is the one for this topology.
    assert f"--config=configs/qwen2_5_vl_3b_sft.py:v5e:{topology}" in container["args"]


def test_the_trainer_gets_sigterm_itself_and_has_time_to_save(job):
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "morer1_jax.train"]
    assert pod["terminationGracePeriodSeconds"] >= 120
    # No shell in between, which would keep it to itself.
    assert not {"bash", "sh", "-c"} & set(container["command"] + container["args"])


def test_what_is_mounted_is_a_volume(job):
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"dshm": "/dev/shm"}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}


def test_what_lasts_is_in_a_bucket_that_is_not_mounted(job):
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in container["args"])
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    kept = [flags.pop("workdir"), env["JAX_COMPILATION_CACHE_DIR"]]
    read = [flags.pop("config.data.folder"), flags.pop("config.model.path")]
    assert flags.keys() == {"config"}
    # Each in a folder of its own: the workdir's is the run's alone.
    folders = [path.removeprefix("gs://BUCKET/").split("/")[0] for path in kept + read]
    assert all(path.startswith("gs://BUCKET/") for path in kept + read)
    assert len(set(folders)) == len(folders)
    # By the account of the pod, with room for the local copy; no driver is asked to mount anything.
    assert pod["serviceAccountName"]
    assert container["resources"]["requests"]["ephemeral-storage"].endswith("Gi")
    assert not any("csi" in volume for volume in pod["volumes"])
    assert "annotations" not in job["template"].get("metadata", {})


# The image.


def instructions():
    """Yields each instruction of the Dockerfile and its arguments."""
    text = (LAUNCH / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"\\\n", " ", text)
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            yield tuple(line.split(maxsplit=1))


def test_dockerfile_passes_the_linter():
    result = subprocess.run(
        [program("hadolint"), LAUNCH / "Dockerfile"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_image_starts_the_trainer_as_its_first_process():
    last = dict(instructions())
    assert json.loads(last["ENTRYPOINT"]) == ["python", "-m", "morer1_jax.train"]
    assert "CMD" not in last
    # A user by number, since Kubernetes cannot see that a name is not root.
    assert last["USER"] == "1000"


def test_image_has_all_that_the_package_is_built_from():
    given = list(instructions())
    copied = {s for name, value in given if name == "COPY" for s in value.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {project["readme"], *project["license-files"], "pyproject.toml", "morer1_jax"}
    assert needed <= copied
    # Extras that exist; Python is recent enough.
    (install,) = [value for name, value in given if name == "RUN" and "pip install" in value]
    assert '".[${EXTRA},gcs]"' in install
    assert {"tpu", "cuda", "gcs"} <= project["optional-dependencies"].keys()
    arguments = dict(value.split("=") for name, value in given if name == "ARG")
    assert arguments["EXTRA"] in ("tpu", "cuda")
    assert tuple(map(int, arguments["PYTHON"].split("."))) >= (3, 11)


# Slurm.


@pytest.fixture
def slurm(tmp_path):
    """`slurm(code, …)`: the script's exit code and what it asked Slurm for, if srun ends so."""
    record = 'echo "$(basename "$0") $*" >> "$CALLS"'
    stub(tmp_path / "bin", "srun", f'{record}\nexit "$CODE"')
    stub(tmp_path / "bin", "scontrol", record)
    stub(tmp_path / "bin", "squeue", f'{record}\necho "$STATE"')

    def run(code, *flags, state="RUNNING", **given):
        given = {"SLURM_JOB_ID": "7", "CODE": str(code), "STATE": state, **given}
        result = subprocess.run(
            ["bash", LAUNCH / "slurm.sh", *flags],
            env=environment(tmp_path, **given),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return result.returncode, calls(tmp_path), result.stderr

    return run


@pytest.mark.parametrize("code", AGAIN)
def test_slurm_queues_again_what_can_go_on(slurm, code):
    returned, asked, said = slurm(code)
    assert returned == 0
    assert asked[-1] == "scontrol requeue 7"
    assert said == f"code {code}: queued again; the same command goes on from what is saved\n"


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_slurm_does_not_repeat_what_is_done_or_wrong(slurm, code):
    returned, asked, said = slurm(code)
    assert returned == code
    assert [call.split()[0] for call in asked] == ["srun"]
    assert said == ""


def test_slurm_leaves_a_cancelled_job_alone(slurm):
    for state in ("CANCELLED", "COMPLETING", ""):
        returned, asked, said = slurm(75, state=state)
        assert returned == 75
        assert not any(call.startswith("scontrol") for call in asked)
        assert "not queued again" in said


def test_slurm_gives_up_after_many_restarts(slurm):
    assert slurm(3, SLURM_RESTART_COUNT="49")[0] == 0
    returned, _, said = slurm(3, SLURM_RESTART_COUNT="50")
    assert returned == 3
    assert said == "code 3 after 50 restarts: not queued again\n"
    assert slurm(3, SLURM_RESTART_COUNT="2", MORER1_RESTARTS="2")[0] == 3


def test_slurm_passes_flags_on_as_they_are(slurm, tmp_path):
    _, asked, _ = slurm(0, "--config=configs/demo.py", "--workdir=/shared/a b")
    python = tmp_path / ".venv" / "bin" / "python"
    assert asked == [
        f"srun --kill-on-bad-exit=0 --wait=60 {python} -m morer1_jax.train "
        "--config=configs/demo.py --workdir=/shared/a b"
    ]


def test_slurm_is_asked_for_one_process_a_host_and_time_to_save():
    lines = (LAUNCH / "slurm.sh").read_text(encoding="utf-8").splitlines()
    # Slurm reads options up to the first command.
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    options = {line.removeprefix("#SBATCH ") for line in lines[:first] if "#SBATCH " in line}
    assert len(options) == sum("#SBATCH" in line for line in lines)
    assert {"--ntasks-per-node=1", "--gpus-per-node=8", "--requeue"} <= options
    assert "--signal=TERM@180" in options
    assert "--open-mode=append" in options


# TPU VMs.

# Makes a virtual environment as uv would, in which `train` ends with the codes in a file, in turn.
UV = """
echo "uv $*" >> "$CALLS"
if [ "$1" = venv ]; then
  mkdir -p "${@: -1}/bin"
  cp "$(dirname "$0")/trainer" "${@: -1}/bin/python"
fi
"""
TRAINER = """
case "$*" in
  *version_info*) exit 0 ;;
  *"import jax"*) exit 0 ;;
esac
echo "train $*" >> "$CALLS"
code=$(head -n 1 "$HOME/codes")
sed -i 1d "$HOME/codes"
if [ "$code" = wait ]; then
  trap 'exit 75' TERM
  touch "$HOME/waits"
  while true; do sleep 0.05; done
fi
exit "$code"
"""


@pytest.fixture
def tpu_vm(tmp_path):
    """`tpu_vm(command, …)` on a machine of its own; `calls` are those of uv and of the trainer."""
    stub(tmp_path / "bin", "uv", UV)
    stub(tmp_path / "bin", "trainer", TRAINER)

    def run(*arguments, codes=None, **given):
        if codes is not None:
            (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        return subprocess.run(
            ["bash", LAUNCH / "tpu_vm.sh", *arguments],
            env=environment(tmp_path, MORER1_PAUSE="0", **given),
            capture_output=True,
            text=True,
        )

    return run


def until(condition):
    """Waits for something that a background process does."""
    end = time.monotonic() + 20
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return result


def test_tpu_vm_may_be_set_up_twice(tpu_vm, tmp_path):
    venv = tmp_path / ".morer1" / "venv"
    install = f"uv pip install --quiet --python {venv}/bin/python"
    checkout = f"{install} --editable {ROOT}[tpu,gcs]"
    make = f"uv venv --quiet --python 3.12 {venv}"
    for expected in ([make, checkout], [make, checkout, checkout]):
        result = tpu_vm("setup")
        assert result.returncode == 0, result.stderr
        assert calls(tmp_path) == expected
    # What an interrupted setup has left is made anew.
    (venv / "bin" / "python").unlink()
    (venv / "rest").touch()
    assert tpu_vm("setup").returncode == 0
    assert calls(tmp_path)[-2:] == [make, checkout]
    assert not (venv / "rest").exists()
    # A wheel, for other hardware.
    wheel = tmp_path / "morer1_jax-0.1.0-py3-none-any.whl"
    wheel.touch()
    assert tpu_vm("setup", wheel, MORER1_EXTRA="cuda").returncode == 0
    assert calls(tmp_path)[-1] == f"{install} --reinstall-package morer1-jax {wheel}[cuda,gcs]"


def test_tpu_vm_brings_uv_where_there_is_none(tpu_vm, tmp_path):
    (tmp_path / "bin" / "uv").rename(tmp_path / "bin" / "its-uv")
    # pip, as `python3 -m pip install --target FOLDER uv`.
    stub(
        tmp_path / "bin",
        "python3",
        """
echo "python3 $*" >> "$CALLS"
mkdir -p "${@: -2:1}/bin"
cp "$(dirname "$0")/trainer" "${@: -2:1}/bin/"
cp "$(dirname "$0")/its-uv" "${@: -2:1}/bin/uv"
""",
    )
    brought = f"python3 -m pip install --quiet --target {tmp_path}/.morer1/uv uv"
    if shutil.which("uv", path="/usr/bin:/bin"):
        pytest.skip("this machine has uv")
    for _ in range(2):
        result = tpu_vm("setup")
        assert result.returncode == 0, result.stderr
    assert [call for call in calls(tmp_path) if call.startswith("python3")] == [brought]


def test_tpu_vm_says_why_an_installation_fails(tpu_vm, tmp_path):
    stub(tmp_path / "bin", "uv", f'{UV}\n[ "$1" != pip ] || {{ echo "no network" >&2; exit 1; }}')
    result = tpu_vm("setup")
    assert (result.returncode, result.stderr) == (1, "no network\n")


def test_tpu_vm_starts_again_what_can_go_on(tpu_vm, tmp_path):
    tpu_vm("setup")
    before = len(calls(tmp_path))
    flags = ("--config=configs/demo.py", "--workdir=/shared/a b")
    result = tpu_vm("train", *flags, codes=[*AGAIN, 0])
    assert result.returncode == 0
    trained = f"train -m morer1_jax.train {' '.join(flags)}"
    assert calls(tmp_path)[before:] == [trained] * (len(AGAIN) + 1)
    said = result.stdout.splitlines()
    assert said[0] == "code 75: restart 1 in 0 s"
    assert said[-1] == "ended with code 0"


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_tpu_vm_does_not_repeat_what_is_done_or_wrong(tpu_vm, tmp_path, code):
    tpu_vm("setup")
    result = tpu_vm("train", "--config=configs/demo.py", codes=[code, 0])
    assert result.returncode == code
    assert result.stdout == f"ended with code {code}\n"


def test_tpu_vm_gives_up_after_many_restarts(tpu_vm):
    tpu_vm("setup")
    result = tpu_vm("train", codes=[3, 3, 3, 3], MORER1_RESTARTS="2")
    assert result.returncode == 3
    assert result.stdout.splitlines() == [
        "code 3: restart 1 in 0 s",
        "code 3: restart 2 in 0 s",
        "ended with code 3",
    ]


def test_tpu_vm_trains_in_the_background_until_it_is_stopped(tpu_vm, tmp_path):
    home = tmp_path / ".morer1"
    result = tpu_vm("status")
    assert (result.returncode, result.stdout, result.stderr) == (0, "nothing trains here\n", "")
    result = tpu_vm("start", "--config=configs/demo.py")
    assert result.returncode == 2
    assert "run tpu_vm.sh setup first" in result.stderr
    tpu_vm("setup")
    assert tpu_vm("status").stdout == "nothing trains here\n"
    result = tpu_vm("start", "--config=configs/demo.py", codes=["wait", 0])
    assert result.returncode == 0
    assert result.stdout.endswith(f" goes to {home}/train.log\n")
    until((tmp_path / "waits").exists)
    assert tpu_vm("status").stdout == "it trains here\n"
    trainer = int((home / "trainer.pid").read_text())
    # In a session of its own, which the end of the connection does not end.
    assert os.getsid(trainer) != os.getsid(0)
    again = tpu_vm("start", "--config=configs/demo.py")
    assert (again.returncode, again.stdout) == (2, "")
    assert "another start still trains here" in again.stderr
    result = tpu_vm("stop")
    assert (result.returncode, result.stdout[:19]) == (0, "told to save and to")
    log = home / "train.log"
    assert until(lambda: "ended" in log.read_text() and log.read_text()) == "ended with code 75\n"
    assert until(lambda: tpu_vm("stop").stdout == "nothing trains here\n")
    assert tpu_vm("status").stdout == "nothing trains here\nended with code 75\n"
    # The same start goes on.
    assert tpu_vm("start", "--config=configs/demo.py", codes=[0]).returncode == 0
    until(lambda: log.read_text().endswith("ended with code 0\n"))


def test_tpu_vm_shows_its_usage(tpu_vm):
    for arguments in ((), ("--help",), ("rm",)):
        result = tpu_vm(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("usage: tpu_vm.sh setup")
