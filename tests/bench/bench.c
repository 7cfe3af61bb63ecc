/* SPDX-License-Identifier: MIT */
/*
 * What vfu.h costs on top of the kernel: every path beside the least that the same work takes with bare system calls, the floor, in
 * the same run.
 *
 *     make bench                 or: make bench ROUNDS=3
 *
 * A device, and what plays the floor, are processes of their own; they and their client, which is this process, are pinned to two
 * processors if there are as many. The client of both is the same code with ready-made bytes, so that a ratio tells of the device
 * alone; the lines that say "vfu_client" have the library at both ends. The sides take turns at going first in each round, a ratio is
 * taken within a round, and each figure is the median of all rounds with the least and the greatest.
 *
 * System calls are counted by ptrace, in runs of their own; allocations and locks by what the device is given for them. These figures
 * do not depend on how busy the machine is: if one misses its target, so does the program, with status 1.
 */
#define _GNU_SOURCE
#include "calls.h"
#include "figures.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* What a device asks of its surroundings, counted where its client can read it. */
typedef struct requests {
    unsigned long allocations, locks;
} requests;

static requests *counted;

#define pthread_mutex_lock(mutex) (counted->locks++, pthread_mutex_lock(mutex))
#define VFU_IMPLEMENTATION
#include "vfu.h"
#undef pthread_mutex_lock

enum {
    PAGE = 4096,
    MIB = 1 << 20,
    HEAD = 32, /* of a region or DMA access: header and fixed part */
    IN_FLIGHT = 32,
    CHUNK = 128 << 10, /* bytes of the device's DMA messages */
    MAPS = 500,
    RAISES = 2000,
    STARTS = 10, /* in a round */
    FLEET = 1000,
    ROUND_NS = 10000000, /* how long each side does one thing in a round, more or less */
    COUNTED = 200,       /* runs in which system calls are counted */
    TRIES = 3,
    ORDER = 64, /* register of the device: what it is to do */
    VECTORS = 4,
    TABLE_BAR = 2,
    CAP_MSIX = 0x11,
    VECTOR_CONTROL = 12 /* in an entry of the table */
};
static const uint64_t memory_at = UINT64_C(16) << 20; /* IOVA */

static int rounds = 21;
static const char *only = ""; /* rows with this in their name */

static void fail(const char *what)
{
    fprintf(stderr, "bench: %s failed\n", what);
    exit(1);
}

/* ---- bytes over a socket ------------------------------------------------------------------------------------------------ */

static void send_all(int sock, const void *bytes, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = send(sock, (const char *)bytes + done, len - done, MSG_NOSIGNAL);
        if (n <= 0)
            fail("send");
        done += (size_t)n;
    }
}

/* False: the other end has closed. busy: look again and again instead of waiting. */
static bool receive_all(int sock, void *bytes, size_t len, bool busy)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = recv(sock, (char *)bytes + done, len - done, busy ? MSG_DONTWAIT : 0);
        if (n < 0 && busy && errno == EAGAIN)
            continue;
        if (n <= 0)
            return false;
        done += (size_t)n;
    }
    return true;
}

typedef union control {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(sizeof(int))];
} control;

static void send_with_fd(int sock, const void *bytes, size_t len, int fd)
{
    control c = {.bytes = {0}};
    struct iovec iov = {(void *)(uintptr_t)bytes, len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof(c)};
    c.align = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(&c.align), &fd, sizeof(fd));
    if (sendmsg(sock, &msg, MSG_NOSIGNAL) != (ssize_t)len)
        fail("sendmsg");
}

/* Receives a whole request and closes the descriptor that came with it. False: the other end has closed. */
static bool receive_with_fd(int sock, void *bytes, size_t len)
{
    control c;
    struct iovec iov = {bytes, len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof(c)};
    int fd;
    if (recvmsg(sock, &msg, MSG_CMSG_CLOEXEC) != (ssize_t)len)
        return false;
    memcpy(&fd, CMSG_DATA(&c.align), sizeof(fd));
    close(fd);
    return true;
}

/* ---- processes ---------------------------------------------------------------------------------------------------------- */

static unsigned processors[2]; /* for the client, and for what it is a client of */

static void choose_processors(void)
{
    cpu_set_t allowed;
    int found = 0;
    if (sched_getaffinity(0, sizeof(allowed), &allowed))
        fail("sched_getaffinity");
    for (unsigned i = 0; i < CPU_SETSIZE && found < 2; i++)
        if (CPU_ISSET(i, &allowed))
            processors[found++] = i;
    if (found < 2)
        processors[1] = processors[0];
}

static void pin(pid_t pid, unsigned processor)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    if (sched_setaffinity(pid, sizeof(one), &one))
        fail("sched_setaffinity");
}

typedef struct server {
    pid_t pid;
    int sock; /* to it */
} server;

/* Starts a process that runs body at the other end of a socket, and dies with us. */
static server start(bool apart, void (*body)(int sock, const void *how), const void *how)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        fail("socketpair");
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0)
        fail("fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(0, processors[apart]);
        close(pair[1]);
        body(pair[0], how);
        _exit(0);
    }
    close(pair[0]);
    return (server){pid, pair[1]};
}

/* Stops it for a while, or lets it go on: what is busy polling would take the processor from the other. */
static void hold(const server *s, bool held)
{
    kill(s->pid, held ? SIGSTOP : SIGCONT);
    waitpid(s->pid, NULL, held ? WUNTRACED : WCONTINUED);
}

static void stop(server *s)
{
    close(s->sock);
    kill(s->pid, SIGKILL);
    waitpid(s->pid, NULL, 0);
}

/* ---- the floor ---------------------------------------------------------------------------------------------------------- */

typedef struct floor_desc {
    enum {
        ANSWER,
        ASK,
        WRITE
    } kind;                /* answers each request; or asks as often as the request says; or writes to an eventfd so often */
    size_t request, reply; /* bytes of what ANSWER receives and sends, and of what ASK sends and receives */
    bool with_fd;          /* a descriptor comes with each request, and is closed */
    bool busy;
} floor_desc;

/* What a device, or the floor, is told to do. For the device this is what is written to its register ORDER. */
typedef struct order {
    uint32_t what, count, len;
} order;
enum { ORDER_DMA_READ = 1, ORDER_DMA_WRITE, ORDER_RAISE };

