/* SPDX-License-Identifier: MIT */
/*
 * ==== transport, device, client ==== when the system fails
 *
 * Every allocation and every system call that the headers make fails once, in turn, with each errno that it can have, and moves
 * fewer bytes than it was asked to, while a client and a device talk: memory, DMA of both kinds, interrupts, regions,
 * migration, dirty log, disconnection. Nothing crashes, nothing is left, somebody is told what happened, and the next client is
 * served by the same device.
 *
 * The calls are replaced by macros around the implementation, so the headers themselves know nothing of it. Left out is what
 * can't fail as it is used: sysconf, sigaction, clock_gettime, sched_yield, nanosleep, and munmap of a whole mapping.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

/* ---- what fails -------------------------------------------------------------------------------------------------------- */

enum {
    NOTHING = 0,
    SHORT = -1 /* one byte */,
    CUT = -2 /* descriptors are lost */,
    END = -3 /* the peer seems to have closed */
};
enum kind {
    ALLOC,
    RECVMSG,
    SENDMSG,
    POLL,
    READ,
    WRITE,
    GETFL,
    SETFL,
    SETFD,
    DUPFD,
    SEALS,
    CLOSE,
    SOCKET,
    CONNECT,
    LSTAT,
    OPEN,
    FLOCK,
    BIND,
    UNLINK,
    LISTEN,
    ACCEPT,
    MMAP,
    FSTAT,
    FSTATFS,
    SOCKETPAIR,
    EVENTFD,
    GETSOCKOPT,
    SETSOCKOPT,
    PREADV2,
    KINDS
};

static const struct {
    const char *name;
    int hows[9]; /* errno values, or the above; NOTHING behind the last */
} kinds[KINDS] = {
    [ALLOC] = {"allocation", {ENOMEM}},
    [RECVMSG] = {"recvmsg", {EINTR, EAGAIN, ECONNRESET, ENOMEM, SHORT, CUT, END}},
    [SENDMSG] = {"sendmsg", {EINTR, EAGAIN, EPIPE, ECONNRESET, ENOMEM, ENOBUFS, ETOOMANYREFS, SHORT}},
    [POLL] = {"poll", {EINTR, ENOMEM}},
    [READ] = {"read", {EINTR, EAGAIN}},
    [WRITE] = {"write", {EINTR}},
    [GETFL] = {"fcntl F_GETFL", {EACCES}}, /* for these a security module speaks */
    [SETFL] = {"fcntl F_SETFL", {EPERM}},
    [SETFD] = {"fcntl F_SETFD", {EACCES}},
    [DUPFD] = {"fcntl F_DUPFD_CLOEXEC", {EMFILE}},
    [SEALS] = {"fcntl F_GET_SEALS", {EINVAL}},
    [CLOSE] = {"close", {EINTR, EIO}},
    [SOCKET] = {"socket", {EMFILE, ENFILE, ENOMEM, EACCES}},
    [CONNECT] = {"connect", {EINTR, ECONNREFUSED, EACCES, ENOMEM}},
    [LSTAT] = {"lstat", {ENOENT, EACCES, ENOMEM}},
    [OPEN] = {"open", {EMFILE, ENFILE, EACCES, EINTR}},
    [FLOCK] = {"flock", {EWOULDBLOCK, EINTR, ENOLCK}},
    [BIND] = {"bind", {EACCES, ENOSPC, EROFS, ENOMEM}},
    [UNLINK] = {"unlink", {EACCES, EROFS}},
    [LISTEN] = {"listen", {EADDRINUSE, ENOMEM}},
    [ACCEPT] = {"accept4", {EINTR, EAGAIN, EMFILE, ENFILE, ENOMEM, ECONNABORTED, EPERM}},
    [MMAP] = {"mmap", {ENOMEM, EACCES, EAGAIN, ENFILE, EPERM, ENODEV}},
    [FSTAT] = {"fstat", {EACCES, EOVERFLOW, ENOMEM}},
    [FSTATFS] = {"fstatfs", {EINTR, ENOSYS, EIO}},
    [SOCKETPAIR] = {"socketpair", {EMFILE, ENFILE, ENOMEM}},
    [EVENTFD] = {"eventfd", {EMFILE, ENFILE, ENODEV, ENOMEM}},
    [GETSOCKOPT] = {"getsockopt", {EACCES}},
    [SETSOCKOPT] = {"setsockopt", {EACCES, ENOMEM}},
    [PREADV2] = {"preadv2", {EAGAIN, EOPNOTSUPP, ENOSYS}},
};

enum { SITES = 64 };
static struct {
    const char *where; /* file and line of the call; NULL: free */
    unsigned calls, faults;
} sites[SITES];

static struct {
    pthread_mutex_t lock;
    bool on;
    enum kind kind;
    int how;
    unsigned nth, calls; /* of that kind, from 1 on */
    bool fired;
    const char *where; /* it has happened; NULL: nowhere yet */
    long memory;       /* allocations that live */
} failing = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* What this call is to do: NOTHING, as a rule. */
static int next_fault(const char *where, enum kind kind)
{
    int how = NOTHING, i = 0;
    pthread_mutex_lock(&failing.lock);
    if (failing.on && kind == failing.kind) {
        if (++failing.calls == failing.nth) {
            how = failing.how;
            failing.fired = true;
            failing.where = where;
        }
        while (i < SITES - 1 && sites[i].where && strcmp(sites[i].where, where))
            i++;
        sites[i].where = where;
        sites[i].calls++;
        sites[i].faults += how != NOTHING;
    }
    pthread_mutex_unlock(&failing.lock);
    return how;
}

