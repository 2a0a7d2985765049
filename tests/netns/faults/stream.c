/* TCP streams whose content is checked: one process an endpoint, which sends some and receives others.
 *
 *     stream PORT PERIOD_US
 *
 * A stream is a sequence of blocks, one each period: a header with the sequence number and the hash
 * of all that the stream has carried so far, then content that no two blocks share.  So whatever is
 * lost, repeated, swapped or changed shows at the receiver.  A sender whose connection breaks makes a
 * new one, on which the sequence begins again.  Times are CLOCK_MONOTONIC.
 *
 * Commands are lines of stdin, each answered by one line of JSON on stdout:
 *
 *     open ID ADDRESS    send a stream to another endpoint
 *     close ID           end one, whichever end this is
 *     snapshot           what became of each: sent and received; and since the last snapshot the
 *                        breaks (when, errno or 0 for an end) and pauses (from, to) at the receiver
 *
 * The program ends with its stdin.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
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

#ifndef TCP_RTO_MAX_MS
#define TCP_RTO_MAX_MS 44 /* since Linux 6.15 */
#endif

enum { STREAMS = 64, EVENTS = 64, CONTENT = 1000, STDIN = 0, TIMER = 1, LISTENER = 2, FIXED = 3 };
static const uint32_t MAGIC = 0x6d6e7374;
static const int64_t SECOND_NS = 1000000000, PAUSE_NS = 500000000;
static const uint64_t HASH_START = 0xcbf29ce484222325, HASH_PRIME = 0x100000001b3; /* FNV-1a */

struct block {
    uint32_t magic, stream;
    uint64_t sequence, hash; /* of all content up to and with this block */
    char content[CONTENT];
};

struct span {
    int64_t from_ns, to_ns;
};

/* One direction of one stream; at the sender with the address to connect to, again and again. */
struct stream {
    uint32_t id; /* a receiver's is 0 until the first block says it */
    bool sends, open;
    int sock; /* -1: not connected */
    struct sockaddr_in6 address;
    socklen_t address_length;
    uint64_t sequence, hash, connects;
    struct block block;
    bool ready;  /* there is a block to send */
    size_t done; /* bytes of `block` that are sent, or have come */
};

/* What is known of a stream that is received, over all its connections. */
struct book {
    uint32_t id;
    uint64_t blocks, corrupt;
    int64_t last_ns, corrupt_ns;
    int break_count, pause_count;
    struct span breaks[EVENTS], pauses[EVENTS];
};

static struct stream streams[STREAMS];
static struct book sent_books[STREAMS], received_books[STREAMS];
static int sent_count, received_count;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * SECOND_NS + time.tv_nsec;
}

static struct book *book_of(uint32_t id, bool sends) {
    struct book *books = sends ? sent_books : received_books;
    int *count = sends ? &sent_count : &received_count;

    for (int i = 0; i < *count; i++)
        if (books[i].id == id)
            return &books[i];
    if (*count == STREAMS) {
        errno = ENOSPC;
        die("streams");
    }
    books[*count] = (struct book){.id = id};
    return &books[(*count)++];
}

static void close_book(uint32_t id, struct book *books, int *count) {
    for (int i = 0; i < *count; i++)
        if (books[i].id == id)
            books[i] = books[--*count];
}

static struct stream *new_stream(void) {
    for (int i = 0; i < STREAMS; i++)
        if (!streams[i].open) {
            streams[i] = (struct stream){.open = true, .sock = -1, .hash = HASH_START};
            return &streams[i];
        }
    errno = ENOSPC;
    die("streams");
    return NULL;
}

static void fill(struct block *block, const struct stream *stream) {
    uint64_t state = stream->hash ^ ((uint64_t)stream->id << 32) ^ stream->sequence;

    for (int i = 0; i < CONTENT; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        block->content[i] = state;
    }
}

static uint64_t hash_on(uint64_t hash, const char *content) {
    for (int i = 0; i < CONTENT; i++)
        hash = (hash ^ (unsigned char)content[i]) * HASH_PRIME;
    return hash;
}

static void broke(struct stream *stream, int reason) {
    close(stream->sock);
    stream->sock = -1;
    if (stream->id) {
        struct book *book = book_of(stream->id, stream->sends);

        if (book->break_count < EVENTS)
            book->breaks[book->break_count++] = (struct span){now_ns(), reason};
    }
    if (!stream->sends)
        stream->open = false;
}