static void floor_serve(int sock, const void *how)
{
    const floor_desc *d = how;
    static char bytes[MIB + HEAD];
    order o;
    int event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    uint64_t one = 1;
    memset(bytes, 1, sizeof(bytes)); /* pages of its own: what was never written is one and the same page, which a cache holds */
    if (d->kind == ANSWER)
        while (d->with_fd ? receive_with_fd(sock, bytes, d->request) : receive_all(sock, bytes, d->request, d->busy))
            send_all(sock, bytes, d->reply);
    while (receive_all(sock, &o, sizeof(o), false)) {
        for (uint32_t i = 0; i < o.count && d->kind == ASK; i++) {
            send_all(sock, bytes, d->request);
            if (!receive_all(sock, bytes, d->reply, false))
                return;
        }
        for (uint32_t i = 0; i < o.count && d->kind == WRITE; i++)
            if (write(event, &one, sizeof(one)) < 0)
                return;
        send_all(sock, bytes, 1);
    }
}

/* ---- the device --------------------------------------------------------------------------------------------------------- */

static void *count_alloc(void *ctx, size_t size)
{
    (void)ctx;
    counted->allocations++;
    return malloc(size);
}

static void count_release(void *ctx, void *memory, size_t size)
{
    (void)ctx, (void)size;
    free(memory);
}

typedef struct machine {
    vfu_dev *dev;
    uint8_t registers[PAGE], *buffer;
    order order;
    vfu_dma dma;
} machine;

static int read_register(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    machine *m = ctx;
    (void)region;
    memcpy(buf, m->registers + offset, len);
    return 0;
}

/* Starts the next transfer. False: there is no more, or one is under way. */
static bool transfer_next(machine *m)
{
    while (m->order.count) {
        m->order.count--;
        m->dma.iova = memory_at;
        m->dma.len = m->order.len;
        m->dma.to_client = m->order.what == ORDER_DMA_WRITE;
        if (vfu_dev_dma(m->dev, &m->dma) == 1)
            break;
    }
    return false;
}

static void transfer_done(vfu_dma *dma, int result)
{
    if (result == 0)
        transfer_next(dma->user);
}

static bool work(void *ctx) { return transfer_next(ctx); }

static int write_register(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    machine *m = ctx;
    (void)region;
    memcpy(m->registers + offset, buf, len);
    if (offset != ORDER || len != sizeof(m->order))
        return 0;
    memcpy(&m->order, buf, len);
    if (m->order.what == ORDER_RAISE)
        for (; m->order.count; m->order.count--)
            vfu_dev_raise(m->dev, VFU_PCI_IRQ_MSIX, 0);
    else
        vfu_dev_want_work(m->dev);
    return 0;
}

typedef struct device_how {
    uint32_t busy_us;
    bool masks; /* the policy msix_masks */
} device_how;

static void machine_create(machine *m, const device_how *how, const vfu_alloc *alloc)
{
    vfu_dev_desc desc = {
        .pci = {.vendor = 0x1234,
                .device = 1,
                .class_code = 0xff0000,
                .bar = {{.size = PAGE}, {0}, {.size = PAGE}},
                .msix = {.vectors = VECTORS, .table_bar = TABLE_BAR, .pba_bar = TABLE_BAR, .pba_offset = 0x800}},
        .ctx = m,
        .callbacks = {.region_read = read_register, .region_write = write_register, .work = work},
        .busy_us = how->busy_us,
        .dma_layout = VFU_DMA_LAYOUT_SPEC, /* nothing is to be found out meanwhile */
        .policy = {.msix_masks = how->masks},
    };
    if (alloc)
        desc.alloc = *alloc;
    memset(m, 0, sizeof(*m));
    m->dma = (vfu_dma){.done = transfer_done, .user = m};
    if (vfu_dev_create(&m->dev, &desc))
        fail("vfu_dev_create");
}

static void device_serve(int sock, const void *how)
{
    static machine m;
    static const vfu_alloc counting = {NULL, count_alloc, count_release};
    machine_create(&m, how, &counting);
    m.dma.buf = m.buffer = malloc(MIB);
    memset(m.buffer, 1, MIB);
    if (vfu_dev_attach(m.dev, sock) == 0)
        vfu_dev_run(m.dev);
}

/* ---- messages to a device ----------------------------------------------------------------------------------------------- */

static size_t encode(const vfu_msg *m, uint8_t *out, size_t size)
{
    int len = vfu_msg_encode(m, out, size);
    if (len < 0)
        fail("vfu_msg_encode");
    return (size_t)len;
}

static vfu_msg region_access(uint16_t cmd, uint32_t region, uint64_t offset, const void *data, uint32_t count)
{
    vfu_msg m;
    vfu_msg_init(&m, 1, cmd);
    m.u.region.region = region;
    m.u.region.offset = offset;
    m.u.region.count = count;
    m.u.region.data = data;
    m.u.region.data_len = data ? count : 0;
    return m;
}

static vfu_msg map_request(uint64_t iova, uint64_t size)
{
    vfu_msg m;
    vfu_msg_init(&m, 1, VFU_CMD_DMA_MAP);
    m.u.dma_map.argsz = sizeof(vfu_wire_dma_map);
    m.u.dma_map.flags = VFU_DMA_READABLE | VFU_DMA_WRITEABLE;
    m.u.dma_map.address = iova;
    m.u.dma_map.size = size;
    return m;
}

static vfu_msg unmap_request(uint64_t iova, uint64_t size)
{
    vfu_msg m;
    vfu_msg_init(&m, 1, VFU_CMD_DMA_UNMAP);
    m.u.dma_unmap.argsz = sizeof(vfu_wire_dma_unmap);
    m.u.dma_unmap.address = iova;
    m.u.dma_unmap.size = size;
    return m;
}

static void check_reply(const void *bytes)
{
    vfu_wire_header header;
    memcpy(&header, bytes, sizeof(header));
    if (header.flags != VFU_HDR_REPLY)
        fail("a request");
}

