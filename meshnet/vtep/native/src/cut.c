#include "cut.h"

/* A super-packet: where it is cut, and what is the same in all its datagrams. */
struct whole {
    bool tcp, v4, remote;
    size_t transport, head; /* bytes before the transport header, and before the payload */
    size_t payload, size;   /* of all, and of each but the last */
    size_t count;
    uint8_t flags;
    uint32_t sequence;
    uint16_t ident;
    uint64_t pseudo; /* the pseudo-header's sum, without the length */
    uint64_t ip_sum; /* the IPv4 header's sum, without length and identification */
};

/* Returns false if it is not what its header says, or has more segments than there is room for. */
static bool locate(struct whole *whole, const uint8_t *packet, size_t length,
                   const struct virtio *header)
{
    const bool tcp = (header->type & ~GSO_ECN) != GSO_UDP_L4, v4 = version_of(packet) == 4;
    const size_t transport = header->start, size = header->size;
    const size_t ip_bytes = v4 ? (size_t)(packet[0] & 0x0f) * 4 : V6_BYTES;

    if (size == 0 || ip_bytes < V4_BYTES || transport < ip_bytes ||
        transport + (tcp ? TCP_BYTES : UDP_BYTES) > length)
        return false;
    const size_t head = transport + (tcp ? (size_t)(packet[transport + TCP_OFFSET] >> 4) * 4
                                         : (size_t)UDP_BYTES);
    if (head < transport + (tcp ? TCP_BYTES : UDP_BYTES) || head >= length ||
        ENCAPSULATION_BYTES + head > MAX_HEAD_BYTES)
        return false;
    whole->tcp = tcp;
    whole->v4 = v4;
    whole->transport = transport;
    whole->head = head;
    whole->payload = length - head;
    whole->size = size;
    whole->count = (whole->payload + size - 1) / size;
    return whole->count <= MAX_CUT;
}

/* Whatever is the same in all segments is done once, in the packet's own header: what differs is
 * taken out of it. */
static void clear_head(struct whole *whole, uint8_t *packet)
{
    uint8_t *transport = packet + whole->transport;
    uint8_t *field = transport + (whole->tcp ? TCP_CHECK : UDP_CHECK);

    /* It holds the pseudo-header's sum for the whole; only the length is another one. */
    whole->pseudo = (uint64_t)load_sum(field) + (uint16_t)~htons((uint16_t)whole->payload);
    store_sum(field, 0);
    if (whole->tcp) {
        whole->flags = transport[TCP_FLAGS];
        whole->sequence = load32(transport + TCP_SEQ);
        transport[TCP_FLAGS] = whole->flags & ~(FIN | PSH | CWR);
        store32(transport + TCP_SEQ, 0);
    } else {
        store16(transport + UDP_LENGTH, 0);
    }
    if (whole->v4) {
        whole->ident = load16(packet + V4_IDENT);
        store16(packet + V4_LENGTH, 0);
        store16(packet + V4_IDENT, 0);
        store16(packet + V4_CHECK, 0);
    }
    whole->ip_sum = sum_of(packet, whole->v4 ? (size_t)(packet[0] & 0x0f) * 4 : 0);
}

/* Make the copy of the head at `ip` that of segment `i`, which has `part` bytes of payload. */
static void complete_head(const struct whole *whole, uint8_t *ip, size_t i, const uint8_t *data,
                          size_t part)
{
    uint8_t *transport = ip + whole->transport;
    uint64_t sum = whole->pseudo + htons((uint16_t)part);

    if (whole->v4) {
        const uint16_t number = (uint16_t)(whole->ident + i);
        const uint16_t bytes = (uint16_t)(whole->head + part);

        store16(ip + V4_LENGTH, bytes);
        store16(ip + V4_IDENT, number);
        store_sum(ip + V4_CHECK, finished(whole->ip_sum + htons(bytes) + htons(number), false));
    } else {
        store16(ip + V6_LENGTH, (uint16_t)(whole->head + part - V6_BYTES));
    }
    if (whole->tcp) {
        store32(transport + TCP_SEQ, whole->sequence + (uint32_t)(i * whole->size));
        transport[TCP_FLAGS] |= (i == 0 ? whole->flags & CWR : 0);
        transport[TCP_FLAGS] |= (i + 1 == whole->count ? whole->flags & (FIN | PSH) : 0);
    } else {
        store16(transport + UDP_LENGTH, (uint16_t)(UDP_BYTES + part));
    }
    if (!whole->remote)
        sum += sum_of(transport, whole->head - whole->transport) + sum_of(data, part);
    store_sum(transport + (whole->tcp ? TCP_CHECK : UDP_CHECK),
              whole->remote ? fold(sum) : finished(sum, !whole->tcp));
}

bool mn_cut(struct cutter *cutter, uint8_t *packet, size_t length, const struct virtio *header,
            const uint8_t prefix[ENCAPSULATION_BYTES], bool remote)
{
    struct whole whole = {.remote = remote};

    cutter->count = 0;
    if (!locate(&whole, packet, length, header))
        return false;
    clear_head(&whole, packet);
    const size_t head = whole.head, size = whole.size;

    for (size_t i = 0; i < whole.count; i++) {
        uint8_t *front = cutter->block + i * (ENCAPSULATION_BYTES + head);
        uint8_t *ip = front + ENCAPSULATION_BYTES, *data = packet + head + i * size;
        const size_t part = i + 1 < whole.count ? size : whole.payload - i * size;

        memcpy(front, prefix, ENCAPSULATION_BYTES);
        memcpy(ip, packet, head);
        complete_head(&whole, ip, i, data, part);
        cutter->parts[2 * i] = (struct iovec){front, ENCAPSULATION_BYTES + head};
        cutter->parts[2 * i + 1] = (struct iovec){data, part};
    }
    cutter->count = (int)whole.count;
    cutter->segment = (unsigned)(ENCAPSULATION_BYTES + head + size);
    return true;
}
