"""Process exit codes. This file imports nothing: the launcher needs the codes before torch is loaded."""

EXIT_DONE = 0
EXIT_FAILED = 1
"""A failure of the program or the machine; the output says which. Start again once the cause is known."""
EXIT_BAD_INPUT = 2
"""Wrong input; one sentence names it. Starting again gives the same."""
EXIT_COME_AGAIN = 75
"""Stopped by SIGTERM or SIGUSR1, saved, and ready to resume: EX_TEMPFAIL of sysexits.h."""
EXIT_INTERRUPTED = 130
"""Ctrl-C: stopped at once, nothing saved."""
