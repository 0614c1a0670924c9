"""What a process says by ending."""

COMPLETE = 0
"""All is recorded."""
FAILED = 1
"""Units failed, or something is wrong on disk."""
REFUSED = 2
"""Nothing was begun: the recipe, the model, the corpus or the folder will not do."""
INTERRUPTED = 75
"""Stopped early; run me again (EX_TEMPFAIL of sysexits.h)."""
