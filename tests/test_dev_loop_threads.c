/* SPDX-License-Identifier: MIT */
/*
 * ==== device ==== loops and threads
 *
 * Many devices in one thread with the caller's epoll, one thread for each device; stop from a signal handler; readers in
 * other threads on
 * memory that only messages reach, also while it is unmapped; completions and interrupts from other threads; the second
 * socket; DMA
 * that is never answered; busy polling. Meant for ThreadSanitizer as well.
 *
 * The client is always the main thread. Check's macros are used there alone; other threads have `need`.
 */
#include "caller.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <time.h>

#define need(condition)                                                                                                     \
    do {                                                                                                                    \
        if (!(condition)) {                                                                                                 \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                                         \
            abort();                                                                                                        \
        }                                                                                                                   \
    } while (0)

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static void start_thread(pthread_t *thread, void *(*body)(void *arg), void *arg)
{
    ck_assert_int_eq(pthread_create(thread, NULL, body, arg), 0);
}

static void join(pthread_t thread) { ck_assert_int_eq(pthread_join(thread, NULL), 0); }

/* ---- a small device ---------------------------------------------------------------------------------------------------- */

enum { BAR = 4096, VECTORS = 4, TABLE_BAR = 2 };

typedef struct box {
    vfu_dev *dev;
    uint8_t bar[BAR];
    pthread_t thread;
    _Atomic int result;  /* of vfu_dev_run */
    _Atomic unsigned served;
} box;

static int box_read(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    box *b = ctx;
    (void)region;
    memcpy(buf, b->bar + offset, len);
    atomic_fetch_add(&b->served, 1);
    return 0;
}

static int box_write(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    box *b = ctx;
    (void)region;
    memcpy(b->bar + offset, buf, len);
    atomic_fetch_add(&b->served, 1);
    return 0;
}

static vfu_dev_desc box_desc(box *b)
{
    memset(b, 0, sizeof(*b));
    return (vfu_dev_desc){
        .pci = {.vendor = 0x1234,
                .device = 1,
                .interrupt_pin = 1,
                .bar = {{.size = BAR}, {0}, {.size = 4096}},
                .msix = {.vectors = VECTORS, .table_bar = TABLE_BAR, .pba_bar = TABLE_BAR, .pba_offset = 0x800}},
        .ctx = b,
        .callbacks = {.region_read = box_read, .region_write = box_write},
        .max_data_xfer_size = 65536,
        .max_dma_maps = 64,
        .logger = {.write = ignore_log},
    };
}

static void box_create(box *b, const vfu_dev_desc *desc) { ck_assert_int_eq(vfu_dev_create(&b->dev, desc), 0); }

static void *box_run(void *arg)
{
    box *b = arg;
    atomic_store(&b->result, vfu_dev_run(b->dev));
    return NULL;
}

static void box_start(box *b)
{
    atomic_store(&b->result, 1);
    start_thread(&b->thread, box_run, b);
}

static void box_stop(box *b)
{
    vfu_dev_stop(b->dev);
    join(b->thread);
    ck_assert_int_eq(atomic_load(&b->result), 0);
    vfu_dev_destroy(b->dev);
}

/* ---- many devices in one thread ---------------------------------------------------------------------------------------- */

enum { DEVICES = 256, EPOLL_EVENTS = 32 };

typedef struct fleet {
    box boxes[DEVICES];
    vfu_pollfd watched[DEVICES][VFU_DEV_FDS]; /* what epoll knows of each */
    unsigned watched_count[DEVICES];
    int epoll, stop_fd;
    unsigned left; /* devices whose client has left */
    bool gone[DEVICES];
    pthread_t thread;
} fleet;

/* Tells epoll what device i wants now. A descriptor that it had may be closed, and its number used again. */
static void watch(fleet *f, uint32_t i)
{
    vfu_pollfd wanted[VFU_DEV_FDS];
    unsigned count = vfu_dev_fds(f->boxes[i].dev, wanted);
    bool same = count == f->watched_count[i];
    for (unsigned k = 0; same && k < count; k++)
        same = wanted[k].fd == f->watched[i][k].fd && wanted[k].events == f->watched[i][k].events;
    if (same)
        return;
    for (unsigned k = 0; k < f->watched_count[i]; k++)
        epoll_ctl(f->epoll, EPOLL_CTL_DEL, f->watched[i][k].fd, NULL);
    for (unsigned k = 0; k < count; k++) {
        struct epoll_event e = {.events = (wanted[k].events & POLLIN ? EPOLLIN : 0u) |
                                          (wanted[k].events & POLLOUT ? EPOLLOUT : 0u)};
        e.data.u32 = i;
        need(epoll_ctl(f->epoll, EPOLL_CTL_ADD, wanted[k].fd, &e) == 0);
    }
    memcpy(f->watched[i], wanted, sizeof(wanted));
    f->watched_count[i] = count;
}

static void poll_device(fleet *f, uint32_t i)
{
    if (vfu_dev_poll(f->boxes[i].dev) == 0) {
        watch(f, i);
    } else if (!f->gone[i]) { /* its descriptors leave epoll when they are closed, but for the one that is always there */
        f->gone[i] = true;
        f->left++;
        watch(f, i);
    }
}

static void *fleet_run(void *arg)
{
    fleet *f = arg;
    struct epoll_event events[EPOLL_EVENTS];
    for (uint32_t i = 0; i < DEVICES; i++)
        watch(f, i);
    while (f->left < DEVICES) {
        int timeout = -1;
        for (uint32_t i = 0; i < DEVICES; i++) {
            int t = vfu_dev_timeout(f->boxes[i].dev);
            timeout = t >= 0 && (timeout < 0 || t < timeout) ? t : timeout;
        }
        int count = epoll_wait(f->epoll, events, EPOLL_EVENTS, timeout);
        need(count >= 0 || errno == EINTR);
        for (int k = 0; k < count; k++)
            poll_device(f, events[k].data.u32);
        for (uint32_t i = 0; i < DEVICES && timeout == 0; i++)
            if (vfu_dev_timeout(f->boxes[i].dev) == 0)
                poll_device(f, i);
    }
    return NULL;
}

