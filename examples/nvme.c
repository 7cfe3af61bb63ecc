/* SPDX-License-Identifier: MIT */
/*
 * nvme - a file as an NVMe disk, which a guest's stock driver uses
 *
 *     cc -std=c11 -O2 -I. examples/nvme.c -o nvme -pthread
 *     ./nvme --socket-path=/tmp/nvme.sock --image=disk.img --size=1G
 *
 * It shows a device with threads of its own that works on queues in its client's memory: everything that the guest can change is
 * copied once and checked, data moves between the file and pinned memory without a copy, and a guest may unmap, reset or leave at
 * any moment. The disk has one namespace, with blocks of 512 or 4096 bytes. "NVMe" in a comment is the NVM Express base
 * specification 1.4.
 *
 * A command travels through this file from top to bottom: doorbell, fetch, dispatch, data pointer, I/O or admin command,
 * completion, interrupt. Below that is what happens around commands: events, registers, PCI, threads, the image, the program.
 *
 *     thread    serves                                                              and never waits for
 *     socket    the client; queues whose doorbell it rings                          the disk; an answer to a DMA message
 *     workers   what the others can't: commands that wait for the disk, memory
 *               that only messages reach
 *     poller    with --doorbells=mapped: queues whose doorbell the client writes    the disk
 *               in a page that both share
 *
 * Each has a `lane`: a reader of the IOMMU, and room for one transfer. A small read that is in the page cache is done by the thread
 * that has got the doorbell, so that no other has to be woken for it; everything else goes to the workers.
 *
 * A write is completed when the page cache has it, which survives this process, and Flush is fdatasync(): a write cache in the
 * sense of NVMe. What was completed is not lost when the guest resets the controller or leaves, since that ends commands, but
 * touches nothing that they have done.
 *
 * One lock guards the controller's state. It is held for a few instructions at a time and never during an access to the guest's
 * memory or to the file. Functions that say "locked" are called with it.
 */
#define _FILE_OFFSET_BITS 64
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include "sandbox.h"

#include <ctype.h>
#include <getopt.h>
#include <sys/syscall.h>
#include <sys/uio.h>

enum { PAGE = 4096, QUEUES_MAX = 64, ENTRIES_MAX = 1024, SQE_SIZE = 64, CQE_SIZE = 16, EVENT_REQUESTS = 4, ERROR_ENTRIES = 4 };
enum { MDTS = 8, TRANSFER_MAX = PAGE << MDTS, PAGES_MAX = TRANSFER_MAX / PAGE + 1, RANGES_MAX = 256 };
enum { WORKERS = 4, INLINE_MAX = 64 << 10 /* bytes */, SERVE_MAX = 64, BATCH = 16 /* commands */ };
enum { BAR_REGISTERS = 0, BAR_MSIX = 4, DOORBELLS = 0x1000, BAR_SIZE = 0x4000, DOORBELL_COUNT = 2 * (QUEUES_MAX + 1) };

/* Flags of preadv2(), pwritev2() and fallocate(), which not every C library names. */
enum { NO_WAIT = 0x08, DURABLE = 0x02, KEEP_SIZE = 0x01, PUNCH_HOLE = 0x02, ZERO_RANGE = 0x10 };

/* Registers (NVMe 3.1) and their bits */
enum { CAP = 0x00, VS = 0x08, CC = 0x14, CSTS = 0x1c, AQA = 0x24, ASQ = 0x28, ACQ = 0x30 };
enum { CC_EN = 0x1, CC_FORMAT = 0x3ff0 /* CSS, MPS, AMS */, CC_SHN = 0xc000, CC_ENTRIES = 0xff0000, CC_ENTRIES_GOOD = 0x460000 };
enum { CSTS_RDY = 0x1, CSTS_CFS = 0x2, CSTS_SHUTTING = 0x4, CSTS_SHUT = 0x8, CSTS_SHST = 0xc };
#define CAP_VALUE ((UINT64_C(1) << 37 /* NVM */) | 40 << 24 /* TO: 20 s */ | 1 << 16 /* CQR */ | (ENTRIES_MAX - 1))

/* Opcodes and features, as far as they have names here */
enum { DELETE_SQ, CREATE_SQ, DELETE_CQ = 4, CREATE_CQ };
enum { GET_LOG = 2, IDENTIFY = 6, ABORT = 8, SET_FEATURES, GET_FEATURES, EVENT_REQUEST = 12 };
enum { FLUSH, WRITE, READ, WRITE_ZEROES = 8, DATASET_MANAGEMENT };
enum { ARBITRATION = 1, POWER, TEMPERATURE = 4, WRITE_CACHE = 6, QUEUE_COUNT, VECTOR = 9, EVENTS = 11, FEATURES };

/* Status codes (NVMe 4.6.1): code, type << 8, and whether it is no use to try again. */
enum { DNR = 0x4000 };
enum {
    SUCCESS = 0,
    INVALID_OPCODE = DNR | 0x01,
    INVALID_FIELD = DNR | 0x02,
    DATA_TRANSFER_ERROR = DNR | 0x04,
    INTERNAL_ERROR = 0x06,
    ABORTED = 0x07,
    INVALID_NAMESPACE = DNR | 0x0b,
    SEQUENCE_ERROR = DNR | 0x0c,
    INVALID_PRP = DNR | 0x13,
    WRITE_PROTECTED = DNR | 0x20,
    LBA_OUT_OF_RANGE = DNR | 0x80,
    CAPACITY_EXCEEDED = DNR | 0x81,
    NO_SUCH_CQ = DNR | 0x100,
    INVALID_QUEUE = DNR | 0x101,
    INVALID_QUEUE_SIZE = DNR | 0x102,
    TOO_MANY_EVENT_REQUESTS = DNR | 0x105,
    INVALID_VECTOR = DNR | 0x108,
    INVALID_LOG_PAGE = DNR | 0x109,
    INVALID_DELETION = DNR | 0x10c,
    NOT_SAVEABLE = DNR | 0x10d,
    WRITE_FAULT = 0x280,
    READ_ERROR = 0x281,
};
/* Or none: a worker has to do the command, from the start; whoever has it completes it, or a reset has ended it. */
enum { NEEDS_WORKER = -1, NOT_OURS = -2 };

/* Asynchronous events (NVMe 5.2) */
enum { EVENT_ERROR = 0, EVENT_NOTICE = 2, EVENT_TYPES };
enum { INVALID_DOORBELL = 0, INVALID_DOORBELL_VALUE = 1, NAMESPACE_CHANGED = 0, NAMESPACE_NOTICES = 1 << 8 };
enum { LOG_ERRORS = 1, LOG_SMART, LOG_FIRMWARE, LOG_CHANGED_NAMESPACES };

typedef struct nvme nvme;
typedef struct sq sq;
typedef struct cq cq;

typedef struct command {
    struct command *next; /* in a list of jobs, or of those that are free */
    sq *sq;
    uint8_t sqe[SQE_SIZE]; /* the only copy that counts */
    uint64_t blocks;       /* of the namespace, when the command was fetched */
    bool write_through;    /* the write cache was off then */

    bool decided; /* what is left to do is to write this: */
    uint8_t cqe[CQE_SIZE];
    uint64_t cqe_iova;
    int vector; /* -1: no interrupt */
} command;

/* A queue exists while it has entries. */
struct sq {
    uint64_t base;
    uint16_t id;
    uint32_t entries, head, tail;
    cq *cq;
    command *commands, *idle; /* as many as entries; those that are free */
    uint32_t in_flight;
    bool taken;       /* a lane is reading the entry at head */
    bool by_message;  /* only messages reach it: it is the workers' */
    command *deleter; /* is completed when none is in flight any more */
};

struct cq {
    uint64_t base;
    uint32_t entries, head, tail;
    uint32_t reserved; /* slots for commands that were fetched: each finds room */
    uint32_t users;    /* submission queues */
    bool interrupts;
    uint8_t phase;
    uint16_t vector;
};

typedef struct range {
    uint64_t iova;
    size_t len;
} range;

/* Bytes of the image */
typedef struct zeros {
    uint64_t offset, len;
    bool deallocate;
} zeros;

typedef struct lane {
    nvme *c;
    vfu_iommu_reader *reader;
    bool is_worker; /* may wait */
    pthread_t thread;
    uint64_t raise[QUEUES_MAX / 64 + 1]; /* vectors that have news */
    unsigned posted;                     /* completions since they were raised */

    range ranges[PAGES_MAX]; /* the guest's side of a transfer */
    unsigned range_count;
    vfu_iommu_pin pins[PAGES_MAX];
    vfu_iommu_segment segments[PAGES_MAX];
    struct iovec iov[PAGES_MAX];
    uint8_t *buffer; /* TRANSFER_MAX bytes, for what can't be pinned */
} lane;

