"""The agent as its systemd unit runs it, on machines without a running systemd."""
