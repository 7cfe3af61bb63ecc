/* SPDX-License-Identifier: MIT */
/*
 * The example disk as a process, and a driver for it: queues in memory that is shared with it or that only messages reach, commands,
 * completions, interrupts. What a driver may do wrong gets the status code that the NVM Express base specification 1.4 wants.
 */
#include "caller.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>

enum { RING = 16, MEMORY = 16 << 20, DATA = 1 << 20, QUEUES = 4, MIB = 1 << 20 };
#define IOVA UINT64_C(0x100000000)

/* Where the driver's memory has what. Each queue has 64 KiB for its submissions and 16 KiB for its completions. */
enum { SQS = 0x0, CQS = 0x80000, LISTS = 0xc0000 };

/* Status codes, with their type in bits 8 to 10 */
enum {
    INVALID_OPCODE = 0x01,
    INVALID_FIELD = 0x02,
    DATA_TRANSFER_ERROR = 0x04,
    ABORTED = 0x07,
    INVALID_NAMESPACE = 0x0b,
    SEQUENCE_ERROR = 0x0c,
    INVALID_PRP = 0x13,
    WRITE_PROTECTED = 0x20,
    LBA_OUT_OF_RANGE = 0x80,
    CAPACITY_EXCEEDED = 0x81,
    NO_SUCH_CQ = 0x100,
    INVALID_QUEUE = 0x101,
    INVALID_QUEUE_SIZE = 0x102,
    TOO_MANY_EVENT_REQUESTS = 0x105,
    INVALID_VECTOR = 0x108,
    INVALID_LOG_PAGE = 0x109,
    INVALID_DELETION = 0x10c,
    NOT_SAVEABLE = 0x10d,
    WRITE_FAULT = 0x280,
    READ_ERROR = 0x281,
};

enum { CAP = 0x00, VS = 0x08, CC = 0x14, CSTS = 0x1c, AQA = 0x24, ASQ = 0x28, ACQ = 0x30, DOORBELLS = 0x1000 };
enum { ENABLE = 0x460001, RDY = 1, CFS = 2, SHST = 0xc };
enum {
    DELETE_SQ,
    CREATE_SQ,
    GET_LOG,
    DELETE_CQ = 4,
    CREATE_CQ,
    IDENTIFY,
    ABORT = 8,
    SET_FEATURES,
    GET_FEATURES,
    EVENT_REQUEST = 12
};
enum { FLUSH, WRITE, READ, WRITE_ZEROES = 8, DATASET_MANAGEMENT };

typedef struct ring {
    uint64_t sq, cq; /* IOVAs */
    uint32_t sq_entries, cq_entries, tail, head, phase;
} ring;

typedef struct sqe {
    uint8_t opcode, flags;
    uint16_t cid;
    uint32_t nsid, dw2, dw3;
    uint64_t metadata, prp1, prp2;
    uint32_t dw10, dw11, dw12, dw13, dw14, dw15;
} sqe;

typedef struct cqe {
    uint32_t result, reserved;
    uint16_t sq_head, sq_id, cid, status; /* with the phase in bit 0 */
} cqe;

typedef struct host {
    child disk;
    struct sockaddr_un address;
    socklen_t address_len;
    vfu_client *client;
    char image[64], image_option[80];
    const char *options[14];
    uint8_t *memory;
    int memory_fd; /* -1: only messages reach it */
    bool mixed;    /* only messages reach the completions, and data from 2 MiB on */
    ring rings[QUEUES + 1];
    int events[QUEUES + 1];
    uint16_t cid;
    _Atomic uint32_t *page; /* doorbells, where they are mapped; NULL: they are written by message */
} host;

/* ---- the driver ------------------------------------------------------------------------------------------------------------ */

static uint32_t get32(host *h, uint64_t offset)
{
    uint32_t value;
    ck_assert_int_eq(vfu_client_region_read(h->client, VFU_PCI_REGION_BAR0, offset, &value, 4), 0);
    return value;
}

static uint64_t get64(host *h, uint64_t offset)
{
    uint64_t value;
    ck_assert_int_eq(vfu_client_region_read(h->client, VFU_PCI_REGION_BAR0, offset, &value, 8), 0);
    return value;
}

static void set32(host *h, uint64_t offset, uint32_t value)
{
    ck_assert_int_eq(vfu_client_region_write(h->client, VFU_PCI_REGION_BAR0, offset, &value, 4), 0);
}

static void set64(host *h, uint64_t offset, uint64_t value)
{
    set32(h, offset, (uint32_t)value);
    set32(h, offset + 4, (uint32_t)(value >> 32));
}

static void *at(host *h, uint64_t iova) { return h->memory + (iova - IOVA); }

static uint64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void wait_for(host *h, uint32_t mask, uint32_t value)
{
    for (unsigned ms = 0; (get32(h, CSTS) & mask) != value; ms++) {
        ck_assert_uint_lt(ms, PATIENCE_MS);
        vfu_client_serve(h->client, -1, 1);
    }
}

static void set_master(host *h, bool on)
{
    uint16_t command = on ? 6 : 2;
    ck_assert_int_eq(vfu_client_region_write(h->client, VFU_PCI_REGION_CONFIG, 4, &command, 2), 0);
}

static void init_ring(host *h, unsigned id, uint32_t sq_entries, uint32_t cq_entries)
{
    h->rings[id] = (ring){.sq = IOVA + SQS + id * 0x10000,
                          .cq = IOVA + CQS + id * 0x4000,
                          .sq_entries = sq_entries,
                          .cq_entries = cq_entries,
                          .phase = 1};
    memset(at(h, h->rings[id].cq), 0, cq_entries * sizeof(cqe));
}

static void enable(host *h)
{
    ring *r = &h->rings[0];
    init_ring(h, 0, RING, RING);
    set32(h, CC, 0);
    wait_for(h, RDY, 0);
    set32(h, AQA, (r->cq_entries - 1) << 16 | (r->sq_entries - 1));
    set64(h, ASQ, r->sq);
    set64(h, ACQ, r->cq);
    set32(h, CC, ENABLE);
    wait_for(h, RDY | CFS, RDY);
}

static void doorbell(host *h, unsigned index, uint32_t value)
{
    if (h->page)
        atomic_store(&h->page[index], value);
    else
        set32(h, DOORBELLS + index * 4, value);
}

static void ring_sq(host *h, unsigned id) { doorbell(h, id * 2, h->rings[id].tail); }
static void ring_cq(host *h, unsigned id) { doorbell(h, id * 2 + 1, h->rings[id].head); }

/* Puts a command into its queue, and returns its identifier. */
static uint16_t enqueue(host *h, unsigned id, sqe entry)
{
    ring *r = &h->rings[id];
    entry.cid = ++h->cid;
    memcpy(at(h, r->sq + r->tail * sizeof(entry)), &entry, sizeof(entry));
    r->tail = (r->tail + 1) % r->sq_entries;
    return entry.cid;
}

static uint16_t submit(host *h, unsigned id, sqe entry)
{
    uint16_t cid = enqueue(h, id, entry);
    ring_sq(h, id);
    return cid;
}

/* Looks for the next completion. */
static bool peek(host *h, unsigned id, cqe *out)
{
    ring *r = &h->rings[id];
    cqe *entry = at(h, r->cq + r->head * sizeof(*entry));
    if ((__atomic_load_n(&entry->status, __ATOMIC_ACQUIRE) & 1) != r->phase)
        return false;
    *out = *entry;
    r->head = (r->head + 1) % r->cq_entries;
    r->phase ^= r->head == 0;
    return true;
}

static cqe reap(host *h, unsigned id)
{
    cqe entry;
    for (unsigned ms = 0; !peek(h, id, &entry); ms++) {
        ck_assert_uint_lt(ms, PATIENCE_MS);
        must(vfu_client_serve(h->client, h->events[id], 1));
        signals(h->events[id]);
    }
    ring_cq(h, id);
    ck_assert_uint_eq(entry.sq_id, id);
    return entry;
}

/* The status code and its type. */
static unsigned status_of(cqe entry) { return entry.status >> 1 & 0x7ff; }

static unsigned run(host *h, unsigned id, sqe entry)
{
    uint16_t cid = submit(h, id, entry);
    cqe completion = reap(h, id);
    ck_assert_uint_eq(completion.cid, cid);
    return status_of(completion);
}

static unsigned create_cq(host *h, unsigned id, uint32_t entries, unsigned vector)
{
    return run(h, 0,
               (sqe){.opcode = CREATE_CQ, .prp1 = h->rings[id].cq, .dw10 = (entries - 1) << 16 | id, .dw11 = vector << 16 | 3});
}

static unsigned create_sq(host *h, unsigned id, uint32_t entries, unsigned cq)
{
    return run(h, 0, (sqe){.opcode = CREATE_SQ, .prp1 = h->rings[id].sq, .dw10 = (entries - 1) << 16 | id, .dw11 = cq << 16 | 1});
}

static void create_pair(host *h, unsigned id, uint32_t entries)
{
    init_ring(h, id, entries, entries);
    ck_assert_uint_eq(create_cq(h, id, entries, id), 0);
    ck_assert_uint_eq(create_sq(h, id, entries, id), 0);
}

/* A read or write of whole blocks that are one piece in memory, with a list at `list` if that needs one. */
static sqe transfer(host *h, uint8_t opcode, uint64_t lba, uint32_t blocks, uint64_t iova, uint32_t len, uint64_t list)
{
    sqe entry = {
        .opcode = opcode, .nsid = 1, .prp1 = iova, .dw10 = (uint32_t)lba, .dw11 = (uint32_t)(lba >> 32), .dw12 = blocks - 1};
    uint32_t first = PAGE - iova % PAGE, pages = len > first ? (len - first + PAGE - 1) / PAGE : 0;
    uint64_t next = iova + first;
    if (pages == 1)
        entry.prp2 = next;
    if (pages < 2)
        return entry;
    entry.prp2 = list;
    for (; pages; pages--, next += PAGE, list += 8) {
        if (list % PAGE == PAGE - 8 && pages > 1) { /* the last slot chains */
            uint64_t chained = IOVA + LISTS + 0x10000;
            memcpy(at(h, list), &chained, 8);
            list = chained;
        }
        memcpy(at(h, list), &next, 8);
    }
    return entry;
}

/* ---- life cycle ------------------------------------------------------------------------------------------------------------ */

static void start_disk(host *h) { start_example(&h->disk, "nvme", h->options, &h->address, &h->address_len); }

static void connect_disk(host *h)
{
    ck_assert_int_eq(vfu_client_attach(&h->client, connect_to(&h->address, h->address_len), NULL), 0);
    const uint64_t ends[] = {CQS, LISTS, DATA + 2 * MIB, MEMORY / 2, MEMORY};
    for (uint64_t i = 0, from = 0; i < COUNT(ends); from = ends[i++]) {
        int fd = h->mixed && i % 2 ? -1 : h->memory_fd;
        ck_assert_int_eq(vfu_client_dma_map(h->client, IOVA + from, ends[i] - from, 3, h->memory + from, fd, from), 0);
    }
    ck_assert_int_eq(vfu_client_irq_assign(h->client, VFU_PCI_IRQ_MSIX, 0, QUEUES + 1, h->events), 0);
    set_master(h, true);
}

/* Kinds of memory: pinned and used in place, never pinned since it could shrink, reached by messages alone, some of each. */
typedef enum kind { PINNED, GUARDED, BY_MESSAGE, MIXED, KINDS } kind;

static const char *image_directory = "/tmp";

static void setup_with(host *h, kind memory, const char *option, const char *another)
{
    unsigned count = 0;
    *h = (host){.memory_fd = -1, .mixed = memory == MIXED};
    snprintf(h->image, sizeof(h->image), "%s/vfu-nvme-%d.img", image_directory, (int)getpid());
    unlink(h->image);
    snprintf(h->image_option, sizeof(h->image_option), "--image=%s", h->image);
    h->options[count++] = h->image_option;
    h->options[count++] = "--size=64M";
    h->options[count++] = "--queues=4";
    h->options[count++] = option;
    if (option)
        h->options[count] = another;
    int fd = memfd("memory", MEMORY, memory == GUARDED ? 0 : F_SEAL_SHRINK | F_SEAL_GROW);
    h->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert(h->memory != MAP_FAILED);
    if (memory == BY_MESSAGE)
        close(fd);
    else
        h->memory_fd = fd;
    for (unsigned i = 0; i <= QUEUES; i++)
        h->events[i] = event();
    start_disk(h);
    connect_disk(h);
}

/* Ready for commands, with one pair of I/O queues. */
static void setup(host *h)
{
    setup_with(h, PINNED, NULL, NULL);
    enable(h);
    create_pair(h, 1, RING);
}

static void disconnect_disk(host *h)
{
    vfu_client_destroy(h->client);
    h->client = NULL;
    if (h->page)
        munmap((void *)(uintptr_t)h->page, PAGE);
    h->page = NULL;
}

/* The program may have ended already; its pid is 0 then. */
static void teardown(host *h)
{
    disconnect_disk(h);
    if (h->disk.pid)
        stop_engine(&h->disk);
    close_fds(h->events, QUEUES + 1);
    munmap(h->memory, MEMORY);
    if (h->memory_fd >= 0)
        close(h->memory_fd);
    unlink(h->image);
}

static void map_doorbells(host *h)
{
    vfu_client_region region;
    ck_assert_int_eq(vfu_client_region_info(h->client, VFU_PCI_REGION_BAR0, &region), 0);
    ck_assert_uint_eq(region.area_count, 1);
    ck_assert_uint_eq(region.areas[0].offset, DOORBELLS);
    ck_assert_uint_eq(region.areas[0].size, PAGE);
    void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, region.fd, (off_t)(region.offset + DOORBELLS));
    ck_assert(page != MAP_FAILED);
    h->page = page;
    close(region.fd);
}

/* The function is alive, and what it says is so: after whatever happened to it, it can be enabled and used. */
static void check_usable(host *h)
{
    uint8_t *out = at(h, IOVA + DATA), *in = at(h, IOVA + DATA + MIB);
    enable(h);
    create_pair(h, 1, RING);
    memset(out, 0x5a, PAGE);
    memset(in, 0, PAGE);
    ck_assert_uint_eq(run(h, 1, transfer(h, WRITE, 8, 8, IOVA + DATA, PAGE, 0)), 0);
    ck_assert_uint_eq(run(h, 1, transfer(h, READ, 8, 8, IOVA + DATA + MIB, PAGE, 0)), 0);
    ck_assert_mem_eq(in, out, PAGE);
}

