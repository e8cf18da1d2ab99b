"""The processes of one run: who they are, on which device, and the few things they say to each other.

    with session(DistributedConfig()) as world, StopFlag() as stop:
        index = world.wait_for(build_index, stop)   # rank 0 works, the others wait; a signal ends both
        for step in range(steps):
            total = world.sum_(loss_sum)
            if world.agree(stop.requested):         # every rank leaves at the same step
                break

Started by torchrun (or by anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) there are as many
processes as it says; started by hand there is one, which goes through the same calls.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist

from dist_colorize.errors import FAILURE, Interrupted, UserError, report
from dist_colorize.flight_recorder import FlightRecorder
from dist_colorize.hardware import usable_cores, use_ieee_fp32
from dist_colorize.heartbeat import Heartbeat, Launcher, PeerLost
from dist_colorize.rendezvous import Rendezvous, environment_number
from dist_colorize.stopping import StopFlag

T = TypeVar("T")

POLL_SECONDS = 0.2
"""How often ranks that wait for rank 0's work agree on whether to go on."""

LEAVING_SECONDS = 10.0
"""How long rank 0's work may take to see that it is to stop, before the ranks leave without its result."""

SIGNS_OF_A_COLLECTIVE = ("gloo", "Gloo", "NCCL", "pair closure")
"""What torch's errors say where a collective has failed; most of them have no type of their own."""

SETTLE_SECONDS = 10.0
"""How long a rank waits at the end for gloo's threads to let go of its tensors."""


def nccl_timeout(timeout: float) -> float:
    """Seconds until NCCL's watchdog ends the process for a collective that hangs, where gloo waits for `timeout`.

    The clocks start together, as a rank hands both a collective and goes on. gloo's has to run out first, and leave
    time to find out which rank is missing and to say so, from the heartbeat's thread where the main one hangs too.
    """
    return 2 * timeout + 60


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Where the ranks of a run compute and how they talk."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs; auto is cuda where there is a GPU."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Transport of the collectives; auto is nccl where each rank has a GPU of its own, else gloo."""
    timeout: float = 300.0
    """Seconds that a rank waits for another one in a collective before it gives up. NCCL's own limit is twice that and
    a minute, so that the rank that is missing can be named."""
    threads: int | None = None
    """CPU threads of each rank, which decide the order of sums and so their last bits. null: the rank's share of the
    cores that it may use (usable_cores), the smallest one over all ranks: they wait for each other anyway."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1 or null, got {self.threads}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be a number of seconds above 0, got {self.timeout}")
        if self.device == "cpu" and self.backend == "nccl":
            raise ValueError("backend nccl works on GPUs only; use gloo or auto with device cpu")


