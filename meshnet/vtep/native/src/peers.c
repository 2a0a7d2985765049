#include "peers.h"

#include <errno.h>
#include <stdlib.h>

enum { UNDERLAY = 1 << 16 };

static uint32_t kind_of(int version, int length)
{
    return (uint32_t)version << 8 | (uint32_t)length;
}

static struct key key_of(uint32_t kind, int version, const uint8_t *address)
{
    if (version == 4)
        return (struct key){0, load32(address), kind};
    return (struct key){load64(address), load64(address + 8), kind};
}

/* A prefix of an address; shifting by all of a word's bits is not defined. */
static uint64_t masked(uint64_t word, int bits)
{
    return bits <= 0 ? 0 : bits >= 64 ? word : word & ~(uint64_t)0 << (64 - bits);
}

static struct key prefix_of(struct key key, int version, int length)
{
    key.kind = kind_of(version, length);
    if (version == 4) {
        key.low = masked(key.low << 32, length) >> 32;
    } else {
        key.high = masked(key.high, length);
        key.low = masked(key.low, length - 64);
    }
    return key;
}

static struct entry *slot_of(const struct peers *peers, struct key key)
{
    uint64_t hash = (key.high ^ key.kind) * 0x9e3779b97f4a7c15u ^ key.low;

    hash *= 0xff51afd7ed558ccdu;
    hash ^= hash >> 32;
    for (uint32_t at = (uint32_t)hash & peers->mask;; at = (at + 1) & peers->mask) {
        struct entry *entry = &peers->entries[at];

        if (entry->peer < 0 || (entry->key.low == key.low && entry->key.high == key.high &&
                                entry->key.kind == key.kind))
            return entry;
    }
}

static void put(struct peers *peers, struct key key, uint32_t peer)
{
    *slot_of(peers, key) = (struct entry){key, (int32_t)peer};
}

static void set_address(struct peer *peer, int version, const struct peer_spec *spec)
{
    if (version == 4) {
        peer->address.v4.sin_family = AF_INET;
        peer->address.v4.sin_port = htons(spec->port);
        memcpy(&peer->address.v4.sin_addr, spec->address, 4);
        peer->address_bytes = sizeof peer->address.v4;
    } else {
        peer->address.v6.sin6_family = AF_INET6;
        peer->address.v6.sin6_port = htons(spec->port);
        memcpy(&peer->address.v6.sin6_addr, spec->address, 16);
        peer->address_bytes = sizeof peer->address.v6;
    }
}

static void note_length(struct peers *peers, int family, int length)
{
    int *lengths = peers->length[family], at = peers->lengths[family];

    for (int i = 0; i < at; i++)
        if (lengths[i] == length)
            return;
    for (; at > 0 && lengths[at - 1] < length; at--)
        lengths[at] = lengths[at - 1];
    lengths[at] = length;
    peers->lengths[family]++;
}

int peers_make(struct peers *peers, int underlay_version, const struct peer_spec *specs,
               uint32_t count, const struct route_spec *routes, uint32_t route_count)
{
    size_t room = 16;

    memset(peers, 0, sizeof *peers);
    while (room < 2 * ((size_t)count + route_count))
        room *= 2;
    peers->mask = (uint32_t)(room - 1);
    peers->count = count;
    peers->list = calloc(count ? count : 1, sizeof *peers->list);
    peers->counters = calloc(count ? count : 1, sizeof *peers->counters);
    peers->entries = calloc(room, sizeof *peers->entries);
    if (!peers->list || !peers->counters || !peers->entries) {
        peers_free(peers);
        return ENOMEM;
    }
    for (size_t i = 0; i < room; i++)
        peers->entries[i].peer = -1;
    for (uint32_t i = 0; i < count; i++) {
        struct peer *peer = &peers->list[i];

        set_address(peer, underlay_version, &specs[i]);
        peer->socket = specs[i].socket;
        peer->offload = specs[i].offload != 0;
        memcpy(peer->mac, specs[i].mac, MAC_BYTES);
        put(peers, key_of(UNDERLAY, underlay_version, specs[i].address), i);
    }
    for (uint32_t i = 0; i < route_count; i++) {
        const int version = routes[i].version == 4 ? 4 : 6;
        const int most = version == 4 ? 32 : 128, length = (int)routes[i].length;

        if (length < 0 || length > most || routes[i].peer >= count) {
            peers_free(peers);
            return EINVAL;
        }
        note_length(peers, version == 6, length);
        put(peers, prefix_of(key_of(0, version, routes[i].network), version, length),
            routes[i].peer);
    }
    return 0;
}

void peers_free(struct peers *peers)
{
    free(peers->list);
    free(peers->counters);
    free(peers->entries);
    memset(peers, 0, sizeof *peers);
}

int peers_by_route(const struct peers *peers, int version, const uint8_t *address)
{
    const struct key whole = key_of(0, version, address);
    const int family = version == 6;

    for (int i = 0; i < peers->lengths[family]; i++) {
        const struct key key = prefix_of(whole, version, peers->length[family][i]);
        const int peer = slot_of(peers, key)->peer;

        if (peer >= 0)
            return peer;
    }
    return -1;
}

int peers_by_underlay(const struct peers *peers, const struct sockaddr *address)
{
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)address;

        return slot_of(peers, key_of(UNDERLAY, 4, (const uint8_t *)&v4->sin_addr))->peer;
    }
    if (address->sa_family == AF_INET6) {
        const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)address;

        return slot_of(peers, key_of(UNDERLAY, 6, (const uint8_t *)&v6->sin6_addr))->peer;
    }
    return -1;
}