/* ---- registers and enabling ------------------------------------------------------------------------------------------------ */

START_TEST(registers)
{
    host h;
    setup_with(&h, PINNED, NULL, NULL);
    uint64_t cap = get64(&h, CAP);
    ck_assert_uint_eq(cap & 0xffff, 1023);   /* MQES */
    ck_assert_uint_eq(cap >> 16 & 1, 1);     /* CQR */
    ck_assert_uint_ge(cap >> 24 & 0xff, 20); /* TO */
    ck_assert_uint_eq(cap >> 32 & 0xf, 0);   /* DSTRD */
    ck_assert_uint_eq(cap >> 36 & 1, 0);     /* NSSRS */
    ck_assert_uint_eq(cap >> 37 & 0xff, 1);  /* CSS: NVM */
    ck_assert_uint_eq(cap >> 45, 0);         /* page sizes: 4 KiB */
    ck_assert_uint_eq(get32(&h, VS), 0x10400);
    ck_assert_uint_eq(get32(&h, CSTS), 0);
    ck_assert_uint_eq(get32(&h, 0x38), 0); /* CMBLOC, CMBSZ */
    ck_assert_uint_eq(get32(&h, 0x3c), 0);
    set64(&h, ASQ, UINT64_C(0x123456789000));
    ck_assert_uint_eq(get64(&h, ASQ), UINT64_C(0x123456789000));
    uint64_t at_once = UINT64_C(0xabcdef012000);
    ck_assert_int_eq(vfu_client_region_write(h.client, VFU_PCI_REGION_BAR0, ACQ, &at_once, 8), 0);
    ck_assert_uint_eq(get64(&h, ACQ), at_once);
    ck_assert_uint_eq(get64(&h, ASQ), UINT64_C(0x123456789000));
    set32(&h, CAP, 0xffffffff); /* read-only */
    set32(&h, CSTS, 0xffffffff);
    set32(&h, 0x0c, 1); /* INTMS, INTMC */
    set32(&h, 0x10, 1);
    ck_assert_uint_eq(get64(&h, CAP), cap);
    ck_assert_uint_eq(get32(&h, CSTS), 0);
    for (uint32_t offset = 0; offset < 0x4000; offset += 0x7fc) { /* odd accesses have no effect, and do no harm */
        uint8_t bytes[16] = {0};
        uint32_t len = offset % 16 + 1;
        vfu_client_region_write(h.client, VFU_PCI_REGION_BAR0, offset, bytes, len);
        vfu_client_region_read(h.client, VFU_PCI_REGION_BAR0, offset, bytes, len);
    }
    check_usable(&h);
    set64(&h, ASQ, 0); /* belongs to a controller that is enabled */
    ck_assert_uint_eq(get64(&h, ASQ), h.rings[0].sq);
    teardown(&h);
}
END_TEST

/* What a controller can't be enabled with: it says that it failed, and works after a reset. */
START_TEST(enable_with_nonsense)
{
    static const struct {
        const char *name;
        uint32_t aqa, cc;
        uint64_t asq, acq;
    } cases[] = {
        {"submission queue of one entry", 0x000f0000, ENABLE, IOVA, IOVA + CQS},
        {"completion queue of one entry", 0x0000000f, ENABLE, IOVA, IOVA + CQS},
        {"submission queue off its page", 0x000f000f, ENABLE, IOVA + 64, IOVA + CQS},
        {"completion queue off its page", 0x000f000f, ENABLE, IOVA, IOVA + CQS + 16},
        {"submission queue not mapped", 0x000f000f, ENABLE, 0, IOVA + CQS},
        {"submission queue half mapped", 0x00ff00ff, ENABLE, IOVA + MEMORY - PAGE, IOVA + CQS},
        {"completion queue not mapped", 0x000f000f, ENABLE, IOVA, UINT64_MAX - PAGE + 1},
        {"completion queue read-only", 0x000f000f, ENABLE, IOVA, IOVA + MEMORY},
        {"pages of 8 KiB", 0x000f000f, ENABLE | 0x80, IOVA, IOVA + CQS},
        {"another command set", 0x000f000f, ENABLE | 0x10, IOVA, IOVA + CQS},
        {"weighted arbitration", 0x000f000f, ENABLE | 0x800, IOVA, IOVA + CQS},
    };
    host h;
    setup_with(&h, PINNED, NULL, NULL);
    ck_assert_int_eq(vfu_client_dma_map(h.client, IOVA + MEMORY, PAGE, VFU_IOMMU_READ, h.memory, h.memory_fd, 0), 0);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        set32(&h, AQA, cases[i].aqa);
        set64(&h, ASQ, cases[i].asq);
        set64(&h, ACQ, cases[i].acq);
        set32(&h, CC, cases[i].cc);
        ck_assert_msg((get32(&h, CSTS) & (RDY | CFS)) == CFS, "%s: CSTS is 0x%x", cases[i].name, get32(&h, CSTS));
        doorbell(&h, 0, 1);
        set32(&h, CC, 0);
        ck_assert_uint_eq(get32(&h, CSTS), 0);
        check_usable(&h);
        set32(&h, CC, 0);
        wait_for(&h, RDY, 0);
    }
    teardown(&h);
}
END_TEST

START_TEST(queue_memory_taken_away)
{
    host h;
    for (unsigned i = 0; i < 2; i++) { /* of submissions, of completions */
        setup(&h);
        uint64_t iova = i ? h.rings[1].cq : h.rings[1].sq, offset = iova - IOVA;
        must(vfu_client_dma_unmap(h.client, IOVA, MEMORY));
        ck_assert_int_eq(vfu_client_dma_map(h.client, IOVA, offset, 3, h.memory, h.memory_fd, 0), 0);
        ck_assert_int_eq(vfu_client_dma_map(h.client, iova + PAGE, MEMORY - offset - PAGE, 3, h.memory + offset + PAGE,
                                            h.memory_fd, offset + PAGE),
                         0);
        submit(&h, 1, (sqe){.opcode = FLUSH, .nsid = 1});
        wait_for(&h, CFS, CFS);
        ck_assert_int_eq(vfu_client_dma_map(h.client, iova, PAGE, 3, h.memory + offset, h.memory_fd, offset), 0);
        check_usable(&h);
        teardown(&h);
    }
}
END_TEST

START_TEST(shutdown_notification)
{
    host h;
    setup_with(&h, PINNED, _i ? "--doorbells=mapped" : NULL, NULL);
    check_usable(&h);
    for (uint32_t how = 1; how <= 2; how++) { /* normal, abrupt */
        ck_assert_uint_eq(get32(&h, CSTS) & SHST, 0);
        set32(&h, CC, ENABLE | how << 14);
        wait_for(&h, SHST, 8);
        check_usable(&h); /* after a reset */
    }
    set32(&h, CC, 0);
    wait_for(&h, RDY, 0);
    set32(&h, CC, 1 << 14); /* of a controller that is off */
    wait_for(&h, SHST, 8);
    teardown(&h);
}
END_TEST

/* ---- identify, features, logs ---------------------------------------------------------------------------------------------- */

static unsigned identify(host *h, uint32_t cns, uint32_t nsid, uint8_t *out)
{
    memset(at(h, IOVA + DATA), 0xaa, PAGE);
    unsigned status = run(h, 0, (sqe){.opcode = IDENTIFY, .nsid = nsid, .prp1 = IOVA + DATA, .dw10 = cns});
    if (out)
        memcpy(out, at(h, IOVA + DATA), PAGE);
    return status;
}

static uint64_t field(const uint8_t *bytes, unsigned offset, unsigned width)
{
    uint64_t value = 0;
    memcpy(&value, bytes + offset, width);
    return value;
}

START_TEST(identify_data)
{
    host h;
    uint8_t d[PAGE], zeros[PAGE] = {0}, nguid[16];
    setup_with(&h, PINNED, _i ? "--block-size=4096" : NULL, NULL);
    enable(&h);
    ck_assert_uint_eq(identify(&h, 1, 0, d), 0);
    for (unsigned i = 4; i < 72; i++)
        ck_assert(d[i] >= ' ' && d[i] < 0x7f);
    ck_assert_uint_eq(d[77], 8);               /* MDTS */
    ck_assert_uint_eq(field(d, 88, 4), 0);     /* RTD3E */
    ck_assert_uint_eq(field(d, 92, 4), 0x100); /* OAES */
    ck_assert_uint_eq(d[111], 1);              /* CNTRLTYPE */
    ck_assert_uint_eq(field(d, 128, 6), 0);    /* CRDT */
    ck_assert_uint_eq(field(d, 256, 2), 0);    /* OACS */
    ck_assert_uint_eq(d[261], 0);              /* LPA */
    ck_assert_uint_eq(d[265], 0);              /* APSTA */
    ck_assert_uint_eq(field(d, 272, 4), 0);    /* HMPRE */
    ck_assert_uint_eq(d[512], 0x66);
    ck_assert_uint_eq(d[513], 0x44);
    ck_assert_uint_eq(field(d, 516, 4), 1);    /* NN */
    ck_assert_uint_eq(field(d, 520, 2), 0x0c); /* ONCS */
    ck_assert_uint_eq(d[525], 1);              /* VWC */
    ck_assert_uint_eq(field(d, 536, 4), 0);    /* SGLS */
    ck_assert_int_eq(strncmp((char *)d + 768, "nqn.", 4), 0);
    ck_assert_ptr_nonnull(memchr(d + 768, 0, 256));
    ck_assert_uint_eq(identify(&h, 0, 1, d), 0);
    ck_assert_uint_eq(field(d, 0, 8), (64 * MIB) >> (_i ? 12 : 9));
    ck_assert_uint_eq(field(d, 0, 8), field(d, 8, 8));
    ck_assert_uint_eq(field(d, 0, 8), field(d, 16, 8));
    ck_assert_uint_eq(d[25], 0); /* NLBAF: one */
    ck_assert_uint_eq(d[26], 0); /* FLBAS */
    ck_assert_uint_eq(field(d, 128, 4), (uint64_t)(_i ? 12 : 9) << 16);
    memcpy(nguid, d + 104, 16);
    ck_assert_mem_ne(nguid, zeros, 16);
    ck_assert_uint_eq(identify(&h, 2, 0, d), 0);
    ck_assert_uint_eq(field(d, 0, 8), 1);
    ck_assert_uint_eq(identify(&h, 2, 1, d), 0);
    ck_assert_mem_eq(d, zeros, PAGE);
    ck_assert_uint_eq(identify(&h, 3, 1, d), 0);
    ck_assert_uint_eq(field(d, 0, 4), 0x1002); /* type NGUID, 16 bytes */
    ck_assert_mem_eq(d + 4, nguid, 16);
    ck_assert_uint_eq(field(d, 20, 4), 0x0801); /* EUI64 */
    ck_assert_mem_eq(d + 32, zeros, PAGE - 32);
    ck_assert_uint_eq(identify(&h, 0, 0, NULL), INVALID_NAMESPACE);
    ck_assert_uint_eq(identify(&h, 0, 2, NULL), INVALID_NAMESPACE);
    ck_assert_uint_eq(identify(&h, 0, UINT32_MAX, NULL), INVALID_NAMESPACE);
    ck_assert_uint_eq(identify(&h, 2, UINT32_MAX, NULL), INVALID_NAMESPACE);
    ck_assert_uint_eq(identify(&h, 3, 7, NULL), INVALID_NAMESPACE);
    ck_assert_uint_eq(identify(&h, 6, 0, NULL), INVALID_FIELD);
    teardown(&h);
}
END_TEST

static unsigned feature(host *h, uint8_t opcode, uint32_t dw10, uint32_t dw11, uint32_t *result)
{
    submit(h, 0, (sqe){.opcode = opcode, .dw10 = dw10, .dw11 = dw11});
    cqe entry = reap(h, 0);
    if (result)
        *result = entry.result;
    return status_of(entry);
}

START_TEST(features)
{
    static const struct {
        uint32_t set, value, status, get, result; /* dword 10 and 11 of Set, its status; dword 11 of Get, and what that gives */
    } cases[] = {
        {0x01, 0x01020307, 0, 0, 0x01020307},
        {0x02, 0, 0, 0, 0},
        {0x02, 1, INVALID_FIELD, 0, 0}, /* there is no such power state */
        {0x04, 0x0150, 0, 0, 0x0150},
        {0x04, 0x100110, 0, 0x100000, 0x0110},
        {0x04, 0x010123, 0, 0, 0x0150}, /* another sensor */
        {0x04, 0x200000, INVALID_FIELD, 0, 0x0150},
        {0x05, 0x10, 0, 0, 0x10},
        {0x06, 0, 0, 0, 0},
        {0x06, 1, 0, 0, 1},
        {0x07, 0x00000000, 0, 0, 0x00030003},
        {0x07, 0x003f003f, 0, 0, 0x00030003},
        {0x07, 0x0000ffff, INVALID_FIELD, 0, 0x00030003},
        {0x07, 0xffff0000, INVALID_FIELD, 0, 0x00030003},
        {0x08, 0x0203, 0, 0, 0x0203},
        {0x09, 0x10003, 0, 3, 0x10003},
        {0x09, 5, INVALID_FIELD, 4, 0x10004},
        {0x0a, 1, 0, 0, 1},
        {0x0b, 0x100, 0, 0, 0x100},
        {0x8000000b, 0, NOT_SAVEABLE, 0, 0x100},
    };
    host h;
    uint32_t result;
    setup_with(&h, PINNED, NULL, NULL);
    enable(&h);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        unsigned status = feature(&h, SET_FEATURES, cases[i].set, cases[i].value, &result);
        ck_assert_msg(status == cases[i].status, "case %u: Set Features gives 0x%x", i, status);
        if (cases[i].set == 7 && !status)
            ck_assert_uint_eq(result, 0x00030003);
        status = feature(&h, GET_FEATURES, cases[i].set & 0xff, cases[i].get, &result);
        ck_assert_msg(status == 0 && result == cases[i].result, "case %u: Get Features gives 0x%x, status 0x%x", i, result,
                      status);
    }
    static const uint32_t unknown[] = {0x00, 0x03, 0x0c, 0x0d, 0x0e, 0x10, 0x16, 0x80, 0xff};
    for (unsigned i = 0; i < COUNT(unknown); i++) {
        ck_assert_uint_eq(feature(&h, SET_FEATURES, unknown[i], 0, NULL), INVALID_FIELD);
        ck_assert_uint_eq(feature(&h, GET_FEATURES, unknown[i], 0, NULL), INVALID_FIELD);
    }
    ck_assert_uint_eq(feature(&h, GET_FEATURES, 0x306, 0, NULL), INVALID_FIELD); /* what can be set? */
    ck_assert_uint_eq(feature(&h, GET_FEATURES, 0x09, 5, NULL), INVALID_FIELD);  /* no such vector */
    create_pair(&h, 1, RING);
    ck_assert_uint_eq(feature(&h, SET_FEATURES, 0x07, 0, NULL), SEQUENCE_ERROR);
    teardown(&h);
}
END_TEST

