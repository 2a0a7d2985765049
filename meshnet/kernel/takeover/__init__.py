"""Taking a link of the host over: a bridge gets its addresses, routes and neighbours, and back.

`contents` has what moves, as values; `plan` the steps, in order; `interface` reads links and
carries steps out; `journal` is what is on disk while a bridge has a link; `confirm` asks the
gateway and etcd; `main` is the program that does it all, and outlives the agent that started it.

docs/design/underlay-bridge.md says why there is a journal and a separate process.
"""
