"""Pauses of a run: phases other than training, whose seconds do not count in rates."""

PAUSES = ("time/checkpoint", "time/validation", "time/page")
"""Metrics with their seconds."""