struct nvme {
    vfu_dev *dev;
    int image;
    bool read_only;
    unsigned block_shift, queues;          /* I/O queue pairs */
    uint64_t id;                           /* of the image: the same whenever it is served */
    atomic_bool reads_wait, writes_wait;   /* NO_WAIT isn't possible */
    lane lanes[1 + WORKERS + 1];           /* socket, workers, poller */
    unsigned threads;                      /* of lanes 1 on, that run */
    _Atomic uint32_t *page;                /* doorbells that the client maps, or NULL */
    _Atomic uint32_t rung[DOORBELL_COUNT]; /* what of them has been noticed */

    pthread_mutex_t lock; /* of everything below */
    pthread_cond_t work;  /* for workers */
    pthread_cond_t start; /* for the poller */
    pthread_cond_t rest;  /* nothing is busy */
    uint32_t cc, csts, aqa;
    uint64_t asq, acq;
    bool running;    /* commands are fetched and completed */
    bool stopping;   /* they were, and some are still busy */
    bool master;     /* the guest lets us at its memory */
    bool ending;     /* threads shall end */
    bool flushing;   /* a shutdown waits for the cache to be written */
    uint32_t busy;   /* commands between fetch and completion, but for those that wait for something else than us */
    uint32_t resets; /* how often everything was ended */
    unsigned turn;   /* the queue that was served last */
    sq sqs[QUEUES_MAX + 1];
    cq cqs[QUEUES_MAX + 1];
    command *jobs, **jobs_end;

    uint64_t blocks;
    uint32_t features[FEATURES], temperatures[2];
    command *event_requests[EVENT_REQUESTS];
    unsigned event_request_count;
    struct {
        bool pending, masked;
        uint8_t info, log;
    } events[EVENT_TYPES];
    bool namespace_changed;
    uint8_t errors[ERROR_ENTRIES][64]; /* the log, newest first */
    uint64_t error_count, reads, writes, units_read, units_written /* of 512 bytes */;
};

/* The route of a command. */
static void doorbell(nvme *c, uint32_t index, uint32_t value);
static command *fetch(lane *l);
static void execute(lane *l, command *cmd);
static int walk_prps(lane *l, const command *cmd, uint32_t len);
static int do_io(lane *l, const command *cmd);
static int do_admin(lane *l, command *cmd, uint32_t *result);
static void finish(lane *l, command *cmd, int status, uint32_t result);
static void post(lane *l, command *cmd);
static void interrupt(lane *l);

/* What is beside it. */
static void note(nvme *c, unsigned type, uint8_t info, uint8_t log_page);
static void deliver_events(lane *l);
static void close_sq(sq *q);
static void close_queues(nvme *c);

static void lock(nvme *c) { pthread_mutex_lock(&c->lock); }
static void unlock(nvme *c) { pthread_mutex_unlock(&c->lock); }

/* Little-endian fields, wherever they are. */
static uint64_t get(const uint8_t *at, unsigned width)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < width; i++)
        value |= (uint64_t)at[i] << 8 * i;
    return value;
}

static void put(uint8_t *at, unsigned width, uint64_t value)
{
    for (unsigned i = 0; i < width; i++)
        at[i] = (uint8_t)(value >> 8 * i);
}

static uint32_t dword(const command *cmd, unsigned number) { return (uint32_t)get(cmd->sqe + 4 * number, 4); }

/* ---- doorbell -------------------------------------------------------------------------------------------------------------- */

static void doorbell_error(nvme *c, uint32_t queue, uint8_t info)
{
    memmove(c->errors[1], c->errors[0], sizeof(c->errors) - sizeof(c->errors[0]));
    memset(c->errors[0], 0, sizeof(c->errors[0]));
    put(c->errors[0], 8, ++c->error_count);
    put(c->errors[0] + 8, 2, queue);
    put(c->errors[0] + 10, 2, 0xffff); /* of no command */
    put(c->errors[0] + 14, 2, 0xffff);
    note(c, EVENT_ERROR, info, LOG_ERRORS);
}

/* Locked. The client says how far it is: with a submission queue's tail or with a completion queue's head. */
static void doorbell(nvme *c, uint32_t index, uint32_t value)
{
    uint32_t id = index / 2;
    if (!c->running)
        return;
    if (id > c->queues || !(index % 2 ? c->cqs[id].entries : c->sqs[id].entries)) {
        doorbell_error(c, id, INVALID_DOORBELL);
    } else if (index % 2) {
        cq *q = &c->cqs[id];
        if (value >= q->entries || (value + q->entries - q->head) % q->entries > (q->tail + q->entries - q->head) % q->entries)
            doorbell_error(c, id, INVALID_DOORBELL_VALUE);
        else
            q->head = value;
    } else {
        sq *q = &c->sqs[id];
        if (value >= q->entries)
            doorbell_error(c, id, INVALID_DOORBELL_VALUE);
        else
            q->tail = value;
    }
}

/* ---- fetch ----------------------------------------------------------------------------------------------------------------- */

static bool has_room(const cq *q) { return (q->tail + q->entries - q->head) % q->entries + q->reserved < q->entries - 1; }

/* Locked. Is there a command for this lane? */
static bool is_ready(const lane *l, const sq *q)
{
    return q->entries && q->head != q->tail && !q->taken && !q->deleter && q->idle && has_room(q->cq) &&
           (l->is_worker || !q->by_message);
}

/* Locked. The next in turn. */
static sq *next_ready(lane *l)
{
    nvme *c = l->c;
    for (unsigned i = 1; c->running && c->master && i <= c->queues + 1; i++) {
        unsigned id = (c->turn + i) % (c->queues + 1);
        if (is_ready(l, &c->sqs[id])) {
            c->turn = id;
            return &c->sqs[id];
        }
    }
    return NULL;
}

/* Locked. One command less is busy. The last one ends a reset. */
static void less_busy(nvme *c)
{
    if (--c->busy)
        return;
    pthread_cond_broadcast(&c->rest);
    if (c->stopping)
        close_queues(c);
}

/* Locked. The command may be used again; its slot in the completion queue is used, or was given back. If that was the last of a
 * queue that is to be deleted, it is, and the command to finish for that is returned; else NULL. */
static command *retire(nvme *c, command *cmd)
{
    sq *q = cmd->sq;
    command *deleter = NULL;
    cmd->next = q->idle;
    q->idle = cmd;
    q->in_flight--;
    if (q->deleter && !q->in_flight && c->running) {
        deleter = q->deleter;
        c->busy++;
        close_sq(q);
    }
    less_busy(c);
    return deleter;
}

/* Locked. Something went wrong that no status code can tell: only a reset helps. */
static void fatal(nvme *c, const char *what, int err)
{
    if (c->running && err != -ENOTCONN && err != -ECANCELED) /* it isn't the client that ends everything */
        fprintf(stderr, "nvme: controller failure: %s: %s\n", what, strerror(-err));
    c->running = false;
    c->csts |= CSTS_CFS;
}

/* Copies the next submission entry of a queue that is ready. NULL: it can't. */
static command *copy_entry(lane *l, sq *q)
{
    nvme *c = l->c;
    command *cmd = q->idle, *deleter = NULL;
    q->idle = cmd->next;
    q->in_flight++;
    q->cq->reserved++;
    q->taken = true;
    c->busy++;
    uint64_t iova = q->base + (uint64_t)q->head * SQE_SIZE;
    unlock(c);
    int err = vfu_iommu_read(l->reader, iova, cmd->sqe, SQE_SIZE);
    lock(c);
    q->taken = false;
    cmd->blocks = c->blocks;
    cmd->write_through = !c->features[WRITE_CACHE];
    cmd->decided = false;
    if (err == -EDEADLK)
        q->by_message = true;
    else if (err)
        fatal(c, "a submission queue can't be read", err);
    else
        q->head = (q->head + 1) % q->entries;
    if (q->by_message) /* one worker wakes the next */
        pthread_cond_signal(&c->work);
    if (err) {
        q->cq->reserved--;
        deleter = retire(c, cmd);
    }
    if (deleter) {
        unlock(c);
        finish(l, deleter, SUCCESS, 0);
        lock(c);
    }
    return err ? NULL : cmd;
}

/* The next command for this lane. NULL: there is none. */
static command *fetch(lane *l)
{
    command *cmd = NULL;
    lock(l->c);
    for (sq *q; !cmd && (q = next_ready(l));)
        cmd = copy_entry(l, q);
    unlock(l->c);
    return cmd;
}

/* ---- dispatch -------------------------------------------------------------------------------------------------------------- */

static void give_to_worker(nvme *c, command *cmd)
{
    lock(c);
    cmd->next = NULL;
    *c->jobs_end = cmd;
    c->jobs_end = &cmd->next;
    pthread_cond_signal(&c->work);
    unlock(c);
}

static void execute(lane *l, command *cmd)
{
    uint32_t result = 0;
    int status = INVALID_FIELD;
    if (!(cmd->sqe[1] & 0xc3)) /* neither fused nor with SGLs */
        status = cmd->sq->id ? do_io(l, cmd) : do_admin(l, cmd, &result);
    if (status == NEEDS_WORKER)
        give_to_worker(l->c, cmd);
    else if (status != NOT_OURS)
        finish(l, cmd, status, result);
}