/* Each client talks to its own device and to no other, however their messages are mixed. */
START_TEST(many_devices_in_one_thread)
{
    enum { ROUNDS = 6 };
    static fleet f;
    static caller callers[DEVICES];
    static uint16_t ids[DEVICES][2];
    chance c = seeded(1);
    struct rlimit limit;
    must(getrlimit(RLIMIT_NOFILE, &limit));
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit); /* 768 are needed */
    f.epoll = epoll_create1(EPOLL_CLOEXEC);
    must(f.epoll);
    for (unsigned i = 0; i < DEVICES; i++) {
        vfu_dev_desc desc = box_desc(&f.boxes[i]);
        box_create(&f.boxes[i], &desc);
        caller_attach(&callers[i], f.boxes[i].dev);
    }
    start_thread(&f.thread, fleet_run, &f);
    for (unsigned i = 0; i < DEVICES; i++)
        say_hello(&callers[i], NULL);
    for (unsigned round = 0; round < ROUNDS; round++) {
        unsigned first = below(&c, DEVICES);
        for (unsigned k = 0; k < DEVICES; k++) { /* all ask, in some order; then all are answered, in another */
            unsigned i = (first + k * 77) % DEVICES;
            uint32_t value = i << 8 | round;
            vfu_msg w = access_of(VFU_CMD_REGION_WRITE, 0, 8 * round, &value, 4),
                    r = access_of(VFU_CMD_REGION_READ, 0, 8 * round, NULL, 4);
            ids[i][0] = post(&callers[i], &w, NULL, 0);
            ids[i][1] = post(&callers[i], &r, NULL, 0);
        }
        for (unsigned i = 0; i < DEVICES; i++) {
            uint32_t value;
            ck_assert_int_eq(await(&callers[i], ids[i][0]), 0);
            ck_assert_int_eq(await(&callers[i], ids[i][1]), 0);
            memcpy(&value, callers[i].reply.u.region.data, 4);
            ck_assert_uint_eq(value, i << 8 | round);
        }
    }
    for (unsigned i = 0; i < DEVICES; i++)
        peer_close(&callers[(i * 91) % DEVICES].p);
    join(f.thread);
    for (unsigned i = 0; i < DEVICES; i++) {
        ck_assert_uint_eq(atomic_load(&f.boxes[i].served), 2 * ROUNDS);
        vfu_dev_destroy(f.boxes[i].dev);
    }
    close(f.epoll);
}
END_TEST

/* ---- one thread for each device ---------------------------------------------------------------------------------------- */

/* Devices that run by themselves serve one client after the other, and stop when told. */
START_TEST(one_thread_per_device)
{
    enum { BOXES = 12, CLIENTS = 3 };
    static box boxes[BOXES];
    struct sockaddr_un addresses[BOXES];
    socklen_t lens[BOXES];
    unsigned fds = fds_open();
    for (unsigned i = 0; i < BOXES; i++) {
        vfu_dev_desc desc = box_desc(&boxes[i]);
        box_create(&boxes[i], &desc);
        ck_assert_int_eq(vfu_dev_attach(boxes[i].dev, listener(&addresses[i], &lens[i])), 0);
        box_start(&boxes[i]);
    }
    for (unsigned round = 0; round < CLIENTS; round++) {
        static caller callers[BOXES];
        for (unsigned i = 0; i < BOXES; i++) {
            callers[i] = (caller){.p = {.sock = connect_to(&addresses[i], lens[i])}};
            say_hello(&callers[i], NULL);
        }
        for (uint32_t i = 0; i < BOXES; i++) {
            uint32_t value = i * 1000 + round, back;
            if (round) { /* the device's own state has stayed */
                get(&callers[i], 0, 64, &back, 4);
                ck_assert_uint_eq(back, value - 1);
            }
            put(&callers[i], 0, 64, &value, 4);
        }
        for (unsigned i = 0; i < BOXES; i++)
            peer_close(&callers[i].p);
    }
    for (unsigned i = 0; i < BOXES; i++)
        box_stop(&boxes[i]);
    ck_assert_uint_eq(fds_open(), fds);
}
END_TEST

/* A connected socket that was attached: run ends when its client leaves. */
START_TEST(run_ends_with_the_client)
{
    box b;
    caller c;
    vfu_dev_desc desc = box_desc(&b);
    box_create(&b, &desc);
    caller_attach(&c, b.dev);
    box_start(&b);
    say_hello(&c, NULL);
    sync_up(&c);
    peer_close(&c.p);
    join(b.thread);
    ck_assert_int_eq(atomic_load(&b.result), -ENOTCONN);
    vfu_dev_destroy(b.dev);
}
END_TEST

/* ---- stop -------------------------------------------------------------------------------------------------------------- */

static vfu_dev *signalled_dev;
static _Atomic unsigned rounds_run;
static atomic_bool finished;

static void stop_on_signal(int number)
{
    int saved = errno;
    (void)number;
    errno = 77;
    vfu_dev_stop(signalled_dev);
    if (errno != 77)
        abort();
    errno = saved;
}

static void handle(int number, void (*handler)(int))
{
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = handler; /* no SA_RESTART */
    must(sigaction(number, &action, NULL));
}

static void *run_again_and_again(void *arg)
{
    box *b = arg;
    while (!atomic_load(&finished)) {
        need(vfu_dev_run(b->dev) == 0);
        atomic_fetch_add(&rounds_run, 1);
    }
    return NULL;
}

static void wait_for_round(unsigned round)
{
    uint64_t until = now_us() + PATIENCE_MS * UINT64_C(1000);
    while (atomic_load(&rounds_run) < round) {
        ck_assert(now_us() < until);
        sched_yield();
    }
}

/* The handler may interrupt it anywhere: while it sleeps, while it handles messages, before it has begun. */
START_TEST(stop_from_a_signal_handler)
{
    enum { ROUNDS = 300 };
    static box b;
    struct sockaddr_un address;
    socklen_t len;
    caller c = {.p = {.sock = -1}};
    vfu_dev_desc desc = box_desc(&b);
    box_create(&b, &desc);
    ck_assert_int_eq(vfu_dev_attach(b.dev, listener(&address, &len)), 0);
    signalled_dev = b.dev;
    handle(SIGUSR1, stop_on_signal);
    start_thread(&b.thread, run_again_and_again, &b);
    c.p.sock = connect_to(&address, len);
    say_hello(&c, NULL);
    for (unsigned round = 1; round <= ROUNDS; round++) {
        vfu_msg m = access_of(VFU_CMD_REGION_READ, 0, 0, NULL, 8);
        uint16_t id = post(&c, &m, NULL, 0);
        ck_assert_int_eq(pthread_kill(b.thread, SIGUSR1), 0);
        wait_for_round(round);
        ck_assert_int_eq(await(&c, id), 0); /* the next run goes on where this one has stopped */
    }
    atomic_store(&finished, true);
    ck_assert_int_eq(pthread_kill(b.thread, SIGUSR1), 0);
    join(b.thread);
    peer_close(&c.p);
    vfu_dev_destroy(b.dev);
}
END_TEST

