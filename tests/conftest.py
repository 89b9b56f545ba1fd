"""What no test may leave behind for the next one of its process."""

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry


@pytest.fixture(autouse=True)
def attention_backend_of_all_others():
    """A model's `set_attention_backend` is also that of every model without one, from then on.

    Some backends choose PyTorch's kernel for the whole process while they attend: a text encoder in another thread
    would attend by it too, now and then.
    """
    before, _ = registry.get_active_backend()
    yield
    registry.set_active_backend(before)
