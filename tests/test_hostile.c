/* SPDX-License-Identifier: MIT */
/*
 * ==== device, client ====
 *
 * Peers that send anything: random bytes, and valid sessions with some of it wrong, with descriptors of all kinds anywhere. Nothing may
 * crash, hang or leak, another device in the same thread stays as it is, and the next good peer is served. A failure names its seed.
 */
#include "util.h"

static unsigned fds_at_start;
static void note_fds(void) { fds_at_start = fds_open(); }
static void check_fds(void) { ck_assert_uint_eq(fds_open(), fds_at_start); }

enum { SEEDS = 4, ROUNDS = 800, MESSAGE_MAX = 4096 + 512, SESSION_MAX = 24, FILE_SIZE = 16 * PAGE };

/* ---- descriptors of all kinds ------------------------------------------------------------------------------------------------------------- */

enum { KINDS = 9 };
static int kinds[KINDS], pipe_end, pair_end;

static void open_kinds(void)
{
    int pair[2], pipes[2];
    make_pair(pair);
    must(pipe2(pipes, O_CLOEXEC | O_NONBLOCK));
    kinds[0] = memfd("hostile-sealed", FILE_SIZE, F_SEAL_SHRINK);
    kinds[1] = memfd("hostile-unsealed", FILE_SIZE, 0);
    kinds[2] = event();
    kinds[3] = event();
    kinds[4] = pipes[1];
    kinds[5] = pair[0];
    kinds[6] = null_fd();
    kinds[7] = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    kinds[8] = open("/", O_PATH | O_CLOEXEC);
    pipe_end = pipes[0];
    pair_end = pair[1];
}

static void close_kinds(void)
{
    close_fds(kinds, KINDS);
    close(pipe_end);
    close(pair_end);
}

/* ---- messages ------------------------------------------------------------------------------------------------------------------------------- */

typedef struct message {
    uint8_t bytes[MESSAGE_MAX];
    uint32_t len;
    int fds[20];
    unsigned fd_count;
} message;

static uint64_t odd_number(chance *c)
{
    static const uint64_t numbers[] = {0,          1,          2,          3,          4,          7,           8,
                                       15,         16,         31,         32,         255,        4095,        4096,
                                       4097,       8192,       65535,      65536,      1 << 20,    0x7fffffff,  0x80000000,
                                       0xfffffff0, 0xffffffff, UINT64_C(1) << 32, UINT64_C(1) << 47, UINT64_C(1) << 63, UINT64_MAX - 4095, UINT64_MAX};
    return below(c, 4) ? numbers[below(c, COUNT(numbers))] : draw(c);
}

static void add(message *m, const void *bytes, uint32_t len)
{
    memcpy(m->bytes + m->len, bytes, len);
    m->len += len;
}

static const char hello[] = "\0\0\0\0{\"capabilities\":{\"max_msg_fds\":2,\"write_multiple\":true}}";

