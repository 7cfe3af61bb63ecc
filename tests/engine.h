/* SPDX-License-Identifier: MIT */
/*
 * For test_engine.c: starts the engine as a program, and talks to it with nothing but a socket. Nothing of vfu.h is used here, so
 * that a mistake made there is not made here again: the numbers and layouts are taken from the specification and from
 * linux/vfio.h.
 *
 * The engine that is started: $VFU_ENGINE, else dma_engine in $VFU_EXAMPLES, else build/examples/dma_engine.
 */
#ifndef TESTS_ENGINE_H
#define TESTS_ENGINE_H

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

enum {
    PAGE = 4096,
    KIB = 1024,
    MIB = 1024 * 1024,
    PATIENCE = 30000, /* milliseconds that anything may take which has to happen at all; a loaded machine is slow */
};

/* ---- the wire -------------------------------------------------------------------------------------------------------------- */

enum {
    VERSION = 1,
    DMA_MAP = 2,
    DMA_UNMAP = 3,
    GET_INFO = 4,
    GET_REGION_INFO = 5,
    GET_IRQ_INFO = 7,
    SET_IRQS = 8,
    REGION_READ = 9,
    REGION_WRITE = 10,
    DMA_READ = 11,
    DMA_WRITE = 12,
    DEVICE_RESET = 13,
    REGION_WRITE_MULTI = 15,
};

enum { TYPE_MASK = 0xf, REPLY = 1, NO_REPLY = 0x10, ERROR = 0x20 }; /* flags of a message */
enum { READABLE = 1, WRITEABLE = 2 };
enum { INTX = 0, MSIX = 2 };
enum { DATA_NONE = 1, DATA_EVENTFD = 4, ACTION_MASK = 8, ACTION_UNMASK = 16, ACTION_TRIGGER = 32 };
enum { BAR0 = 0, BAR2 = 2, BAR4 = 4, CONFIG = 7 };

enum {
    BODY_MAX = 256 * KIB, /* twice what the engine may ever send */
    FDS_MAX = 16,
};

typedef struct header {
    uint16_t id, cmd;
    uint32_t size, flags, error;
} header;

typedef struct frame {
    header h;
    uint8_t body[BODY_MAX];
    uint32_t len; /* of the body */
    int fds[FDS_MAX];
    unsigned fd_count;
} frame;

typedef struct map_request {
    uint32_t argsz, flags;
    uint64_t offset, address, size;
} map_request;

typedef struct unmap_request {
    uint32_t argsz, flags;
    uint64_t address, size;
} unmap_request;

typedef struct info { /* GET_INFO; GET_IRQ_INFO has index and count in the last two */
    uint32_t argsz, flags, regions, irqs;
} info;

typedef struct region_info {
    uint32_t argsz, flags, index, cap_offset;
    uint64_t size, offset;
} region_info;

typedef struct irq_set {
    uint32_t argsz, flags, index, start, count;
} irq_set;

typedef struct region_access {
    uint64_t offset;
    uint32_t region, count;
} region_access;

typedef struct dma_access {
    uint64_t address, count;
} dma_access;

/* ---- time ------------------------------------------------------------------------------------------------------------------ */

static inline int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000) + t.tv_nsec / 1000000;
}

static inline void nap(void)
{
    struct timespec t = {.tv_nsec = 500000};
    nanosleep(&t, NULL);
}

/* ---- the program ----------------------------------------------------------------------------------------------------------- */

typedef struct program {
    pid_t pid;               /* 0: none */
    char path[100];          /* of its socket */
    char out[100], err[100]; /* what it prints */
} program;

/* Everything that a run leaves in the file system is in here. */
static char scratch[40];

static inline const char *engine_file(void)
{
    static char file[4096];
    const char *path = getenv("VFU_ENGINE"), *examples = getenv("VFU_EXAMPLES");
    if (path && *path)
        return path;
    if (!examples || !*examples)
        return "build/examples/dma_engine";
    snprintf(file, sizeof(file), "%s/dma_engine", examples);
    return file;
}

/* Names for a program's files that no other has. */
static inline void name_files(program *g)
{
    static unsigned number;
    number++;
    snprintf(g->path, sizeof(g->path), "%s/%d-%u.sock", scratch, (int)getpid(), number);
    snprintf(g->out, sizeof(g->out), "%s/%d-%u.out", scratch, (int)getpid(), number);
    snprintf(g->err, sizeof(g->err), "%s/%d-%u.err", scratch, (int)getpid(), number);
}

