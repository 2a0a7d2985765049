"""Building blocks of tasks: a coalescing event, a right of way, a thread that owns an object."""
