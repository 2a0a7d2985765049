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
#include "inward.h"
#include "outward.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

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

    engine->notes.bytes = 0;
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
        if (is_called || engine->notes.bytes || count == 0)
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
EXPORT void mn_drain_drops(struct engine *engine, uint64_t *not_member, uint64_t *receive_errors)
{
    *not_member = engine->not_member;
    *receive_errors = engine->receive_errors;
    engine->not_member = engine->receive_errors = 0;
}

/* The notes of the last mn_run. */
EXPORT const uint8_t *mn_notes(const struct engine *engine, uint32_t *bytes)
{
    *bytes = engine->notes.bytes;
    return engine->notes.data;
}

/* Of the sources that this was made from: Python looks whether they are its own. */
EXPORT const char *mn_digest(void)
{
    return MESHNET_DIGEST;
}