static inline void redirect(int fd, const char *path)
{
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_APPEND, 0600);
    if (file < 0 || dup2(file, fd) < 0)
        _exit(126);
    close(file);
}

/* Starts it with these arguments (NULL ends them), `inherited` open, and at most `files` descriptors (0: as many as we). It
 * dies with us. */
static inline void spawn(program *g, const char *const *arguments, int inherited, rlim_t files)
{
    char *argv[16] = {(char *)(uintptr_t) "dma_engine"};
    for (unsigned i = 0; arguments[i] && i < 14; i++)
        argv[i + 1] = (char *)(uintptr_t)arguments[i];
    g->pid = fork();
    if (g->pid)
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    redirect(0, "/dev/null");
    redirect(1, g->out);
    redirect(2, g->err);
    if (inherited >= 0)
        fcntl(inherited, F_SETFD, 0);
    struct rlimit limit = {.rlim_cur = files, .rlim_max = files};
    if (files && setrlimit(RLIMIT_NOFILE, &limit) < 0)
        _exit(126);
    execv(engine_file(), argv);
    _exit(127);
}

/* Its exit status, 1000 + the signal that ended it, or -1: it doesn't end (and is killed). */
static inline int wait_end(program *g)
{
    int status = 0;
    int64_t until = now_ms() + PATIENCE;
    pid_t pid = g->pid;
    while (waitpid(pid, &status, WNOHANG) == 0) {
        if (now_ms() > until) {
            kill(pid, SIGKILL);
            waitpid(pid, &status, 0);
            g->pid = 0;
            return -1;
        }
        nap();
    }
    g->pid = 0;
    return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status);
}

static inline bool is_running(program *g)
{
    siginfo_t ended = {0};
    return g->pid && waitid(P_PID, (id_t)g->pid, &ended, WEXITED | WNOHANG | WNOWAIT) == 0 && ended.si_pid == 0;
}

/* The text of a file from an offset on; the buffer is overwritten by the next call. */
static inline const char *text_of(const char *path, off_t from)
{
    static char text[64 * KIB];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t len = fd < 0 ? 0 : pread(fd, text, sizeof(text) - 1, from);
    if (fd >= 0)
        close(fd);
    text[len > 0 ? len : 0] = 0;
    return text;
}

static inline off_t size_of(const char *path)
{
    struct stat st;
    return stat(path, &st) < 0 ? 0 : st.st_size;
}

static inline bool is_there(const char *path)
{
    struct stat st;
    return lstat(path, &st) == 0;
}

/* A connected socket, or a negative errno. */
static inline int dial_with(const char *path, int flags)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        int err = -errno;
        close(fd);
        return err;
    }
    return fd < 0 ? -errno : fd;
}

static inline int dial(const char *path) { return dial_with(path, 0); }

/* Doesn't wait where too many wait already. */
static inline int dial_now(const char *path) { return dial_with(path, SOCK_NONBLOCK); }

/* Waits until it listens. A connected socket, or a negative errno: it has ended, or is too slow. */
static inline int dial_when_ready(program *g)
{
    int64_t until = now_ms() + PATIENCE;
    for (;;) {
        int fd = dial(g->path);
        if (fd >= 0 || !is_running(g) || now_ms() > until)
            return fd;
        nap();
    }
}

/* A listening socket, or a negative errno. */
static inline int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 8) < 0)
        return -errno;
    return fd;
}

/* ---- the engine of a test -------------------------------------------------------------------------------------------------- */

static program engine;

/* Ends the test, and says what the engine said. */
#define FAIL(...)                                                                                                                \
    do {                                                                                                                         \
        char why_[400];                                                                                                          \
        snprintf(why_, sizeof(why_), __VA_ARGS__);                                                                               \
        ck_abort_msg("%s; the engine %s and printed: %.2000s", why_, is_running(&engine) ? "runs" : "has ended",                 \
                     text_of(engine.err, 0));                                                                                    \
    } while (0)