/* The same for calls that just fail. */
static bool fails(const char *where, enum kind kind)
{
    int how = next_fault(where, kind);
    if (how > 0)
        errno = how;
    return how > 0;
}

static void *count_memory(void *memory, int more)
{
    pthread_mutex_lock(&failing.lock);
    failing.memory += memory ? more : 0;
    pthread_mutex_unlock(&failing.lock);
    return memory;
}

static void *fault_malloc(const char *where, size_t size) { return fails(where, ALLOC) ? NULL : count_memory(malloc(size), 1); }
static void *fault_calloc(const char *where, size_t n, size_t size)
{
    return fails(where, ALLOC) ? NULL : count_memory(calloc(n, size), 1);
}
static void fault_free(void *memory) { free(count_memory(memory, -1)); }

static ssize_t fault_recvmsg(const char *where, int fd, struct msghdr *msg, int flags)
{
    struct iovec first = msg->msg_iov[0];
    struct iovec *all = msg->msg_iov;
    int how = next_fault(where, RECVMSG);
    if (how == END) {
        msg->msg_controllen = 0;
        return 0;
    }
    if (how > 0) {
        errno = how;
        return -1;
    }
    first.iov_len = how == SHORT && first.iov_len ? 1 : first.iov_len;
    msg->msg_iov = &first;
    if (how == CUT)
        msg->msg_controllen = 0;
    ssize_t n = recvmsg(fd, msg, flags);
    msg->msg_iov = all;
    return n;
}

static ssize_t fault_sendmsg(const char *where, int fd, const struct msghdr *msg, int flags)
{
    struct iovec first = {.iov_base = msg->msg_iov[0].iov_base, .iov_len = 1};
    struct msghdr one = *msg;
    int how = next_fault(where, SENDMSG);
    if (how > 0) {
        errno = how;
        return -1;
    }
    if (how != SHORT)
        return sendmsg(fd, msg, flags);
    one.msg_iov = &first;
    one.msg_iovlen = 1;
    return sendmsg(fd, &one, flags);
}

/* Linux closes a descriptor even when it says that it was interrupted. */
static int fault_close(const char *where, int fd)
{
    bool fail = fails(where, CLOSE);
    int saved = errno, result = close(fd);
    errno = fail ? saved : errno;
    return fail ? -1 : result;
}

static int fault_fcntl(const char *where, int fd, int cmd, ...)
{
    va_list arguments;
    va_start(arguments, cmd);
    int argument = cmd == F_GETFL || cmd == F_GET_SEALS ? 0 : va_arg(arguments, int);
    va_end(arguments);
    enum kind kind = cmd == F_GETFL       ? GETFL
                     : cmd == F_SETFL     ? SETFL
                     : cmd == F_SETFD     ? SETFD
                     : cmd == F_GET_SEALS ? SEALS
                                          : DUPFD;
    return fails(where, kind) ? -1 : fcntl(fd, cmd, argument);
}

static void *fault_mmap(const char *where, void *at, size_t len, int prot, int flags, int fd, off_t offset)
{
    return fails(where, MMAP) ? MAP_FAILED : mmap(at, len, prot, flags, fd, offset);
}

/* Before the device reads an eventfd of the client's, the client does. -1: it doesn't. */
static int greedy = -1;

/* The one that is used: preadv2 of an eventfd. */
static long fault_syscall(const char *where, long number, int fd, const struct iovec *iov, long count, long low, long high,
                          int flags)
{
    eventfd_t ignored;
    ck_assert_int_eq(number, SYS_preadv2);
    if (greedy >= 0)
        eventfd_read(greedy, &ignored);
    return fails(where, PREADV2) ? -1 : syscall(number, fd, iov, count, low, high, flags);
}

/* These two are members of structs as well, so they get another name and not an argument more. */
static ssize_t fault_read(int fd, void *buf, size_t len) { return fails("read", READ) ? -1 : read(fd, buf, len); }
static ssize_t fault_write(int fd, const void *buf, size_t len) { return fails("write", WRITE) ? -1 : write(fd, buf, len); }