/* Does what there is for a lane, up to a limit. True: there may be more. */
static bool serve(lane *l)
{
    command *cmd = NULL;
    for (unsigned i = 0; i < SERVE_MAX && (cmd = fetch(l)); i++)
        execute(l, cmd);
    deliver_events(l);
    interrupt(l);
    return cmd;
}

/* ---- data pointer ---------------------------------------------------------------------------------------------------------- */

static void add_range(lane *l, uint64_t iova, size_t len)
{
    range *last = l->range_count ? &l->ranges[l->range_count - 1] : NULL;
    if (last && last->iova + last->len == iova && iova)
        last->len += len;
    else
        l->ranges[l->range_count++] = (range){iova, len};
}

static int transfer_status(int err) { return !err ? SUCCESS : err == -EDEADLK ? NEEDS_WORKER : DATA_TRANSFER_ERROR; }

/* Reads one list of PRP entries, at *at, for the *left bytes that are still to be found. It ends with its page; if there is more,
 * its last entry says where the next list is. */
static int walk_list(lane *l, uint64_t *at, uint32_t *left)
{
    uint8_t list[PAGE];
    uint32_t slots = (uint32_t)(PAGE - *at % PAGE) / 8, needed = (*left + PAGE - 1) / PAGE;
    bool chains = needed > slots;
    uint32_t count = chains ? slots : needed;
    int err = vfu_iommu_read(l->reader, *at, list, count * 8);
    if (err)
        return transfer_status(err);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t entry = get(list + i * 8, 8);
        if (entry % PAGE)
            return INVALID_PRP;
        if (chains && i == count - 1) {
            *at = entry;
            break;
        }
        uint32_t part = *left < PAGE ? *left : PAGE;
        add_range(l, entry, part);
        *left -= part;
    }
    return SUCCESS;
}

/* Turns the PRP entries (NVMe 4.3) of a command that moves len bytes, at most TRANSFER_MAX, into ranges of the lane. Lists that a
 * list names are whole pages, so the second is always the last. */
static int walk_prps(lane *l, const command *cmd, uint32_t len)
{
    uint64_t first = get(cmd->sqe + 24, 8), second = get(cmd->sqe + 32, 8);
    uint32_t part = PAGE - (uint32_t)(first % PAGE);
    l->range_count = 0;
    if (first % 4)
        return INVALID_PRP;
    part = part < len ? part : len;
    add_range(l, first, part);
    len -= part;
    if (!len)
        return SUCCESS;
    if (second % (len > PAGE ? 8 : PAGE))
        return INVALID_PRP;
    if (len <= PAGE) {
        add_range(l, second, len);
        return SUCCESS;
    }
    int status = SUCCESS;
    while (len && !status)
        status = walk_list(l, &second, &len);
    return status;
}

/* Copies between the lane's buffer and the guest's memory. */
static int copy_ranges(lane *l, bool to_guest)
{
    uint8_t *at = l->buffer;
    int err = 0;
    for (unsigned i = 0; i < l->range_count && !err; i++) {
        const range *r = &l->ranges[i];
        err = to_guest ? vfu_iommu_write(l->reader, r->iova, at, r->len) : vfu_iommu_read(l->reader, r->iova, at, r->len);
        at += r->len;
    }
    return err;
}

static void drop_pins(lane *l, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        vfu_iommu_pin_drop(vfu_dev_iommu(l->c->dev), &l->pins[i]);
}

/* Pins the ranges, and gives the memory behind them in l->iov. Returns how many, at most one for each page; -ENOTSUP: it can't be
 * pinned; or another error. */
static int pin_ranges(lane *l, uint32_t prot)
{
    unsigned count = 0;
    for (unsigned i = 0; i < l->range_count; i++) {
        const range *r = &l->ranges[i];
        int got = vfu_iommu_pin_take(l->reader, &l->pins[i], r->iova, r->len, prot, l->segments, PAGES_MAX - count);
        if (got < 0) {
            drop_pins(l, i);
            return got;
        }
        for (int s = 0; s < got; s++)
            l->iov[count++] = (struct iovec){l->segments[s].host, l->segments[s].len};
    }
    return (int)count;
}

/* The len bytes of the lane's buffer are a command's answer. */
static int give_data(lane *l, const command *cmd, uint32_t len)
{
    int status = walk_prps(l, cmd, len);
    return status ? status : transfer_status(copy_ranges(l, true));
}

/* ---- I/O ------------------------------------------------------------------------------------------------------------------- */

static int file_status(int err, bool write)
{
    switch (err) {
    case 0: return SUCCESS;
    case -EFAULT: return DATA_TRANSFER_ERROR;
    case -ENOSPC:
    case -EDQUOT: return CAPACITY_EXCEEDED;
    default: return write ? WRITE_FAULT : READ_ERROR;
    }
}

/* Moves all of iov. 0 or a negative errno; with NO_WAIT, -EAGAIN and -EOPNOTSUPP mean that it can't be done now, or never. */
static int file_move(nvme *c, bool write, struct iovec *iov, int count, uint64_t offset, int flags)
{
    while (count) {
        long n = syscall(write ? SYS_pwritev2 : SYS_preadv2, c->image, iov, (unsigned long)count, (unsigned long)offset,
                         (unsigned long)(offset >> 32), (unsigned long)flags);
        if (n <= 0) {
            int err = n ? -errno : -EIO; /* the file was made shorter */
            if (err == -EINTR)
                continue;
            return err;
        }
        offset += (uint64_t)n;
        for (size_t left = (size_t)n; left;) {
            size_t part = left < iov->iov_len ? left : iov->iov_len;
            iov->iov_base = (char *)iov->iov_base + part;
            iov->iov_len -= part;
            left -= part;
            if (!iov->iov_len) {
                iov++;
                count--;
            }
        }
    }
    return 0;
}

/* Reads or writes the len bytes of the lane's ranges: in place if they can be pinned, else through the lane's buffer. */
static int move(lane *l, bool write, uint64_t offset, uint32_t len, int flags)
{
    int count = pin_ranges(l, write ? VFU_IOMMU_READ : VFU_IOMMU_WRITE);
    bool pinned = count >= 0;
    if (!pinned && count != -ENOTSUP)
        return DATA_TRANSFER_ERROR;
    if (!pinned) {
        l->iov[0] = (struct iovec){l->buffer, len};
        count = 1;
        int err = write ? copy_ranges(l, false) : 0;
        if (err)
            return transfer_status(err);
    }
    int err = file_move(l->c, write, l->iov, count, offset, flags);
    if (pinned)
        drop_pins(l, l->range_count);
    if (err && flags & NO_WAIT) {
        if (err == -EOPNOTSUPP || err == -ENOSYS)
            atomic_store(write ? &l->c->writes_wait : &l->c->reads_wait, true);
        return NEEDS_WORKER;
    }
    return err || pinned || write ? file_status(err, write) : transfer_status(copy_ranges(l, true));
}

/* Are these blocks of the namespace? */
static bool in_range(const command *cmd, uint64_t lba, uint64_t count)
{
    return lba <= cmd->blocks && count <= cmd->blocks - lba;
}

/* Has a write to be on the disk when it is completed? */
static bool is_durable(const command *cmd) { return cmd->write_through || dword(cmd, 12) >> 30 & 1; }

static int read_write(lane *l, const command *cmd, bool write)
{
    nvme *c = l->c;
    uint64_t lba = get(cmd->sqe + 40, 8), count = get(cmd->sqe + 48, 2) + UINT64_C(1), len = count << c->block_shift;
    bool durable = write && is_durable(cmd);
    if (len > TRANSFER_MAX)
        return INVALID_FIELD;
    if (!in_range(cmd, lba, count))
        return LBA_OUT_OF_RANGE;
    if (write && c->read_only)
        return WRITE_PROTECTED;
    if (!l->is_worker && (durable || len > INLINE_MAX || atomic_load(write ? &c->writes_wait : &c->reads_wait)))
        return NEEDS_WORKER;
    int status = walk_prps(l, cmd, (uint32_t)len);
    if (!status)
        status = move(l, write, lba << c->block_shift, (uint32_t)len, !l->is_worker ? NO_WAIT : durable ? DURABLE : 0);
    if (status)
        return status;
    lock(c);
    *(write ? &c->writes : &c->reads) += 1;
    *(write ? &c->units_written : &c->units_read) += len >> 9;
    unlock(c);
    return SUCCESS;
}

/* Makes a part of the file read as zeros, without storage where the file system can do that. */
static int make_zero(lane *l, const zeros *z)
{
    int fd = l->c->image, err = 0;
    if (z->deallocate && fallocate(fd, PUNCH_HOLE | KEEP_SIZE, (off_t)z->offset, (off_t)z->len) == 0)
        return 0;
    if (fallocate(fd, ZERO_RANGE | KEEP_SIZE, (off_t)z->offset, (off_t)z->len) == 0)
        return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS)
        return -errno;
    memset(l->buffer, 0, TRANSFER_MAX);
    for (uint64_t done = 0, part; done < z->len && !err; done += part) {
        part = z->len - done < TRANSFER_MAX ? z->len - done : TRANSFER_MAX;
        l->iov[0] = (struct iovec){l->buffer, (size_t)part};
        err = file_move(l->c, true, l->iov, 1, z->offset + done, 0);
    }
    return err;
}

