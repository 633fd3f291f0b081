"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from neurons import CONTRACTS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The contract suite runs for every neuron on every backend that serves the CPU."""
    if metafunc.module.__name__.rpartition(".")[2].startswith("test_contract") and "case" in metafunc.fixturenames:
        ids = [f"{case.name}-{backend}" for case, backend in CONTRACTS]
        metafunc.parametrize(("case", "backend"), CONTRACTS, ids=ids)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(20230218)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """What a kernel forgets to write, or reads too early, is NaN instead of whatever happens to lie there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty_strided((3,), (1,)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For networks so small that threads would spend their time waiting for each other, here and in subprocesses."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(usual)
