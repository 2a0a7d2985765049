/* What the two directions work on.  engine.c makes it and calls them; neither calls engine.c. */
#ifndef MESHNET_ENGINE_H
#define MESHNET_ENGINE_H

#include <sys/socket.h>

#include "cut.h"
#include "join.h"
#include "notes.h"
#include "peers.h"

enum {
    MAX_READS = 64,   /* of the TUN in a round, before the socket has its turn */
    MAX_RECEIVED = 8, /* messages in a round, of up to 64 KiB */
    RECEIVE_BYTES = 65536,
    FRONT_BYTES = ENCAPSULATION_BYTES - VIRTIO_BYTES,
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
     * in meshnet.vtep.python.sender; the last slot has room for a super-packet. */
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

    struct notes notes;
};

#endif