class Lent:
    """Tensors on the CPU that gloo's threads may hold, also for a moment after their collective is done.

    To let go of the last reference a thread needs Python's lock. One that asks for it while the interpreter ends, after
    the last collective of a run, takes the process down with SIGABRT. So each tensor is kept here until only Python
    holds it. They must be new ones: references of others would keep them here.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keeps the tensor and returns it."""
        self._forget()
        self._tensors.append(tensor)
        return tensor

    def settle(self, seconds: float) -> None:
        """Waits until all are back, or for `seconds`."""
        deadline = time.monotonic() + seconds
        while self._tensors and time.monotonic() < deadline:
            self._forget()
            time.sleep(0)

    def _forget(self) -> None:
        # Python's references count as one, however many there are.
        self._tensors = [tensor for tensor in self._tensors if tensor._use_count() > 1]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class World:
    """This process among the others. Every method but the properties is a collective: all ranks must call it."""

    rank: int
    """0 .. size - 1, over all nodes."""
    local_rank: int
    """0 .. local_size - 1, on this node."""
    size: int
    local_size: int
    device: torch.device
    backend: str
    """gloo or nccl, for tensors on `device`; tensors on the CPU always go through gloo."""
    threads: int
    """CPU threads of each rank."""
    heartbeat: Heartbeat | None = None
    """Tells the other ranks that this one lives, and how far it is."""
    recorder: FlightRecorder | None = None
    """Remembers the last collectives, for the case that one fails."""
    lent: Lent = field(default_factory=Lent, repr=False, compare=False)
    """What gloo was given."""

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, the one that writes files and speaks to the user."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` on every rank by its sum over the ranks; returns it. Exact for integers."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def agree(self, flag: bool) -> bool:
        """Whether any rank's flag is set. Goes over the CPU, so that no GPU has to finish its queue first."""
        return self.ask(flag).answer()

    def ask(self, flag: bool) -> Question:
        """Begins to `agree`; the answer can be had later, in any order with other collectives."""
        raised = self.lent.add(torch.tensor([flag], dtype=torch.uint8))
        self._enter()
        return Question(raised, dist.all_reduce(raised, dist.ReduceOp.MAX, async_op=True))

    def gather_objects(self, item: T) -> list[T]:
        """The picklable `item` of every rank, by rank."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def broadcast_object(self, item: T) -> T:
        """Rank 0's picklable `item`; what other ranks pass is ignored."""
        box = [item if self.is_leader else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Return when every rank is here. Goes over the CPU."""
        self.agree(False)

    def wait_for(self, work: Callable[[], T] | None, stop: StopFlag | None = None) -> T:
        """Rank 0 runs `work` (others may pass None) in a thread; every rank returns its result, which must pickle.

        However long it takes, no collective times out. When any rank's `stop` is set, it becomes set on all ranks, so
        that `work` can see it, rank 0 gives `work` LEAVING_SECONDS to return, and all ranks raise Interrupted. Rank 0's
        process does not end before `work` has returned.
        An exception of `work` is raised on all ranks: UserError as it is, any other as RuntimeError elsewhere.
        """
        result: Any = None
        error: BaseException | None = None
        done = threading.Event()

        def run() -> None:
            nonlocal result, error
            try:
                result = work() if work else None
            except BaseException as raised:
                error = raised
            done.set()

        if self.is_leader:
            # No daemon: those are frozen when the interpreter ends, with whatever locks they hold, such as that of a
            # progress bar, which the interpreter then waits for. As it is, the end waits for the work to return.
            threading.Thread(target=run, name="wait_for").start()
        while True:
            finished = self.is_leader and done.wait(POLL_SECONDS)  # the others wait in the collective below
            state = torch.tensor([finished, stop is not None and stop.requested], dtype=torch.uint8)
            try:
                self._reduce(state, dist.ReduceOp.MAX)
            except BaseException:  # a rank has gone: nobody waits for the work any more
                if stop is not None:
                    stop.request()
                raise
            finished, stopping = (bool(s) for s in state.tolist())
            if stopping:  # before a look at the result: work that saw the flag may have returned half of it
                if stop is not None:
                    stop.request()
                done.wait(LEAVING_SECONDS if self.is_leader else 0)
                raise Interrupted("stopped on request")
            if finished:
                break

        if self.is_leader and error is not None:
            shared = isinstance(error, UserError)
            self.broadcast_object((None, shared, str(error) if shared else f"{type(error).__name__}: {error}"))
            if shared:
                raise UserError(str(error), shared=True) from error
            raise error
        value, shared, message = self.broadcast_object((result, False, None))
        if message is not None:
            raise UserError(message, shared=True) if shared else RuntimeError(f"rank 0 failed: {message}")
        return value

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        self._enter()
        if tensor.device.type != "cpu":
            dist.all_reduce(tensor, operation)
            return tensor
        shared = self.lent.add(tensor.clone())
        dist.all_reduce(shared, operation)
        return tensor.copy_(shared)

    def _enter(self) -> None:
        """At the beginning of every collective."""
        if self.heartbeat is not None:
            self.heartbeat.reached += 1


@dataclass(frozen=True)
class Question:
    """Whether any rank's flag is set, while the answer is on its way."""

    raised: torch.Tensor
    work: dist.Work

    def answer(self) -> bool:
        """Waits for the answer, which is the same on every rank."""
        self.work.wait()
        return bool(self.raised.item())


class LateAgreement:
    """`World.agree` for a loop of steps that must not wait for the other ranks: each call answers the one before it.

        with LateAgreement(world) as agree:
            while not stopping:
                ...                                 # a step, during which the flags travel
                stopping = agree(stop.requested)

    A collective: all ranks call it at the same places, and have the same answer there. The first one is False. The last
    question may stay open: the session's end waits for it.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked: Question | None = None

    def __call__(self, flag: bool) -> bool:
        before, self._asked = self._asked, self._world.ask(flag)
        self._watch(None)  # from here on this thread looks itself
        answer = before is not None and before.answer()
        self._watch(self._asked.work)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch(None)

    def _watch(self, work: dist.Work | None) -> None:
        """gloo gives up in time, but a thread that waits for a GPU with a hanging collective does not hear of it."""
        if self._world.heartbeat is not None and self._world.backend == "nccl":
            self._world.heartbeat.watched = work


@contextlib.contextmanager
def session(config: DistributedConfig) -> Iterator[World]:
    """Join the process group that the environment describes; leave it at the end, all ranks together.

    Interrupted must be raised on all ranks or none; another exception of one rank ends the others by a broken link.
    Raises UserError (on all ranks) where the device or the backend that the config asks for cannot be had.
    """
    rank, size = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    local_rank, local_size = environment_number("LOCAL_RANK", 0), environment_number("LOCAL_WORLD_SIZE", 1)
    launcher = Launcher()
    meeting = Rendezvous(rank, size, config.timeout, launcher)
    device = own_device(config, local_rank)  # where rank 0 has none, the others hear of it as its store goes
    backend = _agreed_backend(config, meeting.exchange("identity", _identity(device)))
    use_ieee_fp32()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shares = meeting.exchange("share", str(usable_cores() // local_size))
    threads = config.threads or max(1, min(map(int, shares)))
    torch.set_num_threads(threads)
    stuck = False
    lent = Lent()
    heartbeat = Heartbeat(dist.PrefixStore("life", meeting.second_store), rank, size, launcher)
    recorder = FlightRecorder(rank, enabled=backend == "nccl")
    heartbeat.when_stuck = partial(_name_lost_peers_and_leave, heartbeat, recorder)
    try:
        with recorder, heartbeat, _naming_lost_peers(heartbeat, recorder):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo",
                store=dist.PrefixStore("group", meeting.store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=config.timeout),
                device_id=device if backend == "nccl" else None,
            )
            if backend == "nccl":
                _backend_for("cuda").set_timeout(timedelta(seconds=nccl_timeout(config.timeout)))
            world = World(rank, local_rank, size, local_size, device, backend, threads, heartbeat, recorder, lent)
            try:
                yield world
            except Interrupted:
                # All ranks are on their way out, but rank 0 may still save: torchrun ends all when it sees one gone.
                world.barrier()
                raise
            world.barrier()  # rank 0 may host the store that the others still need to leave in order
    except BaseException as error:
        # Ranks that still wait in a GPU collective would hold us up; leaving ends the group as well. What all ranks
        # raise, or one that is alone, keeps nobody waiting.
        waiting = isinstance(error, PeerLost) or (size > 1 and not getattr(error, "shared", False))
        stuck = backend == "nccl" and waiting
        if stuck and isinstance(error, PeerLost):
            atexit.register(_leave_now)
        raise
    finally:
        if not stuck and dist.is_initialized():
            dist.destroy_process_group()
        lent.settle(SETTLE_SECONDS)


@contextlib.contextmanager
def _naming_lost_peers(heartbeat: Heartbeat, recorder: FlightRecorder) -> Iterator[None]:
    """Turns the error of a collective whose other side has gone into a PeerLost that says who."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in SIGNS_OF_A_COLLECTIVE):
            raise
        if heartbeat.size == 1 and isinstance(error, dist.DistBackendError):  # nobody is lost: NCCL's words tell more
            raise
        if dist.is_initialized():
            # Those who wait for this rank would hear of the loss only when it leaves: close the connections first.
            _backend_for("cpu").abort()
        raise _loss(heartbeat, recorder, error) from None


def _name_lost_peers_and_leave(heartbeat: Heartbeat, recorder: FlightRecorder, error: RuntimeError) -> None:
    """For a thread, where the main one waits for a GPU whose collective does not end."""
    report(_loss(heartbeat, recorder, error))
    _leave_now()


def _loss(heartbeat: Heartbeat, recorder: FlightRecorder, error: RuntimeError) -> PeerLost:
    told = heartbeat.explain(error)
    record = recorder.dump()
    return PeerLost(told if record is None else f"{told}; torchfrtrace {record.parent} shows the last collectives")


def _leave_now() -> None:
    """Ends the process where its orderly end would wait for a GPU collective that does not end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILURE)


def _backend_for(device: str) -> Any:
    """What serves the collectives of the tensors on `device`, cpu or cuda."""
    return dist.group.WORLD._get_backend(torch.device(device))  # type: ignore[union-attr]


def own_device(config: DistributedConfig, local_rank: int) -> torch.device:
    """This rank's device; ranks beyond the number of GPUs share them in turn."""
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        # A cluster may show each task its own GPU only, always with index 0: hence the remainder.
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if config.device == "cuda" or config.backend == "nccl":
        asked = "distributed.device=cuda" if config.device == "cuda" else "distributed.backend=nccl"
        reason = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU or driver"
        )
        raise UserError(f"{asked} on {socket.gethostname()}: {reason}; set auto, or see python -m dist_colorize.doctor")
    return torch.device("cpu")


