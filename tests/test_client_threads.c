/* SPDX-License-Identifier: MIT */
/*
 * ==== client ====
 *
 * What takes more than one request and its reply, against our own device in a thread: many requests in flight, regions by memory
 * and by ioeventfd, migration, the dirty log, the twin socket, a server that is started again.
 */
#include "client.h"

/* ---- many in flight ------------------------------------------------------------------------------------------------------ */

/* As many as fit, again and again: each completes once, in order, with what was asked for. */
START_TEST(pipelined)
{
    enum { DEPTH = 32, TOTAL = 20000 };
    static uint32_t values[DEPTH];
    vfu_completion done;
    unsigned submitted = 0, taken = 0;
    vfu_client *client = device_open(&(vfu_client_desc){.max_in_flight = DEPTH});
    while (taken < TOTAL) {
        while (submitted < TOTAL && vfu_client_in_flight(client) < DEPTH) {
            uint32_t *slot = &values[submitted % DEPTH], offset = (submitted / 2) % 64 * 4 + 0x100;
            void *user = (void *)(uintptr_t)submitted;
            *slot = submitted;
            int id = submitted % 2 ? vfu_client_submit_read(client, 2, offset, slot, 4, user)
                                   : vfu_client_submit_write(client, 2, offset, slot, 4, user);
            must(id);
            submitted++;
        }
        if (vfu_client_in_flight(client) == DEPTH)
            ck_assert_int_eq(vfu_client_submit_write(client, 2, 0, values, 4, NULL), -EAGAIN);
        ck_assert_int_eq(vfu_client_wait(client, VFU_CLIENT_ANY, &done), 1);
        do {
            ck_assert_int_eq(done.result, 0);
            ck_assert_uint_eq((uintptr_t)done.user, taken);
            ck_assert_uint_eq(done.reply.cmd, taken % 2 ? VFU_CMD_REGION_READ : VFU_CMD_REGION_WRITE);
            if (taken % 2)
                ck_assert_uint_eq(values[taken % DEPTH], taken - 1); /* what the write before it has put there */
            taken++;
        } while (vfu_client_poll(client, &done) == 1);
    }
    ck_assert_uint_eq(vfu_client_in_flight(client), 0);
    ck_assert_int_eq(vfu_client_wait(client, VFU_CLIENT_ANY, &done), -ENOENT);
    device_close(client);
    ck_assert_uint_eq(R.writes, TOTAL / 2);
}
END_TEST

/* Completions by id, the youngest first, with calls in between. */
START_TEST(taken_by_id)
{
    enum { DEPTH = 20 };
    uint32_t values[DEPTH];
    uint8_t ids_of_device[4];
    int ids[DEPTH];
    vfu_completion done;
    vfu_client *client = device_open(NULL);
    for (uint32_t round = 0; round < 20; round++) {
        for (uint32_t i = 0; i < DEPTH; i++) {
            ck_assert_int_eq(put32(client, 2, 4 * i, i * 1000 + round), 0);
            ids[i] = vfu_client_submit_read(client, 2, 4 * i, &values[i], 4, NULL);
            must(ids[i]);
        }
        ck_assert_int_eq(vfu_client_region_read(client, 7, 0, ids_of_device, 4), 0);
        ck_assert_mem_eq(ids_of_device, "\x34\x12\xa1\xd3", 4); /* configuration space is little-endian everywhere */
        for (uint32_t i = DEPTH; i-- > 0;) {
            ck_assert_int_eq(vfu_client_wait(client, ids[i], &done), 1);
            ck_assert_int_eq(done.id, ids[i]);
            ck_assert_uint_eq(values[i], i * 1000 + round);
            ck_assert_int_eq(vfu_client_wait(client, ids[i], &done), -ENOENT); /* it was taken */
        }
    }
    device_close(client);
}
END_TEST