#define MUST(condition)                                                                                                          \
    do {                                                                                                                         \
        if (!(condition))                                                                                                        \
            FAIL("not so: %s", #condition);                                                                                      \
    } while (0)

/* Both are written as wide numbers; a negative one is large. */
#define SAME(left, right)                                                                                                        \
    do {                                                                                                                         \
        uint64_t left_ = (uint64_t)(left), right_ = (uint64_t)(right);                                                           \
        if (left_ != right_)                                                                                                     \
            FAIL("%s is 0x%llx, not %s, 0x%llx", #left, (unsigned long long)left_, #right, (unsigned long long)right_);          \
        else                                                                                                                     \
            mark_point();                                                                                                        \
    } while (0)

/* Entries of /proc/PID/fd that it has open, but for the one we look with. */
static inline unsigned open_fds(void)
{
    char path[64], target[64];
    unsigned count = 0;
    for (unsigned fd = 0; fd < 70000; fd++) {
        snprintf(path, sizeof(path), "/proc/%d/fd/%u", (int)engine.pid, fd);
        if (readlink(path, target, sizeof(target)) >= 0)
            count++;
        else if (fd > 2000 && fd > 2 * count)
            break;
    }
    return count;
}

/* Files of ours that it has mapped; all of ours are called vfu_test. */
static inline unsigned mapped_files(void)
{
    char path[64], line[512];
    unsigned count = 0;
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)engine.pid);
    FILE *maps = fopen(path, "re");
    MUST(maps);
    while (fgets(line, sizeof(line), maps))
        count += strstr(line, "memfd:vfu_test") != NULL;
    fclose(maps);
    return count;
}

/* Starts the engine on a socket of its own. */
static inline void start_limited(const char *option, rlim_t files)
{
    char where[120];
    name_files(&engine);
    snprintf(where, sizeof(where), "--socket-path=%s", engine.path);
    spawn(&engine, (const char *const[]){where, option, NULL}, -1, files);
    int64_t until = now_ms() + PATIENCE;
    while (!is_there(engine.path) && is_running(&engine) && now_ms() < until)
        nap();
    MUST(is_there(engine.path));
}

static inline void start(const char *option) { start_limited(option, 0); }

/* "SIGTERM and SIGINT end it with status 0 and remove the socket file it made." Leaks that a sanitizer finds change the
 * status. */
static inline void stop_with(int number)
{
    MUST(is_running(&engine));
    kill(engine.pid, number);
    int status = wait_end(&engine);
    SAME(status, 0);
    MUST(!is_there(engine.path));
}

static inline void stop(void) { stop_with(SIGTERM); }

/* ---- a client -------------------------------------------------------------------------------------------------------------- */

/* Memory that the engine may reach by message, and what it may do there. */
typedef struct window {
    uint64_t iova, size;
    uint8_t *at; /* NULL: only the table knows it */
    uint32_t prot;
} window;

enum { WINDOWS = 32, QUEUE = 64 };

typedef struct peer {
    int fd;
    uint16_t id;
    frame reply;

    /* the engine's DMA messages */
    uint32_t limit;       /* bytes that one may carry */
    bool hold;            /* don't answer them: they wait in the queue */
    uint32_t write_reply; /* bytes of payload in the answer to a DMA_WRITE: 0, 12 or 16 */
    unsigned messages;    /* answered so far */
    window windows[WINDOWS];
    unsigned window_count;
    frame queue[QUEUE];
    unsigned queued;
} peer;

static const char usual_capabilities[] = "{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,"
                                         "\"max_dma_maps\":65535,\"pgsizes\":4096}}";

/* Sends bytes with descriptors. False: the engine has closed. */
static inline bool send_bytes(int fd, const void *bytes, size_t len, const int *fds, unsigned fd_count)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(FDS_MAX * sizeof(int))];
    } control;
    memset(&control, 0, sizeof(control));
    for (size_t done = 0; done < len;) {
        struct iovec part = {.iov_base = (uint8_t *)(uintptr_t)bytes + done, .iov_len = len - done};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        if (fd_count && !done) {
            message.msg_control = control.room;
            message.msg_controllen = (socklen_t)CMSG_SPACE(fd_count * sizeof(int));
            struct cmsghdr *head = CMSG_FIRSTHDR(&message);
            head->cmsg_level = SOL_SOCKET;
            head->cmsg_type = SCM_RIGHTS;
            head->cmsg_len = (socklen_t)CMSG_LEN(fd_count * sizeof(int));
            memcpy(CMSG_DATA(head), fds, fd_count * sizeof(int));
        }
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && (errno == EAGAIN || errno == ETOOMANYREFS)) {
            struct pollfd wait = {.fd = fd, .events = POLLOUT};
            if (poll(&wait, 1, PATIENCE) == 0)
                FAIL("the engine doesn't take our bytes");
            if (errno == ETOOMANYREFS)
                nap();
        } else if (sent < 0 && errno != EINTR) {
            return false;
        } else if (sent > 0) {
            done += (size_t)sent;
        }
    }
    return true;
}

