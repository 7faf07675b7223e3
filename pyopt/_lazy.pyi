from typing import Any

from pyopt._engine import Rule
from pyopt._matrix import Array, Writes
from pyopt.sparse import RowSparse

class Rows:
    count: int

def touched_rows(what: str, grad: RowSparse, indices: Array, values: Array) -> Rows: ...
def summed(rows: Rows, values: Array) -> tuple[Array, Array]: ...
def coalesce(what: str, grad: RowSparse, indices: Array, values: Array) -> tuple[Array, Array]: ...
def widened(rule: Rule, array: Array) -> Array: ...
def narrowed(rule: Rule, numbers: Array, dtype: Any) -> Array: ...
def step_rows(
    rule: Rule,
    scalars: dict[str, float],
    begin: int,
    end: int,
    p: Array,
    g: Array,
    *states: Array,
    max_row_norm: float = 0,
) -> None: ...

class RowWrites(Writes):
    def add_rows(self, table: Array, rows: Array, numbers: Array) -> None: ...
