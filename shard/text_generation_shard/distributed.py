"""The group of ranks that split one model: joining it, and the few collectives a step needs.

At world size 1 no group exists and every collective returns at once.
"""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

JOIN_TIMEOUT = timedelta(minutes=10)


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


def rank() -> int:
    """This process's place in the group; 0 answers the router."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place."""
    if dist.is_initialized():
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
    """The ranks' tensors side by side along the last dimension, on every rank."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim=-1)


def broadcast(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """Rank `source`'s values on every rank, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=source)
    return tensor