/* Receives exactly len bytes, with the descriptors that come along. False: the engine has closed. */
static inline bool receive_bytes(int fd, void *buf, size_t len, frame *f)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(FDS_MAX * sizeof(int))];
    } control;
    int64_t until = now_ms() + PATIENCE;
    for (size_t done = 0; done < len;) {
        struct iovec part = {.iov_base = (uint8_t *)buf + done, .iov_len = len - done};
        struct msghdr message = {
            .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof(control.room)};
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        if (poll(&wait, 1, 1000) <= 0) {
            if (now_ms() > until || !is_running(&engine))
                FAIL("nothing comes from the engine");
            continue;
        }
        ssize_t got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
        if (got == 0 || (got < 0 && errno == ECONNRESET)) {
            if (done)
                FAIL("the engine closed in the middle of a message");
            return false;
        }
        if (got < 0)
            continue;
        MUST(!(message.msg_flags & MSG_CTRUNC));
        struct cmsghdr *head = CMSG_FIRSTHDR(&message); /* there is one at most: Linux gives all descriptors in one */
        if (head) {
            unsigned count = (unsigned)((head->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            MUST(f->fd_count + count <= FDS_MAX);
            memcpy(f->fds + f->fd_count, CMSG_DATA(head), count * sizeof(int));
            f->fd_count += count;
        }
        done += (size_t)got;
    }
    return true;
}

/* One message. False: the engine has closed. */
static inline bool receive(int fd, frame *f)
{
    f->fd_count = 0;
    if (!receive_bytes(fd, &f->h, sizeof(f->h), f))
        return false;
    MUST(f->h.size >= sizeof(f->h) && f->h.size - sizeof(f->h) <= BODY_MAX);
    f->len = f->h.size - (uint32_t)sizeof(f->h);
    MUST(!f->len || receive_bytes(fd, f->body, f->len, f));
    if (f->h.flags & ERROR) /* specification: "If an error occurs, the reply message must only include the reply header." */
        MUST(f->len == 0 && f->fd_count == 0);
    return true;
}

static inline bool is_readable(int fd, int timeout_ms)
{
    struct pollfd wait = {.fd = fd, .events = POLLIN};
    return poll(&wait, 1, timeout_ms) > 0;
}

/* Sends one message as given. False: the engine has closed. */
static inline bool send_message(int fd, header h, const void *body, uint32_t len, const int *fds, unsigned fd_count)
{
    static uint8_t bytes[sizeof(header) + 2 * MIB];
    MUST(len <= sizeof(bytes) - sizeof(h));
    if (!h.size)
        h.size = (uint32_t)sizeof(h) + len;
    memcpy(bytes, &h, sizeof(h));
    if (len)
        memcpy(bytes + sizeof(h), body, len);
    return send_bytes(fd, bytes, sizeof(h) + len, fds, fd_count);
}

/* Sends a request; its id. */
static inline uint16_t post_with(peer *p, uint16_t cmd, uint32_t flags, const void *body, uint32_t len, const int *fds,
                                 unsigned fd_count)
{
    uint16_t id = p->id++;
    if (!send_message(p->fd, (header){.id = id, .cmd = cmd, .flags = flags}, body, len, fds, fd_count))
        FAIL("the engine closed before a request");
    return id;
}

static inline uint16_t post(peer *p, uint16_t cmd, const void *body, uint32_t len)
{
    return post_with(p, cmd, 0, body, len, NULL, 0);
}

/* The window with this address, or NULL. */
static inline window *window_at(peer *p, uint64_t iova)
{
    for (unsigned i = 0; i < p->window_count; i++)
        if (iova - p->windows[i].iova < p->windows[i].size)
            return &p->windows[i];
    return NULL;
}

/* The parts of a DMA message; it must be one that the engine may send. */
static inline dma_access dma_of(peer *p, const frame *f)
{
    dma_access access;
    MUST(f->h.cmd == DMA_READ || f->h.cmd == DMA_WRITE);
    SAME(f->h.flags, 0);
    MUST(f->len >= sizeof(access));
    memcpy(&access, f->body, sizeof(access));
    SAME(f->len, sizeof(access) + (f->h.cmd == DMA_WRITE ? access.count : 0));
    /* "Messages are at most 128 KiB each, whatever larger limit the client offers" */
    MUST(access.count > 0 && access.count <= 128 * KIB && access.count <= p->limit);
    MUST(f->fd_count == 0);
    for (uint64_t at = access.address, left = access.count; left;) {
        window *w = window_at(p, at);
        MUST(w && (w->prot & (f->h.cmd == DMA_READ ? READABLE : WRITEABLE)));
        uint64_t part = w->size - (at - w->iova) < left ? w->size - (at - w->iova) : left;
        at += part;
        left -= part;
    }
    return access;
}

/* Copies between the windows' memory and a buffer. */
static inline void move_windows(peer *p, uint64_t iova, uint8_t *buf, uint64_t len, bool to_windows)
{
    for (uint64_t i = 0; i < len;) {
        window *w = window_at(p, iova + i);
        uint64_t inside = iova + i - w->iova, part = w->size - inside < len - i ? w->size - inside : len - i;
        memcpy(to_windows ? w->at + inside : buf + i, to_windows ? buf + i : w->at + inside, (size_t)part);
        i += part;
    }
}

/* Answers a DMA message as a client should. */
static inline void answer(peer *p, frame *f)
{
    static struct {
        dma_access access;
        uint8_t data[128 * KIB];
    } body;
    uint32_t len;
    body.access = dma_of(p, f);
    if (f->h.cmd == DMA_READ) {
        len = (uint32_t)(sizeof(body.access) + body.access.count);
        move_windows(p, body.access.address, body.data, body.access.count, false);
    } else {
        len = p->write_reply; /* 12: the count has 32 bits, as the specification's table says */
        move_windows(p, body.access.address, f->body + sizeof(body.access), body.access.count, true);
    }
    p->messages++;
    MUST(send_message(p->fd, (header){.id = f->h.id, .cmd = f->h.cmd, .flags = REPLY}, &body, len, NULL, 0));
}

/* Takes what the engine sends: a DMA message is answered or held. True: it was a reply, and is in *f. False: it has closed. */
static inline bool next_reply(peer *p, frame *f)
{
    while (receive(p->fd, f)) {
        if ((f->h.flags & TYPE_MASK) == REPLY)
            return true;
        (void)dma_of(p, f);
        if (p->hold) {
            MUST(p->queued < QUEUE);
            p->queue[p->queued++] = *f;
        } else {
            answer(p, f);
        }
    }
    return false;
}

/* The reply to a request; replies come in the order of the requests. Its errno is returned, 0 if none. */
static inline int await(peer *p, uint16_t id, uint16_t cmd)
{
    if (!next_reply(p, &p->reply))
        FAIL("the engine closed before the reply to command %u", cmd);
    SAME(p->reply.h.id, id);
    SAME(p->reply.h.cmd, cmd);
    if (!(p->reply.h.flags & ERROR))
        return 0;
    return p->reply.h.error ? (int)p->reply.h.error : EIO;
}

static inline int call_with(peer *p, uint16_t cmd, const void *body, uint32_t len, const int *fds, unsigned fd_count)
{
    return await(p, post_with(p, cmd, 0, body, len, fds, fd_count), cmd);
}

static inline int call(peer *p, uint16_t cmd, const void *body, uint32_t len) { return call_with(p, cmd, body, len, NULL, 0); }

/* A round trip: what was sent before has been handled. */
static inline void sync_up(peer *p)
{
    info request = {.argsz = sizeof(request)};
    SAME(call(p, GET_INFO, &request, sizeof(request)), 0);
}

/* The next DMA message, which is held. */
static inline frame *held(peer *p)
{
    int64_t until = now_ms() + PATIENCE;
    while (!p->queued) { /* the round trips find out if it never comes */
        sync_up(p);
        if (!p->queued && now_ms() > until)
            FAIL("no DMA message comes");
    }
    return &p->queue[0];
}

static inline void drop_held(peer *p)
{
    MUST(p->queued);
    p->queued--;
    memmove(&p->queue[0], &p->queue[1], p->queued * sizeof(p->queue[0]));
}

/* Answers all that are held, and those that follow. */
static inline void release(peer *p)
{
    p->hold = false;
    while (p->queued) {
        answer(p, &p->queue[0]);
        drop_held(p);
    }
}

/* Sends VERSION. */
static inline uint16_t greet(peer *p, const char *json)
{
    uint8_t body[512] = {0}; /* version 0.0 */
    size_t len = strlen(json) + 1;
    MUST(len <= sizeof(body) - 4);
    memcpy(body + 4, json, len);
    return post(p, VERSION, body, (uint32_t)(4 + len));
}

static inline void fresh(peer *p, int fd)
{
    p->fd = fd;
    p->id = 100;
    p->limit = 128 * KIB;
    p->hold = false;
    p->write_reply = 16;
    p->messages = p->window_count = p->queued = 0;
}

static inline void join_with(peer *p, const char *json)
{
    int fd = dial_when_ready(&engine);
    MUST(fd >= 0);
    fresh(p, fd);
    SAME(await(p, greet(p, json), VERSION), 0);
}

static inline void join(peer *p) { join_with(p, usual_capabilities); }

static inline void leave(peer *p)
{
    close(p->fd);
    p->fd = -1;
}

/* Waits for the engine to close. */
static inline void await_close(peer *p)
{
    while (next_reply(p, &p->reply)) {
    }
    leave(p);
}

/* ---- memory ---------------------------------------------------------------------------------------------------------------- */

/* A file that can be shared, and our view of it. */
typedef struct memory {
    int fd;
    uint8_t *at;
    size_t size;
} memory;

enum { SEALED = 1, SHRINKABLE = 0 };

static inline memory make_memory(size_t size, int sealed)
{
    memory m = {.fd = (int)syscall(SYS_memfd_create, "vfu_test", 3u /* MFD_CLOEXEC | MFD_ALLOW_SEALING */), .size = size};
    MUST(m.fd >= 0 && ftruncate(m.fd, (off_t)size) == 0);
    if (sealed)
        MUST(fcntl(m.fd, 1033 /* F_ADD_SEALS */, 2 /* F_SEAL_SHRINK */) == 0);
    m.at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd, 0);
    MUST(m.at != MAP_FAILED);
    return m;
}