/* A good message of some kind. */
static void make_message(chance *c, message *m, uint16_t cmd)
{
    uint8_t filler[4096];
    vfu_wire_header header = {.id = (uint16_t)draw(c), .cmd = cmd, .flags = below(c, 4) ? 0 : VFU_HDR_NO_REPLY};
    vfu_wire_dma_map map = {32, below(c, 3) + 1, below(c, 8) * (uint64_t)PAGE, below(c, 32) * (uint64_t)PAGE, (below(c, 8) + 1) * (uint64_t)PAGE};
    vfu_wire_dma_unmap unmap = {24, 0, below(c, 32) * (uint64_t)PAGE, (below(c, 32) + 1) * (uint64_t)PAGE};
    vfu_wire_region_info region = {.argsz = 32 + below(c, 64), .index = below(c, 9)};
    vfu_wire_region_io_fds io_fds = {.argsz = 16, .index = below(c, 9)};
    vfu_wire_irq_info irq = {.argsz = 16, .index = below(c, 5)};
    vfu_wire_irq_set irqs = {20, below(c, 2) ? 0x24 : 1u << below(c, 3) | 8u << below(c, 3), below(c, 5), 0, below(c, 5)};
    vfu_wire_region_access access = {.offset = below(c, 64), .region = below(c, 9), .count = below(c, 5)};
    vfu_wire_device_info info = {.argsz = 16};
    vfu_wire_feature feature = {64, below(c, 12) | VFU_FEATURE_GET << below(c, 3)};
    uint64_t count = below(c, 4);
    memset(filler, (int)draw(c), sizeof(filler));
    m->len = 16;
    m->fd_count = 0;
    switch (cmd) {
    case VFU_CMD_VERSION: add(m, hello, sizeof(hello)); break;
    case VFU_CMD_DMA_MAP:
        add(m, &map, sizeof(map));
        m->fds[0] = kinds[below(c, 2)];
        m->fd_count = below(c, 4) != 0;
        break;
    case VFU_CMD_DMA_UNMAP: add(m, &unmap, sizeof(unmap)); break;
    case VFU_CMD_DEVICE_GET_INFO: add(m, &info, sizeof(info)); break;
    case VFU_CMD_DEVICE_GET_REGION_INFO: add(m, &region, sizeof(region)); break;
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS: add(m, &io_fds, sizeof(io_fds)); break;
    case VFU_CMD_DEVICE_GET_IRQ_INFO: add(m, &irq, sizeof(irq)); break;
    case VFU_CMD_DEVICE_SET_IRQS:
        add(m, &irqs, sizeof(irqs));
        if (irqs.flags & VFU_IRQ_SET_DATA_BOOL)
            add(m, filler, irqs.count);
        if (irqs.flags & VFU_IRQ_SET_DATA_EVENTFD && below(c, 2))
            for (m->fd_count = 0; m->fd_count < irqs.count; m->fd_count++)
                m->fds[m->fd_count] = kinds[2 + below(c, 2)];
        break;
    case VFU_CMD_REGION_READ: add(m, &access, sizeof(access)); break;
    case VFU_CMD_REGION_WRITE:
        add(m, &access, sizeof(access));
        add(m, filler, access.count);
        break;
    case VFU_CMD_REGION_WRITE_MULTI:
        add(m, &count, sizeof(count));
        for (uint64_t i = 0; i < count; i++) {
            vfu_wire_write_one one = {.offset = below(c, 64), .region = below(c, 9), .count = below(c, 9)};
            add(m, &one, sizeof(one));
        }
        break;
    case VFU_CMD_DEVICE_FEATURE:
        add(m, &feature, sizeof(feature));
        add(m, filler, below(c, 5) * 8);
        break;
    case VFU_CMD_MIG_DATA_READ:
    case VFU_CMD_MIG_DATA_WRITE: add(m, &(vfu_wire_mig_data){16, 8}, 8), add(m, filler, cmd == VFU_CMD_MIG_DATA_WRITE ? 8 : 0); break;
    default: add(m, filler, below(c, 64)); break;
    }
    header.size = m->len;
    memcpy(m->bytes, &header, sizeof(header));
}

/* Makes something of it wrong. */
static void spoil(chance *c, message *m)
{
    uint64_t number = odd_number(c);
    uint32_t at;
    switch (below(c, 7)) {
    case 0: /* bits */
        for (unsigned i = below(c, 8) + 1; i; i--)
            m->bytes[below(c, m->len)] ^= (uint8_t)(1u << below(c, 8));
        break;
    case 1: /* a field of the payload */
        at = 16 + below(c, 6) * 4;
        if (at + 8 <= m->len)
            memcpy(m->bytes + at, &number, below(c, 2) ? 8 : 4);
        break;
    case 2: /* the header */
        at = below(c, 4) * 4;
        memcpy(m->bytes + at, &number, 4);
        break;
    case 3: /* the size, with the bytes to it */
        at = below(c, 600);
        if (at > m->len)
            memset(m->bytes + m->len, 0x5a, at - m->len);
        m->len = at < 16 ? 16 : at;
        memcpy(m->bytes + 4, &m->len, 4);
        break;
    case 4: /* the end is missing, or something is behind it */
        m->len = below(c, 2) ? below(c, m->len) + 1 : m->len + below(c, 16);
        break;
    case 5: /* any descriptors */
        for (m->fd_count = 0; m->fd_count < below(c, 19); m->fd_count++)
            m->fds[m->fd_count] = kinds[below(c, KINDS)];
        break;
    default: /* nothing but noise */
        for (uint32_t i = 4; i < m->len; i++)
            m->bytes[i] = (uint8_t)draw(c);
        if (below(c, 2))
            memcpy(m->bytes + 4, &m->len, 4);
        break;
    }
}

/* ---- a hostile client --------------------------------------------------------------------------------------------------------------------- */

static rig victim, bystander;
static vfu_dma dmas[8];
static uint8_t dma_buffers[8][3 * PAGE];
static chance dma_chance;

static void dma_done(vfu_dma *dma, int result)
{
    (void)result;
    dma->user = NULL;
}

