/* SPDX-License-Identifier: MIT */
/*
 * nvme - a file as an NVMe disk, which a guest's stock driver uses
 *
 *     cc -std=c11 -O2 -I. examples/nvme.c -o nvme -pthread
 *     ./nvme --socket-path=/tmp/nvme.sock --image=disk.img --size=1G
 *
 * It shows a device with threads of its own that works on queues in its client's memory: everything that the guest can change is
 * copied once and checked, data moves between the file and pinned memory without a copy, and a guest may unmap, reset or leave at
 * any moment. The disk has one namespace, with blocks of 512 or 4096 bytes. "NVMe" is the NVM Express base specification 1.4.
 *
 * A command travels through this file from top to bottom: doorbell, its steps fetch, execute and complete, data pointer, I/O or
 * admin command, interrupt. Below that is what happens around commands: reset, registers, PCI, threads, the image, the program.
 *
 *     thread    serves                                                              and doesn't wait for
 *     socket    the client; commands whose doorbell it rings                        the disk; an answer to a DMA message
 *     poller    with --doorbells=mapped: those whose doorbell it writes in a page   the disk
 *     workers   what the others can't, from a list of jobs
 *
 * Each has a `lane`: a reader of the IOMMU, and room for one transfer. A small read that is in the page cache and a small write
 * that is alone are done by the thread that has got the doorbell, so that no other has to be woken for them. Where a file system
 * can't say whether such a write would wait it is just done; if that took long, writes are jobs for the next ten seconds.
 *
 * A write is completed when the page cache has it, which survives this process, and Flush is fdatasync(): a write cache in the
 * sense of NVMe. A reset and the client's end lose nothing that was completed: they end commands, and undo nothing.
 *
 * One lock guards the controller's state. It is held for a few instructions at a time and never during an access to the guest's
 * memory or to the file. Functions that say "locked" are called with it.
 */
#define _FILE_OFFSET_BITS 64
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include "program.h"

#include <sys/uio.h>

enum { PAGE = 4096, QUEUES_MAX = 64, ENTRIES_MAX = 1024, SQE_SIZE = 64, CQE_SIZE = 16, EVENT_REQUESTS = 4, ERROR_ENTRIES = 4 };
enum { MDTS = 8, TRANSFER_MAX = PAGE << MDTS, PAGES_MAX = TRANSFER_MAX / PAGE + 1 };
enum { SOCKET = 0, WORKERS = 4, POLLER = WORKERS + 1, LANES, COMMANDS = 1024, SERVE_MAX = 64, BATCH = 16 /* commands */ };
enum { SMALL = 64 << 10 /* bytes */, SLOW_US = 1000, SLOW_FOR_US = 10000000 };
enum { BAR_REGISTERS = 0, BAR_MSIX = 4, DOORBELLS = 0x1000, BAR_SIZE = 0x4000, DOORBELL_COUNT = 2 * (QUEUES_MAX + 1) };

/* Flags of preadv2(), pwritev2() and fallocate(), which not every C library names. */
enum { NO_WAIT = 0x08, DURABLE = 0x02, KEEP_SIZE = 0x01, PUNCH_HOLE = 0x02, ZERO_RANGE = 0x10 };

/* Registers (NVMe 3.1), in words of 4 bytes, and their bits */
enum { CAP = 0, VS = 2, CC = 5, CSTS = 7, AQA = 9, ASQ = 10, ACQ = 12, REGISTERS = 14 };
enum { CAP_LOW = 40 << 24 /* TO: 20 s */ | 1 << 16 /* CQR */ | (ENTRIES_MAX - 1), CAP_HIGH = 1 << 5 /* NVM */ };
enum { VERSION = 0x10400 };
enum { CC_EN = 0x1, CC_FORMAT = 0x3ff0 /* CSS, MPS, AMS */, CC_SHN = 0xc000, CC_ENTRIES = 0xff0000, CC_ENTRIES_GOOD = 0x460000 };
enum { CSTS_RDY = 0x1, CSTS_CFS = 0x2, CSTS_SHUTTING = 0x4, CSTS_SHUT = 0x8, CSTS_SHST = 0xc };

/* Opcodes, features and log pages, as far as they have names here */
enum { DELETE_SQ, CREATE_SQ, GET_LOG, DELETE_CQ = 4, CREATE_CQ, IDENTIFY };
enum { ABORT = 8, SET_FEATURES, GET_FEATURES, EVENT_REQUEST = 12 };
enum { FLUSH, WRITE, READ, WRITE_ZEROES = 8, DATASET_MANAGEMENT };
enum { ARBITRATION = 1, POWER, LBA_TYPES, TEMPERATURE, WRITE_CACHE = 6, QUEUE_COUNT, VECTOR = 9, EVENTS = 11, FEATURES };
enum { LOG_ERRORS = 1, LOG_SMART, LOG_FIRMWARE, LOG_CHANGED_NAMESPACES, LOGS };

/* Status codes (NVMe 4.6.1), with their type from bit 8 on: of any command, of some commands, of the medium */
enum { SUCCESS = 0, INVALID_OPCODE = 0x01, INVALID_FIELD = 0x02, DATA_TRANSFER_ERROR = 0x04, ABORTED = 0x07 };
enum { INVALID_NAMESPACE = 0x0b, SEQUENCE_ERROR = 0x0c, INVALID_PRP = 0x13, WRITE_PROTECTED = 0x20, LBA_OUT_OF_RANGE = 0x80 };
enum { CAPACITY_EXCEEDED = 0x81, NO_SUCH_CQ = 0x100, INVALID_QUEUE = 0x101, INVALID_QUEUE_SIZE = 0x102 };
enum { TOO_MANY_REQUESTS = 0x105, INVALID_VECTOR = 0x108, INVALID_LOG = 0x109, INVALID_DELETION = 0x10c, NOT_SAVEABLE = 0x10d };
enum { WRITE_FAULT = 0x280, READ_ERROR = 0x281, DO_NOT_RETRY = 0x4000 };

/* What becomes of a command after a step: the next; the same again, by a worker; its end; or it is this lane's no more, and
 * perhaps gone. NEEDS_WORKER and NOT_OURS may be where else there is a status. */
enum { GOES_ON = 0, NEEDS_WORKER = -1, ENDS = -2, NOT_OURS = -3 };

/* Asynchronous events (NVMe 5.2): the log page that says more, information, type */
enum { EVENT_DOORBELL = LOG_ERRORS << 16, EVENT_DOORBELL_VALUE = LOG_ERRORS << 16 | 1 << 8 };
enum { EVENT_NAMESPACE = LOG_CHANGED_NAMESPACES << 16 | 2, NAMESPACE_NOTICES = 1 << 8 /* as a feature */ };

typedef struct nvme nvme;
typedef struct queue queue;