def _identity(device: torch.device) -> str:
    """Two ranks have the same identity exactly when they compute on the same GPU of the same node."""
    if device.type == "cpu":
        return f"cpu {socket.gethostname()}"
    return f"cuda {socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def _agreed_backend(config: DistributedConfig, identities: list[str]) -> str:
    """The backend for tensors on the ranks' devices; the same answer on every rank, as all see all identities."""
    kinds = [identity.split()[0] for identity in identities]
    if len(set(kinds)) > 1:
        rank, other = kinds.index("cpu"), kinds.index("cuda")
        host = identities[rank].split()[1]
        raise UserError(
            f"rank {rank} on {host} has no GPU while rank {other} has one; "
            "set distributed.device=cpu, or leave that node out",
            shared=True,
        )
    if kinds[0] == "cpu":
        return "gloo"
    shared = next((i for i, identity in enumerate(identities) if identity in identities[:i]), None)
    if config.backend == "nccl" and shared is not None:
        first = identities.index(identities[shared])
        raise UserError(
            f"ranks {first} and {shared} share one GPU, which nccl cannot serve; "
            "start no more ranks than GPUs, or set distributed.backend=auto",
            shared=True,
        )
    if config.backend == "auto":
        return "nccl" if shared is None else "gloo"
    return config.backend
