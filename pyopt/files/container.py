"""The file: safetensors with checksums, written piece by piece and read from a map of it.

    8 bytes         the length of the header, little-endian
    the header      JSON: "__metadata__", and per array its dtype, shape and place; padded with spaces to 8 bytes
    the data        of the arrays, one after the other without gaps, little-endian, in C order

Of the metadata, all strings: "checksum" is the XXH64 of the header with its own 16 digits as 0, "format" is "pyopt",
"version" is VERSION, "checksums" has 16 digits per array in the order of their data, and "document" is JSON that says
what the arrays are (see plain.py). An array of more than PIECE bytes has as checksum the XXH64 of the XXH64s of its
pieces, 8 bytes little-endian each, so that several threads can compute it.

The writer is our own, since that of the safetensors library (0.8) wants all data as bytes objects: a second copy.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from pyopt._xxh64 import xxh64
from pyopt.files.replacing import replacing
from pyopt.threads import get_num_threads

Array = np.ndarray[Any, Any]
Step = Callable[[int], None]  # is told the number of bytes that were done

VERSION = 1
PIECE = 1 << 22
MOST_HEADER = 100_000_000  # the safetensors library reads no more
# NumPy has no bfloat16: a type of its own stands for it, equal to no other and as good to copy.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "BF16": BFLOAT16,
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ZEROS = "0" * 16
# The checksum stands first, where it can be found in a header that is not JSON any more.
BEGIN = b'{"__metadata__":{"checksum":"'
DIGITS = slice(len(BEGIN), len(BEGIN) + 16)


def code_of(what: str, dtype: np.dtype[Any]) -> str:
    """What safetensors calls a dtype."""
    code = CODES.get(BFLOAT16 if dtype.name == "bfloat16" else dtype.newbyteorder("<"))
    if code is None:
        raise TypeError(f"{what} has dtype {dtype}, which safetensors has not; it has {', '.join(map(str, CODES))}")
    return code


def pieces(array: Array) -> Iterator[Array]:
    """The bytes of an array in C order, in pieces of PIECE bytes; copies only of those that do not lie so."""
    if array.flags.c_contiguous and array.dtype.isnative:
        data = array.reshape(-1).view(np.uint8)
        for begin in range(0, data.size, PIECE):
            yield data[begin : begin + PIECE]
        return
    kept = np.empty(0, np.uint8)
    for index in indices(array.shape, array.itemsize):
        data = np.ascontiguousarray(array[index], array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
        kept = np.concatenate([kept, data])
        while kept.size >= PIECE:
            yield kept[:PIECE]
            kept = kept[PIECE:]
    if kept.size:
        yield kept


def indices(shape: tuple[int, ...], itemsize: int) -> Iterator[Any]:
    """Indices that together take an array, in C order, each at most PIECE bytes."""
    size = itemsize * prod(shape)
    if size <= PIECE:
        yield ...
        return
    rows = max(PIECE * shape[0] // size, 1)
    for first in range(0, shape[0], rows):
        if rows > 1 or size // shape[0] <= PIECE:
            yield slice(first, first + rows)
        else:
            for inner in indices(shape[1:], itemsize):
                yield (first, *inner) if isinstance(inner, tuple) else (first, inner)


class Sum:
    """The checksum of an array, given piece by piece."""

    def __init__(self) -> None:
        self.sums: list[int] = []

    def add(self, piece: Array) -> None:
        self.sums.append(xxh64(piece))

    def digits(self) -> str:
        if len(self.sums) == 1:
            return f"{self.sums[0]:016x}"
        return f"{xxh64(b''.join(each.to_bytes(8, 'little') for each in self.sums)):016x}"


def dumped(document: Any) -> str:
    """JSON as short as it gets; NaN and inf are no JSON."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


