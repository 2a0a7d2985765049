#include "join.h"

enum { FRAGMENT_MASK = 0x3fff, DF = 0x40 };

bool mn_locate(struct inner *inner, const uint8_t *packet, size_t available)
{
    if (available < V4_BYTES)
        return false;
    inner->version = version_of(packet);
    if (inner->version == 4) {
        inner->length = load16(packet + V4_LENGTH);
        inner->transport = (size_t)(packet[0] & 0x0f) * 4;
        inner->protocol =
            load16(packet + V4_FRAGMENT) & FRAGMENT_MASK ? 0 : packet[V4_PROTOCOL];
    } else if (inner->version == 6 && available >= V6_BYTES) {
        inner->length = (size_t)load16(packet + V6_LENGTH) + V6_BYTES;
        inner->transport = V6_BYTES;
        inner->protocol = packet[V6_PROTOCOL];
    } else {
        return false;
    }
    return V4_BYTES <= inner->transport && inner->transport <= inner->length &&
           inner->length <= available;
}

static size_t check_offset(const struct inner *inner)
{
    return inner->protocol == TCP ? TCP_CHECK : UDP_CHECK;
}

static void write_virtio(uint8_t *packet, const struct virtio *header)
{
    memcpy(packet - VIRTIO_BYTES, header, VIRTIO_BYTES);
}

/* IP and transport header's bytes; 0 if there is no whole header of TCP or UDP. */
static size_t head_of(const uint8_t *packet, const struct inner *inner)
{
    const size_t room = inner->length - inner->transport;

    if (inner->protocol == UDP)
        return room >= UDP_BYTES ? inner->transport + UDP_BYTES : 0;
    if (inner->protocol != TCP || room < TCP_BYTES)
        return 0;
    const size_t bytes = (size_t)(packet[inner->transport + TCP_OFFSET] >> 4) * 4;

    return bytes >= TCP_BYTES && bytes <= room ? inner->transport + bytes : 0;
}

static bool is_partial(const uint8_t *packet, const struct inner *inner)
{
    const uint64_t pseudo =
        pseudo_sum(packet, inner->protocol, inner->length - inner->transport);

    return load_sum(packet + inner->transport + check_offset(inner)) == fold(pseudo);
}

/* Write one packet as it came; its checksum is right, or said to be unfinished, or its receiver's
 * to refuse.  False: it is larger than the MTU, and no super-packet of a kernel peer over a veth. */
static bool write_alone(struct joiner *joiner, int peer, uint8_t *packet,
                        const struct inner *inner, size_t head, bool unfinished, size_t segment)
{
    const bool large = inner->length > joiner->mtu || segment, tcp = inner->protocol == TCP;
    struct virtio header = {0};

    if (large && (!head || head >= joiner->mtu || head >= inner->length))
        return false;
    if (large && !tcp && !(segment && joiner->uso && is_partial(packet, inner)))
        return false;
    if (head && (large || unfinished || is_partial(packet, inner))) {
        header.flags = NEEDS_CSUM;
        header.header = (uint16_t)head;
        header.start = (uint16_t)inner->transport;
        header.offset = (uint16_t)check_offset(inner);
    }
    if (large && !tcp) {
        header.type = GSO_UDP_L4;
        header.size = (uint16_t)segment;
    } else if (large) {
        /* The segment size is lost on the way: ours serves as well. */
        header.type = inner->version == 4 ? GSO_TCPV4 : GSO_TCPV6;
        if (packet[inner->transport + TCP_FLAGS] & CWR)
            header.type |= GSO_ECN;
        header.size = (uint16_t)(joiner->mtu - head);
    }
    write_virtio(packet, &header);
    const struct iovec whole = {packet - VIRTIO_BYTES, VIRTIO_BYTES + inner->length};

    joiner->write(joiner->context, peer, &whole, 1);
    return true;
}

