/* SPDX-License-Identifier: MIT */
/*
 * nvme - a file as an NVMe disk, which a guest's stock driver uses
 *
 *     cc -std=c11 -O2 -I. examples/nvme.c -o nvme -pthread
 *     ./nvme --socket-path=/tmp/nvme.sock --image=disk.img --size=1G
 *
 * A device with threads of its own that work on queues in its client's memory: everything that the guest can change is copied
 * once and checked, data moves between the file and pinned memory without a copy, and a guest may unmap, reset or leave at any
 * moment. The disk has one namespace, with blocks of 512 or 4096 bytes. "NVMe" is the NVM Express base specification 1.4.
 *
 * A command travels through this file from top to bottom: doorbell, fetch, dispatch, data pointer, I/O or admin command,
 * completion, interrupt. Below that is what happens around commands: events, registers, PCI, threads, the image, the program.
 *
 * The socket's thread serves the client, and waits for nobody else. Workers fetch, execute and complete commands; they may wait:
 * for the disk, or for memory that only messages reach. With --doorbells=mapped a poller looks for doorbells in a page that the
 * client writes; without, the client's writes to registers bring them.
 *
 * A write is completed when the page cache has it, which survives this process, and Flush is fdatasync(): a write cache in the
 * sense of NVMe. A reset and the client's end lose nothing that was completed: they end commands, and undo nothing.
 *
 * One lock guards the controller's state. It is held for a few instructions at a time, never during an access to the guest's
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
enum { WORKERS = 8, BATCH = 16 /* completions for an interrupt */ };
enum { BAR_REGISTERS = 0, BAR_MSIX = 4, DOORBELLS = 0x1000, BAR_SIZE = 0x4000, DOORBELL_COUNT = 2 * (QUEUES_MAX + 1) };

/* Flags of preadv2(), pwritev2() and fallocate(), which not every C library names. */
enum { NO_WAIT = 0x08, DURABLE = 0x02, KEEP_SIZE = 0x01, PUNCH_HOLE = 0x02, ZERO_RANGE = 0x10 };

/* Registers (NVMe 3.1), in words of 4 bytes, and their bits */
enum { CAP = 0, VS = 2, CC = 5, CSTS = 7, AQA = 9, ASQ = 10, ACQ = 12, REGISTERS = 14 };
enum { CC_EN = 0x1, CC_FORMAT = 0x3ff0 /* CSS, MPS, AMS */, CC_SHN = 0xc000, CC_ENTRIES = 0xff0000, CC_ENTRIES_GOOD = 0x460000 };
enum { CSTS_RDY = 0x1, CSTS_CFS = 0x2, CSTS_SHUTTING = 0x4, CSTS_SHUT = 0x8, CSTS_SHST = 0xc };
enum { CAP_LOW = 40 << 24 /* TO: 20 s */ | 1 << 16 /* CQR */ | (ENTRIES_MAX - 1), CAP_HIGH = 1 << 5 /* NVM */ };
enum { VERSION = 0x10400 };

/* Opcodes and features, as far as they have names here */
enum { DELETE_SQ = 0, CREATE_SQ = 1, GET_LOG = 2, DELETE_CQ = 4, CREATE_CQ = 5, IDENTIFY = 6, ABORT = 8 };
enum { SET_FEATURES = 9, GET_FEATURES = 10, EVENT_REQUEST = 12 };
enum { FLUSH = 0, WRITE = 1, READ = 2, WRITE_ZEROES = 8, DATASET_MANAGEMENT = 9 };
enum { ARBITRATION = 1, POWER, LBA_TYPES, TEMPERATURE, WRITE_CACHE = 6, QUEUE_COUNT, VECTOR = 9, EVENTS = 11, FEATURES };

/* Status codes (NVMe 4.6.1), with their type from bit 8 on: of any command, of some commands, of the medium. And what is none:
 * the command is not the worker's any more. */
enum { SUCCESS = 0, INVALID_OPCODE = 0x01, INVALID_FIELD = 0x02, DATA_TRANSFER_ERROR = 0x04, INTERNAL_ERROR = 0x06 };
enum { ABORTED = 0x07, INVALID_NAMESPACE = 0x0b, SEQUENCE_ERROR = 0x0c, INVALID_PRP = 0x13, WRITE_PROTECTED = 0x20 };
enum { LBA_OUT_OF_RANGE = 0x80, CAPACITY_EXCEEDED = 0x81, DO_NOT_RETRY = 0x4000 };
enum { NO_SUCH_CQ = 0x100, INVALID_QUEUE = 0x101, INVALID_QUEUE_SIZE = 0x102, EVENT_REQUESTS_EXCEEDED = 0x105 };
enum { INVALID_VECTOR = 0x108, INVALID_LOG = 0x109, INVALID_DELETION = 0x10c, NOT_SAVEABLE = 0x10d };
enum { WRITE_FAULT = 0x280, READ_ERROR = 0x281, NOT_OURS = -1 };

/* Asynchronous events (NVMe 5.2) and log pages */
enum { EVENT_ERROR = 0, EVENT_NOTICE = 2, EVENT_TYPES };
enum { INVALID_DOORBELL = 0, INVALID_DOORBELL_VALUE = 1, NAMESPACE_CHANGED = 0, NAMESPACE_NOTICES = 1 << 8 };
enum { LOG_ERRORS = 1, LOG_SMART, LOG_FIRMWARE, LOG_CHANGED_NAMESPACES };

typedef struct nvme nvme;
typedef struct sq sq;
typedef struct cq cq;

typedef struct command {
    struct command *next; /* in a list: of a queue's free ones, of jobs, or of event requests */
    sq *sq;
    uint8_t sqe[SQE_SIZE]; /* the only copy that counts */
    uint64_t blocks;       /* of the namespace, when the command was fetched */
    bool write_through;    /* the write cache was off then */
} command;

typedef struct list {
    command *first, **end; /* end: where the next is put, if there is a first */
} list;

/* A queue exists while it has entries. */
struct sq {
    uint64_t base;
    uint16_t id;
    uint32_t entries, head, tail;
    cq *cq;
    command *commands; /* as many as entries */
    list idle;         /* those that are free */
    uint32_t in_flight;
    bool taken;       /* a worker is reading the entry at head */
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

/* Bytes of the guest's memory or of the image */
typedef struct range {
    uint64_t at, len;
} range;

typedef struct worker {
    nvme *c;
    vfu_iommu_reader *reader;
    pthread_t thread;
    bool raise[QUEUES_MAX + 1]; /* vectors that have news */
    unsigned posted;            /* completions since they were raised */

    range ranges[PAGES_MAX]; /* the guest's side of a transfer */
    unsigned range_count;
    vfu_iommu_pin pins[PAGES_MAX];
    vfu_iommu_segment segments[PAGES_MAX];
    struct iovec iov[PAGES_MAX];
    uint8_t *buffer; /* TRANSFER_MAX bytes, for what can't be pinned */
} worker;

struct nvme {
    vfu_dev *dev;
    int image;
    bool read_only;
    unsigned block_shift, queues; /* I/O queue pairs */
    uint64_t id;                  /* of the image: the same whenever it is served */
    worker workers[WORKERS];
    unsigned threads; /* of workers that run */
    bool polls;       /* a poller runs */
    pthread_t poller;
    _Atomic uint32_t *page;                /* doorbells that the client maps, or NULL */
    _Atomic uint32_t rung[DOORBELL_COUNT]; /* what of them has been noticed */

