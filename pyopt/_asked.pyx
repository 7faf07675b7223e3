# What a step may be asked for beside its rule: its arguments, and the averages that it updates.

cimport cython

from pyopt._engine cimport AVERAGES

from pyopt.checks import number, positive_or_inf

MOST_AVERAGES = AVERAGES  # of one optimizer


cdef class Asked:
    """The arguments of a step, checked: `max_norm`, `nonfinite`, `zero_grad`, `gradient_factor`."""

    def __init__(self, max_norm, nonfinite, zero_grad, gradient_factor):
        number("gradient_factor", gradient_factor)
        self.gradient_factor = gradient_factor
        if max_norm is not None:
            positive_or_inf("max_norm", max_norm)
            self.max_norm = max_norm
        if nonfinite not in ("apply", "raise", "skip"):
            raise ValueError(f"nonfinite == {nonfinite!r}, must be 'apply', 'raise' or 'skip'")
        if not isinstance(zero_grad, bool) and zero_grad != "set_to_none":
            raise ValueError(f"zero_grad == {zero_grad!r}, must be False, True or 'set_to_none'")
        self.nonfinite = ("apply", "raise", "skip").index(nonfinite)
        self.clearing = DROP if zero_grad == "set_to_none" else FILL if zero_grad else KEEP
        self.needs_norm = max_norm is not None or self.nonfinite != APPLY


def asked(max_norm, nonfinite, zero_grad, gradient_factor):
    """What a step is asked for, None where it is for nothing."""
    if (max_norm is None and nonfinite == "apply" and zero_grad is False and type(gradient_factor) is float
            and gradient_factor == 1):
        return None
    return Asked(max_norm, nonfinite, zero_grad, gradient_factor)


cdef class Average:
    """An average of the parameters of an optimizer, which its steps update.

    arrays: by parameter; n_averaged: how often it was updated; joined: n_averaged when a parameter came, where it came
    later; steps: of the optimizer since it was attached; is_swapped: whether the parameters and it have changed places;
    kept: what the places of the parameters cannot hold meanwhile.
    """

    def __cinit__(self):
        self.by_param, self.joined_at, self.aside = {}, {}, {}

    # Other threads read these while a step or `restore` puts others in their place.

    @property
    def arrays(self):
        with cython.critical_section(self):
            return self.by_param

    @property
    def joined(self):
        with cython.critical_section(self):
            return self.joined_at

    @property
    def kept(self):
        with cython.critical_section(self):
            return self.aside

    def is_due(self, step):
        """Whether it is updated in a step, counted from 1."""
        raise NotImplementedError

    def weight(self, n):
        """How far it moves towards a parameter, 0 to 1, in update n of that, from 0."""
        raise NotImplementedError

    def restore(self, dict arrays, dict joined, long long n_averaged, long long steps):
        """Become what another one was."""
        with cython.critical_section(self):
            self.by_param, self.joined_at, self.n_averaged, self.steps = arrays, joined, n_averaged, steps