#define TEXT_OF(x)          #x
#define LINE_OF(x)          TEXT_OF(x)
#define HERE                __FILE__ ":" LINE_OF(__LINE__)
#define OR_FAIL(kind, call) (fails(HERE, kind) ? -1 : call)
#define malloc(...)         fault_malloc(HERE, __VA_ARGS__)
#define calloc(...)         fault_calloc(HERE, __VA_ARGS__)
#define free(...)           fault_free(__VA_ARGS__)
#define recvmsg(...)        fault_recvmsg(HERE, __VA_ARGS__)
#define sendmsg(...)        fault_sendmsg(HERE, __VA_ARGS__)
#define close(...)          fault_close(HERE, __VA_ARGS__)
#define fcntl(...)          fault_fcntl(HERE, __VA_ARGS__)
#define mmap(...)           fault_mmap(HERE, __VA_ARGS__)
#define poll(...)           OR_FAIL(POLL, poll(__VA_ARGS__))
#define socket(...)         OR_FAIL(SOCKET, socket(__VA_ARGS__))
#define connect(...)        OR_FAIL(CONNECT, connect(__VA_ARGS__))
#define lstat(...)          OR_FAIL(LSTAT, lstat(__VA_ARGS__))
#define open(...)           OR_FAIL(OPEN, open(__VA_ARGS__))
#define flock(...)          OR_FAIL(FLOCK, flock(__VA_ARGS__))
#define bind(...)           OR_FAIL(BIND, bind(__VA_ARGS__))
#define unlink(...)         OR_FAIL(UNLINK, unlink(__VA_ARGS__))
#define listen(...)         OR_FAIL(LISTEN, listen(__VA_ARGS__))
#define accept4(...)        OR_FAIL(ACCEPT, accept4(__VA_ARGS__))
#define fstat(...)          OR_FAIL(FSTAT, fstat(__VA_ARGS__))
#define fstatfs(...)        OR_FAIL(FSTATFS, fstatfs(__VA_ARGS__))
#define socketpair(...)     OR_FAIL(SOCKETPAIR, socketpair(__VA_ARGS__))
#define eventfd(...)        OR_FAIL(EVENTFD, eventfd(__VA_ARGS__))
#define getsockopt(...)     OR_FAIL(GETSOCKOPT, getsockopt(__VA_ARGS__))
#define setsockopt(...)     OR_FAIL(SETSOCKOPT, setsockopt(__VA_ARGS__))
#define syscall(...)        fault_syscall(HERE, __VA_ARGS__)
#define read                fault_read
#define write               fault_write
#define VFU_IMPLEMENTATION
#include "vfu.h"
#undef malloc
#undef calloc
#undef free
#undef recvmsg
#undef sendmsg
#undef close
#undef fcntl
#undef mmap
#undef poll
#undef socket
#undef connect
#undef lstat
#undef open
#undef flock
#undef bind
#undef unlink
#undef listen
#undef accept4
#undef fstat
#undef fstatfs
#undef socketpair
#undef eventfd
#undef getsockopt
#undef setsockopt
#undef syscall

#include "util.h" /* its `read` and `write` are replaced, too: the structs' members have these names now */

/* ---- a device in a thread ---------------------------------------------------------------------------------------------- */

enum {
    RUN_DMA = 0,        /* writes here in BAR 0: the device copies by itself, */
    RUN_TRANSLATOR = 8, /* or another thread of it reads memory that only messages reach */
    DOORBELL = 16       /* an ioeventfd */
};
enum { ACCEPT_MS = 100 };
enum { SEALED_AT = 0x10000, OPEN_AT = 0x20000, MESSAGE_AT = 0x30000, WINDOW = 4 * PAGE, FAULT_XFER = PAGE };

typedef struct world {
    rig r;
    char path[64];
    pthread_t loop, translator;
    sem_t start;
    atomic_bool quit;
    vfu_dma in, out, fast[2];
    uint8_t moved[3 * PAGE], translated[PAGE];
    uint8_t message_memory[WINDOW];
    int sealed, shrinkable, io_event;
    vfu_io_fd io_fd;
    char log[4096];
    pthread_mutex_t log_lock;
    bool twin;   /* the client takes a second socket */
    int err;     /* the first in this session */
    bool gone;   /* the client of this session has lost its server */
    int run_err; /* that vfu_dev_run said */
} world;

static world w;

static void keep_log(void *ctx, vfu_level level, const char *line)
{
    (void)ctx, (void)level;
    pthread_mutex_lock(&w.log_lock);
    size_t have = strlen(w.log);
    snprintf(w.log + have, sizeof(w.log) - have, "%s\n", line);
    pthread_mutex_unlock(&w.log_lock);
}

static void *run_device(void *arg)
{
    (void)arg;
    do {
        int err = vfu_dev_run(w.r.dev);
        if (err)
            w.run_err = err;
    } while (!atomic_load(&w.quit));
    return NULL;
}

static void *run_translator(void *arg)
{
    (void)arg;
    for (;;) {
        vfu_iommu_reader *reader;
        while (sem_wait(&w.start) < 0) {
        }
        if (atomic_load(&w.quit))
            return NULL;
        if (vfu_iommu_reader_open(vfu_dev_iommu(w.r.dev), &reader) == 0) {
            vfu_iommu_read(reader, MESSAGE_AT, w.translated, sizeof(w.translated));
            vfu_iommu_reader_close(reader);
        }
        vfu_dev_raise(w.r.dev, VFU_PCI_IRQ_MSIX, 1);
    }
}

static void told_out(vfu_dma *dma, int result)
{
    (void)dma, (void)result;
    vfu_dev_raise(w.r.dev, VFU_PCI_IRQ_MSIX, 0);
    vfu_dev_set_intx(w.r.dev, true);
}

static void start_out(vfu_dma *dma, int result)
{
    (void)dma;
    if (result || vfu_dev_dma(w.r.dev, &w.out) != 1)
        told_out(&w.out, result);
}

static void done_fast(vfu_dma *dma, int result) { (void)dma, (void)result; }

/* From memory that only messages reach to both kinds. */
static void copy_around(rig *r)
{
    w.in = (vfu_dma){.iova = MESSAGE_AT, .buf = w.moved, .len = 2 * PAGE, .done = start_out};
    w.out = (vfu_dma){.iova = MESSAGE_AT + 2 * PAGE, .buf = w.moved, .len = 2 * PAGE, .to_client = true, .done = told_out};
    w.fast[0] = (vfu_dma){.iova = SEALED_AT, .buf = w.moved + 2 * PAGE, .len = PAGE, .done = done_fast};
    w.fast[1] = (vfu_dma){.iova = OPEN_AT, .buf = w.moved + 2 * PAGE, .len = PAGE, .to_client = true, .done = done_fast};
    vfu_dev_dma(r->dev, &w.fast[0]); /* at once, but where a file could not be mapped */
    vfu_dev_dma(r->dev, &w.fast[1]);
    int result = vfu_dev_dma(r->dev, &w.in);
    if (result <= 0)
        start_out(&w.in, result);
}