static unsigned get_log(host *h, uint8_t page, uint32_t len, uint32_t nsid, uint32_t offset)
{
    sqe entry = transfer(h, GET_LOG, 0, 1, IOVA + DATA, len, IOVA + LISTS);
    entry.nsid = nsid;
    entry.dw10 = (len / 4 - 1) << 16 | page;
    entry.dw11 = (len / 4 - 1) >> 16;
    entry.dw12 = offset;
    return run(h, 0, entry);
}

START_TEST(logs)
{
    host h;
    setup(&h);
    uint8_t *d = at(&h, IOVA + DATA);
    ck_assert_uint_eq(run(&h, 1, transfer(&h, WRITE, 0, 2000, IOVA + DATA, 2000 * 512, IOVA + LISTS)), 0);
    ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 0, 8, IOVA + DATA, PAGE, 0)), 0);
    ck_assert_uint_eq(get_log(&h, 2, 512, UINT32_MAX, 0), 0);
    ck_assert_uint_eq(field(d, 32, 8), 1); /* thousands of 512 bytes, rounded up: read */
    ck_assert_uint_eq(field(d, 48, 8), 2); /* and written */
    ck_assert_uint_eq(field(d, 64, 8), 1); /* commands */
    ck_assert_uint_eq(field(d, 80, 8), 1);
    ck_assert_uint_eq(d[0], 0); /* no warning */
    ck_assert_uint_eq(d[3], 100);
    ck_assert_uint_eq(get_log(&h, 3, 512, 0, 0), 0);
    ck_assert_uint_eq(d[0], 1);
    memset(d, 0xaa, 64 << 10);
    ck_assert_uint_eq(get_log(&h, 1, 64 << 10, 0, 0), 0); /* longer than it is: zeros follow */
    for (unsigned i = 0; i < 64 << 10; i++)
        ck_assert_uint_eq(d[i], 0);
    memset(d, 0xaa, 64);
    ck_assert_uint_eq(get_log(&h, 2, 4, 0, 0), 0);
    ck_assert_uint_eq(d[4], 0xaa);
    ck_assert_uint_eq(get_log(&h, 2, 512, 1, 0), INVALID_FIELD);
    ck_assert_uint_eq(get_log(&h, 2, 512, 0, 4), INVALID_FIELD);
    ck_assert_uint_eq(get_log(&h, 2, MIB + 4, 0, 0), INVALID_FIELD);
    static const uint8_t unknown[] = {0x00, 0x05, 0x06, 0x0d, 0x70, 0x80, 0xc0, 0xff};
    for (unsigned i = 0; i < COUNT(unknown); i++)
        ck_assert_uint_eq(get_log(&h, unknown[i], 512, UINT32_MAX, 0), INVALID_LOG_PAGE);
    teardown(&h);
}
END_TEST

/* ---- I/O ------------------------------------------------------------------------------------------------------------------- */

static void fill(host *h, uint64_t iova, uint32_t len, uint32_t seed)
{
    chance c = seeded(seed);
    for (uint32_t i = 0; i < len; i += 4) {
        uint32_t word = (uint32_t)draw(&c);
        memcpy(at(h, iova + i), &word, 4);
    }
}

/* Through the same queues and memory in every way that there is. */
START_TEST(write_and_read)
{
    host h;
    bool mapped = _i >= KINDS;
    setup_with(&h, (kind)(_i % KINDS), mapped ? "--doorbells=mapped" : NULL, _i % 2 ? "--block-size=4096" : NULL);
    uint32_t block = mapped && _i % 2 ? 4096 : 512;
    if (mapped)
        map_doorbells(&h);
    enable(&h);
    for (unsigned id = 1; id <= QUEUES; id++)
        create_pair(&h, id, RING);
    for (unsigned round = 0; round < 12; round++) {
        static const uint32_t lens[] = {4096, 8192, 12288, 65536, 131072, MIB};
        uint32_t len = lens[round % COUNT(lens)];
        unsigned id = 1 + round % QUEUES;
        uint64_t from = IOVA + DATA + (round % 3) * 512, to = from + 2 * MIB;
        fill(&h, from, len, round + 1);
        memset(at(&h, to - 64), 0x77, len + 128);
        ck_assert_uint_eq(run(&h, id, transfer(&h, WRITE, 100 * round, len / block, from, len, IOVA + LISTS)), 0);
        ck_assert_uint_eq(run(&h, id, transfer(&h, READ, 100 * round, len / block, to, len, IOVA + LISTS)), 0);
        ck_assert_mem_eq(at(&h, from), at(&h, to), len);
        for (unsigned i = 0; i < 64; i++) {
            ck_assert_uint_eq(*(uint8_t *)at(&h, to - 64 + i), 0x77);
            ck_assert_uint_eq(*(uint8_t *)at(&h, to + len + i), 0x77);
        }
    }
    teardown(&h);
}
END_TEST

/* Lists of any legal shape against a model of the disk: pages anywhere in memory, in any order, a first page with any offset, a list
 * anywhere in its page. Each page of memory has a mapping of its own. */
START_TEST(prp_shapes)
{
    enum { POOL = 600, ROUNDS = 150 };
    static uint8_t model[4 * MIB];
    host h;
    chance c = seeded((uint64_t)_i + 1);
    setup_with(&h, _i == 1 ? BY_MESSAGE : PINNED, NULL, NULL);
    must(vfu_client_dma_unmap(h.client, IOVA, MEMORY));
    for (uint64_t at_ = 0; at_ < MEMORY; at_ += PAGE)
        ck_assert_int_eq(vfu_client_dma_map(h.client, IOVA + at_, PAGE, 3, h.memory + at_, h.memory_fd, at_), 0);
    enable(&h);
    create_pair(&h, 1, RING);
    memset(model, 0, sizeof(model));
    for (unsigned round = 0; round < (_i == 1 ? 30 : ROUNDS); round++) {
        uint32_t blocks = 1 + below(&c, round % 4 ? 64 : 2048), lba = below(&c, (uint32_t)sizeof(model) / 512 - blocks),
                 pages = 0;
        uint32_t len = blocks * 512, offset = below(&c, PAGE / 4) * 4, slots = below(&c, PAGE / 8);
        bool write = below(&c, 2);
        uint64_t list = IOVA + LISTS + slots * 8, parts[300];
        sqe entry = {.opcode = write ? WRITE : READ, .nsid = 1, .dw10 = lba, .dw12 = blocks - 1};
        for (uint32_t done = 0; done < len; done += PAGE - (pages++ ? 0 : offset))
            parts[pages] = IOVA + DATA + below(&c, POOL) * (uint64_t)PAGE + (pages ? 0 : offset);
        for (uint32_t i = 0; i < pages && !write; i++) /* a page that is named twice would have any of two contents */
            parts[i] = IOVA + DATA + (i * 7 + 3) % POOL * (uint64_t)PAGE + (i ? 0 : offset);
        entry.prp1 = parts[0];
        entry.prp2 = pages == 2 ? parts[1] : list;
        for (uint32_t i = 1; i < pages && pages > 2; i++, list += 8) {
            if (list % PAGE == PAGE - 8 && i < pages - 1) {
                uint64_t next = IOVA + LISTS + 2 * PAGE;
                memcpy(at(&h, list), &next, 8);
                list = next;
            }
            memcpy(at(&h, list), &parts[i], 8);
        }
        if (write)
            for (uint32_t i = 0; i < pages; i++)
                fill(&h, parts[i] & ~UINT64_C(4095), PAGE, round * 1000 + i);
        ck_assert_uint_eq(run(&h, 1, entry), 0);
        for (uint32_t i = 0, done = 0; i < pages; i++) {
            uint32_t part = PAGE - (i ? 0 : offset);
            part = part < len - done ? part : len - done;
            if (write)
                memcpy(model + lba * 512 + done, at(&h, parts[i]), part);
            else
                ck_assert_mem_eq(at(&h, parts[i]), model + lba * 512 + done, part);
            done += part;
        }
    }
    teardown(&h);
}
END_TEST

/* Commands that must fail, the status that each gets, and that they change nothing. */
START_TEST(bad_io)
{
    static const uint64_t nowhere = UINT64_C(0x700000000000), readonly = IOVA + MEMORY, writeonly = IOVA + MEMORY + PAGE;
    static const uint64_t last = (64 * MIB) / 512, data = IOVA + DATA, list = IOVA + LISTS;
    const struct {
        const char *name;
        unsigned status;
        sqe entry;
    } cases[] = {
        {"opcode 0x03", INVALID_OPCODE, {.opcode = 0x03, .nsid = 1}},
        {"Write Uncorrectable", INVALID_OPCODE, {.opcode = 0x04, .nsid = 1}},
        {"Compare", INVALID_OPCODE, {.opcode = 0x05, .nsid = 1, .prp1 = data}},
        {"opcode 0xff", INVALID_OPCODE, {.opcode = 0xff, .nsid = 1}},
        {"fused", INVALID_FIELD, {.opcode = READ, .flags = 1, .nsid = 1, .prp1 = data}},
        {"SGL", INVALID_FIELD, {.opcode = READ, .flags = 0x40, .nsid = 1, .prp1 = data}},
        {"namespace 0", INVALID_NAMESPACE, {.opcode = READ, .nsid = 0, .prp1 = data}},
        {"namespace 2", INVALID_NAMESPACE, {.opcode = WRITE, .nsid = 2, .prp1 = data}},
        {"every namespace", INVALID_NAMESPACE, {.opcode = READ, .nsid = UINT32_MAX, .prp1 = data}},
        {"flush of namespace 0", INVALID_NAMESPACE, {.opcode = FLUSH, .nsid = 0}},
        {"one block behind the end", LBA_OUT_OF_RANGE, {.opcode = READ, .nsid = 1, .prp1 = data, .dw10 = (uint32_t)last}},
        {"half behind the end", LBA_OUT_OF_RANGE, {.opcode = WRITE, .nsid = 1, .prp1 = data, .dw10 = (uint32_t)last - 1, .dw12 = 1}},
        {"LBA that wraps",
         LBA_OUT_OF_RANGE,
         {.opcode = READ, .nsid = 1, .prp1 = data, .dw10 = UINT32_MAX, .dw11 = UINT32_MAX, .dw12 = 7}},
        {"LBA whose offset wraps", LBA_OUT_OF_RANGE, {.opcode = READ, .nsid = 1, .prp1 = data, .dw11 = 0x00800000}},
        {"more than MDTS", INVALID_FIELD, {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = list, .dw12 = 2048}},
        {"65536 blocks", INVALID_FIELD, {.opcode = WRITE, .nsid = 1, .prp1 = data, .prp2 = list, .dw12 = 65535}},
        {"PRP1 off its dword", INVALID_PRP, {.opcode = READ, .nsid = 1, .prp1 = data + 2}},
        {"PRP2 with an offset", INVALID_PRP, {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = data + PAGE + 4, .dw12 = 15}},
        {"list off its qword", INVALID_PRP, {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = list + 4, .dw12 = 31}},
        {"list entry with an offset", INVALID_PRP, {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = list + 0x100, .dw12 = 31}},
        {"chain with an offset", INVALID_PRP, {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = list + 0xff8, .dw12 = 31}},
        {"chain to itself", INVALID_PRP, {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = list + 0x1ff8, .dw12 = 31}},
        {"chain to a list of itself",
         INVALID_PRP,
         {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = list + 0x2ff8, .dw12 = 2047}},
        {"chain to nowhere", DATA_TRANSFER_ERROR, {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = list + 0x3ff8, .dw12 = 31}},
        {"list nowhere", DATA_TRANSFER_ERROR, {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = nowhere, .dw12 = 31}},
        {"list that can't be read",
         DATA_TRANSFER_ERROR,
         {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = writeonly, .dw12 = 31}},
        {"PRP1 nowhere", DATA_TRANSFER_ERROR, {.opcode = READ, .nsid = 1, .prp1 = nowhere}},
        {"PRP1 at 0", DATA_TRANSFER_ERROR, {.opcode = WRITE, .nsid = 1}},
        {"PRP1 at the end of the world", DATA_TRANSFER_ERROR, {.opcode = READ, .nsid = 1, .prp1 = UINT64_MAX - 3}},
        {"PRP2 nowhere", DATA_TRANSFER_ERROR, {.opcode = WRITE, .nsid = 1, .prp1 = data, .prp2 = nowhere, .dw12 = 15}},
        {"read into read-only memory", DATA_TRANSFER_ERROR, {.opcode = READ, .nsid = 1, .prp1 = readonly}},
        {"write from write-only memory", DATA_TRANSFER_ERROR, {.opcode = WRITE, .nsid = 1, .prp1 = writeonly}},
        {"second page read-only", DATA_TRANSFER_ERROR, {.opcode = READ, .nsid = 1, .prp1 = data, .prp2 = readonly, .dw12 = 15}},
        {"zeros behind the end", LBA_OUT_OF_RANGE, {.opcode = WRITE_ZEROES, .nsid = 1, .dw10 = (uint32_t)last - 1, .dw12 = 1}},
        {"range behind the end", LBA_OUT_OF_RANGE, {.opcode = DATASET_MANAGEMENT, .nsid = 1, .prp1 = list + 0x5000, .dw11 = 4}},
        {"ranges nowhere", DATA_TRANSFER_ERROR, {.opcode = DATASET_MANAGEMENT, .nsid = 1, .prp1 = nowhere, .dw11 = 4}},
    };
    host h;
    setup_with(&h, _i == 1 ? BY_MESSAGE : PINNED, NULL, NULL);
    ck_assert_int_eq(vfu_client_dma_map(h.client, readonly, PAGE, VFU_IOMMU_READ, h.memory + 2 * MIB, h.memory_fd, 2 * MIB), 0);
    ck_assert_int_eq(vfu_client_dma_map(h.client, writeonly, PAGE, VFU_IOMMU_WRITE, h.memory + 2 * MIB, h.memory_fd, 2 * MIB), 0);
    enable(&h);
    create_pair(&h, 1, RING);
    uint64_t *lists = at(&h, list), zeros[2] = {0};
    memset(at(&h, data), 0x11, 2 * MIB);
    lists[0x100 / 8] = data + 8;
    lists[0xff8 / 8] = list + 0x108;
    lists[0x1ff8 / 8] = list + 0x1ff8;
    lists[0x2ff8 / 8] = list + 0x4000; /* whose entries are all its own address, the last of them too: pages of data */
    lists[0x3ff8 / 8] = nowhere;
    for (unsigned i = 0; i < 512; i++)
        lists[0x4000 / 8 + i] = list + 0x4000 + (i == 300 ? 8 : 0);
    lists[0x5000 / 8] = (uint64_t)2 << 32;
    lists[0x5008 / 8] = last - 1;
    lists[0x4000 / 8 + 100] = list + 0x4008; /* ends what would else be a read into the list itself */
    for (unsigned i = 0; i < COUNT(cases); i++) {
        unsigned status = run(&h, 1, cases[i].entry);
        ck_assert_msg(status == cases[i].status, "%s: status 0x%x, not 0x%x", cases[i].name, status, cases[i].status);
    }
    /* neither the disk nor, but for the first page, which whoever reads may have written, memory has changed */
    ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 0, 2048, data, MIB, list)), 0);
    for (unsigned i = 0; i < MIB; i += 16)
        ck_assert_mem_eq(at(&h, data + i), zeros, 16);
    check_usable(&h);
    teardown(&h);
}
END_TEST