/* Nothing but poll(), vfu_client_fds, _timeout and _poll: a loop of the caller's own, with the device's DMA in it. */
START_TEST(own_loop)
{
    enum { SIZE = 128 << 10, READS = 300 };
    static uint8_t mem[SIZE];
    uint64_t words[3] = {0x100000, SIZE, true};
    uint32_t value = 0;
    int wake = event();
    unsigned taken = 0, submitted = 0;
    vfu_client *client = device_open(NULL);
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 3, 1, &wake), 0);
    ck_assert_int_eq(vfu_client_dma_map(client, 0x100000, SIZE, VFU_IOMMU_READ | VFU_IOMMU_WRITE, mem, -1, 0), 0);
    must(vfu_client_submit_write(client, 0, TRANSFER_AT, words, sizeof(words), NULL));
    for (bool interrupted = false; !interrupted || taken < READS + 1;) {
        vfu_pollfd wanted[VFU_CLIENT_FDS];
        struct pollfd fds[VFU_CLIENT_FDS + 1];
        vfu_completion done;
        int got;
        while (submitted < READS && vfu_client_submit_read(client, 2, 0, &value, 4, NULL) >= 0)
            submitted++;
        unsigned count = vfu_client_fds(client, wanted);
        ck_assert_uint_eq(count, 1);
        for (unsigned i = 0; i < count; i++)
            fds[i] = (struct pollfd){.fd = wanted[i].fd, .events = wanted[i].events};
        fds[count] = (struct pollfd){.fd = wake, .events = POLLIN};
        int timeout = vfu_client_timeout(client);
        ck_assert_int_le(timeout, 5000);
        ck_assert_int_ge(poll(fds, count + 1, timeout < 0 ? PATIENCE_MS : timeout), timeout < 0);
        interrupted = interrupted || signals(wake);
        while ((got = vfu_client_poll(client, &done)) == 1) {
            ck_assert_int_eq(done.result, 0);
            taken++;
        }
        ck_assert_int_eq(got, 0);
    }
    ck_assert_int_eq((int)get32(client, 0, RESULT_AT), 0);
    close(wake);
    device_close(client);
}
END_TEST

START_TEST(posted_and_multi)
{
    vfu_wire_write_one writes[300];
    vfu_client *client = device_open(&(vfu_client_desc){.max_data_xfer_size = 4096}); /* 170 writes in one message */
    for (uint32_t i = 0; i < 1000; i++) {
        int err;
        while ((err = vfu_client_post_write(client, 2, 4 * i, &i, 4)) == -EAGAIN)
            ck_assert_int_eq(vfu_client_serve(client, -1, 1), 0);
        ck_assert_int_eq(err, 0);
    }
    for (uint32_t i = 0; i < 1000; i++)
        ck_assert_uint_eq(get32(client, 2, 4 * i), i);
    for (uint32_t i = 0; i < COUNT(writes); i++) {
        uint32_t value = i * 7;
        writes[i] = (vfu_wire_write_one){.region = 2, .offset = 8 * i, .count = i % 2 ? 4 : 8};
        memcpy(writes[i].data, &value, 4);
    }
    ck_assert_int_eq(vfu_client_write_multi(client, writes, COUNT(writes)), COUNT(writes));
    for (uint32_t i = 0; i < COUNT(writes); i++)
        ck_assert_uint_eq(get32(client, 2, 8 * i), i * 7);
    ck_assert_int_eq(vfu_client_write_multi(client, writes, 0), 0);
    writes[1].count = 9;
    ck_assert_int_eq(vfu_client_write_multi(client, writes, 2), -EINVAL);
    writes[1].count = 8;
    writes[1].region = 6; /* read-only */
    ck_assert_int_lt(vfu_client_write_multi(client, writes, 2), 2);
    ck_assert_int_eq(vfu_client_post_write(client, 2, 0, writes, 4097), -EINVAL);
    device_close(client);
    ck_assert_uint_eq(R.writes, 1000 + COUNT(writes) + 1);
}
END_TEST

/* ---- regions without messages -------------------------------------------------------------------------------------------- */

