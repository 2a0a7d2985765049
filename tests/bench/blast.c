/* Small UDP packets, many to a system call, so that the path is measured and not the program that
 * sends: a tool that makes one system call a packet is the bottleneck itself.
 *
 *     blast count PORT MILLISECONDS
 *     blast send ADDRESS PORT BYTES MILLISECONDS RATE WINDOW
 *
 * `count` binds, prints "ready", counts what comes until nothing has come for 150 ms after the
 * first packet (or nothing at all for MILLISECONDS), and prints packets and the nanoseconds from the
 * first to the last.
 *
 * `send` sends for so long and prints how many: RATE packets a second (0: no limit) with no more
 * than WINDOW of them on their way (0: no limit).  With a window the counter answers every
 * ACK_EVERY packets with its count, as a transport does; the path is then full but not flooded,
 * and sender and path do not fight for the processor over packets that are dropped in the end.
 * What was on its way when no answer comes for TIMEOUT_NS is taken for lost.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 32, ROOM = 2048, ACK_EVERY = 32, IDLE_MS = 150, LEAST_BYTES = 8 };
static const int64_t TIMEOUT_NS = 5000000, SECOND_NS = 1000000000;

static char room[BATCH][ROOM];
static struct iovec parts[BATCH];
static struct mmsghdr messages[BATCH];

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * SECOND_NS + time.tv_nsec;
}

static void prepare(size_t bytes) {
    for (int i = 0; i < BATCH; i++) {
        parts[i] = (struct iovec){room[i], bytes};
        messages[i].msg_hdr.msg_iov = &parts[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
}

static int open_socket(void) {
    int sock = socket(AF_INET, SOCK_DGRAM, 0), bytes = 8 << 20;

    if (sock < 0)
        die("socket");
    setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
    setsockopt(sock, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes);
    return sock;
}

static int count(int port, int wait_ms) {
    int sock = open_socket();
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)}, from;
    struct pollfd wanted = {.fd = sock, .events = POLLIN};
    int64_t first = 0, last = 0;
    uint64_t packets = 0, before = 0, told = 0;

    if (bind(sock, (struct sockaddr *)&here, sizeof here) < 0)
        die("bind");
    prepare(ROOM);
    puts("ready");
    fflush(stdout);
    while (poll(&wanted, 1, packets ? IDLE_MS : wait_ms) > 0) {
        messages[0].msg_hdr.msg_name = &from;
        messages[0].msg_hdr.msg_namelen = sizeof from;
        int got = recvmmsg(sock, messages, BATCH, MSG_DONTWAIT, NULL);

        if (got <= 0)
            continue;
        last = now_ns();
        packets += got;
        /* The clock starts after the first batch: it has waited for the sender, not the path. */
        if (!first) {
            first = last;
            before = packets;
        }
        if (room[0][0] && packets - told >= ACK_EVERY) {
            told = packets;
            sendto(sock, &packets, sizeof packets, MSG_DONTWAIT, (struct sockaddr *)&from,
                   sizeof from);
        }
    }
    printf("%llu %lld\n", (unsigned long long)(packets - before), (long long)(last - first));
    return 0;
}

static int send_all(const char *address, int port, size_t bytes, int64_t length_ns, int64_t rate,
                    uint64_t window) {
    int sock = open_socket();
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct pollfd wanted = {.fd = sock, .events = POLLIN};
    uint64_t sent = 0, done = 0, count = 0;

    if (bytes < LEAST_BYTES || bytes > ROOM || !inet_aton(address, &peer.sin_addr) ||
        connect(sock, (struct sockaddr *)&peer, sizeof peer) < 0)
        die(address);
    prepare(bytes);
    for (int i = 0; i < BATCH; i++)
        room[i][0] = window > 0;
    int64_t began = now_ns(), now = began, heard = began;

    for (; now - began < length_ns; now = now_ns()) {
        uint64_t answer;

        while (window && recv(sock, &answer, sizeof answer, MSG_DONTWAIT) == sizeof answer) {
            done += answer - count;
            done = done < sent ? done : sent;
            count = answer;
            heard = now;
        }
        if (window && now - heard > TIMEOUT_NS) {
            done = sent;
            heard = now;
        }
        if (window && sent + BATCH > done + window) {
            poll(&wanted, 1, 1);
            continue;
        }
        if (rate && (int64_t)sent > (now - began) / 1000 * rate / 1000000) {
            struct timespec pause = {.tv_nsec = 50000};

            nanosleep(&pause, NULL);
            continue;
        }
        int put = sendmmsg(sock, messages, BATCH, 0);

        if (put > 0)
            sent += put;
        else if (errno != ECONNREFUSED && errno != ENOBUFS && errno != EAGAIN)
            die("sendmmsg");
    }
    printf("%llu\n", (unsigned long long)sent);
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 4 && !strcmp(argv[1], "count"))
        return count(atoi(argv[2]), atoi(argv[3]));
    if (argc == 8 && !strcmp(argv[1], "send"))
        return send_all(argv[2], atoi(argv[3]), atoi(argv[4]), atoll(argv[5]) * 1000000,
                        atoll(argv[6]), atoll(argv[7]));
    fprintf(stderr, "usage: blast count PORT MILLISECONDS\n"
                    "       blast send ADDRESS PORT BYTES MILLISECONDS RATE WINDOW\n");
    return 2;
}
