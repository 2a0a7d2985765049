/* What the engine has Python know: kinds and layout are in meshnet.vtep.native.engine, too. */
#ifndef MESHNET_NOTES_H
#define MESHNET_NOTES_H

#include "cut.h"

enum note_kind {
    FROM_TUN = 1, /* a packet, virtio header first, that this does not take */
    FROM_PEER,    /* a datagram of `peer` that this does not take */
    WANTS_SOCKET, /* `peer` has none of its own */
    NOT_SENT,     /* `value` packets to `peer`, for the errno that follows */
    NOT_WRITTEN,  /* the TUN refused a packet of `peer` */
};
struct note {
    uint32_t kind;
    int32_t peer;
    uint32_t value;
    uint32_t bytes; /* that follow */
};
enum {
    NOTES_BYTES = 1 << 19,
    /* What a packet may add: itself, or a refusal for each part of it, and of what it flushes. */
    NOTE_ROOM_BYTES = MAX_PACKET_BYTES + VIRTIO_BYTES + 2 * MAX_CUT * 20,
};
struct notes {
    uint32_t bytes;
    uint8_t data[NOTES_BYTES];
};

/* Whether there is room for all that another packet may add. */
bool has_room(const struct notes *notes);

/* Add one, with a copy of the `bytes` of `data`. */
void note(struct notes *notes, enum note_kind kind, int peer, uint32_t value, const void *data,
          size_t bytes);

#endif
