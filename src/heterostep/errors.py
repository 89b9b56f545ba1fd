"""The library's one exception: what the user asked for cannot be done, said in one clear line."""


class HeterostepError(ValueError):
    """A request that cannot be met; the message says why and what to do instead."""
