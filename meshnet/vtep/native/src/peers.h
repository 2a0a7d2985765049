/* The members, by underlay address and by the prefixes they own (meshnet.vtep.peers). */
#ifndef MESHNET_PEERS_H
#define MESHNET_PEERS_H

#include <netinet/in.h>
#include <sys/socket.h>

#include "wire.h"

/* Python writes these (meshnet.vtep.native.engine has the same as struct formats). */
struct peer_spec {
    uint8_t address[16]; /* IPv4's in the first four */
    uint8_t mac[MAC_BYTES];
    uint16_t port;
    int32_t socket; /* connected to it; -1: none yet */
    uint32_t offload;
};
_Static_assert(sizeof(struct peer_spec) == 32, "struct peer_spec has padding");

struct route_spec {
    uint8_t network[16];
    uint32_t version, length;
    uint32_t peer; /* its place among the specs */
};
_Static_assert(sizeof(struct route_spec) == 28, "struct route_spec has padding");

/* What is counted of a peer; Python reads and clears it. */
struct counters {
    uint64_t rx_packets, rx_bytes, rx_calls, tx_packets, tx_bytes, tx_calls;
};

struct peer {
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } address;
    socklen_t address_bytes;
    int socket;       /* connected; -1: the bound one is used */
    bool has_asked;   /* for a socket of its own */
    bool offload;     /* takes unfinished checksums */
    uint8_t mac[MAC_BYTES];
};

struct key {
    uint64_t high, low; /* an address; IPv4's in `low` */
    uint32_t kind;      /* IP version and prefix length, or that it is an underlay address */
};

struct entry {
    struct key key;
    int32_t peer; /* -1: free */
};

/* One table of open addressing for everything, at most half full. */
struct peers {
    uint32_t count;
    struct peer *list;
    struct counters *counters;
    uint32_t mask;
    struct entry *entries;
    /* Prefix lengths that occur, longest first: a look-up is one access for each, which is one with
     * 10 peers and with 10,000. */
    int lengths[2], length[2][129];
};

/* Make the table; returns an errno, and then nothing is to be freed. */
int peers_make(struct peers *peers, int underlay_version, const struct peer_spec *specs,
               uint32_t count, const struct route_spec *routes, uint32_t route_count);
void peers_free(struct peers *peers);

/* The place of a peer in the list, or -1. */
int peers_by_route(const struct peers *peers, int version, const uint8_t *address);
int peers_by_underlay(const struct peers *peers, const struct sockaddr *address);

#endif
