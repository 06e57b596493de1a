"""The cluster a plan is made for, and a lower bound of the time of a collective on it.

Units: GB = 1e9 bytes, bandwidths in GB/s per GPU and direction, as rated. The defaults describe nodes of eight H100 SXM
GPUs (NVIDIA H100 datasheet: 80 GB, 989 TFLOP/s dense bf16, 3.35 TB/s HBM3, NVLink 450 GB/s each way) with one
400 Gb/s network port per GPU (50 GB/s); storage and host memory are placeholders to be replaced by the site's.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class ClusterSpec:
    """What the cluster offers; see the module's docstring for units and defaults.

    Attributes:
        gpu_memory_gb: memory of one GPU; ``reserved_gb`` of it is taken by the CUDA context, NCCL and
            fragmentation.
        tflops: dense bf16 peak of one GPU.
        storage_gb_s: of the shared file system, over all nodes together.
        host_memory_gb: of one node.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory_gb: float = 80.0
    tflops: float = 989.0
    hbm_gb_s: float = 3350.0
    intra_gb_s: float = 450.0
    inter_gb_s: float = 50.0
    storage_gb_s: float = 10.0
    host_memory_gb: float = 1000.0
    reserved_gb: float = 5.0

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU that tensors may fill."""
        return max(self.gpu_memory_gb - self.reserved_gb, 0.0) * GB


@dataclass(frozen=True)
class Group:
    """A process group by its shape: ``local`` ranks on each of ``nodes`` nodes (``size = local * nodes``)."""

    size: int
    local: int
    nodes: int


def data_parallel_group(spec: ClusterSpec) -> Group:
    """All ranks: shards and reduces everything but the experts."""
    return Group(spec.world, spec.gpus_per_node, spec.nodes)


def expert_parallel_group(spec: ClusterSpec, ep: int) -> Group:
    """``ep`` consecutive ranks (DeepSpeed's placement): exchange tokens."""
    local = min(ep, spec.gpus_per_node)
    return Group(ep, local, -(-ep // local))


def expert_data_parallel_group(spec: ClusterSpec, ep: int) -> Group:
    """The ``world / ep`` ranks, ``ep`` apart, that hold the same experts: shard and reduce them."""
    size = spec.world // ep
    local = max(spec.gpus_per_node // ep, 1)
    return Group(size, min(local, size), -(-size // local))


def ring_s(spec: ClusterSpec, group: Group, size_bytes: float) -> tuple[float, float]:
    """Seconds of one all-gather or reduce-scatter of ``size_bytes`` (the gathered size), as (intra-node,
    inter-node).

    Each GPU receives ``size (n-1)/n``. Between nodes the group's local GPUs share the traffic, one port each,
    so a group of all GPUs of a node uses all ports and a group of every eighth rank uses one. NCCL overlaps
    the two parts.
    """
    intra = inter = 0.0
    if group.local > 1:
        intra = size_bytes * (group.size - 1) / group.size / (spec.intra_gb_s * GB)
    if group.nodes > 1:
        share = size_bytes * (group.nodes - 1) / group.nodes / group.local
        inter = share / (spec.inter_gb_s * GB)
    return intra, inter


def all_to_all_s(spec: ClusterSpec, group: Group, size_bytes: float) -> tuple[float, float]:
    """Seconds of one all-to-all in which each GPU holds ``size_bytes``, spread evenly over the group's members."""
    to_local = size_bytes * (group.local - 1) / group.size
    to_remote = size_bytes * (group.size - group.local) / group.size
    return (
        to_local / (spec.intra_gb_s * GB),
        to_remote / (spec.inter_gb_s * GB),
    )