static int flush(nvme *c) { return fdatasync(c->image) < 0 ? -errno : 0; }

/* Zeroes parts of the file, then flushes it if that is wanted. This can take as long as it likes and touches nothing of the guest,
 * so a reset doesn't wait for it: then the command is gone when it returns. */
static int zero_and_flush(lane *l, const zeros *parts, unsigned count, bool flushes)
{
    nvme *c = l->c;
    int err = 0;
    lock(c);
    uint32_t resets = c->resets;
    less_busy(c);
    unlock(c);
    for (unsigned i = 0; i < count && !err; i++)
        err = parts[i].len ? make_zero(l, &parts[i]) : 0;
    if (!err && flushes)
        err = flush(c);
    lock(c);
    bool gone = c->resets != resets;
    c->busy += !gone;
    unlock(c);
    return gone ? NOT_OURS : file_status(err, true);
}

static int write_zeroes(lane *l, const command *cmd)
{
    nvme *c = l->c;
    uint64_t lba = get(cmd->sqe + 40, 8), count = get(cmd->sqe + 48, 2) + UINT64_C(1);
    zeros part = {lba << c->block_shift, count << c->block_shift, dword(cmd, 12) >> 25 & 1};
    if (!in_range(cmd, lba, count))
        return LBA_OUT_OF_RANGE;
    if (c->read_only)
        return WRITE_PROTECTED;
    return l->is_worker ? zero_and_flush(l, &part, 1, is_durable(cmd)) : NEEDS_WORKER;
}

static int dataset_management(lane *l, const command *cmd)
{
    nvme *c = l->c;
    zeros parts[RANGES_MAX];
    uint32_t count = (dword(cmd, 10) & 0xff) + 1;
    bool deallocate = dword(cmd, 11) & 4;
    if (c->read_only)
        return WRITE_PROTECTED;
    if (!l->is_worker)
        return NEEDS_WORKER;
    int status = walk_prps(l, cmd, count * 16);
    if (!status)
        status = transfer_status(copy_ranges(l, false));
    for (uint32_t i = 0; i < count && !status; i++) {
        uint64_t blocks = get(l->buffer + i * 16 + 4, 4), lba = get(l->buffer + i * 16 + 8, 8);
        parts[i] = (zeros){lba << c->block_shift, blocks << c->block_shift, true};
        status = in_range(cmd, lba, blocks) ? SUCCESS : LBA_OUT_OF_RANGE;
    }
    return status ? status : zero_and_flush(l, parts, deallocate ? count : 0, cmd->write_through);
}

static int do_io(lane *l, const command *cmd)
{
    uint8_t opcode = cmd->sqe[0];
    if (opcode != FLUSH && opcode != WRITE && opcode != READ && opcode != WRITE_ZEROES && opcode != DATASET_MANAGEMENT)
        return INVALID_OPCODE;
    if (dword(cmd, 1) != 1 && !(opcode == FLUSH && dword(cmd, 1) == UINT32_MAX))
        return INVALID_NAMESPACE;
    switch (opcode) {
    case FLUSH: return l->is_worker ? zero_and_flush(l, NULL, 0, true) : NEEDS_WORKER;
    case WRITE_ZEROES: return write_zeroes(l, cmd);
    case DATASET_MANAGEMENT: return dataset_management(l, cmd);
    default: return read_write(l, cmd, opcode == WRITE);
    }
}

/* ---- admin: queues --------------------------------------------------------------------------------------------------------- */

/* Locked. 0 or -ENOMEM */
static int open_sq(nvme *c, uint16_t id, uint64_t base, uint32_t entries, cq *completion)
{
    command *commands = calloc(entries, sizeof(*commands));
    if (!commands)
        return -ENOMEM;
    sq *q = &c->sqs[id];
    *q = (sq){.base = base, .id = id, .entries = entries, .cq = completion, .commands = commands};
    for (uint32_t i = 0; i < entries; i++) {
        commands[i].sq = q;
        commands[i].next = q->idle;
        q->idle = &commands[i];
    }
    completion->users++;
    return 0;
}

static void close_sq(sq *q)
{
    free(q->commands);
    q->cq->users--;
    *q = (sq){0};
}

/* Locked. What the shared page says about a queue that is new is old. */
static void clear_doorbell(nvme *c, unsigned index)
{
    atomic_store(&c->rung[index], 0);
    if (c->page)
        atomic_store(&c->page[index], 0);
}

/* What Create I/O Submission Queue and Create I/O Completion Queue have in common. */
static int check_queue(lane *l, const command *cmd, bool exists, uint32_t entry_size, uint32_t prot)
{
    nvme *c = l->c;
    uint32_t id = dword(cmd, 10) & 0xffff, entries = (dword(cmd, 10) >> 16) + 1;
    uint64_t base = get(cmd->sqe + 24, 8);
    if (!id || id > c->queues || exists)
        return INVALID_QUEUE;
    if (entries < 2 || entries > ENTRIES_MAX || (c->cc & CC_ENTRIES) != CC_ENTRIES_GOOD)
        return INVALID_QUEUE_SIZE;
    if (!(dword(cmd, 11) & 1)) /* not contiguous */
        return INVALID_FIELD;
    if (base % PAGE)
        return INVALID_PRP;
    return transfer_status(vfu_iommu_probe(l->reader, base, (uint64_t)entries * entry_size, prot));
}

static int create_cq(lane *l, const command *cmd)
{
    nvme *c = l->c;
    uint32_t id = dword(cmd, 10) & 0xffff, vector = dword(cmd, 11) >> 16;
    bool interrupts = dword(cmd, 11) & 2;
    int status = check_queue(l, cmd, id <= c->queues && c->cqs[id].entries, CQE_SIZE, VFU_IOMMU_WRITE);
    if (status)
        return status;
    if (interrupts && vector > c->queues)
        return INVALID_VECTOR;
    c->cqs[id] = (cq){.base = get(cmd->sqe + 24, 8),
                      .entries = (dword(cmd, 10) >> 16) + 1,
                      .phase = 1,
                      .interrupts = interrupts,
                      .vector = (uint16_t)vector};
    clear_doorbell(c, id * 2 + 1);
    return SUCCESS;
}

static int create_sq(lane *l, const command *cmd)
{
    nvme *c = l->c;
    uint32_t id = dword(cmd, 10) & 0xffff, completion = dword(cmd, 11) >> 16;
    int status = check_queue(l, cmd, id <= c->queues && c->sqs[id].entries, SQE_SIZE, VFU_IOMMU_READ);
    if (status)
        return status;
    if (!completion || completion > c->queues)
        return INVALID_QUEUE;
    if (!c->cqs[completion].entries)
        return NO_SUCH_CQ;
    clear_doorbell(c, id * 2);
    return open_sq(c, (uint16_t)id, get(cmd->sqe + 24, 8), (dword(cmd, 10) >> 16) + 1, &c->cqs[completion]) ? INTERNAL_ERROR
                                                                                                            : SUCCESS;
}

static int delete_sq(nvme *c, command *cmd)
{
    uint32_t id = dword(cmd, 10) & 0xffff;
    if (!id || id > c->queues || !c->sqs[id].entries || c->sqs[id].deleter)
        return INVALID_QUEUE;
    sq *q = &c->sqs[id];
    if (q->in_flight) {
        q->deleter = cmd;
        less_busy(c);
        return NOT_OURS;
    }
    close_sq(q);
    return SUCCESS;
}

static int delete_cq(nvme *c, const command *cmd)
{
    uint32_t id = dword(cmd, 10) & 0xffff;
    if (!id || id > c->queues || !c->cqs[id].entries)
        return INVALID_QUEUE;
    if (c->cqs[id].users)
        return INVALID_DELETION;
    c->cqs[id] = (cq){0};
    return SUCCESS;
}

/* ---- admin: identify, logs ------------------------------------------------------------------------------------------------- */

/* A text field: padded with spaces, and without the end of a string. */
static void put_text(uint8_t *at, size_t width, const char *text)
{
    memset(at, ' ', width);
    memcpy(at, text, strlen(text) < width ? strlen(text) : width);
}

