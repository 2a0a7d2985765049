/* What stands where in a packet, and the Internet checksum.
 *
 *     TUN   [virtio 10][IP | TCP or UDP | payload …]
 *     wire  [VXLAN 8 | Ethernet 14][IP | TCP or UDP | payload …]
 *
 * Python's meshnet.wire has the pictures; names are the same here.  Packets lie at any address: all
 * loads and stores go through memcpy, which compiles to one instruction.
 */
#ifndef MESHNET_WIRE_H
#define MESHNET_WIRE_H

#include <arpa/inet.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Of functions that Python calls; all others are hidden. */
#define EXPORT __attribute__((visibility("default")))

enum {
    VIRTIO_BYTES = 10,
    ENCAPSULATION_BYTES = 22,
    MAC_BYTES = 6,
    MAX_PACKET_BYTES = 65535,
    MAX_SEND_BYTES = 65507, /* the largest UDP payload over IPv4 */
    MAX_SEGMENTS = 64,      /* UDP_MAX_SEGMENTS before Linux 6.9 */
};

enum { TCP = 6, UDP = 17 };
enum { FIN = 0x01, PSH = 0x08, ACK = 0x10, ECE = 0x40, CWR = 0x80 };

/* Where fields stand in their header. */
enum { V4_LENGTH = 2, V4_IDENT = 4, V4_FRAGMENT = 6, V4_PROTOCOL = 9, V4_CHECK = 10,
       V4_SOURCE = 12, V4_DESTINATION = 16, V4_BYTES = 20 };
enum { V6_LENGTH = 4, V6_PROTOCOL = 6, V6_HOPS = 7, V6_SOURCE = 8, V6_DESTINATION = 24,
       V6_BYTES = 40 };
enum { TCP_SEQ = 4, TCP_ACK = 8, TCP_OFFSET = 12, TCP_FLAGS = 13, TCP_WINDOW = 14, TCP_CHECK = 16,
       TCP_URGENT = 18, TCP_BYTES = 20 };
enum { UDP_LENGTH = 4, UDP_CHECK = 6, UDP_BYTES = 8 };

/* VXLAN and Ethernet (meshnet.wire.vxlan has the picture). */
enum {
    VXLAN_BYTES = 8,
    ETHERTYPE_AT = VXLAN_BYTES + 2 * MAC_BYTES,
    ETHERTYPE_IPV4 = 0x0800,
    ETHERTYPE_IPV6 = 0x86dd,
    REMOTE_CHECKSUM_UDP = 0x80,
};
#define FLAG_VNI 0x08000000u
#define FLAG_REMOTE_CHECKSUM 0x00200000u

/* linux/virtio_net.h, struct virtio_net_hdr; in the machine's byte order. */
struct virtio {
    uint8_t flags;
    uint8_t type;
    uint16_t header; /* bytes of all headers */
    uint16_t size;   /* payload of a segment */
    uint16_t start;  /* the checksum's first byte … */
    uint16_t offset; /* … and where its field is from there */
};
_Static_assert(sizeof(struct virtio) == VIRTIO_BYTES, "struct virtio has padding");
enum { NEEDS_CSUM = 1 };
enum { GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, GSO_UDP_L4 = 5, GSO_ECN = 0x80 };

static inline uint16_t load16(const uint8_t *at) /* network order to the machine's */
{
    uint16_t value;

    memcpy(&value, at, sizeof value);
    return ntohs(value);
}

static inline uint32_t load32(const uint8_t *at)
{
    uint32_t value;

    memcpy(&value, at, sizeof value);
    return ntohl(value);
}

static inline uint64_t load64(const uint8_t *at)
{
    return (uint64_t)load32(at) << 32 | load32(at + 4);
}

static inline void store16(uint8_t *at, uint16_t value)
{
    value = htons(value);
    memcpy(at, &value, sizeof value);
}

static inline void store32(uint8_t *at, uint32_t value)
{
    value = htonl(value);
    memcpy(at, &value, sizeof value);
}

/* Checksums (RFC 1071).  A sum is of 16-bit words as the machine loads them, not yet folded: it is
 * the same in either byte order once it is stored as it is.  Numbers are added with htons. */

static inline uint64_t sum_of(const uint8_t *data, size_t size)
{
    uint64_t total = 0;
    uint32_t words[16];

    for (; size >= sizeof words; data += sizeof words, size -= sizeof words) {
        memcpy(words, data, sizeof words);
        for (int i = 0; i < 16; i++)
            total += words[i];
    }
    for (; size >= 4; data += 4, size -= 4) {
        memcpy(words, data, 4);
        total += words[0];
    }
    if (size) {
        words[0] = 0;
        memcpy(words, data, size); /* an odd last byte is the first one of its word */
        total += words[0];
    }
    return total;
}

static inline uint16_t fold(uint64_t sum)
{
    sum = (sum >> 32) + (sum & 0xffffffff);
    sum = (sum >> 32) + (sum & 0xffffffff);
    sum = (sum >> 16) + (sum & 0xffff);
    sum = (sum >> 16) + (sum & 0xffff);
    return (uint16_t)sum;
}

static inline void store_sum(uint8_t *at, uint16_t folded)
{
    memcpy(at, &folded, sizeof folded);
}

static inline uint16_t load_sum(const uint8_t *at)
{
    uint16_t folded;

    memcpy(&folded, at, sizeof folded);
    return folded;
}

/* The field that makes a sum right; UDP's may not be 0, which says that there is none (RFC 768). */
static inline uint16_t finished(uint64_t sum, bool udp)
{
    uint16_t field = ~fold(sum);

    return udp && field == 0 ? 0xffff : field;
}

static inline int version_of(const uint8_t *packet)
{
    return packet[0] >> 4;
}

static inline uint64_t address_sum(const uint8_t *packet)
{
    return version_of(packet) == 4 ? sum_of(packet + V4_SOURCE, 8) : sum_of(packet + V6_SOURCE, 32);
}

/* Sum of a pseudo-header; `length` is of the transport header and what follows. */
static inline uint64_t pseudo_sum(const uint8_t *packet, int protocol, size_t length)
{
    return address_sum(packet) + htons((uint16_t)protocol) + htons((uint16_t)length);
}

/* Set an IP header's length, and IPv4's checksum anew. */
static inline void set_length(uint8_t *packet, size_t header, size_t length)
{
    if (version_of(packet) == 4) {
        store16(packet + V4_LENGTH, (uint16_t)length);
        store16(packet + V4_CHECK, 0);
        store_sum(packet + V4_CHECK, finished(sum_of(packet, header), false));
    } else {
        store16(packet + V6_LENGTH, (uint16_t)(length - V6_BYTES));
    }
}

#endif