static void ignore_signal(int number) { (void)number; }

static void *fire_signals(void *arg)
{
    pthread_t *target = arg;
    while (!atomic_load(&finished)) {
        need(pthread_kill(*target, SIGUSR2) == 0);
        sched_yield();
    }
    return NULL;
}

/* System calls that are interrupted all the time change nothing. */
START_TEST(signals_while_serving)
{
    static box b;
    caller c;
    pthread_t firing;
    uint8_t sent[512], back[512];
    vfu_dev_desc desc = box_desc(&b);
    box_create(&b, &desc);
    caller_attach(&c, b.dev);
    handle(SIGUSR2, ignore_signal);
    box_start(&b);
    say_hello(&c, NULL);
    start_thread(&firing, fire_signals, &b.thread);
    for (unsigned i = 0; i < 400; i++) {
        memset(sent, (int)i, sizeof(sent));
        put(&c, 0, i, sent, sizeof(sent));
        get(&c, 0, i, back, sizeof(back));
        ck_assert_mem_eq(sent, back, sizeof(sent));
    }
    atomic_store(&finished, true);
    join(firing);
    box_stop(&b);
    peer_close(&c.p);
}
END_TEST

/* Stopped before it has begun: run returns at once, and the next one doesn't. */
START_TEST(stop_before_run)
{
    static box b;
    caller c;
    vfu_dev_desc desc = box_desc(&b);
    box_create(&b, &desc);
    caller_attach(&c, b.dev);
    vfu_dev_stop(b.dev);
    vfu_dev_stop(b.dev);
    ck_assert_int_eq(vfu_dev_run(b.dev), 0);
    box_start(&b);
    say_hello(&c, NULL);
    box_stop(&b);
    peer_close(&c.p);
}
END_TEST

/* ---- wake-ups ---------------------------------------------------------------------------------------------------------- */

static _Atomic unsigned asked_round, done_round;

static void *wake_again_and_again(void *arg)
{
    box *b = arg;
    for (unsigned round = 1;; round++) {
        while (atomic_load(&asked_round) < round)
            sched_yield();
        if (atomic_load(&finished))
            return NULL;
        vfu_dev_stop(b->dev);
        atomic_store(&done_round, round);
    }
}

/* When another thread has woken it and the device was polled once more, nothing is left that would end the next wait. */
START_TEST(wake_ups_leave_nothing_behind)
{
    static box b;
    struct sockaddr_un address;
    socklen_t len;
    pthread_t waking;
    uint64_t until = now_us() + 400000;
    vfu_dev_desc desc = box_desc(&b);
    box_create(&b, &desc);
    ck_assert_int_eq(vfu_dev_attach(b.dev, listener(&address, &len)), 0);
    start_thread(&waking, wake_again_and_again, &b);
    for (unsigned round = 1; round <= 20000 && (now_us() < until || round < 10); round++) {
        vfu_pollfd wanted[VFU_DEV_FDS];
        atomic_store(&asked_round, round);
        while (atomic_load(&done_round) < round)
            if (vfu_dev_poll(b.dev))
                ck_abort();
        if (vfu_dev_poll(b.dev))
            ck_abort();
        unsigned count = vfu_dev_fds(b.dev, wanted);
        for (unsigned i = 0; i < count; i++) {
            struct pollfd ready = {.fd = wanted[i].fd, .events = wanted[i].events};
            if (poll(&ready, 1, 0))
                ck_abort_msg("round %u: descriptor %u is ready though nothing is to be done", round, i);
        }
    }
    atomic_store(&finished, true);
    atomic_store(&asked_round, UINT32_MAX);
    join(waking);
    vfu_dev_destroy(b.dev);
}
END_TEST

/* ---- completion from other threads ------------------------------------------------------------------------------------- */

enum { WORKERS = 3 };

/* One request at a time waits for whichever worker comes first. */
typedef struct office {
    box b; /* first, so that the box's callbacks could serve it too */
    pthread_mutex_t lock;
    pthread_cond_t news;
    bool closing;
    uint64_t ticket; /* 0: nothing to do */
    uint64_t offset;
    size_t len; /* of a read; 0: a write */
    pthread_t workers[WORKERS];
} office;

static void *work_in_office(void *arg)
{
    office *o = arg;
    uint8_t data[256];
    pthread_mutex_lock(&o->lock);
    while (!o->closing) {
        if (!o->ticket) {
            pthread_cond_wait(&o->news, &o->lock);
            continue;
        }
        uint64_t ticket = o->ticket, offset = o->offset;
        size_t len = o->len;
        o->ticket = 0;
        pthread_mutex_unlock(&o->lock);
        for (size_t i = 0; i < len; i++)
            data[i] = (uint8_t)(offset * 3 + i);
        int result = offset % 7 == 3 ? -EPERM : 0;
        int err = vfu_dev_complete(o->b.dev, ticket, result, len && !result ? data : NULL, result ? 0 : len);
        need(err == 0 || err == -ECANCELED);
        pthread_mutex_lock(&o->lock);
    }
    pthread_mutex_unlock(&o->lock);
    return NULL;
}

static int hand_over(office *o, uint64_t offset, size_t len)
{
    uint64_t ticket = vfu_dev_ticket(o->b.dev);
    pthread_mutex_lock(&o->lock);
    o->ticket = ticket;
    o->offset = offset;
    o->len = len;
    pthread_cond_signal(&o->news);
    pthread_mutex_unlock(&o->lock);
    return VFU_PENDING;
}

static int office_read(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    (void)region, (void)buf;
    return hand_over(ctx, offset, len);
}

static int office_write(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    (void)region, (void)buf, (void)len;
    return hand_over(ctx, offset, 0);
}

static void open_office(office *o, struct sockaddr_un *address, socklen_t *len)
{
    vfu_dev_desc desc = box_desc(&o->b);
    desc.ctx = o;
    desc.callbacks.region_read = office_read;
    desc.callbacks.region_write = office_write;
    pthread_mutex_init(&o->lock, NULL);
    pthread_cond_init(&o->news, NULL);
    box_create(&o->b, &desc);
    ck_assert_int_eq(vfu_dev_attach(o->b.dev, listener(address, len)), 0);
    box_start(&o->b);
    for (unsigned i = 0; i < WORKERS; i++)
        start_thread(&o->workers[i], work_in_office, o);
}