static void write_run(struct joiner *joiner, struct run *run)
{
    const struct inner *inner = &run->inner;
    const bool tcp = inner->protocol == TCP;
    uint8_t *packet = run->first, *transport = packet + inner->transport;

    if (run->count == 1) {
        write_alone(joiner, run->peer, packet, inner, run->head, run->unfinished, 0);
        return;
    }
    set_length(packet, inner->transport, run->length);
    if (tcp)
        transport[TCP_FLAGS] |= run->ending;
    else
        store16(transport + UDP_LENGTH, (uint16_t)(run->length - inner->transport));
    const uint64_t pseudo =
        pseudo_sum(packet, inner->protocol, run->length - inner->transport);

    store_sum(transport + check_offset(inner), fold(pseudo));
    const struct virtio header = {
        .flags = NEEDS_CSUM,
        .type = !tcp ? GSO_UDP_L4 : inner->version == 4 ? GSO_TCPV4 : GSO_TCPV6,
        .header = (uint16_t)run->head,
        .size = (uint16_t)run->size,
        .start = (uint16_t)inner->transport,
        .offset = (uint16_t)check_offset(inner),
    };
    write_virtio(packet, &header);
    joiner->write(joiner->context, run->peer, run->parts, run->count);
}

/* Write one of the runs and take it out. */
static void close_run(struct joiner *joiner, struct run *run)
{
    write_run(joiner, run);
    struct run *last = &joiner->runs[--joiner->open];

    if (run != last)
        *run = *last;
}

static bool same(const uint8_t *one, const uint8_t *other, size_t from, size_t to)
{
    return memcmp(one + from, other + from, to - from) == 0;
}

/* Addresses and ports. */
static bool same_flow(const struct run *run, const uint8_t *packet, const struct inner *inner)
{
    const struct inner *first = &run->inner;

    if (first->version != inner->version || first->protocol != inner->protocol)
        return false;
    return memcmp(run->first + first->transport, packet + inner->transport, 4) == 0 &&
           (inner->version == 4 ? same(run->first, packet, V4_SOURCE, V4_BYTES)
                                : same(run->first, packet, V6_SOURCE, V6_BYTES));
}

/* Whether all that has to be the same in the headers of two packets of one flow is. */
static bool same_headers(const struct run *run, const uint8_t *packet, const struct inner *inner,
                         size_t head)
{
    const uint8_t *first = run->first, *one = first + inner->transport,
                  *other = packet + inner->transport;

    if (run->head != head || run->inner.transport != inner->transport)
        return false;
    if (inner->version == 4) {
        if (!same(first, packet, 0, V4_LENGTH) || !same(first, packet, V4_FRAGMENT, V4_CHECK) ||
            !same(first, packet, V4_BYTES, inner->transport))
            return false;
    } else if (!same(first, packet, 0, V6_LENGTH) || first[V6_HOPS] != packet[V6_HOPS]) {
        return false;
    }
    if (inner->protocol == UDP)
        return true;
    return same(one, other, TCP_ACK, TCP_FLAGS) &&
           ((one[TCP_FLAGS] ^ other[TCP_FLAGS]) & (ACK | ECE)) == 0 &&
           same(one, other, TCP_WINDOW, TCP_CHECK) &&
           same(one, other, TCP_URGENT, head - inner->transport);
}

static bool continues(const struct run *run, const uint8_t *packet, const struct inner *inner,
                      size_t head)
{
    const size_t size = inner->length - head;

    if (!same_headers(run, packet, inner, head) || size > run->size ||
        run->length + size > MAX_PACKET_BYTES || run->count == MAX_RUN_SEGMENTS)
        return false;
    if (inner->protocol == TCP && load32(packet + inner->transport + TCP_SEQ) != run->next_seq)
        return false;
    if (inner->version == 4) {
        const uint16_t ident = load16(packet + V4_IDENT);
        const bool stays = packet[V4_FRAGMENT] & DF && ident == run->ident;

        return ident == (uint16_t)(run->last_ident + 1) || (stays && ident == run->last_ident);
    }
    return true;
}

