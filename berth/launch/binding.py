"""Which CPUs and which network card belong to a rank: those nearest to its GPU.

In: a :class:`Topology` (from ``/sys``, or made up in a test), the local rank, a policy. Out: a :class:`Binding`. The CPUs are set
with ``sched_setaffinity``, which programs started later inherit; memory follows by first touch, so no numactl is needed.

Rejected: dividing the GPUs by the NUMA nodes. Machines with fewer GPUs than nodes, with nodes without CPUs, or with GPUs on
every second node (DGX A100: 3, 3, 1, 1, 7, 7, 5, 5) get far memory or a division by zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

POLICIES = ("none", "numa", "exclusive")
NICS = ("none", "nearest")
_NVIDIA = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU or network card: its PCI address or name, its NUMA node (``None``: the machine does not say), its way from the root complex."""

    name: str
    numa: int | None = None
    path: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Topology:
    """What a rank may choose from.

    Args:
        allowed: CPUs this process may use (a cgroup may leave few).
        nodes: NUMA node -> its CPUs, allowed or not, none for a node of memory only.
        siblings: groups of CPUs (hardware threads) that are one physical core; a CPU in none is a core of its own.
        gpus: the GPUs this process sees, in CUDA's order.
        nics: network cards that work.
        distances: NUMA node -> distance to every node, in the order of ``nodes`` (as the kernel prints it).
    """

    allowed: frozenset[int]
    nodes: Mapping[int, tuple[int, ...]]
    siblings: tuple[tuple[int, ...], ...] = ()
    gpus: tuple[Device, ...] = ()
    nics: tuple[Device, ...] = ()
    distances: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def usable(self) -> dict[int, tuple[int, ...]]:
        """NUMA nodes that have allowed CPUs -> these. A machine that names none is one node, 0."""
        nodes = {node: tuple(sorted(self.allowed & set(cpus))) for node, cpus in sorted(self.nodes.items())}
        return {node: cpus for node, cpus in nodes.items() if cpus} or {0: tuple(sorted(self.allowed))}

    def cores(self, cpus: Iterable[int]) -> list[tuple[int, ...]]:
        """``cpus`` grouped by physical core, in the order of each core's first CPU."""
        left = set(cpus)
        groups = [tuple(sorted(left & set(group))) for group in self.siblings]
        alone = left.difference(*groups) if groups else left
        return sorted([group for group in groups if group] + [(cpu,) for cpu in alone])


@dataclasses.dataclass(frozen=True)
class Binding:
    """The choice: CPUs (empty: no binding), their NUMA node, the network card; how many ranks share the CPUs; a remark for the log."""

    cpus: tuple[int, ...] = ()
    numa: int | None = None
    nic: str | None = None
    sharers: int = 1
    note: str = ""


def choose(topology: Topology, local_rank: int, local_world: int, policy: str, nic: str = "none") -> Binding:
    """The CPUs and card for ``local_rank`` of ``local_world`` ranks on this host.

    ``numa``: all CPUs of the GPU's NUMA node, shared with the other ranks there. ``exclusive``: an equal part of them in whole physical
    cores, shared with nobody; what does not divide stays free. With fewer cores than ranks nothing is bound. Raises ``ValueError`` for an
    unknown policy or a rank outside.
    """
    if policy not in POLICIES or nic not in NICS or not 0 <= local_rank < local_world:
        raise ValueError(f"policy {policy!r}, nic {nic!r}, local rank {local_rank} of {local_world}")
    homes = [_home(topology, rank, local_world) for rank in range(local_world)]
    # every task sees one GPU, its own: where the others are is not known, so each leaves room for all on its node
    hidden = local_world > 1 and len(topology.gpus) == 1
    sharing = list(range(local_world)) if hidden else [rank for rank in range(local_world) if homes[rank] == homes[local_rank]]
    place = sharing.index(local_rank)
    card = _nearest_nic(topology, local_rank, place) if nic == "nearest" else None
    if policy == "none":
        return Binding(nic=card)
    node = homes[local_rank]
    cpus = topology.usable()[node]
    if policy == "numa":
        return Binding(cpus, node, card, len(sharing))
    cores = topology.cores(cpus)
    each = len(cores) // len(sharing)
    if each == 0:
        note = f"{len(sharing)} ranks share {len(cores)} core(s) of NUMA node {node}: too few to give each its own, CPUs are not bound"
        return Binding(nic=card, note=note)
    own = cores[place * each : (place + 1) * each]
    return Binding(tuple(sorted(cpu for core in own for cpu in core)), node, card)


def _gpu(topology: Topology, local_rank: int) -> Device | None:
    """The GPU that training takes: the only one, or the one with the number of the local rank."""
    index = 0 if len(topology.gpus) == 1 else local_rank
    return topology.gpus[index] if index < len(topology.gpus) else None


