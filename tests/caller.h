/* SPDX-License-Identifier: MIT */
/*
 * A client that waits: its device runs in another thread or process. It speaks the protocol with its own receiver (struct peer of
 * util.h), serves the device's DMA messages from memory of its own while it waits for replies, or keeps them unanswered. And the
 * example engine as such a process: dma_engine in $VFU_EXAMPLES, else in build/examples.
 *
 * For the main thread alone: Check's macros and the buffer of encoded() are no others'.
 */
#ifndef VFU_TESTS_CALLER_H
#define VFU_TESTS_CALLER_H

#include "util.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { HELD = 64 };

typedef struct caller {
    peer p;
    uint16_t id;
    vfu_msg reply;
    uint8_t *memory; /* what DMA messages reach, from iova on */
    uint64_t iova, size;
    bool hold;          /* keep DMA messages unanswered */
    vfu_msg held[HELD]; /* their heads */
    unsigned held_count, messages;
} caller;

static inline void caller_attach(caller *c, vfu_dev *dev)
{
    int pair[2];
    make_pair(pair);
    *c = (caller){.p = {.sock = pair[1]}};
    ck_assert_int_eq(vfu_dev_attach(dev, pair[0]), 0);
}

static inline void caller_close(caller *c)
{
    peer_close(&c->p);
    free(c->memory);
    c->memory = NULL;
}

static inline void send_message(caller *c, const vfu_msg *m, const int *fds, unsigned fd_count)
{
    size_t len;
    const uint8_t *bytes = encoded(m, &len);
    ck_assert(peer_send_wait(&c->p, bytes, len, fds, fd_count));
}

static inline void answer_dma(caller *c, const vfu_msg *message, int err)
{
    vfu_msg reply;
    uint64_t at = message->u.dma.address - c->iova, count = message->u.dma.count;
    vfu_msg_init_reply(&reply, message, err);
    ck_assert(at < c->size && count <= c->size - at);
    reply.u.dma.address = message->u.dma.address;
    reply.u.dma.count = count;
    if (message->cmd == VFU_CMD_DMA_READ) {
        reply.u.dma.data = c->memory + at;
        reply.u.dma.data_len = (uint32_t)count;
    } else {
        reply.u.dma.ack_len = 16;
        if (!err)
            memcpy(c->memory + at, message->u.dma.data, (size_t)count);
    }
    c->messages++;
    send_message(c, &reply, NULL, 0);
}

/* Takes one message from the device. True: it is a reply, in c->reply; false: a DMA message, which was answered or is held. */
static inline bool take_message(caller *c, peer *from)
{
    vfu_msg m;
    ck_assert_int_eq(peer_wait(from), 1);
    ck_assert_int_eq(vfu_msg_decode(from->bytes, from->have, &m), 0);
    if (vfu_msg_is_reply(&m)) {
        c->reply = m;
        return true;
    }
    ck_assert(m.cmd == VFU_CMD_DMA_READ || m.cmd == VFU_CMD_DMA_WRITE);
    if (c->hold) {
        ck_assert_uint_lt(c->held_count, HELD);
        c->held[c->held_count++] = m; /* of a write only the head is any good later */
    } else {
        answer_dma(c, &m, 0);
    }
    return false;
}

static inline uint16_t post(caller *c, vfu_msg *m, const int *fds, unsigned fd_count)
{
    m->id = ++c->id;
    send_message(c, m, fds, fd_count);
    return m->id;
}

static inline int await(caller *c, uint16_t id)
{
    while (!take_message(c, &c->p)) {
    }
    ck_assert_uint_eq(c->reply.id, id);
    return vfu_msg_is_error(&c->reply) ? -(int)c->reply.error : 0;
}

static inline int call_with(caller *c, vfu_msg *m, const int *fds, unsigned fd_count)
{
    return await(c, post(c, m, fds, fd_count));
}
static inline int call(caller *c, vfu_msg *m) { return call_with(c, m, NULL, 0); }

static inline void say_hello(caller *c, const char *json)
{
    vfu_msg m = command(VFU_CMD_VERSION);
    m.u.version.json = json;
    m.u.version.json_len = json ? (uint32_t)strlen(json) : 0;
    ck_assert_int_eq(call(c, &m), 0);
}

static inline vfu_msg access_of(uint16_t cmd, uint32_t region, uint64_t offset, const void *data, uint32_t count)
{
    vfu_msg m = command(cmd);
    m.u.region.region = region;
    m.u.region.offset = offset;
    m.u.region.count = count;
    m.u.region.data = data;
    m.u.region.data_len = data ? count : 0;
    return m;
}

static inline void put(caller *c, uint32_t region, uint64_t offset, const void *data, uint32_t count)
{
    vfu_msg m = access_of(VFU_CMD_REGION_WRITE, region, offset, data, count);
    ck_assert_int_eq(call(c, &m), 0);
}

static inline void get(caller *c, uint32_t region, uint64_t offset, void *buf, uint32_t count)
{
    vfu_msg m = access_of(VFU_CMD_REGION_READ, region, offset, NULL, count);
    ck_assert_int_eq(call(c, &m), 0);
    memcpy(buf, c->reply.u.region.data, count);
}

