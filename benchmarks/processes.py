"""Run a function in fresh processes, as ranks of one gloo group, without importing torch and Lightning for each.

A fork server imports them once; every process is a fork of it. Used by benchmarks and by the distributed tests.
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torchvision", "lightning.pytorch", "lightning_cl.datamodules", "lightning_cl.callbacks"]
)

KILLED = "killed"


class RankError(RuntimeError):
    """A process ended with an exception; its traceback is the message."""


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Call a function once on each rank and return what each returned, or `KILLED`.

    Args:
        function: A function of a module, called with ``args``. With several ranks, a ``Trainer(strategy="ddp",
            devices=ranks)`` made in it takes part in their group.
        ranks: Number of processes.
        args: What the function gets; must be picklable.
        timeout: Seconds after which the processes are killed.
    """
    port = _free_port()
    processes, pipes = [], []
    for rank in range(ranks):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_call, args=(sender, function, ranks, rank, port, args))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    results = [_answer(pipe, timeout) for pipe in pipes]
    for process in processes:
        process.join(5)
        process.kill()
    failures = [result for result in results if isinstance(result, RankError)]
    if failures:
        raise failures[0]
    return results


def _answer(pipe: Connection, timeout: float) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(timeout) else RankError(f"No answer after {timeout} s.")
    except EOFError:
        return KILLED


def _call(
    pipe: Connection, function: Callable[..., Any], ranks: int, rank: int, port: int, args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    # loader workers as in a program of the user's: not through a fork server of this process's own
    multiprocessing.set_start_method("fork", force=True)
    if ranks > 1:
        # the variables of torchrun: Lightning then starts no processes of its own
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            WORLD_SIZE=str(ranks),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(ranks),
            GROUP_RANK="0",
            TORCHELASTIC_RUN_ID="tests",
        )
    try:
        answer = function(*args)
    except BaseException:
        answer = RankError(f"rank {rank}:\n{traceback.format_exc()}")
    # plain pickle: through the pipe itself, tensors would travel in shared memory that ends with this process
    pipe.send_bytes(pickle.dumps(answer))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