static void close_office(office *o)
{
    pthread_mutex_lock(&o->lock);
    o->closing = true;
    pthread_cond_broadcast(&o->news);
    pthread_mutex_unlock(&o->lock);
    for (unsigned i = 0; i < WORKERS; i++)
        join(o->workers[i]);
    box_stop(&o->b);
}

/* Bursts of requests that other threads complete: answered in order, each with its own data. */
START_TEST(completion_from_other_threads)
{
    enum { BURSTS = 20, BURST = 40 };
    static office o;
    struct sockaddr_un address;
    socklen_t len;
    open_office(&o, &address, &len);
    caller c = {.p = {.sock = connect_to(&address, len)}};
    say_hello(&c, NULL);
    for (unsigned burst = 0; burst < BURSTS; burst++) {
        uint16_t first = (uint16_t)(c.id + 1);
        for (uint32_t i = 0; i < BURST; i++) {
            uint8_t byte = 1;
            vfu_msg m = i % 3 ? access_of(VFU_CMD_REGION_READ, 0, burst + i, NULL, 1 + i)
                              : access_of(VFU_CMD_REGION_WRITE, 0, burst + i, &byte, 1);
            post(&c, &m, NULL, 0);
        }
        for (uint32_t i = 0; i < BURST; i++) {
            ck_assert_int_eq(await(&c, (uint16_t)(first + i)), (burst + i) % 7 == 3 ? -EPERM : 0);
            if (i % 3 == 0 || (burst + i) % 7 == 3)
                continue;
            ck_assert_uint_eq(c.reply.u.region.count, 1 + i);
            for (uint32_t k = 0; k < 1 + i; k++)
                ck_assert_uint_eq(c.reply.u.region.data[k], (uint8_t)((burst + i) * 3 + k));
        }
    }
    peer_close(&c.p);
    close_office(&o);
}
END_TEST

/* Clients that leave while a request is being completed, over and over: nothing is answered to the wrong one. */
START_TEST(clients_leave_during_completion)
{
    enum { CLIENTS = 60 };
    static office o;
    struct sockaddr_un address;
    socklen_t len;
    open_office(&o, &address, &len);
    for (uint32_t i = 0; i < CLIENTS; i++) {
        caller c = {.p = {.sock = connect_to(&address, len)}};
        say_hello(&c, NULL);
        uint32_t offset = (i * 7) % 2000; /* none that is refused */
        vfu_msg m = access_of(VFU_CMD_REGION_READ, 0, offset, NULL, 8);
        uint16_t id = post(&c, &m, NULL, 0);
        if (i % 2) {
            ck_assert_int_eq(await(&c, id), 0);
            ck_assert_uint_eq(c.reply.u.region.data[0], (uint8_t)(offset * 3));
        }
        peer_close(&c.p);
    }
    close_office(&o);
}
END_TEST

/* ---- readers in other threads ------------------------------------------------------------------------------------------ */

enum { READERS = 3, SLICE = 16384 };
static const uint64_t window = UINT64_C(1) << 20, window_size = READERS * SLICE;

typedef struct reading {
    box *b;
    unsigned number;
    pthread_t thread;
    _Atomic unsigned good, refused; /* accesses */
    int last;                       /* result of the last one; when the thread has ended */
} reading;

/* Writes to its slice and reads it back, by message. */
static void *write_and_read_back(void *arg)
{
    reading *r = arg;
    vfu_iommu_reader *reader;
    chance c = seeded(r->number + 1);
    uint8_t sent[3000], back[3000];
    need(vfu_iommu_reader_open(vfu_dev_iommu(r->b->dev), &reader) == 0);
    for (unsigned i = 0; i < 60; i++) {
        size_t len = 1 + below(&c, sizeof(sent));
        uint64_t iova = window + r->number * SLICE + below(&c, SLICE - (uint32_t)len);
        for (size_t k = 0; k < len; k++)
            sent[k] = (uint8_t)(draw(&c) | 1);
        need(vfu_iommu_write(reader, iova, sent, len) == 0);
        need(vfu_iommu_read(reader, iova, back, len) == 0);
        need(memcmp(sent, back, len) == 0);
        uint64_t value = 0;
        need(vfu_iommu_store(reader, iova & ~UINT64_C(7), 4, VFU_IOMMU_RELAXED, 0x01020304 + i) == 0);
        need(vfu_iommu_load(reader, iova & ~UINT64_C(7), 4, VFU_IOMMU_RELAXED, &value) == 0);
        need(value == 0x01020304 + i);
        atomic_fetch_add(&r->good, 1);
    }
    vfu_iommu_reader_close(reader);
    return NULL;
}

static reading readings[READERS];

static void start_readings(box *b, void *(*body)(void *arg))
{
    for (unsigned i = 0; i < READERS; i++) {
        readings[i] = (reading){.b = b, .number = i};
        start_thread(&readings[i].thread, body, &readings[i]);
    }
}

/* Several threads of the device, and the client's own requests in between. */
START_TEST(readers_on_message_memory)
{
    static box b;
    caller c;
    vfu_dev_desc desc = box_desc(&b);
    box_create(&b, &desc);
    caller_attach(&c, b.dev);
    box_start(&b);
    say_hello(&c, NULL);
    make_memory(&c, window, window_size);
    vfu_msg m = map_of(window, window_size);
    ck_assert_int_eq(call(&c, &m), 0);
    start_readings(&b, write_and_read_back);
    unsigned done = 0;
    for (uint32_t i = 0; done < READERS * 60; i++) {
        uint32_t back;
        put(&c, 0, 0, &i, 4); /* answers what comes meanwhile */
        get(&c, 0, 0, &back, 4);
        ck_assert_uint_eq(back, i);
        done = 0;
        for (unsigned k = 0; k < READERS; k++)
            done += atomic_load(&readings[k].good);
    }
    for (unsigned i = 0; i < READERS; i++)
        join(readings[i].thread);
    ck_assert_uint_gt(c.messages, 0);
    box_stop(&b);
    caller_close(&c);
}
END_TEST

/* Reads until told to end; what it gets is right or refused. */
static void *read_whatever_comes(void *arg)
{
    reading *r = arg;
    vfu_iommu_reader *reader;
    chance c = seeded(r->number + 10);
    uint8_t buf[3000];
    need(vfu_iommu_reader_open(vfu_dev_iommu(r->b->dev), &reader) == 0);
    while (!atomic_load(&finished)) {
        size_t len = 1 + below(&c, sizeof(buf));
        uint64_t iova = window + below(&c, (uint32_t)(window_size - len));
        int err = vfu_iommu_read(reader, iova, buf, len);
        need(err == 0 || err == -ENOENT);
        if (err)
            sched_yield();
        for (size_t i = 0; i < len && !err; i++)
            need(buf[i] == (iova + i) % 251 + 1);
        atomic_fetch_add(err ? &r->refused : &r->good, 1);
    }
    vfu_iommu_reader_close(reader);
    return NULL;
}

