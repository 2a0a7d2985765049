/* The data path of `python -m meshnet.vtep --engine native`: what Python's sender and receiver do
 * with packets, until there is something for Python to do.
 *
 *     routes ──► TUN ── read ── prefix → peer ── cut, or as it is ──► UDP_SEGMENT ──► underlay
 *     routes ◄── TUN ◄─ writev ── join ── member? ours? its source? ◄── UDP_GRO ◄──── underlay
 *
 * mn_run returns when a descriptor of Python's is ready, when a time is over, or with *notes*: what
 * happened that Python counts, and packets that this does not take (probes, what is malformed, what
 * nobody is there for, …), copied.  They are rare; the Python engine decides about them, so that
 * there is one place that does.  Nothing else is shared: Python runs, or this does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "cut.h"
#include "join.h"
#include "peers.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum {
    MAX_READS = 64,    /* of the TUN in a round, before the socket has its turn */
    MAX_RECEIVED = 8,  /* messages in a round, of up to 64 KiB */
    RECEIVE_BYTES = 65536,
    FRONT_BYTES = ENCAPSULATION_BYTES - VIRTIO_BYTES,
    VXLAN_BYTES = 8,
    ETHERTYPE_AT = VXLAN_BYTES + 2 * MAC_BYTES,
    ETHERTYPE_IPV4 = 0x0800,
    ETHERTYPE_IPV6 = 0x86dd,
    REMOTE_CHECKSUM_UDP = 0x80,
};
static const uint32_t FLAG_VNI = 0x08000000, FLAG_REMOTE_CHECKSUM = 0x00200000;

/* What Python is to know.  Kinds and layout are in meshnet.vtep.native.engine, too. */
enum note_kind {
    FROM_TUN = 1,  /* a packet, virtio header first, that this does not take */
    FROM_PEER,     /* a datagram of `peer` that this does not take */
    WANTS_SOCKET,  /* `peer` has none of its own */
    NOT_SENT,      /* `value` packets to `peer`, for the errno that follows */
    NOT_WRITTEN,   /* the TUN refused a packet of `peer` */
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

static void note(struct engine *engine, enum note_kind kind, int peer, uint32_t value,
                 const void *data, size_t bytes)
{
    const struct note head = {kind, peer, value, (uint32_t)bytes};

    if (bytes > NOTES_BYTES - sizeof head ||
        engine->notes_bytes > NOTES_BYTES - sizeof head - bytes)
        return; /* has_room was asked before; this is for what it did not foresee */
    memcpy(engine->notes + engine->notes_bytes, &head, sizeof head);
    if (bytes)
        memcpy(engine->notes + engine->notes_bytes + sizeof head, data, bytes);
    engine->notes_bytes += (uint32_t)(sizeof head + bytes);
}

static bool has_room(const struct engine *engine)
{
    return engine->notes_bytes + NOTE_ROOM_BYTES <= NOTES_BYTES;
}

/* ---- to the underlay ---- */

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
                note(engine, WANTS_SOCKET, peer_at, 0, NULL, 0);
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