static inline void free_memory(memory *m)
{
    munmap(m->at, m->size);
    close(m->fd);
}

static inline uint64_t random64(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline void scramble(void *bytes, size_t len, uint64_t seed)
{
    uint64_t state = seed * 0x9e3779b97f4a7c15u + 88172645463325252u;
    for (size_t i = 0; i < len; i += 8) {
        uint64_t x = random64(&state);
        memcpy((uint8_t *)bytes + i, &x, len - i < 8 ? len - i : 8);
    }
}

static inline bool all_are(const uint8_t *bytes, size_t len, unsigned value)
{
    return bytes[0] == value && memcmp(bytes, bytes + 1, len - 1) == 0;
}

enum { WITHOUT_FD = 0, WITH_FD = 1 };

/* Shares memory, from `offset` on. Returns the errno of the reply. */
static inline int try_map(peer *p, uint64_t iova, uint64_t size, uint32_t prot, const memory *m, uint64_t offset, int with_fd)
{
    map_request request = {
        .argsz = sizeof(request), .flags = prot, .offset = with_fd ? offset : 0, .address = iova, .size = size};
    int err = call_with(p, DMA_MAP, &request, sizeof(request), m ? &m->fd : NULL, with_fd ? 1 : 0);
    if (!err) {
        MUST(p->window_count < WINDOWS);
        p->windows[p->window_count++] = (window){iova, size, m ? m->at + offset : NULL, prot};
    }
    return err;
}

static inline void map(peer *p, uint64_t iova, uint64_t size, uint32_t prot, const memory *m, uint64_t offset, int with_fd)
{
    SAME(try_map(p, iova, size, prot, m, offset, with_fd), 0);
}

/* Forgets the windows inside the range. */
static inline void forget(peer *p, uint64_t iova, uint64_t size)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < p->window_count; i++)
        if (p->windows[i].iova - iova >= size)
            p->windows[kept++] = p->windows[i];
    p->window_count = kept;
}