static void on_doorbell(rig *r)
{
    if (r->last_region == 0 && r->last_offset == RUN_DMA)
        vfu_dev_want_work(r->dev);
    if (r->last_region == 0 && r->last_offset == RUN_TRANSLATOR)
        sem_post(&w.start);
}

static int follow(void *ctx, vfu_mig_state from, vfu_mig_state to)
{
    (void)ctx, (void)from, (void)to;
    return 0;
}

static int64_t save(void *ctx, void *buf, size_t len)
{
    (void)ctx;
    memset(buf, 7, len);
    return (int64_t)(len / 2);
}

static int load(void *ctx, const void *buf, size_t len)
{
    (void)ctx, (void)buf, (void)len;
    return 0;
}

static void *fault_alloc(void *ctx, size_t size)
{
    (void)ctx;
    return fault_malloc("alloc of the descriptor", size);
}

static void fault_release(void *ctx, void *memory, size_t size)
{
    (void)ctx, (void)size;
    fault_free(memory);
}

/* The device, without a thread. own_alloc: with an allocator of its own, instead of libc's. */
static int create_device(bool own_alloc, const vfu_policy *policy)
{
    vfu_dev_desc desc = rig_desc(&w.r);
    w.r.on_write = on_doorbell;
    w.r.on_work = copy_around;
    w.io_fd = (vfu_io_fd){.region = 0, .offset = DOORBELL, .size = 4, .fd = w.io_event};
    desc.io_fds = &w.io_fd;
    desc.io_fd_count = 1;
    desc.migration = (vfu_migration){.pre_copy = true, .change = follow, .read = save, .write = load};
    desc.max_data_xfer_size = FAULT_XFER;
    desc.max_dma_maps = 64;
    desc.max_readers = 2;
    desc.twin_socket = true;
    desc.logger = (vfu_logger){.write = keep_log};
    desc.policy = *policy;
    if (own_alloc)
        desc.alloc = (vfu_alloc){.alloc = fault_alloc, .release = fault_release};
    return vfu_dev_create(&w.r.dev, &desc);
}

static void destroy_device(void)
{
    vfu_dev_destroy(w.r.dev);
    w.r.dev = NULL;
    close(w.r.ram);
}

static int start_device(void)
{
    int err = create_device(true, &(vfu_policy){0});
    if (!err)
        err = vfu_dev_listen(w.r.dev, w.path);
    if (err) {
        destroy_device();
        return err;
    }
    atomic_store(&w.quit, false);
    ck_assert_int_eq(pthread_create(&w.loop, NULL, run_device, NULL), 0);
    ck_assert_int_eq(pthread_create(&w.translator, NULL, run_translator, NULL), 0);
    return 0;
}

static void stop_device(void)
{
    atomic_store(&w.quit, true);
    sem_post(&w.start);
    vfu_dev_stop(w.r.dev);
    ck_assert_int_eq(pthread_join(w.loop, NULL), 0);
    ck_assert_int_eq(pthread_join(w.translator, NULL), 0);
    destroy_device();
}

/* ---- a session --------------------------------------------------------------------------------------------------------- */

/* Notes the first error. */
static bool went(int err)
{
    if (err < 0 && !w.err)
        w.err = err;
    return err >= 0;
}

static vfu_msg feature(uint32_t flags, const void *data, uint32_t len)
{
    vfu_msg m = command(VFU_CMD_DEVICE_FEATURE);
    m.u.feature.argsz = 4096;
    m.u.feature.flags = flags;
    m.u.feature.data = data;
    m.u.feature.data_len = len;
    return m;
}

static bool call(vfu_client *client, vfu_msg request, const int *fds, unsigned fd_count, vfu_msg *reply)
{
    int received[VFU_FDS_MAX];
    bool good = went(vfu_client_call(client, &request, fds, fd_count, reply, received, VFU_FDS_MAX));
    close_fds(received, VFU_FDS_MAX);
    return good;
}

static void set_state(vfu_client *client, vfu_mig_state state)
{
    vfu_wire_feature_mig_state wire = {.state = state};
    vfu_msg reply;
    call(client, feature(VFU_FEATURE_MIG_STATE | VFU_FEATURE_SET, &wire, sizeof(wire)), NULL, 0, &reply);
}

static void migrate(vfu_client *client)
{
    struct {
        vfu_wire_feature_log_control control;
        vfu_wire_feature_log_range range;
    } start = {{.page_size = PAGE, .num_ranges = 1}, {.iova = SEALED_AT, .length = 16 * PAGE}};
    vfu_wire_feature_log_report report = {.iova = SEALED_AT, .length = 16 * PAGE, .page_size = PAGE};
    vfu_msg reply, read_some = command(VFU_CMD_MIG_DATA_READ), write_some = command(VFU_CMD_MIG_DATA_WRITE);
    call(client, feature(VFU_FEATURE_LOGGING_START | VFU_FEATURE_SET, &start, sizeof(start)), NULL, 0, &reply);
    call(client, feature(VFU_FEATURE_LOGGING_REPORT | VFU_FEATURE_GET, &report, sizeof(report)), NULL, 0, &reply);
    call(client, feature(VFU_FEATURE_LOGGING_STOP | VFU_FEATURE_SET, NULL, 0), NULL, 0, &reply);
    set_state(client, VFU_MIG_STATE_PRE_COPY);
    read_some.u.mig_data = (__typeof__(read_some.u.mig_data)){.argsz = 1024, .size = 512};
    call(client, read_some, NULL, 0, &reply);
    set_state(client, VFU_MIG_STATE_RESUMING);
    write_some.u.mig_data = (__typeof__(write_some.u.mig_data)){.argsz = 40, .size = 32, .data = w.moved, .data_len = 32};
    call(client, write_some, NULL, 0, &reply);
    set_state(client, VFU_MIG_STATE_RUNNING);
}

