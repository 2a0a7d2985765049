"""meshnet: a multi-host container overlay network for plain Linux hosts."""