static void hold_some(caller *c, unsigned count)
{
    c->hold = true;
    while (c->held_count < count)
        ck_assert(!take_message(c, &c->p));
}

/* Answers what is held; with bad bytes if it is too late, since nobody may look at them. */
static void answer_held(caller *c, bool late)
{
    static uint8_t wrong[65536];
    uint8_t *memory = c->memory;
    memset(wrong, 0xee, sizeof(wrong));
    ck_assert_uint_le(c->size, sizeof(wrong));
    c->memory = late ? wrong : memory;
    for (unsigned i = 0; i < c->held_count; i++)
        answer_dma(c, &c->held[i], 0);
    c->memory = memory;
    c->held_count = 0;
}

/* The memory is unmapped while threads wait for its messages: they are let go, and from the reply on no message asks for it. */
START_TEST(unmap_under_readers)
{
    enum { ROUNDS = 60 };
    static box b;
    caller c;
    vfu_dev_desc desc = box_desc(&b);
    box_create(&b, &desc);
    caller_attach(&c, b.dev);
    box_start(&b);
    say_hello(&c, NULL);
    make_memory(&c, window, window_size);
    start_readings(&b, read_whatever_comes);
    for (unsigned round = 0; round < ROUNDS; round++) {
        vfu_msg map = map_of(window, window_size / 2), map_2 = map_of(window + window_size / 2, window_size / 2);
        vfu_msg unmap = unmap_of(round % 4 ? window : 0, round % 4 ? window_size : UINT64_C(1) << 40);
        ck_assert_int_eq(call(&c, &map), 0);
        ck_assert_int_eq(call(&c, &map_2), 0);
        hold_some(&c, 1 + round % READERS);
        if (round % 3 == 0)
            answer_held(&c, false); /* so that some get what they want */
        if (round % 3 == 1)
            hold_some(&c, 1);
        ck_assert_int_eq(call(&c, &unmap), 0);
        unsigned held = c.held_count;
        sync_up(&c);
        sync_up(&c);
        ck_assert_uint_eq(c.held_count, held); /* nothing came behind the reply */
        if (round % 2)
            answer_held(&c, true);
        c.held_count = 0;
        c.hold = false;
    }
    atomic_store(&finished, true);
    unsigned good = 0, refused = 0;
    for (unsigned i = 0; i < READERS; i++) {
        join(readings[i].thread);
        good += atomic_load(&readings[i].good);
        refused += atomic_load(&readings[i].refused);
    }
    ck_assert_uint_gt(good, 0);
    ck_assert_uint_gt(refused, 0);
    box_stop(&b);
    caller_close(&c);
}
END_TEST

/* One access, which the client doesn't answer. */
static void *read_once(void *arg)
{
    reading *r = arg;
    vfu_iommu_reader *reader;
    uint8_t buf[100];
    need(vfu_iommu_reader_open(vfu_dev_iommu(r->b->dev), &reader) == 0);
    r->last = vfu_iommu_read(reader, window + r->number * SLICE, buf, sizeof(buf));
    vfu_iommu_reader_close(reader);
    return NULL;
}

/* Whatever ends a transfer ends the wait of the threads, too; and the device serves on. */
START_TEST(waits_end)
{
    static const struct {
        const char *name;
        enum { LEAVE, RESET, UNMAP_ALL, REFUSE, TIMEOUT } how;
        int results[2]; /* what the access may get */
    } cases[] = {
        {"the client leaves", LEAVE, {-ENOTCONN, -ENOENT}}, {"a reset", RESET, {-ECANCELED, -ECANCELED}},
        {"unmap all", UNMAP_ALL, {-ENOENT, -ENOENT}},       {"the client refuses", REFUSE, {-EIO, -EIO}},
        {"no answer", TIMEOUT, {-ETIMEDOUT, -ETIMEDOUT}},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        static box b;
        struct sockaddr_un address;
        socklen_t len;
        vfu_dev_desc desc = box_desc(&b);
        desc.dma_timeout_ms = cases[i].how == TIMEOUT ? 10 : 0;
        box_create(&b, &desc);
        ck_assert_int_eq(vfu_dev_attach(b.dev, listener(&address, &len)), 0);
        box_start(&b);
        for (unsigned round = 0; round < 5; round++) {
            caller c = {.p = {.sock = connect_to(&address, len)}};
            say_hello(&c, NULL);
            make_memory(&c, window, window_size);
            vfu_msg map = map_of(window, window_size), reset = command(VFU_CMD_DEVICE_RESET), unmap = unmap_of(0, 0);
            unmap.u.dma_unmap.flags = VFU_DMA_UNMAP_ALL;
            ck_assert_int_eq(call(&c, &map), 0);
            start_readings(&b, read_once);
            hold_some(&c, READERS);
            switch (cases[i].how) {
            case LEAVE: peer_close(&c.p); break;
            case RESET: ck_assert_int_eq(call(&c, &reset), 0); break;
            case UNMAP_ALL: ck_assert_int_eq(call(&c, &unmap), 0); break;
            case REFUSE:
                for (unsigned k = 0; k < c.held_count; k++)
                    answer_dma(&c, &c.held[k], EFAULT);
                break;
            default: break;
            }
            for (unsigned k = 0; k < READERS; k++) {
                join(readings[k].thread);
                ck_assert_msg(readings[k].last == cases[i].results[0] || readings[k].last == cases[i].results[1], "%s: %d",
                              cases[i].name, readings[k].last);
            }
            if (cases[i].how != LEAVE) {
                answer_held(&c, true); /* nobody waits for it */
                sync_up(&c);
            }
            caller_close(&c);
        }
        box_stop(&b);
    }
}
END_TEST

/* Reads until it is refused at once, which happens while the client's reset or its end is handled. Before that, one that is under
 * way fails in its own way. */
static void *read_until_refused(void *arg)
{
    reading *r = arg;
    vfu_iommu_reader *reader;
    uint8_t buf[100];
    need(vfu_iommu_reader_open(vfu_dev_iommu(r->b->dev), &reader) == 0);
    while (vfu_iommu_read(reader, window + r->number * SLICE, buf, sizeof(buf)) != -ENOENT) {
    }
    vfu_iommu_reader_close(reader);
    atomic_fetch_add(&r->refused, 1);
    return NULL;
}

