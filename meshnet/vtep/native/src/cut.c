#include "cut.h"

bool mn_cut(struct cutter *cutter, uint8_t *packet, size_t length, const struct virtio *header,
            const uint8_t prefix[ENCAPSULATION_BYTES], bool remote)
{
    const bool tcp = (header->type & ~GSO_ECN) != GSO_UDP_L4, v4 = version_of(packet) == 4;
    const size_t transport = header->start, size = header->size;
    const size_t ip_bytes = v4 ? (size_t)(packet[0] & 0x0f) * 4 : V6_BYTES;

    cutter->count = 0;
    if (size == 0 || ip_bytes < V4_BYTES || transport < ip_bytes ||
        transport + (tcp ? TCP_BYTES : UDP_BYTES) > length)
        return false;
    const size_t head = transport + (tcp ? (size_t)(packet[transport + TCP_OFFSET] >> 4) * 4
                                         : (size_t)UDP_BYTES);
    if (head < transport + (tcp ? TCP_BYTES : UDP_BYTES) || head >= length ||
        ENCAPSULATION_BYTES + head > MAX_HEAD_BYTES)
        return false;
    const size_t payload = length - head, count = (payload + size - 1) / size;
    if (count > MAX_CUT)
        return false;

    /* Whatever is the same in all segments is done once, in the packet's own header. */
    uint8_t *field = packet + transport + (tcp ? TCP_CHECK : UDP_CHECK);
    /* It holds the pseudo-header's sum for the whole; only the length is another one. */
    const uint64_t pseudo = (uint64_t)load_sum(field) + (uint16_t)~htons((uint16_t)payload);
    const uint8_t flags = tcp ? packet[transport + TCP_FLAGS] : 0;
    const uint32_t sequence = tcp ? load32(packet + transport + TCP_SEQ) : 0;
    const uint16_t ident = v4 ? load16(packet + V4_IDENT) : 0;

    store_sum(field, 0);
    if (tcp) {
        packet[transport + TCP_FLAGS] = flags & ~(FIN | PSH | CWR);
        store32(packet + transport + TCP_SEQ, 0);
    } else {
        store16(packet + transport + UDP_LENGTH, 0);
    }
    if (v4) {
        store16(packet + V4_LENGTH, 0);
        store16(packet + V4_IDENT, 0);
        store16(packet + V4_CHECK, 0);
    }
    const uint64_t ip_sum = sum_of(packet, v4 ? ip_bytes : 0);

    for (size_t i = 0; i < count; i++) {
        uint8_t *front = cutter->block + i * (ENCAPSULATION_BYTES + head);
        uint8_t *ip = front + ENCAPSULATION_BYTES, *inner = ip + transport;
        uint8_t *data = packet + head + i * size;
        const size_t part = i + 1 < count ? size : payload - i * size;

        memcpy(front, prefix, ENCAPSULATION_BYTES);
        memcpy(ip, packet, head);
        if (v4) {
            const uint16_t number = (uint16_t)(ident + i), bytes = (uint16_t)(head + part);

            store16(ip + V4_LENGTH, bytes);
            store16(ip + V4_IDENT, number);
            store_sum(ip + V4_CHECK, finished(ip_sum + htons(bytes) + htons(number), false));
        } else {
            store16(ip + V6_LENGTH, (uint16_t)(head + part - V6_BYTES));
        }
        if (tcp) {
            store32(inner + TCP_SEQ, sequence + (uint32_t)(i * size));
            inner[TCP_FLAGS] |= (i == 0 ? flags & CWR : 0);
            inner[TCP_FLAGS] |= (i + 1 == count ? flags & (FIN | PSH) : 0);
        } else {
            store16(inner + UDP_LENGTH, (uint16_t)(UDP_BYTES + part));
        }
        uint64_t sum = pseudo + htons((uint16_t)part);
        if (!remote)
            sum += sum_of(inner, head - transport) + sum_of(data, part);
        store_sum(inner + (tcp ? TCP_CHECK : UDP_CHECK),
                  remote ? fold(sum) : finished(sum, !tcp));
        cutter->parts[2 * i] = (struct iovec){front, ENCAPSULATION_BYTES + head};
        cutter->parts[2 * i + 1] = (struct iovec){data, part};
    }
    cutter->count = (int)count;
    cutter->segment = (unsigned)(ENCAPSULATION_BYTES + head + size);
    return true;
}
