from pyopt._engine import Rule
from pyopt._matrix import Array, Writes
from pyopt.sparse import RowSparse

def coalesce(what: str, grad: RowSparse, indices: Array, values: Array) -> tuple[Array, Array]: ...
def step_rows(
    rule: Rule, scalars: dict[str, float], begin: int, end: int, p: Array, g: Array, *states: Array
) -> None: ...

class RowWrites(Writes):
    def add_rows(self, table: Array, rows: Array, numbers: Array) -> None: ...