# --- writing ----------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], document: Any, arrays: Mapping[str, Array], step: Step) -> None:
    """Put a file in the place of `path`: all of it, on the disk, or nothing."""
    # The widest first, so that each begins at a multiple of its width.
    names = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    table: dict[str, Any] = {}
    end = 0
    for name in names:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        code = code_of(name, array.dtype)
        table[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [begin, end]}
    metadata = {"checksum": ZEROS, "format": "pyopt", "version": str(VERSION), "checksums": ZEROS * len(names)}
    metadata["document"] = dumped(document)
    size = len(header_bytes(metadata, table))  # the same with the checksums, which come while the data are written
    with replacing(path) as file:
        file.seek(size)
        sums = []
        waiting = 0
        for name in names:
            total = Sum()
            for piece in pieces(arrays[name]):
                put(file, piece)
                total.add(piece)
                step(piece.size)
                waiting += piece.size
                if waiting >= 4 * PIECE:
                    begin_flush(file)
                    waiting = 0
            sums.append(total.digits())
        file.seek(0)
        put(file, header_bytes({**metadata, "checksums": "".join(sums)}, table))


def header_bytes(metadata: dict[str, str], table: Mapping[str, Any]) -> bytes:
    """The header with its length before it and its checksum in it."""
    header = dumped({"__metadata__": {**metadata, "checksum": ZEROS}, **table}).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MOST_HEADER:
        raise ValueError(
            f"groups, state and names take {len(header)} bytes beside the arrays, safetensors can hold "
            f"{MOST_HEADER}: put long lists of numbers into arrays"
        )
    digits = f"{xxh64(header):016x}".encode()
    return len(header).to_bytes(8, "little") + header[: DIGITS.start] + digits + header[DIGITS.stop :]


