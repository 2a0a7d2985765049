"""Taking a link of the host over: a bridge gets its addresses, routes and neighbours, and back.

`contents` is what moves, as values; `plan` the steps, in order; `interface` reads links and carries
steps out; `journal` what is on disk while a bridge has a link; `confirm` asks the gateway and etcd;
`main` is the program that does it all, which outlives whoever started it.

Why a journal and a process of its own: docs/design/underlay-bridge.md.
"""
