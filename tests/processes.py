"""Commands that tests start as a user would."""

import signal


def heed():
    """In the started process: Ctrl-C counts. What a shell starts in the background ignores it, and so would the command."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
