/* One endpoint's part in the traffic matrix: a datagram to every other endpoint each period, and a
 * book of what comes.
 *
 *     probe ID NETWORK PORT PERIOD_US FOREIGN_EVERY
 *
 * ID is of one incarnation of an endpoint and never given again, so a datagram that was meant for the
 * former owner of an address can be told from one that went astray.  A path is (source, destination,
 * IP version) and has sequence numbers of its own; what is missing among them is lost.  Times are
 * CLOCK_MONOTONIC, which all namespaces of a machine share.
 *
 * There is one timer.  At each tick the sockets are read, then one round is sent; so a packet's
 * arrival wakes nobody, and what a tick came late costs no packet, only a pause.
 *
 * Commands are lines of stdin, each answered by one line of JSON on stdout:
 *
 *     add ID VERSION ADDRESS own|foreign   one more target; foreign ones, which nothing must reach,
 *                                          only every FOREIGN_EVERY rounds
 *     del ID                               no target any more
 *     forget ID                            no source any more
 *     snapshot SINCE_NS                    the book, less losses that were over before, and what
 *                                          went astray since the last snapshot
 *
 * The program ends with its stdin.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/sock_diag.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { TARGETS = 256, SOURCES = 512, BATCH = 64, STRAY = 256, V4 = 0, V6 = 1 };
static const uint32_t MAGIC = 0x6d6e7072;
static const int64_t SECOND_NS = 1000000000;

struct datagram {
    uint32_t magic, network, source, destination;
    uint64_t sequence;
    int64_t sent_ns;
};

/* Targets of one IP version, own or foreign; the arrays run in step, as sendmmsg(2) wants them. */
struct targets {
    int count;
    struct datagram datagram[TARGETS];
    struct sockaddr_in6 address[TARGETS];
    struct iovec part[TARGETS];
    struct mmsghdr message[TARGETS];
    int64_t first_ns[TARGETS];
    uint64_t errors[TARGETS];
};

/* Sequence numbers first to last are missing; sent after `before_ns` and before `after_ns`. */
struct gap {
    uint64_t first, last;
    int64_t before_ns, after_ns;
};

struct source {
    uint32_t id;
    int version;
    uint64_t received, next, duplicates, reordered;
    int64_t first_ns, last_ns; /* when the first and the highest that came were sent */
    struct gap *gaps;
    size_t gap_count, gap_room;
};

struct stray {
    struct datagram datagram;
    int version;
    int64_t received_ns;
};

static uint32_t own_id, own_network;
static uint64_t unsent, unknown, stray_total, rounds, skipped;
static int sockets[2], foreign_every;
static struct targets targets[2][2]; /* by IP version, then foreign */
static struct source sources[SOURCES];
static int source_count;
static struct stray strays[STRAY]; /* since the last snapshot */
static int stray_count;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * SECOND_NS + time.tv_nsec;
}

static int open_socket(int version, int port) {
    int family = version == V4 ? AF_INET : AF_INET6, one = 1, bytes = 16 << 20;
    int sock = socket(family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in6 here = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    struct sockaddr_in here4 = {.sin_family = AF_INET, .sin_port = htons(port)};

    if (sock < 0)
        die("socket");
    if (version == V6)
        setsockopt(sock, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
    if (setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) < 0 ||
        setsockopt(sock, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) < 0)
        die("buffers");
    if (bind(sock, version == V4 ? (void *)&here4 : (void *)&here,
             version == V4 ? sizeof here4 : sizeof here) < 0)
        die("bind");
    return sock;
}

/* ---- what is sent */

static void aim(struct targets *list, int i) {
    list->part[i] = (struct iovec){&list->datagram[i], sizeof list->datagram[i]};
    list->message[i].msg_hdr = (struct msghdr){
        .msg_name = &list->address[i],
        .msg_namelen = list->address[i].sin6_family == AF_INET ? sizeof(struct sockaddr_in)
                                                               : sizeof(struct sockaddr_in6),
        .msg_iov = &list->part[i],
        .msg_iovlen = 1,
    };
}

static const char *add_target(uint32_t id, int version, const char *text, bool foreign, int port) {
    struct targets *list = &targets[version][foreign];
    int i = list->count;

    if (i == TARGETS)
        return "too many targets";
    memset(&list->address[i], 0, sizeof list->address[i]);
    if (version == V4) {
        struct sockaddr_in *to = (struct sockaddr_in *)&list->address[i];

        *to = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
        if (!inet_pton(AF_INET, text, &to->sin_addr))
            return "no IPv4 address";
    } else {
        list->address[i] = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons(port)};
        if (!inet_pton(AF_INET6, text, &list->address[i].sin6_addr))
            return "no IPv6 address";
    }
    list->datagram[i] = (struct datagram){MAGIC, own_network, own_id, id, 0, 0};
    list->first_ns[i] = 0;
    list->errors[i] = 0;
    aim(list, i);
    list->count++;
    return NULL;
}

