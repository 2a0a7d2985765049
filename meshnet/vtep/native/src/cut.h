/* Cutting: from a super-packet of the TUN to datagrams for the underlay (meshnet.wire.segment). */
#ifndef MESHNET_CUT_H
#define MESHNET_CUT_H

#include <sys/uio.h>

#include "wire.h"

enum {
    MAX_CUT = 1024,      /* datagrams of a super-packet */
    MAX_HEAD_BYTES = 192, /* encapsulation, IP and transport header of one */
};

/* Headers side by side, and where the parts of each datagram are: two a datagram, its headers in
 * `block` and its payload where it was read. */
struct cutter {
    int count;
    unsigned segment; /* bytes of every datagram but the last, which may be shorter */
    struct iovec parts[2 * MAX_CUT];
    uint8_t block[MAX_CUT * MAX_HEAD_BYTES];
};

/* Cut the packet of `length` bytes that `header` describes; `prefix` is its encapsulation.  With
 * `remote` checksums stay unfinished, and `prefix` says so.  Returns false, with nothing to send,
 * if it is not what its header says, or has more segments than there is room for. */
bool mn_cut(struct cutter *cutter, uint8_t *packet, size_t length, const struct virtio *header,
            const uint8_t prefix[ENCAPSULATION_BYTES], bool remote);

#endif