typedef struct command {
    struct command *next; /* in a list, or of those that are free */
    queue *sq;
    enum { FETCH, EXECUTE, COMPLETE } step; /* that is to be done */
    uint8_t sqe[SQE_SIZE];                  /* the only copy that counts */
    uint64_t blocks;                        /* of the namespace, when the command was fetched */
    bool write_through;                     /* the write cache was off then */
    bool is_alone;                          /* the guest has seen all that came before, and asks for nothing else */
    uint8_t cqe[CQE_SIZE];
    uint64_t cqe_iova;
} command;

typedef struct list {
    command *first, **end; /* end: where the next is put, if there is a first */
} list;

/* Submission or completion queue. It exists while it has entries. */
struct queue {
    uint64_t base;
    uint32_t entries, head, tail;
    uint32_t users; /* commands in flight; or submission queues */
    uint16_t id;

    queue *cq;        /* of a submission queue, as what follows: */
    bool taken;       /* the entry at head is being fetched */
    bool by_message;  /* by a worker, since only messages reach it */
    command *deleter; /* is completed when no command is in flight any more */

    uint32_t reserved; /* of a completion queue: slots for commands that were begun, so that each finds room */
    bool interrupts;
    uint8_t phase;
    uint16_t vector;
};

/* Bytes of the guest's memory or of the image */
typedef struct range {
    uint64_t at, len;
} range;

typedef struct lane {
    nvme *c;
    vfu_iommu_reader *reader;
    bool is_worker; /* may wait */
    bool runs;
    pthread_t thread;
    bool raise[QUEUES_MAX + 1]; /* vectors that have news */
    unsigned posted;            /* completions since they were raised */

    range ranges[PAGES_MAX]; /* the guest's side of a transfer; or parts of the image */
    unsigned range_count;
    vfu_iommu_pin pins[PAGES_MAX];
    vfu_iommu_segment segments[PAGES_MAX];
    struct iovec iov[PAGES_MAX];
    uint8_t buffer[TRANSFER_MAX]; /* for what can't be pinned */
} lane;

struct nvme {
    vfu_dev *dev;
    int image;
    bool read_only;
    unsigned block_shift, pairs;           /* I/O queues: 1 to pairs */
    uint64_t id;                           /* of the image: the same whenever it is served */
    lane lanes[LANES];                     /* SOCKET, workers, POLLER */
    _Atomic uint32_t *page;                /* doorbells that the client maps, or NULL */
    _Atomic uint32_t rung[DOORBELL_COUNT]; /* what of them has been noticed */

    pthread_mutex_t lock; /* of everything below */
    pthread_cond_t work;  /* for workers */
    pthread_cond_t state; /* running, busy or ending is another */
    uint32_t reg[REGISTERS];
    atomic_bool running;               /* commands are begun and completed */
    bool stopping;                     /* they were, and some are still busy */
    bool master;                       /* the guest lets us at its memory */
    bool ending;                       /* threads shall end */
    bool flushing;                     /* a shutdown waits for the cache to be written */
    bool waking;                       /* a worker was woken and doesn't run yet */
    uint32_t busy;                     /* commands between begin and end, but for those that wait for something else than us */
    uint32_t resets;                   /* how often everything was ended */
    uint64_t slow_until;               /* us; all writes are jobs */
    unsigned turn;                     /* the queue that was served last */
    queue queues[DOORBELL_COUNT];      /* by doorbell: submission 0, completion 0, submission 1 */
    command commands[COMMANDS], *idle; /* those that are free */
    list jobs, event_requests;         /* for workers; those that wait for an event */

    uint64_t blocks;
    uint32_t features[FEATURES + 1]; /* the last is the threshold of too low a temperature */
    unsigned event_request_count;
    uint32_t events[LOGS]; /* that are to be told, by log page; 0: none */
    bool told[LOGS];       /* one was, and the page has not been read since */
    bool namespace_changed;
    uint8_t errors[ERROR_ENTRIES][64];              /* the log, newest first */
    uint64_t error_count, moves[2], units_moved[2]; /* reads and writes, and their units of 512 bytes */
};

/* What is further down the route, or beside it */
static int do_io(lane *l, const command *cmd);
static int do_admin(lane *l, command *cmd, uint32_t *result);
static void interrupt(lane *l);
static void deliver_events(nvme *c);
static void close_queue(queue *q);
static void close_queues(nvme *c);

static void lock(nvme *c) { pthread_mutex_lock(&c->lock); }
static void unlock(nvme *c) { pthread_mutex_unlock(&c->lock); }

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

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

/* ---- doorbell -------------------------------------------------------------------------------------------------------------- */

/* How far an entry of the queue is beyond its head. */
static uint32_t ahead(const queue *q, uint32_t entry) { return (entry + q->entries - q->head) % q->entries; }

/* Locked. Something that the client wants to know has happened. It is told once, until it has read the log page. */
static void note(nvme *c, uint32_t event)
{
    if (!c->told[event >> 16])
        c->events[event >> 16] = event;
}

/* Locked. The client says how far it is: with a submission queue's tail or with a completion queue's head. What that can't be is
 * an error of no command: an entry of the log, and an event. */
static void doorbell(nvme *c, uint32_t index, uint32_t value)
{
    queue *q = index < DOORBELL_COUNT ? &c->queues[index] : NULL;
    uint32_t is_cq = index % 2;
    if (!c->running)
        return;
    if (q && value < q->entries && !(is_cq && ahead(q, value) > ahead(q, q->tail))) {
        *(is_cq ? &q->head : &q->tail) = value;
    } else {
        memmove(c->errors[1], c->errors[0], sizeof(c->errors) - sizeof(c->errors[0]));
        memset(c->errors[0], 0, sizeof(c->errors[0]));
        put(c->errors[0], 8, ++c->error_count);
        put(c->errors[0] + 8, 2, index / 2);
        put(c->errors[0] + 10, 2, 0xffff); /* of no command */
        put(c->errors[0] + 14, 2, 0xffff);
        note(c, q && q->entries ? EVENT_DOORBELL_VALUE : EVENT_DOORBELL);
    }
    deliver_events(c); /* for which there may be room now */
}

/* ---- fetch, execute, complete ---------------------------------------------------------------------------------------------- */

static bool has_room(const queue *cq) { return ahead(cq, cq->tail) + cq->reserved < cq->entries - 1; }

/* Locked. The next submission queue in turn that has something; NULL: none has. */
static queue *find_queue(nvme *c)
{
    for (unsigned i = 1; c->running && c->master && c->idle && i <= c->pairs + 1; i++) {
        queue *q = &c->queues[(c->turn + i) % (c->pairs + 1) * 2];
        if (q->head != q->tail && !q->taken && !q->deleter && has_room(q->cq))
            return q;
    }
    return NULL;
}

/* Locked. To wake one takes longer than a write into the cache: so only one is woken at a time, who wakes the next if there still
 * is something to do. */
static void wake_worker(nvme *c)
{
    if (!c->waking)
        pthread_cond_signal(&c->work);
    c->waking = true;
}

