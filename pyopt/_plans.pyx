# What a step needs to know of a param group: found once, and used until the group changes.

cimport cython
from cpython.dict cimport PyDict_Contains, PyDict_Copy, PyDict_GetItemWithError, PyDict_Next, PyDict_Size
from libc.math cimport isfinite

from pyopt import storage
from pyopt.checks import plain


cdef extern from *:
    """
    #include <float.h>
    """
    const double FLT_MAX
    const double FLT_TRUE_MIN


cdef class Plan:
    """What a step needs to know of a group: made whole, of a copy of it, and never changed.

    seen: the group's values that it was made of; None where one of them could change inside, so that it serves once.
    options: the hyper-parameters as Python numbers.
    rule: what steps the group.
    names: the state array behind each stream of the rule, None where the options need none; None for a group that
    the kernels do not step.
    takes_rows: whether gradients may be row-sparse.
    """


cdef bint is_constant(value) noexcept:
    cdef object kind = type(value)
    if kind is tuple:
        for item in <tuple>value:
            if not is_constant(item):
                return False
        return True
    return kind is float or kind is int or kind is bool or kind is str or value is None


cdef bint is_as_seen(group, dict seen) except -1:
    """Whether a group holds the very values that a plan was made of."""
    cdef Py_ssize_t position = 0, others = 0
    cdef PyObject *key
    cdef PyObject *value
    if seen is None or not isinstance(group, dict):
        return False
    with cython.critical_section(group):
        while PyDict_Next(group, &position, &key, &value):
            if type(<object>key) is not str:
                return False
            if PyDict_GetItemWithError(seen, <object>key) == value:
                continue
            if <str><object>key == "params" or <str><object>key == "param_names" or <str><object>key == "rounding_step":
                others += 1
            else:
                return False
        return PyDict_Contains(group, "params") and PyDict_Size(group) - others == PyDict_Size(seen)


cdef list numbers_of(dict options, known):
    """(number, name, value) of the known options; a pair has two."""
    cdef list numbers = []
    for name, value in options.items():
        if name in known:
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, (int, float)):
                    numbers.append((x, name, value))
    return numbers


cdef object first_too_large(list numbers, exempt):
    """The message for an option that is finite in double, and in float32 is not, or becomes 0."""
    for x, name, value in numbers:
        if name not in exempt and x != 0 and not FLT_TRUE_MIN / 2 < abs(x) <= FLT_MAX and isfinite(x):
            return f"{name} == {value!r}, must be a number of float32: at most 3.4e38, if not 0 at least 1.4e-45"
    return None


cdef Plan new_plan(optimizer, Py_ssize_t g, group, bint counts_steps):
    """The plan of group number g; it runs Python code of the user's."""
    cdef Plan plan
    if not isinstance(group, dict):
        raise TypeError(f"param group {g} is a {type(group).__name__}, must be a dict")
    group = PyDict_Copy(group)  # as it is now, whatever other threads do to it
    plan = Plan.__new__(Plan)
    seen = {key: value for key, value in group.items() if key not in ("params", "param_names", "rounding_step")}
    optimizer.check_group(group)
    plan.options = {**optimizer.later, **plain(group)}
    plan.rule = optimizer.rule_of(plan.options)
    plan.names = optimizer.state_streams(plan.options)
    if plan.names is not None and len(plan.names) > STATES:
        raise ValueError(f"state_streams returned {plan.names}, must have at most {STATES} names")
    plan.takes_rows = optimizer.takes_rows(plan.options)
    plan.first_name = "step" if counts_steps else None
    for j, name in enumerate(plan.names or ()):
        if name is not None:
            plan.name[j] = <PyObject *>name  # held by names
            if plan.first_name is None:
                plan.first_name = name
    plan.stateless = plan.first_name is None
    plan.storage = storage.checked(plan.options) or None
    if plan.storage is not None:
        plan.master_name = storage.MASTERS.get(plan.storage.get("master"))
        plan.chance = plan.storage.get("rounding") == "stochastic"
        plan.max_row_norm = plan.storage.get("max_row_norm") or 0
        if plan.max_row_norm:
            storage.check_for("its class", optimizer, {"max_row_norm": plan.max_row_norm})
        if plan.storage.get("state_dtype") == "8bit":
            storage.check_for("its class", optimizer, plan.storage)
            plan.unsigned = optimizer.unsigned_states
            plan.aside_names = tuple([name and f"{name}_absmax" for name in plan.names or ()])
    numbers = numbers_of(plan.options, optimizer.defaults)
    plan.too_large = first_too_large(numbers, optimizer.shared_numbers)
    plan.finite = all([isfinite(x) for x, _, _ in numbers if isinstance(x, float)])
    plan.seen = seen if all(type(key) is str and is_constant(value) for key, value in seen.items()) else None
    return plan
