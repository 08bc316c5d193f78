"""CPUs and cards on machines that are not here, by their published topology."""

from __future__ import annotations

import os

import pytest

from berth.launch.binding import Binding, Device, Topology, bind, choose, format_cpus, parse_cpus, read_topology, visible_gpus


def machine(node_cpus, smt_offset, gpus=(), allowed=None, nics=(), distances=None):
    """``node_cpus``: cores of each NUMA node; the second hardware thread of core c is c + ``smt_offset`` (0: none)."""
    nodes, first = {}, 0
    for node, cores in enumerate(node_cpus):
        own = tuple(range(first, first + cores))
        nodes[node] = own + (tuple(cpu + smt_offset for cpu in own) if smt_offset else ())
        first += cores
    siblings = tuple((cpu, cpu + smt_offset) for cpu in range(first)) if smt_offset else ()
    every = frozenset(cpu for cpus in nodes.values() for cpu in cpus)
    devices = tuple(Device(f"gpu{at}", numa) for at, numa in enumerate(gpus))
    return Topology(every if allowed is None else frozenset(allowed), nodes, siblings, devices, tuple(nics), distances or {})


DGX1 = machine([20, 20], 40, [0, 0, 0, 0, 1, 1, 1, 1])
DGX_A100 = machine([16] * 8, 128, [3, 3, 1, 1, 7, 7, 5, 5])
LAPTOP = machine([4], 4)


def all_of(topology, policy, ranks):
    return [choose(topology, rank, ranks, policy) for rank in range(ranks)]


def shown(bindings):
    return [(format_cpus(binding.cpus), binding.numa, binding.sharers) for binding in bindings]


def test_dgx1():
    low, high = ("0-19,40-59", 0, 4), ("20-39,60-79", 1, 4)
    assert shown(all_of(DGX1, "numa", 8)) == [low] * 4 + [high] * 4
    assert shown(all_of(DGX1, "exclusive", 8)) == [
        ("0-4,40-44", 0, 1), ("5-9,45-49", 0, 1), ("10-14,50-54", 0, 1), ("15-19,55-59", 0, 1),
        ("20-24,60-64", 1, 1), ("25-29,65-69", 1, 1), ("30-34,70-74", 1, 1), ("35-39,75-79", 1, 1),
    ]  # fmt: skip


