/* SPDX-License-Identifier: MIT */
/*
 * ==== device ==== what is read from the client's memory is read once
 *
 * SPDK's NVMe target checked a field in guest memory and read it again afterwards. Here the example disk finds commands, page lists
 * and ranges in memory that only messages reach, so that each fetch is seen; as soon as a byte has been fetched it becomes another one,
 * which is as good. A second fetch shows twice: in the count, and by what the disk does then. (The other example devices find their
 * operands in registers.)
 */
#include "caller.h"

enum { MEMORY = 1 << 20, RING = 8, DATA = 0x40000, DECOY = 0x80000, LISTS = 0x20000, DISK = 1 << 20, BLOCK = 512 };
#define IOVA UINT64_C(0x10000000)

/* Where the rings are. */
enum { ADMIN_SQ = 0x1000, ADMIN_CQ = 0x2000, IO_SQ = 0x3000, IO_CQ = 0x4000 };
enum { CC = 0x14, CSTS = 0x1c, AQA = 0x24, ASQ = 0x28, ACQ = 0x30, DOORBELLS = 0x1000 };
enum { CREATE_SQ = 1, CREATE_CQ = 5, IDENTIFY = 6, WRITE = 1, READ = 2, DATASET_MANAGEMENT = 9 };

static caller C;
static child disk;
static char image[64];
static uint16_t tails[2], heads[2], next_cid;
static bool settled;
static uint8_t fetched[MEMORY];         /* how often each byte was */
static uint64_t watched[2], watched_len[2]; /* offsets into memory; what is fetched there becomes another byte */

/* ---- the driver -------------------------------------------------------------------------------------------------------- */

/* Something else for each byte at once: addresses still lie in the memory, or what was there is doubled. */
static void spoil(uint64_t at, uint64_t count)
{
    for (unsigned w = 0; w < 2; w++)
        for (uint64_t i = at; i < at + count; i++)
            if (i >= watched[w] && i - watched[w] < watched_len[w])
                C.memory[i] ^= (i & 7) == 2 ? (DATA ^ DECOY) >> 16 : (i & 7) == 0 ? 1 : 0;
}

/* The reply to the request with this id; DMA is served until it comes. */
static void serve_until(uint16_t id)
{
    for (;;) {
        vfu_msg m;
        ck_assert_int_eq(peer_wait(&C.p), 1);
        ck_assert_int_eq(vfu_msg_decode(C.p.bytes, C.p.have, &m), 0);
        if (vfu_msg_is_reply(&m)) {
            ck_assert_uint_eq(m.id, id);
            ck_assert(!vfu_msg_is_error(&m));
            C.reply = m;
            return;
        }
        answer_dma(&C, &m, 0);
        if (m.cmd != VFU_CMD_DMA_READ)
            continue;
        for (uint64_t i = 0; i < m.u.dma.count; i++)
            fetched[m.u.dma.address - IOVA + i]++;
        spoil(m.u.dma.address - IOVA, m.u.dma.count);
    }
}

static void set32(uint64_t offset, uint32_t value)
{
    const uint8_t bytes[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};
    vfu_msg m = access_of(VFU_CMD_REGION_WRITE, 0, offset, bytes, 4);
    serve_until(post(&C, &m, NULL, 0));
}