/* ---- what is sent */

static void begin_connection(struct stream *stream) {
    int one = 1, longest_ms = 1000;

    stream->sock = socket(stream->address.sin6_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (stream->sock < 0)
        die("socket");
    setsockopt(stream->sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    /* After a fault that lost half of all, BBR paces a stream for long by what it measured then. */
    setsockopt(stream->sock, IPPROTO_TCP, TCP_CONGESTION, "cubic", strlen("cubic"));
    /* So that a stream is heard of soon after its path is whole again.  Older kernels take longer. */
    setsockopt(stream->sock, IPPROTO_TCP, TCP_RTO_MAX_MS, &longest_ms, sizeof longest_ms);
    stream->sequence = stream->done = stream->ready = 0;
    stream->hash = HASH_START;
    stream->connects++;
    if (connect(stream->sock, (void *)&stream->address, stream->address_length) < 0 &&
        errno != EINPROGRESS)
        broke(stream, errno);
}

static void next_block(struct stream *stream) {
    struct block *block = &stream->block;

    fill(block, stream);
    stream->hash = hash_on(stream->hash, block->content);
    block->magic = MAGIC;
    block->stream = stream->id;
    block->sequence = stream->sequence++;
    block->hash = stream->hash;
    stream->ready = true;
}

static void send_on(struct stream *stream) {
    if (stream->sock < 0) {
        begin_connection(stream);
        return;
    }
    if (!stream->ready)
        next_block(stream);
    ssize_t done = send(stream->sock, (char *)&stream->block + stream->done,
                        sizeof stream->block - stream->done, MSG_NOSIGNAL);

    if (done < 0) {
        if (errno != EAGAIN && errno != EINTR)
            broke(stream, errno);
        return;
    }
    stream->done += done;
    if (stream->done == sizeof stream->block) {
        struct book *book = book_of(stream->id, true);

        book->blocks++;
        book->last_ns = now_ns();
        stream->done = 0;
        stream->ready = false;
    }
}

/* ---- what is received */

static void check_block(struct stream *stream) {
    struct block *block = &stream->block;

    if (!stream->id)
        stream->id = block->stream;
    struct book *book = book_of(stream->id, false);
    int64_t now = now_ns();

    stream->hash = hash_on(stream->hash, block->content);
    if (block->magic != MAGIC || block->stream != stream->id ||
        block->sequence != stream->sequence || block->hash != stream->hash) {
        if (!book->corrupt++)
            book->corrupt_ns = now;
        broke(stream, EBADMSG);
        return;
    }
    if (book->last_ns && now - book->last_ns > PAUSE_NS && book->pause_count < EVENTS)
        book->pauses[book->pause_count++] = (struct span){book->last_ns, now};
    stream->sequence++;
    book->blocks++;
    book->last_ns = now;
}

static void receive_on(struct stream *stream) {
    while (stream->sock >= 0) {
        ssize_t got = recv(stream->sock, (char *)&stream->block + stream->done,
                           sizeof stream->block - stream->done, 0);

        if (got > 0) {
            stream->done += got;
            if (stream->done == sizeof stream->block) {
                stream->done = 0;
                check_block(stream);
            }
        } else {
            if (got == 0 || (errno != EAGAIN && errno != EINTR))
                broke(stream, got ? errno : 0);
            return;
        }
    }
}

static void accept_all(int listener) {
    int sock;

    while ((sock = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
        new_stream()->sock = sock;
}

/* ---- what is told */

static void print_spans(const char *name, const struct span *spans, int count) {
    printf(",\"%s\":[", name);
    for (int i = 0; i < count; i++)
        printf("%s[%" PRId64 ",%" PRId64 "]", i ? "," : "", spans[i].from_ns, spans[i].to_ns);
    printf("]");
}

static void print_books(const char *name, struct book *books, int count) {
    printf("\"%s\":[", name);
    for (int i = 0; i < count; i++) {
        struct book *book = &books[i];

        printf("%s{\"id\":%" PRIu32 ",\"blocks\":%" PRIu64 ",\"corrupt\":%" PRIu64
               ",\"last_ns\":%" PRId64 ",\"corrupt_ns\":%" PRId64,
               i ? "," : "", book->id, book->blocks, book->corrupt, book->last_ns, book->corrupt_ns);
        print_spans("breaks", book->breaks, book->break_count);
        print_spans("pauses", book->pauses, book->pause_count);
        putchar('}');
        book->break_count = book->pause_count = 0;
    }
    putchar(']');
}

static const char *open_stream(uint32_t id, const char *text, int port) {
    struct stream *stream = new_stream();
    struct sockaddr_in *address = (struct sockaddr_in *)&stream->address;

    stream->id = id;
    stream->sends = true;
    if (inet_pton(AF_INET, text, &address->sin_addr)) {
        address->sin_family = AF_INET;
        stream->address_length = sizeof *address;
    } else if (inet_pton(AF_INET6, text, &stream->address.sin6_addr)) {
        stream->address.sin6_family = AF_INET6;
        stream->address_length = sizeof stream->address;
    } else {
        stream->open = false;
        return "no address";
    }
    address->sin_port = htons(port);
    book_of(id, true);
    return NULL;
}

static void close_stream(uint32_t id) {
    for (int i = 0; i < STREAMS; i++)
        if (streams[i].open && streams[i].id == id) {
            if (streams[i].sock >= 0)
                close(streams[i].sock);
            streams[i].open = false;
        }
    close_book(id, sent_books, &sent_count);
    close_book(id, received_books, &received_count);
}

static void obey(const char *line, int port) {
    char address[64];
    const char *wrong = NULL;
    uint32_t id;

    if (!strcmp(line, "snapshot")) {
        printf("{\"now\":%" PRId64 ",", now_ns());
        print_books("sent", sent_books, sent_count);
        putchar(',');
        print_books("received", received_books, received_count);
        puts("}");
        return;
    }
    if (sscanf(line, "open %" SCNu32 " %63s", &id, address) == 2)
        wrong = open_stream(id, address, port);
    else if (sscanf(line, "close %" SCNu32, &id) == 1)
        close_stream(id);
    else
        wrong = "no such command";
    if (wrong)
        printf("{\"error\":\"%s\"}\n", wrong);
    else
        puts("{}");
}

/* Returns false when stdin has ended. */
static bool read_commands(int port) {
    static char room[1 << 14];
    static size_t used;
    ssize_t got = read(STDIN_FILENO, room + used, sizeof room - used - 1);
    char *line = room, *end;

    if (got <= 0)
        return false;
    used += got;
    room[used] = 0;
    for (; (end = strchr(line, '\n')); line = end + 1) {
        *end = 0;
        obey(line, port);
    }
    used -= line - room;
    memmove(room, line, used);
    fflush(stdout);
    return true;
}

static int open_listener(int port) {
    struct sockaddr_in6 here = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    int sock = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1, zero = 0;

    if (sock < 0 || setsockopt(sock, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero) < 0 ||
        setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0 ||
        bind(sock, (void *)&here, sizeof here) < 0 || listen(sock, STREAMS) < 0)
        die("listen");
    return sock;
}

static void tick(int timer) {
    uint64_t expired;

    if (read(timer, &expired, sizeof expired) != sizeof expired)
        return;
    for (int i = 0; i < STREAMS; i++)
        if (streams[i].open && streams[i].sends)
            send_on(&streams[i]);
        else if (streams[i].open)
            receive_on(&streams[i]);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: stream PORT PERIOD_US\n");
        return 2;
    }
    int port = atoi(argv[1]);
    int64_t period_ns = atoll(argv[2]) * 1000;
    struct timespec period = {period_ns / SECOND_NS, period_ns % SECOND_NS};
    struct itimerspec pace = {period, period};
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    int listener = open_listener(port);

    if (timer < 0 || timerfd_settime(timer, 0, &pace, NULL) < 0)
        die("timer");
    puts("{}");
    fflush(stdout);
    struct pollfd wanted[FIXED] = {
        [STDIN] = {STDIN_FILENO, POLLIN, 0}, [TIMER] = {timer, POLLIN, 0},
        [LISTENER] = {listener, POLLIN, 0}};

    while (poll(wanted, FIXED, -1) >= 0 || errno == EINTR) {
        if (wanted[LISTENER].revents)
            accept_all(listener);
        if (wanted[TIMER].revents)
            tick(timer);
        if (wanted[STDIN].revents && !read_commands(port))
            return 0;
    }
    die("poll");
}
