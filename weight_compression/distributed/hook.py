"""Gradients of DistributedDataParallel: the communication hook and its state.

torch reads the hook's annotations, which therefore must not be strings: this file does without the future import.
"""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from weight_compression.codec import compress, decompress
from weight_compression.config import CompressionConfig
from weight_compression.distributed.channel import Channel, channel_of
from weight_compression.distributed.choice import MODES, Choice
from weight_compression.distributed.collectives import check_config
from weight_compression.distributed.jobs import Job, bytes_of_all_reduce, start_reduction, working_dtype
from weight_compression.distributed.plan import Ownership, Piece, make_pieces
from weight_compression.distributed.traffic import Step, Traffic
from weight_compression.errors import NonFiniteError

__all__ = ["EntropyCompressionState", "entropy_compression_hook"]

logger = logging.getLogger(__name__)

MEASURED = 1 << 20  # elements that the codec's speed is measured on


class EntropyCompressionState:
    """What :func:`entropy_compression_hook` keeps from step to step; one for every DistributedDataParallel.

    Parameters
    ----------
    process_group : torch.distributed.ProcessGroup, optional
        The group of the model's replicas, by default the default group. Two more of the same ranks are made when
        something is coded for the first time.
    config : CompressionConfig, optional
        How gradients are quantised and coded, c = 5 by default.
    error_feedback : bool, default True
        Add to every step's gradient what quantising took from the last one's: at the workers from what they send, at
        the owner of a part from its sum. Costs float32 memory of the gradients' size.
    start_iteration : int, default 2
        Iterations before are sent as they are. DDP rebuilds its buckets after the first one.
    mode : {'coded', 'auto', 'bf16', 'raw'}, default 'coded'
        How gradients are sent. 'auto' measures all three for a few steps, takes the soonest, the same on all ranks, and
        tries again later; see :attr:`decisions`.
    decisions : sequence of (int, str), optional
        What an earlier run with 'auto' decided, (first iteration, mode), to be followed instead of measuring anew, the last
        one for good: that makes the run, or what is left of it after :meth:`load_state_dict`, repeatable. Only with 'auto'.
    nonfinite : {'propagate', 'raise'}, default 'propagate'
        What becomes of NaN and infinity, on all ranks alike: they reach every rank, as in a plain all-reduce, so that
        AMP's GradScaler sees them; or backward raises a RuntimeError that names :class:`NonFiniteError`, after which
        training may go on. Parts of parameters that hold them are sent exactly, and what error feedback kept for
        these is forgotten.
    module : torch.nn.Module, optional
        The model, wrapped or not: its parameters' names are then used in statistics, errors and state_dict.
        Otherwise parameters have numbers, in the order in which DDP reduces them in its first iteration.
    keep_steps : int, default 1000
        Steps of which :meth:`stats` knows details.

    Attributes
    ----------
    iteration : int
        Backward passes so far.
    decisions : list of (int, str)
        What 'auto' has decided.

    Examples
    --------
    >>> state = EntropyCompressionState(module=model)  # doctest: +SKIP
    >>> ddp_model.register_comm_hook(state, entropy_compression_hook)  # doctest: +SKIP

    Notes
    -----
    Replicas stay identical bit by bit: every rank decodes the same payloads. The hook composes with torch's
    ``bf16_compress_wrapper`` and ``fp16_compress_wrapper``; hooks that call all_reduce themselves, as PowerSGD does, send
    coded through :class:`CompressedProcessGroup`.

    The error that is kept belongs to one rank: :meth:`state_dict` is to be saved and loaded by every rank for itself.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        config: CompressionConfig | None = None,
        *,
        error_feedback: bool = True,
        start_iteration: int = 2,
        mode: Literal["coded", "auto", "bf16", "raw"] = "coded",
        decisions: Sequence[tuple[int, str]] | None = None,
        nonfinite: Literal["propagate", "raise"] = "propagate",
        module: nn.Module | None = None,
        keep_steps: int = 1000,
    ) -> None:
        if not isinstance(start_iteration, int) or start_iteration < 0:
            raise ValueError(f"start_iteration: expected a whole number of at least 0, got {start_iteration!r}")
        if mode not in (*MODES, "auto"):
            raise ValueError(f"mode: expected 'coded', 'auto', 'bf16' or 'raw', got {mode!r}")
        if decisions is not None and mode != "auto":
            raise ValueError(f"decisions: expected mode 'auto' with them, got {mode!r}")
        for decision in decisions or ():
            if len(decision) != 2 or decision[1] not in MODES:
                raise ValueError(f"decisions: expected (iteration, 'coded', 'bf16' or 'raw'), got {decision!r}")
        if nonfinite not in ("propagate", "raise"):
            raise ValueError(f"nonfinite: expected 'propagate' or 'raise', got {nonfinite!r}")
        if keep_steps < 1:
            raise ValueError(f"keep_steps: expected at least 1, got {keep_steps}")
        self.process_group = process_group
        self.config = check_config(config)
        self.error_feedback, self.start_iteration, self.mode, self.nonfinite = (
            error_feedback,
            start_iteration,
            mode,
            nonfinite,
        )
        self.iteration = 0
        self.decisions: list[tuple[int, str]] = [(int(first), str(how)) for first, how in decisions or ()]
        self._until = 0.0 if decisions is None else math.inf  # the first iteration that is decided anew
        self._residuals: dict[int, torch.Tensor] = {}
        self._traffic = Traffic(keep_steps)
        self._numbers: dict[int, int] = {}  # by id of a parameter
        self._names: list[str] = []
        self._loaded: dict[str, torch.Tensor] = {}  # residuals of parameters that have not been seen yet
        self._named = module is not None
        self._ownership: Ownership | None = None
        self._pieces: dict[tuple[int, ...], list[Piece]] = {}
        self._choice: Choice | None = None
        self._step: Step | None = None
        self._under_way: list[torch.futures.Future[torch.Tensor]] = []  # buckets of this step
        self._seconds = 0.0
        self._busy_until = 0.0
        if module is not None:
            self.name_parameters(module)

    # ---- what is known of parameters ----

    def name_parameters(self, module: nn.Module) -> None:
        """Use the names of a model's parameters, as the argument `module` does: after unpickling, or if the model was replaced.

        Raises
        ------
        ValueError
            If parameters have been reduced under numbers, or the names are not those that the state knows.
        """
        # DDP keeps the model as its attribute `module`.
        inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
        names = {name: id(parameter) for name, parameter in inner.named_parameters()}
        if self._names and not self._named:
            raise ValueError("module: expected a state that has not reduced anything yet")
        if self._names and list(names) != self._names:
            raise ValueError(f"module: expected parameters {', '.join(self._names)}, got {', '.join(names)}")
        self._named, self._names = True, list(names)
        self._numbers = {identity: number for number, identity in enumerate(names.values())}
        self._traffic.names = dict(enumerate(self._names))

    def _number(self, parameter: torch.Tensor) -> int:
        number = self._numbers.get(id(parameter))
        if number is None:
            if self._named:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not one of the model that the state was made "
                    "with: use state.name_parameters(model)"
                )
            number = self._numbers[id(parameter)] = len(self._numbers)
            if number == len(self._names):
                self._names.append(f"parameter {number}")
                self._traffic.names[number] = self._names[-1]
        return number

    def _residual(self, number: int, like: torch.Tensor, working: torch.dtype) -> torch.Tensor:
        residual = self._residuals.get(number)
        if residual is None:
            loaded = self._loaded.pop(self._names[number], None)
            if loaded is None:
                residual = torch.zeros(like.numel(), dtype=working, device=like.device)
            else:
                if loaded.numel() != like.numel():
                    raise ValueError(
                        f"state_dict: expected {like.numel()} elements for {self._names[number]}, got {loaded.numel()}"
                    )
                residual = loaded.to(dtype=working, device=like.device, copy=True)
            self._residuals[number] = residual
        return residual

    # ---- what happens to a bucket ----

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The mean of a bucket, as :func:`entropy_compression_hook` returns it."""
        group = self.process_group if self.process_group is not None else dist.group.WORLD
        if group is None:
            raise ValueError("expected torch.distributed to be initialised: call torch.distributed.init_process_group")
        buffer = bucket.buffer()
        if self._step is None or bucket.index() == 0:  # a backward pass that failed leaves a step behind
            mode = self._mode(buffer, group)
            self._step = self._traffic.begin(self.iteration, mode)
            self._under_way = []
            self._seconds = 0.0
        step = self._step
        numbers = tuple(self._number(parameter) for parameter in bucket.parameters())
        if bucket.is_last():
            self._step = None
            self.iteration += 1
        started = time.perf_counter()
        if step.mode == "coded":
            future = self._send_coded(bucket, numbers, step, group)
        else:
            future = self._send_plain(buffer, torch.bfloat16 if step.mode == "bf16" else buffer.dtype, step, group)
        if self._choice is not None and self._choice.measures:
            future = future.then(lambda done: self._note(started, done))
        return self._hold_errors(future, bucket)

    def _hold_errors(
        self, future: torch.futures.Future[torch.Tensor], bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        """Errors come with the last bucket: DDP raises the first one, and nothing must write gradients after that.

        They are raised by a callback, because DDP says of what set_exception was called with that it is no tensor.
        """
        self._under_way.append(future)
        if not bucket.is_last():
            buffer = bucket.buffer()
            return future.then(lambda done: buffer)
        step, self._under_way = self._under_way, []
        return future.then(lambda done: [each.wait() for each in step][-1])

    def _note(self, started: float, done: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
        """Of buckets that overlap, time counts once."""
        _synchronize(done.value().device)
        now = time.perf_counter()
        self._seconds += now - max(started, self._busy_until)
        self._busy_until = now
        return done.value()

    def _send_plain(
        self, buffer: torch.Tensor, dtype: torch.dtype, step: Step, group: dist.ProcessGroup
    ) -> torch.futures.Future[torch.Tensor]:
        ranks = dist.get_world_size(group)
        sent = buffer.to(dtype).div_(ranks)
        step.add_sent(bytes_of_all_reduce([buffer], ranks), bytes_of_all_reduce([sent], ranks))
        work = dist.all_reduce(sent, group=group, async_op=True)
        if work is None:
            raise ValueError("process_group: expected a group that this rank belongs to")

        def finish(done: torch.futures.Future[Any]) -> torch.Tensor:
            done.value()
            if self.nonfinite == "raise" and not all(map(math.isfinite, torch.stack(torch.aminmax(sent)).tolist())):
                raise NonFiniteError("NaN or infinity in the mean of the gradients")
            return buffer if sent.data_ptr() == buffer.data_ptr() else buffer.copy_(sent)

        return work.get_future().then(finish)

    def _send_coded(
        self, bucket: dist.GradBucket, numbers: tuple[int, ...], step: Step, group: dist.ProcessGroup
    ) -> torch.futures.Future[torch.Tensor]:
        channel = channel_of(group)
        buffer = bucket.buffer()
        sizes = [parameter.numel() for parameter in bucket.parameters()]
        tensors = list(buffer.split(sizes))
        working = working_dtype(buffer.dtype)
        residuals = None
        if self.error_feedback and channel.ranks > 1:
            residuals = [self._residual(n, x, working) for n, x in zip(numbers, tensors, strict=True)]
        job = Job(
            tensors, channel, self.config, lambda: buffer, residuals=residuals, numbers=numbers,
            describe=lambda i: self._names[numbers[i]], reject_nonfinite=self.nonfinite == "raise", traffic=step,
        )  # fmt: skip
        start_reduction(job, self._pieces_of(numbers, sizes, channel), 1.0 / channel.ranks)
        return job.future

    def _pieces_of(self, numbers: tuple[int, ...], sizes: Sequence[int], channel: Channel) -> list[Piece]:
        if self._ownership is None:
            self._ownership = Ownership(channel.ranks)
        elif self._ownership.ranks != channel.ranks:
            raise ValueError(f"state_dict: expected one of {channel.ranks} ranks, got {self._ownership.ranks}")
        if numbers not in self._pieces:
            self._pieces[numbers] = make_pieces(list(zip(numbers, sizes, strict=True)), channel.ranks, self._ownership)
        return self._pieces[numbers]

    # ---- 'auto' ----

    def _mode(self, buffer: torch.Tensor, group: dist.ProcessGroup) -> str:
        if self.mode != "auto":
            return self.mode if self.iteration >= self.start_iteration else "raw"
        if self._choice is None:
            self._choice = Choice(
                self.start_iteration, lambda seconds: _largest(seconds, buffer.device, group),
                lambda: self._coding_seconds(buffer), self.decisions, self._until,
            )  # fmt: skip
        elif self._traffic.steps:
            self._choice.took(self._traffic.steps[-1].mode, self._seconds)
        return self._choice.mode_of(self.iteration)

    def _coding_seconds(self, buffer: torch.Tensor) -> float:
        """Of a step like the last one, at least: its elements are coded once and decoded two or three times by two threads."""
        x = buffer[:MEASURED].float()
        out = torch.empty_like(x)
        compress(torch.where(torch.isfinite(x), x, 0.0), self.config)
        _synchronize(x.device)
        start = time.perf_counter()
        payload = compress(torch.where(torch.isfinite(x), x, 0.0), self.config)
        _synchronize(x.device)
        middle = time.perf_counter()
        decompress(payload, out)
        _synchronize(x.device)
        end = time.perf_counter()
        per_element = (middle - start + (3 if self.error_feedback else 2) * (end - middle)) / 2 / max(1, x.numel())
        ranks = dist.get_world_size(self.process_group)
        elements = self._traffic.steps[-1].before * ranks / (2 * max(1, ranks - 1)) / buffer.element_size()
        return per_element * elements

    # ---- what users ask for ----

    def stats(self) -> dict[str, Any]:
        """Bytes before and after, and seconds, of all steps; bits per weight and entropy by layer of the last ones.

        Returns
        -------
        dict
            See :meth:`weight_compression.distributed.traffic.Traffic.stats`; :func:`plot_stats` draws it.
        """
        return self._traffic.stats()

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on bit by bit, besides model and optimiser: of this rank alone.

        Returns
        -------
        dict
            'iteration', 'decisions', 'named', 'owners', and 'residuals', float32 or float64 tensors by parameter's name.
        """
        residuals = {self._names[number]: residual.clone() for number, residual in self._residuals.items()}
        return {
            "iteration": self.iteration,
            "decisions": list(self.decisions),
            "named": self._named,
            "owners": None if self._ownership is None else self._ownership.state_dict(),
            "residuals": {**{name: x.clone() for name, x in self._loaded.items()}, **residuals},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was that :meth:`state_dict` was taken of, on the same rank of as many ranks.

        'auto' measures again from there, unless the state was made with `decisions`, which are then kept.

        Raises
        ------
        ValueError
            If it is of a model with other parameters' names or, when those are reduced, sizes.
        """
        if "named" not in state_dict:
            raise ValueError(f"state_dict: expected what state_dict() gave, got entries {sorted(state_dict)}")
        if state_dict["named"] != self._named:
            raise ValueError("state_dict: expected one of a state made with module in the same way, given or not")
        if self._named and (unknown := sorted(set(state_dict["residuals"]) - set(self._names))):
            raise ValueError(f"state_dict: expected parameters of this model, got {', '.join(unknown)}")
        self.iteration = int(state_dict["iteration"])
        if self._until < math.inf:
            self.decisions = [(int(first), str(mode)) for first, mode in state_dict["decisions"]]
            self._until = self.iteration
        self._choice = None
        self._residuals = {}
        self._loaded = {name: x.clone() for name, x in state_dict["residuals"].items()}
        self._pieces = {}
        self._ownership = None if state_dict["owners"] is None else Ownership.from_state_dict(state_dict["owners"])

    def __getstate__(self) -> dict[str, Any]:
        logger.warning("The process group is not serialisable and left out of the state.")
        state = self.__dict__.copy()
        for name in ("process_group", "_numbers", "_choice", "_step", "_under_way", "_pieces"):
            del state[name]
        state["_until"] = max(self._until, self.iteration)
        state["_loaded"] = {**self._loaded, **{self._names[n]: r for n, r in self._residuals.items()}}
        state["_residuals"] = {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        logger.warning("The process group is not part of the state: the default group is used.")
        self.__dict__.update(state)
        self.process_group = None
        self._numbers, self._pieces, self._choice, self._step, self._under_way = {}, {}, None, None, []


def _synchronize(device: torch.device) -> None:
    """Wait for what is queued, so that it is part of what is timed: 'auto' compares ways, which differ in what they queue."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _largest(seconds: Sequence[float], device: torch.device, group: dist.ProcessGroup) -> list[float]:
    """Of all ranks, one by one."""
    found = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found.tolist()


def entropy_compression_hook(
    state: EntropyCompressionState, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """The mean of gradients over all ranks, sent quantised by entropy and Huffman coded.

    For ``DistributedDataParallel.register_comm_hook(state, entropy_compression_hook)``.

    Parameters
    ----------
    state : EntropyCompressionState
    bucket : torch.distributed.GradBucket

    Returns
    -------
    torch.futures.Future
        Of the bucket's tensor.

    Raises
    ------
    NotImplementedError
        Under DDP's compiled reducer (``torch._dynamo.config.optimize_ddp = "python_reducer"``), which cannot run other
        threads. Compiled models under its default setting work.
    """
    if torch.compiler.is_compiling() or not isinstance(bucket, dist.GradBucket):  # that reducer passes a tuple
        raise NotImplementedError(
            'expected torch._dynamo.config.optimize_ddp at its default: "python_reducer" traces hooks, and this one codes '
            "in threads of its own"
        )
    return state.reduce(bucket)
