# What a tensor is: where it lies, of which type and layout.
#
# A tensor can change under the same object (p.data = x, p.set_()), so every one is looked at in every step: through the
# DLPack C exchange API (torch >= 2.10), which takes nanoseconds, or data_ptr() and its kin.

from cpython.bytes cimport PyBytes_AsString
from cpython.exc cimport PyErr_Clear
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyopt._views cimport (
    OF_BFLOAT16, OF_FLOAT16, OF_FLOAT32, OF_FLOAT64, OF_INT16, OF_UINT8, OTHER, View,
)

import sys
from struct import pack

import torch
from torch import Tensor
from torch.nn import Parameter


# The part of DLPack (https://dmlc.github.io/dlpack) that is used; its ABI is stable within a major version.
cdef struct DLTensor:
    void *data
    int32_t device_type
    int32_t device_id
    int32_t ndim
    uint8_t type_code
    uint8_t type_bits
    uint16_t type_lanes
    int64_t *shape
    int64_t *strides
    uint64_t byte_offset


cdef struct DLPackExchangeAPI:
    uint32_t major
    uint32_t minor
    void *previous
    void *managed_tensor_allocator
    void *managed_tensor_from_py_object_no_sync
    void *managed_tensor_to_py_object_no_sync
    int (*dltensor_from_py_object_no_sync)(void *, DLTensor *) noexcept
    void *current_work_stream


cdef enum:
    CPU = 1  # kDLCPU
    INT = 0  # kDLInt
    UINT = 1
    FLOAT = 2
    BFLOAT = 4

tensor_type, parameter_type = Tensor, Parameter
is_neg, is_inference = Tensor.is_neg, Tensor.is_inference

cdef DLPackExchangeAPI *exchange = NULL


def use_exchange_api(bint use):
    """Look at tensors through torch's DLPack exchange API, or through data_ptr(); returns whether the API is used."""
    global exchange
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None) if use else None
    exchange = NULL
    if capsule is not None:
        exchange = <DLPackExchangeAPI *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
        if exchange.major != 1 or exchange.dltensor_from_py_object_no_sync == NULL:
            exchange = NULL
    return exchange != NULL


use_exchange_api(True)


cdef Py_ssize_t reach(const View *v) noexcept:
    """Bytes from the first element of a tensor to the end of its last; torch has no negative strides."""
    cdef Py_ssize_t last = 0
    cdef int axis
    if v.size == 0:
        return 0
    for axis in range(v.ndim):
        last += (v.shape[axis] - 1) * v.strides[axis]
    return (last + 1) * v.itemsize


def extent(tensor):
    """Begin and end of the memory of a tensor of any kind, (0, 0) where it has none of its own."""
    try:
        if tensor.layout is torch.sparse_coo:
            tensor = tensor._values()
        if tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.numel() and tensor.data_ptr():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
            return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
    except (AttributeError, RuntimeError, ValueError):  # no tensors, wrappers, uninitialized parameters
        pass
    return 0, 0


def is_strided(tensor):
    """Whether a tensor, or the local part of one, is no sparse one."""
    return tensor.layout is torch.strided


def describe(tensor):
    """dtype, layout and device, as far as they are not the usual ones."""
    words = [str(tensor.dtype).removeprefix("torch.")]
    if tensor.layout is not torch.strided:
        words.append(str(tensor.layout).removeprefix("torch.").replace("_", " "))
    if tensor.device.type != "cpu":
        words.append(tensor.device.type)
    return " ".join(words)


def is_ordinary(tensor):
    """Whether a tensor is dense and of floats on the CPU, without the C++ exception that the exchange throws."""
    return (tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype in FLOATS)


def as_local(param, *others):
    """The local tensors of DTensors that are placed alike; None where they are not."""
    kind = type(param)
    for each in (param, *others):
        if (type(each) is not kind or each._spec.placements != param._spec.placements
                or each._spec.mesh != param._spec.mesh or type(each._local_tensor) is not Tensor
                or any(placement.is_partial() for placement in each._spec.placements)):
            return None
    return [each._local_tensor for each in (param, *others)]


def distributed_tensor_type():
    """torch's DTensor, None where nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


cdef dict ELEMENTS = {torch.float32: OF_FLOAT32, torch.float64: OF_FLOAT64, torch.bfloat16: OF_BFLOAT16,
                      torch.float16: OF_FLOAT16, torch.int16: OF_INT16, torch.uint8: OF_UINT8}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


cdef int element_of(int code, int bits) noexcept:
    if code == FLOAT:
        return OF_FLOAT32 if bits == 32 else OF_FLOAT64 if bits == 64 else OF_FLOAT16 if bits == 16 else OTHER
    if code == BFLOAT and bits == 16:
        return OF_BFLOAT16
    return OF_INT16 if code == INT and bits == 16 else OF_UINT8 if code == UINT and bits == 8 else OTHER


cdef bint view_tensor(PyObject *tensor, View *v, list layouts) except -1:
    """Read what a tensor is; whether it is one of floats on the CPU. layouts holds what v points to."""
    return view_any(tensor, v, layouts) and v.element != OF_INT16 and v.element != OF_UINT8


cdef bint view_any(PyObject *tensor, View *v, list layouts) except -1:
    """The same; whether it is one of a type that a step uses, on the CPU."""
    cdef DLTensor t
    cdef int axis
    v.unit = 0
    if exchange != NULL:
        if exchange.dltensor_from_py_object_no_sync(<void *>tensor, &t):
            PyErr_Clear()  # sparse, meta and other tensors without memory
            return False
        v.element = element_of(t.type_code, t.type_bits)
        if t.device_type != CPU or t.type_lanes != 1 or v.element == OTHER:
            return False
        v.data = <char *>t.data + t.byte_offset
        v.shape, v.strides, v.ndim = t.shape, t.strides, t.ndim
        v.itemsize = t.type_bits // 8
    else:
        if (<object>tensor).layout is not torch.strided or (<object>tensor).device.type != "cpu":
            return False
        v.element = ELEMENTS.get((<object>tensor).dtype, OTHER)
        if v.element == OTHER:
            return False
        v.ndim = (<object>tensor).dim()
        layout = pack(f"{2 * v.ndim}q", *(<object>tensor).size(), *(<object>tensor).stride())
        layouts.append(layout)
        v.data = <char *><size_t>(<object>tensor).data_ptr()
        v.shape = <const int64_t *>PyBytes_AsString(layout)
        v.strides = v.shape + v.ndim
        v.itemsize = (<object>tensor).element_size()
    v.unit = v.itemsize
    v.size = 1
    for axis in range(v.ndim):
        v.size *= v.shape[axis]
    return v.data != NULL or v.size == 0  # gradients that are known to be zero have no memory