        note(engine, NOT_SENT, peer_at, (uint32_t)count, &error, sizeof error);
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
        note(engine, FROM_TUN, -1, 0, packet - VIRTIO_BYTES, VIRTIO_BYTES + length);
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
        note(engine, FROM_TUN, -1, 0, front + FRONT_BYTES, got);
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

/* Carry what waits in the TUN, up to a round's worth; returns an errno if it is gone. */
static int pump_out(struct engine *engine)
{
    int error = 0;

    for (int reads = 0; reads < MAX_READS && has_room(engine); reads++) {
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

/* ---- from the underlay ---- */

static void write_to_tun(void *context, int peer, const struct iovec *parts, int count)
{
    struct engine *engine = context;

    while (writev(engine->tun, parts, count) < 0) {
        if (errno != EINTR) {
            note(engine, NOT_WRITTEN, peer, 1, NULL, 0);
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

static void carry_in(struct engine *engine, int peer, uint8_t *datagram, size_t bytes)
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
    if (!mn_join(&engine->joiner, peer, packet, &inner, unfinished))
        goto hand_back;
    engine->peers.counters[peer].rx_packets++;
    engine->peers.counters[peer].rx_bytes += bytes;
    return;
hand_back:
    note(engine, FROM_PEER, peer, 0, datagram, bytes);
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

/* Carry what was received; returns false if it has to be gone on with after Python took notes. */
static bool carry_received(struct engine *engine)
{
    for (; engine->next < engine->received; engine->next++, engine->next_at = 0) {
        struct mmsghdr *header = &engine->headers[engine->next];
        struct message *message = &engine->messages[engine->next];
        const size_t total = header->msg_len;
        size_t size = train_size(&header->msg_hdr);
        const int peer = peers_by_underlay(&engine->peers, (struct sockaddr *)&message->from);

        if (size == 0)
            size = total;
        if (peer < 0) {
            engine->not_member += total ? (total + size - 1) / size : 1;
            continue;
        }
        if (engine->next_at == 0)
            engine->peers.counters[peer].rx_calls++;
        do { /* once for an empty one, too */
            const size_t left = total - engine->next_at;

            if (!has_room(engine)) {
                mn_join_flush(&engine->joiner);
                return false;
            }
            carry_in(engine, peer, (uint8_t *)message->room.iov_base + engine->next_at,
                     left < size ? left : size);
            engine->next_at += size;
        } while (engine->next_at < total);
    }
    mn_join_flush(&engine->joiner);
    engine->received = engine->next = 0;
    return true;
}

static void pump_in(struct engine *engine)
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

/* ---- the loop, and what Python calls ---- */

static int64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Carry packets until a descriptor of Python's is ready, there are notes, or `timeout_ms` is over
 * (-1: never).  Returns 0, or an errno: the TUN is gone. */
EXPORT int mn_run(struct engine *engine, int timeout_ms)
{
    const int64_t end = timeout_ms < 0 ? INT64_MAX : now_ms() + timeout_ms;
    struct epoll_event ready[3];

    engine->notes_bytes = 0;
    if (!carry_received(engine))
        return 0;
    for (;;) {
        int left = -1, error = 0;
        bool is_called = false;

        if (timeout_ms >= 0) {
            const int64_t rest = end - now_ms();

            if (rest < 0)
                return 0;
            left = (int)rest;
        }
        const int count = epoll_wait(engine->poll, ready, 3, left);

        for (int i = 0; i < count; i++) {
            if (ready[i].data.fd == engine->tun)
                error = pump_out(engine);
            else if (ready[i].data.fd == engine->socket)
                pump_in(engine);
            else
                is_called = true;
        }
        if (error)
            return error;
        if (is_called || engine->notes_bytes || count == 0)
            return 0;
    }
}

static bool watch(struct engine *engine, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};

    return epoll_ctl(engine->poll, EPOLL_CTL_ADD, fd, &event) == 0;
}

EXPORT void mn_free(struct engine *engine)
{
    if (engine->poll >= 0)
        close(engine->poll);
    peers_free(&engine->peers);
    free(engine->slots);
    free(engine->buffers);
    free(engine);
}

/* Make an engine; the descriptors stay the caller's, and `called` is its own for whatever else it
 * waits for (an epoll, most likely).  Returns NULL, and errno says why. */
EXPORT struct engine *mn_make(int tun, int socket, int called, uint32_t vni,
                              const uint8_t mac[MAC_BYTES], int underlay_version, uint32_t mtu,
                              int segmenting, int uso)
{
    struct engine *engine = calloc(1, sizeof *engine);

    if (!engine)
        return NULL;
    engine->tun = tun;
    engine->socket = socket;
    engine->vni = vni;
    memcpy(engine->mac, mac, MAC_BYTES);
    engine->underlay_version = underlay_version;
    engine->mtu = mtu;
    engine->segmenting = segmenting;
    engine->joiner.mtu = mtu;
    engine->joiner.uso = uso;
    engine->joiner.write = write_to_tun;
    engine->joiner.context = engine;
    engine->step = (ENCAPSULATION_BYTES + (size_t)mtu + 63) & ~(size_t)63;
    engine->slots =
        calloc(1, MAX_SEGMENTS * engine->step + ENCAPSULATION_BYTES + MAX_PACKET_BYTES);
    engine->buffers = malloc((size_t)MAX_RECEIVED * RECEIVE_BYTES);
    engine->poll = epoll_create1(EPOLL_CLOEXEC);
    if (!engine->slots || !engine->buffers || engine->poll < 0 || !watch(engine, tun) ||
        !watch(engine, socket) || !watch(engine, called) ||
        peers_make(&engine->peers, underlay_version, NULL, 0, NULL, 0) != 0) {
        mn_free(engine);
        return NULL;
    }
    for (int i = 0; i < MAX_RECEIVED; i++) {
        struct message *message = &engine->messages[i];
        struct msghdr *header = &engine->headers[i].msg_hdr;

        message->room = (struct iovec){engine->buffers + (size_t)i * RECEIVE_BYTES, RECEIVE_BYTES};
        header->msg_name = &message->from;
        header->msg_iov = &message->room;
        header->msg_iovlen = 1;
        header->msg_control = message->control;
    }
    return engine;
}

/* Make these the members; returns an errno, and then nothing was changed. */
EXPORT int mn_set_peers(struct engine *engine, const struct peer_spec *specs, uint32_t count,
                        const struct route_spec *routes, uint32_t route_count)
{
    struct peers made;
    const int error =
        peers_make(&made, engine->underlay_version, specs, count, routes, route_count);

    if (!error) {
        peers_free(&engine->peers);
        engine->peers = made;
    }
    return error;
}

/* Have a peer's packets leave by a socket that is connected to it. */
EXPORT void mn_set_socket(struct engine *engine, uint32_t peer, int socket)
{
    if (peer < engine->peers.count)
        engine->peers.list[peer].socket = socket;
}

/* The counters of all peers, in the order they were given. */
EXPORT struct counters *mn_counters(struct engine *engine)
{
    return engine->peers.counters;
}

/* What was counted of nobody since the last call. */
EXPORT void mn_take_drops(struct engine *engine, uint64_t *not_member, uint64_t *receive_errors)
{
    *not_member = engine->not_member;
    *receive_errors = engine->receive_errors;
    engine->not_member = engine->receive_errors = 0;
}

/* The notes of the last mn_run. */
EXPORT const uint8_t *mn_notes(const struct engine *engine, uint32_t *bytes)
{
    *bytes = engine->notes_bytes;
    return engine->notes;
}

/* Of the sources that this was made from: Python looks whether they are its own. */
EXPORT const char *mn_digest(void)
{
    return MESHNET_DIGEST;
}