/* Inside the area by memory, outside by message, across the border by both; and by message while something is under way. */
START_TEST(by_memory)
{
    static uint8_t data[RIG_BAR2], back[RIG_BAR2];
    vfu_completion done;
    uint32_t value = 1;
    vfu_client *client = device_open(NULL);
    uint8_t *ram = mmap(NULL, RIG_BAR2, PROT_READ | PROT_WRITE, MAP_SHARED, R.ram, 0);
    ck_assert_int_eq(vfu_client_region_open(client, 0, VFU_CLIENT_BY_MEMORY), 0); /* has nothing to map */
    ck_assert_int_eq(vfu_client_region_open(client, 2, 4), -EINVAL);
    ck_assert_int_eq(vfu_client_region_open(client, 100, VFU_CLIENT_BY_MEMORY), -EINVAL);
    ck_assert_int_eq(vfu_client_region_open(client, 2, VFU_CLIENT_BY_MEMORY), 0);
    for (uint32_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(i * 5 + i / 256);
    static const struct {
        uint32_t offset, len;
    } accesses[] = {{PAGE, 1},      {PAGE, 2},         {PAGE, 4},
                    {PAGE, 8},      {PAGE + 1, 1000},  {PAGE + 3, 2},
                    {PAGE + 6, 13}, {RIG_BAR2 - 1, 1}, {PAGE, RIG_BAR2 - PAGE}};
    for (unsigned i = 0; i < COUNT(accesses); i++) {
        uint32_t at = accesses[i].offset, len = accesses[i].len;
        memset(ram, 0xee, RIG_BAR2);
        ck_assert_int_eq(vfu_client_region_write(client, 2, at, data + at, len), 0);
        ck_assert_mem_eq(ram + at, data + at, len);
        ck_assert_uint_eq(ram[at - 1], 0xee);
        ck_assert(at + len == RIG_BAR2 || ram[at + len] == 0xee);
        memset(back, 0, len);
        ck_assert_int_eq(vfu_client_region_read(client, 2, at, back, len), 0);
        ck_assert_mem_eq(back, data + at, len);
    }
    /* the device's callback sees what is outside, and nothing else */
    ck_assert_int_eq(vfu_client_region_write(client, 2, PAGE - 10, data + PAGE - 10, 20), 0);
    ck_assert_mem_eq(ram + PAGE, data + PAGE, 10);
    ck_assert_int_eq(vfu_client_region_read(client, 2, PAGE - 10, back, 20), 0);
    ck_assert_mem_eq(back, data + PAGE - 10, 20);
    ck_assert_int_eq(vfu_client_region_read(client, 2, RIG_BAR2 - 1, back, 2), -EINVAL); /* the part behind the end */
    /* not past a write that is under way: both are messages */
    must(vfu_client_submit_write(client, 2, PAGE, &value, 4, NULL));
    ck_assert_int_eq(put32(client, 2, PAGE, 2), 0);
    ck_assert_int_eq(vfu_client_wait(client, VFU_CLIENT_ANY, &done), 1);
    ck_assert_int_eq(vfu_client_post_write(client, 2, PAGE, &value, 4), 0);
    ck_assert_int_eq(put32(client, 2, PAGE, 3), 0);
    ck_assert_int_eq(put32(client, 2, PAGE, 4), 0); /* that one by memory again: a reply has come */
    ck_assert_mem_eq(ram + PAGE, &(uint32_t){4}, 4);
    ck_assert_int_eq(vfu_client_region_open(client, 2, 0), 0);
    ck_assert_int_eq(put32(client, 2, PAGE, 5), 0);
    munmap(ram, RIG_BAR2);
    device_close(client);
    ck_assert_uint_eq(R.writes, 1 + 2 + 2 + 1);
    ck_assert_uint_eq(R.reads, 1);
}
END_TEST

/* A write that hits an ioeventfd signals it, and is no message; everything else is one. */
START_TEST(by_eventfd)
{
    enum { DATAMATCH = 1 };
    int plain = event(), matching = event();
    const vfu_io_fd io[] = {
        {.region = 0, .type = VFU_IO_FD_IOEVENTFD, .offset = 0x80, .size = 4, .fd = plain},
        {.region = 0, .type = VFU_IO_FD_IOEVENTFD, .offset = 0x84, .size = 0, .fd = plain},
        {.region = 0, .type = VFU_IO_FD_IOEVENTFD, .offset = 0x88, .size = 2, .fd = matching, .flags = DATAMATCH, .data = 7},
        {.region = 0, .type = VFU_IO_FD_IOEVENTFD, .offset = 0x90, .size = 1, .fd = matching, .flags = DATAMATCH, .data = 7},
        {.region = 0, .type = VFU_IO_FD_IOEVENTFD, .offset = 0x98, .size = 8, .fd = matching, .flags = DATAMATCH, .data = UINT64_C(7) << 40}};
    static const struct {
        uint64_t offset, value;
        size_t len;
        unsigned plain, matching;
    } writes[] = {
        {0x80, 1, 4, 1, 0}, {0x80, 1, 2, 0, 0}, {0x80, 1, 8, 0, 0}, {0x81, 1, 4, 0, 0}, {0x84, 9, 1, 1, 0},
        {0x84, 9, 2, 1, 0}, {0x84, 9, 4, 1, 0}, {0x84, 9, 8, 1, 0}, {0x84, 9, 3, 0, 0}, {0x88, 7, 2, 0, 1},
        {0x88, 8, 2, 0, 0}, {0x88, 7, 4, 0, 0}, {0x88, 7, 1, 0, 0}, {0x90, 7, 1, 0, 1}, {0x90, 8, 1, 0, 0},
        {0x98, UINT64_C(7) << 40, 8, 0, 1}, {0x98, 7, 8, 0, 0},
    };
    vfu_client_io_fd list[6];
    int fds[VFU_FDS_MAX];
    vfu_dev_desc desc = device_desc();
    desc.io_fds = io;
    desc.io_fd_count = COUNT(io);
    vfu_client *client = device_start(&desc, NULL);
    ck_assert_int_eq(vfu_client_io_fds(client, 0, list, COUNT(list), fds), COUNT(io));
    ck_assert_uint_eq(list[2].offset, 0x88);
    ck_assert_uint_eq(list[2].data, 7);
    ck_assert_uint_eq(list[2].flags, DATAMATCH);
    ck_assert_int_eq(list[2].shadow_index, -1);
    ck_assert_int_ge(fds[list[2].fd_index], 0);
    close_fds(fds, VFU_FDS_MAX);
    ck_assert_int_eq(vfu_client_io_fds(client, 1, list, COUNT(list), fds), 0);
    ck_assert_int_eq(vfu_client_region_open(client, 0, VFU_CLIENT_BY_EVENTFD | VFU_CLIENT_BY_MEMORY), 0);
    unsigned messages = 0;
    for (unsigned i = 0; i < COUNT(writes); i++) {
        const uint64_t word = is_little_endian() ? writes[i].value : writes[i].value << (64 - 8 * writes[i].len);
        ck_assert_int_eq(vfu_client_region_write(client, 0, writes[i].offset, &word, writes[i].len), 0);
        ck_assert_uint_eq(signals(plain), writes[i].plain);
        ck_assert_uint_eq(signals(matching), writes[i].matching);
        messages += !writes[i].plain && !writes[i].matching;
    }
    get32(client, 0, 0x80); /* reads are messages */
    device_close(client);
    ck_assert_uint_eq(R.writes, messages);
    ck_assert_uint_eq(R.reads, 1);
    close(plain);
    close(matching);
}
END_TEST

/* ---- migration ------------------------------------------------------------------------------------------------------------ */

static uint8_t saved_state[100000];
static size_t state_read, state_written;
static char arcs[64];  /* the states that the device has gone to */
static int refuse_arc; /* what a change to STOP_COPY returns */

static int mig_change(void *ctx, vfu_mig_state from, vfu_mig_state to)
{
    (void)ctx, (void)from;
    if (to == VFU_MIG_STATE_STOP_COPY && refuse_arc)
        return refuse_arc;
    size_t len = strlen(arcs);
    if (len < sizeof(arcs) - 1)
        arcs[len] = (char)('0' + to), arcs[len + 1] = 0;
    if (to == VFU_MIG_STATE_RESUMING)
        state_written = 0;
    return 0;
}

static int64_t mig_read(void *ctx, void *buf, size_t len)
{
    (void)ctx;
    size_t left = sizeof(saved_state) - state_read, part = len < left ? len : left;
    memcpy(buf, saved_state + state_read, part);
    state_read += part;
    return (int64_t)part;
}

static int mig_write(void *ctx, const void *buf, size_t len)
{
    (void)ctx;
    if (len > sizeof(saved_state) - state_written)
        return -ENOSPC;
    memcpy(saved_state + state_written, buf, len);
    state_written += len;
    return 0;
}

START_TEST(migration)
{
    static uint8_t state[200000];
    vfu_mig_state reached;
    uint64_t flags;
    vfu_dev_desc desc = device_desc();
    desc.migration = (vfu_migration){.pre_copy = _i, .change = mig_change, .read = mig_read, .write = mig_write};
    for (uint32_t i = 0; i < sizeof(saved_state); i++)
        saved_state[i] = (uint8_t)(i * 3 + i / 256);
    state_read = 0;
    arcs[0] = 0;
    refuse_arc = 0;
    vfu_client *client = device_start(&desc, &(vfu_client_desc){.max_data_xfer_size = 8192});
    ck_assert_int_eq(vfu_client_mig_flags(client, &flags), 0);
    ck_assert_uint_eq(flags, VFU_MIG_STOP_COPY | (_i ? VFU_MIG_PRE_COPY : 0));
    ck_assert_int_eq(vfu_client_mig_state(client, &reached), 0);
    ck_assert_int_eq(reached, VFU_MIG_STATE_RUNNING);
    ck_assert_int_eq(vfu_client_mig_go(client, VFU_MIG_STATE_PRE_COPY, &reached), _i ? 0 : -EINVAL);
    ck_assert_int_eq(reached, _i ? VFU_MIG_STATE_PRE_COPY : VFU_MIG_STATE_RUNNING);
    ck_assert_int_eq(vfu_client_mig_go(client, VFU_MIG_STATE_STOP_COPY, &reached), 0);
    ck_assert_int_eq(reached, VFU_MIG_STATE_STOP_COPY);
    ck_assert_str_eq(arcs, _i ? "63" : "13");
    ck_assert_int_eq(vfu_client_mig_read(client, state, 50001), 50001);
    ck_assert_int_eq(vfu_client_mig_read(client, state + 50001, sizeof(state) - 50001), sizeof(saved_state) - 50001);
    ck_assert_mem_eq(state, saved_state, sizeof(saved_state));
    ck_assert_int_eq(vfu_client_mig_read(client, state, 10), 0);
    ck_assert_int_eq(vfu_client_mig_go(client, VFU_MIG_STATE_PRE_COPY, &reached), -EINVAL); /* the arc that isn't allowed */
    ck_assert_int_eq(reached, VFU_MIG_STATE_STOP_COPY);
    ck_assert_int_eq(vfu_client_mig_go(client, VFU_MIG_STATE_ERROR, &reached), -EINVAL);
    ck_assert_int_eq(vfu_client_mig_go(client, (vfu_mig_state)77, NULL), -EINVAL);
    arcs[0] = 0;
    ck_assert_int_eq(vfu_client_mig_go(client, VFU_MIG_STATE_RESUMING, NULL), 0);
    ck_assert_str_eq(arcs, "14");
    for (uint32_t i = 0; i < sizeof(saved_state); i++)
        state[i] = (uint8_t)(i * 11);
    ck_assert_int_eq(vfu_client_mig_write(client, state, sizeof(saved_state)), 0);
    ck_assert_int_eq(vfu_client_mig_write(client, state, 1), -ENOSPC);
    ck_assert_int_eq(vfu_client_mig_go(client, VFU_MIG_STATE_RUNNING, &reached), 0);
    ck_assert_str_eq(arcs, "1412");
    ck_assert_mem_eq(saved_state, state, sizeof(saved_state));
    ck_assert_int_eq(vfu_client_mig_write(client, state, 1), -EINVAL);
    ck_assert_int_lt(vfu_client_mig_read(client, state, 1), 0);
    /* an arc that fails: where the device stands is known */
    refuse_arc = -EBUSY;
    ck_assert_int_eq(vfu_client_mig_go(client, VFU_MIG_STATE_STOP_COPY, &reached), -EBUSY);
    ck_assert_int_eq(reached, VFU_MIG_STATE_STOP);
    refuse_arc = -ENOTRECOVERABLE;
    ck_assert_int_eq(vfu_client_mig_go(client, VFU_MIG_STATE_STOP_COPY, &reached), -ENOTRECOVERABLE);
    ck_assert_int_eq(reached, VFU_MIG_STATE_ERROR);
    ck_assert_int_eq(vfu_client_mig_go(client, VFU_MIG_STATE_RUNNING, &reached), -EINVAL);
    ck_assert_int_eq(vfu_client_reset(client), 0);
    ck_assert_int_eq(vfu_client_mig_state(client, &reached), 0);
    ck_assert_int_eq(reached, VFU_MIG_STATE_RUNNING);
    device_close(client);
}
END_TEST

/* The bits of what the device has written, in one message or in many. */
START_TEST(dirty_log)
{
    enum { PAGES = 40000, SIZE = PAGES * PAGE };
    static uint64_t bitmap[(PAGES + 63) / 64], again[(PAGES + 63) / 64];
    static const uint32_t dirty[] = {0, 1, 63, 64, 5000, 20000, 39999};
    vfu_wire_feature_log_range range = {0x100000000, SIZE};
    uint64_t page_size = PAGE;
    int wake = event(), file = memfd("dirty", SIZE, F_SEAL_SHRINK);
    uint8_t *mem = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    vfu_client *client = device_open(&(vfu_client_desc){.max_data_xfer_size = _i ? 4096 : 0});
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 3, 1, &wake), 0);
    ck_assert_int_eq(vfu_client_dma_map(client, range.iova, SIZE, VFU_IOMMU_READ | VFU_IOMMU_WRITE, mem, file, 0), 0);
    ck_assert_int_eq(vfu_client_log_stop(client), -EINVAL);
    ck_assert_int_eq(vfu_client_log_report(client, range.iova, SIZE, PAGE, bitmap, COUNT(bitmap)), -EINVAL);
    ck_assert_int_eq(vfu_client_log_start(client, &page_size, &range, 1), 0);
    ck_assert_uint_eq(page_size, PAGE);
    ck_assert_int_eq(vfu_client_log_start(client, &page_size, &range, 1), -EBUSY);
    for (unsigned i = 0; i < COUNT(dirty); i++)
        ck_assert_int_eq(device_dma(client, wake, range.iova + (uint64_t)dirty[i] * PAGE + 17, 4, true), 0);
    ck_assert_int_eq(vfu_client_log_report(client, range.iova, SIZE, 3000, bitmap, COUNT(bitmap)), -EINVAL);
    ck_assert_int_eq(vfu_client_log_report(client, range.iova, 0, PAGE, bitmap, COUNT(bitmap)), -EINVAL);
    ck_assert_int_eq(vfu_client_log_report(client, range.iova, SIZE, PAGE, bitmap, COUNT(bitmap) - 1), -EINVAL);
    memset(bitmap, 0xff, sizeof(bitmap));
    ck_assert_int_eq(vfu_client_log_report(client, range.iova, SIZE, PAGE, bitmap, COUNT(bitmap)), 0);
    for (uint32_t page = 0, next = 0; page < PAGES; page++) {
        bool expected = next < COUNT(dirty) && dirty[next] == page;
        ck_assert_msg((bitmap[page / 64] >> page % 64 & 1) == expected, "page %u", page);
        next += expected;
    }
    ck_assert_int_eq(vfu_client_log_report(client, range.iova, SIZE, PAGE, again, COUNT(again)), 0); /* and they are cleared */
    for (unsigned i = 0; i < COUNT(again); i++)
        ck_assert_uint_eq(again[i], 0);
    ck_assert_int_eq(vfu_client_log_stop(client), 0);
    device_close(client);
    munmap(mem, SIZE);
    close(file);
    close(wake);
}
END_TEST