/* One request and its reply, of any size up to a page. */
static void ask(int sock, const vfu_msg *m, const int *fd)
{
    uint8_t bytes[PAGE];
    vfu_wire_header header;
    size_t len = encode(m, bytes, sizeof(bytes));
    if (fd)
        send_with_fd(sock, bytes, len, *fd);
    else
        send_all(sock, bytes, len);
    if (!receive_all(sock, bytes, sizeof(header), false))
        fail("a device");
    memcpy(&header, bytes, sizeof(header));
    check_reply(bytes);
    if (header.size > sizeof(bytes) || !receive_all(sock, bytes, header.size - sizeof(header), false))
        fail("a device");
}

static void ask_version(int sock)
{
    vfu_msg m;
    vfu_msg_init(&m, 1, VFU_CMD_VERSION);
    ask(sock, &m, NULL);
}

static void ask_write(int sock, uint32_t region, uint64_t offset, const void *data, uint32_t count)
{
    vfu_msg m = region_access(VFU_CMD_REGION_WRITE, region, offset, data, count);
    ask(sock, &m, NULL);
}

/* ---- what is measured --------------------------------------------------------------------------------------------------- */

/* One of the two ends that are compared, as the client sees it. */
typedef struct side side;
struct side {
    server server;
    double (*run)(side *s, unsigned count); /* does it so often; returns nanoseconds */
    bool floor, busy, with_fd;
    uint8_t request[2048];
    size_t request_len, reply_len;
    order order;
    vfu_client *client;
};

typedef struct row {
    const char *name;
    unsigned count; /* operations in a round, of each side */
    unsigned per;   /* operations in one run, which is one exchange of messages; 1, or how many go together */
    bool apart;     /* on a processor of its own */
    side sides[2];  /* floor, ours */
    figure ns[2], ratio;
    double calls, allocations, locks; /* for each operation; calls < 0: could not be counted */
    double each[CALLS_MAX];           /* calls by number */
} row;
enum { FLOOR, OURS };

static tracer probe;  /* of the device whose calls are counted */
static bool probing;  /* counting is wanted */
static bool counting; /* and it is the time to */
static requests before, sum;
static uint8_t *scratch; /* MIB + HEAD bytes, for what comes and goes */
static int page_fd;      /* the client's memory, MAPS pages */

/* Sends the request and waits for the reply. */
static double run_exchanges(side *s, unsigned count)
{
    double began = now_ns();
    for (unsigned i = 0; i < count; i++) {
        if (s->with_fd)
            send_with_fd(s->server.sock, s->request, s->request_len, page_fd);
        else
            send_all(s->server.sock, s->request, s->request_len);
        if (!receive_all(s->server.sock, scratch, s->reply_len, s->busy))
            fail("a device");
        if (!s->floor)
            check_reply(scratch);
    }
    return now_ns() - began;
}

/* From here on what the device does counts, or doesn't. */
static void count_from_here(bool on)
{
    on = on && probing;
    atomic_store(&probe.counting, on);
    if (on && !counting)
        before = *counted;
    if (counting && !on) {
        sum.allocations += counted->allocations - before.allocations;
        sum.locks += counted->locks - before.locks;
    }
    counting = on;
}

/* Maps so many pages, and takes them away again: one of the two is timed and counted. */
static double run_maps_or_unmaps(side *s, unsigned count, bool maps)
{
    static uint8_t map[MAPS][64], unmap[MAPS][64];
    size_t map_len = 0, unmap_len = 0;
    if (count > MAPS)
        fail("too many maps");
    for (unsigned i = 0; i < count; i++) {
        vfu_msg m = map_request(memory_at + i * (uint64_t)PAGE, PAGE), u = unmap_request(memory_at + i * (uint64_t)PAGE, PAGE);
        m.u.dma_map.offset = i * (uint64_t)PAGE;
        map_len = encode(&m, map[i], sizeof(map[i]));
        unmap_len = encode(&u, unmap[i], sizeof(unmap[i]));
    }
    count_from_here(maps);
    double began = now_ns();
    for (unsigned i = 0; i < count; i++) {
        send_with_fd(s->server.sock, map[i], map_len, page_fd);
        if (!receive_all(s->server.sock, scratch, VFU_HDR_SIZE, false))
            fail("a device");
        check_reply(scratch);
    }
    double half = now_ns();
    count_from_here(!maps);
    for (unsigned i = 0; i < count; i++) {
        send_all(s->server.sock, unmap[i], unmap_len);
        if (!receive_all(s->server.sock, scratch, VFU_HDR_SIZE + sizeof(vfu_wire_dma_unmap), false))
            fail("a device");
        check_reply(scratch);
    }
    return maps ? half - began : now_ns() - half;
}

static double run_maps(side *s, unsigned count) { return run_maps_or_unmaps(s, count, true); }
static double run_unmaps(side *s, unsigned count) { return run_maps_or_unmaps(s, count, false); }

/* Tells the floor what to do, and serves what it asks for. */
static double run_floor_order(side *s, unsigned count)
{
    bool ask = s->order.what != ORDER_RAISE;
    double began = now_ns();
    s->order.count = count;
    send_all(s->server.sock, &s->order, sizeof(s->order));
    for (unsigned i = 0; ask && i < count; i++) {
        if (!receive_all(s->server.sock, scratch, s->request_len, false))
            fail("the floor");
        send_all(s->server.sock, scratch, s->reply_len);
    }
    if (!receive_all(s->server.sock, scratch, 1, false))
        fail("the floor");
    return now_ns() - began;
}

/* Answers one DMA message of `len` bytes. The data has a place of its own at both ends, so that nothing is copied here. */
static void answer_dma(int sock, bool is_read, size_t len)
{
    struct {
        vfu_wire_header header;
        vfu_wire_dma_access access;
    } head;
    struct iovec iov[2] = {{&head, sizeof(head)}, {scratch, len}};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = is_read ? 1 : 2};
    size_t total = sizeof(head) + (is_read ? 0 : len);
    ssize_t n = recvmsg(sock, &msg, 0);
    if (n < (ssize_t)sizeof(head) || !receive_all(sock, scratch + ((size_t)n - sizeof(head)), total - (size_t)n, false))
        fail("a device");
    if (head.header.cmd != (is_read ? VFU_CMD_DMA_READ : VFU_CMD_DMA_WRITE) || head.access.count != len)
        fail("a transfer");
    head.header.flags = VFU_HDR_REPLY;
    head.header.size = (uint32_t)(sizeof(head) + (is_read ? len : 0));
    msg.msg_iovlen = is_read ? 2 : 1;
    n = sendmsg(sock, &msg, MSG_NOSIGNAL);
    if (n < (ssize_t)sizeof(head))
        fail("sendmsg");
    if (is_read)
        send_all(sock, scratch + ((size_t)n - sizeof(head)), head.header.size - (size_t)n);
}

