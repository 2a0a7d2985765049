/* A userspace tunnel of the one-packet-a-system-call kind: the peer that `udp` mode is measured
 * against (tests/bench/datapath.py compiles and runs it).
 *
 *     relay DEVICE LOCAL PEER PORT [RECEIVE_BUFFER_BYTES]
 *
 * poll; read one packet from a TUN device, sendto; recv one datagram, write it to the device; until
 * there is nothing left, then poll again.  The packet goes bare into UDP, and its TTL is lowered on
 * the way into the tunnel, as flannel's udp backend does.  One peer, IPv4 only, no offloads; like
 * flannel's its socket has the kernel's default buffer, unless another size is given.
 * Prints a line when the device is there; its address and routes are the caller's business.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { HEADER_BYTES = 20, TTL = 8, CHECKSUM = 10, BUFFER_BYTES = 65536 };

static uint8_t buffer[BUFFER_BYTES];
static struct sockaddr_in local, peer;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int open_tun(const char *name) {
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (tun < 0 || ioctl(tun, TUNSETIFF, &request) < 0)
        die("/dev/net/tun");
    return tun;
}

static int open_socket(int room) {
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (sock < 0 || bind(sock, (struct sockaddr *)&local, sizeof local) < 0)
        die("bind");
    if (room)
        setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    return sock;
}

/* RFC 1141: TTL is the high byte of its word, so the sum grows by 0x0100. */
static int lower_ttl(uint8_t *packet) {
    uint32_t sum;

    if (packet[TTL] <= 1)
        return 0;
    packet[TTL]--;
    sum = (packet[CHECKSUM] << 8 | packet[CHECKSUM + 1]) + 0x0100u;
    sum += sum >> 16;
    packet[CHECKSUM] = sum >> 8;
    packet[CHECKSUM + 1] = sum;
    return 1;
}

static int tun_to_socket(int tun, int sock) {
    ssize_t length = read(tun, buffer, sizeof buffer);

    if (length < 0)
        return 0;
    if (length < HEADER_BYTES || buffer[0] >> 4 != 4 || !lower_ttl(buffer))
        return 1;
    while (sendto(sock, buffer, length, 0, (struct sockaddr *)&peer, sizeof peer) < 0 &&
           errno == EINTR)
        ;
    return 1;
}

static int socket_to_tun(int sock, int tun) {
    ssize_t length = recv(sock, buffer, sizeof buffer, 0);

    if (length < 0)
        return 0;
    if (length >= HEADER_BYTES && write(tun, buffer, length) < 0 && errno == EBADF)
        die("write");
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 5 && argc != 6) {
        fprintf(stderr, "usage: relay DEVICE LOCAL PEER PORT [RECEIVE_BUFFER_BYTES]\n");
        return 2;
    }
    local.sin_family = peer.sin_family = AF_INET;
    local.sin_port = peer.sin_port = htons(atoi(argv[4]));
    if (!inet_aton(argv[2], &local.sin_addr) || !inet_aton(argv[3], &peer.sin_addr))
        die("address");
    int tun = open_tun(argv[1]), sock = open_socket(argc == 6 ? atoi(argv[5]) : 0);
    struct pollfd wanted[] = {{.fd = tun, .events = POLLIN}, {.fd = sock, .events = POLLIN}};

    puts("ready");
    fflush(stdout);
    for (;;) {
        if (poll(wanted, 2, -1) < 0 && errno != EINTR)
            die("poll");
        while (tun_to_socket(tun, sock) | socket_to_tun(sock, tun))
            ;
    }
}