/* ---- two sockets ---------------------------------------------------------------------------------------------------------- */

START_TEST(twin_socket)
{
    enum { SIZE = 200 << 10 };
    static uint8_t mem[SIZE];
    static const struct {
        bool client, device;
    } cases[] = {{true, true}, {true, false}, {false, true}};
    for (unsigned i = 0; i < COUNT(cases); i++) {
        int wake = event();
        vfu_pollfd fds[VFU_CLIENT_FDS];
        vfu_dev_desc desc = device_desc();
        desc.twin_socket = cases[i].device;
        vfu_client *client = device_start(&desc, &(vfu_client_desc){.twin_socket = cases[i].client});
        ck_assert_uint_eq(vfu_client_fds(client, fds), cases[i].client && cases[i].device ? 2 : 1);
        ck_assert_int_eq(vfu_client_irq_assign(client, 2, 3, 1, &wake), 0);
        ck_assert_int_eq(vfu_client_dma_map(client, 0x5000, SIZE, VFU_IOMMU_READ | VFU_IOMMU_WRITE, mem, -1, 0), 0);
        memset(mem, 0x55 + (int)i, SIZE);
        ck_assert_int_eq(device_dma(client, wake, 0x5000, SIZE, false), 0);
        ck_assert_mem_eq(device_buffer, mem, SIZE);
        memset(device_buffer, 0x99, SIZE);
        ck_assert_int_eq(device_dma(client, wake, 0x5000, SIZE, true), 0);
        ck_assert_mem_eq(device_buffer, mem, SIZE);
        ck_assert_int_eq(device_dma(client, wake, 0x4fff, 2, true), -ENOENT);
        device_close(client);
        close(wake);
    }
}
END_TEST

