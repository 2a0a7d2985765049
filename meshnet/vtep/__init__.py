"""The userspace VTEP: VXLAN's wire format between a TUN and a UDP socket, in a process of its own.

``python -m meshnet.vtep`` serves one network of one host; see `meshnet.vtep.main` for how it is
started, `meshnet.vtep.control` for how it is told of peers, `meshnet.vtep.python.sender` and
`meshnet.vtep.python.receiver` for what it does with a packet, and docs/design/userspace-vtep.md for
why.

It outlives the agent.  May import only the standard library, `meshnet.errors`,
`meshnet.system.proc` and `meshnet.wire`; none of trio, pyroute2, msgspec: it starts within
milliseconds and is small.
"""
