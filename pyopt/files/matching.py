"""What in a file belongs to what of an optimizer: parameters by name, by place where they have none, and groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pyopt import _state_dict
from pyopt.checks import count
from pyopt.files.container import Array
from pyopt.files.sides import Side, kind_of

JOINT = ("LBFGS",)  # optimizers whose state is one of all parameters, in their order


class LoadResult(NamedTuple):
    """What `load(strict=False)` returns. All is called by its place: "parameters.head.w", "groups.1", "averages.0".

    Args:
        extra: as it was saved.
        missing: what the file has not; it has stayed as it was.
        unexpected: what the file has, and nothing here has taken.
        mismatched: what both have, but which does not fit, and has stayed as it was; with the reason.
    """

    extra: Any
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, str]


@dataclass
class Match:
    """The places in the file: of each parameter of the optimizer, its state and each group. None: it stays as it is."""

    strict: bool
    n_saved: int
    params: list[int | None]
    state: list[int | None] = field(default_factory=list)
    groups: list[int | None] = field(default_factory=list)
    groups_in_place: bool = True
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        """Whether the parameters are those of the file, in its order."""
        return self.params == list(range(self.n_saved))


def lacking(places: list[int | None]) -> list[int]:
    """What has no place in the file."""
    return [i for i, at in enumerate(places) if at is None]


def matched(side: Side, saved_names: list[str], groups: list[Any], values: Sequence[Array], strict: bool) -> Match:
    """Which parameters and groups of the file are which of the optimizer's.

    Raises:
        TypeError, KeyError, ValueError: the groups are damaged; with strict, something does not match.
    """
    given, n = side.given_names(), len(saved_names)
    saved = _names(saved_names, groups)
    if (
        saved is None
        or given is None
        or not all(map(_is_text, given))
        or (saved == _numbers(n) and set(saved).isdisjoint(given))
    ):
        saved, given, by_name = _numbers(n), side.names(), False
    else:
        by_name = True
    places = {name: i for i, name in enumerate(saved)}
    live = given if by_name else _numbers(len(given))
    match = Match(strict, n, [places.get(name) for name in live])
    if strict and not by_name:
        if len(given) != n:
            raise ValueError(f"has {n} parameters, optimizer has {len(given)}")
        # Place by place: all other checks are those of the values and the state_dict.
        match.state, match.groups = match.params, list(range(len(groups)))
        return match
    match.missing += [f"parameters.{name}" for name, at in zip(given, match.params, strict=True) if at is None]
    match.unexpected += [f"parameters.{saved[i]}" for i in sorted(set(range(n)).difference(match.params))]
    if strict and (match.missing or match.unexpected):
        absent, more = ([name.removeprefix("parameters.") for name in x] for x in (match.missing, match.unexpected))
        raise ValueError(
            "has other parameters than optimizer: "
            + " and ".join([f"not {absent}"] * bool(absent) + [f"{more}, which optimizer has not"] * bool(more))
        )
    saved_group = _group_of_each(groups, n)
    _match_groups(match, side, saved_group, len(groups), given)
    live_group = [g for g, group in enumerate(side.optimizer.param_groups) for _ in group["params"]]
    for i, (array, at) in enumerate(zip(side.writable(), match.params, strict=True)):
        if not strict and at is not None and (error := side.unlike(array, values[at])):
            match.mismatched[f"parameters.{given[i]}"] = str(error)
            match.params[i] = None
        elif at is not None and match.groups[live_group[i]] is None:
            # A schedule-free optimizer has other numbers in a parameter in training and in evaluation.
            mode = side.optimizer.param_groups[live_group[i]].get("train_mode")
            if mode != (was := groups[saved_group[at]].get("train_mode")):
                match.mismatched[f"parameters.{given[i]}"] = f"has train_mode {was} in the file, must be {mode}"
                match.params[i] = None
    match.state = list(match.params)
    return match


def _numbers(n: int) -> list[str]:
    return list(map(str, range(n)))


def _is_text(name: str) -> bool:
    """Whether the file calls an array as the name is: not with lone surrogates."""
    return name.encode(errors="replace") == name.encode(errors="surrogatepass")


def _names(saved_names: list[str], groups: list[Any]) -> list[str] | None:
    """The names of the parameters in the file, None where they do not tell them apart."""
    lists = [group.get("param_names") if isinstance(group, dict) else None for group in groups]
    names = [name for each in lists if isinstance(each, list) for name in each]
    if len(names) != len(saved_names) or not all(isinstance(name, str) for name in names):
        names = [name.removeprefix("parameters.") for name in saved_names]
    return names if len(set(names)) == len(names) else None


def _group_of_each(groups: list[Any], n: int) -> list[int]:
    """The group of each parameter of the file."""
    found = []
    expected = 0
    for i, group in enumerate(groups):
        if not isinstance(group, dict):
            raise TypeError(f"param group {i} is a {type(group).__name__}, must be a dict")
        if "params" not in group:
            raise KeyError(f"param group {i} has no 'params', only {sorted(map(str, group))}")
        indices = group["params"]
        if not isinstance(indices, list) or indices != list(range(expected, expected + len(indices))):
            raise ValueError(f"param group {i} has parameters {indices}, must have numbers that go on from {expected}")
        found += [i] * len(indices)
        expected += len(indices)
    if expected != n:
        raise ValueError(f"has {n} parameters, {expected} in its param groups")
    return found


def _match_groups(match: Match, side: Side, saved_group: list[int], n_groups: int, names: list[str]) -> None:
    """Groups belong together that have parameters in common, and neither any with another one."""
    live = side.optimizer.param_groups
    live_group = [g for g, group in enumerate(live) for _ in group["params"]]
    first: dict[tuple[int, int], int] = {}  # by group here and in the file: the first parameter of both
    for i, at in enumerate(match.params):
        if at is not None:
            first.setdefault((live_group[i], saved_group[at]), i)
    empty = iter(sorted(set(range(n_groups)).difference(saved_group)))
    for g, group in enumerate(live):
        here = [f for other, f in first if other == g]
        match.groups.append(None)
        if not here:
            match.groups[g] = None if group["params"] else next(empty, None)
            if match.groups[g] is None:
                _refuse_group(match, g, None)
            continue
        there = [other for other, f in first if f == here[0]]
        if len(here) > 1:
            a, b = (names[first[g, f]] for f in here[:2])
            _refuse_group(match, g, f"{a!r} and {b!r} stand in param groups {here[0]} and {here[1]} of the file")
        elif len(there) > 1:
            a, b = names[first[g, here[0]]], names[next(first[other, here[0]] for other in there if other != g)]
            _refuse_group(
                match, g, f"{a!r} and {b!r}, which is in another here, stand in param group {here[0]} of the file"
            )
        else:
            match.groups[g] = here[0]
    taken = {*match.groups, *(f for _, f in first)}
    left = [f for f in range(n_groups) if f not in taken]
    if left and match.strict:
        raise ValueError(f"has a param group {left[0]} that optimizer has not")
    match.unexpected += [f"groups.{f}" for f in left]
    match.groups_in_place = match.groups == list(range(n_groups))


def _refuse_group(match: Match, g: int, reason: str | None) -> None:
    if match.strict:
        raise ValueError(f"param group {g}: {reason}" if reason else f"has no param group {g}")
    if reason:
        match.mismatched[f"groups.{g}"] = reason
    else:
        match.missing.append(f"groups.{g}")


# --- what belongs to the parameters and groups ------------------------------------------------------------------------


def rearranged(match: Match, side: Side, state: dict[Any, Any], groups: list[Any]) -> dict[str, Any]:
    """The state_dict as the optimizer would have made it: for what stays as it is, its own groups, and no state."""
    if match.strict and match.in_place and match.groups_in_place:
        return {"state": state, "param_groups": groups}
    names = side.names()
    _match_state(match, side, state, names)
    to = {at: i for i, at in enumerate(match.state) if at is not None}
    entries: dict[Any, Any] = {}
    for key, entry in state.items():
        index = _state_dict.as_index(key)
        if index is not None and not 0 <= index < match.n_saved:
            raise ValueError(f"has state of parameter {key!r}, must be an int from 0 to {match.n_saved - 1}")
        if index is not None and index not in to:
            continue
        place = key if index is None else to[index]
        if place in entries:
            raise ValueError(f"has state of parameter {index} twice")
        entries[place] = entry
    made = []
    first = 0
    for i, (live, at) in enumerate(zip(side.optimizer.param_groups, match.groups, strict=True)):
        options = side.options(i) if at is None else groups[at]
        options = {key: value for key, value in options.items() if key != "param_names"}
        made.append({**options, "params": list(range(first, first + len(live["params"])))})
        first += len(live["params"])
    return {"state": entries, "param_groups": made}


def _match_state(match: Match, side: Side, state: dict[Any, Any], names: list[str]) -> None:
    """Leave out the state that cannot be taken: one of all parameters, or for other options than those here."""
    if side.kind in JOINT and state and not match.in_place:
        reason = f"the state of {side.kind} is one of all parameters in their order, which is another in the file"
        if match.strict:
            raise ValueError(reason)
        match.mismatched["state"] = reason
        match.state = [None] * len(names)
    groups = [at for at, group in zip(match.groups, side.optimizer.param_groups, strict=True) for _ in group["params"]]
    doubtful = {
        i: state[at]
        for i, (at, group) in enumerate(zip(match.state, groups, strict=True))
        if at is not None and group is None and isinstance(state.get(at), dict)
    }
    if doubtful:
        for i, reason in side.refused(doubtful).items():
            match.mismatched[f"state.{names[i]}"] = reason
            match.state[i] = None


def by_class(match: Match, what: str, objects: Sequence[Any], saved: list[Any]) -> Iterator[tuple[int, Any, Any]]:
    """Schedulers or averages with their places and states: all those that were saved, or those of the same class."""
    classes, given = [each["class"] for each in saved], [kind_of(each) for each in objects]
    if match.strict and classes != given:
        raise ValueError(f"has {what} {', '.join(classes) or 'none'}, given are {', '.join(given) or 'none'}")
    left = dict(enumerate(classes))
    for i, (each, cls) in enumerate(zip(objects, given, strict=True)):
        at = next((at for at, other in left.items() if other == cls), None)
        if at is None:
            match.missing.append(f"{what}.{i}")
        else:
            del left[at]
            yield i, each, saved[at]["state"]
    match.unexpected += [f"{what}.{at}" for at in left]


def follows_groups(match: Match, where: str) -> bool:
    """Whether the state of a scheduler is one for the groups here: it has numbers for each."""
    if match.groups_in_place:
        return True
    reason = "it has numbers for each param group, which are others in the file, or in another order"
    if match.strict:
        raise ValueError(f"{where}: {reason}")
    match.mismatched[where] = reason
    return False


def follows_parameters(match: Match, where: str, average: Any, held: Any) -> Any:
    """The state of an average for the parameters here; None where it cannot be one.

    A parameter that is not in the file keeps its average, and the number of its updates as far as the whole has them.
    """
    if match.in_place:
        return held
    n, lists = match.n_saved, {}
    if isinstance(held, dict):
        lists = {k: held[k] for k in ("averages", "joined") if isinstance(held.get(k), list) and len(held[k]) == n}
    partly = None in match.params
    if "averages" not in lists or (partly and "joined" not in lists):
        reason = "its state does not say which of the averages is whose, and the parameters are others in the file"
        if match.strict:
            raise ValueError(f"{where}: {reason}")
        match.mismatched[where] = reason
        return None
    own: dict[str, Any] = {}
    if partly:
        own = average.state_dict()
        count(f"{where}: n_averaged", held.get("n_averaged"))
        updates = (own["n_averaged"] - joined for joined in own["joined"])
        own["joined"] = [max(held["n_averaged"] - each, 0) for each in updates]
    return {
        **held,
        **{
            key: [own[key][i] if at is None else values[at] for i, at in enumerate(match.params)]
            for key, values in lists.items()
        },
    }
