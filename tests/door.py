"""The C door through ctypes: its structs, its table of functions, and a plan over NumPy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import pyopt
from pyopt import storage

c_int, c_int32, c_int64, c_size_t, c_double = (
    ctypes.c_int,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_size_t,
    ctypes.c_double,
)
Address, String = ctypes.c_void_p, ctypes.c_char_p
STATES = 4
DTYPES = (
    *("float32", "float64", "bfloat16", "float16", "bfloat16_split", "bfloat16_kahan", "float16_kahan"),
    *("bfloat16_stochastic", "float16_stochastic", "signed_8bit", "unsigned_8bit"),
)


def dtype_of(array: np.ndarray[Any, Any], how: str | None = None) -> int:
    """The number of a dtype, of arrays that are more than their elements: of which kind."""
    name = array.dtype.name
    return DTYPES.index(f"{name}_{how}" if how and f"{name}_{how}" in DTYPES else name)


class Option(ctypes.Structure):
    _fields_ = [("name", String), ("usual", c_double), ("check", c_int32)]


class State(ctypes.Structure):
    _fields_ = [("name", String), ("needed_by", c_int32), ("initial", c_int32)]


class Kept(ctypes.Structure):
    _fields_ = [("name", String), ("initial", c_int32), ("value", c_double)]


class Rule(ctypes.Structure):
    _fields_ = [
        *[("size", c_size_t), ("name", String), ("n_states", c_int32), ("n_options", c_int32), ("n_kept", c_int32)],
        *[("states", ctypes.POINTER(State)), ("options", ctypes.POINTER(Option)), ("kept", ctypes.POINTER(Kept))],
        ("dtypes", ctypes.POINTER(ctypes.c_uint32)),
    ]


class Stream(ctypes.Structure):
    _fields_ = [("data", Address), ("dtype", c_int32)]


class Row(ctypes.Structure):
    _fields_ = [
        *[("size", c_size_t), ("n", c_int64), ("rule", c_int32), ("slot", c_int32)],
        *[("parameter", Stream), ("gradient", Stream), ("state", Stream * STATES)],
        *[("beside", Address * (1 + STATES)), ("place", c_int64)],
    ]


class Slot(ctypes.Structure):
    _fields_ = [
        *[("size", c_size_t), ("step", c_int64), ("gradient_factor", c_double)],
        *[("options", ctypes.POINTER(c_double)), ("kept", ctypes.POINTER(c_double))],
        *[("seed", ctypes.c_uint64), ("rounding_step", c_int64)],
    ]


def function(result: Any, *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *arguments)


Doubles = ctypes.POINTER(c_double)
Slots = ctypes.POINTER(Slot)


class Functions(ctypes.Structure):
    _fields_ = [
        *[("size", c_size_t), ("major", c_int32), ("minor", c_int32)],
        ("count_rules", function(c_int)),
        ("rule", function(ctypes.POINTER(Rule), c_int)),
        ("find_rule", function(c_int, String)),
        ("find_option", function(c_int, c_int, String)),
        ("fill_defaults", function(None, c_int, Doubles)),
        ("initial_state", function(c_double, c_int, c_int, Doubles)),
        ("fill_kept", function(None, c_int, Doubles, Doubles)),
        ("create", function(c_int, Address, c_size_t, c_int, ctypes.POINTER(Address), String, c_size_t)),
        ("destroy", function(None, Address)),
        ("step", function(c_int, Address, Slots, c_size_t, c_int, String, c_size_t)),
        ("prepare", function(c_int, Address, Slots, c_size_t, String, c_size_t)),
        ("chunks", function(c_int64, Address)),
        ("has_sums", function(c_int, Address)),
        ("sum", function(None, Address, c_int64, c_int64)),
        ("combine", function(None, Address, Slots)),
        ("run", function(None, Address, c_int64, c_int64)),
    ]


def from_capsule() -> Functions:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = Address, [ctypes.py_object, String]
    return Functions.from_address(pointer(pyopt.c_api_v1, b"pyopt.c_api_v1"))


def from_library(path: str) -> Functions:
    library = ctypes.CDLL(path)
    library.pyopt_api.restype = ctypes.POINTER(Functions)
    return library.pyopt_api().contents  # type: ignore[no-any-return]


class Door:
    """What a table of functions does, on NumPy arrays; a status below 0 is a ValueError with the message."""

    def __init__(self, functions: Functions) -> None:
        self.functions = functions

    def rules(self) -> dict[str, Rule]:
        found = [self.functions.rule(i).contents for i in range(self.functions.count_rules())]
        return {rule.name.decode(): rule for rule in found}

    def options(self, name: str, given: Mapping[str, Any]) -> Any:
        """All options of a rule, in a C array; pairs, flags and None as Python has them."""
        rule = self.functions.find_rule(name.encode())
        values = (c_double * self.functions.rule(rule).contents.n_options)()
        self.functions.fill_defaults(rule, values)
        for key, value in given.items():
            parts = {f"{key}[{i}]": x for i, x in enumerate(value)} if isinstance(value, tuple) else {key: value}
            for part, x in parts.items():
                index = self.functions.find_option(rule, part.encode())
                assert index >= 0, part
                values[index] = float("nan") if x is None else x
        return values


class Plan:
    """Rows over NumPy arrays; the states are made as the query and an optimizer's options of storage say."""

    def __init__(
        self,
        door: Door,
        name: str,
        params: Sequence[np.ndarray[Any, Any]],
        grads: Sequence[np.ndarray[Any, Any]],
        options: Sequence[Mapping[str, Any]],
        slots: Sequence[int] | None = None,
        flags: int = 0,
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        stored = storage.checked(stored or {})
        self.door, self.functions = door, door.functions
        self.rule = self.functions.find_rule(name.encode())
        about = self.functions.rule(self.rule).contents
        slots = slots or [0] * len(params)
        self.options = [door.options(name, given) for given in options]
        self.kept = [(c_double * max(about.n_kept, 1))() for _ in options]
        for o, kept in zip(self.options, self.kept, strict=True):
            self.functions.fill_kept(self.rule, o, kept)
        self.rows = (Row * len(params))()
        self.states: list[dict[str, np.ndarray[Any, Any]]] = []
        for row, p, g, slot in zip(self.rows, params, grads, slots, strict=True):
            row.size, row.n, row.rule, row.slot, row.place = ctypes.sizeof(Row), p.size, self.rule, slot, -1
            states = {}
            how = "stochastic" if stored.get("rounding") == "stochastic" else stored.get("master")
            row.parameter, row.gradient = Stream(p.ctypes.data, dtype_of(p, how)), Stream(g.ctypes.data, dtype_of(g))
            if master := storage.master_of(p.dtype.name, stored):
                states[master] = np.zeros(p.shape, np.int16 if master == "low_bits" else p.dtype)
                row.beside[0] = states[master].ctypes.data
            for j in range(about.n_states):
                state = about.states[j]
                if state.needed_by < 0 or self.options[slot][state.needed_by]:
                    state_name = state.name.decode()
                    if storage.in_codes(p.size, p.flags.c_contiguous, p.dtype.name, stored):
                        kind = "signed_8bit" if about.dtypes[2 + j] >> 9 & 1 else "unsigned_8bit"
                        array = np.full(p.shape, 127 if kind == "signed_8bit" else 0, np.uint8)
                        scales = states[f"{state_name}_absmax"] = np.zeros((p.size + 255) // 256, np.float32)
                        row.state[j] = Stream(array.ctypes.data, DTYPES.index(kind))
                        row.beside[1 + j] = scales.ctypes.data
                    else:
                        first = self.functions.initial_state(self.rule, j, self.options[slot])
                        array = np.full(p.shape, first, storage.state_type(p.dtype, stored))
                        row.state[j] = Stream(array.ctypes.data, dtype_of(array))
                    states[state_name] = array
            self.states.append(states)
        self.slots = (Slot * len(options))()
        for slot_, o, kept in zip(self.slots, self.options, self.kept, strict=True):
            slot_.size, slot_.step, slot_.gradient_factor = ctypes.sizeof(Slot), 0, 1
            slot_.options, slot_.kept = ctypes.cast(o, Doubles), ctypes.cast(kept, Doubles)
            slot_.seed, slot_.rounding_step = stored.get("seed", 0), -1
        self.message = ctypes.create_string_buffer(300)
        self.handle = Address()
        self.held = params, grads
        self.check(self.functions.create(self.rows, len(params), flags, ctypes.byref(self.handle), self.message, 300))

    def check(self, status: int) -> None:
        if status < 0:
            raise ValueError(self.message.value.decode())

    def count(self) -> None:
        for slot in self.slots:
            slot.step += 1

    def step(self, threads: int = 1) -> None:
        self.count()
        self.check(self.functions.step(self.handle, self.slots, len(self.slots), threads, self.message, 300))

    def step_in_chunks(self, seed: int) -> None:
        """A step by single chunks in a random order."""
        order = np.random.default_rng(seed).permutation(self.chunks()).tolist()
        self.prepare()
        if self.functions.has_sums(self.handle):
            for i in order:
                self.functions.sum(self.handle, i, i + 1)
            self.functions.combine(self.handle, self.slots)
        for i in order:
            self.functions.run(self.handle, i, i + 1)

    def prepare(self) -> None:
        self.count()
        self.check(self.functions.prepare(self.handle, self.slots, len(self.slots), self.message, 300))

    def chunks(self) -> int:
        return int(self.functions.chunks(self.handle))

    def close(self) -> None:
        self.functions.destroy(self.handle)
        self.handle = Address()

    def __del__(self) -> None:
        if self.handle:
            self.close()
