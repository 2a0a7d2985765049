"""This host's part in the mesh: what the store says, who this host is, what it publishes."""