/* ---- connecting again ----------------------------------------------------------------------------------------------------- */

/* The server is gone and another one has taken its place: mappings, interrupts and open regions are as they were. */
START_TEST(server_started_again)
{
    enum { SIZE = 64 << 10, AT = 0x10000 };
    int wake = event(), events[RIG_VECTORS], file = memfd("again", SIZE, F_SEAL_SHRINK);
    uint8_t *mem = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    static uint8_t by_message[PAGE];
    vfu_wire_device_info info;
    vfu_completion done;
    uint8_t byte = 0;
    uint32_t word = 0;
    vfu_client_region region;
    vfu_client *client = device_open(&(vfu_client_desc){.reconnects = true});
    for (unsigned i = 0; i < RIG_VECTORS; i++)
        events[i] = event();
    ck_assert_int_eq(vfu_client_info(client, &info), 0);
    ck_assert_int_eq(vfu_client_region_info(client, 5, &region), 0);
    close(region.fd);
    ck_assert_int_eq(vfu_client_region_open(client, 2, VFU_CLIENT_BY_MEMORY), 0);
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 0, RIG_VECTORS, events), 0);
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 1, 1, NULL), 0);
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 3, 1, &wake), 0);
    for (unsigned i = 0; i < 4; i++)
        ck_assert_int_eq(vfu_client_dma_map(client, AT + i * 2 * PAGE, PAGE, VFU_IOMMU_READ | VFU_IOMMU_WRITE, mem + i * PAGE,
                                            file, i * PAGE),
                         0);
    ck_assert_int_eq(vfu_client_dma_map(client, 0, PAGE, VFU_IOMMU_READ, by_message, -1, 0), 0);
    ck_assert_int_eq(vfu_client_dma_unmap(client, AT + 2 * PAGE, PAGE), 1);
    ck_assert_int_eq(vfu_client_dma_unmap(client, AT + PAGE, PAGE), 0); /* nothing is there */
    must(vfu_client_submit_read(client, 0, 0, &byte, 1, &byte));
    device_end();
    ck_assert_int_eq(vfu_client_wait(client, VFU_CLIENT_ANY, &done), 1); /* answered, or ended by the end */
    ck_assert(done.result == 0 || done.result == -EPIPE);
    ck_assert_ptr_eq(done.user, &byte);
    ck_assert_int_eq(vfu_client_reset(client), -EPIPE);
    close_fds(events + 2, 2); /* the client has copies */

    vfu_dev_desc desc = device_desc();
    rig_create(&R, &desc);
    serve(&device, R.dev);
    ck_assert_int_eq(vfu_client_reattach(client, connect_to(&device.address, device.len)), 0);
    memset(mem, 0x31, SIZE);
    ck_assert_int_eq(device_dma(client, wake, AT + 4 * PAGE, PAGE, false), 0);
    ck_assert_mem_eq(device_buffer, mem, PAGE);
    ck_assert_int_eq(device_dma(client, wake, AT + 2 * PAGE, PAGE, false), -ENOENT); /* it was taken away before */
    ck_assert_int_eq(device_dma(client, wake, 0, PAGE, false), 0);
    ck_assert_int_eq(device_dma(client, wake, 0, PAGE, true), -EACCES);
    for (uint8_t vector = 0; vector < 2; vector++) {
        ck_assert_int_eq(vfu_client_region_write(client, 0, RAISE_AT, &vector, 1), 0);
        ck_assert_uint_eq(signals(events[vector]), vector == 0);
    }
    ck_assert_int_eq(put32(client, 2, PAGE, 0x12345678), 0); /* through its new memory */
    ck_assert_int_eq(pread(R.ram, &word, 4, PAGE), 4);
    ck_assert_uint_eq(word, 0x12345678);
    device_end();

    /* another device */
    desc = device_desc();
    desc.pci.bar[5].size = 4 * RIG_BAR5;
    desc.share[5] = NULL;
    rig_create(&R, &desc);
    serve(&device, R.dev);
    ck_assert_int_eq(vfu_client_reattach(client, connect_to(&device.address, device.len)), -ESTALE);
    ck_assert_int_eq(vfu_client_reset(client), -EPIPE);
    device_end();

    /* nobody there; then the right one again, by path, twice without an end in between */
    char path[108];
    snprintf(path, sizeof(path), "/tmp/vfu-client-%d.sock", (int)getpid());
    ck_assert_int_eq(vfu_client_reconnect(client, path), -ENOENT);
    desc = device_desc();
    rig_create(&R, &desc);
    ck_assert_int_eq(vfu_dev_listen(R.dev, path), 0);
    ck_assert_int_eq(pthread_create(&device.thread, NULL, serve_run, R.dev), 0);
    device.dev = R.dev;
    for (unsigned i = 0; i < 2; i++) {
        ck_assert_int_eq(vfu_client_reconnect(client, path), 0);
        ck_assert_int_eq(device_dma(client, wake, AT, PAGE, false), 0);
    }
    vfu_client_destroy(client);
    device_end();
    client = device_open(NULL);
    ck_assert_int_eq(vfu_client_reattach(client, event()), -ENOTSUP);
    ck_assert_int_eq(vfu_client_reconnect(client, path), -ENOTSUP);
    device_close(client);
    close_fds(events, 2);
    munmap(mem, SIZE);
    close(file);
    close(wake);
}
END_TEST

