"""What tasks are built from: a coalescing event, a right of way, a thread that owns one object."""