static void identify_controller(const nvme *c, uint8_t *d)
{
    char serial[24];
    snprintf(serial, sizeof(serial), "VFU%016llX", (unsigned long long)c->id);
    put(d, 2, 0x1234);
    put(d + 2, 2, 0x1234);
    put_text(d + 4, 20, serial);
    put_text(d + 24, 40, "vfu NVMe disk");
    put_text(d + 64, 8, VFU_VERSION);
    d[77] = MDTS;
    put(d + 78, 2, 1);                 /* CNTLID */
    put(d + 80, 4, 0x10400);           /* VER */
    put(d + 92, 4, NAMESPACE_NOTICES); /* OAES */
    d[111] = 1;                        /* CNTRLTYPE: I/O */
    d[258] = 3;                        /* ACL: 4 */
    d[259] = EVENT_REQUESTS - 1;       /* AERL */
    d[260] = 3;                        /* FRMW: one slot, read-only */
    d[262] = ERROR_ENTRIES - 1;        /* ELPE */
    put(d + 266, 2, 343);              /* WCTEMP and CCTEMP, kelvin: far away */
    put(d + 268, 2, 353);
    d[512] = 0x66;          /* SQES */
    d[513] = 0x44;          /* CQES */
    put(d + 516, 4, 1);     /* NN */
    put(d + 520, 2, 0x0c);  /* ONCS: Dataset Management, Write Zeroes */
    d[525] = !c->read_only; /* VWC */
    snprintf((char *)d + 768, 256, "nqn.2024-01.io.github.vfu:nvme:%016llx", (unsigned long long)c->id); /* SUBNQN */
    put(d + 2048, 2, 2500); /* power state 0: MP, in units of 10 mW */
}

static void identify_namespace(const nvme *c, const command *cmd, uint8_t *d)
{
    put(d, 8, cmd->blocks);      /* NSZE */
    put(d + 8, 8, cmd->blocks);  /* NCAP */
    put(d + 16, 8, cmd->blocks); /* NUSE */
    d[33] = 0x9;                 /* DLFEAT: deallocated blocks read as zeros, Write Zeroes can deallocate */
    d[99] = c->read_only;        /* NSATTR */
    put(d + 104, 8, c->id);      /* NGUID, and EUI64 */
    put(d + 112, 8, ~c->id);
    put(d + 120, 8, c->id);
    d[128 + 2] = (uint8_t)c->block_shift; /* LBAF0 */
}

static int identify(lane *l, const command *cmd)
{
    uint8_t *d = l->buffer;
    uint32_t nsid = dword(cmd, 1);
    memset(d, 0, PAGE);
    switch (dword(cmd, 10) & 0xff) {
    case 0x00:
        if (nsid != 1)
            return INVALID_NAMESPACE;
        identify_namespace(l->c, cmd, d);
        break;
    case 0x01: identify_controller(l->c, d); break;
    case 0x02: /* active namespaces above nsid */
        if (nsid >= 0xfffffffe)
            return INVALID_NAMESPACE;
        put(d, 4, nsid < 1);
        break;
    case 0x03: /* NGUID and EUI64 */
        if (nsid != 1)
            return INVALID_NAMESPACE;
        d[0] = 2;
        d[1] = 16;
        put(d + 4, 8, l->c->id);
        put(d + 12, 8, ~l->c->id);
        d[20] = 1;
        d[21] = 8;
        put(d + 24, 8, l->c->id);
        break;
    default: return INVALID_FIELD;
    }
    return give_data(l, cmd, PAGE);
}

/* Locked. */
static void smart_log(const nvme *c, uint8_t *d)
{
    put(d + 1, 2, 300); /* kelvin */
    d[3] = 100;         /* spare, percent */
    d[4] = 10;
    put(d + 32, 8, (c->units_read + 999) / 1000);
    put(d + 48, 8, (c->units_written + 999) / 1000);
    put(d + 64, 8, c->reads);
    put(d + 80, 8, c->writes);
    put(d + 176, 8, c->error_count);
}

static int get_log(lane *l, const command *cmd)
{
    nvme *c = l->c;
    uint8_t *d = l->buffer;
    uint32_t page = dword(cmd, 10) & 0xff, nsid = dword(cmd, 1);
    uint64_t len = ((dword(cmd, 11) & UINT64_C(0xffff)) << 16 | dword(cmd, 10) >> 16) * 4 + 4;
    if (page < LOG_ERRORS || page > LOG_CHANGED_NAMESPACES)
        return INVALID_LOG_PAGE;
    if (len > TRANSFER_MAX || dword(cmd, 12) || dword(cmd, 13) || (page == LOG_SMART && nsid && nsid != UINT32_MAX))
        return INVALID_FIELD;
    memset(d, 0, TRANSFER_MAX);
    lock(c);
    switch (page) {
    case LOG_ERRORS: memcpy(d, c->errors, sizeof(c->errors)); break;
    case LOG_SMART: smart_log(c, d); break;
    case LOG_FIRMWARE:
        d[0] = 1; /* slot 1 is active */
        put_text(d + 8, 8, VFU_VERSION);
        break;
    case LOG_CHANGED_NAMESPACES: d[0] = c->namespace_changed; break;
    }
    unlock(c);
    int status = give_data(l, cmd, (uint32_t)len);
    if (status || dword(cmd, 10) & 1 << 15) /* retain the event */
        return status;
    lock(c);
    for (unsigned i = 0; i < EVENT_TYPES; i++)
        if (c->events[i].log == page)
            c->events[i].masked = false;
    if (page == LOG_CHANGED_NAMESPACES)
        c->namespace_changed = false;
    unlock(c);
    return SUCCESS;
}

/* ---- admin: features, abort ------------------------------------------------------------------------------------------------ */

static bool has_feature(uint32_t id) { return id >= ARBITRATION && id < FEATURES && id != 3; }

/* Locked. */
static int set_feature(nvme *c, const command *cmd, uint32_t *result)
{
    uint32_t id = dword(cmd, 10) & 0xff, value = dword(cmd, 11);
    if (!has_feature(id))
        return INVALID_FIELD;
    if (dword(cmd, 10) >> 31)
        return NOT_SAVEABLE;
    switch (id) {
    case POWER: return value & 0x1f ? INVALID_FIELD : SUCCESS;
    case TEMPERATURE:
        if (value >> 20 & 2)
            return INVALID_FIELD;
        if (!(value >> 16 & 0xf)) /* there is no sensor but the composite one */
            c->temperatures[value >> 20 & 1] = value & 0xffff;
        return SUCCESS;
    case WRITE_CACHE: c->features[id] = value & 1; return SUCCESS;
    case QUEUE_COUNT:
        if ((value & 0xffff) == 0xffff || value >> 16 == 0xffff)
            return INVALID_FIELD;
        for (unsigned i = 1; i <= c->queues; i++)
            if (c->sqs[i].entries || c->cqs[i].entries)
                return SEQUENCE_ERROR;
        *result = (c->queues - 1) * 0x10001;
        return SUCCESS;
    case VECTOR: return (value & 0xffff) > c->queues ? INVALID_FIELD : SUCCESS;
    default: c->features[id] = value; return SUCCESS;
    }
}

/* Locked. */
static int get_feature(nvme *c, const command *cmd, uint32_t *result)
{
    uint32_t id = dword(cmd, 10) & 0xff, value = dword(cmd, 11);
    if (!has_feature(id) || dword(cmd, 10) >> 8 & 7 /* only current values */)
        return INVALID_FIELD;
    *result = c->features[id];
    if (id == TEMPERATURE)
        *result = value >> 16 & 0xf ? 0 : c->temperatures[value >> 20 & 1];
    if (id == QUEUE_COUNT)
        *result = (c->queues - 1) * 0x10001;
    if (id == VECTOR) {
        if ((value & 0xffff) > c->queues)
            return INVALID_FIELD;
        *result = (value & 0xffff) | 1 << 16; /* nothing is coalesced */
    }
    return SUCCESS;
}

/* Locked. Takes a command that has not begun out of its list, NULL: there is none. */
static command *take_back(nvme *c, uint32_t sqid, uint32_t cid)
{
    for (unsigned i = 0; !sqid && has_room(&c->cqs[0]) && i < c->event_request_count; i++) {
        command *cmd = c->event_requests[i];
        if (get(cmd->sqe + 2, 2) == cid) {
            c->event_requests[i] = c->event_requests[--c->event_request_count];
            cmd->sq->cq->reserved++;
            c->busy++;
            return cmd;
        }
    }
    for (command **link = &c->jobs; *link; link = &(*link)->next) {
        command *cmd = *link;
        if (cmd->sq->id == sqid && get(cmd->sqe + 2, 2) == cid && !cmd->decided) {
            *link = cmd->next;
            if (!*link)
                c->jobs_end = link;
            return cmd;
        }
    }
    return NULL;
}

static int abort_command(lane *l, const command *cmd, uint32_t *result)
{
    nvme *c = l->c;
    lock(c);
    command *victim = take_back(c, dword(cmd, 10) & 0xffff, dword(cmd, 10) >> 16);
    unlock(c);
    *result = !victim;
    if (victim)
        finish(l, victim, ABORTED, 0);
    return SUCCESS;
}

/* Locked. */
static int event_request(nvme *c, command *cmd)
{
    if (c->event_request_count == EVENT_REQUESTS)
        return TOO_MANY_EVENT_REQUESTS;
    c->event_requests[c->event_request_count++] = cmd;
    cmd->sq->cq->reserved--; /* or those who wait for events would fill a small queue */
    less_busy(c);
    return NOT_OURS;
}