static inline uint16_t post_unmap(peer *p, uint64_t iova, uint64_t size)
{
    unmap_request request = {.argsz = sizeof(request), .address = iova, .size = size};
    return post(p, DMA_UNMAP, &request, sizeof(request));
}

static inline void unmap(peer *p, uint64_t iova, uint64_t size)
{
    SAME(await(p, post_unmap(p, iova, size), DMA_UNMAP), 0);
    forget(p, iova, size);
}

/* ---- regions --------------------------------------------------------------------------------------------------------------- */

static inline int try_read(peer *p, uint32_t region, uint64_t offset, void *buf, uint32_t len)
{
    region_access access = {offset, region, len};
    int err = call(p, REGION_READ, &access, sizeof(access));
    if (err)
        return err;
    SAME(p->reply.len, sizeof(access) + len);
    MUST(memcmp(p->reply.body, &access, sizeof(access)) == 0);
    memcpy(buf, p->reply.body + sizeof(access), len);
    return 0;
}

static inline void read_region(peer *p, uint32_t region, uint64_t offset, void *buf, uint32_t len)
{
    SAME(try_read(p, region, offset, buf, len), 0);
}

static inline uint16_t post_write(peer *p, uint32_t region, uint64_t offset, const void *buf, uint32_t len, uint32_t flags)
{
    static uint8_t body[sizeof(region_access) + 128 * KIB];
    region_access access = {offset, region, len};
    MUST(len <= 128 * KIB);
    memcpy(body, &access, sizeof(access));
    memcpy(body + sizeof(access), buf, len);
    return post_with(p, REGION_WRITE, flags, body, (uint32_t)sizeof(access) + len, NULL, 0);
}