/* Whether a packet may be in a run, as far as it says by itself. */
static bool joinable(const struct joiner *joiner, const uint8_t *packet,
                     const struct inner *inner, size_t head)
{
    const uint8_t *transport = packet + inner->transport;

    if (!head || head >= inner->length || inner->length > joiner->mtu)
        return false;
    if (inner->protocol == TCP)
        return (transport[TCP_FLAGS] & ACK) &&
               !(transport[TCP_FLAGS] & ~(ACK | ECE | PSH | FIN));
    return joiner->uso && load16(transport + UDP_LENGTH) == inner->length - inner->transport &&
           load_sum(transport + UDP_CHECK) != 0;
}

/* Whether all checksums of a packet are right, or unfinished where that is said. */
static bool is_valid(const uint8_t *packet, const struct inner *inner, bool unfinished)
{
    const size_t length = inner->length - inner->transport;

    if (inner->version == 4 && fold(sum_of(packet, inner->transport)) != 0xffff)
        return false;
    return unfinished || fold(pseudo_sum(packet, inner->protocol, length) +
                              sum_of(packet + inner->transport, length)) == 0xffff;
}

static void grow(struct run *run, uint8_t *packet, const struct inner *inner, size_t head)
{
    const size_t size = inner->length - head;
    const uint8_t *transport = packet + inner->transport;

    run->parts[run->count++] = (struct iovec){packet + head, size};
    run->length += size;
    run->next_seq += (uint32_t)size;
    run->last_ident = load16(packet + V4_IDENT);
    run->ending = inner->protocol == TCP ? transport[TCP_FLAGS] & (PSH | FIN) : 0;
}

static struct run *open_run(struct joiner *joiner, int peer, uint8_t *packet,
                            const struct inner *inner, size_t head, bool unfinished)
{
    if (joiner->open == MAX_RUNS)
        mn_join_flush(joiner);
    struct run *run = &joiner->runs[joiner->open++];

    run->peer = peer;
    run->first = packet;
    run->inner = *inner;
    run->head = head;
    run->size = inner->length - head;
    run->length = head;
    run->next_seq = load32(packet + inner->transport + TCP_SEQ);
    run->ident = load16(packet + V4_IDENT);
    run->unfinished = unfinished;
    run->valid = false;
    run->count = 0;
    grow(run, packet, inner, head);
    run->parts[0] = (struct iovec){packet - VIRTIO_BYTES, VIRTIO_BYTES + inner->length};
    return run;
}

bool mn_join(struct joiner *joiner, int peer, uint8_t *packet, const struct inner *inner,
             bool unfinished, size_t segment)
{
    const size_t head = head_of(packet, inner);
    struct run *run = NULL;

    if (!head) {
        if (!inner->protocol)
            mn_join_flush(joiner); /* a fragment: of which flow is not known */
        return write_alone(joiner, peer, packet, inner, head, unfinished, 0);
    }
    for (int i = joiner->open; i-- > 0 && !run;)
        if (same_flow(&joiner->runs[i], packet, inner))
            run = &joiner->runs[i];
    if (segment || !joinable(joiner, packet, inner, head)) {
        if (run)
            close_run(joiner, run);
        return write_alone(joiner, peer, packet, inner, head, unfinished, segment);
    }
    if (run && continues(run, packet, inner, head)) {
        /* The first one is looked at when there is a second: alone, it is its receiver's. */
        if (!run->valid)
            run->valid = is_valid(run->first, &run->inner, run->unfinished);
        if (run->valid && is_valid(packet, inner, unfinished)) {
            grow(run, packet, inner, head);
            if (run->ending || inner->length - head < run->size)
                close_run(joiner, run);
            return true;
        }
    }
    if (run)
        close_run(joiner, run);
    run = open_run(joiner, peer, packet, inner, head, unfinished);
    if (run->ending)
        close_run(joiner, run);
    return true;
}

void mn_join_flush(struct joiner *joiner)
{
    for (int i = 0; i < joiner->open; i++)
        write_run(joiner, &joiner->runs[i]);
    joiner->open = 0;
}
