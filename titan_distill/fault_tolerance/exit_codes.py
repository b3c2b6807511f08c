"""Process exit codes. This file imports nothing: the launcher needs the codes before torch is loaded."""

EXIT_DONE = 0
EXIT_FAILED = 1
"""The program or the machine failed; the output names the cause. Remove the cause before starting the run again."""
EXIT_BAD_INPUT = 2
"""The input is wrong; one sentence names it. Starting again without a change fails again."""
EXIT_UNHEALTHY = 3
"""The doctor stopped the run (`doctor.on_alarm = "stop"`), which saved a checkpoint; doctor.jsonl names the measure.
Look at it before resuming."""
EXIT_COME_AGAIN = 75
"""SIGTERM or SIGUSR1 stopped the run, which saved a checkpoint and can resume. The value is EX_TEMPFAIL of
sysexits.h."""
EXIT_INTERRUPTED = 130
"""Ctrl-C stopped the run at once; nothing was saved."""