/* The device does DMA anywhere at each write, and raises interrupts. */
static void do_dma(rig *r)
{
    for (unsigned i = 0; i < COUNT(dmas); i++) {
        vfu_dma *dma = &dmas[i];
        if (dma->user)
            continue;
        *dma = (vfu_dma){.iova = below(&dma_chance, 40 * PAGE), .buf = dma_buffers[i], .len = below(&dma_chance, sizeof(dma_buffers[0])),
                         .to_client = below(&dma_chance, 2), .done = dma_done, .user = r};
        if (vfu_dev_dma(r->dev, dma) != 1)
            dma->user = NULL;
        break;
    }
    vfu_dev_raise(r->dev, VFU_PCI_IRQ_MSIX, below(&dma_chance, RIG_VECTORS + 1));
    vfu_dev_set_intx(r->dev, below(&dma_chance, 2));
}

static void forget_dma(void *ctx)
{
    rig *r = ctx;
    r->disconnects++;
    for (unsigned i = 0; i < COUNT(dmas); i++)
        dmas[i].user = NULL;
}

static void forget_dma_at_reset(void *ctx, vfu_reset_kind kind)
{
    (void)kind;
    rig *r = ctx;
    r->resets++;
    for (unsigned i = 0; i < COUNT(dmas); i++)
        dmas[i].user = NULL;
}

/* Reads what the device sends, whose framing has to be right, and answers its DMA well, badly or not at all. Ids of commands of its
 * own are 0 to 65535, so that a reply of ours meets one now and then. */
static void hear(chance *c)
{
    while (peer_receive(&victim.client) == 1) {
        vfu_wire_header header = header_of(victim.client.bytes);
        if (header.flags & VFU_HDR_REPLY)
            continue;
        static message m;
        vfu_wire_dma_access access;
        memcpy(&access, victim.client.bytes + 16, sizeof(access));
        header.flags = VFU_HDR_REPLY;
        header.size = header.cmd == VFU_CMD_DMA_READ ? 32 + (uint32_t)access.count : 16 + below(c, 2) * 12;
        if (header.size > MESSAGE_MAX)
            continue;
        m.fd_count = 0;
        m.len = header.size;
        memset(m.bytes, below(c, 2) ? 0 : 0x33, m.len);
        memcpy(m.bytes, &header, 16);
        if (m.len >= 28)
            memcpy(m.bytes + 16, &access, m.len >= 32 ? 16 : 12);
        if (below(c, 3) == 0)
            spoil(c, &m);
        if (below(c, 8))
            send_some(victim.client.sock, m.bytes, m.len, m.fds, m.fd_count < 17 ? m.fd_count : 0);
        settle(victim.dev);
    }
}

static void one_hostile_client(chance *c, const struct sockaddr_un *address, socklen_t len)
{
    static const uint16_t commands[] = {1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 10, 10, 11, 12, 13, 15, 16, 17, 18, 99};
    static message m;
    unsigned count = below(c, SESSION_MAX) + 1, wrong = below(c, 6);
    victim.client.sock = connect_to(address, len);
    for (unsigned i = 0; i < count; i++) {
        make_message(c, &m, i ? commands[below(c, COUNT(commands))] : VFU_CMD_VERSION);
        if (wrong == 0 || (wrong < 4 && i && below(c, 4) == 0))
            spoil(c, &m);
        send_some(victim.client.sock, m.bytes, m.len, m.fds, m.fd_count);
        if (below(c, 3) == 0) {
            settle(victim.dev);
            hear(c);
        }
        if (below(c, 50) == 0)
            must(ftruncate(kinds[1], below(c, 2) ? FILE_SIZE : below(c, FILE_SIZE)));
    }
    if (below(c, 4)) {
        settle(victim.dev);
        hear(c);
        settle(victim.dev);
    }
    peer_close(&victim.client);
    settle(victim.dev);
}

