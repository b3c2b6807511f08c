"""How a run ends, for scripts that start it. No import here: the launcher needs these before it has time for torch."""

EXIT_DONE = 0
EXIT_FAILED = 1
"""A fault, ours or the machine's; the output says which. Starting again is worth it once that is known."""
EXIT_BAD_INPUT = 2
"""One sentence says what is wrong; starting again gives the same."""
EXIT_COME_AGAIN = 75
"""Asked to stop by SIGTERM or SIGUSR1, saved, and can go on: EX_TEMPFAIL of sysexits.h."""
EXIT_INTERRUPTED = 130
"""Ctrl-C: stopped at once, nothing saved."""
