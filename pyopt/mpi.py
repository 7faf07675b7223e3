"""One training on several processes, by MPI: gradients averaged, state shared out. Needs mpi4py and an MPI: pyopt[mpi].

Every process ("rank") has the whole model, computes the gradients of its part of a batch, and calls the functions here
at the same time as the others.

Sums. Each rank gets from all others their numbers of its share, and adds them up in the order of the ranks. So the
bits depend on the numbers and on how many ranks there are: not on the MPI library, its algorithms, or the network.

Errors. A rank that fails while the others wait for its numbers would let them wait for ever. So everything that can
fail comes before an exchange, in a block `together`, at whose end all ranks tell each other whether they are well: if
one is not, it raises its error, all others a RuntimeError that says which rank it was and why, and nothing has changed
anywhere. What fails outside of these functions, in your own code on one rank, they cannot see: start the program with
`mpiexec -n 4 python -m mpi4py program.py`, which ends all ranks when one of them ends with an error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from types import TracebackType
from typing import Any

import numpy as np
from mpi4py import MPI

from pyopt import _state_dict
from pyopt._arrays import ArrayBatch
from pyopt._asked import asked
from pyopt._groups import gradients_in_order
from pyopt._norms import clip_factor, norm_of
from pyopt.clipping import _gradients
from pyopt.files import Path, load, save
from pyopt.optimizer import Optimizer
from pyopt.optimizers.lbfgs import LBFGS
from pyopt.parameter import Parameter, check_data, check_gradient, label

Array = np.ndarray[Any, Any]
REDUCE = ("mean", "sum", "none")


# --- agreement --------------------------------------------------------------------------------------------------------


class together:
    """A block that ends well on all ranks, or with an error on all: what can fail stands in it, and no exchange.

    What `says` is given must be the same everywhere: the ranks compare it.
    """

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.said: tuple[str, Any] = ("", None)

    def says(self, what: str, value: Any) -> None:
        """Note what must be the same on all ranks, and what it is called."""
        self.said = (what, value)

    def __enter__(self) -> together:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        digest = blake2b(repr(self.said).encode(), digest_size=7).digest()
        mine = np.array([error is not None, int.from_bytes(digest)], np.int64)
        found = np.empty((self.comm.size, 2), np.int64)
        self.comm.Allgather(mine, found)
        if not found[:, 0].any() and (found[:, 1] == mine[1]).all():
            return
        reports = self.comm.allgather((error and f"{type(error).__name__}: {error}", self.said))
        if error is not None:
            return
        for rank, (message, _) in enumerate(reports):
            if message is not None:
                raise RuntimeError(f"rank {rank} has failed, so that no rank goes on: {message}")
        what, first = reports[0][1]
        for rank, (_, (_, value)) in enumerate(reports):
            if value != first:
                raise ValueError(f"{what} differ between the ranks: {first!r} on rank 0, {value!r} on rank {rank}")


# --- exchanges: nothing in them can fail on one rank alone ------------------------------------------------------------


def _sum_of_share(comm: Any, flat: Array, counts: Sequence[int], pieces: Array) -> Array:
    """What all ranks have in the share of this one, added up in the order of the ranks; it lies in pieces."""
    starts = _starts(counts)
    own = [counts[comm.rank]] * comm.size
    kind = _TYPES[flat.dtype]
    comm.Alltoallv([flat, (counts, starts), kind], [pieces, (own, _starts(own)), kind])
    pieces = pieces.reshape(comm.size, -1)
    for piece in pieces[1:]:
        pieces[0] += piece
    total: Array = pieces[0]
    return total


def _gather_shares(comm: Any, flat: Array, counts: Sequence[int]) -> None:
    """Every share to every rank; each has its own in place."""
    comm.Allgatherv(MPI.IN_PLACE, [flat, (counts, _starts(counts)), _TYPES[flat.dtype]])


_TYPES: dict[Any, Any] = {np.dtype(np.float32): MPI.FLOAT, np.dtype(np.float64): MPI.DOUBLE}


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts)[:-1].tolist()]


def _place(buffer: Array, start: int, like: Array) -> Array:
    """The place of an array in a buffer, as a view in the same memory order."""
    axes = np.argsort([-stride for stride in like.strides], kind="stable")
    section = buffer[start : start + like.size].reshape([like.shape[axis] for axis in axes])
    return section.transpose(np.argsort(axes))


# --- gradients --------------------------------------------------------------------------------------------------------


def average_gradients(comm: Any, parameters: Any, *, reduce: str = "mean") -> None:
    """Replace all gradients, in place, by their mean over the ranks: one buffer, two exchanges.

    Args:
        comm: the mpi4py communicator of the ranks, such as MPI.COMM_WORLD; all call this at the same time.
        parameters: Parameters, whose gradients are meant; or writable float32 or float64 arrays, which are the
            gradients. A list, a mapping, nested in each other as they may be; None is passed over.
        reduce: "mean" or "sum".

    Raises:
        TypeError, ValueError: what is no such array; gradients of other shapes or dtypes, or another number, on
            another rank.
        RuntimeError: another rank has failed. Nothing has changed then, on any rank, nor after the others.

    Example:
        >>> w = Parameter(np.zeros(2), grad=np.array([1.0, 3.0]))
        >>> average_gradients(MPI.COMM_SELF, [w])  # of one rank: the mean is the gradient itself
        >>> w.grad
        array([1., 3.])

    The sum is ((g0 + g1) + g2) + ..., in the order of the ranks and in the gradients' type, then divided by their
    number: the same bits on all ranks. Memory: two buffers of the size of the gradients, for the time of the call.
    """
    with together(comm) as ranks:
        if reduce not in REDUCE[:2]:
            raise ValueError(f"reduce == {reduce!r}, must be 'mean' or 'sum'")
        grads, owners, names = _gradients(parameters, "parameters")
        ArrayBatch(grads, owners, names, True)  # its checks
        ranks.says("gradients", [(g.shape, str(g.dtype)) for g in grads])
        jobs = []
        for dtype in _TYPES:
            of_type = [g for g in grads if g.dtype == dtype]
            flat = np.empty(sum(g.size for g in of_type), dtype)
            places, start = [], 0
            for g in of_type:
                places.append(_place(flat, start, g))
                np.copyto(places[-1], g)
                start += g.size
            counts = [flat.size * (r + 1) // comm.size - flat.size * r // comm.size for r in range(comm.size)]
            if of_type:
                jobs.append((flat, counts, np.empty(comm.size * counts[comm.rank], dtype), of_type, places))
    for flat, counts, pieces, of_type, places in jobs:
        total = _sum_of_share(comm, flat, counts, pieces)
        if reduce == "mean":
            total /= comm.size
        start = _starts(counts)[comm.rank]
        flat[start : start + total.size] = total
        _gather_shares(comm, flat, counts)
        for g, place in zip(of_type, places, strict=True):
            np.copyto(g, place)


# --- the optimizer ----------------------------------------------------------------------------------------------------


class _Buffer:
    """The arrays of one type in one stretch of memory, in shares: those of rank 0, of rank 1, ..."""

    def __init__(self, comm: Any, dtype: Any, rows: list[tuple[int, int, Array]]) -> None:
        """rows: owner, number of the parameter, its array; in the order of the owners."""
        self.counts = [sum(array.size for owner, _, array in rows if owner == rank) for rank in range(comm.size)]
        self.flat = np.empty(sum(self.counts), dtype)
        self.pieces = np.empty(comm.size * self.counts[comm.rank], dtype)
        first = _starts(self.counts)[comm.rank]
        self.places, self.sums = {}, {}  # by number: of a parameter in flat, of a sum of its gradients in pieces
        start = 0
        for owner, i, array in rows:
            self.places[i] = _place(self.flat, start, array)
            if owner == comm.rank:
                self.sums[i] = _place(self.pieces, start - first, array)
            start += array.size


class Sharded:
    """An optimizer whose state is shared out over the ranks of MPI: each keeps that of its parameters (ZeRO, stage 1).

    A step sums the gradients of all ranks, each rank for its share; each steps its share, and gets the others' new
    parameters. It has the bits of one process that takes a step with the same sums and gradient_factor=1 / ranks.

    A parameter belongs to one rank as a whole, the largest first to the rank that has least. So the ranks are even
    where no parameter is much larger than a rank's part.

    Args:
        optimizer_class: of pyopt or your own, with one step per gradient: not LBFGS, and not Prodigy, whose step
            needs sums over all parameters.
        params: as for an optimizer, but float32 and float64 alone; the same on all ranks in shape, dtype, order and
            names. All ranks begin with the values of rank 0.
        comm: the mpi4py communicator of the ranks. It is used by this optimizer alone: a duplicate is made.
        **options: of optimizer_class.

    Attributes:
        optimizer: the optimizer of this rank. Its groups are those of all parameters: schedules are of it, made
            and stepped on every rank (`pyopt.lr_scheduler.CosineAnnealingLR(sharded.optimizer, ...)`). Its state is
            that of this rank's parameters.
        last_grad_norm, skipped_steps: as those of an optimizer, of the gradients of all ranks.

    Raises:
        TypeError, ValueError: as optimizer_class; another class, other parameters or options on another rank.
        RuntimeError: another rank has failed.

    Example:
        >>> import pyopt
        >>> w = np.ones(2)
        >>> optimizer = Sharded(pyopt.SGD, {"w": w}, MPI.COMM_SELF, lr=0.5)
        >>> optimizer.step(grads={"w": np.array([1.0, -1.0])})
        >>> w
        array([0.5, 1.5])

    Averages (pyopt.averaging) are not kept: a rank would average the parameters of others one step late. Source:
    S. Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (arXiv 1910.02054),
    section 5.1.
    """

    def __init__(self, optimizer_class: type[Optimizer], params: Any, comm: Any, **options: Any) -> None:
        self.comm = comm.Dup()
        self.last_grad_norm: float | None = None
        self.skipped_steps = 0
        self._broken: str | None = None
        self._owners: dict[Parameter, int] = {}
        with together(self.comm) as ranks:
            if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
                raise TypeError(f"optimizer_class == {optimizer_class!r}, must be a class of optimizers of pyopt")
            if optimizer_class.shared_numbers or issubclass(optimizer_class, LBFGS):
                raise TypeError(
                    f"optimizer_class is {optimizer_class.__name__}, whose step needs all gradients together: it "
                    "cannot be shared out"
                )
            self.optimizer = optimizer_class(params, **options)
            self._check_types()
            ranks.says("parameters and options", (optimizer_class.__qualname__, self._description()))
        self._lay_out()
        self._broadcast(self._params())

    # --- groups and layout --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, the same on all ranks at the same time: see Optimizer. They get the values of rank 0."""
        known = len(self._params())
        with together(self.comm) as ranks:
            self.optimizer.add_param_group(param_group)
            try:
                self._check_types()
            except TypeError:
                self.optimizer.param_groups.pop()
                raise
            ranks.says("parameters and options", self._description())
        self._lay_out()
        self._broadcast(self._params()[known:])

    def _params(self) -> list[Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _check_types(self) -> None:
        for i, p in enumerate(self._params()):
            if p.data.dtype not in _TYPES:
                raise TypeError(
                    f"{label(i, p)} has dtype {p.data.dtype}, must be float32 or float64: short types are "
                    "not exchanged between ranks"
                )

    def _description(self) -> Any:
        """What must be the same on all ranks: the groups, and the arrays in them."""
        groups = self.optimizer.param_groups
        return [
            ({k: v for k, v in g.items() if k != "params"}, [(p.shape, str(p.dtype)) for p in g["params"]])
            for g in groups
        ]

    def _lay_out(self) -> None:
        """Give every parameter an owner, and its place in the buffers."""
        params = self._params()
        loads = [0] * self.comm.size
        for p, owner in self._owners.items():
            loads[owner] += p.data.nbytes
        new = [p for p in params if p not in self._owners]
        for p in sorted(new, key=lambda p: -p.data.nbytes):
            self._owners[p] = loads.index(min(loads))
            loads[self._owners[p]] += p.data.nbytes
        rows = sorted(((self._owners[p], i, p.data) for i, p in enumerate(params)), key=lambda row: row[:2])
        self._buffers = [
            _Buffer(self.comm, dtype, of_type)
            for dtype in _TYPES
            if (of_type := [row for row in rows if row[2].dtype == dtype])
        ]
        self._looks = [(p.data.dtype, p.data.shape, p.data.strides) for p in params]

    def _broadcast(self, params: Iterable[Parameter]) -> None:
        for p in params:
            array = np.array(p.data, order="C")
            self.comm.Bcast([array, _TYPES[array.dtype]])
            np.copyto(p.data, array)

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(
        self,
        closure: Any = None,
        *,
        grads: Any = None,
        max_norm: float | None = None,
        nonfinite: str = "apply",
        zero_grad: bool | str = False,
        gradient_factor: float = 1.0,
        reduce: str = "mean",
    ) -> Any:
        """A step of all parameters with the gradients of all ranks; every rank calls it at the same time.

        Args:
            closure: computes the loss and the gradients of this rank; called first.
            grads, max_norm, nonfinite, zero_grad, gradient_factor: see `Optimizer.step`; the norm is that of what
                `reduce` makes. A parameter has a gradient on all ranks, or on none.
            reduce: "mean" of the ranks' gradients, or "sum"; "none" where they are the same on all ranks already, as
                `average_gradients` leaves them.

        Returns:
            What the closure returned on this rank, or None.

        Raises:
            TypeError, ValueError, RuntimeError: as `Optimizer.step`, on all ranks: on the others as a RuntimeError that
                names the rank; options of groups, arguments or which parameters have gradients differ. Nothing has
                changed then, but where an optimizer failed in the middle of its own step: the ranks are then apart,
                which the next step says; `load` and `load_state_dict` bring them together.
        """
        loss = None
        with together(self.comm) as ranks:
            self._check_ready()
            what = asked(max_norm, nonfinite, zero_grad, gradient_factor)
            if reduce not in REDUCE:
                raise ValueError(f"reduce == {reduce!r}, must be 'mean', 'sum' or 'none'")
            if closure is not None:
                loss = closure()
            if grads is not None and zero_grad:
                raise ValueError(f"zero_grad == {zero_grad!r} clears the parameters' own gradients, but grads= came")
            params = self._params()
            given = (
                [p.grad for p in params] if grads is None else gradients_in_order(grads, self.optimizer.param_groups)
            )
            present = [i for i, g in enumerate(given) if g is not None]
            if not present:
                raise ValueError("no parameter has a gradient")
            self._pack(params, given)
            for group in self.optimizer.param_groups:
                self.optimizer.check_group(group)
            options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
            ranks.says(
                "arguments of the step, options of groups, or parameters that have a gradient,",
                (max_norm, nonfinite, zero_grad, gradient_factor, reduce, options, present),
            )
        own: list[Array | None] = [None] * len(params)
        for buffer in self._buffers:
            if reduce != "none":
                _sum_of_share(self.comm, buffer.flat, buffer.counts, buffer.pieces)
            for i, total in buffer.sums.items():
                if given[i] is not None:
                    own[i] = total if reduce != "none" else buffer.places[i]
        factor = gradient_factor / self.comm.size if reduce == "mean" else gradient_factor
        clip = 1.0
        if what is not None and (max_norm is not None or nonfinite != "apply"):
            norm, culprit = self._norm(params, own, factor)
            if not np.isfinite(norm):
                if nonfinite == "raise":
                    raise ValueError(culprit)
                if nonfinite == "skip":
                    self.skipped_steps += 1
                    self._clear(params, zero_grad)
                    return loss
            if max_norm is not None:
                clip = clip_factor(max_norm, norm)
        with self._whole("step") as done, together(self.comm):
            self.optimizer.step(grads=own, gradient_factor=factor * clip)
            done.append(True)
            for buffer in self._buffers:
                for i in buffer.sums:
                    np.copyto(buffer.places[i], params[i].data)
        for buffer in self._buffers:
            _gather_shares(self.comm, buffer.flat, buffer.counts)
            for i, place in buffer.places.items():
                if i not in buffer.sums and given[i] is not None:
                    np.copyto(params[i].data, place)
        self._clear(params, zero_grad)
        return loss

    @contextmanager
    def _whole(self, what: str) -> Iterator[list[bool]]:
        """A block that leaves the ranks apart where it fails on some and is done, as its list says, on others."""
        done: list[bool] = []
        try:
            yield done
        except BaseException:
            if self.comm.allreduce(bool(done), MPI.LOR):
                self._broken = what
            raise
        self._broken = None

    def _check_ready(self) -> None:
        if self._broken is not None:
            raise RuntimeError(f"the last {self._broken} was made by some ranks alone: load a checkpoint first")
        if self.optimizer._averages:
            raise ValueError("the optimizer has averages, which cannot be kept with its state shared out: detach them")

    def _pack(self, params: list[Parameter], given: list[Any]) -> None:
        """Put the gradients into the buffers, all of them checked; zeros where there is none."""
        for i, p in enumerate(params):
            check_data(label(i, p), p.data)
        if self._looks != [(p.data.dtype, p.data.shape, p.data.strides) for p in params]:
            self._check_types()
            self._lay_out()
        for buffer in self._buffers:
            for i, place in buffer.places.items():
                if given[i] is None:
                    place.fill(0)
                else:
                    np.copyto(place, check_gradient(label(i, params[i]), params[i].data, given[i]))

    def _norm(self, params: list[Parameter], own: list[Array | None], factor: float) -> tuple[float, str]:
        """The norm of all gradients, as one process has it, and what is wrong with it if it is not finite."""
        batch = [(i, g) for i, g in enumerate(own) if g is not None]
        arrays, owners = [g for _, g in batch], [params[i] for i, _ in batch]
        sums = np.zeros(len(own))

        def sums_of(power: float, scale: float) -> list[float]:
            sums.fill(0)
            sums[[i for i, _ in batch]] = ArrayBatch(arrays, owners, [None] * len(arrays), False).sums(power, scale)
            self.comm.Allreduce(MPI.IN_PLACE, sums)  # each is 0 on all ranks but one: nothing is rounded
            return sums.tolist()

        norm = norm_of(sums_of, 2) * abs(factor)
        self.last_grad_norm = norm
        if np.isfinite(norm):
            return norm, ""
        largest = sums_of(np.inf, 1.0)
        for i, p in enumerate(params):
            if not np.isfinite(largest[i]):
                return norm, f"{label(i, p)}: its gradient has NaN or inf"
        return norm, f"the norm of all gradients is {norm}, must be finite"

    def _clear(self, params: list[Parameter], zero_grad: bool | str) -> None:
        if zero_grad:
            self.optimizer.zero_grad(set_to_none=zero_grad == "set_to_none")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this rank: see Optimizer."""
        self.optimizer.zero_grad(set_to_none)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self, root: int | None = None) -> Any:
        """The state of all ranks together: what an optimizer of one process returns. Every rank calls it.

        Args:
            root: the rank that gets it, the others None; None: all get it.
        """
        with together(self.comm):
            local = self.optimizer.state_dict(copy=False)
        shares = self.comm.allgather(local["state"]) if root is None else self.comm.gather(local["state"], root)
        if shares is None:
            return None
        state = {key: entry for share in shares for key, entry in share.items()}
        in_order = sorted(state, key=lambda key: (not isinstance(key, int), key))
        return copy.deepcopy({**local, "state": {key: state[key] for key in in_order}})

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from what `state_dict` returned, of any number of ranks, or of an optimizer of one process.

        Args:
            state_dict: the whole, on every rank. The parameters are not in it: they must be the same on all ranks.

        Raises:
            TypeError, KeyError, ValueError, RuntimeError: see `Optimizer.load_state_dict`, on all ranks; nothing has
                changed then.
        """
        with together(self.comm):
            _state_dict.prepare(self.optimizer, state_dict)  # its checks
            own = {i for i, p in enumerate(self._params()) if self._owners[p] == self.comm.rank}
            indices = {key: _state_dict.as_index(key) for key in state_dict["state"]}
            state = {k: v for k, v in state_dict["state"].items() if indices[k] is None or indices[k] in own}
        self.optimizer.load_state_dict({**state_dict, "state": state})
        self._broken = None

    def save(self, path: Path, *, schedulers: Iterable[Any] = (), extra: Any = None) -> None:
        """Save the run in one file, as `pyopt.save` does: rank 0 writes it. Every rank calls it.

        The file is that of one process: `pyopt.load` takes it too, and `load` on any number of ranks.

        Args:
            path, schedulers, extra: see `pyopt.save`; those of rank 0 count.

        Raises:
            TypeError, ValueError, OSError, RuntimeError: see `pyopt.save`, on all ranks.
        """
        whole = self.state_dict(root=0)
        with together(self.comm):
            if self.comm.rank == 0:
                params = self._params()
                twin = copy.copy(self.optimizer)  # of the same groups and parameters
                twin.state = type(self.optimizer.state)(dict)
                twin.state.update({params[k] if isinstance(k, int) else k: v for k, v in whole["state"].items()})
                twin.skipped_steps = self.skipped_steps
                save(path, twin, schedulers=schedulers, extra=extra)

    def load(self, path: Path, *, schedulers: Iterable[Any] = ()) -> Any:
        """Go on from a file of `save` or of `pyopt.save`, whatever the number of ranks. Every rank calls it.

        Args:
            path: a file that every rank can read.
            schedulers: those of `optimizer` on this rank: see `pyopt.load`.

        Returns:
            `extra` as it was saved.

        Raises:
            OSError, TypeError, KeyError, ValueError, RuntimeError: see `pyopt.load`, on all ranks. If it failed on some
                alone, the ranks are apart, which the next step says.
        """
        with self._whole("load") as done, together(self.comm):
            extra = load(path, self.optimizer, schedulers=list(schedulers))
            done.append(True)
            for p, owner in self._owners.items():
                if owner != self.comm.rank:
                    self.optimizer.state.pop(p, None)
            self.skipped_steps = self.optimizer.skipped_steps
        return extra

    def __repr__(self) -> str:
        return f"Sharded over {self.comm.size} ranks, this is {self.comm.rank}: {self.optimizer!r}"
