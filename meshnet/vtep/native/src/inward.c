/* Inward: from the underlay to the TUN (meshnet.vtep.python.receiver). */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/udp.h>

#include "inward.h"

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

void write_to_tun(void *context, int peer, const struct iovec *parts, int count)
{
    struct engine *engine = context;

    while (writev(engine->tun, parts, count) < 0) {
        if (errno != EINTR) {
            note(&engine->notes, NOT_WRITTEN, peer, 1, NULL, 0);
            return;
        }
    }
}

/* The IP version in an encapsulation for us, and whether the inner checksum is unfinished; 0: it is
 * not for us, or none. */
static int decapsulate(const struct engine *engine, const uint8_t *front, bool *unfinished)
{
    const uint32_t flags = load32(front);
    const uint16_t kind = load16(front + ETHERTYPE_AT);

    if ((flags & ~FLAG_REMOTE_CHECKSUM) != FLAG_VNI || load32(front + 4) >> 8 != engine->vni ||
        memcmp(front + VXLAN_BYTES, engine->mac, MAC_BYTES) != 0)
        return 0;
    *unfinished = flags & FLAG_REMOTE_CHECKSUM;
    return kind == ETHERTYPE_IPV4 ? 4 : kind == ETHERTYPE_IPV6 ? 6 : 0;
}

/* Whether what UDP_GRO hands over with a size is one frame: a UDP super-packet of a kernel peer over a
 * veth, and the size that of its datagrams. */
static bool is_super_packet(const uint8_t *datagram, size_t total)
{
    struct inner inner;

    return total > ENCAPSULATION_BYTES &&
           mn_locate(&inner, datagram + ENCAPSULATION_BYTES, total - ENCAPSULATION_BYTES) &&
           inner.length + ENCAPSULATION_BYTES == total && inner.protocol == UDP;
}

/* Carry one datagram; `segment` as of mn_join. */
static void carry_in(struct engine *engine, int peer, uint8_t *datagram, size_t bytes,
                     size_t segment)
{
    uint8_t *packet = datagram + ENCAPSULATION_BYTES;
    struct inner inner;
    bool unfinished = false;

    if (bytes < ENCAPSULATION_BYTES + V4_BYTES)
        goto hand_back;
    const int version = decapsulate(engine, datagram, &unfinished);

    if (!version || !mn_locate(&inner, packet, bytes - ENCAPSULATION_BYTES) ||
        inner.version != version ||
        peers_by_route(&engine->peers, version,
                       packet + (version == 4 ? V4_SOURCE : V6_SOURCE)) != peer)
        goto hand_back;
    if (!mn_join(&engine->joiner, peer, packet, &inner, unfinished, segment))
        goto hand_back;
    engine->peers.counters[peer].rx_packets++;
    engine->peers.counters[peer].rx_bytes += bytes;
    return;
hand_back:
    note(&engine->notes, FROM_PEER, peer, 0, datagram, bytes);
}

/* The size of the datagrams that UDP_GRO put side by side; 0: there is one. */
static size_t train_size(struct msghdr *header)
{
    for (struct cmsghdr *option = CMSG_FIRSTHDR(header); option;
         option = CMSG_NXTHDR(header, option)) {
        if (option->cmsg_level == IPPROTO_UDP && option->cmsg_type == UDP_GRO &&
            option->cmsg_len >= CMSG_LEN(sizeof(int))) {
            int size;

            memcpy(&size, CMSG_DATA(option), sizeof size);
            return size > 0 ? (size_t)size : 0;
        }
    }
    return 0;
}

bool carry_received(struct engine *engine)
{
    for (; engine->next < engine->received; engine->next++, engine->next_at = 0) {
        struct mmsghdr *header = &engine->headers[engine->next];
        struct message *message = &engine->messages[engine->next];
        uint8_t *data = message->room.iov_base;
        const size_t total = header->msg_len;
        size_t size = train_size(&header->msg_hdr), segment = 0;
        const int peer = peers_by_underlay(&engine->peers, (struct sockaddr *)&message->from);

        if (size == 0)
            size = total;
        if (peer < 0) {
            engine->not_member += total ? (total + size - 1) / size : 1;
            continue;
        }
        if (size < total && engine->next_at == 0 && is_super_packet(data, total)) {
            segment = size;
            size = total;
        }
        if (engine->next_at == 0)
            engine->peers.counters[peer].rx_calls++;
        do { /* once for an empty one, too */
            const size_t left = total - engine->next_at;

            if (!has_room(&engine->notes)) {
                mn_join_flush(&engine->joiner);
                return false;
            }
            carry_in(engine, peer, data + engine->next_at, left < size ? left : size, segment);
            engine->next_at += size;
        } while (engine->next_at < total);
    }
    mn_join_flush(&engine->joiner);
    engine->received = engine->next = 0;
    return true;
}

void pump_in(struct engine *engine)
{
    for (int i = 0; i < MAX_RECEIVED; i++) {
        struct msghdr *header = &engine->headers[i].msg_hdr;

        header->msg_namelen = sizeof engine->messages[i].from;
        header->msg_controllen = sizeof engine->messages[i].control;
        header->msg_flags = 0;
    }
    const int got = recvmmsg(engine->socket, engine->headers, MAX_RECEIVED, MSG_DONTWAIT, NULL);

    if (got < 0) {
        /* An ICMP error for something sent before; it is the socket's no longer. */
        engine->receive_errors += errno != EAGAIN && errno != EINTR;
        return;
    }
    engine->received = got;
    engine->next = 0;
    engine->next_at = 0;
    carry_received(engine);
}
