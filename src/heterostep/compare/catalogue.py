"""All methods by name, in the order in which they are run and shown."""

from __future__ import annotations

from heterostep.compare.method import Method
from heterostep.compare.own import OWN
from heterostep.compare.peers import PEERS

METHODS: dict[str, Method] = {method.name: method for method in (*OWN, *PEERS)}