/* Each allocation fails once: the call says so and the next one works, or the connection is made again. */
START_TEST(allocations_fail)
{
    static const vfu_io_fd none = {.region = 0, .type = VFU_IO_FD_IOEVENTFD, .offset = 0x80, .size = 4};
    int wake = event(), io = event();
    uint8_t *mem = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int file = memfd("shared", PAGE, 0);
    unsigned failures = 0;
    vfu_io_fd fd = none;
    fd.fd = io;
    vfu_dev_desc desc = device_desc();
    desc.io_fds = &fd;
    desc.io_fd_count = 1;
    vfu_client *client = device_start(&desc, NULL);
    vfu_client_destroy(client);
    bool failed = true;
    for (unsigned long n = 1; failed; n++) {
        heap h = {.fail_at = n};
        vfu_client_desc mine = {.reconnects = true, .alloc = heap_of(&h), .logger = {.write = ignore_log}};
        uint64_t page_size = PAGE;
        int err = vfu_client_attach(&client, connect_to(&device.address, device.len), &mine);
        if (!err) {
            int results[] = {vfu_client_region_open(client, 0, VFU_CLIENT_BY_EVENTFD),
                             vfu_client_region_open(client, 2, VFU_CLIENT_BY_MEMORY),
                             vfu_client_irq_assign(client, 2, 3, 1, &wake),
                             vfu_client_dma_map(client, 0x1000, PAGE, VFU_IOMMU_READ | VFU_IOMMU_WRITE, mem, file, 0),
                             vfu_client_log_start(client, &page_size, NULL, 0),
                             vfu_client_reattach(client, connect_to(&device.address, device.len))};
            for (unsigned i = 0; i < COUNT(results); i++) {
                ck_assert_int_eq(results[i], results[i] ? -ENOMEM : 0);
                err = err ? err : results[i];
            }
            if (results[COUNT(results) - 1])
                ck_assert_int_eq(vfu_client_reattach(client, connect_to(&device.address, device.len)), 0);
            ck_assert_int_eq(put32(client, 2, PAGE, 5), 0);
            ck_assert_uint_eq(get32(client, 2, PAGE), 5);
        }
        failed = err != 0;
        failures += failed;
        ck_assert_int_eq(err, failed ? -ENOMEM : 0);
        vfu_client_destroy(client);
        ck_assert_uint_eq(h.live, 0);
    }
    ck_assert_uint_gt(failures, 15);
    device_end();
    munmap(mem, PAGE);
    close(file);
    close(io);
    close(wake);
}
END_TEST

