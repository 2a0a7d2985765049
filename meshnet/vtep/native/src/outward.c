/* Outward: from the TUN to the underlay (meshnet.vtep.python.sender). */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/udp.h>
#include <unistd.h>

#include "outward.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

/* RFC 7348 §5, or with remote checksum offload: `protocol`'s checksum at `start` of the IP packet is
 * unfinished (meshnet.wire.vxlan). */
static void encapsulate(const struct engine *engine, const struct peer *peer, int version,
                        int protocol, uint8_t front[ENCAPSULATION_BYTES])
{
    uint32_t flags = FLAG_VNI, last = 0;

    if (protocol) {
        const uint32_t start = version == 4 ? V4_BYTES : V6_BYTES;

        flags |= FLAG_REMOTE_CHECKSUM;
        last = (start + ENCAPSULATION_BYTES - VXLAN_BYTES) >> 1;
        last |= protocol == UDP ? REMOTE_CHECKSUM_UDP : 0;
    }
    store32(front, flags);
    store32(front + 4, engine->vni << 8 | last);
    memcpy(front + VXLAN_BYTES, peer->mac, MAC_BYTES);
    memcpy(front + VXLAN_BYTES + MAC_BYTES, engine->mac, MAC_BYTES);
    store16(front + ETHERTYPE_AT, version == 4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6);
}

static ssize_t send_once(int socket, const struct msghdr *message)
{
    for (;;) {
        const ssize_t sent = sendmsg(socket, message, 0);

        if (sent >= 0 || errno != EINTR)
            return sent;
    }
}

/* One send of `count` datagrams, of `each` parts; all but the last have `segment` bytes.  Where the
 * kernel does not segment, one for each. */
static void transmit(struct engine *engine, int peer_at, struct iovec *parts, int count, int each,
                     unsigned segment)
{
    struct peer *peer = &engine->peers.list[peer_at];
    struct counters *counters = &engine->peers.counters[peer_at];
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)(count * each)};
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(uint16_t))] = {0};
    int socket = peer->socket;
    ssize_t sent = -1;

    if (count == 1 || engine->segmenting) {
        if (count > 1) {
            const uint16_t size = (uint16_t)segment;
            struct cmsghdr *option = (struct cmsghdr *)control;

            option->cmsg_level = IPPROTO_UDP;
            option->cmsg_type = UDP_SEGMENT;
            option->cmsg_len = CMSG_LEN(sizeof size);
            memcpy(CMSG_DATA(option), &size, sizeof size);
            message.msg_control = control;
            message.msg_controllen = sizeof control;
        }
        if (socket < 0) {
            socket = engine->socket;
            message.msg_name = &peer->address;
            message.msg_namelen = peer->address_bytes;
            if (!peer->has_asked)
                note(&engine->notes, WANTS_SOCKET, peer_at, 0, NULL, 0);
            peer->has_asked = true;
        }
        sent = send_once(socket, &message);
        if (sent < 0 && errno == ECONNREFUSED)
            /* ICMP's answer to an earlier one: its VTEP was not there then. */
            sent = send_once(socket, &message);
    }
    if (sent >= 0) {
        counters->tx_calls++;
        counters->tx_packets += (uint64_t)count;
        counters->tx_bytes += (uint64_t)sent;
    } else if (count > 1 && (!engine->segmenting || errno == EIO || errno == EINVAL ||
                             errno == EMSGSIZE)) {
        for (int i = 0; i < count; i++)
            transmit(engine, peer_at, parts + i * each, 1, each, 0);
    } else {
        const int32_t error = errno;

        note(&engine->notes, NOT_SENT, peer_at, (uint32_t)count, &error, sizeof error);
    }
}

static int most_segments(size_t segment)
{
    const size_t fit = MAX_SEND_BYTES / segment;

    return fit < MAX_SEGMENTS ? (int)fit : MAX_SEGMENTS;
}

static void send_waiting(struct engine *engine)
{
    if (engine->waiting)
        transmit(engine, engine->waiting_peer, engine->run, engine->waiting, 1,
                 (unsigned)engine->waiting_bytes);
    engine->waiting = 0;
}

