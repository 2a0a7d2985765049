"""Netlink messages as bytes: rtnetlink, nf_tables, socket filters, and their socket."""
