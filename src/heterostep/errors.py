"""The library's one exception: what the user asked for cannot be done, said in one clear line."""


class HeterostepError(ValueError):
    """A request that cannot be met; the message says why and what to do instead.

    Attributes:
        field: the plain name of the option that it is about, such as "height"; None where it is about no one of them.
            A message that names the option begins with it.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shorten(value: object) -> str:
    """A value in one short line, for messages about it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]} ..."