START_TEST(read_only_image)
{
    host h;
    setup(&h);
    fill(&h, IOVA + DATA, PAGE, 1);
    ck_assert_uint_eq(run(&h, 1, transfer(&h, WRITE, 0, 8, IOVA + DATA, PAGE, 0)), 0);
    disconnect_disk(&h);
    stop_engine(&h.disk);
    h.options[1] = "--read-only"; /* instead of a size */
    start_disk(&h);
    connect_disk(&h);
    enable(&h);
    create_pair(&h, 1, RING);
    uint8_t d[PAGE];
    fill(&h, IOVA + DATA + PAGE, PAGE, 1);
    ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 0, 8, IOVA + DATA + MIB, PAGE, 0)), 0);
    ck_assert_mem_eq(at(&h, IOVA + DATA + MIB), at(&h, IOVA + DATA + PAGE), PAGE);
    ck_assert_uint_eq(run(&h, 1, transfer(&h, WRITE, 0, 8, IOVA + DATA, PAGE, 0)), WRITE_PROTECTED);
    ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = WRITE_ZEROES, .nsid = 1}), WRITE_PROTECTED);
    ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = DATASET_MANAGEMENT, .nsid = 1, .prp1 = IOVA + DATA, .dw11 = 4}),
                      WRITE_PROTECTED);
    ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = FLUSH, .nsid = 1}), 0);
    ck_assert_uint_eq(identify(&h, 0, 1, d), 0);
    ck_assert_uint_eq(d[99], 1); /* NSATTR */
    ck_assert_uint_eq(identify(&h, 1, 0, d), 0);
    ck_assert_uint_eq(d[525], 0); /* VWC */
    teardown(&h);
}
END_TEST

/* What the file can't do is an error of the medium. */
START_TEST(image_cut)
{
    host h;
    setup(&h);
    ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 2048, 8, IOVA + DATA, PAGE, 0)), 0);
    must(truncate(h.image, MIB));
    ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 2048, 8, IOVA + DATA, PAGE, 0)), READ_ERROR);
    ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 2044, 8, IOVA + DATA, PAGE, 0)), READ_ERROR);
    ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 0, 8, IOVA + DATA, PAGE, 0)), 0);
    teardown(&h);
}
END_TEST

static uint64_t image_storage(host *h)
{
    struct stat st;
    must(stat(h->image, &st));
    return (uint64_t)st.st_blocks * 512;
}

/* Write Zeroes and Deallocate: zeros are read, to the block; storage is given back where the file system can do that. In /dev/shm it
 * is one that has no way to write zeros but to write them. */
START_TEST(zeros)
{
    host h;
    image_directory = _i && access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    setup(&h);
    uint8_t *in = at(&h, IOVA + DATA + MIB);
    memset(at(&h, IOVA + DATA), 0xff, MIB);
    for (unsigned deallocate = 0; deallocate < 3; deallocate++) { /* Write Zeroes; with the deallocate bit; Dataset Management */
        ck_assert_uint_eq(run(&h, 1, transfer(&h, WRITE, 0, 2048, IOVA + DATA, MIB, IOVA + LISTS)), 0);
        ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = FLUSH, .nsid = 1}), 0);
        uint64_t before = image_storage(&h);
        uint32_t ranges[] = {0, 1000, 5, 0, 0, 0, 0, 0, 0, 10, 2000, 0};
        memcpy(at(&h, IOVA + LISTS), ranges, sizeof(ranges));
        if (deallocate < 2) {
            ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = WRITE_ZEROES, .nsid = 1, .dw10 = 5, .dw12 = 999 | deallocate << 25}), 0);
            ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = WRITE_ZEROES, .nsid = 1, .dw10 = 2000, .dw12 = 9 | deallocate << 25}),
                              0);
        } else {
            sqe hint = {.opcode = DATASET_MANAGEMENT, .nsid = 1, .prp1 = IOVA + LISTS, .dw10 = 2};
            ck_assert_uint_eq(run(&h, 1, hint), 0); /* without the attribute it is but a hint */
            ck_assert_uint_eq(image_storage(&h), before);
            hint.dw11 = 4;
            ck_assert_uint_eq(run(&h, 1, hint), 0);
        }
        if (deallocate)
            ck_assert_uint_lt(image_storage(&h), before);
        ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 0, 2048, IOVA + DATA + MIB, MIB, IOVA + LISTS)), 0);
        for (unsigned block = 0; block < 2048; block++) {
            bool zero = (block >= 5 && block < 1005) || (block >= 2000 && block < 2010);
            ck_assert_uint_eq(in[block * 512], zero ? 0 : 0xff);
            ck_assert_mem_eq(in + block * 512, in + block * 512 + 1, 511);
        }
    }
    ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = FLUSH, .nsid = UINT32_MAX}), 0);
    teardown(&h);
}
END_TEST

/* A write that is durable by itself, because it says so or because the cache is off, is one. What can be seen here is that it works. */
START_TEST(write_through)
{
    host h;
    setup(&h);
    sqe entry = transfer(&h, WRITE, 0, 8, IOVA + DATA, PAGE, 0);
    entry.dw12 |= UINT32_C(1) << 30;
    ck_assert_uint_eq(run(&h, 1, entry), 0);
    ck_assert_uint_eq(feature(&h, SET_FEATURES, 6, 0, NULL), 0);
    entry.dw12 = 7;
    ck_assert_uint_eq(run(&h, 1, entry), 0);
    ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = WRITE_ZEROES, .nsid = 1}), 0);
    ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = FLUSH, .nsid = 1}), 0);
    teardown(&h);
}
END_TEST

/* Where the image's file system does what is asked of it only in part: it can't punch holes or write zeros, a write that is to be
 * durable finds no space, and fdatasync() fails. So this shows as well who calls it. */
static void refuse_calls(void)
{
    static const uint32_t data = offsetof(struct seccomp_data, args[5]) + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 4 : 0);
    struct sock_filter steps[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fdatasync, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EIO),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fallocate, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EOPNOTSUPP),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_pwritev2, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, data),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, 2 /* RWF_DSYNC */, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSPC),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = COUNT(steps), .filter = steps};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        _exit(77);
}

static bool can_refuse_calls(void)
{
    int status;
    pid_t pid = fork();
    must(pid);
    if (pid == 0) {
        refuse_calls();
        _exit(0);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    return status == 0;
}

START_TEST(poor_file_system)
{
    host h;
    if (!can_refuse_calls())
        return; /* a machine without seccomp */
    before_example = refuse_calls;
    setup(&h);
    before_example = NULL;
    uint8_t *in = at(&h, IOVA + DATA + MIB);
    sqe flush = {.opcode = FLUSH, .nsid = 1}, zero = {.opcode = WRITE_ZEROES, .nsid = 1, .dw10 = 5, .dw12 = 2039};
    sqe all = transfer(&h, WRITE, 0, 2048, IOVA + DATA, MIB, IOVA + LISTS),
        deallocate = {.opcode = DATASET_MANAGEMENT, .nsid = 1, .prp1 = IOVA + LISTS + PAGE, .dw11 = 4};
    uint32_t range[] = {0, 2040, 5, 0};
    memcpy(at(&h, deallocate.prp1), range, sizeof(range));
    memset(at(&h, IOVA + DATA), 0xff, MIB);
    for (unsigned way = 0; way < 3; way++) { /* Write Zeroes; with the deallocate bit; Dataset Management */
        ck_assert_uint_eq(run(&h, 1, all), 0);
        zero.dw12 = 2039 | way << 25;
        ck_assert_uint_eq(run(&h, 1, way < 2 ? zero : deallocate), 0);
        ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 0, 2048, IOVA + DATA + MIB, MIB, IOVA + LISTS)), 0);
        for (unsigned i = 0; i < MIB; i++)
            ck_assert_uint_eq(in[i], i / 512 >= 5 && i / 512 < 2045 ? 0 : 0xff);
    }
    ck_assert_uint_eq(run(&h, 1, flush), WRITE_FAULT);
    all.dw12 |= UINT32_C(1) << 30; /* FUA */
    zero.dw12 |= UINT32_C(1) << 30;
    ck_assert_uint_eq(run(&h, 1, all), CAPACITY_EXCEEDED);
    ck_assert_uint_eq(run(&h, 1, zero), WRITE_FAULT);
    all.dw12 = 2047; /* and with the write cache off */
    zero.dw12 = 2039;
    ck_assert_uint_eq(feature(&h, SET_FEATURES, 6, 0, NULL), 0);
    ck_assert_uint_eq(run(&h, 1, all), CAPACITY_EXCEEDED);
    ck_assert_uint_eq(run(&h, 1, zero), WRITE_FAULT);
    ck_assert_uint_eq(run(&h, 1, deallocate), WRITE_FAULT);
    ck_assert_uint_eq(feature(&h, SET_FEATURES, 6, 1, NULL), 0);
    ck_assert_uint_eq(run(&h, 1, all), 0);
    set32(&h, CC, ENABLE | 1 << 14);
    wait_for(&h, SHST, 8);
    teardown(&h);
}
END_TEST

/* ---- queues ---------------------------------------------------------------------------------------------------------------- */

