"""Commands that tests start as a user would."""

import signal


def heed():
    """In the started process: Ctrl-C counts, which what a shell starts in the background ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