static void remove_target(uint32_t id) {
    for (int which = 0; which < 4; which++) {
        struct targets *list = &targets[which / 2][which % 2];

        for (int i = list->count - 1; i >= 0; i--) {
            int last = list->count - 1;

            if (list->datagram[i].destination != id)
                continue;
            list->datagram[i] = list->datagram[last];
            list->address[i] = list->address[last];
            list->first_ns[i] = list->first_ns[last];
            list->errors[i] = list->errors[last];
            aim(list, i);
            list->count--;
        }
    }
}

static void count_sent(struct targets *list, int from, int to) {
    for (int i = from; i < to; i++) {
        list->datagram[i].sequence++;
        if (!list->first_ns[i])
            list->first_ns[i] = list->datagram[i].sent_ns;
    }
}

static void send_round(int sock, struct targets *list) {
    int64_t now = now_ns();

    for (int i = 0; i < list->count; i++)
        list->datagram[i].sent_ns = now;
    for (int i = 0; i < list->count;) {
        int sent = sendmmsg(sock, &list->message[i], list->count - i, 0);

        if (sent > 0) {
            count_sent(list, i, i + sent);
            i += sent;
        } else if (errno == EAGAIN || errno == ENOBUFS) {
            unsent++; /* this machine's want of memory or time: never on its way, so not lost */
            i++;
        } else if (errno != EINTR) {
            list->errors[i]++;
            count_sent(list, i, i + 1); /* refused here, and so lost */
            i++;
        }
    }
}

/* ---- what is received */

static struct source *source_of(uint32_t id, int version) {
    for (int i = 0; i < source_count; i++)
        if (sources[i].id == id && sources[i].version == version)
            return &sources[i];
    if (source_count == SOURCES) {
        errno = ENOSPC;
        die("sources");
    }
    sources[source_count] = (struct source){.id = id, .version = version};
    return &sources[source_count++];
}

static void drop_gap(struct source *from, size_t i) {
    memmove(&from->gaps[i], &from->gaps[i + 1], (from->gap_count - i - 1) * sizeof *from->gaps);
    from->gap_count--;
}

static void add_gap(struct source *from, size_t at, struct gap gap) {
    if (from->gap_count == from->gap_room) {
        from->gap_room = from->gap_room ? 2 * from->gap_room : 16;
        from->gaps = realloc(from->gaps, from->gap_room * sizeof *from->gaps);
        if (!from->gaps)
            die("gaps");
    }
    memmove(&from->gaps[at + 1], &from->gaps[at], (from->gap_count - at) * sizeof *from->gaps);
    from->gaps[at] = gap;
    from->gap_count++;
}

/* One that was taken for lost, or one that came before. */
static void fill(struct source *from, uint64_t sequence, int64_t sent_ns) {
    for (size_t i = from->gap_count; i-- > 0;) {
        struct gap *gap = &from->gaps[i];

        if (sequence > gap->last)
            break;
        if (sequence < gap->first)
            continue;
        struct gap rest = {sequence + 1, gap->last, sent_ns, gap->after_ns};

        from->reordered++;
        from->received++;
        gap->last = sequence - 1;
        gap->after_ns = sent_ns;
        bool empty = sequence == gap->first;

        if (rest.first <= rest.last)
            add_gap(from, i + 1, rest);
        if (empty)
            drop_gap(from, i);
        return;
    }
    from->duplicates++;
}

