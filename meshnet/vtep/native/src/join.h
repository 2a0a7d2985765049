/* Joining: neighbouring segments of one flow become one super-packet for the TUN.
 *
 * The rules are those of meshnet.wire.coalesce: each segment goes on where the last ended, and they
 * agree in everything but IPv4 identification (which counts up, or stays under DF), length, sequence
 * number and checksum.  No segment is joined whose checksum was not looked at, because nobody will
 * after this: the super-packet's own is said to be unfinished.
 *
 * There is one way for trains and for segments that come one by one, of one flow or of several
 * mixed.  Nothing is copied: a run is a list of places in the buffers it was received in, and is
 * written before they are received into again (mn_join_flush).
 */
#ifndef MESHNET_JOIN_H
#define MESHNET_JOIN_H

#include <sys/uio.h>

#include "wire.h"

enum { MAX_RUNS = 8, MAX_RUN_SEGMENTS = 64 };

/* An IP packet, located (meshnet.wire.inner). */
struct inner {
    int version;
    int protocol;     /* 0 for a fragment, which is not looked into */
    size_t length;    /* bytes by its own header; what follows in the frame is padding */
    size_t transport; /* where the transport header starts */
};

/* Segments of a flow that may grow by another. */
struct run {
    int peer;
    uint8_t *first; /* the first one's packet, with VIRTIO_BYTES of room before it */
    struct inner inner;
    size_t head;   /* bytes of IP and transport header */
    size_t size;   /* payload of each but the last */
    size_t length; /* bytes of all as one packet */
    uint32_t next_seq;
    uint16_t ident, last_ident;
    uint8_t ending; /* PSH and FIN, of the last one */
    bool unfinished;
    bool valid; /* the first one's checksum was looked at, and is right or unfinished */
    int count;
    struct iovec parts[MAX_RUN_SEGMENTS];
};

struct joiner {
    size_t mtu;
    bool uso; /* UDP super-packets are taken, too */
    /* Writes one packet, a virtio header first, that came from `peer`. */
    void (*write)(void *context, int peer, const struct iovec *parts, int count);
    void *context;
    int open;
    struct run runs[MAX_RUNS];
};

/* Locate; false: it is not an IP packet, or is cut short.  Reads nothing after `available` bytes. */
bool mn_locate(struct inner *inner, const uint8_t *packet, size_t available);

/* Take a packet, which has VIRTIO_BYTES of room before it; `segment` is the size of the datagrams in a
 * UDP super-packet, else 0.  Returns false, with nothing of it written, if it is larger than the MTU
 * and cannot be carried on. */
bool mn_join(struct joiner *joiner, int peer, uint8_t *packet, const struct inner *inner,
             bool unfinished, size_t segment);

/* Write whatever is held. */
void mn_join_flush(struct joiner *joiner);

#endif