static void wait_for_readings(void *ctx)
{
    (void)ctx;
    for (unsigned i = 0; i < READERS; i++)
        while (!atomic_load(&readings[i].refused))
            sched_yield();
}

static void reset_waits(void *ctx, vfu_reset_kind kind)
{
    (void)kind;
    wait_for_readings(ctx);
}

/* The callbacks reset and disconnected wait for threads whose accesses the client answers, or doesn't answer, any more. */
START_TEST(callbacks_wait_for_readers)
{
    for (unsigned i = 0; i < 40; i++) {
        static box b;
        struct sockaddr_un address;
        socklen_t len;
        vfu_dev_desc desc = box_desc(&b);
        bool leaves = i % 2, answers = i % 4 < 2;
        desc.callbacks.reset = reset_waits;
        desc.callbacks.disconnected = leaves ? wait_for_readings : NULL;
        box_create(&b, &desc);
        ck_assert_int_eq(vfu_dev_attach(b.dev, listener(&address, &len)), 0);
        box_start(&b);
        caller c = {.p = {.sock = connect_to(&address, len)}};
        say_hello(&c, NULL);
        make_memory(&c, window, window_size);
        vfu_msg map = map_of(window, window_size), reset = command(VFU_CMD_DEVICE_RESET);
        ck_assert_int_eq(call(&c, &map), 0);
        start_readings(&b, read_until_refused);
        while (answers && c.messages < 10)
            ck_assert(!take_message(&c, &c.p));
        if (!answers)
            hold_some(&c, READERS);
        if (leaves)
            peer_close(&c.p);
        else
            ck_assert_int_eq(call(&c, &reset), 0);
        for (unsigned k = 0; k < READERS; k++)
            join(readings[k].thread);
        if (!leaves) { /* and everything is as before */
            c.held_count = 0;
            c.hold = false;
            start_readings(&b, read_once);
            for (unsigned k = 0; k < READERS; k++)
                ck_assert(!take_message(&c, &c.p));
            for (unsigned k = 0; k < READERS; k++) {
                join(readings[k].thread);
                ck_assert_int_eq(readings[k].last, 0);
            }
        }
        caller_close(&c);
        box_stop(&b);
    }
}
END_TEST

/* ---- interrupts from other threads ------------------------------------------------------------------------------------- */

static _Atomic unsigned raised;

static void *raise_for_ever(void *arg)
{
    box *b = arg;
    for (unsigned i = 0; !atomic_load(&finished); i++) {
        int err = vfu_dev_raise(b->dev, VFU_PCI_IRQ_MSIX, i % VECTORS);
        need(err == 0 || err == -ENOENT);
        atomic_fetch_add(&raised, !err);
    }
    return NULL;
}

/* Eventfds come and go under threads that raise: from the reply to their removal on none is signalled. */
START_TEST(raise_while_eventfds_change)
{
    enum { RAISERS = 3, ROUNDS = 60 };
    static box b;
    caller c;
    pthread_t raisers[RAISERS];
    vfu_dev_desc desc = box_desc(&b);
    box_create(&b, &desc);
    caller_attach(&c, b.dev);
    box_start(&b);
    say_hello(&c, NULL);
    for (unsigned i = 0; i < RAISERS; i++)
        start_thread(&raisers[i], raise_for_ever, &b);
    for (unsigned round = 0; round < ROUNDS || atomic_load(&raised) == 0; round++) {
        int fds[VECTORS], removed[VECTORS];
        uint32_t start = round % VECTORS, count = VECTORS - start;
        for (unsigned i = 0; i < count; i++)
            fds[i] = event();
        ck_assert_int_eq(assign(&c, VFU_PCI_IRQ_MSIX, start, count, fds), 0);
        ck_assert_int_eq(assign(&c, VFU_PCI_IRQ_MSIX, start, count, NULL), 0);
        memcpy(removed, fds, sizeof(fds));
        for (unsigned i = 0; i < count; i++)
            signals(removed[i]);
        sync_up(&c);
        for (unsigned i = 0; i < count; i++)
            ck_assert_uint_eq(signals(removed[i]), 0);
        close_fds(removed, count);
    }
    atomic_store(&finished, true);
    for (unsigned i = 0; i < RAISERS; i++)
        join(raisers[i]);
    box_stop(&b);
    peer_close(&c.p);
}
END_TEST

static void *raise_once_per_round(void *arg)
{
    box *b = arg;
    for (unsigned round = 1;; round++) {
        while (atomic_load(&asked_round) < round)
            sched_yield();
        if (atomic_load(&finished))
            return NULL;
        need(vfu_dev_raise(b->dev, VFU_PCI_IRQ_MSIX, 1) == 0);
        atomic_store(&done_round, round);
    }
}

/* A vector is raised by one thread while the client masks and unmasks it: raised once, delivered once. */
START_TEST(masks_lose_no_interrupt)
{
    static box b;
    caller c;
    pthread_t raiser;
    uint64_t until = now_us() + 400000;
    vfu_dev_desc desc = box_desc(&b);
    desc.policy.msix_masks = true;
    box_create(&b, &desc);
    caller_attach(&c, b.dev);
    box_start(&b);
    say_hello(&c, NULL);
    int fd = event();
    uint8_t enable[2] = {0, 0x80};
    ck_assert_int_eq(assign(&c, VFU_PCI_IRQ_MSIX, 1, 1, &fd), 0);
    put(&c, VFU_PCI_REGION_CONFIG, vfu_pci_capability(vfu_dev_pci(b.dev), 0x11) + 2u, enable, 2);
    start_thread(&raiser, raise_once_per_round, &b);
    for (unsigned round = 1; round <= 2000 && (now_us() < until || round < 10); round++) {
        static const uint8_t masked = 1, unmasked = 0;
        atomic_store(&asked_round, round);
        do {
            put(&c, TABLE_BAR, 16 + 12, &masked, 1);
            put(&c, TABLE_BAR, 16 + 12, &unmasked, 1);
        } while (atomic_load(&done_round) < round);
        put(&c, TABLE_BAR, 16 + 12, &unmasked, 1);
        ck_assert_uint_eq(signals(fd), 1);
    }
    atomic_store(&finished, true);
    atomic_store(&asked_round, UINT32_MAX);
    join(raiser);
    close(fd);
    box_stop(&b);
    peer_close(&c.p);
}
END_TEST

/* ---- the second socket ------------------------------------------------------------------------------------------------- */

static int transfer_result;
static void transfer_done(vfu_dma *dma, int result)
{
    (void)dma;
    transfer_result = result;
}