START_TEST(hostile_clients)
{
    struct sockaddr_un address;
    socklen_t len;
    chance c = seeded((uint64_t)_i + 1);
    vfu_dev_desc desc = rig_desc(&victim);
    dma_chance = seeded((uint64_t)_i + 100);
    open_kinds();
    victim.on_write = do_dma;
    desc.callbacks.disconnected = forget_dma;
    desc.callbacks.reset = forget_dma_at_reset;
    rig_create(&victim, &desc);
    ck_assert_int_eq(vfu_dev_attach(victim.dev, listener(&address, &len)), 0);

    vfu_dev_desc other = rig_desc(&bystander);
    rig_create(&bystander, &other);
    rig_connect(&bystander);
    greet(&bystander);
    int event_of_other = event(), file_of_other = memfd("bystander", PAGE, F_SEAL_SHRINK);
    ck_assert_int_eq(ask_irqs(&bystander, 0x24, 2, 0, 1, NULL, &event_of_other, 1), 0);
    ck_assert_int_eq(ask_map(&bystander, 0, PAGE, RW, file_of_other, 0), 0);

    unsigned open = fds_open();
    for (unsigned round = 0; round < ROUNDS; round++) {
        one_hostile_client(&c, &address, len);
        ck_assert_msg(mappings(victim.dev) == 0 && victim.connects == victim.disconnects && fds_open() == open,
                      "seed %d, round %u: something is left: %u descriptors instead of %u", _i + 1, round, fds_open(), open);
        if (round % 50 == 0) {
            check_healthy(&bystander);
            ck_assert_uint_eq(mappings(bystander.dev), 1);
            ck_assert_uint_eq(signals(event_of_other), 0);
        }
    }
    ck_assert_uint_gt(victim.connects, ROUNDS / 4);
    ck_assert_uint_gt(victim.maps, ROUNDS / 4);
    ck_assert_uint_eq(victim.maps, victim.unmaps);
    ck_assert_int_eq(vfu_iommu_check(vfu_dev_iommu(victim.dev)), 0);
    ck_assert_int_eq(vfu_dev_raise(bystander.dev, 2, 0), 0);
    ck_assert_uint_eq(signals(event_of_other), 1);

    /* and then a good one */
    uint8_t back[4];
    victim.on_write = NULL;
    victim.client.sock = connect_to(&address, len);
    greet(&victim);
    check_healthy(&victim);
    ck_assert_int_eq(ask_write(&victim, 0, 0, "good", 4), 0);
    ck_assert_int_eq(ask_read(&victim, 0, 0, back, 4), 0);
    ck_assert_mem_eq(back, "good", 4);
    rig_destroy(&victim);
    rig_destroy(&bystander);
    close(event_of_other);
    close(file_of_other);
    close_kinds();
}
END_TEST

/* ---- a hostile server ----------------------------------------------------------------------------------------------------------------------- */

/* A reply, or a request, of some kind. */
static void make_server_message(chance *c, message *m, uint16_t id, uint16_t cmd)
{
    uint8_t filler[512];
    vfu_wire_header header = {.id = id, .cmd = cmd, .flags = VFU_HDR_REPLY};
    vfu_wire_device_info info = {16, 3, 9, 5};
    vfu_wire_region_info region = {.argsz = 64, .flags = 15, .index = 2, .cap_offset = 32, .size = 65536};
    vfu_wire_cap_sparse_mmap cap = {.header = {.id = 1, .version = 1}, .nr_areas = 1};
    vfu_wire_irq_info irq = {16, 1, 2, 4};
    vfu_wire_dma_unmap unmap = {24, 0, 0, PAGE};
    vfu_wire_region_access access = {.offset = 0, .region = 0, .count = 16};
    vfu_wire_dma_access dma = {below(c, 3 * PAGE), below(c, 256)};
    memset(filler, (int)draw(c), sizeof(filler));
    m->len = 16;
    m->fd_count = 0;
    switch (cmd) {
    case VFU_CMD_VERSION: add(m, hello, sizeof(hello)); break;
    case VFU_CMD_DMA_UNMAP: add(m, &unmap, sizeof(unmap)); break;
    case VFU_CMD_DEVICE_GET_INFO: add(m, &info, sizeof(info)); break;
    case VFU_CMD_DEVICE_GET_REGION_INFO:
        add(m, &region, sizeof(region));
        add(m, &cap, sizeof(cap));
        add(m, &(vfu_wire_sparse_area){4096, 61440}, 16);
        m->fds[0] = kinds[0];
        m->fd_count = 1;
        break;
    case VFU_CMD_DEVICE_GET_IRQ_INFO: add(m, &irq, sizeof(irq)); break;
    case VFU_CMD_REGION_READ:
        add(m, &access, sizeof(access));
        add(m, filler, 16);
        break;
    case VFU_CMD_REGION_WRITE: add(m, &access, sizeof(access)); break;
    case VFU_CMD_DMA_READ:
    case VFU_CMD_DMA_WRITE:
        header.flags = below(c, 8) ? 0 : VFU_HDR_NO_REPLY;
        add(m, &dma, sizeof(dma));
        if (cmd == VFU_CMD_DMA_WRITE)
            add(m, filler, (uint32_t)dma.count);
        break;
    default: break;
    }
    header.size = m->len;
    memcpy(m->bytes, &header, sizeof(header));
}