/* Tells the device what to do, and serves what it asks for. */
static double run_order(side *s, unsigned count)
{
    uint32_t len = s->order.len, part = len < CHUNK ? len : CHUNK;
    bool raise = s->order.what == ORDER_RAISE;
    vfu_msg end = region_access(VFU_CMD_REGION_READ, VFU_PCI_REGION_BAR0, 0, NULL, 4);
    double began = now_ns();
    s->order.count = count;
    ask_write(s->server.sock, VFU_PCI_REGION_BAR0, ORDER, &s->order, sizeof(s->order));
    for (unsigned i = 0; !raise && i < count; i++)
        for (uint32_t at = 0; at < len; at += part)
            answer_dma(s->server.sock, s->order.what == ORDER_DMA_READ, part);
    if (!raise)
        ask(s->server.sock, &end, NULL);
    return now_ns() - began;
}

static double run_client_reads(side *s, unsigned count)
{
    uint32_t value;
    double began = now_ns();
    for (unsigned i = 0; i < count; i++)
        if (vfu_client_region_read(s->client, VFU_PCI_REGION_BAR0, 0, &value, sizeof(value)))
            fail("vfu_client_region_read");
    return now_ns() - began;
}

static double run_client_writes(side *s, unsigned count)
{
    uint32_t value = 1;
    double began = now_ns();
    for (unsigned i = 0; i < count; i++)
        if (vfu_client_region_write(s->client, VFU_PCI_REGION_BAR0, 0, &value, sizeof(value)))
            fail("vfu_client_region_write");
    return now_ns() - began;
}

/* Counts what the device asks for in so many runs. */
static void count_runs(row *r, unsigned count)
{
    side *s = &r->sides[OURS];
    double operations = (double)count * r->per;
    sum = (requests){0};
    probing = true;
    count_from_here(true);
    s->run(s, count);
    count_from_here(false);
    probing = false;
    r->allocations = (double)sum.allocations / operations;
    r->locks = (double)sum.locks / operations;
}

/* The same with a tracer at it. The call with which it waits after a run is counted with the next one, and a machine that stops for a
 * moment makes it wait once more: so the least of some tries is what counts. */
static void count_calls(row *r, unsigned count)
{
    side *s = &r->sides[OURS];
    double operations = (double)count * r->per;
    s->run(s, count);
    count_runs(r, count);
    r->calls = -1;
    for (int i = 0; i < TRIES && !s->busy; i++) { /* one that is busy polling makes as many as it can */
        if (!trace_start(&probe, s->server.pid))
            return;
        s->run(s, 1);
        count_runs(r, count);
        atomic_store(&probe.end, true);
        s->run(s, 1);
        trace_end(&probe);
        double calls = (double)trace_sum(&probe) / operations;
        if (i && calls >= r->calls)
            continue;
        r->calls = calls;
        for (int k = 0; k < CALLS_MAX; k++)
            r->each[k] = (double)probe.count[k] / operations;
    }
}

/* One run of a side while the other is held. */
static double run_alone(row *r, int which, unsigned count)
{
    side *s = &r->sides[which];
    if (s->busy)
        hold(&s->server, false);
    double ns = s->run(s, count);
    if (s->busy)
        hold(&s->server, true);
    return ns;
}

static void measure(row *r)
{
    unsigned runs = (r->count + r->per - 1) / r->per, few = runs / 50 + 1, traced = runs < COUNTED ? runs : COUNTED;
    for (int which = 0; which < 2; which++)
        if (r->sides[which].busy)
            hold(&r->sides[which].server, true);
    for (int which = 0; which < 2; which++) { /* warm up, and see how many there is time for */
        double ns = run_alone(r, which, few) / few;
        if (runs * ns > ROUND_NS)
            runs = (unsigned)(ROUND_NS / ns) + 1;
    }
    double operations = (double)runs * r->per;
    for (int i = 0; i < rounds; i++) {
        for (int turn = 0; turn < 2; turn++) {
            int which = (turn + i) % 2;
            r->ns[which].round[i] = run_alone(r, which, runs) / operations;
        }
        r->ratio.round[i] = r->ns[OURS].round[i] / r->ns[FLOOR].round[i];
    }
    settle(&r->ns[FLOOR], rounds);
    settle(&r->ns[OURS], rounds);
    settle(&r->ratio, rounds);
    if (r->sides[OURS].busy)
        hold(&r->sides[OURS].server, false);
    count_calls(r, traced);
}

/* ---- the rows ----------------------------------------------------------------------------------------------------------- */

enum {
    READ_BLOCKING,
    WRITE_BLOCKING,
    READ_APART,
    WRITE_APART,
    READ_BUSY,
    WRITE_BUSY,
    READ_CLIENT,
    WRITE_CLIENT,
    PIPELINED,
    MULTI,
    MAP,
    UNMAP,
    DMA_READ_64,
    DMA_WRITE_64,
    DMA_READ_MIB,
    DMA_WRITE_MIB,
    RAISE,
    RAISE_MASKS,
    RAISE_MASKED,
    ROWS
};