static const char twin_json[] = "{\"capabilities\":{\"max_msg_fds\":16,\"twin_socket\":{\"supported\":true}}}";

/* Opens a rig that offers it and takes the client's end, -1: it got none. The VERSION reply is in r->reply. */
static int open_twin(rig *r, bool offered, const char *json)
{
    vfu_dev_desc desc = rig_desc(r);
    desc.twin_socket = offered;
    rig_create(r, &desc);
    rig_connect(r);
    ck_assert_int_eq(ask_version(r, json), 0);
    ck_assert_uint_le(r->client.have, 200); /* QEMU's limit */
    if (!r->client.fd_count)
        return -1;
    ck_assert_uint_eq(r->client.fd_count, 1);
    int fd = r->client.fds[0];
    r->client.fds[0] = -1;
    return fd;
}

START_TEST(twin_socket_is_negotiated)
{
    static const struct {
        bool offered;
        const char *json;
        bool got;
    } cases[] = {
        {true, twin_json, true},
        {false, twin_json, false},
        {true, NULL, false},
        {true, "{\"capabilities\":{\"max_msg_fds\":16,\"twin_socket\":{\"supported\":false}}}", false},
        {true, "{\"capabilities\":{\"twin_socket\":{}}}", false},
        {true, "{\"capabilities\":{\"max_msg_fds\":0,\"twin_socket\":{\"supported\":true}}}", false},
        {true, "{\"capabilities\":{\"twin_socket\":{\"supported\":true,\"fd_index\":3},\"write_multiple\":true}}", true},
    };
    static rig r;
    unsigned fds = fds_open();
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_caps caps;
        int fd = open_twin(&r, cases[i].offered, cases[i].json);
        ck_assert_int_eq(fd >= 0, cases[i].got);
        ck_assert_int_eq(vfu_caps_parse(r.reply.u.version.json, r.reply.u.version.json_len, &caps), 0);
        ck_assert_int_eq(caps.twin_socket, cases[i].got);
        ck_assert_int_eq(caps.twin_fd_index, cases[i].got ? 0 : -1);
        if (fd >= 0)
            ck_assert(is_cloexec(fd));
        check_healthy(&r);
        close_fds(&fd, 1);
        rig_destroy(&r);
    }
    ck_assert_uint_eq(fds_open(), fds);
}
END_TEST

/* DMA messages and their replies use it alone; requests stay where they were, also while one waits for ever. */
START_TEST(twin_socket_is_used)
{
    static rig r;
    static uint8_t buf[300000];
    int fd = open_twin(&r, true, twin_json);
    peer twin = {.sock = fd};
    caller c = {.p = {.sock = -1}};
    ck_assert_int_ge(fd, 0);
    make_memory(&c, window, 1 << 19);
    ck_assert_int_eq(ask_map(&r, window, 1 << 19, RW, -1, 0), 0);
    for (unsigned write = 0; write < 2; write++) {
        vfu_dma dma = {.iova = window + 3, .buf = buf, .len = sizeof(buf), .to_client = write != 0, .done = transfer_done};
        memset(buf, 0x77, sizeof(buf));
        transfer_result = 1;
        ck_assert_int_eq(vfu_dev_dma(r.dev, &dma), 1);
        while (transfer_result == 1) {
            check_silent(&r);
            check_healthy(&r); /* the main socket is free */
            int got = peer_receive(&twin);
            if (got == 0) {
                settle(r.dev);
                continue;
            }
            vfu_msg m;
            ck_assert_int_eq(got, 1);
            ck_assert_int_eq(vfu_msg_decode(twin.bytes, twin.have, &m), 0);
            ck_assert(!vfu_msg_is_reply(&m));
            uint64_t at = m.u.dma.address - c.iova;
            vfu_msg reply;
            size_t len;
            vfu_msg_init_reply(&reply, &m, 0);
            reply.u.dma.address = m.u.dma.address;
            reply.u.dma.count = m.u.dma.count;
            if (write) {
                memcpy(c.memory + at, m.u.dma.data, (size_t)m.u.dma.count);
            } else {
                reply.u.dma.data = c.memory + at;
                reply.u.dma.data_len = (uint32_t)m.u.dma.count;
            }
            const uint8_t *bytes = encoded(&reply, &len);
            for (size_t sent = 0; sent < len;) {
                int64_t n = send_some(twin.sock, bytes + sent, len - sent, NULL, 0);
                if (n > 0)
                    sent += (size_t)n;
                settle(r.dev);
            }
        }
        ck_assert_int_eq(transfer_result, 0);
        for (size_t i = 0; i < sizeof(buf); i++)
            if ((write ? c.memory[3 + i] : buf[i]) != (write ? 0x77 : (window + 3 + i) % 251 + 1))
                ck_abort_msg("byte %zu is wrong", i);
    }
    peer_close(&twin);
    free(c.memory);
    rig_destroy(&r);
}
END_TEST

/* What no client may do with it ends the connection. */
START_TEST(twin_socket_is_abused)
{
    enum { COMMAND, CLOSE, GARBAGE, STRAY, ABUSES };
    static rig r;
    unsigned fds = fds_open();
    for (unsigned how = 0; how < ABUSES; how++) {
        int fd = open_twin(&r, true, twin_json);
        static const uint32_t garbage[4] = {0, 5, 0, 0};
        vfu_msg m = command(VFU_CMD_DEVICE_GET_INFO);
        size_t len;
        m.u.device_info.argsz = 16;
        if (how == STRAY)
            vfu_msg_init_reply(&m, &(vfu_msg){.id = 9, .cmd = VFU_CMD_DMA_WRITE}, 0);
        const uint8_t *bytes = encoded(&m, &len);
        if (how == CLOSE)
            close(fd);
        else
            send_all(fd, how == GARBAGE ? (const void *)garbage : bytes, how == GARBAGE ? sizeof(garbage) : len, NULL, 0);
        settle(r.dev);
        if (how == STRAY)
            check_healthy(&r); /* a reply to nothing is discarded */
        else
            check_closed(&r);
        if (how != CLOSE)
            close(fd);
        rig_destroy(&r);
    }
    ck_assert_uint_eq(fds_open(), fds);
}
END_TEST

/* ---- DMA that is never answered ---------------------------------------------------------------------------------------- */

