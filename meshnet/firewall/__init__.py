"""The firewall: what our nftables tables hold, as values and as text (docs/firewall.md).

`rules` is the skeleton: chains, rules, counters and named sets; it changes with the networks.
`elements` is what is in the sets: one element or a few for each endpoint, publication and member,
which come and go one by one and are compared like every other object of the kernel.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

from meshnet.firewall.rules import FirewallNetwork, render_rules

__all__ = ["FirewallNetwork", "render_rules"]