static int do_admin(lane *l, command *cmd, uint32_t *result)
{
    int status;
    switch (cmd->sqe[0]) {
    case GET_LOG: return get_log(l, cmd);
    case IDENTIFY: return identify(l, cmd);
    case ABORT: return abort_command(l, cmd, result);
    default: break;
    }
    lock(l->c);
    switch (cmd->sqe[0]) {
    case DELETE_SQ: status = delete_sq(l->c, cmd); break;
    case CREATE_SQ: status = create_sq(l, cmd); break;
    case DELETE_CQ: status = delete_cq(l->c, cmd); break;
    case CREATE_CQ: status = create_cq(l, cmd); break;
    case SET_FEATURES: status = set_feature(l->c, cmd, result); break;
    case GET_FEATURES: status = get_feature(l->c, cmd, result); break;
    case EVENT_REQUEST: status = event_request(l->c, cmd); break;
    default: status = INVALID_OPCODE; break;
    }
    unlock(l->c);
    return status;
}

/* ---- completion ------------------------------------------------------------------------------------------------------------ */

/* Decides what a command's completion entry is (NVMe 4.6), and where it goes. After a reset it goes nowhere. */
static void finish(lane *l, command *cmd, int status, uint32_t result)
{
    nvme *c = l->c;
    sq *q = cmd->sq;
    lock(c);
    q->cq->reserved--;
    if (!c->running) {
        retire(c, cmd);
        unlock(c);
        return;
    }
    put(cmd->cqe, 8, result);
    put(cmd->cqe + 8, 2, q->head);
    put(cmd->cqe + 10, 2, q->id);
    memcpy(cmd->cqe + 12, cmd->sqe + 2, 2); /* the command's identifier */
    put(cmd->cqe + 14, 2, (uint32_t)status << 1 | q->cq->phase);
    cmd->cqe_iova = q->cq->base + (uint64_t)q->cq->tail * CQE_SIZE;
    cmd->vector = q->cq->interrupts ? q->cq->vector : -1;
    cmd->decided = true;
    q->cq->tail = (q->cq->tail + 1) % q->cq->entries;
    q->cq->phase ^= q->cq->tail == 0;
    unlock(c);
    post(l, cmd);
}

/* Writes the entry. Its last word, which has the phase, comes after the rest and after the data. Entries of several lanes can
 * become visible out of order; the client goes on when the missing one is there and its interrupt comes. */
static void post(lane *l, command *cmd)
{
    nvme *c = l->c;
    uint32_t last;
    memcpy(&last, cmd->cqe + 12, 4);
    int err = vfu_iommu_write(l->reader, cmd->cqe_iova, cmd->cqe, 12);
    if (!err)
        err = vfu_iommu_store(l->reader, cmd->cqe_iova + 12, 4, VFU_IOMMU_RELEASE, last);
    if (err == -EDEADLK) {
        give_to_worker(c, cmd);
        return;
    }
    int vector = cmd->vector;
    lock(c);
    if (err)
        fatal(c, "a completion queue can't be written", err);
    command *deleter = retire(c, cmd);
    unlock(c);
    if (!err && vector >= 0)
        l->raise[vector / 64] |= UINT64_C(1) << vector % 64;
    if (++l->posted >= BATCH)
        interrupt(l);
    if (deleter)
        finish(l, deleter, SUCCESS, 0);
}

/* ---- interrupt ------------------------------------------------------------------------------------------------------------- */

/* Raises what the lane's completions are worth: one interrupt per vector. */
static void interrupt(lane *l)
{
    l->posted = 0;
    for (unsigned v = 0; v <= l->c->queues; v++)
        if (l->raise[v / 64] >> v % 64 & 1)
            vfu_dev_raise(l->c->dev, VFU_PCI_IRQ_MSIX, v);
    memset(l->raise, 0, sizeof(l->raise));
}

/* ---- events ---------------------------------------------------------------------------------------------------------------- */

/* Locked. Something that the client wants to know has happened. It is told once, until it has read the log page. */
static void note(nvme *c, unsigned type, uint8_t info, uint8_t log_page)
{
    if (c->events[type].masked)
        return;
    c->events[type].pending = true;
    c->events[type].info = info;
    c->events[type].log = log_page;
}

/* Locked. Takes a request that can be completed now, NULL: there is none or nothing to tell. */
static command *take_event(nvme *c, uint32_t *result)
{
    for (unsigned i = 0; c->running && c->event_request_count && i < EVENT_TYPES; i++) {
        if (!c->events[i].pending || c->events[i].masked || !has_room(&c->cqs[0]))
            continue;
        c->events[i].pending = false;
        c->events[i].masked = true;
        c->busy++;
        c->cqs[0].reserved++;
        *result = i | (uint32_t)c->events[i].info << 8 | (uint32_t)c->events[i].log << 16;
        return c->event_requests[--c->event_request_count];
    }
    return NULL;
}

static void deliver_events(lane *l)
{
    command *cmd;
    do {
        uint32_t result = 0;
        lock(l->c);
        cmd = take_event(l->c, &result);
        unlock(l->c);
        if (cmd)
            finish(l, cmd, SUCCESS, result);
    } while (cmd);
}

/* ---- enable, reset, shutdown ----------------------------------------------------------------------------------------------- */

/* Locked. CC.EN was set. What the client asks for and can't get shows as a fatal status (NVMe 7.6.1). */
static void start(lane *l)
{
    nvme *c = l->c;
    uint32_t sq_entries = (c->aqa & 0xfff) + 1, cq_entries = (c->aqa >> 16 & 0xfff) + 1;
    c->features[WRITE_CACHE] = !c->read_only;
    c->features[EVENTS] = 0;
    c->temperatures[0] = 0xffff;
    c->temperatures[1] = 0;
    c->cqs[0] = (cq){.base = c->acq, .entries = cq_entries, .phase = 1, .interrupts = true};
    bool good = !(c->cc & CC_FORMAT) && sq_entries > 1 && cq_entries > 1 && !(c->asq % PAGE) && !(c->acq % PAGE) &&
                vfu_iommu_probe(l->reader, c->asq, (uint64_t)sq_entries * SQE_SIZE, VFU_IOMMU_READ) == 0 &&
                vfu_iommu_probe(l->reader, c->acq, (uint64_t)cq_entries * CQE_SIZE, VFU_IOMMU_WRITE) == 0 &&
                open_sq(c, 0, c->asq, sq_entries, &c->cqs[0]) == 0;
    c->csts = good ? CSTS_RDY : CSTS_CFS;
    c->running = good;
    pthread_cond_signal(&c->start);
}

/* Locked. Nothing is busy: everything that a reset ends is over. */
static void close_queues(nvme *c)
{
    for (unsigned i = 0; i <= QUEUES_MAX; i++)
        if (c->sqs[i].entries)
            close_sq(&c->sqs[i]);
    for (unsigned i = 0; i < DOORBELL_COUNT; i++)
        clear_doorbell(c, i);
    memset(c->cqs, 0, sizeof(c->cqs));
    memset(c->events, 0, sizeof(c->events));
    memset(c->features, 0, sizeof(c->features));
    c->event_request_count = 0;
    c->stopping = false;
    c->resets++;
    c->csts &= (uint32_t) ~(CSTS_RDY | CSTS_CFS | CSTS_SHST);
}

/* Locked. CC.EN was cleared, or the function is reset: no command is begun or completed any more. When the last of those that
 * were begun has ended, CSTS.RDY follows. */
static void stop(nvme *c)
{
    c->running = false;
    c->stopping = true;
    c->busy++;
    for (command *cmd; (cmd = c->jobs);) {
        c->jobs = cmd->next;
        retire(c, cmd);
    }
    c->jobs_end = &c->jobs;
    less_busy(c);
}

/* Stops, and waits for what threads still do in the guest's memory. They don't wait for us: in the callbacks that call this,
 * accesses that need a message fail at once. */
static void halt(nvme *c)
{
    lock(c);
    c->cc = 0;
    stop(c);
    while (c->busy)
        pthread_cond_wait(&c->rest, &c->lock);
    c->aqa = 0;
    c->asq = c->acq = 0;
    unlock(c);
}

/* Locked. */
static void write_cc(nvme *c, uint32_t value)
{
    uint32_t changed = c->cc ^ value;
    if (value & changed & CC_EN && c->csts & CSTS_RDY) /* the reset before isn't through */
        value &= ~(uint32_t)CC_EN;
    c->cc = value;
    if (changed & CC_EN) {
        if (value & CC_EN)
            start(&c->lanes[0]);
        else
            stop(c);
    }
    if (value & CC_SHN && changed & CC_SHN && !(c->csts & CSTS_SHST)) {
        c->csts |= CSTS_SHUTTING;
        c->flushing = true;
        pthread_cond_signal(&c->work);
    }
}

/* ---- registers ------------------------------------------------------------------------------------------------------------- */

/* Locked. One of 4 bytes. */
static uint32_t read_register(const nvme *c, uint64_t offset)
{
    switch (offset) {
    case CAP: return (uint32_t)CAP_VALUE;
    case CAP + 4: return (uint32_t)(CAP_VALUE >> 32);
    case VS: return 0x10400;
    case CC: return c->cc;
    case CSTS: return c->csts;
    case AQA: return c->aqa;
    case ASQ: return (uint32_t)c->asq;
    case ASQ + 4: return (uint32_t)(c->asq >> 32);
    case ACQ: return (uint32_t)c->acq;
    case ACQ + 4: return (uint32_t)(c->acq >> 32);
    default: return 0;
    }
}

