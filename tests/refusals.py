"""Refusals as the user meets them: the right class, the right words, one line."""

import contextlib
from collections.abc import Iterator

import pytest

from nnflow.errors import NNFlowError


@contextlib.contextmanager
def refused(kind: type[NNFlowError], match: str) -> Iterator[None]:
    with pytest.raises(kind, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