static void record(const struct datagram *datagram, int version, int64_t now) {
    if (datagram->network != own_network || datagram->destination != own_id) {
        if (stray_count < STRAY)
            strays[stray_count++] = (struct stray){*datagram, version, now};
        stray_total++;
        return;
    }
    struct source *from = source_of(datagram->source, version);
    uint64_t sequence = datagram->sequence;

    if (sequence < from->next) {
        fill(from, sequence, datagram->sent_ns);
        return;
    }
    if (sequence > from->next)
        add_gap(from, from->gap_count,
                (struct gap){from->next, sequence - 1, from->last_ns, datagram->sent_ns});
    if (!from->first_ns)
        from->first_ns = datagram->sent_ns;
    from->received++;
    from->next = sequence + 1;
    from->last_ns = datagram->sent_ns;
}

static void receive_all(int version) {
    static struct datagram room[BATCH];
    static struct iovec parts[BATCH];
    static struct mmsghdr messages[BATCH];
    int got;

    for (int i = 0; i < BATCH; i++) {
        parts[i] = (struct iovec){&room[i], sizeof room[i]};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &parts[i], .msg_iovlen = 1};
    }
    do {
        got = recvmmsg(sockets[version], messages, BATCH, MSG_DONTWAIT, NULL);
        int64_t now = now_ns();

        for (int i = 0; i < got; i++)
            if (messages[i].msg_len == sizeof room[i] && room[i].magic == MAGIC)
                record(&room[i], version, now);
            else
                unknown++;
    } while (got == BATCH);
}

static void forget_source(uint32_t id) {
    for (int i = source_count - 1; i >= 0; i--)
        if (sources[i].id == id) {
            free(sources[i].gaps);
            sources[i] = sources[--source_count];
        }
}

/* ---- what is told */

/* Datagrams that our own sockets had no room for: this program came too late, no network lost them. */
static uint64_t overruns(void) {
    uint64_t total = 0;

    for (int version = V4; version <= V6; version++) {
        uint32_t info[SK_MEMINFO_VARS];
        socklen_t size = sizeof info;

        if (getsockopt(sockets[version], SOL_SOCKET, SO_MEMINFO, info, &size) < 0)
            die("SO_MEMINFO");
        total += info[SK_MEMINFO_DROPS];
    }
    return total;
}

static void print_targets(void) {
    const char *separator = "";

    for (int which = 0; which < 4; which++) {
        struct targets *list = &targets[which / 2][which % 2];

        for (int i = 0; i < list->count; i++) {
            struct datagram *datagram = &list->datagram[i];

            printf("%s[%" PRIu32 ",%d,%d,%" PRIu64 ",%" PRId64 ",%" PRId64 ",%" PRIu64 "]",
                   separator, datagram->destination, which / 2 ? 6 : 4, which % 2,
                   datagram->sequence, list->first_ns[i], datagram->sent_ns, list->errors[i]);
            separator = ",";
        }
    }
}

static void print_source(struct source *from, int64_t since_ns) {
    size_t kept = 0;

    while (kept < from->gap_count && from->gaps[kept].after_ns < since_ns)
        kept++;
    while (kept-- > 0)
        drop_gap(from, 0);
    printf("[%" PRIu32 ",%d,%" PRIu64 ",%" PRIu64 ",%" PRId64 ",%" PRId64 ",%" PRIu64 ",%" PRIu64
           ",[",
           from->id, from->version ? 6 : 4, from->received, from->next, from->first_ns,
           from->last_ns, from->duplicates, from->reordered);
    for (size_t i = 0; i < from->gap_count; i++)
        printf("%s[%" PRIu64 ",%" PRIu64 ",%" PRId64 ",%" PRId64 "]", i ? "," : "",
               from->gaps[i].first, from->gaps[i].last, from->gaps[i].before_ns,
               from->gaps[i].after_ns);
    printf("]]");
}