static uint32_t get32(uint64_t offset)
{
    vfu_msg m = access_of(VFU_CMD_REGION_READ, 0, offset, NULL, 4);
    serve_until(post(&C, &m, NULL, 0));
    const uint8_t *b = C.reply.u.region.data;
    return b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

static void store(uint64_t at, uint64_t value, unsigned width)
{
    for (unsigned i = 0; i < width; i++)
        C.memory[at + i] = (uint8_t)(value >> 8 * i);
}

static void wait_for(uint64_t offset, uint32_t mask, uint32_t value)
{
    for (unsigned ms = 0; (get32(offset) & mask) != value; ms++) {
        ck_assert_uint_lt(ms, PATIENCE_MS);
        poll(NULL, 0, 1);
    }
}

/* Does a command of an admin (0) or I/O queue (1), whose bytes are watched as is what it names. Its status, with its type. */
static unsigned run(unsigned queue, uint8_t opcode, uint64_t prp1, uint64_t prp2, uint32_t dw10, uint32_t dw11, uint32_t dw12)
{
    uint64_t sqe = (queue ? IO_SQ : ADMIN_SQ) + tails[queue] * 64u, cqe = (queue ? IO_CQ : ADMIN_CQ) + heads[queue] * 16u;
    uint16_t cid = (uint16_t)(++next_cid * 2); /* the spoilt one is odd */
    memset(C.memory + sqe, 0, 64);
    store(sqe, opcode, 1);
    store(sqe + 2, cid, 2);
    store(sqe + 4, queue, 4);
    store(sqe + 24, prp1, 8);
    store(sqe + 32, prp2, 8);
    store(sqe + 40, dw10, 4);
    store(sqe + 44, dw11, 4);
    store(sqe + 48, dw12, 4);
    memset(C.memory + cqe, 0, 16);
    memset(fetched, 0, sizeof(fetched));
    watched[0] = sqe;
    watched_len[0] = settled ? 64 : 0;
    tails[queue]++;
    ck_assert_uint_lt(tails[queue], RING);
    set32(DOORBELLS + 8 * queue, tails[queue]);
    for (unsigned ms = 0; !(C.memory[cqe + 14] & 1); ms++) {
        ck_assert_uint_lt(ms, PATIENCE_MS);
        get32(CSTS);
        poll(NULL, 0, 1);
    }
    heads[queue]++;
    set32(DOORBELLS + 8 * queue + 4, heads[queue]);
    ck_assert_int_eq(C.memory[cqe + 12] | C.memory[cqe + 13] << 8, cid);
    for (unsigned i = 0; i < 64 && settled; i++)
        ck_assert_msg(fetched[sqe + i] == 1, "byte %u of a command was fetched %u times", i, fetched[sqe + i]);
    return (C.memory[cqe + 14] | (unsigned)C.memory[cqe + 15] << 8) >> 1 & 0x7ff;
}

static void watch(uint64_t at, uint64_t len)
{
    watched[1] = at;
    watched_len[1] = len;
}

/* All of what is watched beside the command was fetched, and once. */
static void check_watched(void)
{
    for (uint64_t i = 0; i < watched_len[1]; i++)
        ck_assert_msg(fetched[watched[1] + i] == 1, "byte %u of a list was fetched %u times", (unsigned)i, fetched[watched[1] + i]);
    watch(0, 0);
}

static void open_disk(void)
{
    struct sockaddr_un address;
    socklen_t len;
    char option[80];
    snprintf(image, sizeof(image), "/tmp/vfu-fetch-%d.img", (int)getpid());
    snprintf(option, sizeof(option), "--image=%s", image);
    start_example(&disk, "nvme", (const char *const[]){option, "--size=1M", "--queues=1", NULL}, &address, &len);
    C = (caller){.p = {.sock = connect_to(&address, len)}};
    make_memory(&C, IOVA, MEMORY);
    watch(0, 0);
    say_hello(&C, NULL);
    vfu_msg map = map_of(IOVA, MEMORY);
    ck_assert_int_eq(call(&C, &map), 0);
    const uint8_t command[2] = {6, 0}; /* memory and bus master */
    put(&C, VFU_PCI_REGION_CONFIG, 4, command, 2);
    memset(tails, 0, sizeof(tails));
    memset(heads, 0, sizeof(heads));
    memset(C.memory + ADMIN_CQ, 0, PAGE);
    memset(C.memory + IO_CQ, 0, PAGE);
    set32(AQA, (RING - 1) << 16 | (RING - 1));
    set32(ASQ, (uint32_t)(IOVA + ADMIN_SQ));
    set32(ASQ + 4, 0);
    set32(ACQ, (uint32_t)(IOVA + ADMIN_CQ));
    set32(ACQ + 4, 0);
    set32(CC, 0x460001);
    wait_for(CSTS, 3, 1);
    /* A first command shows the device in which layout this client has DMA messages, for which it may ask twice. */
    settled = false;
    ck_assert_uint_eq(run(0, IDENTIFY, IOVA + DATA, 0, 1, 0, 0), 0);
    settled = true;
}

static void open_queues(void)
{
    ck_assert_uint_eq(run(0, CREATE_CQ, IOVA + IO_CQ, 0, (RING - 1) << 16 | 1, 1, 0), 0);
    ck_assert_uint_eq(run(0, CREATE_SQ, IOVA + IO_SQ, 0, (RING - 1) << 16 | 1, 1 << 16 | 1, 0), 0);
}

static void close_disk(void)
{
    caller_close(&C);
    stop_engine(&disk);
    unlink(image);
}

static void check_pages(uint64_t at, unsigned pages, uint8_t byte)
{
    for (uint64_t i = at; i < at + pages * (uint64_t)PAGE; i++)
        ck_assert_msg(C.memory[i] == byte, "byte 0x%x is 0x%02x, not 0x%02x", (unsigned)i, C.memory[i], byte);
}

/* ---- the tests --------------------------------------------------------------------------------------------------------- */

/* The data goes where the command said when it was fetched. */
START_TEST(command_is_fetched_once)
{
    open_disk();
    memset(C.memory + DATA, 'd', PAGE);
    memset(C.memory + DECOY, 'd', PAGE);
    ck_assert_uint_eq(run(0, IDENTIFY, IOVA + DATA, 0, 1, 0, 0), 0);
    ck_assert_uint_ne(C.memory[DATA], 'd');
    check_pages(DECOY, 1, 'd');
    close_disk();
}
END_TEST

/* A list of pages, in both directions. */
START_TEST(page_list_is_fetched_once)
{
    enum { PAGES = 8 };
    open_disk();
    open_queues();
    for (unsigned to_disk = 0; to_disk < 2; to_disk++) {
        for (unsigned i = 0; i < PAGES; i++)
            store(LISTS + 8 * i, IOVA + DATA + (i + 1) * PAGE, 8);
        memset(C.memory + DATA, to_disk ? 'w' : 'd', (PAGES + 1) * PAGE);
        memset(C.memory + DECOY, 'x', (PAGES + 1) * PAGE);
        watch(LISTS, PAGES * 8);
        ck_assert_uint_eq(
            run(1, to_disk ? WRITE : READ, IOVA + DATA, IOVA + LISTS, 0, 0, (PAGES + 1) * PAGE / BLOCK - 1), 0);
        check_watched();
        if (!to_disk)
            check_pages(DATA, PAGES + 1, 0); /* the disk was empty */
        check_pages(DECOY, PAGES + 1, 'x');
    }
    memset(C.memory + DATA, 'd', 2 * PAGE); /* what has been written is the data, nothing of the decoy */
    ck_assert_uint_eq(run(1, READ, IOVA + DATA, IOVA + DATA + PAGE, 8, 0, 2 * PAGE / BLOCK - 1), 0);
    check_pages(DATA, 2, 'w');
    close_disk();
}
END_TEST

/* A list of ranges of blocks to forget. */
START_TEST(ranges_are_fetched_once)
{
    open_disk();
    open_queues();
    for (unsigned i = 0; i < 4; i++) {
        store(LISTS + 16 * i, 0, 4);
        store(LISTS + 16 * i + 4, 8, 4);
        store(LISTS + 16 * i + 8, 16 * i, 8);
    }
    watch(LISTS, 64);
    ck_assert_uint_eq(run(1, DATASET_MANAGEMENT, IOVA + LISTS, 0, 3, 4, 0), 0);
    check_watched();
    close_disk();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("fetched once");
    TCase *tc = tcase_create("NVMe disk");
    tcase_add_test(tc, command_is_fetched_once);
    tcase_add_test(tc, page_list_is_fetched_once);
    tcase_add_test(tc, ranges_are_fetched_once);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
