/* A server and its load, the same for every network that is compared (tests/bench/published.py
 * compiles and runs it).
 *
 *     web serve PORT
 *     web load CONNECTIONS MILLISECONDS KEEP ADDRESS PORT [PORT...]
 *
 * `serve` answers each HTTP request with 200 and five bytes, and keeps the connection.  `load` has
 * so many requests under way at a time, spread over the ports in turn.  KEEP 0: a new connection
 * for each request, which the client ends by a reset, so that no port stays in TIME_WAIT; 1: as
 * many requests over one connection as time allows.  It prints requests, nanoseconds that they
 * took together, and of their latencies the 50th and 99th percentile in nanoseconds.  That of a
 * new connection counts from connect(2).  IPv4 only; both sides wait with epoll, in one thread.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 64, MOST_CONNECTIONS = 1024, MOST_PORTS = 64, MOST_SAMPLES = 4000000 };

static const char request[] = "GET / HTTP/1.1\r\nHost: web\r\n\r\n";
static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";

static struct connection {
    int fd;
    uint64_t started_ns;
    size_t got;
} connections[MOST_CONNECTIONS];
static struct sockaddr_in targets[MOST_PORTS];
static int target_count, next_target;
static uint32_t samples[MOST_SAMPLES];
static size_t sample_count;
static int poller;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void watch(int fd, uint32_t events, uint64_t data) {
    struct epoll_event event = {.events = events, .data.u64 = data};

    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
}

static void serve(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;

    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 1024) < 0)
        die("listen");
    watch(listener, EPOLLIN, (uint64_t)listener);
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(poller, events, EVENTS, -1);

        for (int i = 0; i < count; i++) {
            char buffer[4096];
            int fd = (int)events[i].data.u64;

            if (fd == listener) {
                while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    watch(fd, EPOLLIN, (uint64_t)fd);
                }
                continue;
            }
            /* A request is one segment: the client sends the next when it has the answer. */
            ssize_t got = read(fd, buffer, sizeof buffer);
            if (got <= 0 || write(fd, answer, sizeof answer - 1) < 0)
                close(fd);
        }
    }
}

static void open_connection(struct connection *it) {
    int one = 1;
    struct linger reset = {.l_onoff = 1, .l_linger = 0};

    it->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (it->fd < 0)
        die("socket");
    setsockopt(it->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(it->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    it->got = 0;
    it->started_ns = now_ns();
    struct sockaddr_in *target = &targets[next_target++ % target_count];
    if (connect(it->fd, (struct sockaddr *)target, sizeof *target) < 0 && errno != EINPROGRESS)
        die("connect");
    watch(it->fd, EPOLLOUT, (uint64_t)(it - connections));
}

static void send_request(struct connection *it) {
    if (write(it->fd, request, sizeof request - 1) != (ssize_t)sizeof request - 1)
        die("write");
}

/* The connection is up: ask, and wait for the answer. */
static void on_connected(struct connection *it) {
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)(it - connections)};
    int error = 0;
    socklen_t size = sizeof error;

    getsockopt(it->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        errno = error;
        die("connect");
    }
    epoll_ctl(poller, EPOLL_CTL_MOD, it->fd, &event);
    send_request(it);
}

static void on_answer(struct connection *it, int keep) {
    char buffer[4096];
    ssize_t got = read(it->fd, buffer, sizeof buffer);

    if (got <= 0)
        die("read");
    it->got += (size_t)got;
    if (it->got < sizeof answer - 1)
        return;
    if (sample_count < MOST_SAMPLES)
        samples[sample_count++] = (uint32_t)(now_ns() - it->started_ns);
    if (keep) {
        it->got = 0;
        it->started_ns = now_ns();
        send_request(it);
    } else {
        close(it->fd);
        open_connection(it);
    }
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

static void load(int count, int milliseconds, int keep) {
    uint64_t started = now_ns(), end = started + (uint64_t)milliseconds * 1000000;

    for (int i = 0; i < count; i++)
        open_connection(&connections[i]);
    while (now_ns() < end) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(poller, events, EVENTS, 100);

        for (int i = 0; i < ready; i++) {
            struct connection *it = &connections[events[i].data.u64];

            if (events[i].events & EPOLLIN)
                on_answer(it, keep);
            else
                on_connected(it);
        }
    }
    uint64_t taken = now_ns() - started;
    if (!sample_count)
        die("no answer");
    qsort(samples, sample_count, sizeof *samples, by_size);
    printf("%zu %llu %u %u\n", sample_count, (unsigned long long)taken,
           samples[sample_count / 2], samples[sample_count * 99 / 100]);
}

int main(int argc, char **argv) {
    poller = epoll_create1(0);
    signal(SIGPIPE, SIG_IGN);
    if (argc == 3 && !strcmp(argv[1], "serve"))
        serve(atoi(argv[2]));
    if (argc < 7 || strcmp(argv[1], "load") || atoi(argv[2]) > MOST_CONNECTIONS ||
        argc - 6 > MOST_PORTS) {
        fputs("see the comment at the top of web.c\n", stderr);
        return 2;
    }
    for (int i = 6; i < argc; i++) {
        struct sockaddr_in *target = &targets[target_count++];

        target->sin_family = AF_INET;
        target->sin_port = htons((uint16_t)atoi(argv[i]));
        if (!inet_aton(argv[5], &target->sin_addr))
            die(argv[5]);
    }
    load(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
    return 0;
}
