"""Options of the whole test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --device, for `make test-gpu`."""
    parser.addoption("--device", default="cpu", help="cpu or cuda: where numeric tests run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip everything, with the reason, where CUDA is asked for and there is none."""
    if not config.getoption("--device").startswith("cuda"):
        return
    import torch

    if not torch.cuda.is_available():  # noqa: TID251
        reason = pytest.mark.skip(reason="no CUDA device that this PyTorch can use")
        for item in items:
            item.add_marker(reason)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> object:
    """The device that --device names."""
    import torch

    return torch.device(request.config.getoption("--device"))