    pthread_mutex_t lock; /* of everything below */
    pthread_cond_t work;  /* for workers */
    pthread_cond_t state; /* running, busy or ending is another */
    uint32_t reg[REGISTERS];
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
    list jobs; /* I/O commands that were fetched */

    uint64_t blocks;
    uint32_t features[FEATURES + 1]; /* the last is the threshold of too low a temperature */
    list event_requests;
    unsigned event_request_count;
    struct {
        bool pending, masked;
        uint8_t info, log;
    } events[EVENT_TYPES];
    bool namespace_changed;
    uint8_t errors[ERROR_ENTRIES][64];              /* the log, newest first */
    uint64_t error_count, moves[2], units_moved[2]; /* reads and writes, and their units of 512 bytes */
};

/* What is further down the route, or beside it */
static int do_io(worker *w, const command *cmd);
static int do_admin(worker *w, command *cmd, uint32_t *result);
static void finish(worker *w, command *cmd, int status, uint32_t result);
static void interrupt(worker *w);
static void note(nvme *c, unsigned type, uint8_t info, uint8_t log_page);
static command *take_event(nvme *c, uint32_t *result);
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

static void append(list *to, command *cmd)
{
    if (!to->first)
        to->end = &to->first;
    cmd->next = NULL;
    *to->end = cmd;
    to->end = &cmd->next;
}

static command *take_first(list *from)
{
    command *first = from->first;
    if (first)
        from->first = first->next;
    return first;
}

static uint32_t dword(const command *cmd, unsigned number) { return (uint32_t)get(cmd->sqe + 4 * number, 4); }

/* ---- doorbell -------------------------------------------------------------------------------------------------------------- */

/* Locked. Notes an error that is no command's: an entry of the log, and an event. */
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

/* How far an entry of the queue is beyond its head. */
static uint32_t ahead(const cq *q, uint32_t entry) { return (entry + q->entries - q->head) % q->entries; }

/* Locked. The client says how far it is: with a submission queue's tail or with a completion queue's head. */
static void doorbell(nvme *c, uint32_t index, uint32_t value)
{
    uint32_t id = index / 2, is_cq = index % 2, entries = 0;
    if (id <= c->queues)
        entries = is_cq ? c->cqs[id].entries : c->sqs[id].entries;
    if (!c->running)
        return;
    if (!entries)
        doorbell_error(c, id, INVALID_DOORBELL);
    else if (value >= entries || (is_cq && ahead(&c->cqs[id], value) > ahead(&c->cqs[id], c->cqs[id].tail)))
        doorbell_error(c, id, INVALID_DOORBELL_VALUE);
    else
        *(is_cq ? &c->cqs[id].head : &c->sqs[id].tail) = value;
}

/* ---- fetch ----------------------------------------------------------------------------------------------------------------- */

static bool has_room(const cq *q) { return ahead(q, q->tail) + q->reserved < q->entries - 1; }

/* Locked. The next in turn that has a command to fetch, NULL: none has. */
static sq *next_queue(nvme *c)
{
    for (unsigned i = 1; c->running && c->master && i <= c->queues + 1; i++) {
        sq *q = &c->sqs[(c->turn + i) % (c->queues + 1)];
        if (q->head != q->tail && !q->taken && !q->deleter && q->idle.first && has_room(q->cq)) {
            c->turn = q->id;
            return q;
        }
    }
    return NULL;
}

/* Locked. One command less is busy. The last one ends a reset. */
static void less_busy(nvme *c)
{
    if (--c->busy)
        return;
    pthread_cond_broadcast(&c->state);
    if (c->stopping)
        close_queues(c);
}

/* Locked. The command may be used again; its slot in the completion queue is used, or was given back. If that was the last of a
 * queue that is to be deleted, it is, and the command to finish for that is returned; else NULL. */
static command *retire(nvme *c, command *cmd)
{
    sq *q = cmd->sq;
    command *deleter = NULL;
    append(&q->idle, cmd);
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
    c->reg[CSTS] |= CSTS_CFS;
}

/* Locked. Copies the submission entry at the queue's head; NULL: it can't, or a reset was faster. */
static command *fetch(worker *w, sq *q)
{
    nvme *c = w->c;
    command *cmd = take_first(&q->idle);
    q->in_flight++;
    q->cq->reserved++;
    q->taken = true;
    c->busy++;
    unlock(c);
    int err = vfu_iommu_read(w->reader, q->base + (uint64_t)q->head * SQE_SIZE, cmd->sqe, SQE_SIZE);
    lock(c);
    q->taken = false;
    q->head = (q->head + 1) % q->entries;
    cmd->blocks = c->blocks;
    cmd->write_through = !c->features[WRITE_CACHE];
    if (err)
        fatal(c, "a submission queue can't be read", err);
    if (c->running)
        return cmd;
    q->cq->reserved--;
    retire(c, cmd);
    return NULL;
}

/* ---- dispatch -------------------------------------------------------------------------------------------------------------- */

static void execute(worker *w, command *cmd)
{
    uint32_t result = 0;
    int status = INVALID_FIELD;
    if (!(cmd->sqe[1] & 0xc3)) /* neither fused nor with SGLs */
        status = cmd->sq->id ? do_io(w, cmd) : do_admin(w, cmd, &result);
    if (status != NOT_OURS)
        finish(w, cmd, status, result);
}

/* Locked. The next command to execute; NULL: there is none. Everything is fetched first, so that an Abort, which as an admin
 * command doesn't wait its turn, finds what it is about. */
static command *next_command(worker *w)
{
    nvme *c = w->c;
    for (sq *q; (q = next_queue(c));) {
        command *cmd = fetch(w, q);
        if (cmd && cmd->sq->id == 0)
            return cmd;
        if (cmd)
            append(&c->jobs, cmd);
    }
    return take_first(&c->jobs);
}

/* Locked. Does one thing for the controller. False: there is nothing to do. */
static bool work(worker *w)
{
    nvme *c = w->c;
    uint32_t result = 0;
    command *event = take_event(c, &result), *cmd = event ? NULL : next_command(w);
    if (!event && !cmd && !w->posted)
        return false;
    if (cmd && (c->jobs.first || next_queue(c))) /* for another worker */
        pthread_cond_signal(&c->work);
    unlock(c);
    if (event)
        finish(w, event, SUCCESS, result);
    else if (cmd)
        execute(w, cmd);
    else
        interrupt(w);
    lock(c);
    return true;
}

/* ---- data pointer ---------------------------------------------------------------------------------------------------------- */

/* Adds memory to the worker's ranges; returns len. */
static uint32_t add_range(worker *w, uint64_t iova, uint32_t len)
{
    range *last = w->range_count ? &w->ranges[w->range_count - 1] : NULL;
    if (last && last->at + last->len == iova && iova)
        last->len += len;
    else
        w->ranges[w->range_count++] = (range){iova, len};
    return len;
}

/* Turns the PRP entries (NVMe 4.3) of a command that moves len bytes, 1 to TRANSFER_MAX, into the worker's ranges. A list ends at
 * a page's end; if more is needed, its last entry says where the next list is: a whole page, so a second list is the last. */
static int walk_prps(worker *w, const command *cmd, uint32_t len)
{
    uint64_t first = get(cmd->sqe + 24, 8), second = get(cmd->sqe + 32, 8);
    uint32_t part = PAGE - (uint32_t)(first % PAGE);
    uint8_t entries[PAGE];
    w->range_count = 0;
    if (first % 4)
        return INVALID_PRP;
    len -= add_range(w, first, len < part ? len : part);
    if (len && second % (len > PAGE ? 8 : PAGE))
        return INVALID_PRP;
    if (len && len <= PAGE)
        len -= add_range(w, second, len);
    while (len) {
        uint32_t slots = (uint32_t)(PAGE - second % PAGE) / 8, needed = (len + PAGE - 1) / PAGE;
        uint32_t count = needed < slots ? needed : slots;
        if (vfu_iommu_read(w->reader, second, entries, count * 8))
            return DATA_TRANSFER_ERROR;
        for (uint32_t i = 0; i < count; i++) {
            uint64_t entry = get(entries + i * 8, 8);
            if (entry % PAGE)
                return INVALID_PRP;
            if (needed > count && i == count - 1)
                second = entry;
            else
                len -= add_range(w, entry, len < PAGE ? len : PAGE);
        }
    }
    return SUCCESS;
}

/* Copies between the worker's buffer and the guest's memory. */
static int copy_ranges(worker *w, bool to_guest)
{
    uint8_t *at = w->buffer;
    for (unsigned i = 0; i < w->range_count; i++) {
        const range *r = &w->ranges[i];
        size_t len = (size_t)r->len;
        if (to_guest ? vfu_iommu_write(w->reader, r->at, at, len) : vfu_iommu_read(w->reader, r->at, at, len))
            return DATA_TRANSFER_ERROR;
        at += len;
    }
    return SUCCESS;
}

static void drop_pins(worker *w, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        vfu_iommu_pin_drop(vfu_dev_iommu(w->c->dev), &w->pins[i]);
}

/* Pins the ranges, and gives the memory behind them in w->iov. Returns how many, at most one for each page; -ENOTSUP: it can't be
 * pinned; or another error. */
static int pin_ranges(worker *w, uint32_t prot)
{
    unsigned count = 0;
    for (unsigned i = 0; i < w->range_count; i++) {
        const range *r = &w->ranges[i];
        int got = vfu_iommu_pin_take(w->reader, &w->pins[i], r->at, r->len, prot, w->segments, PAGES_MAX - count);
        if (got < 0) {
            drop_pins(w, i);
            return got;
        }
        for (int s = 0; s < got; s++)
            w->iov[count++] = (struct iovec){w->segments[s].host, w->segments[s].len};
    }
    return (int)count;
}

/* The len bytes of the worker's buffer are a command's answer. */
static int give_data(worker *w, const command *cmd, uint32_t len)
{
    int status = walk_prps(w, cmd, len);
    return status ? status : copy_ranges(w, true);
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

/* Moves all of iov. 0 or a negative errno. What other commands have completed isn't kept from the guest while this one waits for
 * the disk. */
static int file_move(worker *w, bool write, struct iovec *iov, int count, uint64_t offset, int flags)
{
    while (count) {
        int patience = w->posted ? NO_WAIT : 0;
        long n = syscall(write ? SYS_pwritev2 : SYS_preadv2, w->c->image, iov, (unsigned long)count, (unsigned long)offset,
                         (unsigned long)(offset >> 32), (unsigned long)(flags | patience));
        if (n < 0 && patience)
            interrupt(w);
        else if (n <= 0 && !(n < 0 && errno == EINTR))
            return n ? -errno : -EIO; /* the file was made shorter */
        for (size_t left = n > 0 ? (size_t)n : 0, part; left; left -= part) {
            part = left < iov->iov_len ? left : iov->iov_len;
            iov->iov_base = (char *)iov->iov_base + part;
            iov->iov_len -= part;
            offset += part;
            if (!iov->iov_len && count--)
                iov++;
        }
    }
    return 0;
}

/* Reads or writes the bytes of the worker's ranges: in place if they can be pinned, else through the worker's buffer. */
static int read_write(worker *w, const command *cmd, bool write, uint64_t offset, uint64_t len, bool durable)
{
    nvme *c = w->c;
    int status = len > TRANSFER_MAX ? INVALID_FIELD : walk_prps(w, cmd, (uint32_t)len);
    if (status)
        return status;
    int count = pin_ranges(w, write ? VFU_IOMMU_READ : VFU_IOMMU_WRITE);
    bool pinned = count >= 0;
    if (!pinned && count != -ENOTSUP)
        return DATA_TRANSFER_ERROR;
    if (!pinned) {
        w->iov[0] = (struct iovec){w->buffer, (size_t)len};
        count = 1;
        status = write ? copy_ranges(w, false) : SUCCESS;
    }
    if (!status)
        status = file_status(file_move(w, write, w->iov, count, offset, durable ? DURABLE : 0), write);
    if (pinned)
        drop_pins(w, w->range_count);
    else if (!status && !write)
        status = copy_ranges(w, true);
    lock(c);
    c->moves[write] += !status;
    c->units_moved[write] += status ? 0 : len >> 9;
    unlock(c);
    return status;
}

/* Makes a part of the file read as zeros, without storage where that is wanted and the file system can do it. */
static int make_zero(worker *w, const range *part, bool deallocate)
{
    int fd = w->c->image, err = 0;
    if (deallocate && fallocate(fd, PUNCH_HOLE | KEEP_SIZE, (off_t)part->at, (off_t)part->len) == 0)
        return 0;
    if (fallocate(fd, ZERO_RANGE | KEEP_SIZE, (off_t)part->at, (off_t)part->len) == 0)
        return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS)
        return -errno;
    memset(w->buffer, 0, TRANSFER_MAX);
    for (uint64_t done = 0, len; done < part->len && !err; done += len) {
        len = part->len - done < TRANSFER_MAX ? part->len - done : TRANSFER_MAX;
        w->iov[0] = (struct iovec){w->buffer, (size_t)len};
        err = file_move(w, true, w->iov, 1, part->at + done, 0);
    }
    return err;
}

static int flush(nvme *c) { return fdatasync(c->image) < 0 ? -errno : 0; }

/* Zeroes parts of the file, then flushes it if that is wanted. This can take long and touches nothing of the guest, so a reset
 * doesn't wait for it: then the command is gone when it returns. */
static int zero_and_flush(worker *w, const range *parts, uint32_t count, bool deallocate, bool flushes)
{
    nvme *c = w->c;
    int err = 0;
    interrupt(w);
    lock(c);
    uint32_t resets = c->resets;
    less_busy(c);
    unlock(c);
    for (uint32_t i = 0; i < count && !err; i++)
        err = parts[i].len ? make_zero(w, &parts[i], deallocate) : 0;
    if (!err && flushes)
        err = flush(c);
    lock(c);
    bool gone = c->resets != resets;
    c->busy += !gone;
    unlock(c);
    return gone ? NOT_OURS : file_status(err, true);
}

/* Are these blocks of the namespace? */
static bool in_range(const command *cmd, uint64_t lba, uint64_t count)
{
    return lba <= cmd->blocks && count <= cmd->blocks - lba;
}

static int dataset_management(worker *w, const command *cmd)
{
    range parts[RANGES_MAX];
    uint32_t count = (dword(cmd, 10) & 0xff) + 1;
    bool deallocate = dword(cmd, 11) & 4;
    int status = walk_prps(w, cmd, count * 16);
    if (!status)
        status = copy_ranges(w, false);
    for (uint32_t i = 0; i < count && !status; i++) {
        uint64_t blocks = get(w->buffer + i * 16 + 4, 4), lba = get(w->buffer + i * 16 + 8, 8);
        parts[i] = (range){lba << w->c->block_shift, blocks << w->c->block_shift};
        status = in_range(cmd, lba, blocks) ? SUCCESS : LBA_OUT_OF_RANGE;
    }
    return status ? status : zero_and_flush(w, parts, deallocate ? count : 0, true, cmd->write_through);
}

static int do_io(worker *w, const command *cmd)
{
    nvme *c = w->c;
    uint8_t opcode = cmd->sqe[0];
    uint64_t lba = get(cmd->sqe + 40, 8), count = get(cmd->sqe + 48, 2) + UINT64_C(1);
    range whole = {lba << c->block_shift, count << c->block_shift};
    bool durable = cmd->write_through || dword(cmd, 12) >> 30 & 1; /* when it is completed: the cache is off, or FUA */
    if (opcode > READ && opcode != WRITE_ZEROES && opcode != DATASET_MANAGEMENT)
        return INVALID_OPCODE;
    if (dword(cmd, 1) != 1 && !(opcode == FLUSH && dword(cmd, 1) == UINT32_MAX))
        return INVALID_NAMESPACE;
    if (c->read_only && opcode != READ && opcode != FLUSH)
        return WRITE_PROTECTED;
    if (opcode != FLUSH && opcode != DATASET_MANAGEMENT && !in_range(cmd, lba, count))
        return LBA_OUT_OF_RANGE;
    switch (opcode) {
    case FLUSH: return zero_and_flush(w, NULL, 0, false, true);
    case WRITE_ZEROES: return zero_and_flush(w, &whole, 1, dword(cmd, 12) >> 25 & 1, durable);
    case DATASET_MANAGEMENT: return dataset_management(w, cmd);
    default: return read_write(w, cmd, opcode == WRITE, whole.at, whole.len, opcode == WRITE && durable);
    }
}

/* ---- admin: queues --------------------------------------------------------------------------------------------------------- */

/* Locked. 0 or -ENOMEM */
static int open_sq(nvme *c, uint32_t id, uint64_t base, uint32_t entries, cq *completion)
{
    command *commands = calloc(entries, sizeof(*commands));
    if (!commands)
        return -ENOMEM;
    sq *q = &c->sqs[id];
    *q = (sq){.base = base, .id = (uint16_t)id, .entries = entries, .cq = completion, .commands = commands};
    for (uint32_t i = 0; i < entries; i++) {
        commands[i].sq = q;
        append(&q->idle, &commands[i]);
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

/* Locked. Create I/O Completion Queue, and Create I/O Submission Queue for the completion queue `other`. */
static int create_queue(worker *w, const command *cmd, bool is_cq)
{
    nvme *c = w->c;
    uint32_t id = dword(cmd, 10) & 0xffff, entries = (dword(cmd, 10) >> 16) + 1, other = dword(cmd, 11) >> 16;
    uint64_t base = get(cmd->sqe + 24, 8), size = (uint64_t)entries * (is_cq ? CQE_SIZE : SQE_SIZE);
    bool interrupts = dword(cmd, 11) & 2;
    if (!id || id > c->queues || (is_cq ? c->cqs[id].entries : c->sqs[id].entries))
        return INVALID_QUEUE;
    if (entries < 2 || entries > ENTRIES_MAX || (c->reg[CC] & CC_ENTRIES) != CC_ENTRIES_GOOD)
        return INVALID_QUEUE_SIZE;
    if (!(dword(cmd, 11) & 1)) /* not contiguous */
        return INVALID_FIELD;
    if (base % PAGE)
        return INVALID_PRP;
    if (is_cq && interrupts && other > c->queues) /* a vector */
        return INVALID_VECTOR;
    if (!is_cq && (!other || other > c->queues))
        return INVALID_QUEUE;
    if (!is_cq && !c->cqs[other].entries)
        return NO_SUCH_CQ;
    if (vfu_iommu_probe(w->reader, base, size, is_cq ? VFU_IOMMU_WRITE : VFU_IOMMU_READ))
        return DATA_TRANSFER_ERROR;
    clear_doorbell(c, id * 2 + is_cq);
    if (!is_cq)
        return open_sq(c, id, base, entries, &c->cqs[other]) ? INTERNAL_ERROR : SUCCESS;
    c->cqs[id] = (cq){.base = base, .entries = entries, .phase = 1, .interrupts = interrupts, .vector = (uint16_t)other};
    return SUCCESS;
}

/* Locked. A submission queue's commands end first. */
static int delete_queue(nvme *c, command *cmd, bool is_cq)
{
    uint32_t id = dword(cmd, 10) & 0xffff;
    if (!id || id > c->queues || (is_cq ? !c->cqs[id].entries : !c->sqs[id].entries || c->sqs[id].deleter))
        return INVALID_QUEUE;
    if (is_cq && c->cqs[id].users)
        return INVALID_DELETION;
    if (is_cq) {
        c->cqs[id] = (cq){0};
    } else if (c->sqs[id].in_flight) {
        c->sqs[id].deleter = cmd;
        less_busy(c);
        return NOT_OURS;
    } else {
        close_sq(&c->sqs[id]);
    }
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
    snprintf((char *)d + 768, 256, "nqn.2024-01.io.github.vfu:nvme:%016llx", (unsigned long long)c->id); /* SUBNQN */
    put(d, 4, 0x12341234);                                                                               /* VID, SSVID */
    put_text(d + 4, 20, serial);
    put_text(d + 24, 40, "vfu NVMe disk");
    put_text(d + 64, 8, VFU_VERSION);
    d[77] = MDTS;
    put(d + 78, 2, 1); /* CNTLID */
    put(d + 80, 4, VERSION);
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
    put(d + 2048, 2, 2500); /* power state 0: MP, in units of 10 mW */
}

static void identify_namespace(const nvme *c, const command *cmd, uint8_t *d)
{
    for (unsigned i = 0; i < 3; i++) /* NSZE, NCAP, NUSE */
        put(d + i * 8, 8, cmd->blocks);
    d[33] = 0x9;            /* DLFEAT: deallocated blocks read as zeros, Write Zeroes can deallocate */
    d[99] = c->read_only;   /* NSATTR */
    put(d + 104, 8, c->id); /* NGUID, and EUI64 */
    put(d + 112, 8, ~c->id);
    put(d + 120, 8, c->id);
    d[128 + 2] = (uint8_t)c->block_shift; /* LBAF0 */
}

static int identify(worker *w, const command *cmd)
{
    uint8_t *d = w->buffer;
    uint32_t nsid = dword(cmd, 1), what = dword(cmd, 10) & 0xff;
    memset(d, 0, PAGE);
    if (what > 3)
        return INVALID_FIELD;
    if (what == 2 ? nsid >= 0xfffffffe : what != 1 && nsid != 1)
        return INVALID_NAMESPACE;
    switch (what) {
    case 0: identify_namespace(w->c, cmd, d); break;
    case 1: identify_controller(w->c, d); break;
    case 2: put(d, 4, nsid < 1); break; /* active namespaces above nsid */
    case 3:                             /* descriptors of the namespace: NGUID, EUI64 */
        put(d, 2, 0x1002);
        put(d + 4, 8, w->c->id);
        put(d + 12, 8, ~w->c->id);
        put(d + 20, 2, 0x0801);
        put(d + 24, 8, w->c->id);
        break;
    }
    return give_data(w, cmd, PAGE);
}

static int get_log(worker *w, const command *cmd)
{
    nvme *c = w->c;
    uint8_t *d = w->buffer;
    uint32_t page = dword(cmd, 10) & 0xff, nsid = dword(cmd, 1);
    uint64_t len = ((dword(cmd, 11) & UINT64_C(0xffff)) << 16 | dword(cmd, 10) >> 16) * 4 + 4;
    if (page < LOG_ERRORS || page > LOG_CHANGED_NAMESPACES)
        return INVALID_LOG;
    if (len > TRANSFER_MAX || dword(cmd, 12) || dword(cmd, 13) || (page == LOG_SMART && nsid && nsid != UINT32_MAX))
        return INVALID_FIELD;
    memset(d, 0, TRANSFER_MAX);
    lock(c);
    switch (page) {
    case LOG_ERRORS: memcpy(d, c->errors, sizeof(c->errors)); break;
    case LOG_SMART:
        put(d + 1, 2, 300);    /* kelvin */
        put(d + 3, 2, 0x0a64); /* 100 % spare; less than 10 would be few */
        for (unsigned write = 0; write < 2; write++) {
            put(d + 32 + write * 16, 8, (c->units_moved[write] + 999) / 1000);
            put(d + 64 + write * 16, 8, c->moves[write]);
        }
        put(d + 176, 8, c->error_count);
        break;
    case LOG_FIRMWARE:
        d[0] = 1; /* slot 1 is active */
        put_text(d + 8, 8, VFU_VERSION);
        break;
    default: d[0] = c->namespace_changed; break; /* a list of one, or none */
    }
    unlock(c);
    int status = give_data(w, cmd, (uint32_t)len);
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

/* Locked. Set Features, and Get Features, which changes nothing. Values that need no more are kept as they come. */
static int do_feature(nvme *c, const command *cmd, bool set, uint32_t *result)
{
    uint32_t id = dword(cmd, 10) & 0xff, value = dword(cmd, 11), slot = id;
    if (id < ARBITRATION || id >= FEATURES || id == LBA_TYPES || (!set && dword(cmd, 10) >> 8 & 7)) /* only current values */
        return INVALID_FIELD;
    if (set && dword(cmd, 10) >> 31)
        return NOT_SAVEABLE;
    if ((id == POWER && set && value & 0x1f) || (id == TEMPERATURE && value >> 21 & 1))
        return INVALID_FIELD;
    if (id == QUEUE_COUNT) {
        if (set && ((value & 0xffff) == 0xffff || value >> 16 == 0xffff))
            return INVALID_FIELD;
        for (unsigned i = 1; set && i <= c->queues; i++)
            if (c->sqs[i].entries || c->cqs[i].entries)
                return SEQUENCE_ERROR;
        *result = (c->queues - 1) * 0x10001;
        return SUCCESS;
    }
    if (id == VECTOR) {
        *result = (value & 0xffff) | 1 << 16; /* nothing is coalesced */
        return (value & 0xffff) > c->queues ? INVALID_FIELD : SUCCESS;
    }
    if (id == TEMPERATURE && value >> 16 & 0xf) /* there is no sensor but the composite one */
        return SUCCESS;
    if (id == TEMPERATURE && value >> 20 & 1)
        slot = FEATURES;
    if (set)
        c->features[slot] = id == TEMPERATURE ? value & 0xffff : id == WRITE_CACHE ? value & 1 : value;
    else
        *result = c->features[slot];
    return SUCCESS;
}

/* Locked. Takes a command out of a list; NULL: it isn't there. */
static command *take_back(list *from, uint32_t sqid, uint32_t cid)
{
    for (command **link = &from->first; *link; link = &(*link)->next) {
        command *cmd = *link;
        if (cmd->sq->id == sqid && get(cmd->sqe + 2, 2) == cid) {
            *link = cmd->next;
            if (!*link)
                from->end = link;
            return cmd;
        }
    }
    return NULL;
}

/* Locked. The request waits for an event, and keeps nothing else waiting: no reset, nobody who needs room in the queue. */
static int event_request(nvme *c, command *cmd)
{
    if (c->event_request_count == EVENT_REQUESTS)
        return EVENT_REQUESTS_EXCEEDED;
    append(&c->event_requests, cmd);
    c->event_request_count++;
    cmd->sq->cq->reserved--;
    less_busy(c);
    return NOT_OURS;
}

/* Locked. It goes on, if there is one. */
static command *resume(nvme *c, command *request)
{
    if (request) {
        c->event_request_count--;
        c->cqs[0].reserved++;
        c->busy++;
    }
    return request;
}

/* What hasn't begun is completed with an error, and has done nothing. */
static int abort_command(worker *w, const command *cmd, uint32_t *result)
{
    nvme *c = w->c;
    uint32_t sqid = dword(cmd, 10) & 0xffff, cid = dword(cmd, 10) >> 16;
    lock(c);
    command *victim = take_back(&c->jobs, sqid, cid);
    if (!victim && has_room(&c->cqs[0]))
        victim = resume(c, take_back(&c->event_requests, sqid, cid));
    unlock(c);
    *result = !victim;
    if (victim)
        finish(w, victim, ABORTED, 0);
    return SUCCESS;
}

static int do_admin(worker *w, command *cmd, uint32_t *result)
{
    nvme *c = w->c;
    uint8_t opcode = cmd->sqe[0];
    int status = INVALID_OPCODE;
    switch (opcode) {
    case GET_LOG: return get_log(w, cmd);
    case IDENTIFY: return identify(w, cmd);
    case ABORT: return abort_command(w, cmd, result);
    default: break;
    }
    lock(c);
    switch (opcode) {
    case CREATE_CQ:
    case CREATE_SQ: status = create_queue(w, cmd, opcode == CREATE_CQ); break;
    case DELETE_CQ:
    case DELETE_SQ: status = delete_queue(c, cmd, opcode == DELETE_CQ); break;
    case SET_FEATURES:
    case GET_FEATURES: status = do_feature(c, cmd, opcode == SET_FEATURES, result); break;
    case EVENT_REQUEST: status = event_request(c, cmd); break;
    default: break;
    }
    unlock(c);
    return status;
}

/* ---- completion ------------------------------------------------------------------------------------------------------------ */

/* Writes a command's completion entry (NVMe 4.6), if no reset has come. Its last word, which has the phase, comes after the rest
 * and after the data. Entries of several workers can become visible out of order; the client goes on when the one that is missing
 * is there, and its interrupt comes. */
static void finish(worker *w, command *cmd, int status, uint32_t result)
{
    nvme *c = w->c;
    sq *q = cmd->sq;
    cq *to = q->cq;
    bool again = !status || status == INTERNAL_ERROR || status == ABORTED || status >= WRITE_FAULT; /* may help */
    lock(c);
    to->reserved--;
    if (c->running) {
        uint64_t iova = to->base + (uint64_t)to->tail * CQE_SIZE;
        uint32_t words[CQE_SIZE / 4];
        uint8_t *cqe = (uint8_t *)words;
        put(cqe, 8, result);
        put(cqe + 8, 2, q->head);
        put(cqe + 10, 2, q->id);
        memcpy(cqe + 12, cmd->sqe + 2, 2); /* the command's identifier */
        put(cqe + 14, 2, (uint32_t)(status | (again ? 0 : DO_NOT_RETRY)) << 1 | to->phase);
        to->tail = (to->tail + 1) % to->entries;
        to->phase ^= to->tail == 0;
        unlock(c);
        int err = vfu_iommu_write(w->reader, iova, cqe, 12);
        if (!err)
            err = vfu_iommu_store(w->reader, iova + 12, 4, VFU_IOMMU_RELEASE, words[3]);
        lock(c);
        if (err)
            fatal(c, "a completion queue can't be written", err);
        else
            w->raise[to->vector] |= to->interrupts;
    }
    command *deleter = retire(c, cmd);
    unlock(c);
    if (++w->posted >= BATCH)
        interrupt(w);
    if (deleter)
        finish(w, deleter, SUCCESS, 0);
}

/* ---- interrupt ------------------------------------------------------------------------------------------------------------- */

/* Raises what the worker's completions are worth: one interrupt per vector. */
static void interrupt(worker *w)
{
    w->posted = 0;
    for (unsigned v = 0; v <= w->c->queues; v++)
        if (w->raise[v])
            vfu_dev_raise(w->c->dev, VFU_PCI_IRQ_MSIX, v);
    memset(w->raise, 0, sizeof(w->raise));
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

/* Locked. Takes a request that can be completed now; NULL: there is none or nothing to tell. */
static command *take_event(nvme *c, uint32_t *result)
{
    for (unsigned i = 0; c->running && c->event_requests.first && i < EVENT_TYPES; i++) {
        if (!c->events[i].pending || c->events[i].masked || !has_room(&c->cqs[0]))
            continue;
        c->events[i].pending = false;
        c->events[i].masked = true;
        *result = i | (uint32_t)c->events[i].info << 8 | (uint32_t)c->events[i].log << 16;
        return resume(c, take_first(&c->event_requests));
    }
    return NULL;
}

/* ---- enable, reset, shutdown ----------------------------------------------------------------------------------------------- */

/* Locked. CC.EN was set. What the client asks for and can't get shows as a fatal status (NVMe 7.6.1). */
static void start(nvme *c)
{
    vfu_iommu_reader *reader = vfu_dev_reader(c->dev); /* this is the socket's thread */
    uint32_t sq_entries = (c->reg[AQA] & 0xfff) + 1, cq_entries = (c->reg[AQA] >> 16 & 0xfff) + 1;
    uint64_t asq = c->reg[ASQ] | (uint64_t)c->reg[ASQ + 1] << 32, acq = c->reg[ACQ] | (uint64_t)c->reg[ACQ + 1] << 32;
    c->features[WRITE_CACHE] = !c->read_only;
    c->features[TEMPERATURE] = 0xffff;
    c->cqs[0] = (cq){.base = acq, .entries = cq_entries, .phase = 1, .interrupts = true};
    c->running = !(c->reg[CC] & CC_FORMAT) && sq_entries > 1 && cq_entries > 1 && !(asq % PAGE) && !(acq % PAGE) &&
                 vfu_iommu_probe(reader, asq, (uint64_t)sq_entries * SQE_SIZE, VFU_IOMMU_READ) == 0 &&
                 vfu_iommu_probe(reader, acq, (uint64_t)cq_entries * CQE_SIZE, VFU_IOMMU_WRITE) == 0 &&
                 open_sq(c, 0, asq, sq_entries, &c->cqs[0]) == 0;
    c->reg[CSTS] = c->running ? CSTS_RDY : CSTS_CFS;
    pthread_cond_broadcast(&c->state);
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
    c->event_requests.first = NULL;
    c->event_request_count = 0;
    c->stopping = false;
    c->resets++;
    c->reg[CSTS] &= ~(uint32_t)(CSTS_RDY | CSTS_CFS | CSTS_SHST);
}

/* Locked. CC.EN was cleared, or the function is reset: no command is begun or completed any more. When the last of those that
 * were begun has ended, CSTS.RDY follows. */
static void stop(nvme *c)
{
    c->running = false;
    c->stopping = true;
    c->busy++;
    for (command *cmd; (cmd = take_first(&c->jobs));)
        retire(c, cmd);
    less_busy(c);
}

/* Locked. */
static void write_cc(nvme *c, uint32_t value)
{
    uint32_t changed = c->reg[CC] ^ value;
    if (value & changed & CC_EN && c->reg[CSTS] & CSTS_RDY) /* the reset before isn't through */
        value &= ~(uint32_t)CC_EN;
    c->reg[CC] = value;
    if (changed & value & CC_EN)
        start(c);
    else if (changed & CC_EN)
        stop(c);
    if (value & CC_SHN && changed & CC_SHN && !(c->reg[CSTS] & CSTS_SHST)) {
        c->reg[CSTS] |= CSTS_SHUTTING;
        c->flushing = true;
        pthread_cond_signal(&c->work);
    }
}

/* Locked, by a worker. A shutdown is complete when everything that was written is on the disk. */
static void end_shutdown(nvme *c)
{
    c->flushing = false;
    unlock(c);
    if (flush(c) < 0)
        fprintf(stderr, "nvme: the image can't be flushed\n");
    lock(c);
    if (c->reg[CSTS] & CSTS_SHUTTING && !c->flushing)
        c->reg[CSTS] = (c->reg[CSTS] & ~(uint32_t)CSTS_SHST) | CSTS_SHUT;
}

/* ---- registers ------------------------------------------------------------------------------------------------------------- */

/* Locked. A word. INTMS and INTMC have no meaning with MSI-X. */
static void write_register(nvme *c, uint64_t number, uint32_t value)
{
    uint64_t index = number - DOORBELLS / 4;
    if (number >= DOORBELLS / 4) {
        if (index < DOORBELL_COUNT && c->page) {
            atomic_store(&c->rung[index], value);
            atomic_store(&c->page[index], value);
        }
        doorbell(c, (uint32_t)index, value);
    } else if (number == CC) {
        write_cc(c, value);
    } else if (number >= AQA && number < REGISTERS && !(c->reg[CC] & CC_EN)) {
        c->reg[number] = value;
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
    for (size_t at = 0; is_register_access(region, offset, len) && at < len && (offset + at) / 4 < REGISTERS; at += 4)
        put((uint8_t *)buf + at, 4, c->reg[(offset + at) / 4]);
    unlock(c);
    return 0;
}

static int region_write(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    nvme *c = ctx;
    lock(c);
    for (size_t at = 0; is_register_access(region, offset, len) && at < len; at += 4)
        write_register(c, (offset + at) / 4, (uint32_t)get((const uint8_t *)buf + at, 4));
    pthread_cond_signal(&c->work);
    unlock(c);
    return 0;
}

/* ---- PCI ------------------------------------------------------------------------------------------------------------------- */

static void config_written(void *ctx, unsigned changed)
{
    nvme *c = ctx;
    lock(c);
    if (changed & VFU_PCI_CHANGED_COMMAND)
        c->master = vfu_pci_command(vfu_dev_pci(c->dev)) & VFU_PCI_COMMAND_MASTER;
    pthread_cond_signal(&c->work);
    unlock(c);
}

/* Stops, and waits for what threads still do in the guest's memory. They don't wait for us: in the callbacks that call this,
 * accesses that need a message fail at once. */
static void halt(void *ctx)
{
    nvme *c = ctx;
    lock(c);
    c->reg[CC] = 0;
    stop(c);
    while (c->busy)
        pthread_cond_wait(&c->state, &c->lock);
    memset(&c->reg[AQA], 0, (REGISTERS - AQA) * sizeof(c->reg[0]));
    c->master = false;
    unlock(c);
}

static void reset(void *ctx, vfu_reset_kind kind)
{
    (void)kind;
    halt(ctx);
}

/* ---- threads --------------------------------------------------------------------------------------------------------------- */

static void *run_worker(void *arg)
{
    worker *w = arg;
    nvme *c = w->c;
    lock(c);
    while (!c->ending) {
        if (work(w))
            continue;
        if (c->flushing)
            end_shutdown(c);
        else
            pthread_cond_wait(&c->work, &c->lock);
    }
    unlock(c);
    return NULL;
}

/* Looks at the shared page. */
static bool find_doorbells(nvme *c)
{
    bool found = false;
    for (unsigned i = 0; i < 2 * (c->queues + 1); i++) {
        if (atomic_load_explicit(&c->page[i], memory_order_relaxed) == atomic_load_explicit(&c->rung[i], memory_order_relaxed))
            continue;
        lock(c);
        uint32_t value = atomic_load(&c->page[i]);
        if (value != atomic_load(&c->rung[i])) {
            atomic_store(&c->rung[i], value);
            doorbell(c, i, value);
            pthread_cond_signal(&c->work);
            found = true;
        }
        unlock(c);
    }
    return found;
}

/* Nothing wakes a thread when a page is written. So this one looks all the time for a fraction of a millisecond, then 2000 times
 * every 50 us, then every ms, which takes a percent of a processor. While the controller is off it sleeps. */
static void *run_poller(void *arg)
{
    enum { LOOKS = 2000, NAPS = 2000 };
    nvme *c = arg;
    unsigned idle = 0;
    for (bool ending = false; !ending;) {
        idle = find_doorbells(c) ? 0 : idle < LOOKS + NAPS ? idle + 1 : idle;
        if (idle > LOOKS) {
            struct timespec nap = {.tv_nsec = idle < LOOKS + NAPS ? 50000 : 1000000};
            nanosleep(&nap, NULL);
            lock(c);
            while (!c->ending && !c->running)
                pthread_cond_wait(&c->state, &c->lock);
            ending = c->ending;
            unlock(c);
        }
    }
    return NULL;
}

static int start_threads(nvme *c)
{
    int err = 0;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->work, NULL);
    pthread_cond_init(&c->state, NULL);
    for (unsigned i = 0; i < WORKERS && !err; i++) {
        worker *w = &c->workers[i];
        w->c = c;
        w->buffer = malloc(TRANSFER_MAX);
        err = w->buffer ? vfu_iommu_reader_open(vfu_dev_iommu(c->dev), &w->reader) : -ENOMEM;
        if (!err)
            err = -pthread_create(&w->thread, NULL, run_worker, w);
        c->threads += !err;
    }
    if (!err && c->page)
        err = -pthread_create(&c->poller, NULL, run_poller, c);
    c->polls = !err && c->page;
    return err;
}

static void end_threads(nvme *c)
{
    vfu_dev_disconnect(c->dev); /* and so everything that they still do */
    lock(c);
    c->ending = true;
    pthread_cond_broadcast(&c->work);
    pthread_cond_broadcast(&c->state);
    unlock(c);
    if (c->polls)
        pthread_join(c->poller, NULL);
    for (unsigned i = 0; i < WORKERS; i++) {
        if (i < c->threads)
            pthread_join(c->workers[i].thread, NULL);
        vfu_iommu_reader_close(c->workers[i].reader);
        free(c->workers[i].buffer);
    }
}

/* ---- the image ------------------------------------------------------------------------------------------------------------- */

static int refuse(const char *image, const char *why, int err)
{
    fprintf(stderr, "nvme: %s %s: %s\n", image, why, strerror(err));
    return -err;
}

/* Opens the image and locks it against other writers, and finds out how many blocks it has. size 0: as it is. */
static int open_image(nvme *c, const char *path, uint64_t size)
{
    struct flock whole = {.l_type = c->read_only ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET};
    struct stat st;
    if (size & ((1U << c->block_shift) - 1))
        return refuse(path, "would get a size that is no multiple of the block size", EINVAL);
    c->image = open(path, (c->read_only ? O_RDONLY : O_RDWR) | (size ? O_CREAT : 0) | O_CLOEXEC, 0644);
    if (c->image < 0 || fstat(c->image, &st) < 0)
        return refuse(path, "can't be opened", errno);
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return refuse(path, "is no file and no block device", EINVAL);
    if (fcntl(c->image, F_OFD_SETLK, &whole) < 0)
        return refuse(path, "can't be locked, another program uses it", errno);
    uint64_t end = (uint64_t)lseek(c->image, 0, SEEK_END); /* of a block device st_size is 0 */
    if (size && end > size)
        return refuse(path, "is larger than --size, and nothing of it is cut off", EFBIG);
    if (size > end && ftruncate(c->image, (off_t)size) < 0)
        return refuse(path, "can't be made that large", errno);
    size = size ? size : end;
    if (!size)
        return refuse(path, "is empty; --size=N makes it larger", EINVAL);
    if (size & ((1U << c->block_shift) - 1))
        return refuse(path, "has a size that is no multiple of the block size", EINVAL);
    c->blocks = size >> c->block_shift;
    c->id = ((uint64_t)st.st_ino * UINT64_C(0x9e3779b97f4a7c15)) ^ (uint64_t)st.st_dev;
    return 0;
}

/* The image may have become larger. */
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
    pthread_cond_signal(&c->work);
    unlock(c);
}

/* ---- the program ----------------------------------------------------------------------------------------------------------- */

static vfu_dev *the_device;
static atomic_bool asked_to_end;

/* In any thread. SIGHUP asks for a look at the image. */
static void on_signal(int number)
{
    if (number != SIGHUP)
        atomic_store(&asked_to_end, true);
    vfu_dev_stop(the_device);
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

/* A number of a range, with K, M, G or T behind it. False: it is none. */
static bool parse(const char *text, uint64_t min, uint64_t max, uint64_t *out)
{
    static const char units[] = "KMGT";
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 0);
    const char *unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
    unsigned shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
    *out = (uint64_t)value << shift;
    return !errno && isdigit((unsigned char)*text) && !(unit ? end[1] : *end) && value <= max >> shift && *out >= min;
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
    uint16_t vectors = (uint16_t)(c->queues + 1);
    vfu_dev_desc desc = {
        .pci = {.vendor = 0x1234,
                .device = 0x4e56,
                .subsystem_vendor = 0x1234,
                .subsystem = 0x0001,
                .class_code = 0x010802, /* NVM Express */
                .revision = 1,
                .bar = {[BAR_REGISTERS] = {.size = BAR_SIZE, .kind = VFU_BAR_MEM64}, [BAR_MSIX] = {.size = 2 * PAGE}},
                .pm = true,
                .express = true,
                .flr = true,
                .msix = {.vectors = vectors, .table_bar = BAR_MSIX, .pba_bar = BAR_MSIX, .pba_offset = PAGE}},
        .share = {[BAR_REGISTERS] = page_fd < 0 ? NULL : &share},
        .ctx = c,
        .callbacks = {.region_read = region_read,
                      .region_write = region_write,
                      .config_written = config_written,
                      .reset = reset,
                      .disconnected = halt},
        .dma_timeout_ms = 10000, /* no command waits longer for an answer */
        .logger = {.level = verbose ? VFU_LEVEL_TRACE : VFU_LEVEL_WARNING},
    };
    return vfu_dev_create(&c->dev, &desc);
}

/* Until a signal ends it: serves the image on a socket that listens at the path, or on a descriptor. */
static int serve_image(nvme *c, const char *path, int fd, bool mapped, bool verbose, bool sandbox)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    int page_fd = mapped ? make_page(c) : -1, err = mapped && page_fd < 0 ? page_fd : create_device(c, page_fd, verbose);
    if (err)
        return err;
    the_device = c->dev;
    err = start_threads(c);
    if (!err) { /* before anybody can see the socket file */
        sigaction(SIGTERM, &action, NULL);
        sigaction(SIGINT, &action, NULL);
        sigaction(SIGHUP, &action, NULL);
        signal(SIGPIPE, SIG_IGN);
        err = path ? vfu_dev_listen(c->dev, path) : vfu_dev_attach(c->dev, fd);
    }
    if (!err && sandbox)
        err = sandbox_enter();
    while (!err && !atomic_load(&asked_to_end)) {
        measure_image(c);
        err = vfu_dev_run(c->dev);
    }
    end_threads(c);
    vfu_dev_destroy(c->dev);
    return err == -ENOTCONN ? 0 : err; /* the only client has gone */
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
    const char *path = NULL, *image = NULL;
    uint64_t size = 0, fd = UINT64_MAX, queues = 8;
    bool verbose = false, sandbox = false, mapped = false, large = false, good = true;
    memset(&c, 0, sizeof(c)); /* a fuzzer calls main again and again */
    for (int option; good && (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 's': path = optarg; break;
        case 'f': good = parse(optarg, 0, INT_MAX, &fd); break;
        case 'i': image = optarg; break;
        case 'n': good = parse(optarg, 1, INT64_MAX, &size); break;
        case 'b': good = (large = !strcmp(optarg, "4096")) || !strcmp(optarg, "512"); break;
        case 'r': c.read_only = true; break;
        case 'q': good = parse(optarg, 1, QUEUES_MAX, &queues); break;
        case 'd': good = (mapped = !strcmp(optarg, "mapped")) || !strcmp(optarg, "trapped"); break;
        case 'v': verbose = true; break;
        case 'x': sandbox = true; break;
        case 'h': return usage(argv[0], stdout);
        default: good = false; break;
        }
    }
    if (!good || optind != argc || !path == (fd > INT_MAX) || !image || (c.read_only && size))
        return usage(argv[0], stderr);
    c.queues = (unsigned)queues;
    c.block_shift = large ? 12 : 9;
    c.reg[CAP] = CAP_LOW;
    c.reg[CAP + 1] = CAP_HIGH;
    c.reg[VS] = VERSION;
    if (open_image(&c, image, size))
        return 1;
    int err = serve_image(&c, path, (int)fd, mapped, verbose, sandbox);
    if (err)
        fprintf(stderr, "%s: %s: %s\n", argv[0], path ? path : "--fd", strerror(-err));
    close(c.image);
    return err ? 1 : 0;
}