/* Locked. INTMS and INTMC have no meaning with MSI-X. */
static void write_register(nvme *c, uint64_t offset, uint32_t value)
{
    if (offset >= DOORBELLS) {
        uint64_t index = (offset - DOORBELLS) / 4;
        if (index < DOORBELL_COUNT && c->page) {
            atomic_store(&c->rung[index], value);
            atomic_store(&c->page[index], value);
        }
        doorbell(c, (uint32_t)index, value);
    } else if (offset == CC) {
        write_cc(c, value);
    } else if (!(c->cc & CC_EN)) {
        switch (offset) {
        case AQA: c->aqa = value; break;
        case ASQ: c->asq = (c->asq & ~UINT64_C(0xffffffff)) | value; break;
        case ASQ + 4: c->asq = (c->asq & 0xffffffff) | (uint64_t)value << 32; break;
        case ACQ: c->acq = (c->acq & ~UINT64_C(0xffffffff)) | value; break;
        case ACQ + 4: c->acq = (c->acq & 0xffffffff) | (uint64_t)value << 32; break;
        default: break;
        }
    }
}

static bool is_register_access(uint32_t region, uint64_t offset, size_t len)
{
    return region == BAR_REGISTERS && (len == 4 || len == 8) && offset % len == 0;
}

static int region_read(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    nvme *c = ctx;
    memset(buf, 0, len);
    lock(c);
    for (size_t at = 0; is_register_access(region, offset, len) && at < len; at += 4)
        put((uint8_t *)buf + at, 4, read_register(c, offset + at));
    unlock(c);
    return 0;
}

/* The answer comes first, then the work: the client waits for the one, and not for the other. */
static int region_write(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    nvme *c = ctx;
    lock(c);
    for (size_t at = 0; is_register_access(region, offset, len) && at < len; at += 4)
        write_register(c, offset + at, (uint32_t)get((const uint8_t *)buf + at, 4));
    unlock(c);
    vfu_dev_want_work(c->dev);
    return 0;
}

/* ---- PCI ------------------------------------------------------------------------------------------------------------------- */

/* Locked. Is there a queue that only workers can serve? */
static bool workers_wanted(nvme *c)
{
    for (unsigned i = 0; i <= c->queues; i++)
        if (c->sqs[i].by_message && is_ready(&c->lanes[1], &c->sqs[i]))
            return c->running && c->master;
    return false;
}

static bool work(void *ctx)
{
    nvme *c = ctx;
    bool more = serve(&c->lanes[0]);
    lock(c);
    if (workers_wanted(c))
        pthread_cond_signal(&c->work);
    unlock(c);
    return more;
}

static void config_written(void *ctx, unsigned changed)
{
    nvme *c = ctx;
    if (!(changed & VFU_PCI_CHANGED_COMMAND))
        return;
    lock(c);
    c->master = vfu_pci_command(vfu_dev_pci(c->dev)) & VFU_PCI_COMMAND_MASTER;
    unlock(c);
    vfu_dev_want_work(c->dev);
}

static void disconnected(void *ctx)
{
    nvme *c = ctx;
    halt(c);
    lock(c);
    c->master = false;
    unlock(c);
}

static void reset(void *ctx, vfu_reset_kind kind)
{
    (void)kind;
    disconnected(ctx);
}

/* ---- threads --------------------------------------------------------------------------------------------------------------- */

/* Locked. A shutdown is complete when everything that was written is on the disk. */
static void end_shutdown(nvme *c)
{
    c->flushing = false;
    unlock(c);
    if (flush(c) < 0)
        fprintf(stderr, "nvme: the image can't be flushed\n");
    lock(c);
    if (c->csts & CSTS_SHUTTING && !c->flushing)
        c->csts = (c->csts & (uint32_t)~CSTS_SHST) | CSTS_SHUT;
}

static void *worker(void *arg)
{
    lane *l = arg;
    nvme *c = l->c;
    lock(c);
    while (!c->ending) {
        command *cmd = c->jobs;
        if (cmd) {
            c->jobs = cmd->next;
            if (!c->jobs)
                c->jobs_end = &c->jobs;
            unlock(c);
            if (cmd->decided)
                post(l, cmd);
            else
                execute(l, cmd);
            serve(l);
            lock(c);
        } else if (c->flushing) {
            end_shutdown(c);
        } else if (workers_wanted(c)) {
            unlock(c);
            serve(l);
            lock(c);
        } else {
            pthread_cond_wait(&c->work, &c->lock);
        }
    }
    unlock(c);
    return NULL;
}

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* Looks at the shared page. */
static bool find_doorbells(nvme *c)
{
    bool found = false;
    for (unsigned i = 0; i < 2 * (c->queues + 1); i++) {
        if (atomic_load_explicit(&c->page[i], memory_order_relaxed) == atomic_load_explicit(&c->rung[i], memory_order_relaxed))
            continue;
        lock(c);
        uint32_t value = atomic_load_explicit(&c->page[i], memory_order_acquire);
        if (value != atomic_load(&c->rung[i])) {
            atomic_store(&c->rung[i], value);
            doorbell(c, i, value);
            found = true;
        }
        unlock(c);
    }
    return found;
}

/* Nothing wakes a thread when a page is written. So this one looks all the time for SPIN_US, then every 50 us, and after 100 ms
 * every ms, which takes a percent of a processor. While the controller is off it sleeps. */
static void *poller(void *arg)
{
    enum { SPIN_US = 200, IDLE_US = 100000 };
    lane *l = arg;
    nvme *c = l->c;
    uint64_t last = 0;
    bool more = false;
    for (bool ending = false; !ending;) {
        uint64_t now = now_us();
        if (find_doorbells(c) || more) {
            last = now;
            more = serve(l);
        } else if (now - last > SPIN_US) {
            struct timespec nap = {.tv_nsec = now - last > IDLE_US ? 1000000 : 50000};
            nanosleep(&nap, NULL);
            lock(c);
            while (!c->ending && !c->running)
                pthread_cond_wait(&c->start, &c->lock);
            ending = c->ending;
            unlock(c);
        }
    }
    return NULL;
}

static int open_lane(nvme *c, lane *l, bool is_worker, void *(*run)(void *))
{
    l->c = c;
    l->is_worker = is_worker;
    l->buffer = malloc(TRANSFER_MAX);
    int err = l->buffer ? 0 : -ENOMEM;
    if (!run) {
        l->reader = vfu_dev_reader(c->dev);
        return err;
    }
    if (!err)
        err = vfu_iommu_reader_open(vfu_dev_iommu(c->dev), &l->reader);
    if (!err)
        err = -pthread_create(&l->thread, NULL, run, l);
    c->threads += !err;
    return err;
}

static int open_lanes(nvme *c)
{
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->work, NULL);
    pthread_cond_init(&c->start, NULL);
    pthread_cond_init(&c->rest, NULL);
    c->jobs_end = &c->jobs;
    sigset_t ours, before; /* signals are the main thread's: they cut no system call of the others short */
    sigemptyset(&ours);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGINT);
    sigaddset(&ours, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &ours, &before);
    int err = open_lane(c, &c->lanes[0], false, NULL);
    for (unsigned i = 1; i <= WORKERS && !err; i++)
        err = open_lane(c, &c->lanes[i], true, worker);
    if (!err && c->page)
        err = open_lane(c, &c->lanes[1 + WORKERS], false, poller);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return err;
}

/* Ends the threads. */
static void close_lanes(nvme *c)
{
    vfu_dev_disconnect(c->dev); /* and so everything that they still do */
    lock(c);
    c->ending = true;
    pthread_cond_broadcast(&c->work);
    pthread_cond_signal(&c->start);
    unlock(c);
    for (unsigned i = 1; i <= c->threads; i++)
        pthread_join(c->lanes[i].thread, NULL);
    for (unsigned i = 0; i < 2 + WORKERS; i++) {
        if (i)
            vfu_iommu_reader_close(c->lanes[i].reader);
        free(c->lanes[i].buffer);
    }
}

/* ---- the image ------------------------------------------------------------------------------------------------------------- */