/* Rings a doorbell and waits for the interrupt, serving the device meanwhile. */
static void ring(vfu_client *client, uint32_t doorbell, int event_fd)
{
    eventfd_t count;
    if (!went(vfu_client_region_write(client, 0, doorbell, "run", 4)))
        return;
    /* where something was refused, nothing will come */
    int woken = vfu_client_serve(client, event_fd, w.err || failing.fired ? 10 : PATIENCE_MS);
    went(woken);
    if (woken > 0)
        must(eventfd_read(event_fd, &count));
    else if (!w.err && !failing.fired)
        w.err = -ETIME;
}

/* Several requests at once. */
static void pipeline(vfu_client *client)
{
    uint8_t data[16] = {0};
    vfu_completion done;
    int ids[4];
    for (unsigned i = 0; i < 4; i++)
        ids[i] = vfu_client_submit_read(client, 0, 4 * i, data + 4 * i, 4, NULL);
    went(vfu_client_post_write(client, 0, 32, data, 4));
    for (unsigned i = 0; i < 4; i++)
        if (went(ids[i]) && went(vfu_client_wait(client, ids[i], &done)))
            went(done.result);
}

/* What a client does, from its arrival to its end. Returns the first error of all of it. */
static int talk(void)
{
    vfu_client_desc desc = {.timeout_ms = PATIENCE_MS,
                            .max_data_xfer_size = FAULT_XFER,
                            .max_dma_maps = 16,
                            .twin_socket = w.twin,
                            .reconnects = true,
                            .alloc = {.alloc = fault_alloc, .release = fault_release},
                            .logger = {.write = keep_log}};
    vfu_client *client;
    vfu_wire_device_info info;
    vfu_wire_irq_info irq;
    vfu_client_region region;
    vfu_msg reply, io_fds = command(VFU_CMD_DEVICE_GET_REGION_IO_FDS), unmask = command(VFU_CMD_DEVICE_SET_IRQS);
    uint8_t bytes[2 * PAGE], back[2 * PAGE];
    int events[3] = {event(), event(), eventfd(0, EFD_CLOEXEC)}, unmask_fd = eventfd(0, EFD_CLOEXEC);
    w.err = 0;
    memset(bytes, 0x5a, sizeof(bytes));
    memset(w.moved, 0, sizeof(w.moved));
    memset(w.translated, 0, sizeof(w.translated));
    memset(w.message_memory, 0xc3, WINDOW / 2);
    memset(w.message_memory + WINDOW / 2, 0, WINDOW / 2);
    if (went(vfu_client_connect(&client, w.path, &desc))) {
        went(vfu_client_info(client, &info));
        went(vfu_client_irq_info(client, VFU_PCI_IRQ_MSIX, &irq));
        if (went(vfu_client_region_info(client, 2, &region)))
            close(region.fd);
        io_fds.u.region_io_fds.argsz = 256;
        call(client, io_fds, NULL, 0, &reply);
        went(vfu_client_region_write(client, 2, 0, bytes, sizeof(bytes)));
        if (went(vfu_client_region_read(client, 2, 0, back, sizeof(back))) && !w.err)
            ck_assert_mem_eq(bytes, back, sizeof(bytes));
        went(vfu_client_dma_map(client, SEALED_AT, WINDOW, 3, w.message_memory, w.sealed, 0));
        went(vfu_client_dma_map(client, OPEN_AT, WINDOW, 3, w.message_memory, w.shrinkable, 0));
        went(vfu_client_dma_map(client, MESSAGE_AT, WINDOW, 3, w.message_memory, -1, 0));
        went(vfu_client_irq_assign(client, VFU_PCI_IRQ_MSIX, 0, 2, events));
        went(vfu_client_irq_assign(client, VFU_PCI_IRQ_INTX, 0, 1, events + 2));
        unmask.u.irq_set = (__typeof__(unmask.u.irq_set)){.argsz = 20,
                                                          .flags = VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_UNMASK,
                                                          .index = VFU_PCI_IRQ_INTX,
                                                          .count = 1};
        call(client, unmask, &unmask_fd, 1, &reply);
        ring(client, RUN_DMA, events[0]);
        ring(client, RUN_TRANSLATOR, events[1]);
        if (!w.err && !failing.fired) {
            ck_assert_mem_eq(w.message_memory, w.message_memory + WINDOW / 2, WINDOW / 2);
            ck_assert_mem_eq(w.translated, w.message_memory, PAGE);
        }
        pipeline(client);
        went(vfu_client_region_open(client, 2, VFU_CLIENT_BY_MEMORY));
        went(vfu_client_region_write(client, 2, PAGE, bytes, sizeof(bytes)));
        went(vfu_client_region_open(client, 0, VFU_CLIENT_BY_EVENTFD));
        went(vfu_client_region_write(client, 0, DOORBELL, "ring", 4));
        must(eventfd_write(unmask_fd, 1)); /* the end of an interrupt, and the device looks at it with the next request */
        went(vfu_client_irq_action(client, VFU_PCI_IRQ_INTX, 0, 1, VFU_IRQ_SET_ACTION_MASK));
        migrate(client);
        went(vfu_client_dma_unmap(client, OPEN_AT, WINDOW));
        went(vfu_client_irq_assign(client, VFU_PCI_IRQ_MSIX, 0, 2, NULL));
        went(vfu_client_reset(client));
        went(vfu_client_reconnect(client, w.path));
        went(vfu_client_info(client, &info));
        vfu_client_destroy(client);
    }
    close_fds(events, 3);
    close(unmask_fd);
    return w.err;
}

