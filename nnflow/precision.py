"""float32 that means float32, whatever a caller allows products of matrices to be rounded to.

`torch.set_float32_matmul_precision("high")` makes a GPU round float32 factors to TF32, 10 bits of mantissa
for 23; "medium" changes products on a CPU with bfloat16 instructions too. A network bears that. The expansion
|x|^2 - 2 t x.x_i + t^2 |x_i|^2 cancels: three digits lost there are a field that is wrong.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_NAMED = "fp32_precision"  # since torch 2.9, of each backend; what older switches say can be read there too


class _Switches:
    """The process's own, turned up while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[Any, str]] = []

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            if not hasattr(torch.backends.cuda.matmul, _NAMED):
                self._before = [(torch, torch.get_float32_matmul_precision())]
                torch.set_float32_matmul_precision("highest")
                return
            known: Any = torch.backends
            self._before = [
                (each, getattr(each, _NAMED)) for each in (known.cuda.matmul, known.mkldnn.matmul)
            ]
            self._before = [(each, found) for each, found in self._before if found not in ("none", "ieee")]
            for each, _ in self._before:
                setattr(each, _NAMED, "ieee")

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            for each, found in self._before:
                if each is torch:
                    torch.set_float32_matmul_precision(found)
                else:
                    setattr(each, _NAMED, found)
            self._before = []


_switches = _Switches()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within it products of float32 matrices are in float32; after it, all switches are as they were.

    They belong to the process, so other threads compute in full float32 too while one is inside.
    """
    _switches.enter()
    try:
        yield
    finally:
        _switches.leave()
