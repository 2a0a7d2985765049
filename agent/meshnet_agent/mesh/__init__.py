"""This host as a member of the mesh: what the store says, who this host is, what it publishes."""
