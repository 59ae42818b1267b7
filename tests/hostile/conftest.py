"""Processes that fork one for every hostile command line."""

import pytest
from builders.refusals import Server


@pytest.fixture(scope="module")
def server():
    """One whose children have not imported torch, so that it shows what does."""
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="module")
def warm_server():
    """One whose children have imported torch and transformers: it saves them seconds."""
    found = Server(warm=True)
    yield found
    found.close()