/* ---- both ends full --------------------------------------------------------------------------------------------------------- */

enum { ASKED = 200, ASKED_SIZE = 64 << 10, WRITTEN = 60, WRITTEN_SIZE = 32 << 10 };

/* A server that reads nothing before it has sent all its own requests, whose answers are more than anybody buffers; then answers
 * the client's. Counts the answers. */
static void *ask_before_reading(void *arg)
{
    peer p = {.sock = *(int *)arg};
    unsigned answers = 0, requests = 0;
    for (uint16_t i = 0; i < ASKED; i++) {
        struct {
            vfu_wire_header header;
            vfu_wire_dma_access access;
        } ask = {{i, VFU_CMD_DMA_READ, 32, 0, 0}, {0x100000, ASKED_SIZE}};
        ck_assert(peer_send_wait(&p, &ask, sizeof(ask), NULL, 0));
    }
    while (answers < ASKED || requests < WRITTEN) {
        ck_assert_int_eq(peer_wait(&p), 1);
        vfu_wire_header header = header_of(p.bytes);
        if (header.cmd == VFU_CMD_DMA_READ) {
            ck_assert_uint_eq(header.id, answers++);
            ck_assert_uint_eq(header.size, 32 + ASKED_SIZE);
            continue;
        }
        uint8_t answer[32];
        memcpy(answer, p.bytes, sizeof(answer));
        header.size = 32;
        header.flags = VFU_HDR_REPLY;
        memcpy(answer, &header, sizeof(header));
        ck_assert(peer_send_wait(&p, answer, sizeof(answer), NULL, 0));
        requests++;
    }
    p.sock = -1;
    peer_close(&p);
    return NULL;
}

