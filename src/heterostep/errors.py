"""The library's one exception: what the user asked for cannot be done, said in one clear line."""


class HeterostepError(ValueError):
    """A request that cannot be met; the message says why and what to do instead."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
