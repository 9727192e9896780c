"""A process finds its place among the others of its run: by flags, or by what launched it."""

import os
import sys

import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from morer1_jax.errors import ConfigError
from morer1_jax.hosts import launch
from morer1_jax.hosts.launch import BY_HAND, BY_LAUNCHER, Place, find_place

ADDRESS = "10.0.0.2:8476"
# What srun gives to the task of the second of four hosts.
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[007-009,012]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
# What mpirun gives to the second process of two, each on a host of its own.
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
# What GKE gives to the third host of a slice.
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,t1,t2,t3", "TPU_WORKER_ID": "2"}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8081",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
LAUNCHERS = (
    "SLURM_",
    "OMPI_",
    "PMI_",
    "MV2_",
    "JAX_",
    "TPU_",
    "MEGASCALE_",
    "CLOUD_TPU_",
    "KUBERNETES_",
    "JOB_COMPLETION_INDEX",
    "RANK",
    "WORLD_SIZE",
)


@pytest.fixture(autouse=True)
def chips(monkeypatch):
    """The number of this machine's TPU chips, none at first; sets it."""

    def have(count):
        monkeypatch.setattr(
            launch.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (count, None)
        )

    have(0)
    return have


@pytest.fixture
def launched(monkeypatch):
    """Starts this process as a launcher would: with these variables and no other launcher's."""

    def by(environment):
        for name in list(os.environ):
            if name.startswith(LAUNCHERS):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    by({})
    return by


@pytest.fixture
def on_tpus(monkeypatch, chips):
    """A host of a TPU slice whose machine's own server knows nothing of other workers."""
    chips(4)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda key: None)


def test_a_process_that_nothing_launched_is_alone(launched):
    assert find_place() is None


@pytest.mark.parametrize("process", [None, 0])
@pytest.mark.parametrize("launcher", [{}, SLURM])
def test_one_process_is_alone_whatever_launched_it(launched, launcher, process):
    launched(launcher)
    assert find_place(processes=1, process=process) is None


def test_flags_come_before_the_launcher(launched):
    launched(SLURM)
    place = find_place(ADDRESS, 2, 0)
    assert place == Place(ADDRESS, 2, 0, None, BY_HAND, "flags")
    assert place.host_and_port == ("10.0.0.2", 8476)
    assert find_place(ADDRESS, 2, 0, 7.0).patience == 7.0
    assert find_place("[fe80::1]:99", 2, 1).host_and_port == ("fe80::1", 99)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((ADDRESS, None, None), "--processes and --process: expected, since another of the three"),
        ((None, 2, None), "--coordinator and --process: expected"),
        ((None, None, 0), "--coordinator and --processes: expected"),
        ((None, 1, 1), "--coordinator: expected"),
        ((ADDRESS, 2, None), "--process: expected, .* give --coordinator=host:port"),
        (("10.0.0.2", 2, 0), "--coordinator=10.0.0.2: expected host:port"),
        ((":8476", 2, 0), "--coordinator=:8476: expected host:port"),
        (("host:0", 2, 0), "--coordinator=host:0: expected host:port"),
        (("host:65536", 2, 0), "--coordinator=host:65536: expected host:port"),
        ((ADDRESS, 0, 0), "--processes=0: expected at least 1"),
        ((ADDRESS, 2, 2), "--process=2: expected 0 to 1, since --processes=2"),
        ((ADDRESS, 2, -1), "--process=-1: expected 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(launched, flags, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        find_place(*flags)
    assert "\n" not in str(error.value)


def test_slurm_with_one_task_a_host_gives_it_all_devices(launched):
    launched(SLURM)
    # JAX's port for a job is the last 4096 by its number; the first host is listed first.
    port = 65535 - 4096 + 1 + 4097 % 4096
    expected = Place(f"gpu007:{port}", 4, 1, None, BY_LAUNCHER, "SLURM_STEP_NUM_TASKS=4")
    assert find_place() == expected
    assert find_place(patience=5.0).patience == 5.0


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, (3,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,8(x3)"}, (3,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "8,1(x3)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8,1(x3)", "SLURM_NODEID": "0"}, (3,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, None),
        # Nothing tells how many share the host: JAX's choice stays.
        ({"SLURM_STEP_TASKS_PER_NODE": ""}, (3,)),
        ({"SLURM_NODEID": "9"}, (3,)),
    ],
)
def test_slurm_with_several_tasks_a_host_gives_each_its_own(launched, changes, devices):
    launched({**SLURM, "SLURM_LOCALID": "3", **changes})
    assert find_place().devices == devices


def test_open_mpi(launched):
    launched(OPEN_MPI)
    port = 65535 - 4096 + 1 + 1531576320 // 4096 % 4096
    expected = Place(f"10.96.0.1:{port}", 2, 1, None, BY_LAUNCHER, "OMPI_COMM_WORLD_SIZE=2")
    assert find_place() == expected
    # An allocation of Slurm around it says nothing of its processes.
    launched({**SLURM, **OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert find_place().devices == (0,)


def test_gke_on_tpus(launched, on_tpus):
    launched(GKE)
    named = "TPU_WORKER_ID=2"
    assert find_place() == Place("localhost:8482", 4, 2, None, BY_LAUNCHER, named)
    # Slices are numbered through: the third host of the second one is the seventh of all.
    launched({**GKE, **SLICES})
    place = find_place()
    assert (place.coordinator, place.processes, place.process) == ("localhost:8482", 8, 6)


def test_one_host_of_tpus_is_alone(launched, on_tpus):
    launched({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
    assert find_place() is None


def test_workers_that_only_the_metadata_server_knows(launched, on_tpus, monkeypatch):
    answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:localhost,unknown:unknown:10.1.0.3",
    }
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (answers[key], 200))
    assert find_place() == Place("localhost:8482", 2, 1, None, BY_LAUNCHER, "4 TPU chips")


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "8", "RANK": "3"}, "WORLD_SIZE=8"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE=2"),
        # Open MPI 5, which has no head process.
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "INDEX=0"),
    ],
)
@pytest.mark.filterwarnings("ignore:Kubernetes environment detected")
def test_a_launcher_that_jax_cannot_follow_is_named_with_the_flags(
    launched, monkeypatch, environment, named
):
    launched(environment)
    # As in most images, which lack the client.
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    message = "found none: JAX does not know this launcher; give --coordinator=host:port"
    with pytest.raises(ConfigError, match=message) as error:
        find_place()
    said = str(error.value)
    assert named in said
    assert "--processes=number of all" in said
    assert "--processes=1 where this is the only one" in said
    assert find_place(processes=1) is None


def test_a_detection_that_fails_says_why(launched):
    launched({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "7.0;nothing"})
    with pytest.raises(ConfigError, match=r"Could not parse coordinator IP address.*--process="):
        find_place()