static row rows[ROWS] = {
    [READ_BLOCKING] = {.name = "read 4 B", .count = 2000, .per = 1},
    [WRITE_BLOCKING] = {.name = "write 4 B", .count = 2000, .per = 1},
    [READ_APART] = {.name = "read 4 B, two processors", .count = 1000, .per = 1, .apart = true},
    [WRITE_APART] = {.name = "write 4 B, two processors", .count = 1000, .per = 1, .apart = true},
    [READ_BUSY] = {.name = "read 4 B, busy polling", .count = 5000, .per = 1, .apart = true},
    [WRITE_BUSY] = {.name = "write 4 B, busy polling", .count = 5000, .per = 1, .apart = true},
    [READ_CLIENT] = {.name = "read 4 B, vfu_client", .count = 2000, .per = 1},
    [WRITE_CLIENT] = {.name = "write 4 B, vfu_client", .count = 2000, .per = 1},
    [PIPELINED] = {.name = "write 4 B, 32 in flight", .count = 20000, .per = IN_FLIGHT},
    [MULTI] = {.name = "write 4 B, 32 in a WRITE_MULTI", .count = 20000, .per = IN_FLIGHT},
    [MAP] = {.name = "DMA_MAP 4 KiB, descriptor", .count = MAPS, .per = 1},
    [UNMAP] = {.name = "DMA_UNMAP 4 KiB", .count = MAPS, .per = 1},
    [DMA_READ_64] = {.name = "DMA_READ 64 B", .count = 2000, .per = 1},
    [DMA_WRITE_64] = {.name = "DMA_WRITE 64 B", .count = 2000, .per = 1},
    [DMA_READ_MIB] = {.name = "DMA_READ 1 MiB", .count = 64, .per = 1},
    [DMA_WRITE_MIB] = {.name = "DMA_WRITE 1 MiB", .count = 64, .per = 1},
    [RAISE] = {.name = "raise MSI-X", .count = 20000, .per = 1},
    [RAISE_MASKS] = {.name = "raise MSI-X, masks count", .count = 20000, .per = 1},
    [RAISE_MASKED] = {.name = "raise MSI-X, masked", .count = 20000, .per = 1},
};

static void start_floor(row *r, const floor_desc *d)
{
    side *s = &r->sides[FLOOR];
    s->server = start(r->apart, floor_serve, d);
    s->floor = true;
    s->busy = d->busy;
    s->with_fd = d->with_fd;
    s->run = d->kind == ANSWER ? run_exchanges : run_floor_order;
    s->request_len = d->request;
    s->reply_len = d->reply;
}

static side *start_device(row *r, const device_how *how, double (*run)(side *s, unsigned count))
{
    side *s = &r->sides[OURS];
    s->server = start(r->apart, device_serve, how);
    s->busy = how->busy_us != 0;
    s->run = run;
    return s;
}

static void finish_row(row *r)
{
    measure(r);
    if (r->sides[OURS].client)
        vfu_client_destroy(r->sides[OURS].client); /* closes the socket */
    stop(&r->sides[FLOOR].server);
    stop(&r->sides[OURS].server);
}

/* Exchanges of a request, `count` times in one send, and what it is answered with. */
static void measure_exchange(row *r, const vfu_msg *request, size_t reply_len, bool busy)
{
    device_how how = {.busy_us = busy ? 10000000 : 0};
    side *s = start_device(r, &how, run_exchanges);
    size_t len = encode(request, s->request, sizeof(s->request));
    unsigned copies = request->cmd == VFU_CMD_REGION_WRITE_MULTI ? 1 : r->per;
    for (unsigned i = 1; i < copies; i++)
        memcpy(s->request + i * len, s->request, len);
    s->request_len = len * copies;
    s->reply_len = reply_len * copies;
    ask_version(s->server.sock);
    floor_desc floor = {.kind = ANSWER, .request = s->request_len, .reply = s->reply_len, .busy = busy};
    start_floor(r, &floor);
    finish_row(r);
}

static void measure_client(row *r, double (*run)(side *s, unsigned count), size_t request, size_t reply)
{
    side *s = start_device(r, &(device_how){0}, run);
    floor_desc floor = {.kind = ANSWER, .request = request, .reply = reply};
    if (vfu_client_attach(&s->client, dup(s->server.sock), NULL))
        fail("vfu_client_attach");
    start_floor(r, &floor);
    finish_row(r);
}

static void measure_mapping(row *r, bool maps)
{
    side *s = start_device(r, &(device_how){0}, maps ? run_maps : run_unmaps);
    floor_desc floor = {
        .kind = ANSWER,
        .request = VFU_HDR_SIZE + (maps ? sizeof(vfu_wire_dma_map) : sizeof(vfu_wire_dma_unmap)),
        .reply = VFU_HDR_SIZE + (maps ? 0 : sizeof(vfu_wire_dma_unmap)),
        .with_fd = maps,
    };
    /* One mapping stays, as the guest's memory does: those that come and go lie in a file that is mapped already. */
    vfu_msg stays = map_request(memory_at - PAGE, PAGE);
    ask_version(s->server.sock);
    ask(s->server.sock, &stays, &page_fd);
    start_floor(r, &floor);
    finish_row(r);
}

static void measure_dma(row *r, uint32_t what, uint32_t len)
{
    bool is_read = what == ORDER_DMA_READ;
    side *s = start_device(r, &(device_how){0}, run_order);
    floor_desc floor = {.kind = ASK, .request = HEAD + (is_read ? 0 : len), .reply = HEAD + (is_read ? len : 0)};
    vfu_msg memory = map_request(memory_at, MIB);
    ask_version(s->server.sock);
    ask(s->server.sock, &memory, NULL);
    s->order = (order){.what = what, .len = len};
    start_floor(r, &floor);
    r->sides[FLOOR].order = s->order;
    finish_row(r);
}

static void measure_raise(row *r, bool masks, bool masked)
{
    side *s = start_device(r, &(device_how){.masks = masks}, run_order);
    floor_desc floor = {.kind = WRITE};
    machine same;
    vfu_msg assign;
    int event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    uint32_t unmasked = 0;
    uint16_t enabled = 0x8000;
    machine_create(&same, &(device_how){.masks = masks}, NULL);
    uint8_t msix = vfu_pci_capability(vfu_dev_pci(same.dev), CAP_MSIX);
    vfu_dev_destroy(same.dev);
    vfu_msg_init(&assign, 1, VFU_CMD_DEVICE_SET_IRQS);
    assign.u.irq_set.argsz = sizeof(vfu_wire_irq_set);
    assign.u.irq_set.flags = VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_TRIGGER;
    assign.u.irq_set.index = VFU_PCI_IRQ_MSIX;
    assign.u.irq_set.count = 1;
    ask_version(s->server.sock);
    ask(s->server.sock, &assign, &event);
    close(event);
    if (!masked) {
        ask_write(s->server.sock, TABLE_BAR, VECTOR_CONTROL, &unmasked, 4);
        ask_write(s->server.sock, VFU_PCI_REGION_CONFIG, msix + 2u, &enabled, 2);
    }
    s->order = (order){.what = ORDER_RAISE};
    start_floor(r, &floor);
    r->sides[FLOOR].order = s->order;
    finish_row(r);
}