/* Locked. The next command for a lane: a job, or it begins one. NULL: there is none. */
static command *next_command(lane *l)
{
    nvme *c = l->c;
    command *cmd = l->is_worker ? take_first(&c->jobs) : NULL;
    queue *q = cmd ? NULL : find_queue(c);
    if (cmd && c->jobs.first)
        wake_worker(c);
    if (q) {
        cmd = c->idle;
        c->idle = cmd->next;
        cmd->sq = q;
        cmd->step = FETCH;
        q->taken = true;
        q->users++;
        q->cq->reserved++;
        c->busy++;
        c->turn = q->id;
    }
    return cmd;
}

/* Locked. */
static void give_to_worker(nvme *c, command *cmd)
{
    append(&c->jobs, cmd);
    wake_worker(c);
}

/* Locked. A command's completion entry (NVMe 4.6), and its place. */
static void decide(command *cmd, int status, uint32_t result)
{
    queue *cq = cmd->sq->cq;
    bool again = !status || status == ABORTED || status >= WRITE_FAULT; /* may help */
    put(cmd->cqe, 8, result);
    put(cmd->cqe + 8, 2, cmd->sq->head);
    put(cmd->cqe + 10, 2, cmd->sq->id);
    memcpy(cmd->cqe + 12, cmd->sqe + 2, 2); /* the command's identifier */
    put(cmd->cqe + 14, 2, (uint32_t)(again ? status : status | DO_NOT_RETRY) << 1 | cq->phase);
    cmd->cqe_iova = cq->base + (uint64_t)cq->tail * CQE_SIZE;
    cmd->step = COMPLETE;
    cq->reserved--;
    cq->tail = (cq->tail + 1) % cq->entries;
    cq->phase ^= cq->tail == 0;
}