static void print_snapshot(int64_t since_ns) {
    printf("{\"now\":%" PRId64 ",\"rounds\":%" PRIu64 ",\"skipped\":%" PRIu64
           ",\"overruns\":%" PRIu64 ",\"unsent\":%" PRIu64 ",\"unknown\":%" PRIu64
           ",\"stray\":%" PRIu64 ",\"targets\":[",
           now_ns(), rounds, skipped, overruns(), unsent, unknown, stray_total);
    print_targets();
    printf("],\"sources\":[");
    for (int i = 0; i < source_count; i++) {
        if (i)
            putchar(',');
        print_source(&sources[i], since_ns);
    }
    printf("],\"strays\":[");
    for (int i = 0; i < stray_count; i++) {
        struct datagram *datagram = &strays[i].datagram;

        printf("%s[%" PRIu32 ",%" PRIu32 ",%" PRIu32 ",%d,%" PRId64 ",%" PRId64 "]", i ? "," : "",
               datagram->network, datagram->source, datagram->destination,
               strays[i].version ? 6 : 4, datagram->sent_ns, strays[i].received_ns);
    }
    printf("]}\n");
    stray_count = 0;
}

/* Returns what is wrong with the command. */
static const char *obey(const char *line, int port) {
    char address[64], kind[16];
    uint32_t id;
    int64_t since_ns;
    int version;

    if (sscanf(line, "add %" SCNu32 " %d %63s %15s", &id, &version, address, kind) == 4)
        return add_target(id, version == 6 ? V6 : V4, address, !strcmp(kind, "foreign"), port);
    if (sscanf(line, "del %" SCNu32, &id) == 1)
        remove_target(id);
    else if (sscanf(line, "forget %" SCNu32, &id) == 1)
        forget_source(id);
    else if (sscanf(line, "snapshot %" SCNd64, &since_ns) == 1) {
        receive_all(V4);
        receive_all(V6);
        print_snapshot(since_ns);
        return "";
    } else
        return "no such command";
    return NULL;
}

/* Returns false when stdin has ended. */
static bool read_commands(int port) {
    static char room[1 << 16];
    static size_t used;
    ssize_t got = read(STDIN_FILENO, room + used, sizeof room - used - 1);
    char *line = room, *end;

    if (got <= 0)
        return false;
    used += got;
    room[used] = 0;
    for (; (end = strchr(line, '\n')); line = end + 1) {
        *end = 0;
        const char *wrong = obey(line, port);

        if (!wrong)
            puts("{}");
        else if (*wrong)
            printf("{\"error\":\"%s\"}\n", wrong);
    }
    used -= line - room;
    memmove(room, line, used);
    fflush(stdout);
    return true;
}

static void tick(int timer) {
    uint64_t expired;

    if (read(timer, &expired, sizeof expired) != sizeof expired)
        return;
    skipped += expired - 1;
    rounds++;
    for (int version = V4; version <= V6; version++) {
        receive_all(version);
        send_round(sockets[version], &targets[version][0]);
        if (rounds % foreign_every == 0)
            send_round(sockets[version], &targets[version][1]);
    }
}

int main(int argc, char **argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: probe ID NETWORK PORT PERIOD_US FOREIGN_EVERY\n");
        return 2;
    }
    int port = atoi(argv[3]);
    int64_t period_ns = atoll(argv[4]) * 1000;
    struct timespec period = {period_ns / SECOND_NS, period_ns % SECOND_NS};
    struct itimerspec pace = {period, period};
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);

    own_id = strtoul(argv[1], NULL, 10);
    own_network = strtoul(argv[2], NULL, 10);
    foreign_every = atoi(argv[5]);
    for (int version = V4; version <= V6; version++)
        sockets[version] = open_socket(version, port);
    if (timer < 0 || foreign_every < 1 || timerfd_settime(timer, 0, &pace, NULL) < 0)
        die("timer");
    puts("{}");
    fflush(stdout);
    struct pollfd wanted[2] = {{STDIN_FILENO, POLLIN, 0}, {timer, POLLIN, 0}};

    while (poll(wanted, 2, -1) >= 0 || errno == EINTR) {
        if (wanted[1].revents)
            tick(timer);
        if (wanted[0].revents && !read_commands(port))
            return 0;
    }
    die("poll");
}
