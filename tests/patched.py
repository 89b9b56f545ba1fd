"""`DirectCalls` beside what the model gives by itself."""

from __future__ import annotations

from typing import Any

from heterostep.engine.calls import DirectCalls


class Patched(DirectCalls):
    """Args: model, and the inputs of one of its forwards by name. `plain_output` is the untouched model's."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.plain_output = model(**{**inputs, "return_dict": False})
        super().__init__(model, inputs)
