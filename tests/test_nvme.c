/* SPDX-License-Identifier: MIT */
/*
 * The example disk as a process, and a driver for it: queues in memory that is shared with it or that only messages reach, commands,
 * completions, interrupts. What a driver may do wrong gets the status code that the NVM Express base specification 1.4 wants.
 */
#include "caller.h"

#include <sys/file.h>

enum { RING = 16, MEMORY = 16 << 20, DATA = 1 << 20, QUEUES = 4, MIB = 1 << 20 };
#define IOVA UINT64_C(0x100000000)

/* Where the driver's memory has what. Each queue has 64 KiB for its submissions and 16 KiB for its completions. */
enum { SQS = 0x0, CQS = 0x80000, LISTS = 0xc0000 };

enum { CAP = 0x00, VS = 0x08, CC = 0x14, CSTS = 0x1c, AQA = 0x24, ASQ = 0x28, ACQ = 0x30, DOORBELLS = 0x1000 };
enum { ENABLE = 0x460001, RDY = 1, CFS = 2, SHST = 0xc };
enum { DELETE_SQ, CREATE_SQ, GET_LOG, DELETE_CQ = 4, CREATE_CQ, IDENTIFY, ABORT = 8, SET_FEATURES, GET_FEATURES, EVENT_REQUEST = 12 };
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
    char image[64];
    const char *options[12];
    uint8_t *memory;
    int memory_fd; /* -1: only messages reach it */
    ring rings[QUEUES + 1];
    int events[QUEUES + 1];
    uint16_t cid;
    bool reached;
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
    h->rings[id] = (ring){.sq = IOVA + SQS + id * 0x10000, .cq = IOVA + CQS + id * 0x4000, .sq_entries = sq_entries,
                          .cq_entries = cq_entries, .phase = 1};
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

static void ring_sq(host *h, unsigned id) { set32(h, DOORBELLS + id * 8, h->rings[id].tail); }
static void ring_cq(host *h, unsigned id) { set32(h, DOORBELLS + id * 8 + 4, h->rings[id].head); }

/* Puts a command into its queue, and returns its identifier. */
static uint16_t submit(host *h, unsigned id, sqe entry)
{
    ring *r = &h->rings[id];
    entry.cid = ++h->cid;
    memcpy(at(h, r->sq + r->tail * sizeof(entry)), &entry, sizeof(entry));
    r->tail = (r->tail + 1) % r->sq_entries;
    ring_sq(h, id);
    return entry.cid;
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
    return run(h, 0, (sqe){.opcode = CREATE_CQ, .prp1 = h->rings[id].cq, .dw10 = (entries - 1) << 16 | id, .dw11 = vector << 16 | 3});
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
    sqe entry = {.opcode = opcode, .nsid = 1, .prp1 = iova, .dw10 = (uint32_t)lba, .dw11 = (uint32_t)(lba >> 32), .dw12 = blocks - 1};
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

static void start_disk(host *h)
{
    start_example(&h->disk, "nvme", h->options, &h->address, &h->address_len);
}

static void connect_disk(host *h)
{
    ck_assert_int_eq(vfu_client_attach(&h->client, connect_to(&h->address, h->address_len), NULL), 0);
    ck_assert_int_eq(vfu_client_dma_map(h->client, IOVA, MEMORY, VFU_IOMMU_READ | VFU_IOMMU_WRITE, h->memory, h->memory_fd, 0), 0);
    ck_assert_int_eq(vfu_client_irq_assign(h->client, VFU_PCI_IRQ_MSIX, 0, QUEUES + 1, h->events), 0);
    set_master(h, true);
}

static void setup_with(host *h, bool by_message, const char *const *options)
{
    static char image[80];
    *h = (host){.memory_fd = -1};
    snprintf(h->image, sizeof(h->image), "/tmp/vfu-nvme-%d.img", (int)getpid());
    unlink(h->image);
    snprintf(image, sizeof(image), "--image=%s", h->image);
    unsigned count = 0;
    h->options[count++] = image;
    h->options[count++] = "--size=64M";
    h->options[count++] = "--queues=4";
    for (; options && *options; options++)
        h->options[count++] = *options;
    int fd = memfd("memory", MEMORY, F_SEAL_SHRINK | F_SEAL_GROW);
    h->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert(h->memory != MAP_FAILED);
    if (by_message)
        close(fd);
    else
        h->memory_fd = fd;
    for (unsigned i = 0; i <= QUEUES; i++)
        h->events[i] = event();
    start_disk(h);
    connect_disk(h);
}

static void teardown(host *h)
{
    vfu_client_destroy(h->client);
    stop_engine(&h->disk);
    close_fds(h->events, QUEUES + 1);
    munmap(h->memory, MEMORY);
    if (h->memory_fd >= 0)
        close(h->memory_fd);
    unlink(h->image);
}

START_TEST(write_and_read)
{
    host h;
    setup_with(&h, _i == 1, NULL);
    ck_assert_uint_eq(get64(&h, CAP), UINT64_C(0x20280103ff));
    enable(&h);
    for (unsigned id = 1; id <= 2; id++)
        create_pair(&h, id, RING);
    for (unsigned id = 1; id <= 2; id++) {
        uint32_t len = 128 << 10;
        uint64_t from = IOVA + DATA, to = IOVA + DATA + 2 * MIB;
        for (uint32_t i = 0; i < len; i++)
            *(uint8_t *)at(&h, from + i) = (uint8_t)(i * 7 + id + i / 256);
        ck_assert_uint_eq(run(&h, id, transfer(&h, WRITE, 100, len / 512, from, len, IOVA + LISTS)), 0);
        ck_assert_uint_eq(run(&h, id, transfer(&h, READ, 100, len / 512, to, len, IOVA + LISTS)), 0);
        ck_assert_mem_eq(at(&h, from), at(&h, to), len);
    }
    teardown(&h);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("nvme");
    TCase *tests = tcase_create("nvme");
    tcase_set_timeout(tests, 60);
    tcase_add_loop_test(tests, write_and_read, 0, 2);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