static void measure_row(int i)
{
    uint32_t value = 1;
    row *r = &rows[i];
    vfu_msg read = region_access(VFU_CMD_REGION_READ, VFU_PCI_REGION_BAR0, 0, NULL, 4);
    vfu_msg write = region_access(VFU_CMD_REGION_WRITE, VFU_PCI_REGION_BAR0, 0, &value, 4), multi;
    uint8_t many[IN_FLIGHT * sizeof(vfu_wire_write_one)];
    for (unsigned k = 0; k < IN_FLIGHT; k++) {
        vfu_wire_write_one one = {.offset = 4 * k, .region = VFU_PCI_REGION_BAR0, .count = 4, .data = {1}};
        memcpy(many + k * sizeof(one), &one, sizeof(one));
    }
    vfu_msg_init(&multi, 1, VFU_CMD_REGION_WRITE_MULTI);
    multi.u.write_multi.count = IN_FLIGHT;
    multi.u.write_multi.data = many;
    multi.u.write_multi.data_len = sizeof(many);
    switch (i) {
    case READ_BLOCKING:
    case READ_APART: measure_exchange(r, &read, HEAD + 4, false); break;
    case WRITE_BLOCKING:
    case WRITE_APART:
    case PIPELINED: measure_exchange(r, &write, HEAD, false); break;
    case READ_BUSY: measure_exchange(r, &read, HEAD + 4, true); break;
    case WRITE_BUSY: measure_exchange(r, &write, HEAD, true); break;
    case READ_CLIENT: measure_client(r, run_client_reads, HEAD, HEAD + 4); break;
    case WRITE_CLIENT: measure_client(r, run_client_writes, HEAD + 4, HEAD); break;
    case MULTI: measure_exchange(r, &multi, VFU_HDR_SIZE + 8, false); break;
    case MAP: measure_mapping(r, true); break;
    case UNMAP: measure_mapping(r, false); break;
    case DMA_READ_64: measure_dma(r, ORDER_DMA_READ, 64); break;
    case DMA_WRITE_64: measure_dma(r, ORDER_DMA_WRITE, 64); break;
    case DMA_READ_MIB: measure_dma(r, ORDER_DMA_READ, MIB); break;
    case DMA_WRITE_MIB: measure_dma(r, ORDER_DMA_WRITE, MIB); break;
    case RAISE: measure_raise(r, false, false); break;
    case RAISE_MASKS: measure_raise(r, true, false); break;
    case RAISE_MASKED: measure_raise(r, true, true); break;
    }
}

/* ---- many devices in one thread ------------------------------------------------------------------------------------------ */

/* Devices, or for the floor bare sockets with a buffer for each, and their clients. */
typedef struct fleet {
    unsigned count;
    bool bare;
    machine *machines;
    int *socks, *peers; /* of the clients; bare: of what answers them */
    uint8_t (*buffers)[PAGE];
    int epoll;
    uint64_t luck;
} fleet;

static void fleet_watch(fleet *f, int fd, unsigned i)
{
    struct epoll_event e = {.events = EPOLLIN, .data = {.u32 = i}};
    if (epoll_ctl(f->epoll, EPOLL_CTL_ADD, fd, &e))
        fail("epoll_ctl");
}

static void fleet_add_device(fleet *f, unsigned i)
{
    vfu_pollfd wanted[VFU_DEV_FDS];
    vfu_msg version;
    uint8_t bytes[PAGE];
    machine_create(&f->machines[i], &(device_how){0}, NULL);
    if (vfu_dev_attach(f->machines[i].dev, f->peers[i]))
        fail("vfu_dev_attach");
    vfu_msg_init(&version, 1, VFU_CMD_VERSION);
    send_all(f->socks[i], bytes, encode(&version, bytes, sizeof(bytes)));
    vfu_dev_poll(f->machines[i].dev);
    if (recv(f->socks[i], bytes, sizeof(bytes), MSG_DONTWAIT) < (ssize_t)VFU_HDR_SIZE)
        fail("a device of many");
    check_reply(bytes);
    for (unsigned k = 0, n = vfu_dev_fds(f->machines[i].dev, wanted); k < n; k++)
        fleet_watch(f, wanted[k].fd, i);
}

static void fleet_create(fleet *f, unsigned count, bool bare)
{
    *f = (fleet){.count = count, .bare = bare, .epoll = epoll_create1(EPOLL_CLOEXEC)};
    f->machines = calloc(bare ? 1 : count, sizeof(*f->machines));
    f->buffers = calloc(bare ? count : 1, sizeof(*f->buffers));
    f->socks = calloc(count, sizeof(*f->socks));
    f->peers = calloc(count, sizeof(*f->peers));
    if (!f->machines || !f->buffers || !f->socks || !f->peers || f->epoll < 0)
        fail("memory");
    for (unsigned i = 0; i < count; i++) {
        int pair[2];
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
            fail("socketpair");
        f->socks[i] = pair[1];
        f->peers[i] = pair[0];
        if (bare)
            fleet_watch(f, pair[0], i);
        else
            fleet_add_device(f, i);
    }
}

static void fleet_destroy(fleet *f)
{
    for (unsigned i = 0; i < f->count; i++) {
        if (f->bare)
            close(f->peers[i]);
        else
            vfu_dev_destroy(f->machines[i].dev);
        close(f->socks[i]);
    }
    free(f->machines);
    free(f->buffers);
    free(f->socks);
    free(f->peers);
    close(f->epoll);
}

/* Answers the request of client i. */
static bool fleet_answer(fleet *f, unsigned i)
{
    if (!f->bare)
        return vfu_dev_poll(f->machines[i].dev) == 0;
    struct iovec iov = {f->buffers[i], PAGE};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    return recvmsg(f->peers[i], &msg, MSG_DONTWAIT) == HEAD && send(f->peers[i], f->buffers[i], HEAD + 4, 0) == HEAD + 4;
}

