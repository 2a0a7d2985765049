/* Inward: from the underlay to the TUN (meshnet.vtep.python.receiver). */
#ifndef MESHNET_INWARD_H
#define MESHNET_INWARD_H

#include "engine.h"

/* Carry what waits in the socket, up to a round's worth. */
void pump_in(struct engine *engine);

/* Go on with what was received; returns false if Python has to take notes before the rest. */
bool carry_received(struct engine *engine);

/* Where joined packets go; the joiner's `write`, and its context is the engine. */
void write_to_tun(void *context, int peer, const struct iovec *parts, int count);

#endif
