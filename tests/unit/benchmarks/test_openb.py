"""The trace is read and replayed as its authors' procedure says."""

from pathlib import Path

from benchmarks.openb import LOAD_MAX, arrivals, fragmented_milli, read_hosts, read_tasks, run_seed
from fleet.model.ids import HostId
from scheduler.placement.demand import Demand, shape_of

NODES = "sn,cpu_milli,memory_mib,gpu,model\nn-1,8000,1000,2,A\nn-0,94500,1000,1,B\nn-2,4000,1000,0,\n"
TASKS = """name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time
t-1,1500,10,1,500,A|B,LS,Running,0,1,0
t-0,1000,10,2,1000,,LS,Running,0,1,0
t-2,1000,10,0,0,,LS,Running,0,1,0
"""


def lists(folder: Path) -> tuple[Path, Path]:
    (folder / "nodes.csv").write_text(NODES)
    (folder / "tasks.csv").write_text(TASKS)
    return folder / "nodes.csv", folder / "tasks.csv"


def test_lists_are_read_whole(tmp_path: Path) -> None:
    """Tasks come in the order of their names, with parts of devices and models; nodes with parts of CPUs keep them."""
    nodes, tasks = lists(tmp_path)
    whole, part, without = read_tasks(tasks)
    assert (whole.gpus, whole.gpu_milli, whole.gpu_models) == (2, 1000, ())
    assert (part.gpus, part.gpu_milli, part.gpu_models) == (1, 500, ("A", "B"))
    assert without.gpus == 0
    hosts = {view.record.host_id: view.record for view in read_hosts(nodes)}
    assert [len(hosts[HostId(f"n-{number}")].gpus) for number in range(3)] == [1, 2, 0]
    assert hosts[HostId("n-0")].capacity.vcpus * hosts[HostId("n-0")].vcpu_overcommit_milli == 94_500


def test_arrivals_are_reproducible_and_reach_the_load(tmp_path: Path) -> None:
    """The same seed is the same order; each task comes once before any comes again; what was asked for ends just past 130 %."""
    tasks = read_tasks(lists(tmp_path)[1])
    devices = 10_000
    first, again, other = (list(arrivals(tasks, devices, seed)) for seed in (42, 42, 43))
    assert first == again != other
    assert sorted(map(repr, first[:3])) == sorted(map(repr, tasks))
    asked = [demand.gpus * demand.gpu_milli for demand in first]
    assert sum(asked) * 100 >= devices * LOAD_MAX > sum(asked[:-1]) * 100


def test_a_seed_runs_the_same_twice(tmp_path: Path) -> None:
    """What is placed, allocated and fragmented depends on the lists and the seed alone."""
    nodes, tasks = lists(tmp_path)
    one, two = (run_seed(read_hosts(nodes), read_tasks(tasks), 42) for _ in range(2))
    assert (one.allocated, one.fragmented, one.placed) == (two.allocated, two.fragmented, two.placed)
    assert 0 < one.allocated[100] <= one.allocated[130] <= 100


def test_idle_devices_are_fragmented_for_who_cannot_use_them(tmp_path: Path) -> None:
    """For a shape of two whole devices one idle device is lost, and two on one host are not; for one without devices all are."""
    hosts = read_hosts(lists(tmp_path)[0])
    pair, none = shape_of(Demand(1000, 10, gpus=2)), shape_of(Demand(1000, 10))
    assert fragmented_milli(hosts, {}, [(pair, 1)]) == 1000
    assert fragmented_milli(hosts, {}, [(none, 1)]) == 3000
