"""The machine beneath: libc's calls, /proc, files that survive a power cut, the group."""
