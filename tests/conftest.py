"""What no test may leave behind for the next one of its process, and what they all run beside."""

import gc

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

from heterostep.policy import POLICIES


def pytest_collection_finish():
    """What has been imported is there for good: it need not be looked at whenever garbage is collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def attention_backend_of_all_others():
    """A model's `set_attention_backend` is also that of every model without one, from then on.

    Some backends choose PyTorch's kernel for the whole process while they attend: a text encoder in another thread
    would attend by it too, now and then.
    """
    before, _ = registry.get_active_backend()
    yield
    registry.set_active_backend(before)


@pytest.fixture(autouse=True)
def policies_that_were_registered():
    """A policy of a test's own, or of a page's example, is one that messages name from then on."""
    before = dict(POLICIES)
    yield
    POLICIES.clear()
    POLICIES.update(before)