START_TEST(bad_queues)
{
    const uint64_t cq = IOVA + CQS + 0x4000, sq = IOVA + SQS + 0x10000, nowhere = UINT64_C(0x700000000000);
    const uint64_t readonly = IOVA + MEMORY, writeonly = IOVA + MEMORY + PAGE;
    const struct {
        const char *name;
        unsigned status;
        sqe entry;
    } cases[] = {
        /* queue 1: completion; 2: completion and submission, on 2; the rest is not there */
        {"completion queue 0", INVALID_QUEUE, {.opcode = CREATE_CQ, .prp1 = cq, .dw10 = 0x000f0000, .dw11 = 3}},
        {"completion queue twice", INVALID_QUEUE, {.opcode = CREATE_CQ, .prp1 = cq, .dw10 = 0x000f0001, .dw11 = 3}},
        {"completion queue 5 of 4", INVALID_QUEUE, {.opcode = CREATE_CQ, .prp1 = cq, .dw10 = 0x000f0005, .dw11 = 3}},
        {"completion queue 65535", INVALID_QUEUE, {.opcode = CREATE_CQ, .prp1 = cq, .dw10 = 0x000fffff, .dw11 = 3}},
        {"completion queue of one entry", INVALID_QUEUE_SIZE, {.opcode = CREATE_CQ, .prp1 = cq, .dw10 = 0x00000003, .dw11 = 3}},
        {"completion queue of 1025 entries",
         INVALID_QUEUE_SIZE,
         {.opcode = CREATE_CQ, .prp1 = cq, .dw10 = 0x04000003, .dw11 = 3}},
        {"completion queue of 65536 entries",
         INVALID_QUEUE_SIZE,
         {.opcode = CREATE_CQ, .prp1 = cq, .dw10 = 0xffff0003, .dw11 = 3}},
        {"vector 5 of 0 to 4", INVALID_VECTOR, {.opcode = CREATE_CQ, .prp1 = cq, .dw10 = 0x000f0003, .dw11 = 0x50003}},
        {"vector 65535", INVALID_VECTOR, {.opcode = CREATE_CQ, .prp1 = cq, .dw10 = 0x000f0003, .dw11 = 0xffff0003}},
        {"completion queue in pieces", INVALID_FIELD, {.opcode = CREATE_CQ, .prp1 = cq, .dw10 = 0x000f0003, .dw11 = 2}},
        {"completion queue off its page", INVALID_PRP, {.opcode = CREATE_CQ, .prp1 = cq + 64, .dw10 = 0x000f0003, .dw11 = 3}},
        {"completion queue nowhere", DATA_TRANSFER_ERROR, {.opcode = CREATE_CQ, .prp1 = nowhere, .dw10 = 0x000f0003, .dw11 = 3}},
        {"completion queue read-only",
         DATA_TRANSFER_ERROR,
         {.opcode = CREATE_CQ, .prp1 = readonly, .dw10 = 0x000f0003, .dw11 = 3}},
        {"completion queue that wraps",
         DATA_TRANSFER_ERROR,
         {.opcode = CREATE_CQ, .prp1 = UINT64_C(0xfffffffffffff000), .dw10 = 0x03ff0003, .dw11 = 3}},
        {"submission queue 0", INVALID_QUEUE, {.opcode = CREATE_SQ, .prp1 = sq, .dw10 = 0x000f0000, .dw11 = 0x10001}},
        {"submission queue twice", INVALID_QUEUE, {.opcode = CREATE_SQ, .prp1 = sq, .dw10 = 0x000f0002, .dw11 = 0x20001}},
        {"submission queue 5 of 4", INVALID_QUEUE, {.opcode = CREATE_SQ, .prp1 = sq, .dw10 = 0x000f0005, .dw11 = 0x10001}},
        {"submission queue of one entry",
         INVALID_QUEUE_SIZE,
         {.opcode = CREATE_SQ, .prp1 = sq, .dw10 = 0x00000003, .dw11 = 0x10001}},
        {"submission queue of 1025", INVALID_QUEUE_SIZE, {.opcode = CREATE_SQ, .prp1 = sq, .dw10 = 0x04000003, .dw11 = 0x10001}},
        {"submission queue in pieces", INVALID_FIELD, {.opcode = CREATE_SQ, .prp1 = sq, .dw10 = 0x000f0003, .dw11 = 0x10000}},
        {"submission queue off its page",
         INVALID_PRP,
         {.opcode = CREATE_SQ, .prp1 = sq + 4, .dw10 = 0x000f0003, .dw11 = 0x10001}},
        {"submission queue nowhere",
         DATA_TRANSFER_ERROR,
         {.opcode = CREATE_SQ, .prp1 = nowhere, .dw10 = 0x000f0003, .dw11 = 0x10001}},
        {"submission queue write-only",
         DATA_TRANSFER_ERROR,
         {.opcode = CREATE_SQ, .prp1 = writeonly, .dw10 = 0x000f0003, .dw11 = 0x10001}},
        {"for completion queue 0", INVALID_QUEUE, {.opcode = CREATE_SQ, .prp1 = sq, .dw10 = 0x000f0003, .dw11 = 0x00001}},
        {"for completion queue 3, which isn't there",
         NO_SUCH_CQ,
         {.opcode = CREATE_SQ, .prp1 = sq, .dw10 = 0x000f0003, .dw11 = 0x30001}},
        {"for completion queue 5 of 4", INVALID_QUEUE, {.opcode = CREATE_SQ, .prp1 = sq, .dw10 = 0x000f0003, .dw11 = 0x50001}},
        {"delete completion queue 0", INVALID_QUEUE, {.opcode = DELETE_CQ, .dw10 = 0}},
        {"delete completion queue 3", INVALID_QUEUE, {.opcode = DELETE_CQ, .dw10 = 3}},
        {"delete completion queue 65535", INVALID_QUEUE, {.opcode = DELETE_CQ, .dw10 = 0xffff}},
        {"delete completion queue in use", INVALID_DELETION, {.opcode = DELETE_CQ, .dw10 = 2}},
        {"delete submission queue 0", INVALID_QUEUE, {.opcode = DELETE_SQ, .dw10 = 0}},
        {"delete submission queue 1", INVALID_QUEUE, {.opcode = DELETE_SQ, .dw10 = 1}},
        {"delete submission queue 5", INVALID_QUEUE, {.opcode = DELETE_SQ, .dw10 = 5}},
        {"admin opcode 0x03", INVALID_OPCODE, {.opcode = 0x03}},
        {"Firmware Commit", INVALID_OPCODE, {.opcode = 0x10}},
        {"Namespace Management", INVALID_OPCODE, {.opcode = 0x0d}},
        {"Doorbell Buffer Config", INVALID_OPCODE, {.opcode = 0x7c}},
        {"Format", INVALID_OPCODE, {.opcode = 0x80, .nsid = 1}},
        {"fused admin command", INVALID_FIELD, {.opcode = IDENTIFY, .flags = 2, .prp1 = IOVA + DATA, .dw10 = 1}},
        {"admin command with an SGL", INVALID_FIELD, {.opcode = IDENTIFY, .flags = 0x40, .prp1 = IOVA + DATA, .dw10 = 1}},
        {"identify to nowhere", DATA_TRANSFER_ERROR, {.opcode = IDENTIFY, .prp1 = nowhere, .dw10 = 1}},
        {"identify to read-only memory", DATA_TRANSFER_ERROR, {.opcode = IDENTIFY, .prp1 = readonly, .dw10 = 1}},
        {"identify that spills into a bad page",
         DATA_TRANSFER_ERROR,
         {.opcode = IDENTIFY, .prp1 = IOVA + DATA + 8, .prp2 = nowhere, .dw10 = 1}},
        {"identify with a bad PRP2",
         INVALID_PRP,
         {.opcode = IDENTIFY, .prp1 = IOVA + DATA + 8, .prp2 = IOVA + DATA + 8, .dw10 = 1}},
        {"log to nowhere", DATA_TRANSFER_ERROR, {.opcode = GET_LOG, .prp1 = nowhere, .dw10 = 0x7f0002}},
    };
    host h;
    setup_with(&h, PINNED, NULL, NULL);
    ck_assert_int_eq(vfu_client_dma_map(h.client, readonly, PAGE, VFU_IOMMU_READ, h.memory + 2 * MIB, h.memory_fd, 2 * MIB), 0);
    ck_assert_int_eq(vfu_client_dma_map(h.client, writeonly, PAGE, VFU_IOMMU_WRITE, h.memory + 2 * MIB, h.memory_fd, 2 * MIB), 0);
    enable(&h);
    init_ring(&h, 1, RING, RING);
    ck_assert_uint_eq(create_cq(&h, 1, RING, 1), 0);
    create_pair(&h, 2, RING);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        unsigned status = run(&h, 0, cases[i].entry);
        ck_assert_msg(status == cases[i].status, "%s: status 0x%x, not 0x%x", cases[i].name, status, cases[i].status);
    }
    ck_assert_uint_eq(run(&h, 2, (sqe){.opcode = FLUSH, .nsid = 1}), 0);
    /* the right order, and everything again */
    for (unsigned round = 0; round < 3; round++) {
        ck_assert_uint_eq(run(&h, 0, (sqe){.opcode = DELETE_SQ, .dw10 = 2}), 0);
        ck_assert_uint_eq(run(&h, 0, (sqe){.opcode = DELETE_CQ, .dw10 = 2}), 0);
        create_pair(&h, 2, 2 + round * 511);
        for (unsigned i = 0; i < 5; i++)
            ck_assert_uint_eq(run(&h, 2, (sqe){.opcode = FLUSH, .nsid = 1}), 0);
    }
    /* wrong sizes of entries */
    set32(&h, CC, 0);
    wait_for(&h, RDY, 0);
    enable(&h);
    set32(&h, CC, 0x470001);
    init_ring(&h, 1, RING, RING);
    ck_assert_uint_eq(create_cq(&h, 1, RING, 1), INVALID_QUEUE_SIZE);
    teardown(&h);
}
END_TEST

/* Several submission queues may share a completion queue; each entry says whose it is. And one may be without interrupts. */
START_TEST(shared_completion_queue)
{
    host h;
    setup_with(&h, PINNED, NULL, NULL);
    enable(&h);
    init_ring(&h, 1, RING, RING);
    init_ring(&h, 2, RING, RING);
    init_ring(&h, 3, RING, RING);
    ck_assert_uint_eq(run(&h, 0, (sqe){.opcode = CREATE_CQ, .prp1 = h.rings[1].cq, .dw10 = (RING - 1) << 16 | 1, .dw11 = 1}), 0);
    for (unsigned id = 1; id <= 3; id++)
        ck_assert_uint_eq(create_sq(&h, id, RING, 1), 0);
    for (unsigned i = 0; i <= QUEUES; i++)
        signals(h.events[i]);
    unsigned counts[4] = {0};
    for (unsigned round = 0; round < 40; round++) {
        cqe entry;
        for (unsigned id = 1; id <= 3; id++)
            submit(&h, id, (sqe){.opcode = FLUSH, .nsid = 1});
        for (unsigned i = 0; i < 3; i++) {
            for (unsigned ms = 0; !peek(&h, 1, &entry); ms++) {
                ck_assert_uint_lt(ms, PATIENCE_MS);
                must(vfu_client_serve(h.client, -1, 1));
            }
            ck_assert_uint_eq(status_of(entry), 0);
            ck_assert(entry.sq_id >= 1 && entry.sq_id <= 3);
            counts[entry.sq_id]++;
        }
        ring_cq(&h, 1);
    }
    for (unsigned id = 1; id <= 3; id++)
        ck_assert_uint_eq(counts[id], 40);
    for (unsigned i = 0; i <= QUEUES; i++)
        ck_assert_uint_eq(signals(h.events[i]), 0);
    teardown(&h);
}
END_TEST

/* A completion queue that nobody empties stops its commands; when it is emptied they go on. None is lost or comes twice. */
START_TEST(full_completion_queue)
{
    host h;
    setup_with(&h, _i == 1 ? BY_MESSAGE : PINNED, NULL, NULL);
    enable(&h);
    init_ring(&h, 1, 64, 4);
    ck_assert_uint_eq(create_cq(&h, 1, 4, 1), 0);
    ck_assert_uint_eq(create_sq(&h, 1, 64, 1), 0);
    for (unsigned round = 0; round < 5; round++) {
        uint16_t first = 0;
        bool seen[60] = {false};
        for (unsigned i = 0; i < 60; i++) {
            uint16_t cid = enqueue(&h, 1, transfer(&h, READ, i, 1, IOVA + DATA + i * 512, 512, 0));
            first = i ? first : cid;
        }
        ring_sq(&h, 1);
        for (unsigned got = 0; got < 60;) {
            unsigned burst = 0;
            cqe entry;
            for (unsigned ms = 0; !burst; ms++) {
                ck_assert_uint_lt(ms, PATIENCE_MS);
                must(vfu_client_serve(h.client, -1, ms ? 1 : 3));
                while (peek(&h, 1, &entry)) {
                    ck_assert_uint_eq(status_of(entry), 0);
                    ck_assert_uint_lt((uint16_t)(entry.cid - first), 60);
                    ck_assert(!seen[(uint16_t)(entry.cid - first)]);
                    seen[(uint16_t)(entry.cid - first)] = true;
                    burst++;
                }
            }
            ck_assert_uint_le(burst, 3); /* never over the head */
            got += burst;
            ring_cq(&h, 1);
        }
    }
    teardown(&h);
}
END_TEST

/* A queue is deleted while its commands are under way: they end first, and nothing of it is heard afterwards. */
START_TEST(delete_in_use)
{
    host h;
    setup_with(&h, PINNED, NULL, NULL);
    enable(&h);
    for (unsigned round = 0; round < 40; round++) {
        create_pair(&h, 1, 64);
        unsigned count = 1 + round % 60;
        for (unsigned i = 0; i < count; i++)
            enqueue(&h, 1,
                    i % 4 ? transfer(&h, WRITE, i * 256, 256, IOVA + DATA, 256 * 512, IOVA + LISTS)
                          : (sqe){.opcode = FLUSH, .nsid = 1});
        transfer(&h, WRITE, 0, 256, IOVA + DATA, 256 * 512, IOVA + LISTS);
        ring_sq(&h, 1);
        ck_assert_uint_eq(run(&h, 0, (sqe){.opcode = DELETE_SQ, .dw10 = 1}), 0);
        cqe entry;
        unsigned completed = 0;
        while (peek(&h, 1, &entry)) {
            ck_assert_uint_eq(status_of(entry), 0);
            completed++;
        }
        ck_assert_uint_le(completed, count);
        ck_assert_uint_eq(run(&h, 0, (sqe){.opcode = DELETE_CQ, .dw10 = 1}), 0);
        must(vfu_client_serve(h.client, -1, 2));
        ck_assert(!peek(&h, 1, &entry));
    }
    check_usable(&h);
    teardown(&h);
}
END_TEST

/* ---- doorbells and events -------------------------------------------------------------------------------------------------- */

/* Completes the oldest event request, and reads its log page, so that the next can come. */
static uint32_t next_event(host *h)
{
    cqe entry = reap(h, 0);
    ck_assert_uint_eq(status_of(entry), 0);
    ck_assert_uint_eq(get_log(h, (uint8_t)(entry.result >> 16), 256, 0, 0), 0);
    return entry.result;
}

START_TEST(absurd_doorbells)
{
    enum { DOORBELL = 0x010000, VALUE = 0x010100 }; /* results of event requests: error log, kind, type 0 */
    host h;
    setup_with(&h, PINNED, _i ? "--doorbells=mapped" : NULL, NULL);
    if (_i)
        map_doorbells(&h);
    enable(&h);
    create_pair(&h, 1, RING);
    const struct {
        unsigned index;
        uint32_t value, result;
    } cases[] = {
        {0, RING, VALUE}, {0, UINT32_MAX, VALUE}, {0, 0x10000, VALUE}, {1, RING, VALUE}, {2, RING, VALUE}, {2, 0x80000000, VALUE},
        {3, RING, VALUE}, {3, 5, VALUE},          {3, 1, VALUE},       {4, 1, DOORBELL}, {5, 1, DOORBELL}, {9, 3, DOORBELL},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        submit(&h, 0, (sqe){.opcode = EVENT_REQUEST});
        ck_assert_uint_eq(feature(&h, GET_FEATURES, 0x0b, 0, NULL), 0); /* it has been fetched */
        /* The last head in the page may not have been noticed yet: there only what is beyond the tail is wrong for certain. */
        doorbell(&h, cases[i].index, _i && cases[i].index == 3 && cases[i].value < RING ? h.rings[1].head + 1 : cases[i].value);
        uint32_t result = next_event(&h);
        ck_assert_msg(result == cases[i].result, "case %u: 0x%x", i, result);
        const uint8_t *log = at(&h, IOVA + DATA);
        ck_assert_uint_eq(field(log, 0, 8), i + 1);
        ck_assert_uint_eq(field(log, 8, 2), cases[i].index / 2);
        ck_assert_uint_eq(field(log, 64, 8), i);
        ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = FLUSH, .nsid = 1}), 0); /* none the worse for it */
    }
    for (unsigned i = 0; i < 1000 && !_i; i++) /* of queues that can't be */
        doorbell(&h, 10 + i, i);
    submit(&h, 0, (sqe){.opcode = EVENT_REQUEST});
    if (!_i)
        ck_assert_uint_eq(next_event(&h), DOORBELL);
    check_usable(&h);
    teardown(&h);
}
END_TEST