/* A round trip: what was sent before is done. */
static inline void sync_up(caller *c)
{
    vfu_msg m = command(VFU_CMD_DEVICE_GET_INFO);
    m.u.device_info.argsz = 16;
    ck_assert_int_eq(call(c, &m), 0);
}

static inline vfu_msg map_of(uint64_t iova, uint64_t size)
{
    vfu_msg m = command(VFU_CMD_DMA_MAP);
    m.u.dma_map.argsz = 32;
    m.u.dma_map.flags = RW;
    m.u.dma_map.address = iova;
    m.u.dma_map.size = size;
    return m;
}

static inline vfu_msg unmap_of(uint64_t iova, uint64_t size)
{
    vfu_msg m = command(VFU_CMD_DMA_UNMAP);
    m.u.dma_unmap.argsz = 24;
    m.u.dma_unmap.address = iova;
    m.u.dma_unmap.size = size;
    return m;
}

static inline int assign(caller *c, uint32_t index, uint32_t start, uint32_t count, const int *fds)
{
    vfu_msg m = command(VFU_CMD_DEVICE_SET_IRQS);
    m.u.irq_set.argsz = 20;
    m.u.irq_set.flags = VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_TRIGGER;
    m.u.irq_set.index = index;
    m.u.irq_set.start = start;
    m.u.irq_set.count = count;
    return call_with(c, &m, fds, fds ? count : 0);
}

/* Memory whose bytes are never 0, so that no DMA reply is ambiguous. */
static inline uint8_t *make_memory(caller *c, uint64_t iova, uint64_t size)
{
    c->memory = malloc((size_t)size);
    ck_assert_ptr_nonnull(c->memory);
    c->iova = iova;
    c->size = size;
    for (uint64_t i = 0; i < size; i++)
        c->memory[i] = (uint8_t)((iova + i) % 251 + 1);
    return c->memory;
}

/* ---- the engine as a process ------------------------------------------------------------------------------------------- */

typedef struct child {
    pid_t pid;
    int log; /* what it prints */
} child;

static inline const char *example_path(const char *name)
{
    static char path[4096];
    const char *examples = getenv("VFU_EXAMPLES");
    snprintf(path, sizeof(path), "%s/%s", examples && *examples ? examples : "build/examples", name);
    return path;
}

/* What an example does before it begins; NULL: nothing. */
static void (*before_example)(void);

/* Starts an example device, with further options (NULL: none, else NULL ends them), on a listening socket; it ends with us. */
static inline void start_example(child *e, const char *name, const char *const *options, struct sockaddr_un *address, socklen_t *len)
{
    int sock = listener(address, len);
    e->log = memfd("log", 0, 0);
    e->pid = fork();
    must(e->pid);
    if (e->pid == 0) {
        char option[32], *argv[16] = {(char *)(uintptr_t)name, option};
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        fcntl(sock, F_SETFD, 0);
        dup2(e->log, STDERR_FILENO);
        snprintf(option, sizeof(option), "--fd=%d", sock);
        for (unsigned i = 0; options && options[i] && i < 13; i++)
            argv[i + 2] = (char *)(uintptr_t)options[i];
        if (before_example)
            before_example();
        execv(example_path(name), argv);
        perror(example_path(name));
        _exit(127);
    }
    close(sock);
}

static inline void start_engine(child *e, struct sockaddr_un *address, socklen_t *len)
{
    start_example(e, "dma_engine", NULL, address, len);
}

/* SIGTERM, which it honours with status 0: a sanitizer that has found something says otherwise. */
static inline void stop_engine(child *e)
{
    int status;
    char text[8192] = "";
    must(kill(e->pid, SIGTERM));
    ck_assert_int_eq(waitpid(e->pid, &status, 0), e->pid);
    must(pread(e->log, text, sizeof(text) - 1, 0));
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the engine's status is %#x: %s", (unsigned)status, text);
    close(e->log);
}

/* The same engine, for a vfu_client. */
static inline int set_engine(vfu_client *client, uint64_t at, uint64_t value, size_t width)
{
    uint8_t bytes[8];
    for (unsigned i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(value >> 8 * i);
    return vfu_client_region_write(client, 0, at, bytes, width);
}

/* A copy, to its end. 0; -EIO: the engine failed; or the error of a call. */
static inline int copy_by_engine(vfu_client *client, uint64_t dst, uint64_t src, uint64_t len)
{
    enum { SRC = 0x08, DST = 0x10, LEN = 0x18, COMMAND = 0x30, STATUS = 0x34, COPY = 1, DONE = 2 };
    uint8_t status[4] = {0};
    int err = set_engine(client, SRC, src, 8);
    if (!err)
        err = set_engine(client, DST, dst, 8);
    if (!err)
        err = set_engine(client, LEN, len, 8);
    if (!err)
        err = set_engine(client, COMMAND, COPY, 4);
    while (!err && status[0] < DONE)
        err = vfu_client_region_read(client, 0, STATUS, status, 4);
    return err ? err : status[0] == DONE ? 0 : -EIO;
}

#endif /* VFU_TESTS_CALLER_H */