/* Have the datagram in the present slot wait for others that leave with it. */
static void wait_with(struct engine *engine, int peer, uint8_t *datagram, size_t bytes)
{
    if (engine->waiting &&
        (peer != engine->waiting_peer || bytes > engine->waiting_bytes ||
         engine->run[engine->waiting - 1].iov_len != engine->waiting_bytes || /* the last one */
         engine->waiting >= most_segments(engine->waiting_bytes)))
        send_waiting(engine);
    if (!engine->waiting) {
        engine->waiting_peer = peer;
        engine->waiting_bytes = bytes;
    }
    engine->run[engine->waiting++] = (struct iovec){datagram, bytes};
    if (++engine->slot == MAX_SEGMENTS) {
        send_waiting(engine);
        engine->slot = 0;
    }
}

static void send_super_packet(struct engine *engine, int peer, uint8_t *packet, size_t length,
                              const struct virtio *header, int version)
{
    struct cutter *cutter = &engine->cutter;
    const int protocol = (header->type & ~GSO_ECN) == GSO_UDP_L4 ? UDP : TCP;
    const bool remote = engine->peers.list[peer].offload &&
                        header->start == (version == 4 ? V4_BYTES : V6_BYTES);
    uint8_t front[ENCAPSULATION_BYTES];

    encapsulate(engine, &engine->peers.list[peer], version, remote ? protocol : 0, front);
    if (!mn_cut(cutter, packet, length, header, front, remote)) {
        note(&engine->notes, FROM_TUN, -1, 0, packet - VIRTIO_BYTES, VIRTIO_BYTES + length);
        return;
    }
    const int most = most_segments(cutter->segment);

    for (int at = 0; at < cutter->count; at += most) {
        const int left = cutter->count - at;

        transmit(engine, peer, cutter->parts + 2 * at, left < most ? left : most, 2,
                 cutter->segment);
    }
}

/* Carry what was read into the present slot: `got` bytes, virtio header and packet. */
static void carry_out(struct engine *engine, size_t got)
{
    uint8_t *front = engine->slots + (size_t)engine->slot * engine->step;
    uint8_t *packet = front + ENCAPSULATION_BYTES;
    const size_t length = got > VIRTIO_BYTES ? got - VIRTIO_BYTES : 0;
    const int version = length ? version_of(packet) : 0;
    struct virtio header;
    int peer = -1;

    memcpy(&header, front + FRONT_BYTES, sizeof header);
    if (version == 4 && length >= V4_BYTES)
        peer = peers_by_route(&engine->peers, 4, packet + V4_DESTINATION);
    else if (version == 6 && length >= V6_BYTES)
        peer = peers_by_route(&engine->peers, 6, packet + V6_DESTINATION);
    if (peer < 0 || (header.type == GSO_NONE && length > engine->mtu)) {
        note(&engine->notes, FROM_TUN, -1, 0, front + FRONT_BYTES, got);
        return;
    }
    if (header.type != GSO_NONE) {
        send_waiting(engine);
        send_super_packet(engine, peer, packet, length, &header, version);
        engine->slot = 0;
        return;
    }
    int protocol = 0;

    if (header.flags & NEEDS_CSUM) {
        const size_t start = header.start, field = start + header.offset;
        const bool plain = start == (version == 4 ? V4_BYTES : V6_BYTES) &&
                           (header.offset == TCP_CHECK || header.offset == UDP_CHECK);

        if (engine->peers.list[peer].offload && plain)
            protocol = header.offset == TCP_CHECK ? TCP : UDP;
        else if (field + 2 <= length)
            store_sum(packet + field, finished(sum_of(packet + start, length - start),
                                               header.offset == UDP_CHECK));
    }
    encapsulate(engine, &engine->peers.list[peer], version, protocol, front);
    wait_with(engine, peer, front, ENCAPSULATION_BYTES + length);
}

int pump_out(struct engine *engine)
{
    int error = 0;

    for (int reads = 0; reads < MAX_READS && has_room(&engine->notes); reads++) {
        uint8_t *front = engine->slots + (size_t)engine->slot * engine->step;
        const ssize_t got =
            read(engine->tun, front + FRONT_BYTES, VIRTIO_BYTES + MAX_PACKET_BYTES);

        if (got < 0) {
            error = errno == EAGAIN || errno == EINTR ? 0 : errno;
            break;
        }
        carry_out(engine, (size_t)got);
    }
    send_waiting(engine);
    engine->slot = 0;
    return error;
}
