"""The group of ranks that split one model: joining it, and the few collectives a step needs.

At world size 1 no group exists and every collective returns at once.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from text_generation_shard.peer_memory import PeerMemory

logger = logging.getLogger(__name__)

JOIN_TIMEOUT = timedelta(minutes=10)
_peer_memory: PeerMemory | None = None
_assumed_size = 1


def join_group(
    rank: int,
    world_size: int,
    master_addr: str,
    master_port: int,
    device: torch.device,
    master_listen_fd: int | None = None,
) -> None:
    """Meet the other ranks at rank 0's address (gloo on CPUs, NCCL on GPUs).

    `master_listen_fd` is a socket that listens there already, if rank 0 has one.
    """
    if world_size == 1:
        return
    address = socket.gethostbyname(master_addr)
    if address.startswith("127."):
        # Ranks of one machine have no reason to listen where others can reach them.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _rendezvous_store(rank, world_size, address, master_port, master_listen_fd)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=JOIN_TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )
    if backend == "nccl":
        _use_peer_memory(device)


def _use_peer_memory(device: torch.device) -> None:
    """Have small sums computed from the other GPUs' memory, if every rank can read it."""
    global _peer_memory
    try:
        memory = PeerMemory(device)
    except RuntimeError as error:
        logger.info("GPUs cannot read each other's memory, so NCCL computes all sums: %s", error)
        memory = None
    if all_reduce_min(int(memory is not None)):
        _peer_memory = memory


def _rendezvous_store(rank: int, world_size: int, address: str, port: int, listen_fd: int | None) -> TCPStore:
    """The group's key-value store, at rank 0."""
    if rank != 0:
        return TCPStore(address, port, world_size, is_master=False, timeout=JOIN_TIMEOUT)
    return TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=JOIN_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=_listen(address, port) if listen_fd is None else listen_fd,
    )


def _listen(address: str, port: int) -> int:
    """A socket bound to this one address; a store left alone would listen on all."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        return listener.detach()


def leave_group() -> None:
    """End the group; the others' next collective fails."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def assumed_group(world_size: int) -> Iterator[None]:
    """Inside, collectives of tensors without memory ("meta") have the shapes that they have among so many ranks."""
    global _assumed_size
    before, _assumed_size = _assumed_size, world_size
    try:
        yield
    finally:
        _assumed_size = before


def rank() -> int:
    """This process's place in the group; 0 answers the router."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks; may be in place."""
    if not dist.is_initialized():
        return tensor
    if _peer_memory is not None and _peer_memory.can_sum(tensor):
        return _peer_memory.sum(tensor)
    dist.all_reduce(tensor)
    return tensor


def all_reduce_min(value: int) -> int:
    """The smallest of the ranks' values; waits for the device, so not for use within a step."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor)


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """The ranks' tensors side by side, on every rank."""  # [R, n] -> [R, n * world_size]
    if not dist.is_initialized():
        return torch.cat([tensor] * _assumed_size, dim=-1) if tensor.is_meta else tensor
    num_ranks, (num_rows, num_columns) = dist.get_world_size(), tensor.shape
    parts = tensor.new_empty(num_ranks * num_rows, num_columns)
    dist.all_gather_into_tensor(parts, tensor.contiguous())
    return parts.view(num_ranks, num_rows, num_columns).transpose(0, 1).flatten(1)


def broadcast(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """Rank `source`'s values on every rank, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=source)
    return tensor