/* Opens the image and locks it against other writers, and finds out how many blocks it has. size 0: as it is. */
static int open_image(nvme *c, const char *path, uint64_t size, const char **why)
{
    struct flock whole = {.l_type = c->read_only ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET};
    struct stat st;
    *why = "would get a size that is no multiple of the block size";
    if (size % (UINT64_C(1) << c->block_shift))
        return -EINVAL;
    *why = "can't be opened";
    c->image = open(path, (c->read_only ? O_RDONLY : O_RDWR) | (size ? O_CREAT : 0) | O_CLOEXEC, 0644);
    if (c->image < 0 || fstat(c->image, &st) < 0)
        return -errno;
    *why = "is no file and no block device";
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return -EINVAL;
    *why = "can't be locked, another program uses it";
    if (fcntl(c->image, F_OFD_SETLK, &whole) < 0)
        return -errno;
    off_t end = lseek(c->image, 0, SEEK_END);
    *why = "is larger than --size, and nothing of it is cut off";
    if (end < 0 || (size && (uint64_t)end > size))
        return end < 0 ? -errno : -EFBIG;
    *why = "can't be made that large";
    if (size > (uint64_t)end && ftruncate(c->image, (off_t)size) < 0)
        return -errno;
    uint64_t bytes = size ? size : (uint64_t)end;
    *why = "is empty; --size=N makes it larger";
    if (!bytes)
        return -EINVAL;
    *why = "has a size that is no multiple of the block size";
    if (bytes % (UINT64_C(1) << c->block_shift))
        return -EINVAL;
    c->blocks = bytes >> c->block_shift;
    c->id = ((uint64_t)st.st_ino * UINT64_C(0x9e3779b97f4a7c15)) ^ (uint64_t)st.st_dev;
    return 0;
}

/* SIGHUP: the image may have become larger. */
static void measure_image(nvme *c)
{
    off_t end = lseek(c->image, 0, SEEK_END);
    uint64_t blocks = end < 0 ? 0 : (uint64_t)end >> c->block_shift;
    lock(c);
    if (blocks > c->blocks) {
        c->blocks = blocks;
        c->namespace_changed = true;
        if (c->features[EVENTS] & NAMESPACE_NOTICES)
            note(c, EVENT_NOTICE, NAMESPACE_CHANGED, LOG_CHANGED_NAMESPACES);
    }
    unlock(c);
    vfu_dev_want_work(c->dev);
}

/* ---- the program ----------------------------------------------------------------------------------------------------------- */

static vfu_dev *the_device;
static volatile sig_atomic_t asked_to_measure, asked_to_end;

static void on_signal(int number)
{
    if (number == SIGHUP)
        asked_to_measure = 1;
    else
        asked_to_end = 1;
    vfu_dev_stop(the_device);
}

static void catch_signals(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = on_signal;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGHUP, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* Until a signal comes, or the only client has gone. */
static int serve_clients(nvme *c)
{
    int err = 0;
    while (!err && !asked_to_end) {
        if (asked_to_measure) {
            asked_to_measure = 0;
            measure_image(c);
        }
        err = vfu_dev_run(c->dev);
    }
    return err == -ENOTCONN ? 0 : err;
}

/* The doorbells as a page that the client can map. */
static int make_page(nvme *c)
{
    int fd = (int)syscall(SYS_memfd_create, "nvme", 3u); /* MFD_CLOEXEC | MFD_ALLOW_SEALING */
    if (fd < 0 || ftruncate(fd, BAR_SIZE) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        return -errno;
    void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, DOORBELLS);
    if (page == MAP_FAILED)
        return -errno;
    c->page = page;
    return fd;
}

/* A number with K, M, G or T behind it; 0: it is none. */
static uint64_t parse_size(const char *text)
{
    static const char units[] = "KMGT";
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 0);
    const char *unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
    unsigned shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
    if (errno || !isdigit((unsigned char)*text) || (unit ? end[1] : *end) || value > (uint64_t)INT64_MAX >> shift)
        return 0;
    return (uint64_t)value << shift;
}

/* A descriptor number, or -1. */
static int parse_fd(const char *text)
{
    char *end;
    errno = 0;
    long fd = strtol(text, &end, 10);
    return errno || end == text || *end || fd < 0 || fd > INT_MAX ? -1 : (int)fd;
}

static int usage(const char *name, FILE *out)
{
    fprintf(out,
            "usage: %s (--socket-path=PATH | --fd=N) --image=FILE [OPTION]...\n"
            "  --socket-path=PATH          listen on a UNIX socket\n"
            "  --fd=N                      serve a socket that listens or is connected already\n"
            "  --image=FILE                what is on the disk; SIGHUP: look whether it has become larger\n"
            "  --size=N                    make it, or make it larger; K, M, G and T are understood\n"
            "  --block-size=512|4096       of the namespace; 512\n"
            "  --read-only                 never write to it; others may read it too\n"
            "  --queues=N                  pairs of I/O queues, 1 to %d; 8\n"
            "  --doorbells=trapped|mapped  wait for doorbells, or look at a page that the client maps (takes a processor\n"
            "                              while there is work); trapped\n"
            "  --verbose                   print a line for each request\n"
            "  --sandbox                   give up all system calls but those that serving needs\n"
            "  --help                      print this\n"
            "example: %s --socket-path=/tmp/nvme.sock --image=disk.img --size=1G\n",
            name, QUEUES_MAX, name);
    return out == stdout ? 0 : 2;
}

static int create_device(nvme *c, int page_fd, bool verbose)
{
    vfu_wire_sparse_area area = {.offset = DOORBELLS, .size = PAGE};
    vfu_region_share share = {.fd = page_fd, .areas = &area, .area_count = 1};
    vfu_dev_desc desc = {
        .pci =
            {
                .vendor = 0x1234,
                .device = 0x4e56,
                .subsystem_vendor = 0x1234,
                .subsystem = 0x0001,
                .class_code = 0x010802, /* NVM Express */
                .revision = 1,
                .bar = {[BAR_REGISTERS] = {.size = BAR_SIZE, .kind = VFU_BAR_MEM64}, [BAR_MSIX] = {.size = 2 * PAGE}},
                .pm = true,
                .express = true,
                .flr = true,
                .msix = {.vectors = (uint16_t)(c->queues + 1), .table_bar = BAR_MSIX, .pba_bar = BAR_MSIX, .pba_offset = PAGE},
            },
        .share = {[BAR_REGISTERS] = page_fd < 0 ? NULL : &share},
        .ctx = c,
        .callbacks =
            {
                .region_read = region_read,
                .region_write = region_write,
                .config_written = config_written,
                .reset = reset,
                .disconnected = disconnected,
                .work = work,
            },
        .dma_timeout_ms = 10000, /* no command waits longer for an answer */
        .logger = {.level = verbose ? VFU_LEVEL_TRACE : VFU_LEVEL_WARNING},
    };
    return vfu_dev_create(&c->dev, &desc);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"socket-path", required_argument, NULL, 's'},
        {"fd", required_argument, NULL, 'f'},
        {"image", required_argument, NULL, 'i'},
        {"size", required_argument, NULL, 'n'},
        {"block-size", required_argument, NULL, 'b'},
        {"read-only", no_argument, NULL, 'r'},
        {"queues", required_argument, NULL, 'q'},
        {"doorbells", required_argument, NULL, 'd'},
        {"verbose", no_argument, NULL, 'v'},
        {"sandbox", no_argument, NULL, 'x'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    static nvme c;
    const char *path = NULL, *image = NULL, *why = NULL;
    uint64_t size = 0;
    int fd = -1, page_fd = -1, option;
    bool verbose = false, sandbox = false, mapped = false, good = true;
    memset(&c, 0, sizeof(c)); /* a fuzzer calls main again and again */
    c.queues = 8;
    c.block_shift = 9;
    while (good && (option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 's': path = optarg; break;
        case 'f': good = (fd = parse_fd(optarg)) >= 0; break;
        case 'i': image = optarg; break;
        case 'n': good = (size = parse_size(optarg)) > 0; break;
        case 'b':
            c.block_shift = strcmp(optarg, "4096") ? 9 : 12;
            good = c.block_shift == 12 || !strcmp(optarg, "512");
            break;
        case 'r': c.read_only = true; break;
        case 'q':
            c.queues = (unsigned)parse_size(optarg);
            good = parse_size(optarg) >= 1 && parse_size(optarg) <= QUEUES_MAX;
            break;
        case 'd':
            mapped = !strcmp(optarg, "mapped");
            good = mapped || !strcmp(optarg, "trapped");
            break;
        case 'v': verbose = true; break;
        case 'x': sandbox = true; break;
        case 'h': return usage(argv[0], stdout);
        default: good = false; break;
        }
    }
    if (!good || optind != argc || !path == (fd < 0) || !image || (c.read_only && size))
        return usage(argv[0], stderr);

    int err = open_image(&c, image, size, &why);
    if (err) {
        fprintf(stderr, "%s: %s %s: %s\n", argv[0], image, why, strerror(-err));
        return 1;
    }
    if (mapped)
        page_fd = make_page(&c);
    err = mapped && page_fd < 0 ? page_fd : create_device(&c, page_fd, verbose);
    if (!err) {
        the_device = c.dev;
        err = open_lanes(&c);
        if (!err)
            catch_signals(); /* before anybody can see the socket file */
        if (!err)
            err = path ? vfu_dev_listen(c.dev, path) : vfu_dev_attach(c.dev, fd);
        if (!err && sandbox)
            err = sandbox_enter();
        if (!err)
            err = serve_clients(&c);
        close_lanes(&c);
        vfu_dev_destroy(c.dev);
    }
    if (err)
        fprintf(stderr, "%s: %s: %s\n", argv[0], path ? path : "--fd", strerror(-err));
    close(c.image);
    return err ? 1 : 0;
}