def test_dgx_a100_has_gpus_on_every_second_node():
    assert shown(all_of(DGX_A100, "numa", 8)) == [
        ("48-63,176-191", 3, 2), ("48-63,176-191", 3, 2), ("16-31,144-159", 1, 2), ("16-31,144-159", 1, 2),
        ("112-127,240-255", 7, 2), ("112-127,240-255", 7, 2), ("80-95,208-223", 5, 2), ("80-95,208-223", 5, 2),
    ]  # fmt: skip
    assert shown(all_of(DGX_A100, "exclusive", 8))[:3] == [("48-55,176-183", 3, 1), ("56-63,184-191", 3, 1), ("16-23,144-151", 1, 1)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_exclusive_is_disjoint_equal_and_in_whole_cores(ranks):
    for topology in (DGX1, DGX_A100, machine([3, 5], 8), machine([7, 7], 0, [1, 0, None, 1, 0])):
        bindings = all_of(topology, "exclusive", ranks)
        bound = [cpu for binding in bindings for cpu in binding.cpus]
        assert len(bound) == len(set(bound)) and set(bound) <= topology.allowed
        for node in {binding.numa for binding in bindings if binding.cpus}:
            assert len({len(binding.cpus) for binding in bindings if binding.numa == node}) == 1
        for binding in bindings:
            assert bool(binding.cpus) != bool(binding.note)
            for core in topology.siblings:
                assert len(set(core) & set(binding.cpus)) in (0, len(core))


def test_laptop():
    assert shown(all_of(LAPTOP, "numa", 2)) == [("0-7", 0, 2)] * 2
    assert shown(all_of(LAPTOP, "exclusive", 2)) == [("0-1,4-5", 0, 1), ("2-3,6-7", 0, 1)]
    assert shown(all_of(LAPTOP, "exclusive", 3)) == [("0,4", 0, 1), ("1,5", 0, 1), ("2,6", 0, 1)]
    assert all_of(LAPTOP, "none", 2) == [Binding()] * 2


def test_more_ranks_than_cores_bind_nothing_and_say_so():
    assert (
        all_of(LAPTOP, "exclusive", 5)
        == [Binding(note="5 ranks share 4 core(s) of NUMA node 0: too few to give each its own, CPUs are not bound")] * 5
    )


def test_a_cgroup_leaves_few_cpus():
    # 3 cores of node 0, one thread of core 5 of node 0's other half, nothing of node 1
    limited = machine([20, 20], 40, [0, 0, 0, 0, 1, 1, 1, 1], allowed=[0, 40, 1, 41, 2, 42, 5])
    assert shown([choose(limited, 0, 2, "exclusive"), choose(limited, 1, 2, "exclusive")]) == [("0-1,40-41", 0, 1), ("2,5,42", 0, 1)]
    assert shown([choose(limited, 7, 8, "numa")]) == [("0-2,5,40-42", 0, 8)]
    assert choose(limited, 7, 8, "exclusive").cpus == ()


def test_fewer_gpus_than_nodes_and_gpus_of_unknown_nodes():
    assert shown(all_of(machine([4, 4, 4, 4], 0, [2]), "numa", 1)) == [("8-11", 2, 1)]
    assert shown(all_of(machine([4, 4], 0, [None, None, None, None]), "numa", 4)) == [("0-3", 0, 2)] * 2 + [("4-7", 1, 2)] * 2
    assert shown(all_of(machine([4, 4, 4, 4], 0), "exclusive", 2)) == [("0-3", 0, 1), ("8-11", 2, 1)]
    # memory-only nodes have no CPUs: the nearest node that has some, by the kernel's distances
    hollow = Topology(
        frozenset(range(8)), {0: (0, 1, 2, 3), 1: (4, 5, 6, 7), 2: ()}, gpus=(Device("gpu0", 2),), distances={2: (20, 12, 10)}
    )
    assert shown(all_of(hollow, "numa", 1)) == [("4-7", 1, 1)]
    assert shown(all_of(Topology(frozenset({3, 4}), {}), "numa", 1)) == [("3-4", 0, 1)]


def test_one_visible_gpu_a_task_leaves_room_for_the_others():
    """With --gpus-per-task each rank sees its own GPU only; the others may sit on the same node or not."""
    seen = [choose(machine([8, 8], 0, [node]), rank, 4, "exclusive") for rank, node in enumerate((0, 0, 1, 1))]
    assert shown(seen) == [("0-1", 0, 1), ("2-3", 0, 1), ("12-13", 1, 1), ("14-15", 1, 1)]


def test_network_cards():
    def gpu(number, numa, *path):
        return Device(f"gpu{number}", numa, path)

    cards = (Device("mlx5_0", 0, ("r0", "s0")), Device("mlx5_1", 0, ("r0", "s1")), Device("mlx5_10", 1, ("r1", "s0")))
    gpus = (gpu(0, 0, "r0", "s1", "x"), gpu(1, 0, "r0", "s0"), gpu(2, 1, "r1", "s9"), gpu(3, 0, "r7"), gpu(4, 0, "r7"))
    topology = Topology(frozenset(range(4)), {0: (0, 1), 1: (2, 3)}, gpus=gpus, nics=cards)
    assert [choose(topology, rank, 5, "none", "nearest").nic for rank in range(5)] == ["mlx5_1", "mlx5_0", "mlx5_10", "mlx5_0", "mlx5_1"]
    assert choose(topology, 0, 5, "none", "none").nic is None
    assert choose(LAPTOP, 0, 1, "numa", "nearest").nic is None


def test_wrong_calls():
    for arguments in ((2, 2, "numa"), (0, 1, "all"), (-1, 1, "numa")):
        with pytest.raises(ValueError):
            choose(LAPTOP, *arguments)


def test_lists_of_cpus():
    assert parse_cpus("0-3,8,10-11") == (0, 1, 2, 3, 8, 10, 11)
    assert parse_cpus("") == ()
    assert format_cpus([11, 0, 1, 2, 3, 8, 10]) == "0-3,8,10-11" and format_cpus([]) == ""


def test_visible_gpus():
    gpus = {f"GPU-{letter}": Device(letter) for letter in "abc"}

    def names(wish):
        return "".join(gpu.name for gpu in visible_gpus(gpus, wish))

    assert [names(wish) for wish in (None, "", "2,0", "1", "GPU-c,GPU-a", "0,9,1", "-1", "MIG-x", "GPU-")] == [
        "abc", "", "ca", "b", "ca", "a", "", "", "",
    ]  # fmt: skip


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def root(tmp_path):
    """/sys and /proc of a machine with two NUMA nodes, two GPUs and two cards of which one works."""
    sys = tmp_path / "sys"
    for node, cpus in enumerate(("0-1,4-5", "2-3,6-7")):
        write(sys / f"devices/system/node/node{node}/cpulist", cpus)
        write(sys / f"devices/system/node/node{node}/distance", "10 21" if node == 0 else "21 10")
    for cpu in range(8):
        write(sys / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}")
    for address, bridge, numa, kind in (
        ("0000:07:00.0", "pci0000:00/0000:00:01.0", 1, "0x030200"),
        ("0000:0f:00.0", "pci0000:00/0000:00:02.0", -1, "0x030000"),
        ("0000:08:00.0", "pci0000:00/0000:00:01.0", 1, "0x020700"),
        ("0000:10:00.0", "pci0000:00/0000:00:02.0", 0, "0x020700"),
    ):
        real = sys / "devices" / bridge / address
        write(real / "numa_node", numa)
        write(real / "class", kind)
        write(real / "vendor", "0x10de" if kind.startswith("0x03") else "0x15b3")
        (sys / "bus/pci/devices").mkdir(parents=True, exist_ok=True)
        (sys / "bus/pci/devices" / address).symlink_to(real)
    for name, address, state in (("mlx5_0", "0000:10:00.0", "4: ACTIVE"), ("mlx5_1", "0000:08:00.0", "1: DOWN")):
        write(sys / f"class/infiniband/{name}/ports/1/state", state)
        (sys / f"class/infiniband/{name}/device").symlink_to(sys / "bus/pci/devices" / address)
    return tmp_path


def test_the_machine_is_read(root):
    allowed = frozenset(range(8))
    left, right = ("pci0000:00", "0000:00:01.0"), ("pci0000:00", "0000:00:02.0")
    seven, fifteen = Device("0000:07:00.0", 1, left), Device("0000:0f:00.0", None, right)
    expected = Topology(
        allowed, {0: (0, 1, 4, 5), 1: (2, 3, 6, 7)}, ((0, 4), (1, 5), (2, 6), (3, 7)), (seven, fifteen),
        (Device("mlx5_0", 0, right),), {0: (10, 21), 1: (21, 10)},
    )  # fmt: skip
    assert read_topology({}, root, allowed) == expected
    assert read_topology({"CUDA_VISIBLE_DEVICES": "1"}, root, allowed).gpus == (fifteen,)
    # a container shows its own GPUs only, with their UUIDs
    write(root / "proc/driver/nvidia/gpus/0000:0F:00.0/information", "Model: \t\t NVIDIA A100\nGPU UUID: \t GPU-6a-b\nDevice Minor: 1")
    assert [gpu.numa for gpu in read_topology({"CUDA_VISIBLE_DEVICES": "GPU-6a"}, root, allowed).gpus] == [None]
    assert len(read_topology({"CUDA_VISIBLE_DEVICES": "0,1"}, root, allowed).gpus) == 1


def test_a_machine_that_tells_nothing(tmp_path):
    assert read_topology({}, tmp_path, frozenset({2, 5})) == Topology(frozenset({2, 5}), {})


def test_binding_that_fails_is_a_remark(monkeypatch):
    assert bind(0, 1, "none", "none", {}) == Binding()

    def refuse(process, cpus):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    found = bind(0, 1, "numa", "none", {})
    assert not found.cpus and found.note.endswith("cannot be bound: [Errno 1] Operation not permitted")
