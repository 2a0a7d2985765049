"""What a container is made of on this host's disk before an OCI runtime makes it a process."""
