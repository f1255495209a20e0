"""Weights of replicas that train for themselves in between: averaged now and then, coded."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # DTensor and other tensors that hold tensors

from weight_compression.config import CompressionConfig
from weight_compression.distributed.channel import Channel, channel_of
from weight_compression.distributed.collectives import FLOATS, check_config
from weight_compression.distributed.jobs import Job, bytes_of_all_reduce, start_reduction, working_dtype
from weight_compression.distributed.members import Known, Member, Parameters, named_parameters
from weight_compression.distributed.plan import Ownership, make_pieces
from weight_compression.distributed.traffic import Step, Traffic
from weight_compression.errors import NonFiniteError

__all__ = ["CompressedModelAverager"]

logger = logging.getLogger(__name__)

CODES = ("auto", "difference", "weights")
LEFT_OUT = "left out by pickling"

MakeOptimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


class CompressedModelAverager(ModelAverager):
    """Averages the weights of all ranks every few steps, sent quantised by entropy and Huffman coded.

    Used as ``torch.distributed.algorithms.model_averaging.averagers.PeriodicModelAverager`` is, by itself or in a
    ``PostLocalSGDOptimizer``. Every rank ends every averaging with the same bits.

    Parameters
    ----------
    period : int
        Steps from one averaging to the next. 1 if :meth:`average_parameters` is called once an epoch, as in the thesis.
    warmup_steps : int, default 0
        Steps before the first averaging.
    process_group : torch.distributed.ProcessGroup, optional
        The default group if not given. Two more of the same ranks are made when something is coded for the first time.
    config : CompressionConfig, optional
        How tensors are quantised and coded, c = 5 by default.
    code : {'auto', 'difference', 'weights'}, default 'auto'
        What is coded of a parameter: its difference to the last agreed weights, or the weights themselves, which is
        the thesis's scheme (chapter 3). Bins are as wide as the range of what is coded, so that differences are sent
        more exactly with the same bits as long as their range is smaller. 'auto' looks at that for every parameter: the
        difference, unless the last averaging moved the agreed weights over a range that is not smaller than their own.
        While nothing is agreed, 'auto' codes the weights, and 'difference' sends them exactly.
    error_feedback : bool, default True
        Add to every difference what quantising took from the last one's, at the worker and at the owner of a part.
        Costs float32 memory of the parameters' size. It does not apply to weights.
    buffers : torch.nn.Module or iterable of torch.Tensor, optional
        Buffers to be averaged too, of a module those in its ``state_dict()``. They are sent exactly: quantising could make
        a variance negative. Floating point ones become their mean, computed in float64; integer and boolean ones
        become the largest of all ranks, so that BatchNorm's ``num_batches_tracked`` keeps on counting. By default
        buffers stay as they are on every rank.
    outer_optimizer : callable, optional
        Takes a list of tensors and returns a torch optimiser for them, which makes a step at every averaging: its
        parameters are the agreed weights, its gradients these less the mean of all ranks' weights. With
        ``lambda weights: torch.optim.SGD(weights, lr=0.7, momentum=0.9, nesterov=True)`` this is DiLoCo
        (Douillard et al., 2023, arXiv 2311.08105, algorithm 1). By default the mean is what all ranks go on with.
    keep_steps : int, default 1000
        Averagings of which :meth:`stats` knows details.

    Attributes
    ----------
    step : int
        Calls of :meth:`average_parameters` so far.
    codes : dict of str to str
        By parameter's name: what the last averaging coded, 'weights', 'difference' or 'exact'.
    outer : torch.optim.Optimizer or None
        What `outer_optimizer` made when the first outer step was due.

    Examples
    --------
    >>> averager = CompressedModelAverager(period=20, buffers=model)  # doctest: +SKIP
    >>> averager.broadcast_parameters(model.parameters())  # doctest: +SKIP
    >>> optimizer = PostLocalSGDOptimizer(optimizer, averager)  # doctest: +SKIP

    Notes
    -----
    The first averaging only brings about agreement; outer steps begin with the second. If replicas may start from different
    weights, or an outer step shall count from the first ones, call :meth:`broadcast_parameters` before training.

    Parameters that do not require grad are left out; one that ceases to is averaged once more. All others take part,
    whether they have a gradient or not. A parameter that is given twice, because layers share it, is sent once.

    Agreed weights, which all but ``code="weights"`` without an outer optimiser need, are kept in float32 (float64 for float64),
    so that averages of bfloat16 weights can move by less than their last bit.

    What a failure leaves: an error of an averaging is raised before any parameter, buffer or agreed weight has changed.
    NaN or infinity in a mean raises :class:`weight_compression.NonFiniteError` on all ranks; after it, the averager can
    be used again, and has forgotten the errors that it kept.

    The error that is kept belongs to one rank: :meth:`state_dict` is to be saved and loaded by every rank for itself.
    Without `error_feedback` it is the same on all ranks.
    """

    def __init__(
        self,
        period: int,
        warmup_steps: int = 0,
        process_group: dist.ProcessGroup | None = None,
        config: CompressionConfig | None = None,
        *,
        code: Literal["auto", "difference", "weights"] = "auto",
        error_feedback: bool = True,
        buffers: nn.Module | Iterable[torch.Tensor] | None = None,
        outer_optimizer: MakeOptimizer | None = None,
        keep_steps: int = 1000,
    ) -> None:
        if not isinstance(period, int) or period < 1:
            raise ValueError(f"period: expected a whole number of at least 1, got {period}")
        if not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected a whole number of at least 0, got {warmup_steps}")
        if not isinstance(error_feedback, bool):
            raise TypeError(f"error_feedback: expected True or False, got {error_feedback!r}")
        if outer_optimizer is not None and not callable(outer_optimizer):
            raise TypeError(f"outer_optimizer: expected a function that makes an optimiser, got {outer_optimizer!r}")
        if code not in CODES:
            raise ValueError(f"code: expected 'auto', 'difference' or 'weights', got {code!r}")
        if keep_steps < 1:
            raise ValueError(f"keep_steps: expected at least 1, got {keep_steps}")
        super().__init__(_initialised(process_group))
        self.period, self.warmup_steps = period, warmup_steps
        self.config = check_config(config)
        self.code, self.error_feedback = code, error_feedback
        self.buffers: Any = buffers if buffers is None or isinstance(buffers, nn.Module) else list(buffers)
        self.outer_optimizer: Any = outer_optimizer
        self.codes: dict[str, str] = {}
        self.outer: torch.optim.Optimizer | None = None
        self._outer_state: dict[str, Any] | None = None  # of an optimiser that has not been made again yet
        self._outer_numbers: list[list[int]] = []  # tensors of its parameter groups
        self._known: list[Known] = []
        self._ownership: Ownership | None = None
        self._traffic = Traffic(keep_steps)

    # ---- what users call ----

    def average_parameters(self, params: Parameters) -> None:
        """Count a step, and average if it is time for it: at step `warmup_steps` and every `period` steps from there.

        Parameters
        ----------
        params : iterable
            Parameters, as ``model.parameters()`` gives them, or parameter groups of an optimiser, or pairs of names and
            parameters, as ``model.named_parameters()`` gives them. The same at every call and on all ranks, in the
            same order; new ones may follow behind the others.

        Raises
        ------
        NonFiniteError
            On all ranks, if a mean is not finite.
        PayloadError
            If what came is not what was sent; it names rank and parameter.
        PeerError
            If another rank failed.
        RuntimeError
            What torch.distributed raises if a rank died or did not answer within the group's timeout.
        ValueError, TypeError
            If parameters are not those of the last call, or none that can be averaged.
        """
        member = dist.get_rank(self._group()) >= 0
        if member and self.step >= self.warmup_steps and (self.step - self.warmup_steps) % self.period == 0:
            self._average(self._meet(params))
        self.step += 1

    @torch.no_grad()
    def broadcast_parameters(self, params: Parameters, src: int = 0) -> None:
        """Give all ranks one rank's parameters and `buffers`, exactly, and agree on them.

        Parameters
        ----------
        params : iterable
            As for :meth:`average_parameters`. Those that do not require grad are sent too.
        src : int, default 0
            Rank in the group.
        """
        group = self._group()
        if dist.get_rank(group) < 0:
            return
        members = self._meet(params)
        targets = [member.parameter for member in members] + self._buffers()
        sent = [x.detach().clone(memory_format=torch.contiguous_format) for x in targets]
        works = [dist.broadcast(x, group=group, group_src=src, async_op=True) for x in sent]
        _wait(works)
        for target, values in zip(targets, sent, strict=True):
            target.copy_(values)
        for member, values in zip(members, sent, strict=False):
            known = member.known
            known.residual, known.smaller = None, True
            if self._keeps_agreed() and (known.takes_part or member.parameter.requires_grad):
                known.agree(values)

    def stats(self) -> dict[str, Any]:
        """Bytes before and after, and seconds, of all averagings; bits per weight and entropy by parameter of the last ones.

        Returns
        -------
        dict
            See :meth:`weight_compression.distributed.traffic.Traffic.stats`; :func:`plot_stats` draws it. Its steps are
            averagings.
        """
        return self._traffic.stats()

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on bit by bit, besides model and optimiser.

        Returns
        -------
        dict
            'step', 'owners', 'tensors': name, agreed weights and kept error of every parameter; and 'outer': the outer
            optimiser's.
        """
        return {
            "step": self.step,
            "owners": None if self._ownership is None else self._ownership.state_dict(),
            "tensors": [known.state_dict() for known in self._known],
            "outer": self._outer_state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the averager was that :meth:`state_dict` was taken of, on the same rank of as many ranks.

        Raises
        ------
        ValueError
            If the state has an outer optimiser and this averager has none. At the next averaging: if it is of other
            parameters or of another number of ranks.
        """
        if "outer" not in state_dict:
            raise ValueError(f"state_dict: expected what state_dict() gave, got entries {sorted(state_dict)}")
        if state_dict["outer"] is not None and self.outer_optimizer is None:
            raise ValueError("state_dict: expected one without an outer optimiser, or an averager made with one")
        self.step = int(state_dict["step"])
        self._known = [Known.from_state_dict(known) for known in state_dict["tensors"]]
        self._ownership = None if state_dict["owners"] is None else Ownership.from_state_dict(state_dict["owners"])
        self.outer, self._outer_numbers, self._outer_state = None, [], copy.deepcopy(state_dict["outer"])
        self.codes = {}
        self._traffic.names = {number: known.name for number, known in enumerate(self._known)}

    def __getstate__(self) -> dict[str, Any]:
        logger.warning("The process group, buffers and outer_optimizer are not serialisable and left out of the state.")
        left_out = {name: None if getattr(self, name) is None else LEFT_OUT for name in ("buffers", "outer_optimizer")}
        outer: dict[str, Any] = {"outer": None, "_outer_numbers": [], "_outer_state": self._outer_state_dict()}
        return {**self.__dict__, "process_group": None, **left_out, **outer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        logger.warning("The process group is not part of the state: the default group is used.")
        self.__dict__.update(state)

    # ---- which tensors there are ----

    def _group(self) -> dist.ProcessGroup:
        if self.process_group is None:  # after unpickling
            self.process_group = _initialised(None)
        for name in ("buffers", "outer_optimizer"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: expected to be set again, because pickling leaves it out")
        return self.process_group

    def _keeps_agreed(self) -> bool:
        return self.code != "weights" or self.outer_optimizer is not None

    def _meet(self, params: Parameters) -> list[Member]:
        """The parameters, each once, and what is known of them."""
        given: dict[int, tuple[str | None, torch.Tensor]] = {}
        for name, x in named_parameters(params):
            given.setdefault(id(x), (name, x))
        if len(given) < len(self._known):
            raise ValueError(f"params: expected {len(self._known)} parameters, as before, got {len(given)}")
        members = []
        for number, (name, x) in enumerate(given.values()):
            name = f"parameter {number}" if name is None else name
            plain = (
                x.layout == torch.strided and x.device.type in ("cpu", "cuda") and not is_traceable_wrapper_subclass(x)
            )
            if x.dtype not in FLOATS or not plain:
                raise TypeError(
                    f"{name}: expected a dense tensor of {', '.join(map(str, FLOATS))} on the CPU or a CUDA device, got "
                    f"{type(x).__name__} of {x.dtype}, {x.layout} on {x.device}"
                )
            if number == len(self._known):
                self._known.append(Known(name, x.shape))
                self._traffic.names[number] = name
            known = self._known[number]
            if (known.name, known.shape) != (name, x.shape):
                raise ValueError(
                    f"params: expected {known.name} of shape {tuple(known.shape)} as number {number}, as before, got "
                    f"{name} of shape {tuple(x.shape)}"
                )
            known.to(x.device, working_dtype(x.dtype))
            members.append(Member(number, x, known))
        return members

    def _buffers(self) -> list[torch.Tensor]:
        if isinstance(self.buffers, nn.Module):
            kept = self.buffers.state_dict(keep_vars=True)
            found = [x for name, x in self.buffers.named_buffers() if name in kept]
        else:
            found = list({id(x): x for x in self.buffers or ()}.values())
        for x in found:
            if x.is_complex() or x.layout != torch.strided:
                raise TypeError(f"buffers: expected dense tensors of real numbers, got {x.dtype}, {x.layout}")
        return found

    # ---- an averaging ----

    @torch.no_grad()
    def _average(self, members: list[Member]) -> None:
        group = self._group()
        channel = channel_of(group)
        taken = [m for m in members if m.parameter.numel() and (m.parameter.requires_grad or m.known.takes_part)]
        buffers = self._buffers()
        step = self._traffic.begin(self.step, "coded")
        codes = {m.number: self._code_of(m.known) for m in taken}
        self.codes = {m.known.name: codes[m.number] for m in taken}
        means = self._means(taken, codes, channel, group, step)
        new_buffers = _merge_buffers(buffers, group, step)
        # All ranks have the same means, and find the same here.
        if wrong := [m.known.name for m, r in zip(taken, _ranges(means), strict=True) if not math.isfinite(r)]:
            for known in self._known:
                known.residual = None
            raise NonFiniteError(f"NaN or infinity in the mean of {', '.join(wrong)}")
        self._move(taken, codes, means)
        for buffer, values in zip(buffers, new_buffers, strict=True):
            buffer.copy_(values)
        for m in members:
            m.known.takes_part = m.parameter.requires_grad

    def _code_of(self, known: Known) -> str:
        if self.code == "weights":
            return "weights"
        if known.agreed is None:
            return "exact" if self.code == "difference" else "weights"
        return "difference" if self.code == "difference" or known.smaller else "weights"

    def _means(
        self, taken: list[Member], codes: dict[int, str], channel: Channel, group: dist.ProcessGroup, step: Step
    ) -> list[torch.Tensor]:
        """Of all ranks' weights or differences, flat: in memory of their own."""
        values: dict[int, torch.Tensor] = {}
        jobs: dict[tuple[torch.dtype, torch.device, bool], list[Member]] = {}
        exact = []
        for m in taken:
            code, known = codes[m.number], m.known
            x = m.parameter.detach().clone(memory_format=torch.contiguous_format).view(-1)
            if code == "difference":
                x.sub_(m.agreed.view(-1).to(x.dtype))
            feedback = code == "difference" and self.error_feedback and channel.ranks > 1
            if not feedback:
                known.residual = None
            elif known.residual is None:
                known.residual = torch.zeros(x.numel(), dtype=working_dtype(x.dtype), device=x.device)
            if code == "exact":
                x = x.to(working_dtype(x.dtype))
                exact.append(m)
            else:
                jobs.setdefault((x.dtype, x.device, feedback), []).append(m)
            values[m.number] = x
        futures = [self._start(of_job, values, channel, step).future for of_job in jobs.values()]
        works = []
        for m in exact:
            x = values[m.number]
            works.append(dist.all_reduce(x, group=group, async_op=True))
            step.add_sent(bytes_of_all_reduce([m.parameter], channel.ranks), bytes_of_all_reduce([x], channel.ranks))
            step.add_exact(m.number, x.numel(), x.numel() * x.element_size())
        _wait(works)
        for m in exact:
            values[m.number].div_(channel.ranks)
        for future in futures:
            future.wait()
        return [values[m.number] for m in taken]

    def _start(self, members: list[Member], values: dict[int, torch.Tensor], channel: Channel, step: Step) -> Job:
        """One job for tensors of one dtype and device, all with error feedback or none."""
        if self._ownership is None:
            self._ownership = Ownership(channel.ranks)
        elif self._ownership.ranks != channel.ranks:
            raise ValueError(f"state_dict: expected one of {channel.ranks} ranks, got {self._ownership.ranks}")
        tensors = [values[m.number] for m in members]
        residuals = [m.known.residual for m in members if m.known.residual is not None]
        # What the job returns is what the future makes other streams wait for.
        job = Job(
            tensors, channel, self.config, lambda: tensors, residuals=residuals or None, numbers=[m.number for m in members],
            describe=lambda i: members[i].known.name, traffic=step,
        )  # fmt: skip
        numbered = [(m.number, x.numel()) for m, x in zip(members, tensors, strict=True)]
        start_reduction(job, make_pieces(numbered, channel.ranks, self._ownership), 1.0 / channel.ranks)
        return job

    def _move(self, taken: list[Member], codes: dict[int, str], means: list[torch.Tensor]) -> None:
        """Parameters and agreed weights to where the means lead."""
        moved, movements = [], []
        for m, mean in zip(taken, means, strict=True):
            known = m.known
            mean = mean.view(known.shape)
            if not self._keeps_agreed():
                m.parameter.copy_(mean)
            elif known.agreed is None:
                known.agree(mean)
                m.parameter.copy_(mean)
            else:
                difference = codes[m.number] == "difference"
                movements.append(mean.to(m.agreed.dtype) if difference else mean - m.agreed)
                moved.append(m)
        over = _ranges(movements) if self.code == "auto" else []
        if self.outer_optimizer is not None:
            self._step_outer(moved, movements)
        else:
            for m, movement in zip(moved, movements, strict=True):
                m.agreed.add_(movement)
        for m in moved:
            m.parameter.copy_(m.agreed)
        if self.code == "auto":
            for m, movement_range, own in zip(moved, over, _ranges([m.agreed for m in moved]), strict=True):
                m.known.smaller = movement_range < own

    # ---- the outer optimiser ----

    def _step_outer(self, moved: list[Member], movements: list[torch.Tensor]) -> None:
        if not moved:
            return
        if self.outer is None and self._outer_state is not None:
            state, self._outer_state = self._outer_state, None
            for numbers in state["numbers"]:
                self._add_to_outer(numbers)
            assert self.outer is not None
            self.outer.load_state_dict(state["state"])
        if new := sorted({m.number for m in moved}.difference(*self._outer_numbers)):
            self._add_to_outer(new)
        assert self.outer is not None
        for m, movement in zip(moved, movements, strict=True):
            m.agreed.grad = movement.neg_()
        self.outer.step()
        self.outer.zero_grad(set_to_none=True)

    def _add_to_outer(self, numbers: list[int]) -> None:
        weights = [x for x in (self._known[number].agreed for number in numbers) if x is not None]
        if self.outer is None:
            self.outer = self.outer_optimizer(weights)
        else:
            self.outer.add_param_group({"params": weights})
        self._outer_numbers.append(list(numbers))

    def _outer_state_dict(self) -> dict[str, Any] | None:
        if self.outer is None:
            return copy.deepcopy(self._outer_state)
        # An optimiser's own state_dict refers to tensors that go on changing.
        return copy.deepcopy({"numbers": self._outer_numbers, "state": self.outer.state_dict()})


def _initialised(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError("expected torch.distributed to be initialised: call torch.distributed.init_process_group")
    if not isinstance(group, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(f"process_group: expected a ProcessGroup, got {group!r}")
    return group


def _ranges(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Largest less smallest value; not finite where values are not."""
    if not tensors:
        return []
    found = [high.double() - low.double() for low, high in map(torch.aminmax, tensors)]
    return torch.stack([x.to(found[0].device) for x in found]).tolist()


def _wait(works: Iterable[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()


def _merge_buffers(buffers: list[torch.Tensor], group: dist.ProcessGroup, step: Step) -> list[torch.Tensor]:
    """Means of floating point ones, in float64, and largest of the others, in int64: in memory of their own."""
    ranks = dist.get_world_size(group)
    merged: dict[int, torch.Tensor] = {}
    kinds: dict[tuple[torch.device, bool], list[int]] = {}
    for i, x in enumerate(buffers):
        kinds.setdefault((x.device, x.is_floating_point()), []).append(i)
    for (_, floating), members in kinds.items():
        dtype, op = (torch.float64, dist.ReduceOp.SUM) if floating else (torch.int64, dist.ReduceOp.MAX)
        flat = torch.cat([buffers[i].detach().reshape(-1).to(dtype) for i in members])
        dist.all_reduce(flat, op=op, group=group)
        step.add_sent(bytes_of_all_reduce([buffers[i] for i in members], ranks), bytes_of_all_reduce([flat], ranks))
        if floating:
            flat.div_(ranks)
        for i, values in zip(members, flat.split([buffers[i].numel() for i in members]), strict=True):
            merged[i] = values.view(buffers[i].shape)
    return [merged[i] for i in range(len(buffers))]
