from cpython.object cimport PyObject, PyObject_CallFunctionObjArgs

from pyopt._views cimport View

cdef object tensor_type, parameter_type, is_neg, is_inference

cdef Py_ssize_t reach(const View *v) noexcept
cdef bint view_tensor(PyObject *tensor, View *v, list layouts) except -1
cdef bint view_any(PyObject *tensor, View *v, list layouts) except -1


cdef inline bint calls_false(method, PyObject *tensor) except -1:
    return PyObject_CallFunctionObjArgs(method, tensor, NULL) is False


cdef inline bint is_plain(tensor) noexcept:
    return type(tensor) is parameter_type or type(tensor) is tensor_type
