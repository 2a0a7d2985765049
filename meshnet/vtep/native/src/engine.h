/* What the parts of the engine share: see engine.c. */
#ifndef MESHNET_ENGINE_H
#define MESHNET_ENGINE_H

#include <sys/socket.h>

#include "cut.h"
#include "join.h"
#include "peers.h"

enum {
    MAX_READS = 64,   /* of the TUN in a round, before the socket has its turn */
    MAX_RECEIVED = 8, /* messages in a round, of up to 64 KiB */
    RECEIVE_BYTES = 65536,
    FRONT_BYTES = ENCAPSULATION_BYTES - VIRTIO_BYTES,
};

/* What Python is to know.  Kinds and layout are in meshnet.vtep.native.engine, too. */
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

struct message {
    struct sockaddr_storage from;
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(int))];
    struct iovec room;
};

struct engine {
    int tun, socket, poll;
    uint32_t vni;
    uint8_t mac[MAC_BYTES];
    int underlay_version;
    size_t mtu;
    bool segmenting;
    struct peers peers;
    uint64_t not_member, receive_errors;

    /* Small packets of one size to one peer, which leave by one send.  They are read into slots, as
     * in meshnet.vtep.sender; the last slot has room for a super-packet. */
    uint8_t *slots;
    size_t step;
    int slot;
    int waiting, waiting_peer;
    size_t waiting_bytes;
    struct iovec run[MAX_SEGMENTS];
    struct cutter cutter;

    /* What was received, and how far it was looked at. */
    int received, next;
    size_t next_at;
    struct mmsghdr headers[MAX_RECEIVED];
    struct message messages[MAX_RECEIVED];
    uint8_t *buffers;
    struct joiner joiner;

    uint32_t notes_bytes;
    uint8_t notes[NOTES_BYTES];
};

void note(struct engine *engine, enum note_kind kind, int peer, uint32_t value, const void *data,
          size_t bytes);
bool has_room(const struct engine *engine);

/* Carry what waits in the TUN, up to a round's worth; returns an errno if it is gone. */
int pump_out(struct engine *engine);

/* Carry what waits in the socket, up to a round's worth. */
void pump_in(struct engine *engine);

/* Go on with what was received; returns false if Python has to take notes before the rest. */
bool carry_received(struct engine *engine);

/* Where joined packets go. */
void write_to_tun(void *context, int peer, const struct iovec *parts, int count);

#endif