/* An event is told once until its log page was read; it waits for a request, and the log page may be read without its consequences. */
START_TEST(event_requests)
{
    host h;
    setup(&h);
    uint16_t cids[4];
    doorbell(&h, 2, 999); /* before there is a request */
    cids[0] = submit(&h, 0, (sqe){.opcode = EVENT_REQUEST});
    cqe entry = reap(&h, 0);
    ck_assert_uint_eq(entry.cid, cids[0]);
    ck_assert_uint_eq(entry.result, 0x010100);
    for (unsigned i = 0; i < 4; i++)
        cids[i] = submit(&h, 0, (sqe){.opcode = EVENT_REQUEST});
    ck_assert_uint_eq(run(&h, 0, (sqe){.opcode = EVENT_REQUEST}), TOO_MANY_EVENT_REQUESTS);
    doorbell(&h, 2, 999);
    ck_assert_uint_eq(feature(&h, GET_FEATURES, 0x0b, 0, NULL), 0); /* not told again: the next completion is this one's */
    sqe log = {.opcode = GET_LOG, .prp1 = IOVA + DATA, .dw10 = 15 << 16 | 1 << 15 | 1};
    ck_assert_uint_eq(run(&h, 0, log), 0); /* retained */
    doorbell(&h, 2, 998);
    ck_assert_uint_eq(feature(&h, GET_FEATURES, 0x0b, 0, NULL), 0);
    log.dw10 &= ~(UINT32_C(1) << 15);
    ck_assert_uint_eq(run(&h, 0, log), 0);
    doorbell(&h, 2, 997);
    entry = reap(&h, 0);
    ck_assert_uint_eq(entry.result, 0x010100);
    /* abort those that are left: the victim's completion and the command's own */
    for (unsigned i = 0, found = 0; i < 4; i++) {
        if (cids[i] == entry.cid)
            continue;
        submit(&h, 0, (sqe){.opcode = ABORT, .dw10 = (uint32_t)cids[i] << 16});
        cqe first = reap(&h, 0), second = reap(&h, 0);
        cqe victim = first.cid == cids[i] ? first : second, own = first.cid == cids[i] ? second : first;
        ck_assert_uint_eq(status_of(victim), ABORTED);
        ck_assert_uint_eq(status_of(own), 0);
        ck_assert_uint_eq(own.result, 0);
        ck_assert_uint_le(++found, 3);
    }
    submit(&h, 0, (sqe){.opcode = ABORT, .dw10 = 0x12340000});
    entry = reap(&h, 0);
    ck_assert_uint_eq(status_of(entry), 0);
    ck_assert_uint_eq(entry.result, 1); /* not aborted */
    /* a reset forgets those that wait: as many again can */
    for (unsigned round = 0; round < 2; round++) {
        for (unsigned i = 0; i < 4; i++)
            submit(&h, 0, (sqe){.opcode = EVENT_REQUEST});
        ck_assert_uint_eq(run(&h, 0, (sqe){.opcode = EVENT_REQUEST}), TOO_MANY_EVENT_REQUESTS);
        check_usable(&h);
    }
    teardown(&h);
}
END_TEST

/* A command that waits for a worker is aborted: it completes so, and has done nothing. */
START_TEST(abort_io)
{
    host h;
    setup(&h);
    memset(at(&h, IOVA + DATA), 0x21, MIB);
    unsigned aborted = 0;
    for (uint64_t until = now_ms() + PATIENCE_MS; !aborted && now_ms() < until;) {
        for (unsigned i = 0; i < 14; i++)
            enqueue(&h, 1, transfer(&h, WRITE, 0, 2048, IOVA + DATA, MIB, IOVA + LISTS));
        uint16_t cid = enqueue(&h, 1, transfer(&h, WRITE, 4096, 8, IOVA + DATA, PAGE, 0));
        ring_sq(&h, 1);
        submit(&h, 0, (sqe){.opcode = ABORT, .dw10 = (uint32_t)cid << 16 | 1});
        cqe own = reap(&h, 0);
        ck_assert_uint_eq(status_of(own), 0);
        for (unsigned i = 0; i < 15; i++) {
            cqe entry = reap(&h, 1);
            ck_assert_uint_eq(status_of(entry), entry.cid == cid && !own.result ? ABORTED : 0);
            aborted += status_of(entry) == ABORTED;
        }
        ck_assert_uint_eq(aborted, !own.result);
        ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 4096, 8, IOVA + DATA + MIB, PAGE, 0)), 0);
        ck_assert_uint_eq(*(uint8_t *)at(&h, IOVA + DATA + MIB), aborted ? 0 : 0x21);
        ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = WRITE_ZEROES, .nsid = 1, .dw10 = 4096, .dw12 = 7}), 0);
    }
    ck_assert_uint_eq(aborted, 1);
    teardown(&h);
}
END_TEST

/* Requests that wait take no room of a queue of two entries. */
START_TEST(event_requests_in_a_small_queue)
{
    host h;
    setup_with(&h, PINNED, NULL, NULL);
    init_ring(&h, 0, 8, 2);
    set32(&h, AQA, 1 << 16 | 7);
    set64(&h, ASQ, h.rings[0].sq);
    set64(&h, ACQ, h.rings[0].cq);
    set32(&h, CC, ENABLE);
    for (unsigned i = 0; i < 4; i++)
        submit(&h, 0, (sqe){.opcode = EVENT_REQUEST});
    for (unsigned i = 0; i < 20; i++)
        ck_assert_uint_eq(identify(&h, 1, 0, NULL), 0);
    teardown(&h);
}
END_TEST

/* The image becomes larger: the namespace does. */
START_TEST(image_grows)
{
    host h;
    uint8_t d[PAGE];
    setup(&h);
    ck_assert_uint_eq(feature(&h, SET_FEATURES, 0x0b, 0x100, NULL), 0);
    submit(&h, 0, (sqe){.opcode = EVENT_REQUEST});
    ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 64 * 2048, 8, IOVA + DATA, PAGE, 0)), LBA_OUT_OF_RANGE);
    must(truncate(h.image, 65 * MIB + 100));
    must(kill(h.disk.pid, SIGHUP));
    cqe entry = reap(&h, 0);
    ck_assert_uint_eq(entry.result, 0x040002); /* changed namespaces, a notice */
    ck_assert_uint_eq(get_log(&h, 4, PAGE, 0, 0), 0);
    ck_assert_uint_eq(field(at(&h, IOVA + DATA), 0, 8), 1);
    ck_assert_uint_eq(get_log(&h, 4, PAGE, 0, 0), 0);
    ck_assert_uint_eq(field(at(&h, IOVA + DATA), 0, 8), 0);
    ck_assert_uint_eq(identify(&h, 0, 1, d), 0);
    ck_assert_uint_eq(field(d, 0, 8), 65 * 2048);
    ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, 64 * 2048, 8, IOVA + DATA, PAGE, 0)), 0);
    teardown(&h);
}
END_TEST

START_TEST(bus_master)
{
    host h;
    cqe entry;
    setup(&h);
    set_master(&h, false);
    submit(&h, 1, (sqe){.opcode = FLUSH, .nsid = 1});
    must(vfu_client_serve(h.client, h.events[1], 20));
    ck_assert(!peek(&h, 1, &entry));
    set_master(&h, true);
    ck_assert_uint_eq(status_of(reap(&h, 1)), 0);
    teardown(&h);
}
END_TEST

/* Entries of several commands share an interrupt, but none goes without. */
START_TEST(interrupts)
{
    host h;
    setup_with(&h, PINNED, NULL, NULL);
    enable(&h);
    create_pair(&h, 1, 64);
    for (unsigned round = 0; round < 100; round++) {
        cqe entry;
        unsigned count = 1 + round % 50;
        for (unsigned i = 0; i < count; i++)
            enqueue(&h, 1,
                    round % 3 ? transfer(&h, READ, i * 8, 8, IOVA + DATA + i * PAGE, PAGE, 0)
                              : transfer(&h, WRITE, i * 8, 8, IOVA + DATA + i * PAGE, PAGE, 0));
        ring_sq(&h, 1);
        for (unsigned got = 0; got < count;) { /* looks at the queue only after an interrupt */
            struct pollfd ready = {.fd = h.events[1], .events = POLLIN};
            ck_assert_int_eq(poll(&ready, 1, PATIENCE_MS), 1);
            signals(h.events[1]);
            for (; peek(&h, 1, &entry); got++)
                ck_assert_uint_eq(status_of(entry), 0);
        }
        ring_cq(&h, 1);
    }
    teardown(&h);
}
END_TEST

/* ---- a guest that changes its mind ----------------------------------------------------------------------------------------- */

/* A process that rewrites submission entries and lists without end, with what was there and with something else. */
static pid_t start_rewriting(host *h)
{
    pid_t pid = fork();
    must(pid);
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (chance c = seeded(5);;) {
        uint32_t entry = below(&c, RING), offset = below(&c, 64) & ~3u;
        uint64_t iova = below(&c, 2) ? h->rings[1].sq + entry * 64 + offset : IOVA + LISTS + below(&c, 256) * 4;
        _Atomic uint32_t *word = at(h, iova);
        uint32_t value = atomic_load(word),
                 bad[] = {0, UINT32_MAX, value ^ 0x1000, value + 4, (uint32_t)(IOVA + LISTS), 0x00000103};
        atomic_store(word, bad[below(&c, COUNT(bad))]);
        for (unsigned i = 0; i < 2000; i++)
            atomic_load(word);
        atomic_store(word, value);
    }
}

/* The controller copies what it checks: whatever is rewritten under it, each command gets a status, the controller goes on, and what
 * lies outside of the memory that is mapped for writing is as it was. */
START_TEST(rewritten_entries)
{
    host h;
    unsigned good = 0, refused = 0;
    setup_with(&h, _i == 1 ? BY_MESSAGE : PINNED, NULL, NULL);
    enable(&h);
    create_pair(&h, 1, RING);
    int other = memfd("other", MIB, F_SEAL_SHRINK | F_SEAL_GROW);
    uint8_t *others = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0);
    ck_assert(others != MAP_FAILED);
    memset(others, 0x3c, MIB);
    ck_assert_int_eq(vfu_client_dma_map(h.client, IOVA + MEMORY, MIB, VFU_IOMMU_READ, others, h.memory_fd < 0 ? -1 : other, 0),
                     0);
    pid_t rewriter = start_rewriting(&h);
    uint64_t until = now_ms() + PATIENCE_MS;
    for (unsigned round = 0; round < (_i == 1 ? 40 : 200) || ((good < 20 || refused < 20) && now_ms() < until); round++) {
        unsigned count = 1 + round % (RING - 1);
        uint32_t len = 1 + round % 200;
        for (unsigned i = 0; i < count; i++)
            enqueue(&h, 1, transfer(&h, i % 2 ? WRITE : READ, i, len * 8, IOVA + DATA + i * 512, len * PAGE, IOVA + LISTS));
        ring_sq(&h, 1);
        for (unsigned i = 0; i < count; i++) {
            cqe entry;
            for (unsigned ms = 0; !peek(&h, 1, &entry); ms++) {
                ck_assert_uint_lt(ms, PATIENCE_MS);
                must(vfu_client_serve(h.client, -1, 1));
            }
            *(status_of(entry) ? &refused : &good) += 1;
        }
        ring_cq(&h, 1);
    }
    must(kill(rewriter, SIGKILL));
    ck_assert_int_eq(waitpid(rewriter, NULL, 0), rewriter);
    ck_assert_uint_ge(good, 20);
    ck_assert_uint_ge(refused, 20);
    for (unsigned i = 0; i < MIB; i++)
        ck_assert_uint_eq(others[i], 0x3c);
    munmap(others, MIB);
    close(other);
    check_usable(&h);
    teardown(&h);
}
END_TEST

/* A driver whose memory is reached by messages alone sees each access. What has been fetched it overwrites at once. */
typedef struct watch {
    caller c;
    uint64_t sqe_bytes, list_bytes; /* that were fetched */
    uint32_t tails[2];
    bool overwrites;
} watch;

/* Runs a command in queue 0 or 1 of RING entries. Submissions are at 0 and PAGE, completions at 2 and 3 PAGE, a list at 4 PAGE. */
static unsigned watched_run(watch *w, unsigned id, sqe entry)
{
    uint32_t slot = w->tails[id]++;
    uint64_t sqe_at = id * PAGE + slot * sizeof(sqe), list_at = 4 * PAGE;
    cqe *done = (cqe *)(void *)(w->c.memory + (2 + id) * PAGE) + slot;
    memcpy(w->c.memory + sqe_at, &entry, sizeof(entry));
    memset(done, 0, sizeof(*done));
    w->sqe_bytes = w->list_bytes = 0;
    vfu_msg doorbell = access_of(VFU_CMD_REGION_WRITE, 0, DOORBELLS + id * 8, &w->tails[id], 4);
    post(&w->c, &doorbell, NULL, 0);
    for (bool answered = false; !answered || !(done->status & 1);) {
        vfu_msg m;
        ck_assert_int_eq(peer_wait(&w->c.p), 1);
        ck_assert_int_eq(vfu_msg_decode(w->c.p.bytes, w->c.p.have, &m), 0);
        if (vfu_msg_is_reply(&m)) {
            answered = true;
            continue;
        }
        uint64_t offset = m.u.dma.address - IOVA, count = m.u.dma.count;
        answer_dma(&w->c, &m, 0);
        if (m.cmd != VFU_CMD_DMA_READ || offset > list_at + PAGE)
            continue;
        *(offset == sqe_at ? &w->sqe_bytes : &w->list_bytes) += count;
        if (w->overwrites)
            memset(w->c.memory + offset, 0xff, (size_t)count);
    }
    return status_of(*done);
}

