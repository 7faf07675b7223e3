# Parameters that lie in one block of memory, as the steps see them: see flat.py.

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from cpython.weakref cimport PyWeakref_GetRef
from libc.stdint cimport int64_t
from libc.string cimport memcmp, memcpy

from pyopt._views cimport View
from pyopt.torch._tensor_views cimport calls_false, is_neg, is_plain, view_tensor

from weakref import ref

flats, fold, flat_state = {}, None, None
cdef dict members = {}  # (Flat, place in it) by the id of a parameter
cdef object guard = object()  # of both tables, where they change


def fold_by(function, kind):
    """Have function(workspace, optimizer, whether they may be) decide in each step what is stepped as one."""
    global fold, flat_state
    fold, flat_state = function, kind


cdef class Flat:
    """Parameters as views of one block of memory, their gradients as views of another: one tensor to a step.

    block: the whole as one parameter, with its gradient.
    """

    def __cinit__(self, block, list params, list gradients):
        cdef View v
        cdef Py_ssize_t i, room = 0, n = 0
        cdef int64_t start = 0
        cdef list layouts = []
        self.block, self.gradients, self.count = block, gradients, len(params)
        for p in params:
            room += 1 + 2 * p.dim()
        self.starts = <int64_t *>PyMem_Malloc((self.count + 1) * sizeof(int64_t))
        self.layout = <int64_t *>PyMem_Malloc(room * sizeof(int64_t))
        if self.starts == NULL or self.layout == NULL:
            raise MemoryError("no memory for the layout of flattened parameters")
        for i in range(self.count):
            view_tensor(<PyObject *>gradients[i], &v, layouts)
            self.itemsize = v.itemsize
            self.layout[n] = v.ndim
            memcpy(&self.layout[n + 1], v.shape, v.ndim * sizeof(int64_t))
            memcpy(&self.layout[n + 1 + v.ndim], v.strides, v.ndim * sizeof(int64_t))
            n += 1 + 2 * v.ndim
            self.starts[i] = start
            start += v.size
        self.starts[self.count] = start

    def __init__(self, block, list params, list gradients):
        for p in params:
            if id(p) in members:
                (<Flat>members[id(p)][0]).forget()
        self.index = {id(p): i for i, p in enumerate(params)}
        self.references = [ref(p, self.forget) for p in params]
        with cython.critical_section(guard):
            members.update({key: (self, i) for key, i in self.index.items()})
            flats[id(params[0])] = self

    def __dealloc__(self):
        PyMem_Free(self.starts)
        PyMem_Free(self.layout)

    def forget(self, _=None):
        """No longer be found: one of the parameters is gone, or on its own again."""
        with cython.critical_section(guard):
            for key in self.index:
                if members.get(key, (None,))[0] is self:
                    members.pop(key, None)
                if flats.get(key) is self:
                    flats.pop(key, None)
        # Those with a call would keep the blocks alive until the garbage collector comes.
        alive = [(each, each()) for each in self.weak()]
        self.replace_references([each if p is None else ref(p) for each, p in alive])

    @cython.critical_section
    cdef list weak(self):
        return self.references

    @cython.critical_section
    cdef int replace_references(self, list references) except -1:
        self.references = references
        return 0

    def parameters(self):
        """The parameters, all of which must be alive."""
        return [reference() for reference in self.weak()]

    def part(self, whole, Py_ssize_t i):
        """The view of a block that belongs to parameter i."""
        like = self.gradients[i]
        return whole.as_strided(like.shape, like.stride(), self.starts[i])

    cdef bint is_at(self, PyObject *tensor, const View *block, Py_ssize_t i, const int64_t *layout,
                    list layouts) except -1:
        """Whether a tensor is the part i of a block."""
        cdef View v
        return (view_tensor(tensor, &v, layouts) and v.itemsize == self.itemsize
                and (v.size == 0 or v.data == block.data + self.starts[i] * self.itemsize) and v.ndim == layout[0]
                and memcmp(v.shape, layout + 1, v.ndim * sizeof(int64_t)) == 0
                and memcmp(v.strides, layout + 1 + v.ndim, v.ndim * sizeof(int64_t)) == 0
                and calls_false(is_neg, tensor))

    cdef bint is_whole(self, list params, Py_ssize_t at) except -1:
        """Whether the parameters from params[at] on are these, where they were put, and so are their gradients."""
        cdef View data, gradient
        cdef Py_ssize_t i
        cdef const int64_t *layout = self.layout
        cdef list layouts = [], references = self.weak()
        if at + self.count > len(params):
            return False
        view_tensor(<PyObject *>self.block, &data, layouts)
        view_tensor(<PyObject *>self.block.grad, &gradient, layouts)
        for i in range(self.count):
            param = target(references[i])
            if param is not params[at + i] or not is_plain(param):
                return False
            grad = param.grad
            if (grad is not self.gradients[i] or not self.is_at(<PyObject *>param, &data, i, layout, layouts)
                    or not self.is_at(<PyObject *>grad, &gradient, i, layout, layouts)):
                return False
            layout += 1 + 2 * layout[0]
        return True

    def in_place(self, numbers):
        """(parameter, place of its gradient), for those of these numbers that were neither moved nor frozen."""
        cdef View data, gradient
        cdef Py_ssize_t i
        cdef const int64_t *layout = self.layout
        cdef list layouts = [], found = [], references = self.weak()
        cdef set wanted = set(numbers)
        cdef bint all_of_them = len(wanted) == self.count
        view_tensor(<PyObject *>self.block, &data, layouts)
        view_tensor(<PyObject *>self.block.grad, &gradient, layouts)
        for i in range(self.count):
            param = target(references[i])
            if ((all_of_them or i in wanted) and is_plain(param) and param.requires_grad
                    and self.is_at(<PyObject *>param, &data, i, layout, layouts)
                    and self.is_at(<PyObject *>self.gradients[i], &gradient, i, layout, layouts)):
                found.append((param, self.gradients[i]))
            layout += 1 + 2 * layout[0]
        return found

    def zero(self, list places):
        """Fill gradients with zeros and give them to their parameters, as `in_place` returns these."""
        for each in [self.block.grad] if len(places) == self.count else [place for _, place in places]:
            each.zero_()
        for param, place in places:
            if param.grad is not place:
                param.grad = place


cdef object target(reference):
    """What a weak reference is to, None where it is gone."""
    cdef PyObject *found = NULL
    PyWeakref_GetRef(reference, &found)
    if found == NULL:
        return None
    held = <object>found
    Py_DECREF(held)
    return held


def flat_parameters(list params):
    """Parameters with a Flat in the place of those that are whole, or None where there is none."""
    cdef Py_ssize_t k = 0
    cdef list units = []
    cdef bint any_flat = False
    while k < len(params):
        found = flats.get(id(params[k]))
        if found is not None and (<Flat>found).is_whole(params, k):
            units.append(found)
            k += (<Flat>found).count
            any_flat = True
        else:
            units.append(params[k])
            k += 1
    return units if any_flat else None


def members_of(list params):
    """The Flats that some parameters are of, with a list of the places of these in each."""
    cdef dict flats_of = {}
    cdef Flat flat = None
    for p in params:
        found = members.get(id(p))
        if found is None:
            continue
        if (<tuple>found)[0] is not flat:
            flat = (<tuple>found)[0]
            places = flats_of.setdefault(flat, [])
        places.append((<tuple>found)[1])
    return flats_of


def member_of(param):
    """The Flat of a parameter and its place in it, or None."""
    return members.get(id(param))