/* ---- the same without threads, by hand: the second socket, and replies that have to wait ------------------------------- */

static struct sockaddr_un listening_at;
static socklen_t listening_len;
static peer twin;

static int start_listening(void)
{
    int err = create_device(false, &(vfu_policy){.msix_masks = true});
    if (!err)
        err = vfu_dev_attach(w.r.dev, listener(&listening_at, &listening_len));
    if (err)
        destroy_device();
    return err;
}

static int start_connected(void)
{
    int err = create_device(false, &(vfu_policy){.map_exactly = true, .complete_accesses = true});
    listening_len = 0;
    if (err)
        destroy_device();
    return err;
}

static void answer_dma(peer *p)
{
    size_t len;
    vfu_msg m, reply;
    if (vfu_msg_decode(p->bytes, p->have, &m) || (m.cmd != VFU_CMD_DMA_READ && m.cmd != VFU_CMD_DMA_WRITE))
        return;
    vfu_msg_init_reply(&reply, &m, 0);
    reply.u.dma.address = m.u.dma.address;
    reply.u.dma.count = m.u.dma.count;
    reply.u.dma.ack_len = 16;
    if (m.cmd == VFU_CMD_DMA_READ) {
        reply.u.dma.data = w.message_memory;
        reply.u.dma.data_len = (uint32_t)m.u.dma.count;
    }
    const uint8_t *bytes = encoded(&reply, &len);
    send_some(p->sock, bytes, len, NULL, 0);
}

/* Reads what there is and answers the device's DMA. Counts the replies; the last one's header is left. -EPIPE: the device has
 * closed. */
static int hear(peer *p, unsigned *replies, vfu_wire_header *last)
{
    int got;
    while ((got = peer_receive(p)) == 1) {
        vfu_wire_header header = header_of(p->bytes);
        if (!(header.flags & VFU_HDR_REPLY)) {
            answer_dma(p);
            continue;
        }
        *last = header;
        ++*replies;
        if (header.cmd == VFU_CMD_VERSION && p->fd_count) {
            twin.sock = p->fds[0];
            p->fds[0] = -1;
        }
    }
    return got;
}

/* Lets device and client take turns until neither has more to say. */
static int take_turns(unsigned *replies, vfu_wire_header *last)
{
    int err = 0;
    for (unsigned rest = 0; rest < 8 && !err; rest++) {
        unsigned before = *replies, none = 0;
        settle(w.r.dev);
        if (vfu_dev_timeout(w.r.dev) > 0 && vfu_dev_timeout(w.r.dev) <= ACCEPT_MS) /* it accepts nobody before that */
            poll(NULL, 0, vfu_dev_timeout(w.r.dev));
        err = hear(&w.r.client, replies, last);
        if (!err && twin.sock >= 0)
            hear(&twin, &none, last);
        if (*replies != before)
            rest = 0;
    }
    return err;
}

/* 0, or the error of the reply; -EPIPE: there is none. */
static int ask_alone(vfu_msg request, const int *fds, unsigned fd_count)
{
    unsigned replies = 0;
    size_t len;
    vfu_wire_header last = {0};
    request.id = ++w.r.id;
    const uint8_t *bytes = encoded(&request, &len);
    if (send_some(w.r.client.sock, bytes, len, fds, fd_count) != (int64_t)len)
        return -EPIPE;
    int err = take_turns(&replies, &last);
    return err ? err : replies != 1 ? -EPROTO : -(int)last.error;
}

static vfu_msg write_to(uint32_t region, uint64_t offset, const void *data, uint32_t len)
{
    vfu_msg m = command(VFU_CMD_REGION_WRITE);
    m.u.region.region = region;
    m.u.region.offset = offset;
    m.u.region.count = m.u.region.data_len = len;
    m.u.region.data = data;
    return m;
}

static vfu_msg map_of(uint64_t iova)
{
    vfu_msg m = command(VFU_CMD_DMA_MAP);
    m.u.dma_map = (__typeof__(m.u.dma_map)){.argsz = 32, .flags = RW, .address = iova, .size = WINDOW};
    return m;
}

static vfu_msg irqs_of(uint32_t flags, uint32_t index, uint32_t count)
{
    vfu_msg m = command(VFU_CMD_DEVICE_SET_IRQS);
    m.u.irq_set = (__typeof__(m.u.irq_set)){.argsz = 20, .flags = flags, .index = index, .count = count};
    return m;
}

/* Asks for a region's descriptor again and again, and reads the replies, which don't fit the socket, when all is asked. */
static void flood(void)
{
    enum { REQUESTS = 24 };
    vfu_msg info = command(VFU_CMD_DEVICE_GET_REGION_INFO);
    vfu_wire_header last = {0};
    unsigned replies = 0;
    size_t len;
    info.u.region_info.argsz = 128;
    info.u.region_info.index = 2;
    const uint8_t *bytes = encoded(&info, &len);
    for (unsigned i = 0; i < REQUESTS; i++)
        if (send_some(w.r.client.sock, bytes, len, NULL, 0) != (int64_t)len)
            break;
    int err = take_turns(&replies, &last);
    went(err ? err : replies == REQUESTS ? -(int)last.error : -EPROTO);
}