/* So many region reads, each of a client drawn at random, and the loop that answers them, all in this thread. ns for each. */
static double fleet_run(fleet *f, unsigned count)
{
    uint8_t bytes[64];
    vfu_msg m = region_access(VFU_CMD_REGION_READ, VFU_PCI_REGION_BAR0, 0, NULL, 4);
    size_t len = encode(&m, bytes, sizeof(bytes));
    double began = now_ns();
    for (unsigned i = 0; i < count; i++) {
        struct epoll_event e;
        f->luck = f->luck * UINT64_C(6364136223846793005) + 1442695040888963407u;
        unsigned k = (unsigned)((f->luck >> 33) % f->count);
        send_all(f->socks[k], bytes, len);
        if (epoll_wait(f->epoll, &e, 1, -1) != 1 || !fleet_answer(f, e.data.u32) ||
            recv(f->socks[k], scratch, HEAD + 4, MSG_DONTWAIT) != HEAD + 4)
            fail("a device of many");
    }
    return (now_ns() - began) / count;
}

/* Of the floor and of devices: one, and many. */
static struct {
    figure ns[2], ratio;
} many[2];

static void measure_fleets(void)
{
    struct rlimit files;
    fleet fleets[2][2]; /* floor and ours, one and many */
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    for (int which = 0; which < 2; which++) {
        for (int size = 0; size < 2; size++) {
            fleet_create(&fleets[which][size], size ? FLEET : 1, which == FLOOR);
            fleet_run(&fleets[which][size], 2 * FLEET);
        }
    }
    for (int i = 0; i < rounds; i++) {
        for (int turn = 0; turn < 4; turn++) {
            int which = (turn + i) % 4 / 2, size = (turn + i) % 2;
            many[which].ns[size].round[i] = fleet_run(&fleets[which][size], 4 * FLEET);
        }
        for (int which = 0; which < 2; which++)
            many[which].ratio.round[i] = many[which].ns[1].round[i] / many[which].ns[0].round[i];
    }
    for (int which = 0; which < 2; which++) {
        for (int size = 0; size < 2; size++) {
            settle(&many[which].ns[size], rounds);
            fleet_destroy(&fleets[which][size]);
        }
        settle(&many[which].ratio, rounds);
    }
}

/* ---- start, and rest ----------------------------------------------------------------------------------------------------- */

/* This program again, as a process that listens at an inherited socket: a device, or a bare server that answers once. */
static int start_anew(const char *what, int listener)
{
    if (strcmp(what, "device") == 0) {
        static machine m;
        machine_create(&m, &(device_how){0}, NULL);
        return vfu_dev_attach(m.dev, listener) || vfu_dev_run(m.dev);
    }
    char bytes[HEAD + 4];
    int sock = accept(listener, NULL, NULL);
    while (sock >= 0 && receive_all(sock, bytes, HEAD, false))
        send_all(sock, bytes, sizeof(bytes));
    return 0;
}

static server start_program(const char *what)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    socklen_t len = sizeof(address.sun_family); /* the kernel finds a name */
    char number[16];
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || sock < 0 || bind(listener, (struct sockaddr *)&address, len) || listen(listener, 1))
        fail("listen");
    len = sizeof(address);
    getsockname(listener, (struct sockaddr *)&address, &len);
    snprintf(number, sizeof(number), "%d", listener);
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0)
        fail("fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execl("/proc/self/exe", "bench", "--serve", what, number, (char *)NULL);
        _exit(127);
    }
    close(listener);
    if (connect(sock, (struct sockaddr *)&address, len))
        fail("connect");
    return (server){pid, sock};
}

/* Nanoseconds from fork() to the first answer. */
static double time_start(bool device, server *left)
{
    vfu_msg read = region_access(VFU_CMD_REGION_READ, VFU_PCI_REGION_BAR0, 0, NULL, 4);
    double began = now_ns();
    server s = start_program(device ? "device" : "floor");
    if (device) {
        ask_version(s.sock);
        ask(s.sock, &read, NULL);
    } else {
        send_all(s.sock, scratch, HEAD);
        if (!receive_all(s.sock, scratch, HEAD + 4, false))
            fail("the floor");
    }
    double took = now_ns() - began;
    if (left)
        *left = s;
    else
        stop(&s);
    return took;
}

/* The number behind a word in a file of /proc. */
static double proc_number(pid_t pid, const char *file, const char *word)
{
    char path[64], line[256];
    double number = -1;
    snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, file);
    FILE *f = fopen(path, "re");
    while (f && number < 0 && fgets(line, sizeof(line), f))
        if (strncmp(line, word, strlen(word)) == 0)
            number = strtod(line + strlen(word), NULL);
    if (f)
        fclose(f);
    return number;
}

static struct {
    figure ns[2], more;
    double resident, anonymous; /* bytes */
    double cpu_ns, switches;    /* in a second of idleness */
} life;

static void measure_life(void)
{
    server idle;
    clockid_t clock;
    for (int i = 0; i < rounds; i++) {
        for (int turn = 0; turn < 2; turn++) {
            int which = (turn + i) % 2;
            life.ns[which].round[i] = 0;
            for (int k = 0; k < STARTS; k++)
                life.ns[which].round[i] += time_start(which == OURS, NULL) / STARTS;
        }
        life.more.round[i] = life.ns[OURS].round[i] - life.ns[FLOOR].round[i];
    }
    settle(&life.ns[FLOOR], rounds);
    settle(&life.ns[OURS], rounds);
    settle(&life.more, rounds);
    time_start(true, &idle);
    nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL); /* it has fallen asleep */
    if (clock_getcpuclockid(idle.pid, &clock))
        fail("clock_getcpuclockid");
    double ns = read_clock(clock), switches = proc_number(idle.pid, "status", "voluntary_ctxt_switches:");
    nanosleep(&(struct timespec){.tv_sec = 1}, NULL);
    life.cpu_ns = read_clock(clock) - ns;
    life.switches = proc_number(idle.pid, "status", "voluntary_ctxt_switches:") - switches;
    life.resident = proc_number(idle.pid, "status", "VmRSS:") * 1024;
    life.anonymous = proc_number(idle.pid, "status", "RssAnon:") * 1024;
    stop(&idle);
}

/* ---- the tables that are printed ---------------------------------------------------------------------------------------- */

