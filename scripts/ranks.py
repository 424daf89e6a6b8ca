"""The processes that torchrun starts: how they find each other, and what they do alike."""

import contextlib
import datetime
import os
import socket
import sys
import time

import torch
import torch.distributed as dist

import tp
from scripts.checkpoint import Refusal, refusing

VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
PATIENCE = datetime.timedelta(minutes=1)


def join() -> None:
    """Find the other processes, if torchrun has started some. Only the first one prints. Raises
    Refusal where the variables of torchrun make no sense, or nobody is there in time."""
    if tp.world == 1:
        return
    given = {name: os.environ.get(name, "") for name in VARIABLES}
    numbers = [tp.variable(name) for name in VARIABLES if name != "MASTER_ADDR"]
    if min(numbers) < 0 or not given["MASTER_ADDR"] or tp.rank >= tp.world:
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        raise Refusal(f"{found}: expected what torchrun sets, or none of it")
    if tp.rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    where = f"{given['MASTER_ADDR']}:{given['MASTER_PORT']}"
    with refusing(f"the other processes are not at {where}", RuntimeError, ValueError, OSError):
        wait_for(given["MASTER_ADDR"], int(given["MASTER_PORT"]))
        store, *_ = next(dist.rendezvous("env://", tp.rank, tp.world, timeout=PATIENCE))
        dist.init_process_group(
            backend,
            store=store,
            rank=tp.rank,
            world_size=tp.world,
            timeout=datetime.timedelta(days=1),  # a chat waits as long as its user thinks
        )


def wait_for(host: str, port: int) -> None:
    """Until somebody listens there, unless that will be this process. PyTorch itself would wait for
    longer, and fill the screen."""
    socket.getaddrinfo(host, port)
    is_client = tp.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    end = time.monotonic() + PATIENCE.total_seconds()
    while is_client:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


@contextlib.contextmanager
def together():
    """What all ranks do alike: a ValueError or OSError of one is raised at all, so that none waits
    for one that has left."""
    error = None
    try:
        yield
    except (ValueError, OSError) as e:
        error = e
    errors = [error] * tp.world
    if dist.is_initialized():
        tp.exchange(dist.all_gather_object, errors, error)
    for error in filter(None, errors):
        raise error


def from_first(value):
    """The first rank's value, at every rank."""
    values = [value]
    if dist.is_initialized():
        tp.exchange(dist.broadcast_object_list, values)
    return values[0]
