"""What is compared: heterostep and its controls, fewer steps, and the caches that a user would pick instead.

A file a method. Those of a package run as the package has them; where no diffusers hook exists the published rule
stands here. All skip work for every token at once. Their skipped blocks may still be *called* (diffusers' hooks and
cache-dit stand inside or around a block's forward), so evaluations are counted on the layers in it, not on the block.
"""

from __future__ import annotations

from heterostep.compare.methods.cache_dit import CACHE_DIT
from heterostep.compare.methods.easycache import EASYCACHE
from heterostep.compare.methods.first_block_cache import FIRST_BLOCK_CACHE
from heterostep.compare.methods.magcache import MAGCACHE
from heterostep.compare.methods.method import Method
from heterostep.compare.methods.own import OWN
from heterostep.compare.methods.pab import PAB
from heterostep.compare.methods.seacache import SEACACHE, SEACACHE_HOLD
from heterostep.compare.methods.taylorseer import TAYLORSEER
from heterostep.compare.methods.teacache import TEACACHE

PEERS: tuple[Method, ...] = (
    EASYCACHE,
    TEACACHE,
    FIRST_BLOCK_CACHE,
    MAGCACHE,
    SEACACHE,
    SEACACHE_HOLD,
    TAYLORSEER,
    PAB,
    CACHE_DIT,
)
# All by name, in the order in which they are run and shown.
METHODS: dict[str, Method] = {method.name: method for method in (*OWN, *PEERS)}