static inline int try_write(peer *p, uint32_t region, uint64_t offset, const void *buf, uint32_t len)
{
    return await(p, post_write(p, region, offset, buf, len, 0), REGION_WRITE);
}

static inline void write_region(peer *p, uint32_t region, uint64_t offset, const void *buf, uint32_t len)
{
    SAME(try_write(p, region, offset, buf, len), 0);
}

/* A little-endian number of 1, 2, 4 or 8 bytes. */
static inline uint64_t get(peer *p, uint32_t region, uint64_t offset, uint32_t width)
{
    uint8_t bytes[8] = {0};
    uint64_t value = 0;
    read_region(p, region, offset, bytes, width);
    for (uint32_t i = width; i--;)
        value = value << 8 | bytes[i];
    return value;
}

static inline void put(peer *p, uint32_t region, uint64_t offset, uint32_t width, uint64_t value)
{
    uint8_t bytes[8];
    for (uint32_t i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(value >> 8 * i);
    write_region(p, region, offset, bytes, width);
}

/* ---- the engine's registers ------------------------------------------------------------------------------------------------ */

enum {
    MAGIC = 0x00,
    ENGINE_VERSION = 0x04,
    SRC = 0x08,
    DST = 0x10,
    LEN = 0x18,
    PATTERN = 0x20,
    REPEAT = 0x28,
    NOTIFY = 0x2c,
    COMMAND = 0x30,
    STATUS = 0x34,
    ERRNO = 0x38,
    FAULT = 0x40,
    RESULT = 0x48,
    COMPLETED = 0x50,
};

enum { COPY = 1, FILL = 2, SUM = 3, TO_RAM = 4, FROM_RAM = 5 };
enum { IDLE = 0, BUSY = 1, DONE = 2, FAILED = 3 };
enum { RAM_SIZE = 64 * KIB, LEN_MAX = 16 * MIB };

static inline uint64_t reg(peer *p, uint64_t offset)
{
    bool wide = (offset >= SRC && offset < REPEAT) || offset >= FAULT;
    return get(p, BAR0, offset, wide ? 8 : 4);
}

static inline void set(peer *p, uint64_t offset, uint64_t value) { put(p, BAR0, offset, offset < REPEAT ? 8 : 4, value); }

/* Writes the operands, but not the command. */
static inline void operands(peer *p, uint64_t dst, uint64_t src, uint64_t len)
{
    set(p, DST, dst);
    set(p, SRC, src);
    set(p, LEN, len);
}

/* Waits until the engine is not busy. Returns ERROR; UINT32_MAX: it stays busy. */
static inline uint32_t finish_within(peer *p, int timeout_ms)
{
    int64_t until = now_ms() + timeout_ms;
    uint64_t status;
    for (unsigned tries = 0; (status = reg(p, STATUS)) == BUSY; tries++) {
        if (now_ms() > until)
            return UINT32_MAX;
        if (tries > 20)
            nap();
    }
    uint32_t error = (uint32_t)reg(p, ERRNO);
    SAME(status, error ? FAILED : DONE);
    return error;
}

static inline uint32_t finish(peer *p)
{
    uint32_t error = finish_within(p, PATIENCE);
    if (error == UINT32_MAX)
        FAIL("a command doesn't end");
    return error;
}

static inline uint32_t run(peer *p, uint32_t command, uint64_t dst, uint64_t src, uint64_t len)
{
    operands(p, dst, src, len);
    set(p, COMMAND, command);
    return finish(p);
}

/* Runs a command that must fail. */
static inline void refuse(peer *p, uint32_t command, uint64_t dst, uint64_t src, uint64_t len, uint32_t error, uint64_t fault)
{
    SAME(run(p, command, dst, src, len), error);
    SAME(reg(p, FAULT), fault);
}

/* ---- interrupts and configuration space ------------------------------------------------------------------------------------ */

static inline int make_event(void)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    MUST(fd >= 0);
    return fd;
}