static int talk_alone(void)
{
    static const char json[] = "{\"capabilities\":{\"max_msg_fds\":16,\"twin_socket\":{\"supported\":true}}}";
    vfu_msg hello = command(VFU_CMD_VERSION);
    int events[3] = {event(), eventfd(0, EFD_CLOEXEC), event()}, unmask_fd = eventfd(0, EFD_CLOEXEC), err = 0;
    static const uint8_t enable[] = {0, 0xc0}, unmask_function[] = {0, 0x80}, unmasked[4] = {0};
    hello.u.version.json = json;
    hello.u.version.json_len = sizeof(json) - 1;
    w.err = 0;
    twin = (peer){.sock = -1};
    if (listening_len) {
        w.r.client.sock = connect_to(&listening_at, listening_len);
    } else {
        int pair[2], small = 4608; /* the least that Linux gives */
        make_pair(pair);
        must(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)));
        w.r.client.sock = pair[1];
        err = vfu_dev_attach(w.r.dev, pair[0]);
    }
    if (went(err) && went(ask_alone(hello, NULL, 0))) {
        uint32_t control = vfu_pci_capability(vfu_dev_pci(w.r.dev), 0x11) + 2u;
        went(ask_alone(irqs_of(0x24, VFU_PCI_IRQ_MSIX, 2), events, 2));
        went(ask_alone(irqs_of(0x24, VFU_PCI_IRQ_INTX, 1), events + 2, 1));
        went(ask_alone(irqs_of(VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_UNMASK, VFU_PCI_IRQ_INTX, 1), &unmask_fd, 1));
        went(ask_alone(map_of(SEALED_AT), &w.sealed, 1));
        went(ask_alone(map_of(OPEN_AT), &w.shrinkable, 1));
        went(ask_alone(map_of(MESSAGE_AT), NULL, 0));
        went(ask_alone(write_to(VFU_PCI_REGION_CONFIG, control, enable, 2), NULL, 0));
        went(ask_alone(write_to(0, RUN_DMA, "run", 4), NULL, 0));
        went(ask_alone(write_to(4, 12, unmasked, 4), NULL, 0));
        went(ask_alone(write_to(4, 16 + 12, unmasked, 4), NULL, 0));
        went(ask_alone(write_to(VFU_PCI_REGION_CONFIG, control, unmask_function, 2), NULL, 0));
        if (!failing.fired) {
            eventfd_t count;
            must(eventfd_read(events[0], &count));
            must(eventfd_read(events[2], &count));
        }
        must(eventfd_write(unmask_fd, 1));
        went(ask_alone(irqs_of(0x21, VFU_PCI_IRQ_MSIX, 2), NULL, 0));
        flood();
    }
    peer_close(&twin);
    peer_close(&w.r.client);
    settle(w.r.dev);
    close_fds(events, 3);
    close(unmask_fd);
    return w.err;
}

/* ---- each call in turn ------------------------------------------------------------------------------------------------- */

static unsigned fds_before, runs, fired;

static void prepare(void)
{
    w.twin = false;
    snprintf(w.path, sizeof(w.path), "/tmp/vfu-faults-%d.sock", (int)getpid());
    unlink(w.path); /* of a process of that number that was killed long ago */
    pthread_mutex_init(&w.log_lock, NULL);
    must(sem_init(&w.start, 0, 0));
    w.sealed = memfd("faults-sealed", WINDOW, F_SEAL_SHRINK);
    w.shrinkable = memfd("faults-open", WINDOW, 0);
    w.io_event = event();
    fds_before = fds_open();
    runs = fired = 0;
    memset(sites, 0, sizeof(sites));
}

static void finish(void)
{
    ck_assert_uint_eq(fds_open(), fds_before);
    close(w.sealed);
    close(w.shrinkable);
    close(w.io_event);
}

static void arm(enum kind kind, int how, unsigned nth)
{
    failing.kind = kind;
    failing.how = how;
    failing.nth = nth;
    failing.calls = 0;
    failing.fired = false;
    failing.where = NULL;
    failing.on = true;
    w.log[0] = '\0';
    w.run_err = 0;
}

static const char *how_text(int how)
{
    return how == SHORT ? "short" : how == CUT ? "cut" : how == END ? "end" : vfu_errno_name(-how);
}

#define SO       "%s number %u at %s, %s: "
#define SO_WHICH kinds[failing.kind].name, failing.nth, failing.where ? failing.where : "no place", how_text(failing.how)

/* Was somebody told what happened? By the result of a call, or by a line of log that names the error, or says that descriptors
 * or the peer were lost. */
static bool is_told(int err)
{
    int how = failing.how;
    return err == -how || w.run_err == -how || strstr(w.log, how_text(how)) || (how == END && err == -EPIPE) ||
           (how == CUT && (strstr(w.log, "EBADMSG") || strstr(w.log, "descriptors were lost"))) ||
           ((how == EPIPE || how == ECONNRESET) && err == -EPIPE) ||
           (err == -EADDRINUSE && failing.kind != BIND) || /* whether somebody listens at the path can't be found out */
           ((failing.kind == FSTAT || failing.kind == GETSOCKOPT) && w.log[0]) ||
           /* what the client was given can't be looked at, so it is used by message */
           ((failing.kind == FSTAT || failing.kind == FSTATFS || failing.kind == GETFL) && err == -ENODEV);
}