/* The n-th call of a session. */
static int do_call(vfu_client *client, unsigned n, uint8_t *mem, int fd)
{
    vfu_wire_device_info info;
    vfu_wire_irq_info irq;
    vfu_client_region region;
    uint8_t data[16] = {0};
    int err;
    switch (n) {
    case 0: return vfu_client_info(client, &info);
    case 1:
        err = vfu_client_region_info(client, 2, &region);
        if (region.fd >= 0)
            close(region.fd);
        ck_assert(err == 0 || region.fd == -1);
        ck_assert_uint_le(region.area_count, (1u << 20) / 16);
        return err;
    case 2: return vfu_client_irq_info(client, 2, &irq);
    case 3: return vfu_client_dma_map(client, 0, PAGE, VFU_IOMMU_READ | VFU_IOMMU_WRITE, mem, fd, 0);
    case 4: return vfu_client_region_read(client, 0, 0, data, sizeof(data));
    case 5: return vfu_client_region_write(client, 0, 0, data, sizeof(data));
    case 6: return vfu_client_irq_assign(client, 2, 0, 2, &kinds[2]);
    case 7: err = vfu_client_dma_unmap(client, 0, PAGE); return err > 0 ? 0 : err;
    case 8: return vfu_client_reset(client);
    default: return vfu_client_serve(client, -1, 0);
    }
}
static const uint16_t call_commands[] = {VFU_CMD_DEVICE_GET_INFO, VFU_CMD_DEVICE_GET_REGION_INFO, VFU_CMD_DEVICE_GET_IRQ_INFO, VFU_CMD_DMA_MAP,
                                         VFU_CMD_REGION_READ, VFU_CMD_REGION_WRITE, VFU_CMD_DEVICE_SET_IRQS, VFU_CMD_DMA_UNMAP,
                                         VFU_CMD_DEVICE_RESET};

/* All that the server will say is in the socket, and its end, before the client begins: so each call ends, with what it got or the end. */
START_TEST(hostile_servers)
{
    static uint8_t mem[PAGE + 64];
    static message m;
    chance c = seeded((uint64_t)_i + 200);
    heap h = {0};
    unsigned good = 0, calls = 0;
    open_kinds();
    unsigned open = fds_open();
    for (unsigned round = 0; round < ROUNDS; round++) {
        int pair[2], err = 0;
        uint16_t id = 0;
        vfu_client *client;
        vfu_client_desc desc = {.timeout_ms = PATIENCE_MS, .max_data_xfer_size = PAGE, .max_dma_maps = 16, .alloc = heap_of(&h), .logger = {.write = ignore_log}};
        unsigned wrong = below(&c, 4);
        memset(mem + PAGE, 0x99, 64);
        make_pair(pair);
        for (unsigned i = 0; i <= COUNT(call_commands); i++) {
            for (unsigned requests = below(&c, 3); requests; requests--) {
                make_server_message(&c, &m, (uint16_t)draw(&c), below(&c, 2) ? VFU_CMD_DMA_READ : VFU_CMD_DMA_WRITE);
                if (wrong && below(&c, 16) == 0)
                    spoil(&c, &m);
                send_some(pair[1], m.bytes, m.len, m.fds, m.fd_count);
            }
            for (unsigned asked = i == 2 ? 2 : 1; asked; asked--) { /* for a region with capabilities the client asks twice */
                make_server_message(&c, &m, id++, i ? call_commands[i - 1] : VFU_CMD_VERSION);
                if (wrong && below(&c, 16) == 0)
                    spoil(&c, &m);
                send_some(pair[1], m.bytes, m.len, m.fds, m.fd_count);
            }
        }
        must(shutdown(pair[1], SHUT_WR));
        if (vfu_client_attach(&client, pair[0], &desc) == 0) {
            for (unsigned n = 0; n <= COUNT(call_commands); n++, calls++) {
                err = do_call(client, n, mem, kinds[0]);
                ck_assert_int_le(err, 0);
                good += err == 0;
                if (err == -EPIPE || err == -EPROTO) /* once broken, always broken */
                    ck_assert_int_eq(do_call(client, 0, mem, -1), -EPIPE);
            }
            vfu_client_destroy(client);
        }
        close(pair[1]);
        ck_assert_msg(h.live == 0 && fds_open() == open, "seed %d, round %u: something is left", _i + 200, round);
        for (unsigned i = 0; i < 64; i++)
            ck_assert_uint_eq(mem[PAGE + i], 0x99);
    }
    ck_assert_uint_gt(good, calls / 4);
    ck_assert_uint_lt(good, calls);
    close_kinds();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("hostile peers");
    TCase *tc = tcase_create("hostile peers");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_loop_test(tc, hostile_clients, 0, SEEDS);
    tcase_add_loop_test(tc, hostile_servers, 0, SEEDS);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