/* Locked. The same for a command that waited, and that no lane has. */
static void resume(nvme *c, command *cmd, int status, uint32_t result)
{
    c->busy++;
    decide(cmd, status, result);
    give_to_worker(c, cmd);
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

/* Locked. A command has ended. If it was the last of a queue that is to be deleted, the queue is. */
static void retire(nvme *c, command *cmd)
{
    command *deleter = cmd->sq->deleter;
    cmd->next = c->idle;
    c->idle = cmd;
    if (!--cmd->sq->users && deleter && c->running) {
        close_queue(cmd->sq);
        resume(c, deleter, SUCCESS, 0);
    }
    less_busy(c);
}

/* A queue in the guest's memory can't be used: perhaps by this lane; else no status can tell it, and only a reset helps. */
static int queue_error(nvme *c, const char *what, int err)
{
    if (err == -EDEADLK)
        return NEEDS_WORKER;
    lock(c);
    if (c->running && err != -ENOTCONN && err != -ECANCELED) /* it isn't the client that ends everything */
        fprintf(stderr, "nvme: controller failure: a %s: %s\n", what, strerror(-err));
    c->running = false;
    c->reg[CSTS] |= CSTS_CFS;
    unlock(c);
    return ENDS;
}

/* Copies the submission entry at the queue's head. */
static int fetch(lane *l, command *cmd)
{
    nvme *c = l->c;
    queue *q = cmd->sq;
    int err = vfu_iommu_read(l->reader, q->base + (uint64_t)q->head * SQE_SIZE, cmd->sqe, SQE_SIZE);
    if (err) {
        q->by_message = err == -EDEADLK;
        return queue_error(c, "submission queue can't be read", err);
    }
    lock(c);
    q->head = (q->head + 1) % q->entries;
    q->taken = false;
    cmd->blocks = c->blocks;
    cmd->write_through = !c->features[WRITE_CACHE];
    cmd->is_alone = c->busy == 1 && !find_queue(c) && q->cq->head == q->cq->tail && now_us() >= c->slow_until;
    cmd->step = EXECUTE;
    if (q->by_message && find_queue(c)) /* for another worker, since this one may have to wait */
        wake_worker(c);
    unlock(c);
    return GOES_ON;
}

static int execute(lane *l, command *cmd)
{
    nvme *c = l->c;
    uint32_t result = 0;
    int status = INVALID_FIELD;
    if (!(cmd->sqe[1] & 0xc3)) /* neither fused nor with SGLs */
        status = cmd->sq->id ? do_io(l, cmd) : do_admin(l, cmd, &result);
    if (status < 0)
        return status;
    lock(c);
    if (cmd->sq->id && !status && (cmd->sqe[0] == READ || cmd->sqe[0] == WRITE)) {
        bool write = cmd->sqe[0] == WRITE;
        c->moves[write]++;
        c->units_moved[write] += (get(cmd->sqe + 48, 2) + 1) << c->block_shift >> 9;
    }
    decide(cmd, status, result);
    unlock(c);
    return GOES_ON;
}

/* Writes the completion entry. Its last word, which has the phase, comes after the rest and after the data. Entries of several
 * lanes can become visible out of order; the client goes on when the missing one is there and its interrupt comes. */
static int complete(lane *l, command *cmd)
{
    const queue *cq = cmd->sq->cq;
    uintptr_t word;
    int err = 0;
    for (unsigned at = 0; at < CQE_SIZE && !err; at += sizeof(word)) {
        bool last = at + sizeof(word) == CQE_SIZE;
        memcpy(&word, cmd->cqe + at, sizeof(word));
        err = vfu_iommu_store(l->reader, cmd->cqe_iova + at, sizeof(word), last ? VFU_IOMMU_RELEASE : VFU_IOMMU_RELAXED, word);
    }
    if (err)
        return queue_error(l->c, "completion queue can't be written", err);
    if (cq->interrupts)
        l->raise[cq->vector] = true;
    if (++l->posted >= BATCH)
        interrupt(l);
    return ENDS;
}

/* Does what there is for a lane, as far as it can and up to a limit. True: there may be more. */
static bool serve(lane *l)
{
    static int (*const steps[])(lane *, command *) = {[FETCH] = fetch, [EXECUTE] = execute, [COMPLETE] = complete};
    nvme *c = l->c;
    command *cmd = NULL;
    lock(c);
    for (unsigned i = 0; i < SERVE_MAX && (cmd = next_command(l)); i++) {
        unlock(c);
        int fate = GOES_ON;
        while (fate == GOES_ON && c->running)
            fate = steps[cmd->step](l, cmd);
        lock(c);
        if (fate == NEEDS_WORKER && c->running)
            give_to_worker(c, cmd);
        else if (fate != NOT_OURS)
            retire(c, cmd);
    }
    unlock(c);
    interrupt(l);
    return cmd;
}

/* ---- data pointer ---------------------------------------------------------------------------------------------------------- */

/* Of an access to the guest's memory, which this lane may not be able to do. */
static int transfer_status(int err) { return !err ? SUCCESS : err == -EDEADLK ? NEEDS_WORKER : DATA_TRANSFER_ERROR; }

/* Adds memory to the lane's ranges; returns len. */
static uint32_t add_range(lane *l, uint64_t iova, uint32_t len)
{
    range *last = l->range_count ? &l->ranges[l->range_count - 1] : NULL;
    if (last && last->at + last->len == iova && iova)
        last->len += len;
    else
        l->ranges[l->range_count++] = (range){iova, len};
    return len;
}

/* Turns the PRP entries (NVMe 4.3) of a command that moves len bytes, 1 to TRANSFER_MAX, into the lane's ranges. A list ends at a
 * page's end; if more is needed, its last entry says where the next list is: a whole page, so a second list is the last. */
static int walk_prps(lane *l, const command *cmd, uint32_t len)
{
    uint64_t first = get(cmd->sqe + 24, 8), second = get(cmd->sqe + 32, 8);
    uint32_t part = PAGE - (uint32_t)(first % PAGE);
    uint8_t entries[PAGE];
    l->range_count = 0;
    if (first % 4)
        return INVALID_PRP;
    len -= add_range(l, first, len < part ? len : part);
    if (len && second % (len > PAGE ? 8 : PAGE))
        return INVALID_PRP;
    if (len && len <= PAGE)
        len -= add_range(l, second, len);
    while (len) {
        uint32_t slots = (uint32_t)(PAGE - second % PAGE) / 8, needed = (len + PAGE - 1) / PAGE;
        uint32_t count = needed < slots ? needed : slots;
        int err = vfu_iommu_read(l->reader, second, entries, count * 8);
        if (err)
            return transfer_status(err);
        for (uint32_t i = 0; i < count; i++) {
            uint64_t entry = get(entries + i * 8, 8);
            if (entry % PAGE)
                return INVALID_PRP;
            if (needed > count && i == count - 1)
                second = entry;
            else
                len -= add_range(l, entry, len < PAGE ? len : PAGE);
        }
    }
    return SUCCESS;
}

/* Copies between the lane's buffer and the ranges. */
static int copy_ranges(lane *l, bool to_guest)
{
    uint8_t *at = l->buffer;
    int err = 0;
    for (unsigned i = 0; i < l->range_count && !err; i++) {
        size_t len = (size_t)l->ranges[i].len;
        uint64_t iova = l->ranges[i].at;
        err = to_guest ? vfu_iommu_write(l->reader, iova, at, len) : vfu_iommu_read(l->reader, iova, at, len);
        at += len;
    }
    return transfer_status(err);
}

/* The len bytes of the lane's buffer are a command's answer. */
static int give_data(lane *l, const command *cmd, uint32_t len)
{
    int status = walk_prps(l, cmd, len);
    return status ? status : copy_ranges(l, true);
}

/* ---- I/O ------------------------------------------------------------------------------------------------------------------- */

static int file_status(int err, bool write)
{
    switch (err) {
    case 0: return SUCCESS;
    case EFAULT: return DATA_TRANSFER_ERROR;
    case ENOSPC:
    case EDQUOT: return CAPACITY_EXCEEDED;
    default: return write ? WRITE_FAULT : READ_ERROR;
    }
}

/* Moves all of l->iov. A worker waits for the disk, and lets the guest know before what it has completed; most writes go to the
 * cache, so a few share an interrupt. Others don't wait, but where the file system can't write without. */
static int file_move(lane *l, bool write, int count, uint64_t offset, bool durable)
{
    struct iovec *iov = l->iov;
    int flags = durable ? DURABLE : l->is_worker ? 0 : NO_WAIT;
    if (l->is_worker && (!write || durable || l->posted >= BATCH / 4))
        interrupt(l);
    while (count) {
        long n = syscall(write ? SYS_pwritev2 : SYS_preadv2, l->c->image, iov, (unsigned long)count, (unsigned long)offset,
                         (unsigned long)(offset >> 32), (unsigned long)flags);
        int err = n > 0 ? 0 : n < 0 ? errno : EIO; /* 0: the file was made shorter */
        if (write && flags == NO_WAIT && err == EOPNOTSUPP)
            flags = 0;
        else if (err && flags == NO_WAIT)
            return NEEDS_WORKER;
        else if (err && err != EINTR)
            return file_status(err, write);
        for (size_t left = err ? 0 : (size_t)n, part; left; left -= part) {
            part = left < iov->iov_len ? left : iov->iov_len;
            iov->iov_base = (char *)iov->iov_base + part;
            iov->iov_len -= part;
            offset += part;
            if (!iov->iov_len && count--)
                iov++;
        }
    }
    return SUCCESS;
}

static void drop_pins(lane *l)
{
    for (unsigned i = 0; i < l->range_count; i++)
        vfu_iommu_pin_drop(vfu_dev_iommu(l->c->dev), &l->pins[i]);
}

/* Reads or writes blocks of the image: in place if the lane's ranges can be pinned, else through its buffer. */
static int move(lane *l, bool write, const range *blocks, bool durable)
{
    uint32_t prot = write ? VFU_IOMMU_READ : VFU_IOMMU_WRITE;
    int err = 0, count = 0;
    for (unsigned i = 0; i < l->range_count && err >= 0; i++) {
        const range *r = &l->ranges[i];
        err = vfu_iommu_pin_take(l->reader, &l->pins[i], r->at, r->len, prot, l->segments, (unsigned)(PAGES_MAX - count));
        for (int s = 0; s < err; s++) /* in all at most one for each page */
            l->iov[count++] = (struct iovec){l->segments[s].host, l->segments[s].len};
    }
    int status = err >= 0 ? file_move(l, write, count, blocks->at, durable) : DATA_TRANSFER_ERROR;
    drop_pins(l);
    if (err != -ENOTSUP)
        return status;
    status = write ? copy_ranges(l, false) : SUCCESS;
    l->iov[0] = (struct iovec){l->buffer, (size_t)blocks->len};
    if (!status)
        status = file_move(l, write, 1, blocks->at, durable);
    return status || write ? status : copy_ranges(l, true);
}

/* Lanes that aren't workers try what is small: reads, which may be in the cache, and a write that is alone: the guest has seen
 * all that came before, and asks for nothing else. */
static int read_write(lane *l, const command *cmd, bool write, const range *blocks, bool durable)
{
    nvme *c = l->c;
    bool tries = !l->is_worker && !durable && blocks->len <= SMALL && (!write || cmd->is_alone);
    uint64_t began = write && tries ? now_us() : 0;
    if (blocks->len > TRANSFER_MAX)
        return INVALID_FIELD;
    if (!l->is_worker && !tries)
        return NEEDS_WORKER;
    int status = walk_prps(l, cmd, (uint32_t)blocks->len);
    if (!status)
        status = move(l, write, blocks, durable);
    if (write && tries && now_us() - began > SLOW_US) {
        lock(c);
        c->slow_until = began + SLOW_FOR_US;
        unlock(c);
    }
    return status;
}

/* Makes a part of the file read as zeros, without storage where that is wanted and the file system can do it. */
static int make_zero(lane *l, const range *part, bool deallocate)
{
    int fd = l->c->image, status = SUCCESS;
    if (!part->len)
        return SUCCESS;
    if (deallocate && fallocate(fd, PUNCH_HOLE | KEEP_SIZE, (off_t)part->at, (off_t)part->len) == 0)
        return SUCCESS;
    if (fallocate(fd, ZERO_RANGE | KEEP_SIZE, (off_t)part->at, (off_t)part->len) == 0)
        return SUCCESS;
    if (errno != EOPNOTSUPP && errno != ENOSYS)
        return file_status(errno, true);
    memset(l->buffer, 0, TRANSFER_MAX);
    for (uint64_t done = 0, len; done < part->len && !status; done += len) {
        len = part->len - done < TRANSFER_MAX ? part->len - done : TRANSFER_MAX;
        l->iov[0] = (struct iovec){l->buffer, (size_t)len};
        status = file_move(l, true, 1, part->at + done, false);
    }
    return status;
}

static int flush(nvme *c) { return file_status(fdatasync(c->image) < 0 ? errno : 0, true); }

/* Zeroes the lane's ranges, of the image, and flushes it then if that is wanted. This can take long and touches nothing of the
 * guest, so a reset doesn't wait for it: then the command is gone when it returns. */
static int zero_and_flush(lane *l, bool deallocate, bool flushes)
{
    nvme *c = l->c;
    int status = SUCCESS;
    interrupt(l);
    lock(c);
    uint32_t resets = c->resets;
    less_busy(c);
    unlock(c);
    for (unsigned i = 0; i < l->range_count && !status; i++)
        status = make_zero(l, &l->ranges[i], deallocate);
    if (!status && flushes)
        status = flush(c);
    lock(c);
    bool gone = c->resets != resets;
    c->busy += !gone;
    unlock(c);
    return gone ? NOT_OURS : status;
}

/* Are these blocks of the namespace? */
static bool in_range(const command *cmd, uint64_t lba, uint64_t count)
{
    return lba <= cmd->blocks && count <= cmd->blocks - lba;
}

/* Dataset Management: makes the ranges those of the image that the command names. */
static int read_ranges(lane *l, const command *cmd)
{
    uint32_t count = (dword(cmd, 10) & 0xff) + 1;
    int status = walk_prps(l, cmd, count * 16);
    if (!status)
        status = copy_ranges(l, false);
    for (l->range_count = 0; l->range_count < count && !status; l->range_count++) {
        const uint8_t *entry = l->buffer + l->range_count * 16;
        uint64_t blocks = get(entry + 4, 4), lba = get(entry + 8, 8);
        l->ranges[l->range_count] = (range){lba << l->c->block_shift, blocks << l->c->block_shift};
        status = in_range(cmd, lba, blocks) ? SUCCESS : LBA_OUT_OF_RANGE;
    }
    return status;
}

static int do_io(lane *l, const command *cmd)
{
    nvme *c = l->c;
    uint8_t opcode = cmd->sqe[0];
    uint64_t lba = get(cmd->sqe + 40, 8), count = get(cmd->sqe + 48, 2) + UINT64_C(1);
    range blocks = {lba << c->block_shift, count << c->block_shift};
    bool durable = cmd->write_through || dword(cmd, 12) >> 30 & 1; /* when it is completed: the cache is off, or FUA */
    bool deallocates = dword(cmd, 12) >> 25 & 1;
    int status = SUCCESS;
    if (opcode > READ && opcode != WRITE_ZEROES && opcode != DATASET_MANAGEMENT)
        return INVALID_OPCODE;
    if (dword(cmd, 1) != 1 && !(opcode == FLUSH && dword(cmd, 1) == UINT32_MAX))
        return INVALID_NAMESPACE;
    if (c->read_only && opcode != READ && opcode != FLUSH)
        return WRITE_PROTECTED;
    if (opcode != FLUSH && opcode != DATASET_MANAGEMENT && !in_range(cmd, lba, count))
        return LBA_OUT_OF_RANGE;
    if (opcode == READ || opcode == WRITE)
        return read_write(l, cmd, opcode == WRITE, &blocks, opcode == WRITE && durable);
    if (!l->is_worker)
        return NEEDS_WORKER;
    l->range_count = opcode == WRITE_ZEROES;
    l->ranges[0] = blocks;
    if (opcode == DATASET_MANAGEMENT) {
        status = read_ranges(l, cmd);
        deallocates = dword(cmd, 11) & 4;
        if (!deallocates) /* the rest are hints */
            l->range_count = 0;
    }
    return status ? status : zero_and_flush(l, deallocates, opcode == FLUSH || durable);
}

/* ---- admin: queues --------------------------------------------------------------------------------------------------------- */

/* Locked. In the shared page as well, if there is one: there a client may read what it has rung, and nothing is left of old
 * queues. */
static void set_doorbell(nvme *c, uint64_t index, uint32_t value)
{
    if (index < DOORBELL_COUNT && c->page) {
        atomic_store(&c->rung[index], value);
        atomic_store(&c->page[index], value);
    }
}

/* Locked. cq: of a submission queue, else NULL. */
static queue *open_queue(nvme *c, uint32_t id, uint64_t base, uint32_t entries, queue *cq)
{
    queue *q = &c->queues[id * 2 + !cq];
    *q = (queue){.base = base, .entries = entries, .id = (uint16_t)id, .cq = cq, .phase = 1};
    if (cq)
        cq->users++;
    set_doorbell(c, id * 2 + !cq, 0);
    return q;
}

static void close_queue(queue *q)
{
    if (q->cq)
        q->cq->users--;
    *q = (queue){0};
}

/* Locked. Create I/O Completion Queue and Create I/O Submission Queue; `other` is its vector, and the completion queue. */
static int create_queue(lane *l, const command *cmd, bool is_cq)
{
    nvme *c = l->c;
    uint32_t id = dword(cmd, 10) & 0xffff, entries = (dword(cmd, 10) >> 16) + 1, other = dword(cmd, 11) >> 16;
    uint64_t base = get(cmd->sqe + 24, 8), size = (uint64_t)entries * (is_cq ? CQE_SIZE : SQE_SIZE);
    bool interrupts = dword(cmd, 11) & 2;
    if (!id || id > c->pairs || c->queues[id * 2 + is_cq].entries)
        return INVALID_QUEUE;
    if (entries < 2 || entries > ENTRIES_MAX || (c->reg[CC] & CC_ENTRIES) != CC_ENTRIES_GOOD)
        return INVALID_QUEUE_SIZE;
    if (!(dword(cmd, 11) & 1)) /* not contiguous */
        return INVALID_FIELD;
    if (base % PAGE)
        return INVALID_PRP;
    if (is_cq && interrupts && other > c->pairs)
        return INVALID_VECTOR;
    if (!is_cq && (!other || other > c->pairs))
        return INVALID_QUEUE;
    if (!is_cq && !c->queues[other * 2 + 1].entries)
        return NO_SUCH_CQ;
    if (vfu_iommu_probe(l->reader, base, size, is_cq ? VFU_IOMMU_WRITE : VFU_IOMMU_READ))
        return DATA_TRANSFER_ERROR;
    queue *q = open_queue(c, id, base, entries, is_cq ? NULL : &c->queues[other * 2 + 1]);
    q->interrupts = is_cq && interrupts;
    q->vector = (uint16_t)other;
    return SUCCESS;
}

/* Locked. A submission queue's commands end first. */
static int delete_queue(nvme *c, command *cmd, bool is_cq)
{
    uint32_t id = dword(cmd, 10) & 0xffff;
    queue *q = id && id <= c->pairs ? &c->queues[id * 2 + is_cq] : NULL;
    if (!q || !q->entries || q->deleter)
        return INVALID_QUEUE;
    if (is_cq && q->users)
        return INVALID_DELETION;
    if (!q->users) {
        close_queue(q);
        return SUCCESS;
    }
    q->deleter = cmd;
    less_busy(c);
    return NOT_OURS;
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

static int identify(lane *l, const command *cmd)
{
    uint8_t *d = l->buffer;
    uint32_t nsid = dword(cmd, 1), what = dword(cmd, 10) & 0xff;
    memset(d, 0, PAGE);
    if (what > 3)
        return INVALID_FIELD;
    if (what == 2 ? nsid >= 0xfffffffe : what != 1 && nsid != 1)
        return INVALID_NAMESPACE;
    switch (what) {
    case 0: identify_namespace(l->c, cmd, d); break;
    case 1: identify_controller(l->c, d); break;
    case 2: put(d, 4, nsid < 1); break; /* active namespaces above nsid */
    case 3:                             /* descriptors of the namespace: NGUID, EUI64 */
        put(d, 2, 0x1002);
        put(d + 4, 8, l->c->id);
        put(d + 12, 8, ~l->c->id);
        put(d + 20, 2, 0x0801);
        put(d + 24, 8, l->c->id);
        break;
    }
    return give_data(l, cmd, PAGE);
}

static int get_log(lane *l, const command *cmd)
{
    nvme *c = l->c;
    uint8_t *d = l->buffer;
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
    int status = give_data(l, cmd, (uint32_t)len);
    if (status || dword(cmd, 10) & 1 << 15) /* retain the event */
        return status;
    lock(c);
    c->told[page] = false;
    if (page == LOG_CHANGED_NAMESPACES)
        c->namespace_changed = false;
    unlock(c);
    return SUCCESS;
}

/* ---- admin: features ------------------------------------------------------------------------------------------------------- */

/* Locked. Set Features, and Get Features, which changes nothing. Values that need no more are kept as they come. */
static int do_feature(nvme *c, const command *cmd, bool set, uint32_t *result)
{
    uint32_t id = dword(cmd, 10) & 0xff, value = dword(cmd, 11), low = value & 0xffff, slot = id;
    if (id < ARBITRATION || id >= FEATURES || id == LBA_TYPES || (!set && dword(cmd, 10) >> 8 & 7)) /* only current values */
        return INVALID_FIELD;
    if (set && dword(cmd, 10) >> 31)
        return NOT_SAVEABLE;
    switch (id) {
    case POWER:
        if (set && value & 0x1f) /* there is one state */
            return INVALID_FIELD;
        break;
    case TEMPERATURE:
        if (value >> 21 & 1)
            return INVALID_FIELD;
        if (value >> 16 & 0xf) /* there is no sensor but the composite one */
            return SUCCESS;
        slot = value >> 20 & 1 ? FEATURES : id;
        value = low;
        break;
    case WRITE_CACHE: value &= 1; break;
    case QUEUE_COUNT:
        if (set && (low == 0xffff || value >> 16 == 0xffff))
            return INVALID_FIELD;
        for (unsigned i = 1; set && i <= c->pairs; i++)
            if (c->queues[i * 2].entries || c->queues[i * 2 + 1].entries)
                return SEQUENCE_ERROR;
        *result = (c->pairs - 1) * 0x10001;
        return SUCCESS;
    case VECTOR:
        *result = low | 1 << 16; /* nothing is coalesced */
        return low > c->pairs ? INVALID_FIELD : SUCCESS;
    }
    if (set)
        c->features[slot] = value;
    else
        *result = c->features[slot];
    return SUCCESS;
}

/* ---- admin: events --------------------------------------------------------------------------------------------------------- */

/* Locked. A request is completed, with an event or without. */
static void end_request(nvme *c, command *request, int status, uint32_t event)
{
    c->event_request_count--;
    c->queues[1].reserved++;
    resume(c, request, status, event);
}

/* Locked. Tells what there is to tell, as far as there are requests and room in the queue. */
static void deliver_events(nvme *c)
{
    for (unsigned log = 0; log < LOGS; log++) {
        if (!c->running || !c->events[log] || !c->event_requests.first || !has_room(&c->queues[1]))
            continue;
        end_request(c, take_first(&c->event_requests), SUCCESS, c->events[log]);
        c->events[log] = 0;
        c->told[log] = true;
    }
}

/* Locked. The request waits for an event, and keeps nothing else waiting: no reset, nobody who needs room in the queue. */
static int event_request(nvme *c, command *cmd)
{
    if (c->event_request_count == EVENT_REQUESTS)
        return TOO_MANY_REQUESTS;
    append(&c->event_requests, cmd);
    c->event_request_count++;
    cmd->sq->cq->reserved--;
    deliver_events(c);
    less_busy(c);
    return NOT_OURS;
}

/* ---- admin: abort, and all of them ----------------------------------------------------------------------------------------- */

/* Locked. Takes a command that hasn't begun out of a list; NULL: it isn't there. */
static command *take_back(list *from, uint32_t sqid, uint32_t cid)
{
    for (command **link = &from->first; *link; link = &(*link)->next) {
        command *cmd = *link;
        if (cmd->step == EXECUTE && cmd->sq->id == sqid && get(cmd->sqe + 2, 2) == cid) {
            *link = cmd->next;
            if (!*link)
                from->end = link;
            return cmd;
        }
    }
    return NULL;
}

/* Locked. */
static int abort_command(nvme *c, const command *cmd, uint32_t *result)
{
    uint32_t sqid = dword(cmd, 10) & 0xffff, cid = dword(cmd, 10) >> 16;
    command *job = take_back(&c->jobs, sqid, cid);
    if (job) {
        decide(job, ABORTED, 0);
        give_to_worker(c, job);
    }
    command *request = job || !has_room(&c->queues[1]) ? NULL : take_back(&c->event_requests, sqid, cid);
    if (request)
        end_request(c, request, ABORTED, 0);
    *result = !job && !request;
    return SUCCESS;
}

static int do_admin(lane *l, command *cmd, uint32_t *result)
{
    nvme *c = l->c;
    uint8_t opcode = cmd->sqe[0];
    int status = INVALID_OPCODE;
    if (opcode == GET_LOG)
        return get_log(l, cmd);
    if (opcode == IDENTIFY)
        return identify(l, cmd);
    lock(c);
    switch (opcode) {
    case CREATE_CQ:
    case CREATE_SQ: status = create_queue(l, cmd, opcode == CREATE_CQ); break;
    case DELETE_CQ:
    case DELETE_SQ: status = delete_queue(c, cmd, opcode == DELETE_CQ); break;
    case SET_FEATURES:
    case GET_FEATURES: status = do_feature(c, cmd, opcode == SET_FEATURES, result); break;
    case ABORT: status = abort_command(c, cmd, result); break;
    case EVENT_REQUEST: status = event_request(c, cmd); break;
    }
    unlock(c);
    return status;
}

/* ---- interrupt ------------------------------------------------------------------------------------------------------------- */

/* Raises what the lane's completions are worth: one interrupt per vector. */
static void interrupt(lane *l)
{
    for (unsigned v = 0; l->posted && v <= l->c->pairs; v++) {
        if (l->raise[v])
            vfu_dev_raise(l->c->dev, VFU_PCI_IRQ_MSIX, v);
        l->raise[v] = false;
    }
    l->posted = 0;
}

/* ---- enable, reset, shutdown ----------------------------------------------------------------------------------------------- */

/* Locked. CC.EN was set. What the client asks for and can't get shows as a fatal status (NVMe 7.6.1). */
static void start(nvme *c)
{
    vfu_iommu_reader *reader = c->lanes[SOCKET].reader;
    uint32_t sq_entries = (c->reg[AQA] & 0xfff) + 1, cq_entries = (c->reg[AQA] >> 16 & 0xfff) + 1;
    uint64_t asq = c->reg[ASQ] | (uint64_t)c->reg[ASQ + 1] << 32, acq = c->reg[ACQ] | (uint64_t)c->reg[ACQ + 1] << 32;
    c->running = !(c->reg[CC] & CC_FORMAT) && sq_entries > 1 && cq_entries > 1 && !(asq % PAGE) && !(acq % PAGE) &&
                 vfu_iommu_probe(reader, asq, (uint64_t)sq_entries * SQE_SIZE, VFU_IOMMU_READ) == 0 &&
                 vfu_iommu_probe(reader, acq, (uint64_t)cq_entries * CQE_SIZE, VFU_IOMMU_WRITE) == 0;
    c->reg[CSTS] = c->running ? CSTS_RDY : CSTS_CFS;
    if (!c->running)
        return;
    open_queue(c, 0, acq, cq_entries, NULL)->interrupts = true;
    open_queue(c, 0, asq, sq_entries, &c->queues[1]);
    c->features[WRITE_CACHE] = !c->read_only;
    c->features[TEMPERATURE] = 0xffff;
    for (unsigned i = 0; i < COMMANDS; i++)
        c->commands[i].next = i + 1 < COMMANDS ? &c->commands[i + 1] : NULL;
    c->idle = c->commands;
    pthread_cond_broadcast(&c->state);
}

/* Locked. Nothing is busy: everything that a reset ends is over. */
static void close_queues(nvme *c)
{
    memset(c->queues, 0, sizeof(c->queues));
    memset(c->features, 0, sizeof(c->features));
    memset(c->events, 0, sizeof(c->events));
    memset(c->told, 0, sizeof(c->told));
    for (unsigned i = 0; i < DOORBELL_COUNT; i++)
        set_doorbell(c, i, 0);
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
    if (flush(c))
        fprintf(stderr, "nvme: the image can't be flushed\n");
    lock(c);
    if (c->reg[CSTS] & CSTS_SHUTTING && !c->flushing)
        c->reg[CSTS] = (c->reg[CSTS] & ~(uint32_t)CSTS_SHST) | CSTS_SHUT;
}

/* ---- registers, PCI -------------------------------------------------------------------------------------------------------- */

/* Locked. A word. INTMS and INTMC have no meaning with MSI-X. */
static void write_register(nvme *c, uint64_t number, uint32_t value)
{
    if (number >= DOORBELLS / 4) {
        set_doorbell(c, number - DOORBELLS / 4, value);
        doorbell(c, (uint32_t)number - DOORBELLS / 4, value);
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

/* The answer comes first, then the work: the client waits for the one, and not for the other. */
static int region_write(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    nvme *c = ctx;
    lock(c);
    for (size_t at = 0; is_register_access(region, offset, len) && at < len; at += 4)
        write_register(c, (offset + at) / 4, (uint32_t)get((const uint8_t *)buf + at, 4));
    unlock(c);
    vfu_dev_want_work(c->dev);
    return 0;
}

static bool work(void *ctx) { return serve(&((nvme *)ctx)->lanes[SOCKET]); }

static void config_written(void *ctx, unsigned changed)
{
    nvme *c = ctx;
    lock(c);
    if (changed & VFU_PCI_CHANGED_COMMAND)
        c->master = vfu_pci_command(vfu_dev_pci(c->dev)) & VFU_PCI_COMMAND_MASTER;
    unlock(c);
    vfu_dev_want_work(c->dev);
}

/* Stops, and waits for what threads still do in the guest's memory. They don't wait for us: in the callbacks that call this,
 * accesses that need a message fail at once. */
static void disconnected(void *ctx)
{
    nvme *c = ctx;
    lock(c);
    stop(c);
    while (c->busy)
        pthread_cond_wait(&c->state, &c->lock);
    c->reg[CC] = c->reg[AQA] = 0;
    memset(&c->reg[ASQ], 0, (REGISTERS - ASQ) * sizeof(c->reg[0]));
    c->master = false;
    unlock(c);
}

static void reset(void *ctx, vfu_reset_kind kind)
{
    (void)kind;
    disconnected(ctx);
}

/* ---- threads --------------------------------------------------------------------------------------------------------------- */

static void *run_worker(void *arg)
{
    lane *l = arg;
    nvme *c = l->c;
    lock(c);
    while (!c->ending) {
        c->waking = false;
        if (c->flushing) {
            end_shutdown(c);
        } else if (c->jobs.first || find_queue(c)) {
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

/* Looks at the shared page. */
static bool find_doorbells(nvme *c)
{
    bool found = false;
    for (unsigned i = 0; i < 2 * (c->pairs + 1); i++) {
        if (atomic_load_explicit(&c->page[i], memory_order_relaxed) == atomic_load_explicit(&c->rung[i], memory_order_relaxed))
            continue;
        lock(c);
        uint32_t value = atomic_load(&c->page[i]);
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
static void *run_poller(void *arg)
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
                pthread_cond_wait(&c->state, &c->lock);
            ending = c->ending;
            unlock(c);
        }
    }
    return NULL;
}

static int start_lane(nvme *c, lane *l, void *(*run)(void *))
{
    l->c = c;
    l->is_worker = run == run_worker;
    int err = vfu_iommu_reader_open(vfu_dev_iommu(c->dev), &l->reader);
    if (!err)
        err = -pthread_create(&l->thread, NULL, run, l);
    l->runs = !err;
    return err;
}

static int start_threads(nvme *c)
{
    int err = 0;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->work, NULL);
    pthread_cond_init(&c->state, NULL);
    c->lanes[SOCKET].c = c;
    c->lanes[SOCKET].reader = vfu_dev_reader(c->dev);
    for (unsigned i = 1; i <= WORKERS && !err; i++)
        err = start_lane(c, &c->lanes[i], run_worker);
    return err || !c->page ? err : start_lane(c, &c->lanes[POLLER], run_poller);
}

static void end_threads(nvme *c)
{
    vfu_dev_disconnect(c->dev); /* and so everything that they still do */
    lock(c);
    c->ending = true;
    pthread_cond_broadcast(&c->work);
    pthread_cond_broadcast(&c->state);
    unlock(c);
    for (unsigned i = 1; i < LANES; i++) {
        if (c->lanes[i].runs)
            pthread_join(c->lanes[i].thread, NULL);
        vfu_iommu_reader_close(c->lanes[i].reader);
    }
}

/* ---- the image ------------------------------------------------------------------------------------------------------------- */

/* Opens the image and locks it against other writers, and finds out how many blocks it has. size 0: as it is. Returns NULL, or
 * what is wrong with it, and errno. */
static const char *open_image(nvme *c, const char *path, uint64_t size)
{
    struct flock whole = {.l_type = c->read_only ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET};
    uint64_t odd = (UINT64_C(1) << c->block_shift) - 1, end;
    struct stat st;
    errno = EINVAL;
    if (size & odd)
        return "would get a size that is no multiple of the block size";
    c->image = open(path, (c->read_only ? O_RDONLY : O_RDWR) | (size ? O_CREAT : 0) | O_CLOEXEC, 0644);
    if (c->image < 0 || fstat(c->image, &st) < 0)
        return "can't be opened";
    errno = EINVAL;
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return "is no file and no block device";
    if (fcntl(c->image, F_OFD_SETLK, &whole) < 0)
        return "can't be locked, another program uses it";
    end = (uint64_t)lseek(c->image, 0, SEEK_END); /* of a block device st_size is 0 */
    if (size && end > size)
        return "is larger than --size, and nothing of it is cut off";
    if (size > end && ftruncate(c->image, (off_t)size) < 0)
        return "can't be made that large";
    size = size ? size : end;
    if (!size)
        return "is empty; --size=N makes it larger";
    if (size & odd)
        return "has a size that is no multiple of the block size";
    c->blocks = size >> c->block_shift;
    c->id = ((uint64_t)st.st_ino * UINT64_C(0x9e3779b97f4a7c15)) ^ (uint64_t)st.st_dev;
    return NULL;
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
            note(c, EVENT_NAMESPACE);
    }
    deliver_events(c);
    unlock(c);
}

/* ---- the program ----------------------------------------------------------------------------------------------------------- */

/* The doorbells as a page that the client can map. Returns its descriptor. */
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

static int create_device(nvme *c, bool mapped, bool verbose)
{
    vfu_wire_sparse_area area = {.offset = DOORBELLS, .size = PAGE};
    vfu_region_share share = {.fd = mapped ? make_page(c) : -1, .areas = &area, .area_count = 1};
    uint16_t vectors = (uint16_t)(c->pairs + 1);
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
        .share = {[BAR_REGISTERS] = mapped ? &share : NULL},
        .ctx = c,
        .callbacks = {.region_read = region_read,
                      .region_write = region_write,
                      .config_written = config_written,
                      .reset = reset,
                      .disconnected = disconnected,
                      .work = work},
        .busy_us = 50,           /* at depth 1 a command is two doorbells, about as far apart: one wake-up */
        .dma_timeout_ms = 10000, /* no command waits longer for an answer */
        .logger = {.level = verbose ? VFU_LEVEL_TRACE : VFU_LEVEL_WARNING},
    };
    c->reg[CAP] = CAP_LOW;
    c->reg[CAP + 1] = CAP_HIGH;
    c->reg[VS] = VERSION;
    return mapped && share.fd < 0 ? share.fd : vfu_dev_create(&c->dev, &desc);
}

/* Until a signal ends it, or the only client has gone. */
static int serve_image(nvme *c, const program *p, bool mapped)
{
    int err = create_device(c, mapped, p->verbose);
    if (err)
        return err;
    err = start_threads(c);
    if (!err)
        err = program_open(p, c->dev, SIGHUP);
    if (!err && p->sandbox)
        err = sandbox_enter();
    while (!err && !program_ends) {
        if (atomic_exchange(&program_asked, false))
            measure_image(c);
        err = vfu_dev_run(c->dev);
    }
    end_threads(c);
    vfu_dev_destroy(c->dev);
    return err;
}

int main(int argc, char **argv)
{
    const char *image = NULL;
    uint64_t size = 0, pairs = 8;
    bool read_only = false, large = false, mapped = false;
    const program_option own[] = {
        {"image", "FILE", "what is on the disk; SIGHUP: look whether it has become larger", .text = &image},
        {"size", "N", "make it, or make it larger; K, M, G and T are understood", .number = &size, .min = 1, .max = INT64_MAX},
        {"block-size", "512|4096", "of the namespace; 512", .flag = &large},
        {"read-only", NULL, "never write to it; others may read it too", .flag = &read_only},
        {"queues", "N", "pairs of I/O queues, 1 to 64; 8", .number = &pairs, .min = 1, .max = QUEUES_MAX},
        {"doorbells", "trapped|mapped", "wait for them, or look at a page that the client maps; trapped", .flag = &mapped},
        {0},
    };
    program p = {.usage = "--image=FILE [OPTION]..."};
    if (!program_options(&p, own, argc, argv) || !image || (read_only && size))
        return program_usage(&p);
    nvme *c = calloc(1, sizeof(*c)); /* large, and most of it is never touched */
    if (!c)
        return program_end(&p, -ENOMEM);
    c->pairs = (unsigned)pairs;
    c->block_shift = large ? 12 : 9;
    c->read_only = read_only;
    c->image = -1;
    const char *why = open_image(c, image, size);
    if (why)
        fprintf(stderr, "%s: %s %s: %s\n", p.name, image, why, strerror(errno));
    int status = why ? 1 : program_end(&p, serve_image(c, &p, mapped));
    if (c->image >= 0)
        close(c->image);
    free(c);
    return status;
}
