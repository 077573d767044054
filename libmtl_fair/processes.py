"""Training in several processes: who is here, and what they bring together in a step.

Each process runs the encoder on its share of a batch. What a method looks at (outputs, labels, group ids, representations) is gathered,
so that every process sees the whole batch and comes to the same gradient at the outputs; each derives its own share of it, and the
parameters' gradients are added up.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from libmtl_fair.errors import ProcessError

T = TypeVar("T")
_all_gather: Callable[..., Any] = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)  # its name since torch 2.13
TIMEOUT = "LIBMTL_FAIR_TIMEOUT"
"""Environment variable: seconds after which a process that does not answer is given up (default 1800)."""


class Processes:
    """The processes of this training. Every method that speaks to the others has to be called by all, in the same order.

    Attributes
    ----------
    rank : int
        Which one this is; the first, 0, writes.
    size : int
        How many there are.
    sent : int
        Bytes that this process has handed over so far.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.sent = dist.get_rank(), dist.get_world_size(), 0
        with self._answered():  # numbers that the host needs do not wait for a device
            self._host = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.size}: another process has ended, is doing something else or does not answer "
                f"({str(error).splitlines()[0]}). Look for its error above; what was saved is good, go on with resume"
            ) from error

    # -- numbers and objects ----------------------------------------------------------------------------------------

    def objects(self, own: T) -> list[T]:
        """Return what each process says."""
        found: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(found, own, group=self._host)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes; an error of its making is raised in all."""
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except Exception as error:  # noqa: BLE001
                made[1] = error
        with self._answered():
            dist.broadcast_object_list(made, 0, group=self._host)
        if made[1] is not None:
            raise made[1]
        result: T = made[0]
        return result

    def counts(self, own: Sequence[int]) -> list[list[int]]:
        """Return the numbers of each process, [process][number]."""
        given = torch.tensor(own, dtype=torch.int64)
        found = torch.empty(self.size * len(given), dtype=torch.int64)
        self.sent += given.nbytes
        with self._answered():
            _all_gather(found, given, group=self._host)
        rows: list[list[int]] = found.view(self.size, -1).tolist()
        return rows

    # -- tensors ----------------------------------------------------------------------------------------------------

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over processes, of a value that nothing is derived through."""
        value = value.detach().clone(memory_format=torch.contiguous_format)
        self.sent += value.nbytes
        with self._answered():
            dist.all_reduce(value)
        return value

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
        for alike in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
            with self._answered():
                dist.broadcast(flat, 0)
            for tensor, part in zip(alike, torch.split(flat, [tensor.numel() for tensor in alike])):
                tensor.copy_(part.view_as(tensor))

    def gather(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Return tensors [rows, ...] of all processes, one after the other; derivatives go to one's own rows.

        ``sizes``: rows of each process. Whole numbers travel as floating ones, up to 2**24 exactly.
        """
        dtype = torch.float32
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype) if part.is_floating_point() else dtype
        rows, widths = sizes[self.rank], [math.prod(part.shape[1:]) for part in parts]
        flat = torch.cat([part.reshape(rows, width).to(dtype) for part, width in zip(parts, widths)], 1)
        found: list[Tensor] = []
        whole: Tensor = _Gather.apply(flat, self, sizes)  # type: ignore[no-untyped-call]
        for part, piece in zip(parts, whole.split_with_sizes(widths, 1)):
            shaped = piece.reshape(-1, *part.shape[1:]).to(part.dtype)
            found.append(shaped if part.requires_grad else shaped.detach())
        return found

    def rows(self, sizes: Sequence[int]) -> slice:
        """Return where in a gathered tensor this process's rows are."""
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def gathered(self, flat: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return matrices [rows, C] of all processes, one after the other."""
        longest = max(sizes)
        if len(flat) < longest:
            flat = torch.cat([flat, flat.new_zeros(longest - len(flat), flat.shape[1])])
        found = flat.new_empty(self.size * longest, flat.shape[1])
        self.sent += flat.nbytes
        with self._answered():
            _all_gather(found, flat.contiguous())
        if min(sizes) == longest:
            return found
        return torch.cat([part[:rows] for part, rows in zip(found.view(self.size, longest, -1), sizes)])

    def add_up(self, parameters: Sequence[Tensor]) -> None:
        """Put into ``.grad`` of each parameter the sum of all processes' gradients; None where no process has one."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for p in parameters:
            kinds.setdefault((p.dtype, p.device), []).append(p)
        for alike in kinds.values():
            sizes = [p.numel() for p in alike]
            flat = alike[0].new_zeros(sum(sizes) + len(sizes))  # and who has a gradient
            flat = flat.detach()
            for p, part in zip(alike, torch.split(flat[: sum(sizes)], sizes)):
                if p.grad is not None:
                    part.copy_(p.grad.reshape(-1))
            own = [p.grad is not None for p in alike]
            flat[sum(sizes) :] = torch.tensor(own, dtype=flat.dtype)
            self.sent += flat.nbytes
            with self._answered():
                dist.all_reduce(flat)
            there = own if all(own) else (flat[sum(sizes) :] > 0).tolist()
            for p, part, has in zip(alike, torch.split(flat[: sum(sizes)], sizes), there):
                p.grad = part.view_as(p) if has else None

    # -- random draws -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def own_draws(self, step: int, device: torch.device) -> Iterator[None]:
        """Within it torch draws (dropout) from a stream of this process and step; the stream outside stays the same in all."""
        used = [torch.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            used.append(torch.cuda.default_generators[index])
        held = [generator.get_state() for generator in used]
        seed = (torch.initial_seed() + 0x9E3779B97F4A7C15 * (step * self.size + self.rank + 1)) % 2**63
        for generator in used:  # by themselves: torch.manual_seed and fork_rng take fifty times as long
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in zip(used, held):
                generator.set_state(state)


class _Gather(torch.autograd.Function):
    """Matrices [rows, C] of all processes, one after the other; each process derives by its own rows."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, processes: Processes, sizes: Sequence[int]) -> Tensor:
        """Gather."""
        ctx.rows = processes.rows(sizes)
        return processes.gathered(flat, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of this process's rows."""
        return grad[ctx.rows], None, None


# -- who is here --------------------------------------------------------------------------------------------------

_known: dict[int, Processes] = {}
_alone: list[bool] = []


def current() -> Processes | None:
    """Return the processes of the group that was initialised; None where there is but one, and within :func:`alone`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2 or _alone:
        return None
    key = id(dist.group.WORLD)
    if key not in _known:
        _known.clear()
        _known[key] = Processes()
    return _known[key]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it this process works by itself."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def leave() -> None:
    """Leave the group, at the end of a training."""
    if dist.is_available() and dist.is_initialized():
        _known.clear()
        dist.destroy_process_group()


def join(device: torch.device) -> Processes | None:
    """Join the group that torchrun or SLURM's srun started, unless it was joined; return :func:`current`.

    gloo on a CPU, nccl on CUDA. A process that does not answer for :data:`TIMEOUT` seconds is given up.
    """
    if dist.is_available() and not dist.is_initialized() and not _alone and (place := launched()) is not None:
        seconds = datetime.timedelta(seconds=float(os.environ.get(TIMEOUT, "1800")))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=f"tcp://{place['address']}" if "address" in place else "env://",
                rank=place["rank"],
                world_size=place["size"],
                timeout=seconds,
            )
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"process {place['rank']} of {place['size']} cannot join the others ({str(error).splitlines()[0]}); "
                "look for an error of theirs, or at MASTER_ADDR and MASTER_PORT"
            ) from error
    return current()


def launched() -> dict[str, Any] | None:
    """Return what a launcher says of this process (``rank``, ``size``, ``local``, ``address``); None where it is alone."""
    env = os.environ
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= env.keys():
        found = {"rank": int(env["RANK"]), "size": int(env["WORLD_SIZE"]), "local": int(env.get("LOCAL_RANK", "0"))}
    elif "SLURM_PROCID" in env and (tasks := _step_tasks()) is not None:
        found = {"rank": int(env["SLURM_PROCID"]), "size": tasks, "local": int(env.get("SLURM_LOCALID", "0"))}
        host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "localhost"))
        port = env.get("MASTER_PORT") or str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)
        return {**found, "address": f"{host}:{port}"} if found["size"] > 1 else None
    else:
        return None
    return found if found["size"] > 1 else None


def _step_tasks() -> int | None:
    """Return how many tasks srun started; None within sbatch's own script, which is one process whatever SLURM_NTASKS says."""
    env = os.environ
    counted = env.get("SLURM_STEP_NUM_TASKS")
    if counted is None and {"SLURM_STEP_ID", "MASTER_ADDR"} & env.keys():
        counted = env.get("SLURM_NTASKS")
    return None if counted is None else int(counted)


def first_host(nodes: str) -> str:
    """Return the first of SLURM's node list.

    >>> first_host("node[08-10,12],other"), first_host("a,b")
    ('node08', 'a')
    """
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return "localhost" if found is None else found[1] + (found[2] or "")