def _home(topology: Topology, local_rank: int, local_world: int) -> int:
    """NUMA node for a rank: its GPU's, the nearest with CPUs where that has none; without a GPU that says, ranks are dealt in order."""
    usable, gpu = topology.usable(), _gpu(topology, local_rank)
    wanted = None if gpu is None else gpu.numa
    if wanted is None:
        return list(usable)[local_rank * len(usable) // local_world]
    distance = dict(zip(sorted(topology.nodes), topology.distances.get(wanted, ()), strict=False))
    return min(usable, key=lambda node: (node != wanted, distance.get(node, 255), abs(node - wanted)))


def _nearest_nic(topology: Topology, local_rank: int, place: int) -> str | None:
    """The card behind the same PCI switch as the GPU, else on its NUMA node, else any; ranks equally near take turns."""
    if not topology.nics:
        return None
    gpu = _gpu(topology, local_rank) or Device("")

    def nearness(card: Device) -> tuple[int, bool]:
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(card.path, gpu.path, strict=False)))
        return (shared, card.numa is not None and card.numa == gpu.numa)

    best = max(nearness(card) for card in topology.nics)
    near = [card.name for card in topology.nics if nearness(card) == best]
    return near[place % len(near)]


def bind(local_rank: int, local_world: int, policy: str, nic: str, environment: Mapping[str, str]) -> Binding:
    """Read this machine, choose, and set the CPUs of this process. A machine that cannot be read or set is only remarked on."""
    if policy == nic == "none":
        return Binding()
    try:
        binding = choose(read_topology(environment), local_rank, local_world, policy, nic)
    except (OSError, ValueError) as error:
        return Binding(note=f"CPUs are not bound, this machine's /sys cannot be read: {error}")
    if binding.cpus:
        try:
            os.sched_setaffinity(0, binding.cpus)
        except (OSError, AttributeError) as error:
            return Binding(nic=binding.nic, note=f"CPUs {format_cpus(binding.cpus)} cannot be bound: {error}")
    return binding


def read_cpus() -> frozenset[int]:
    """The CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def read_topology(environment: Mapping[str, str], root: Path = Path("/"), allowed: frozenset[int] | None = None) -> Topology:
    """The machine under ``root`` (``/sys``, ``/proc``), as far as it tells; GPUs are those CUDA_VISIBLE_DEVICES leaves.

    CUDA numbers equal GPUs by PCI bus. Where a cgroup hides GPUs but ``/proc`` lists them (a part of a node, no container), the numbers in
    CUDA_VISIBLE_DEVICES count the hidden ones not, and the wrong node may be chosen: speed only.
    """
    nodes, distances = {}, {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        number = int(folder.name.removeprefix("node"))
        nodes[number] = parse_cpus(_read(folder / "cpulist"))
        distances[number] = tuple(int(word) for word in _read(folder / "distance").split())
    allowed = read_cpus() if allowed is None else allowed
    siblings: dict[int, tuple[int, ...]] = {}
    for cpu in sorted(allowed):
        if cpu not in siblings:
            group = parse_cpus(_read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
            siblings.update(dict.fromkeys(group, group))
    visible = visible_gpus(_gpus(root), environment.get("CUDA_VISIBLE_DEVICES"))
    return Topology(allowed, nodes, tuple(dict.fromkeys(siblings.values())), visible, _nics(root), distances)


def visible_gpus(gpus: Mapping[str, Device], wish: str | None) -> tuple[Device, ...]:
    """``gpus`` (UUID or address -> GPU, in PCI order) as CUDA_VISIBLE_DEVICES orders them; it ends at the first one it does not know."""
    if wish is None:
        return tuple(gpus.values())
    chosen: list[Device] = []
    for word in wish.split(","):
        word = word.strip()
        if word.isascii() and word.isdigit():
            found = list(gpus.values())[int(word) : int(word) + 1]
        else:
            found = [gpu for uuid, gpu in gpus.items() if word.startswith("GPU-") and uuid.startswith(word)]
        if len(found) != 1:
            break
        chosen += found
    return tuple(chosen)


def _gpus(root: Path) -> dict[str, Device]:
    """NVIDIA's GPUs by PCI address: those the driver shows (a container's own), else all on the bus."""
    pci = root / "sys/bus/pci/devices"
    found: dict[str, Device] = {}
    shown = sorted(path.name for path in (root / "proc/driver/nvidia/gpus").glob("*:*"))
    for address in shown:
        words = _read(root / "proc/driver/nvidia/gpus" / address / "information").split()
        uuid = next((word for word in words if word.startswith("GPU-")), address)
        found[uuid] = _device(address, pci / address.lower())
    if not shown:
        for path in sorted(pci.glob("*:*")):
            if _read(path / "vendor") == _NVIDIA and _read(path / "class")[:6] in _DISPLAY_CLASSES:
                found[path.name] = _device(path.name, path)
    return found


def _nics(root: Path) -> tuple[Device, ...]:
    cards = sorted((root / "sys/class/infiniband").glob("*"), key=lambda path: (len(path.name), path.name))
    return tuple(_device(path.name, path / "device") for path in cards if "ACTIVE" in _read(path / "ports/1/state"))


def _device(name: str, folder: Path) -> Device:
    numa = _read(folder / "numa_node")
    way = folder.resolve().parts if folder.exists() else ()
    # the bus names (0000:07:00.0) from the root complex (pci0000:00) on, without the device itself
    start = next((at for at, part in enumerate(way) if part.startswith("pci") and ":" in part), len(way))
    return Device(name, int(numa) if numa.isdigit() else None, way[start:-1])


def _read(path: Path) -> str:
    """A file of one value; nothing where it is missing or refuses."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="ascii", errors="replace").strip()
    return ""


def parse_cpus(text: str) -> tuple[int, ...]:
    """The kernel's ``0-3,8`` as numbers; empty text is no CPU."""
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return tuple(cpus)


def format_cpus(cpus: Iterable[int]) -> str:
    """Numbers as the kernel writes them: ``0-3,8``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
