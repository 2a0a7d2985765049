/* Outward: from the TUN to the underlay (meshnet.vtep.python.sender). */
#ifndef MESHNET_OUTWARD_H
#define MESHNET_OUTWARD_H

#include "engine.h"

/* Carry what waits in the TUN, up to a round's worth; returns an errno if it is gone. */
int pump_out(struct engine *engine);

#endif