/* How often it was signalled; waits for the first time. */
static inline uint64_t signalled(int fd, int timeout_ms)
{
    uint64_t count = 0;
    if (is_readable(fd, timeout_ms) && read(fd, &count, sizeof(count)) != sizeof(count))
        count = 0;
    return count;
}

static inline int set_irqs(peer *p, uint32_t flags, uint32_t index, uint32_t first, uint32_t count, const int *fds,
                           unsigned fd_count)
{
    irq_set request = {.argsz = sizeof(request), .flags = flags, .index = index, .start = first, .count = count};
    return call_with(p, SET_IRQS, &request, sizeof(request), fds, fd_count);
}

static inline void assign(peer *p, uint32_t index, const int *fds, unsigned count)
{
    SAME(set_irqs(p, DATA_EVENTFD | ACTION_TRIGGER, index, 0, count, fds, count), 0);
}

/* Offset of a capability in the configuration space, 0: there is none. */
static inline uint32_t capability(peer *p, uint8_t id)
{
    uint32_t at = (uint32_t)get(p, CONFIG, 0x34, 1);
    for (unsigned steps = 0; at && steps < 48; steps++, at = (uint32_t)get(p, CONFIG, at + 1, 1))
        if (get(p, CONFIG, at, 1) == id)
            return at;
    return 0;
}

enum { CAP_PM = 0x01, CAP_VENDOR = 0x09, CAP_EXPRESS = 0x10, CAP_MSIX = 0x11 };

static inline void enable_msix(peer *p, bool on)
{
    uint32_t at = capability(p, CAP_MSIX) + 2;
    put(p, CONFIG, at, 2, (get(p, CONFIG, at, 2) & 0x7fff) | (on ? 0x8000 : 0));
}

/* Bit 3 of the configuration status register. */
static inline bool intx_is_up(peer *p) { return get(p, CONFIG, 0x06, 2) >> 3 & 1; }

static inline void function_level_reset(peer *p)
{
    uint32_t at = capability(p, CAP_EXPRESS) + 8;
    put(p, CONFIG, at, 2, get(p, CONFIG, at, 2) | 0x8000);
}

/* ---- SIGUSR1 --------------------------------------------------------------------------------------------------------------- */

/* What the engine prints for SIGUSR1: from "table begin" to the line "table end N", N is returned. */
static inline unsigned ask_table(char *text, size_t room)
{
    off_t from = size_of(engine.err);
    int64_t until = now_ms() + PATIENCE;
    unsigned count = 0;
    kill(engine.pid, SIGUSR1);
    for (;;) {
        off_t size = size_of(engine.err);
        const char *last = text_of(engine.err, size - from > 100 ? size - 100 : from);
        const char *end = strstr(last, "table end ");
        if (end && strchr(end, '\n') && sscanf(end, "table end %u", &count) == 1)
            break;
        if (now_ms() > until || !is_running(&engine))
            FAIL("no table is printed");
        nap();
    }
    if (room)
        snprintf(text, room, "%s", text_of(engine.err, from));
    return count;
}

#endif