def begin_flush(file: Any) -> None:
    """Let the disk begin with what was just written, and the system forget what the disk has.

    Else it waits for the end, and puts all of the file into memory that others could use.
    """
    if hasattr(os, "posix_fadvise"):
        end = file.tell()
        begin = max(end - 20 * PIECE, 0)
        os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def put(file: Any, data: Any) -> None:
    """Write all of it: a disk that is nearly full takes a part."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


# --- reading ----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an array lies in the data, and what it is."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


class Container:
    """A file, its header checked; `arrays()` checks the data too. Errors are ValueErrors that do not name the file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "rb", buffering=0) as file:
            self.size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or not len(BEGIN) + 16 <= length <= min(MOST_HEADER, self.size - 8):
                raise ValueError("no safetensors file, or cut off in its header")
            header = b""
            while len(header) < length:
                more = file.read(length - len(header))
                if not more:
                    raise ValueError("cut off in its header")
                header += more
            self.start = 8 + length
            metadata, table = parsed(header)
            version = metadata.get("version")
            if version != str(VERSION):
                raise ValueError(f"has format version {version}, this pyopt reads {VERSION}: it needs a newer pyopt")
            self.document = from_json("its document", metadata.get("document", ""))
            self.places = placed(table, self.size - self.start)
            digits = metadata.get("checksums", "")
            if not re.fullmatch(f"[0-9a-f]{{{16 * len(self.places)}}}", digits):
                raise ValueError(f"'checksums' has {len(digits)} characters, must be 16 hex digits per array")
            self.sums = [digits[i : i + 16] for i in range(0, len(digits), 16)]
            # A private map: what NumPy and torch take as writable without a warning, though nobody writes.
            self.map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
            if len(self.map) != self.size:
                raise ValueError("has changed while it was being read")

    def arrays(self, step: Step) -> dict[str, Array]:
        """The arrays in the mapped file, by name, when all have their checksums."""
        data = np.frombuffer(self.map, np.uint8)[self.start :]
        sums = [Sum() for _ in self.places]

        def sums_of(batch: list[Part]) -> list[int]:
            begin, end = batch[0].begin, batch[-1].end
            values = [xxh64(data[part.begin : part.end]) for part in batch]
            self._give_back(begin, end)
            return values

        batches = batched(self.places.values())
        for batch, values in zip(batches, in_threads(sums_of, batches), strict=True):
            for part, value in zip(batch, values, strict=True):
                sums[part.array].sums.append(value)
            step(batch[-1].end - batch[0].begin)
        for (name, _), total, digits in zip(self.places.items(), sums, self.sums, strict=True):
            if total.digits() != digits:
                raise ValueError(f"is damaged: the data of {name!r} do not have their checksum")
        return {
            name: data[place.begin : place.end].view(place.dtype).reshape(place.shape)
            for name, place in self.places.items()
        }

    def _give_back(self, begin: int, end: int) -> None:
        """The memory of a part of the map that has been read, whole pages of it: it counts as the process's own."""
        page = mmap.PAGESIZE
        begin, end = -(-(begin + self.start) // page) * page, (end + self.start) // page * page
        if hasattr(mmap, "MADV_DONTNEED") and begin < end:
            self.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def release(self) -> list[tuple[Any, ...]]:
        """The call, if there is one, that gives back the memory of what has been read of the map."""
        return [(self.map.madvise, mmap.MADV_DONTNEED)] if hasattr(mmap, "MADV_DONTNEED") else []


class Part(NamedTuple):
    """A piece of the data: of which array, and where."""

    array: int
    begin: int
    end: int


def batched(places: Iterable[Place]) -> list[list[Part]]:
    """The pieces of all arrays, some that lie side by side and have about PIECE bytes together in a list each."""
    batches: list[list[Part]] = []
    for i, place in enumerate(places):
        for begin in range(place.begin, place.end, PIECE):
            if not batches or batches[-1][-1].end - batches[-1][0].begin >= PIECE // 2:
                batches.append([])
            batches[-1].append(Part(i, begin, min(begin + PIECE, place.end)))
    return batches


def in_threads(function: Callable[[Any], Any], tasks: list[Any]) -> Iterator[Any]:
    """What the function returns for each task, in order; it must release the GIL."""
    threads = min(get_num_threads(), len(tasks))
    if threads <= 1 or len(tasks) < 8:
        yield from map(function, tasks)
        return
    from concurrent.futures import ThreadPoolExecutor  # takes a while to import

    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def parsed(header: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and table of a header that has its checksum."""
    if not header.startswith(BEGIN):
        raise ValueError("is not a file of pyopt.save")
    digits = header[DIGITS]
    if f"{xxh64(header[: DIGITS.start] + ZEROS.encode() + header[DIGITS.stop :]):016x}".encode() != digits:
        raise ValueError("is damaged: its header does not have its checksum")
    table = from_json("its header", header)
    metadata = table.pop("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has metadata that are no strings")
    if metadata.get("format") != "pyopt":
        raise ValueError(f"has format {metadata.get('format')!r}, must be 'pyopt'")
    return metadata, table


def from_json(what: str, text: str | bytes) -> Any:
    """The dict that a text stands for; no key twice, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands in it twice")
        return result

    def refused(name: str) -> Any:
        raise ValueError(f"it holds {name}")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}, must be a dict")
    return value


def placed(table: Mapping[str, Any], size: int) -> dict[str, Place]:
    """The places of the arrays in the order of their data, which they must fill without gap or overlap."""
    places = {name: _place(name, entry) for name, entry in table.items()}
    places = dict(sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)))
    ends = [0, *(place.end for place in places.values())]
    for (name, place), end in zip(places.items(), ends, strict=False):
        if place.begin != end:
            raise ValueError(f"{name!r} begins at byte {place.begin} of the data, must at {end}: no gaps, no overlaps")
    if ends[-1] != size:
        raise ValueError(f"has {size} bytes of data, must have {ends[-1]}: it is cut off, or something was added")
    return places


def _place(name: str, entry: Any) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name!r} must have dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{name!r} has dtype {entry['dtype']!r}, must be one of {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        # 2**48 is more than any disk; so no product or sum of them is more than NumPy can take
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise ValueError(f"{name!r} has {key} {numbers!r}, must be a list of ints from 0")
    if len(shape) > 64 or prod(max(n, 1) for n in shape) >= 2**48:
        raise ValueError(f"{name!r} has shape {shape}, more than an array can have")
    if len(offsets) != 2 or offsets[1] - offsets[0] != dtype.itemsize * prod(shape):
        raise ValueError(
            f"{name!r} has data_offsets {offsets}, must be two, {dtype.itemsize * prod(shape)} bytes apart"
        )
    return Place(dtype, tuple(shape), *offsets)