static void print_rows(void)
{
    printf("ns per operation: median of %d rounds, least..greatest. System calls, allocations and locks per operation: the "
           "device's. "
           "Client and device on one\nprocessor, unless it says otherwise.\n"
           "%-31s | floor                  | ours                   | times the floor        | calls | alloc.| locks | calls, "
           "one by one\n",
           rounds, "");
    for (int i = 0; i < ROWS; i++) {
        row *r = &rows[i];
        if (!strstr(r->name, only))
            continue;
        printf("%-31s", r->name);
        print_figure(&r->ns[FLOOR], 0);
        print_figure(&r->ns[OURS], 0);
        print_figure(&r->ratio, 2);
        if (r->calls < 0)
            printf(" |     -");
        else
            printf(" |%6.2f", r->calls);
        printf(" |%6.2f |%6.2f |", r->allocations, r->locks);
        for (int k = 0; k < CALLS_MAX; k++)
            if (r->each[k] >= 0.005)
                printf(" %s %.2f", call_name(k), r->each[k]);
        putchar('\n');
    }
}

static const char many_name[] = "1,000 devices, one thread", life_name[] = "start, us";

static void print_fleets(void)
{
    printf("\n%-31s | one                    | many                   | times one\n", many_name);
    for (int which = 0; which < 2; which++) {
        printf("%-31s", which == FLOOR ? "bare sockets, client included" : "read 4 B, client included");
        print_figure(&many[which].ns[0], 0);
        print_figure(&many[which].ns[1], 0);
        print_figure(&many[which].ratio, 2);
        putchar('\n');
    }
}

static void print_life(void)
{
    printf("\n%-31s | bare server            | device                 | more\n", life_name);
    for (int i = 0; i < rounds; i++) {
        life.ns[0].round[i] /= 1000;
        life.ns[1].round[i] /= 1000;
        life.more.round[i] /= 1000;
    }
    settle(&life.ns[0], rounds);
    settle(&life.ns[1], rounds);
    settle(&life.more, rounds);
    printf("%-31s", "fork() to first answered read");
    print_figure(&life.ns[0], 0);
    print_figure(&life.ns[1], 0);
    print_figure(&life.more, 0);
    printf("\n\nAn idle device: %.0f KiB resident, %.0f KiB of it its own (anonymous); in a second %.0f ns of processor time, "
           "%.0f times awake.\n",
           life.resident / 1024, life.anonymous / 1024, life.cpu_ns, life.switches);
}

static bool counts_missed;

/* A target for what is counted, to the edges of the counting; one that is missed by more than these is an error. */
static void counted_target(const char *what, double is, double at_most)
{
    target(what, is < 0 ? 1e9 : (double)(long)(is * 20 + 0.5) / 20, at_most, "");
    counts_missed = counts_missed || is > at_most * 1.4;
}

static void print_targets(void)
{
    static const struct {
        int row;
        double ratio, calls; /* 0: no target */
    } wanted[] = {
        {READ_BLOCKING, 1.15, 2}, {WRITE_BLOCKING, 1.15, 2}, {READ_APART, 1.15, 2}, {WRITE_APART, 1.15, 2},
        {READ_BUSY, 1.15, 0},     {WRITE_BUSY, 1.15, 0},     {PIPELINED, 0, 0.3},   {MULTI, 0, 0.3},
        {MAP, 1.25, 4},           {UNMAP, 1.25, 2},          {DMA_READ_64, 1.2, 0}, {DMA_WRITE_64, 1.2, 0},
        {DMA_READ_MIB, 1.3, 0},   {DMA_WRITE_MIB, 1.3, 0},   {RAISE, 0, 1},         {RAISE_MASKS, 0, 1},
    };
    char text[80];
    double write_ns = rows[WRITE_BLOCKING].ns[OURS].median;
    printf("\nTargets:\n");
    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        row *r = &rows[wanted[i].row];
        snprintf(text, sizeof(text), "%s: times the floor", r->name);
        if (wanted[i].ratio > 0)
            target(text, r->ratio.median, wanted[i].ratio, "x");
        snprintf(text, sizeof(text), "%s: system calls", r->name);
        if (wanted[i].calls > 0)
            counted_target(text, r->calls, wanted[i].calls);
    }
    target("32 in flight: time of a write, of one that waits", rows[PIPELINED].ns[OURS].median / write_ns, 0.25, "x");
    target("32 in a WRITE_MULTI: time of a write, of one that waits", rows[MULTI].ns[OURS].median / write_ns, 0.25, "x");
    for (int i = 0; i < ROWS; i++) {
        snprintf(text, sizeof(text), "%s: allocations", rows[i].name);
        if (rows[i].allocations > 0)
            counted_target(text, rows[i].allocations, 0);
    }
    counted_target("raise MSI-X, masks count: locks", rows[RAISE_MASKS].locks + rows[RAISE_MASKED].locks, 0);
    target("1,000 devices: time of a read, of that with one", many[OURS].ratio.median, 1.3, "x");
    target("start: first answered read, later than a bare server's", life.more.median, 1000, "us");
    target("idle: resident memory", life.resident / 1024, 2048, "KiB");
    target("idle: processor time in a second", life.cpu_ns, 0, "ns");
}

int main(int argc, char **argv)
{
    double began = now_ns();
    if (argc == 4 && strcmp(argv[1], "--serve") == 0)
        return start_anew(argv[2], atoi(argv[3]));
    if (argc > 1)
        rounds = atoi(argv[1]);
    if (argc > 2)
        only = argv[2];
    if (rounds < 1 || rounds > ROUNDS_MAX)
        fail("the number of rounds");
    choose_processors();
    pin(0, processors[0]);
    counted = mmap(NULL, sizeof(*counted), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    scratch = malloc(MIB + HEAD);
    page_fd = memfd_create("memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (counted == MAP_FAILED || !scratch || page_fd < 0 || ftruncate(page_fd, MAPS * PAGE) ||
        fcntl(page_fd, F_ADD_SEALS, F_SEAL_SHRINK))
        fail("memory");
    memset(scratch, 1, MIB + HEAD);
    for (int i = 0; i < ROWS; i++)
        if (strstr(rows[i].name, only))
            measure_row(i);
    if (strstr(many_name, only))
        measure_fleets();
    if (strstr(life_name, only))
        measure_life();
    print_rows();
    if (strstr(many_name, only))
        print_fleets();
    if (strstr(life_name, only))
        print_life();
    if (!*only)
        print_targets();
    printf("\n%.0f s\n", (now_ns() - began) / 1e9);
    return counts_missed;
}