static void check_nothing_left(void)
{
    ck_assert_msg(failing.memory == 0, SO "%ld allocations are left", SO_WHICH, failing.memory);
    ck_assert_msg(fds_open() == fds_before, SO "%u descriptors instead of %u", SO_WHICH, fds_open(), fds_before);
    ck_assert_msg(vmas_of("faults-") == 0, SO "memory of the client is still mapped", SO_WHICH);
    ck_assert_msg(access(w.path, F_OK) < 0, SO "the socket file is left", SO_WHICH);
}

/* A file at the path that nobody listens on any more. */
static void leave_stale_socket(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    must(fd);
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", w.path);
    unlink(w.path);
    must(bind(fd, (struct sockaddr *)&address, sizeof(address)));
    close(fd);
}

static int start_on_stale(void)
{
    leave_stale_socket();
    w.twin = true;
    return start_device();
}

static const struct course {
    int (*start)(void), (*talk)(void);
    void (*stop)(void);
} courses[] = {
    {start_device, talk, stop_device},
    {start_on_stale, talk, stop_device},
    {start_listening, talk_alone, destroy_device},
    {start_connected, talk_alone, destroy_device},
};

/* One whole life of a device, with one fault. False: that call was never reached. */
static bool one_life(const struct course *course, enum kind kind, int how, unsigned nth)
{
    w.twin = false;
    arm(kind, how, nth);
    int err = course->start();
    bool started = !err;
    if (!started && course->start != start_on_stale)
        ck_assert_msg(access(w.path, F_OK) < 0, SO "a socket file is left", SO_WHICH);
    if (started)
        err = course->talk();
    bool before_the_end = failing.fired;
    if (err)
        ck_assert_msg(before_the_end, SO "nothing failed, but the session did: %s\n%s", SO_WHICH, vfu_errno_name(err), w.log);
    for (unsigned ms = 0; ms < 2000 && err && !is_told(err); ms++) /* the device's thread closes first, and then speaks */
        poll(NULL, 0, 1);
    if (err || w.run_err)
        ck_assert_msg(is_told(err), SO "nobody is told, but %s\n%s", SO_WHICH, vfu_errno_name(err), w.log);
    /* a client that gives up knows that it has, and asks for no more */
    ck_assert_msg(!strstr(w.log, "a reply to nothing"), SO "the client lost its place\n%s", SO_WHICH, w.log);
    if (!started) /* also on what the first attempt has left */
        ck_assert_msg(course->start() == 0, SO "the next device can't be made", SO_WHICH);
    if (before_the_end) {
        failing.fired = false;
        err = course->talk();
        ck_assert_msg(err == 0, SO "the next client is not served: %s\n%s", SO_WHICH, vfu_errno_name(err), w.log);
    }
    course->stop();
    failing.on = false;
    if (kind == UNLINK || kind == LSTAT) /* it can't be removed, or not be known as ours */
        unlink(w.path);
    check_nothing_left();
    runs++;
    fired += before_the_end || failing.fired;
    return before_the_end || failing.fired;
}

/* Each call of the kind was made to fail: no place in the headers is left out that a session passes. */
static void check_sites(enum kind kind)
{
    for (unsigned i = 0; i < SITES && sites[i].where; i++)
        ck_assert_msg(sites[i].faults > 0, "%s at %s never failed", kinds[kind].name, sites[i].where);
}

START_TEST(each_call)
{
    enum kind kind = (enum kind)_i;
    prepare();
    for (const int *how = kinds[kind].hows; *how != NOTHING; how++)
        for (size_t i = 0; i < COUNT(courses); i++)
            for (unsigned nth = 1; one_life(&courses[i], kind, *how, nth); nth++) {
            }
    check_sites(kind);
    printf("%s: %u sessions, %u of them with a fault\n", kinds[kind].name, runs, fired);
    finish();
}
END_TEST

/* An eventfd that blocks, and whose owner is always a little faster: the device doesn't wait for it. */
START_TEST(greedy_client)
{
    if (emulated_by("qemu"))
        return; /* it has no preadv2(), so that nobody knows how not to wait */
    prepare();
    ck_assert_int_eq(start_connected(), 0);
    rig_connect(&w.r);
    ck_assert_int_eq(ask_version(&w.r, NULL), 0);
    int intx = event(), unmask_fd = eventfd(0, EFD_CLOEXEC);
    ck_assert_int_eq(ask_irqs(&w.r, 0x24, VFU_PCI_IRQ_INTX, 0, 1, NULL, &intx, 1), 0);
    ck_assert_int_eq(ask_irqs(&w.r, VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_UNMASK, VFU_PCI_IRQ_INTX, 0, 1, NULL,
                              &unmask_fd, 1),
                     0);
    vfu_dev_set_intx(w.r.dev, true);
    ck_assert_uint_eq(signals(intx), 1);
    must(eventfd_write(unmask_fd, 1));
    greedy = unmask_fd;
    check_healthy(&w.r);
    ck_assert_uint_eq(signals(intx), 0); /* for the device, nothing has ended the interrupt */
    greedy = -1;
    must(eventfd_write(unmask_fd, 1));
    check_healthy(&w.r);
    ck_assert_uint_eq(signals(intx), 1);
    rig_destroy(&w.r);
    close(intx);
    close(unmask_fd);
    finish();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("faults");
    TCase *tc = tcase_create("faults");
    tcase_add_loop_test(tc, each_call, 0, KINDS);
    tcase_add_test(tc, greedy_client);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