/* Polls as a caller's loop does until the transfer has ended. */
static void loop_until_done(vfu_dev *dev)
{
    uint64_t until = now_us() + PATIENCE_MS * UINT64_C(1000);
    while (transfer_result == 1) {
        vfu_pollfd wanted[VFU_DEV_FDS];
        struct pollfd fds[VFU_DEV_FDS];
        unsigned count = vfu_dev_fds(dev, wanted);
        int timeout = vfu_dev_timeout(dev);
        for (unsigned i = 0; i < count; i++)
            fds[i] = (struct pollfd){.fd = wanted[i].fd, .events = wanted[i].events};
        ck_assert_int_ge(timeout, 0);
        must(poll(fds, count, timeout));
        ck_assert_int_eq(vfu_dev_poll(dev), 0);
        ck_assert(now_us() < until);
    }
}

START_TEST(dma_times_out)
{
    static const struct {
        bool to_client;
        size_t len;
        unsigned answered; /* messages that the client answers before it falls silent */
    } cases[] = {{false, 8, 0}, {true, 8, 0}, {false, 400000, 0}, {false, 400000, 2}, {true, 400000, 2}};
    static uint8_t buf[400000];
    static rig r;
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_dev_desc desc = rig_desc(&r);
        desc.dma_timeout_ms = 30;
        rig_create(&r, &desc);
        rig_connect(&r);
        greet(&r);
        ck_assert_int_eq(vfu_dev_timeout(r.dev), -1);
        ck_assert_int_eq(ask_map(&r, window, 1 << 20, RW, -1, 0), 0);
        vfu_dma dma = {.iova = window, .buf = buf, .len = cases[i].len, .to_client = cases[i].to_client, .done = transfer_done};
        memset(buf, 5, sizeof(buf));
        transfer_result = 1;
        uint64_t began = now_us();
        ck_assert_int_eq(vfu_dev_dma(r.dev, &dma), 1);
        vfu_msg last = {0};
        for (unsigned k = 0; k <= cases[i].answered; k++) {
            vfu_msg reply;
            size_t len;
            ck_assert_int_eq(rig_receive(&r), 1);
            last = r.reply;
            vfu_msg_init_reply(&reply, &last, 0);
            reply.u.dma.address = last.u.dma.address;
            reply.u.dma.count = last.u.dma.count;
            bool reads = last.cmd == VFU_CMD_DMA_READ; /* also to find out the layout of what was written */
            reply.u.dma.data = reads ? buf : NULL;
            reply.u.dma.data_len = reads ? (uint32_t)last.u.dma.count : 0;
            reply.u.dma.ack_len = reads ? 0 : 16;
            const uint8_t *bytes = encoded(&reply, &len);
            if (k < cases[i].answered)
                rig_send(&r, bytes, len, NULL, 0);
        }
        loop_until_done(r.dev);
        ck_assert_int_eq(transfer_result, -ETIMEDOUT);
        ck_assert_uint_ge(now_us() - began, 29000); /* never too early */
        ck_assert_int_eq(vfu_dev_timeout(r.dev), -1);
        vfu_msg late;
        size_t len;
        vfu_msg_init_reply(&late, &last, EIO);
        const uint8_t *bytes = encoded(&late, &len);
        rig_send(&r, bytes, len, NULL, 0);
        peer_close_fds(&r.client);
        while (rig_receive(&r) == 1) /* what it had sent before */
            ck_assert(!vfu_msg_is_reply(&r.reply));
        check_healthy(&r);
        rig_destroy(&r);
    }
}
END_TEST

/* ---- busy polling ------------------------------------------------------------------------------------------------------ */

/* Requests are served, it is stopped, and deadlines are kept as if it slept. */
START_TEST(busy_polling)
{
    static box b;
    struct sockaddr_un address;
    socklen_t len;
    vfu_dev_desc desc = box_desc(&b);
    desc.busy_us = 8000000;
    desc.greeting_ms = 50;
    box_create(&b, &desc);
    ck_assert_int_eq(vfu_dev_attach(b.dev, listener(&address, &len)), 0);
    box_start(&b);
    uint64_t began = now_us();
    caller silent = {.p = {.sock = connect_to(&address, len)}};
    ck_assert_int_eq(peer_wait(&silent.p), -EPIPE); /* dropped for not having said a word */
    ck_assert_uint_ge(now_us() - began, 49000);
    ck_assert_uint_lt(now_us() - began, 6000000);
    peer_close(&silent.p);
    began = now_us();
    caller c = {.p = {.sock = connect_to(&address, len)}};
    say_hello(&c, NULL);
    for (uint32_t i = 0; i < 100; i++) {
        uint32_t back;
        put(&c, 0, 4 * i, &i, 4);
        get(&c, 0, 4 * i, &back, 4);
        ck_assert_uint_eq(back, i);
    }
    box_stop(&b);
    ck_assert_uint_lt(now_us() - began, 6000000); /* and not only when the time was up */
    peer_close(&c.p);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("device: loops and threads");
    TCase *loops = tcase_create("loops");
    tcase_add_test(loops, many_devices_in_one_thread);
    tcase_add_test(loops, one_thread_per_device);
    tcase_add_test(loops, run_ends_with_the_client);
    tcase_add_test(loops, stop_from_a_signal_handler);
    tcase_add_test(loops, signals_while_serving);
    tcase_add_test(loops, stop_before_run);
    tcase_add_test(loops, wake_ups_leave_nothing_behind);
    tcase_add_test(loops, busy_polling);
    suite_add_tcase(suite, loops);
    TCase *completion = tcase_create("completion");
    tcase_add_test(completion, completion_from_other_threads);
    tcase_add_test(completion, clients_leave_during_completion);
    suite_add_tcase(suite, completion);
    TCase *reading_threads = tcase_create("readers");
    tcase_add_test(reading_threads, readers_on_message_memory);
    tcase_add_test(reading_threads, unmap_under_readers);
    tcase_add_test(reading_threads, waits_end);
    tcase_add_test(reading_threads, callbacks_wait_for_readers);
    suite_add_tcase(suite, reading_threads);
    TCase *interrupts = tcase_create("interrupts");
    tcase_add_test(interrupts, raise_while_eventfds_change);
    tcase_add_test(interrupts, masks_lose_no_interrupt);
    suite_add_tcase(suite, interrupts);
    TCase *twins = tcase_create("second socket");
    tcase_add_test(twins, twin_socket_is_negotiated);
    tcase_add_test(twins, twin_socket_is_used);
    tcase_add_test(twins, twin_socket_is_abused);
    suite_add_tcase(suite, twins);
    TCase *timeouts = tcase_create("timeouts");
    tcase_add_test(timeouts, dma_times_out);
    suite_add_tcase(suite, timeouts);
    return run_suite(suite);
}