START_TEST(fetched_once)
{
    enum { LEN = 64 << 10, PLACE = 0x10000 };
    host h;
    setup_with(&h, BY_MESSAGE, NULL, NULL);
    disconnect_disk(&h);
    watch w = {.c = {.p = {.sock = connect_to(&h.address, h.address_len)}}};
    uint8_t *memory = make_memory(&w.c, IOVA, 2 * MIB);
    say_hello(&w.c, NULL);
    vfu_msg map = map_of(IOVA, 2 * MIB);
    ck_assert_int_eq(call(&w.c, &map), 0);
    const uint32_t setup_writes[][2] = {
        {AQA, (RING - 1) << 16 | (RING - 1)}, {ASQ, (uint32_t)IOVA}, {ASQ + 4, IOVA >> 32},
        {ACQ, (uint32_t)(IOVA + 2 * PAGE)},   {ACQ + 4, IOVA >> 32}, {CC, ENABLE},
    };
    uint16_t command = 6;
    put(&w.c, VFU_PCI_REGION_CONFIG, 4, &command, 2);
    for (unsigned i = 0; i < COUNT(setup_writes); i++)
        put(&w.c, 0, setup_writes[i][0], &setup_writes[i][1], 4);
    /* the library reads what looks like either of two layouts of replies once more, and knows then */
    ck_assert_uint_eq(watched_run(&w, 0, (sqe){.opcode = GET_FEATURES, .dw10 = 7}), 0);
    w.overwrites = true;
    const uint32_t queue = (RING - 1) << 16 | 1;
    ck_assert_uint_eq(watched_run(&w, 0, (sqe){.opcode = CREATE_CQ, .prp1 = IOVA + 3 * PAGE, .dw10 = queue, .dw11 = 1}), 0);
    ck_assert_uint_eq(watched_run(&w, 0, (sqe){.opcode = CREATE_SQ, .prp1 = IOVA + PAGE, .dw10 = queue, .dw11 = 1 << 16 | 1}), 0);
    for (unsigned round = 0; round < 6; round++) { /* what is written comes back */
        uint64_t data = IOVA + PLACE + (round % 2) * MIB;
        sqe entry = {.opcode = round % 2 ? READ : WRITE, .nsid = 1, .prp1 = data, .prp2 = IOVA + 4 * PAGE, .dw12 = LEN / 512 - 1};
        for (unsigned i = 1; i < LEN / PAGE; i++) {
            uint64_t page = data + i * PAGE;
            memcpy(memory + 4 * PAGE + (i - 1) * 8, &page, 8);
        }
        memset(memory + PLACE + MIB, 0, LEN);
        ck_assert_uint_eq(watched_run(&w, 1, entry), 0);
        ck_assert_uint_eq(w.sqe_bytes, sizeof(sqe));
        ck_assert_uint_eq(w.list_bytes, (LEN / PAGE - 1) * 8);
        if (round % 2)
            ck_assert_mem_eq(memory + PLACE, memory + PLACE + MIB, LEN);
    }
    caller_close(&w.c);
    connect_disk(&h);
    check_usable(&h);
    teardown(&h);
}
END_TEST

static const uint8_t secret[16] = "neither for you!";

/* Not in the memory that a command may have written. */
static void check_no_secret(host *h)
{
    bool seen = false;
    for (uint8_t *at_ = at(h, IOVA + DATA), *end = at_ + MIB; at_ < end; at_ += 4)
        seen |= memcmp(at_, secret, 4) == 0 || memcmp(at_, secret + 8, 4) == 0;
    ck_assert(!seen);
}

/* One guest's data are in blocks that the next one, another, doesn't read. Whatever it does, it never sees a byte of them. */
START_TEST(next_guest)
{
    host h;
    setup_with(&h, (kind)_i, NULL, NULL);
    enable(&h);
    create_pair(&h, 1, RING);
    for (unsigned i = 0; i < MIB; i += 16)
        memcpy(at(&h, IOVA + DATA + i), secret, 16);
    for (unsigned round = 0; round < 4; round++) { /* through all the workers */
        for (unsigned i = 1; i < RING; i++)
            enqueue(&h, 1, transfer(&h, WRITE, 65536 + i * 2048, 2048, IOVA + DATA, MIB, IOVA + LISTS));
        ring_sq(&h, 1);
        for (unsigned i = 1; i < RING; i++)
            ck_assert_uint_eq(status_of(reap(&h, 1)), 0);
    }
    disconnect_disk(&h);
    memset(h.memory, 0, MEMORY);
    connect_disk(&h);
    enable(&h);
    create_pair(&h, 1, RING);
    for (unsigned round = 0; round < 12; round++) {
        uint32_t len = 512u << round;
        len = len > MIB ? MIB : len;
        run(&h, 1, transfer(&h, READ, 0, len / 512, IOVA + DATA, len, IOVA + LISTS));
        check_no_secret(&h);
        run(&h, 1, transfer(&h, READ, 131072 - len / 1024, len / 512, IOVA + DATA, len, IOVA + LISTS)); /* half behind the end */
        check_no_secret(&h);
        run(&h, 1, (sqe){.opcode = DATASET_MANAGEMENT, .nsid = 1, .prp1 = IOVA + DATA, .dw10 = 255, .dw11 = 4});
        identify(&h, round, round % 2, NULL);
        check_no_secret(&h);
        get_log(&h, (uint8_t)(round % 6), MIB, round % 2, 0);
        check_no_secret(&h);
        get_log(&h, (uint8_t)(round % 6), 4u << round, 0, 0);
        check_no_secret(&h);
    }
    teardown(&h);
}
END_TEST

/* Memory is unmapped while the disk reads into it. When the unmap is answered, nothing is written there any more. */
START_TEST(unmap_in_mid_flight)
{
    host h;
    uint64_t iova = IOVA + MEMORY;
    unsigned good = 0, refused = 0;
    setup_with(&h, (kind)_i, NULL, NULL);
    enable(&h);
    create_pair(&h, 1, RING);
    int fd = memfd("moving", MIB, _i == GUARDED ? 0 : F_SEAL_SHRINK | F_SEAL_GROW);
    uint8_t *moving = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert(moving != MAP_FAILED);
    for (unsigned round = 0; round < 60; round++) {
        ck_assert_int_eq(vfu_client_dma_map(h.client, iova, MIB, 3, moving, _i == BY_MESSAGE ? -1 : fd, 0), 0);
        unsigned count = 1 + round % 8;
        for (uint64_t page = 0; page < 256; page++) {
            uint64_t address = iova + page * PAGE;
            memcpy(at(&h, IOVA + LISTS + page * 8), &address, 8);
        }
        for (unsigned i = 0; i < count; i++)
            enqueue(&h, 1,
                    (sqe){.opcode = READ,
                          .nsid = 1,
                          .prp1 = iova + i * (MIB / 8),
                          .prp2 = IOVA + LISTS + i * 256 + 8,
                          .dw12 = MIB / 8 / 512 - 1});
        ring_sq(&h, 1);
        if (round % 3)
            must(vfu_client_serve(h.client, -1, (int)(round % 3)));
        must(vfu_client_dma_unmap(h.client, iova, MIB));
        memset(moving, 0x66, MIB);
        for (unsigned i = 0; i < count; i++) {
            unsigned status = status_of(reap(&h, 1));
            ck_assert_msg(status == 0 || status == DATA_TRANSFER_ERROR, "status 0x%x", status);
            *(status ? &refused : &good) += 1;
        }
        for (unsigned i = 0; i < MIB; i += 64)
            ck_assert_uint_eq(moving[i], 0x66);
    }
    ck_assert_uint_gt(good + refused, 0);
    munmap(moving, MIB);
    close(fd);
    teardown(&h);
}
END_TEST

static uint64_t some_address(chance *c)
{
    switch (below(c, 8)) {
    case 0: return draw(c);
    case 1: return UINT64_MAX - below(c, 8192);
    case 2: return IOVA + below(c, MEMORY);
    case 3: return IOVA + LISTS + below(c, 64) * 8;
    case 4: return below(c, 2) * (uint64_t)PAGE;
    default: return IOVA + below(c, MEMORY / PAGE) * (uint64_t)PAGE;
    }
}

static sqe some_command(chance *c)
{
    static const uint8_t opcodes[] = {0, 1, 1, 2, 2, 2, 4, 5, 5, 6, 8, 9, 10, 12, 0x80};
    return (sqe){
        .opcode = opcodes[below(c, COUNT(opcodes))],
        .cid = (uint16_t)below(c, 64),
        .nsid = below(c, 8) ? 1 : (uint32_t)draw(c),
        .prp1 = some_address(c),
        .prp2 = some_address(c),
        .dw10 = below(c, 2)   ? below(c, 5) | below(c, 40) << 16
                : below(c, 4) ? below(c, 130000)
                              : (uint32_t)draw(c),
        .dw11 = below(c, 2)   ? below(c, 6) << 16 | below(c, 8)
                : below(c, 4) ? 0
                              : (uint32_t)draw(c),
        .dw12 = below(c, 4) ? below(c, 256) : (uint32_t)draw(c),
    };
}

static void some_commands(host *h, chance *c, unsigned id)
{
    for (unsigned i = below(c, 8) + 1; i; i--) {
        sqe entry = some_command(c);
        memcpy(at(h, IOVA + SQS + id * 0x10000 + below(c, 40) * sizeof(entry)), &entry, sizeof(entry));
    }
    set32(h, DOORBELLS + id * 8, below(c, 40));
    set32(h, DOORBELLS + id * 8 + 4, below(c, 16));
}

/* A driver without sense: it does anything at any time. Each access is answered, and in the end the disk can be used. */
START_TEST(at_random)
{
    const uint64_t half = MEMORY / 2;
    host h;
    chance c = seeded((uint64_t)_i + 100);
    setup_with(&h, (kind)(_i % KINDS), NULL, NULL);
    for (unsigned step = 0; step < (_i % KINDS == BY_MESSAGE ? 400 : 2000); step++) {
        switch (below(&c, 16)) {
        case 0: set32(&h, CC, below(&c, 4) ? ENABLE | below(&c, 2) << (14 + below(&c, 2)) : (uint32_t)draw(&c)); break;
        case 1: set32(&h, CC, 0); break;
        case 2: set32(&h, AQA, below(&c, 40) << 16 | below(&c, 40)); break;
        case 3: set64(&h, below(&c, 2) ? ASQ : ACQ, some_address(&c)); break;
        case 4:
        case 5: enable(&h); break;
        case 6: set_master(&h, below(&c, 4)); break;
        case 7:
            if (below(&c, 4) == 0)
                ck_assert_int_eq(vfu_client_reset(h.client), 0);
            set_master(&h, true);
            break;
        case 8:
            must(vfu_client_dma_unmap(h.client, IOVA + half, half));
            must(vfu_client_dma_map(h.client, IOVA + half, half, 1 + below(&c, 3), h.memory + half, h.memory_fd, half));
            break;
        case 9: set32(&h, DOORBELLS + below(&c, 16) * 4, below(&c, 4) ? below(&c, 40) : (uint32_t)draw(&c)); break;
        default: some_commands(&h, &c, below(&c, QUEUES + 1)); break;
        }
        if (h.memory_fd < 0)
            must(vfu_client_serve(h.client, -1, 1));
    }
    ck_assert_int_eq(vfu_client_reset(h.client), 0);
    must(vfu_client_dma_unmap(h.client, IOVA, MEMORY));
    must(vfu_client_dma_map(h.client, IOVA, MEMORY, 3, h.memory, h.memory_fd, 0));
    set_master(&h, true);
    check_usable(&h);
    teardown(&h);
}
END_TEST

/* ---- reset and loss -------------------------------------------------------------------------------------------------------- */

/* The image, read around the device. */
static void check_image(host *h, uint64_t offset, const void *bytes, size_t len)
{
    static uint8_t found[MIB];
    int fd = open(h->image, O_RDONLY | O_CLOEXEC);
    must(fd);
    ck_assert_int_eq(pread(fd, found, len, (off_t)offset), (ssize_t)len);
    ck_assert_mem_eq(found, bytes, len);
    close(fd);
}

/* Whatever ends everything in mid-flight: what was acknowledged is on the disk, nothing is written into memory or queues any more, and
 * the controller can be used again. */
START_TEST(interrupted)
{
    enum { DISABLE, RESET, FLR, LEAVE, WAYS };
    host h;
    kind memory = (kind)(_i % KINDS);
    unsigned way = (unsigned)_i / KINDS;
    setup_with(&h, memory, NULL, NULL);
    for (unsigned round = 0; round < 25; round++) {
        uint32_t len = 32 << 10, acknowledged = 0, acked[15];
        cqe done;
        enable(&h);
        create_pair(&h, 1, RING);
        for (unsigned i = 0; i < 15; i++) {
            fill(&h, IOVA + DATA + i * len, len, round * 100 + i);
            sqe entry = transfer(&h, WRITE, i * (len / 512), len / 512, IOVA + DATA + i * len, len, IOVA + LISTS + i * PAGE);
            if (i % 5 == 3)
                entry = (sqe){.opcode = FLUSH, .nsid = 1};
            if (i % 5 == 4)
                entry = (sqe){.opcode = WRITE_ZEROES, .nsid = 1, .dw10 = 100000 - i * 1000, .dw12 = 999};
            enqueue(&h, 1, entry);
        }
        uint16_t first = (uint16_t)(h.cid - 14);
        ring_sq(&h, 1);
        for (unsigned ms = 0; acknowledged < round % 16 && acknowledged < 15; ms++) {
            ck_assert_uint_lt(ms, PATIENCE_MS);
            must(vfu_client_serve(h.client, h.events[1], 1));
            signals(h.events[1]);
            while (peek(&h, 1, &done)) {
                ck_assert_uint_eq(status_of(done), 0);
                acked[acknowledged++] = (uint16_t)(done.cid - first);
            }
        }
        if (way == DISABLE) {
            set32(&h, CC, 0);
            wait_for(&h, RDY, 0);
        } else if (way == RESET) {
            ck_assert_int_eq(vfu_client_reset(h.client), 0);
        } else if (way == FLR) {
            uint8_t express;
            uint16_t flr = 0x8000;
            ck_assert_int_eq(vfu_client_region_read(h.client, VFU_PCI_REGION_CONFIG, 0x34, &express, 1), 0);
            for (uint8_t id = 0; id != 0x10;) {
                ck_assert_int_eq(vfu_client_region_read(h.client, VFU_PCI_REGION_CONFIG, express, &id, 1), 0);
                if (id != 0x10)
                    ck_assert_int_eq(vfu_client_region_read(h.client, VFU_PCI_REGION_CONFIG, express + 1u, &express, 1), 0);
            }
            set_master(&h, false);
            ck_assert_int_eq(vfu_client_region_write(h.client, VFU_PCI_REGION_CONFIG, express + 8u, &flr, 2), 0);
        } else {
            disconnect_disk(&h);
            connect_disk(&h); /* is greeted when the other is gone */
        }
        if (way != DISABLE)
            ck_assert_uint_eq(get32(&h, CC), 0);
        ck_assert_uint_eq(get32(&h, CSTS), 0);
        while (peek(&h, 1, &done)) /* acknowledged in the last moment */
            acked[acknowledged++] = (uint16_t)(done.cid - first);
        for (unsigned i = 0; i < acknowledged; i++)
            if (acked[i] % 5 < 3)
                check_image(&h, acked[i] * len, at(&h, IOVA + DATA + acked[i] * len), len);
        must(vfu_client_serve(h.client, -1, 1));
        ck_assert(!peek(&h, 1, &done));
        set_master(&h, true);
    }
    check_usable(&h);
    teardown(&h);
}
END_TEST

