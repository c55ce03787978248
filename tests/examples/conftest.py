"""A server of the demo readers, and the search over the demo's corpus."""

import pytest

from examples.demo import READERS, REPOSITORY
from examples.playground import corpus_search
from serving.launcher.server import TritonServer, models_of


@pytest.fixture(scope="module")
def triton():
    with TritonServer(models_of(READERS, stream=True), REPOSITORY) as server:
        yield server


@pytest.fixture(scope="module")
def search():
    return corpus_search()
