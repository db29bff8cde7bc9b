"""What every test may rely on."""

from __future__ import annotations

import signal

# A shell that is not interactive starts what runs in its background with SIGINT ignored, which every process started
# from there inherits: those that are to end at Ctrl-C would not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
