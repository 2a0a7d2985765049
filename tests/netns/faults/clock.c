/* A wall clock that can be set for one process: preloaded, it adds an offset to CLOCK_REALTIME.
 *
 *     FAULT_CLOCK=FILE LD_PRELOAD=clock.so program
 *
 * FILE holds the offset, a 64-bit number of nanoseconds, and is mapped: whoever writes to it sets the
 * clock, as settimeofday(2) does, in the middle of whatever the program is doing.  Children inherit
 * it.  pthread_cond_timedwait(3) until a time of that clock ends as it would if the machine's had been
 * set: it looks again ten times a second.  Other waits, and other clocks, are as they are.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <dlfcn.h>

static const int64_t SECOND = 1000000000, SLICE = 100000000;
static const int64_t none;
static const volatile int64_t *offset = &none;

static __attribute__((constructor)) void start(void) {
    const char *path = getenv("FAULT_CLOCK");
    int fd = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) offset = at;
    close(fd);
}

static int64_t to_ns(const struct timespec *ts) {
    return ts->tv_sec * SECOND + ts->tv_nsec;
}

static struct timespec of_ns(int64_t ns) {
    int64_t rest = (ns % SECOND + SECOND) % SECOND;
    return (struct timespec){.tv_sec = (ns - rest) / SECOND, .tv_nsec = rest};
}

int clock_gettime(clockid_t clock, struct timespec *ts) {
    if (syscall(SYS_clock_gettime, clock, ts) != 0) return -1;
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) *ts = of_ns(to_ns(ts) + *offset);
    return 0;
}

int gettimeofday(struct timeval *restrict tv, void *restrict zone) {
    struct timespec ts;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &ts);
    *tv = (struct timeval){.tv_sec = ts.tv_sec, .tv_usec = ts.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *at) {
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    if (at != NULL) *at = ts.tv_sec;
    return ts.tv_sec;
}

typedef int wait_until(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    static wait_until *real;
    if (real == NULL) real = (wait_until *)dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    /* nptl/pthread_cond_init.c: a condition that waits by CLOCK_MONOTONIC. */
    if (cond->__data.__wrefs & 2) return real(cond, mutex, until);
    struct timespec now, slice;
    clock_gettime(CLOCK_REALTIME, &now);
    bool later = until->tv_sec > now.tv_sec + 1; /* for ever, perhaps: not to be had in nanoseconds */
    int64_t left = later ? SECOND : to_ns(until) - to_ns(&now);
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &slice);
    slice = of_ns(to_ns(&slice) + (left > SLICE ? SLICE : left));
    int found = real(cond, mutex, &slice);
    /* To wake up for nothing is allowed; the caller looks and waits again. */
    return found == ETIMEDOUT && left > SLICE ? 0 : found;
}