START_TEST(neither_end_reads_first)
{
    static uint8_t mem[ASKED_SIZE], data[WRITTEN_SIZE];
    vfu_completion done;
    pthread_t thread;
    unsigned submitted = 0, completed = 0;
    vfu_client *client = script_open();
    reply(VFU_CMD_DMA_MAP, NULL, 0);
    ck_assert_int_eq(vfu_client_dma_map(client, 0x100000, ASKED_SIZE, VFU_IOMMU_READ, mem, -1, 0), 0);
    heard();
    size_t before = client_heap.live;
    unsigned long allocations = client_heap.count;
    ck_assert_int_eq(pthread_create(&thread, NULL, ask_before_reading, &server.sock), 0);
    while (completed < WRITTEN) {
        while (submitted < WRITTEN && vfu_client_submit_write(client, 0, 0, data, WRITTEN_SIZE, NULL) >= 0)
            submitted++;
        if (submitted == completed) { /* the queue is full of answers */
            ck_assert_int_eq(vfu_client_serve(client, -1, 1), 0);
            continue;
        }
        ck_assert_int_eq(vfu_client_wait(client, VFU_CLIENT_ANY, &done), 1);
        ck_assert_int_eq(done.result, 0);
        completed++;
    }
    while (vfu_client_serve(client, -1, 10) == 0 && vfu_client_flush(client) == -EAGAIN) {
    }
    pthread_join(thread, NULL);
    ck_assert_uint_eq(client_heap.live, before);
    ck_assert_uint_eq(client_heap.count, allocations); /* requests, replies and DMA cost none */
    script_close(client);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client with a device");
    TCase *tc = tcase_create("many in flight");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, pipelined);
    tcase_add_test(tc, taken_by_id);
    tcase_add_test(tc, own_loop);
    tcase_add_test(tc, posted_and_multi);
    suite_add_tcase(suite, tc);

    tc = tcase_create("regions without messages");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, by_memory);
    tcase_add_test(tc, by_eventfd);
    suite_add_tcase(suite, tc);

    tc = tcase_create("migration");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_loop_test(tc, migration, 0, 2);
    tcase_add_loop_test(tc, dirty_log, 0, 2);
    suite_add_tcase(suite, tc);

    tc = tcase_create("connections");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, twin_socket);
    tcase_add_test(tc, server_started_again);
    tcase_add_test(tc, allocations_fail);
    suite_add_tcase(suite, tc);

    tc = tcase_create("both ends full");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, neither_end_reads_first);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