/* The controller is disabled while it takes commands that it keeps, event requests and deletions of queues in use. */
START_TEST(disabled_at_once)
{
    host h;
    setup_with(&h, _i ? BY_MESSAGE : PINNED, NULL, NULL);
    for (unsigned round = 0; round < 200; round++) {
        enable(&h);
        create_pair(&h, 1, RING);
        for (unsigned i = 0; i < 8; i++)
            enqueue(&h, 1, (sqe){.opcode = FLUSH, .nsid = 1});
        ring_sq(&h, 1);
        for (unsigned i = 0; i < 3; i++)
            enqueue(&h, 0, (sqe){.opcode = EVENT_REQUEST});
        enqueue(&h, 0, (sqe){.opcode = DELETE_SQ, .dw10 = 1});
        ring_sq(&h, 0);
        if (_i && round % 4)
            must(vfu_client_serve(h.client, -1, (int)(round % 4) - 1));
        set32(&h, CC, 0);
        wait_for(&h, RDY, 0);
    }
    check_usable(&h);
    teardown(&h);
}
END_TEST

/* The same program is killed: what was acknowledged is in the file, what was flushed would survive the machine, and the next one
 * shows the same disk. */
START_TEST(killed)
{
    host h;
    uint8_t before[PAGE], after[PAGE];
    int status;
    setup(&h);
    ck_assert_uint_eq(identify(&h, 1, 0, before), 0);
    fill(&h, IOVA + DATA, MIB, 77);
    ck_assert_uint_eq(run(&h, 1, transfer(&h, WRITE, 5000, 2048, IOVA + DATA, MIB, IOVA + LISTS)), 0);
    ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = FLUSH, .nsid = 1}), 0);
    must(kill(h.disk.pid, SIGKILL));
    ck_assert_int_eq(waitpid(h.disk.pid, &status, 0), h.disk.pid);
    disconnect_disk(&h);
    close(h.disk.log);
    check_image(&h, 5000 * 512, at(&h, IOVA + DATA), MIB);
    start_disk(&h);
    connect_disk(&h);
    check_usable(&h);
    ck_assert_uint_eq(identify(&h, 1, 0, after), 0);
    ck_assert_mem_eq(before, after, PAGE);
    teardown(&h);
}
END_TEST

/* The end of the program with commands under way, also while threads wait for answers that don't come. */
START_TEST(terminated_in_mid_flight)
{
    for (unsigned i = 0; i < 10; i++) {
        host h;
        setup_with(&h, i % 2 ? BY_MESSAGE : PINNED, NULL, NULL);
        enable(&h);
        create_pair(&h, 1, RING);
        for (unsigned k = 0; k < 10; k++)
            enqueue(&h, 1, transfer(&h, WRITE, 0, 2048, IOVA + DATA, MIB, IOVA + LISTS));
        ring_sq(&h, 1);
        must(vfu_client_serve(h.client, -1, (int)i));
        uint64_t began = now_ms();
        stop_engine(&h.disk);
        ck_assert_uint_lt(now_ms() - began, 5000);
        h.disk.pid = 0;
        teardown(&h);
    }
}
END_TEST

/* The shared page: its doorbells are noticed, and a reset clears it. */
START_TEST(mapped_doorbells)
{
    host h;
    setup_with(&h, PINNED, "--doorbells=mapped", NULL);
    map_doorbells(&h);
    for (unsigned round = 0; round < 3; round++) {
        enable(&h);
        create_pair(&h, 1, 16);
        for (unsigned i = 0; i < 40; i++)
            ck_assert_uint_eq(run(&h, 1, transfer(&h, READ, i, 8, IOVA + DATA, PAGE, 0)), 0);
        ck_assert_uint_eq(atomic_load(&h.page[2]), 40 % 16);
        if (round == 1) {
            struct timespec idle = {.tv_nsec = 200000000}; /* it has gone to sleep by then */
            nanosleep(&idle, NULL);
            ck_assert_uint_eq(run(&h, 1, (sqe){.opcode = FLUSH, .nsid = 1}), 0);
        }
        /* a queue that is made again starts at 0, whatever its doorbell was */
        ck_assert_uint_eq(run(&h, 0, (sqe){.opcode = DELETE_SQ, .dw10 = 1}), 0);
        ck_assert_uint_eq(run(&h, 0, (sqe){.opcode = DELETE_CQ, .dw10 = 1}), 0);
        create_pair(&h, 1, 16);
        for (unsigned i = 0; i < 40 % 16 + (round == 1); i++)
            enqueue(&h, 1, (sqe){.opcode = FLUSH, .nsid = 1});
        ring_sq(&h, 1);
        for (unsigned i = 0; i < 40 % 16 + (round == 1); i++)
            ck_assert_uint_eq(status_of(reap(&h, 1)), 0);
        set32(&h, CC, 0);
        wait_for(&h, RDY, 0);
        for (unsigned i = 0; i < PAGE / 4; i++)
            ck_assert_uint_eq(atomic_load(&h.page[i]), 0);
    }
    teardown(&h);
}
END_TEST

/* ---- the program ----------------------------------------------------------------------------------------------------------- */

/* Runs it to its end, and returns its exit status; text gets what it says. */
static int run_program(const char *const *options, char *text, size_t room)
{
    child c;
    struct sockaddr_un address;
    socklen_t len;
    int status;
    start_example(&c, "nvme", options, &address, &len);
    ck_assert_int_eq(waitpid(c.pid, &status, 0), c.pid);
    ssize_t n = pread(c.log, text, room - 1, 0);
    must(n);
    text[n] = 0;
    close(c.log);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void make_image(const char *path, off_t size)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    must(fd);
    must(ftruncate(fd, size));
    close(fd);
}

START_TEST(images)
{
    static const struct {
        off_t size; /* -1: there is none */
        const char *options[3];
        const char *said;
    } cases[] = {
        {-1, {NULL}, "can't be opened: No such file"},
        {-1, {"--read-only"}, "can't be opened: No such file"},
        {0, {NULL}, "is empty"},
        {1000, {NULL}, "no multiple of the block size"},
        {512, {"--block-size=4096"}, "no multiple of the block size"},
        {-1, {"--size=1000"}, "no multiple of the block size"},
        {1 << 20, {"--size=512K"}, "larger than --size"},
    };
    char path[64], image[80], text[4096];
    snprintf(path, sizeof(path), "/tmp/vfu-nvme-%d.img", (int)getpid());
    snprintf(image, sizeof(image), "--image=%s", path);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        const char *options[] = {image, cases[i].options[0], cases[i].options[1], NULL};
        struct stat st;
        unlink(path);
        if (cases[i].size >= 0)
            make_image(path, cases[i].size);
        ck_assert_int_eq(run_program(options, text, sizeof(text)), 1);
        ck_assert_msg(strstr(text, path) && strstr(text, cases[i].said), "case %u: %s", i, text);
        ck_assert_int_eq(stat(path, &st), cases[i].size < 0 ? -1 : 0); /* what is refused leaves nothing behind */
        ck_assert(cases[i].size < 0 || st.st_size == cases[i].size);
    }
    const char *directory[] = {"--image=/tmp", "--read-only", NULL};
    ck_assert_int_eq(run_program(directory, text, sizeof(text)), 1);
    ck_assert_ptr_nonnull(strstr(text, "is no file and no block device"));
    unlink(path);
}
END_TEST

/* One writer, or any number of readers. */
START_TEST(busy_image)
{
    host h;
    char text[4096];
    setup(&h);
    const char *writer[] = {h.image_option, NULL}, *reader[] = {h.image_option, "--read-only", NULL};
    ck_assert_int_eq(run_program(writer, text, sizeof(text)), 1);
    ck_assert_ptr_nonnull(strstr(text, "another program uses it"));
    ck_assert_int_eq(run_program(reader, text, sizeof(text)), 1);
    ck_assert_ptr_nonnull(strstr(text, "another program uses it"));
    disconnect_disk(&h);
    stop_engine(&h.disk);
    h.options[1] = "--read-only";
    start_disk(&h);
    connect_disk(&h);
    child second;
    struct sockaddr_un address;
    socklen_t len;
    start_example(&second, "nvme", reader, &address, &len);
    vfu_client *client;
    ck_assert_int_eq(vfu_client_attach(&client, connect_to(&address, len), NULL), 0);
    ck_assert_int_eq(run_program(writer, text, sizeof(text)), 1);
    vfu_client_destroy(client);
    stop_engine(&second);
    teardown(&h);
}
END_TEST

START_TEST(options)
{
    static const char *const wrong[][4] = {
        {NULL},
        {"--image=x", "--size=0"},
        {"--image=x", "--size=12X"},
        {"--image=x", "--size=-1"},
        {"--image=x", "--size=99999999T"},
        {"--image=x", "--block-size=1024"},
        {"--image=x", "--queues=0"},
        {"--image=x", "--queues=65"},
        {"--image=x", "--queues=1K"},
        {"--image=x", "--doorbells=some"},
        {"--image=x", "--read-only", "--size=1M"},
        {"--image=x", "--socket-path=/nowhere"},
        {"--image=x", "more"},
        {"--image=x", "--what"},
    };
    char text[4096];
    for (unsigned i = 0; i < COUNT(wrong); i++) {
        ck_assert_int_eq(run_program(wrong[i], text, sizeof(text)), 2);
        ck_assert_ptr_nonnull(strstr(text, "usage: "));
    }
    const char *help[] = {"--help", NULL};
    ck_assert_int_eq(run_program(help, text, sizeof(text)), 0);
}
END_TEST

/* As many queues as there can be. */
START_TEST(sixty_four_queues)
{
    host h;
    setup_with(&h, PINNED, "--queues=64", NULL);
    enable(&h);
    uint32_t result;
    ck_assert_uint_eq(feature(&h, SET_FEATURES, 7, 0x003f003f, &result), 0);
    ck_assert_uint_eq(result, 0x003f003f);
    int event64 = event();
    ck_assert_int_eq(vfu_client_irq_assign(h.client, VFU_PCI_IRQ_MSIX, 64, 1, &event64), 0);
    uint64_t sq = IOVA + 4 * MIB, cq = IOVA + 5 * MIB;
    for (uint32_t id = 1; id <= 64; id++) {
        ck_assert_uint_eq(run(&h, 0,
                              (sqe){.opcode = CREATE_CQ, .prp1 = cq + id * PAGE, .dw10 = 15 << 16 | id, .dw11 = id << 16 | 3}),
                          0);
        ck_assert_uint_eq(run(&h, 0,
                              (sqe){.opcode = CREATE_SQ, .prp1 = sq + id * PAGE, .dw10 = 15 << 16 | id, .dw11 = id << 16 | 1}),
                          0);
    }
    for (unsigned id = 1; id <= 64; id++) {
        sqe entry = {.opcode = READ, .cid = (uint16_t)id, .nsid = 1, .prp1 = IOVA + DATA};
        memcpy(at(&h, sq + id * PAGE), &entry, sizeof(entry));
        doorbell(&h, id * 2, 1);
    }
    for (unsigned id = 1; id <= 64; id++) {
        cqe *entry = at(&h, cq + id * PAGE);
        for (unsigned ms = 0; !(__atomic_load_n(&entry->status, __ATOMIC_ACQUIRE) & 1); ms++) {
            ck_assert_uint_lt(ms, PATIENCE_MS);
            must(vfu_client_serve(h.client, -1, 1));
        }
        ck_assert_uint_eq(entry->cid, id);
        ck_assert_uint_eq(status_of(*entry), 0);
    }
    struct pollfd ready = {.fd = event64, .events = POLLIN};
    ck_assert_int_eq(poll(&ready, 1, PATIENCE_MS), 1);
    close(event64);
    teardown(&h);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("nvme");
    TCase *controller = tcase_create("controller");
    tcase_add_test(controller, registers);
    tcase_add_test(controller, enable_with_nonsense);
    tcase_add_test(controller, queue_memory_taken_away);
    tcase_add_loop_test(controller, shutdown_notification, 0, 2);
    tcase_add_loop_test(controller, identify_data, 0, 2);
    tcase_add_test(controller, features);
    tcase_add_test(controller, logs);
    suite_add_tcase(suite, controller);
    TCase *io = tcase_create("io");
    tcase_add_loop_test(io, write_and_read, 0, 2 * KINDS);
    tcase_add_loop_test(io, prp_shapes, 0, 2);
    tcase_add_loop_test(io, bad_io, 0, 2);
    tcase_add_test(io, read_only_image);
    tcase_add_test(io, image_cut);
    tcase_add_loop_test(io, zeros, 0, 2);
    tcase_add_test(io, write_through);
    tcase_add_test(io, poor_file_system);
    suite_add_tcase(suite, io);
    TCase *queues = tcase_create("queues");
    tcase_add_test(queues, bad_queues);
    tcase_add_test(queues, shared_completion_queue);
    tcase_add_loop_test(queues, full_completion_queue, 0, 2);
    tcase_add_test(queues, delete_in_use);
    tcase_add_loop_test(queues, absurd_doorbells, 0, 2);
    tcase_add_test(queues, event_requests);
    tcase_add_test(queues, abort_io);
    tcase_add_test(queues, event_requests_in_a_small_queue);
    tcase_add_test(queues, image_grows);
    tcase_add_test(queues, bus_master);
    tcase_add_test(queues, interrupts);
    tcase_add_test(queues, sixty_four_queues);
    tcase_add_test(queues, mapped_doorbells);
    suite_add_tcase(suite, queues);
    TCase *trouble = tcase_create("trouble");
    tcase_add_loop_test(trouble, rewritten_entries, 0, 2);
    tcase_add_test(trouble, fetched_once);
    tcase_add_loop_test(trouble, next_guest, 0, KINDS);
    tcase_add_loop_test(trouble, unmap_in_mid_flight, 0, KINDS);
    tcase_add_loop_test(trouble, at_random, 0, 2 * KINDS);
    tcase_add_loop_test(trouble, interrupted, 0, 4 * KINDS);
    tcase_add_loop_test(trouble, disabled_at_once, 0, 2);
    tcase_add_test(trouble, killed);
    tcase_add_test(trouble, terminated_in_mid_flight);
    suite_add_tcase(suite, trouble);
    TCase *program = tcase_create("program");
    tcase_add_test(program, images);
    tcase_add_test(program, busy_image);
    tcase_add_test(program, options);
    suite_add_tcase(suite, program);
    return run_suite(suite);
}
