/* SPDX-License-Identifier: MIT */
/*
 * ==== client ====
 *
 * Against our own device, which runs in a thread; and against servers that misbehave. Those are scripts without a thread: their
 * replies are in the socket before the client asks, since its ids count from 0. Each test counts the process's descriptors.
 */
#include "client.h"

/* ---- with our own device ------------------------------------------------------------------------------------------------ */

START_TEST(device_queries)
{
    vfu_client *client = device_open(NULL);
    vfu_wire_device_info info;
    vfu_wire_irq_info irq;
    vfu_client_region region;
    ck_assert_uint_eq(vfu_client_caps(client)->max_msg_fds, 16);
    ck_assert(vfu_client_caps(client)->write_multiple);
    ck_assert_int_ge(vfu_client_fd(client), 0);
    ck_assert_int_eq(vfu_client_info(client, &info), 0);
    ck_assert_uint_eq(info.num_regions, 9);
    ck_assert_uint_eq(info.num_irqs, 5);
    ck_assert_uint_eq(info.flags, VFU_DEVICE_INFO_PCI | VFU_DEVICE_INFO_RESET);
    ck_assert_int_eq(vfu_client_irq_info(client, 2, &irq), 0);
    ck_assert_uint_eq(irq.count, RIG_VECTORS);
    ck_assert_int_eq(vfu_client_irq_info(client, 5, &irq), -EINVAL);
    ck_assert_int_eq(vfu_client_region_info(client, 0, &region), 0);
    ck_assert_uint_eq(region.size, RIG_BAR0);
    ck_assert_int_eq(region.fd, -1);
    ck_assert_uint_eq(region.area_count, 0);
    ck_assert_int_eq(vfu_client_region_info(client, 2, &region), 0);
    ck_assert_uint_eq(region.flags, VFU_REGION_INFO_READ | VFU_REGION_INFO_WRITE | VFU_REGION_INFO_MMAP | VFU_REGION_INFO_CAPS);
    ck_assert_uint_eq(region.area_count, 1);
    ck_assert_uint_eq(region.areas[0].offset, PAGE);
    ck_assert_uint_eq(region.areas[0].size, RIG_BAR2 - PAGE);
    ck_assert_uint_eq(ino_of(region.fd), ino_of(R.ram));
    close(region.fd);
    ck_assert_int_eq(vfu_client_region_info(client, 5, &region), 0);
    ck_assert_uint_eq(region.offset, RIG_BAR2);
    ck_assert_uint_eq(region.area_count, 0);
    close(region.fd);
    ck_assert_int_eq(vfu_client_region_info(client, 9, &region), -EINVAL);
    ck_assert_int_eq(region.fd, -1);
    device_close(client);
}
END_TEST

/* Any length goes, in as many messages as both ends' limits need. */
START_TEST(device_regions)
{
    static const uint32_t limits[][2] = {{0, 0}, {4096, 0}, {0, 4096}, {4096, 8192}};
    static uint8_t data[RIG_BAR2], back[RIG_BAR2];
    for (unsigned i = 0; i < COUNT(limits); i++) {
        vfu_dev_desc desc = device_desc();
        desc.max_data_xfer_size = limits[i][1];
        vfu_client *client = device_start(&desc, &(vfu_client_desc){.max_data_xfer_size = limits[i][0]});
        for (uint32_t k = 0; k < sizeof(data); k++)
            data[k] = (uint8_t)(k * 7 + k / 256 + i);
        memset(back, 0, sizeof(back));
        ck_assert_int_eq(vfu_client_region_write(client, 2, 0, data, sizeof(data)), 0);
        ck_assert_int_eq(vfu_client_region_read(client, 2, 0, back, sizeof(back)), 0);
        ck_assert_mem_eq(back, data, sizeof(data));
        ck_assert_int_eq(vfu_client_region_read(client, 2, 5001, back, 12345), 0);
        ck_assert_mem_eq(back, data + 5001, 12345);
        ck_assert_int_eq(vfu_client_region_read(client, 2, RIG_BAR2 - 1, back, 2), -EINVAL);
        ck_assert_int_eq(vfu_client_region_write(client, 6, 0, data, 4), -EINVAL);
        ck_assert_int_eq(vfu_client_region_read(client, 2, 0, back, 0), 0);
        ck_assert_int_eq(vfu_client_region_read(client, 7, 0, back, 4), 0);
        ck_assert_mem_eq(back, "\x34\x12\xa1\xd3", 4);
        device_close(client);
    }
}
END_TEST

START_TEST(device_irqs)
{
    int events[RIG_VECTORS];
    uint8_t vector;
    vfu_client *client = device_open(NULL);
    for (unsigned v = 0; v < RIG_VECTORS; v++)
        events[v] = event();
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 0, RIG_VECTORS, events), 0);
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 1, 1, NULL), 0);
    for (vector = 0; vector < RIG_VECTORS; vector++) {
        ck_assert_int_eq(vfu_client_region_write(client, 0, RAISE_AT, &vector, 1), 0);
        ck_assert_uint_eq(signals(events[vector]), vector != 1);
    }
    ck_assert_int_eq(vfu_client_irq_action(client, 2, 2, 1, VFU_IRQ_SET_ACTION_TRIGGER), 0); /* loopback */
    ck_assert_uint_eq(signals(events[2]), 1);
    ck_assert_int_eq(vfu_client_irq_action(client, 2, 0, 1, VFU_IRQ_SET_ACTION_MASK), -ENOTTY);
    ck_assert_int_eq(vfu_client_irq_action(client, 0, 0, 1, VFU_IRQ_SET_ACTION_UNMASK), 0);
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 3, 2, events), -EINVAL);
    ck_assert_int_eq(vfu_client_irq_action(client, 2, 0, 0, VFU_IRQ_SET_ACTION_TRIGGER), 0); /* switched off */
    vector = 0;
    ck_assert_int_eq(vfu_client_region_write(client, 0, RAISE_AT, &vector, 1), 0);
    ck_assert_uint_eq(signals(events[0]), 0);
    ck_assert_int_eq(vfu_client_reset(client), 0);
    device_close(client);
    ck_assert_uint_eq(R.resets, 1);
    close_fds(events, RIG_VECTORS);
}
END_TEST

/* The device reaches what is mapped, with its permission, by descriptor or by message, and nothing else. */
START_TEST(device_memory)
{
    enum { SIZE = 512 << 10, AT = 0x10000000 };
    int file = memfd("client", SIZE, F_SEAL_SHRINK), wake = event();
    uint8_t *mem = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    for (unsigned by_message = 0; by_message < 2; by_message++) {
        vfu_client *client = device_open(NULL);
        int fd = by_message ? -1 : file;
        ck_assert_int_eq(vfu_client_irq_assign(client, 2, 3, 1, &wake), 0);
        ck_assert_int_eq(vfu_client_dma_map(client, AT, SIZE / 2, VFU_IOMMU_READ | VFU_IOMMU_WRITE, mem, fd, 0), 0);
        ck_assert_int_eq(vfu_client_dma_map(client, AT + SIZE / 2, SIZE / 2, VFU_IOMMU_READ, mem + SIZE / 2, fd, SIZE / 2), 0);
        ck_assert_int_eq(vfu_client_dma_map(client, AT, PAGE, VFU_IOMMU_READ, mem, fd, 0), -EEXIST);
        for (unsigned i = 0; i < SIZE; i++)
            mem[i] = (uint8_t)(i * 11 + i / 256);
        ck_assert_int_eq(device_dma(client, wake, AT + 5, SIZE - 9, false), 0);
        ck_assert_int_eq(memcmp(device_buffer, mem + 5, SIZE - 9), 0);
        for (unsigned i = 0; i < SIZE; i++)
            device_buffer[i] = (uint8_t)(i * 3 + 1);
        ck_assert_int_eq(device_dma(client, wake, AT + 1, SIZE / 2 - 1, true), 0);
        ck_assert_int_eq(memcmp(device_buffer, mem + 1, SIZE / 2 - 1), 0);
        ck_assert_int_eq(device_dma(client, wake, AT + SIZE / 2 - 4, 8, true), -EACCES);
        ck_assert_int_eq(device_dma(client, wake, AT + SIZE - 4, 8, false), -ENOENT);
        /* what the client takes back by itself, without telling, is refused by the client, if it is asked */
        if (by_message) {
            ck_assert_int_eq(vfu_iommu_unmap(vfu_client_iommu(client), AT, SIZE / 2), 1);
            ck_assert_int_eq(device_dma(client, wake, AT, 8, false), -EIO);
        }
        must(vfu_client_dma_unmap(client, AT, SIZE / 2));
        ck_assert_int_eq(device_dma(client, wake, AT, 8, false), -ENOENT);
        ck_assert_int_eq(vfu_client_dma_unmap(client, AT + SIZE / 2, PAGE), -EINVAL); /* would split: it stays, at both ends */
        ck_assert_int_eq(device_dma(client, wake, AT + SIZE / 2, 8, false), 0);
        must(vfu_client_dma_unmap(client, 0, UINT64_C(1) << 63));
        ck_assert_int_eq(device_dma(client, wake, AT + SIZE / 2, 8, false), -ENOENT);
        device_close(client);
        ck_assert_uint_eq(R.maps, R.unmaps);
    }
    munmap(mem, SIZE);
    close(file);
    close(wake);
}
END_TEST

/* ---- a scripted server -------------------------------------------------------------------------------------------------- */

/* The client has given up: every call says so, at once. */
static void check_broken(vfu_client *client)
{
    vfu_wire_device_info info;
    vfu_client_region region;
    uint8_t byte = 0;
    int none = -1;
    vfu_msg request, answer;
    vfu_msg_init(&request, 0, VFU_CMD_DEVICE_RESET);
    ck_assert_int_eq(vfu_client_info(client, &info), -EPIPE);
    ck_assert_int_eq(vfu_client_region_info(client, 0, &region), -EPIPE);
    ck_assert_int_eq(vfu_client_region_read(client, 0, 0, &byte, 1), -EPIPE);
    ck_assert_int_eq(vfu_client_region_write(client, 0, 0, &byte, 1), -EPIPE);
    ck_assert_int_eq(vfu_client_irq_assign(client, 0, 0, 1, NULL), -EPIPE);
    ck_assert_int_eq(vfu_client_reset(client), -EPIPE);
    ck_assert_int_eq(vfu_client_serve(client, -1, -1), -EPIPE);
    ck_assert_int_eq(vfu_client_call(client, &request, NULL, 0, &answer, &none, 1), -EPIPE);
    ck_assert_int_eq(vfu_client_dma_map(client, 0, PAGE, VFU_IOMMU_READ, &byte, -1, 0), -EPIPE);
    ck_assert_int_eq(vfu_client_dma_unmap(client, 0, PAGE), -EPIPE);
    vfu_iommu_stats stats;
    vfu_iommu_get_stats(vfu_client_iommu(client), &stats);
    ck_assert_uint_eq(stats.mappings, 0);
    ck_assert_int_eq(vfu_client_fd(client), -1);
}

static const struct greeting_case {
    uint16_t major, minor;
    const char *json;
    int err;
} greeting_cases[] = {
    {0, 0, NULL, 0},
    {0, 0, "{}", 0},
    {0, 0, "{\"capabilities\":{\"max_msg_fds\":1,\"max_data_xfer_size\":4096,\"new\":{}}}", 0},
    {1, 0, "{}", -EPROTO},
    {0, 1, "{}", -EPROTO},
    {0, 0, "{", -EPROTO},
    {0, 0, "[]", -EPROTO},
    {0, 0, "{\"capabilities\":{\"max_data_xfer_size\":0}}", -EPROTO},
    {0, 0, "{\"capabilities\":{\"max_data_xfer_size\":\"x\"}}", -EPROTO},
    {0, 0, "{\"capabilities\":{\"max_msg_fds\":-1}}", -EPROTO},
};

START_TEST(greeting)
{
    const struct greeting_case *c = &greeting_cases[_i];
    uint8_t version[256];
    vfu_client *client = (vfu_client *)version;
    vfu_client_desc desc = script_desc(0);
    int sock = script_start();
    memcpy(version, &(vfu_wire_version){c->major, c->minor}, 4);
    if (c->json)
        memcpy(version + 4, c->json, strlen(c->json) + 1);
    reply(VFU_CMD_VERSION, version, (uint32_t)(4 + (c->json ? strlen(c->json) + 1 : 0)));
    ck_assert_int_eq(vfu_client_attach(&client, sock, &desc), c->err);
    if (c->err)
        ck_assert_ptr_null(client);
    script_close(client);
}
END_TEST

/* How VERSION can fail by its frame. */
START_TEST(greeting_fails)
{
    static const struct {
        uint16_t id, cmd;
        uint32_t flags, error, size, len;
        int err;
    } cases[] = {
        {0, 1, 0x21, EINVAL, 16, 0, -EINVAL}, {0, 1, 0x21, 0, 16, 0, -EIO},   {0, 1, 0x21, UINT32_MAX, 16, 0, -EIO}, {1, 1, 1, 0, 20, 4, -EPROTO},
        {0, 2, 1, 0, 16, 0, -EPROTO},         {0, 1, 1, 0, 18, 2, -EPROTO},   {0, 1, 1, 0, 15, 0, -EPROTO},          {0, 1, 1, 0, UINT32_MAX, 0, -EPROTO},
        {0, 1, 2, 0, 20, 4, -EPROTO},         {0, 99, 1, 0, 20, 4, -EPROTO},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_client *client;
        vfu_client_desc desc = script_desc(0);
        int sock = script_start();
        say_as(cases[i].id, cases[i].cmd, cases[i].flags, cases[i].error, cases[i].size, "\0\0\0\0", cases[i].len, NULL, 0);
        ck_assert_int_eq(vfu_client_attach(&client, sock, &desc), cases[i].err);
        script_close(client);
    }
    /* silence, the end, no socket, a wrong descriptor */
    vfu_client *client;
    vfu_client_desc desc = script_desc(20);
    ck_assert_int_eq(vfu_client_attach(&client, script_start(), &desc), -ETIMEDOUT);
    script_close(client);
    int sock = script_start();
    peer_close(&server);
    ck_assert_int_eq(vfu_client_attach(&client, sock, &desc), -EPIPE);
    ck_assert_int_lt(vfu_client_attach(&client, null_fd(), &desc), 0);
    ck_assert_int_eq(vfu_client_attach(&client, -1, &desc), -EBADF);
    ck_assert_int_eq(vfu_client_connect(&client, "/nonexistent/socket", &desc), -ENOENT);
    ck_assert_ptr_null(client);
    desc.max_data_xfer_size = 4095;
    ck_assert_int_eq(vfu_client_attach(&client, null_fd(), &desc), -EINVAL);
    desc.max_data_xfer_size = (16 << 20) + 1;
    ck_assert_int_eq(vfu_client_attach(&client, null_fd(), &desc), -EINVAL);
    vfu_client_destroy(NULL);
    ck_assert_uint_eq(client_heap.live, 0);
}
END_TEST

/* Replies to GET_INFO. */
START_TEST(bad_replies)
{
    static const struct {
        int id, cmd; /* added to the right ones */
        uint32_t flags, error, size, len;
        int err;
        bool broken;
    } cases[] = {
        {0, 0, 1, 0, 32, 16, 0, false},
        {0, 0, 1, 0, 40, 24, 0, false}, /* longer than known */
        {0, 0, 0xffffffc1, 0, 32, 16, 0, false}, /* reserved flags */
        {1, 0, 1, 0, 32, 16, -EPROTO, true},
        {-1, 0, 1, 0, 32, 16, -EPROTO, true},
        {0, 1, 1, 0, 48, 32, -EPROTO, true},
        {0, 100, 1, 0, 32, 16, -EPROTO, true},
        {0, 0, 1, 0, 31, 15, -EPROTO, true},
        {0, 0, 1, 0, 16, 0, -EPROTO, true},
        {0, 0, 1, 0, 15, 0, -EPROTO, true},
        {0, 0, 1, 0, 0, 0, -EPROTO, true},
        {0, 0, 1, 0, (1 << 20) + 4097, 0, -EPROTO, true},
        {0, 0, 1, 0, UINT32_MAX, 0, -EPROTO, true},
        {0, 0, 2, 0, 32, 16, -EPROTO, true},
        {0, 0, 15, 0, 32, 16, -EPROTO, true},
        {0, 0, 0x21, EPERM, 16, 0, -EPERM, false},
        {0, 0, 0x21, ENOENT, 32, 16, -ENOENT, false}, /* with a payload */
        {0, 0, 0x21, 4095, 16, 0, -4095, false},
        {0, 0, 0x21, 0, 16, 0, -EIO, false},
        {0, 0, 0x21, 4096, 16, 0, -EIO, false},
        {0, 0, 0x21, 0x80000000, 16, 0, -EIO, false},
        {0, 0, 0x21, UINT32_MAX, 16, 0, -EIO, false},
        {0, 100, 0x21, EPERM, 16, 0, -EPROTO, true}, /* an error about something else */
    };
    static const uint8_t payload[64];
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_wire_device_info info;
        vfu_client *client = script_open();
        say_as((uint16_t)(script_id++ + cases[i].id), (uint16_t)(VFU_CMD_DEVICE_GET_INFO + cases[i].cmd), cases[i].flags, cases[i].error,
               cases[i].size, payload, cases[i].len, NULL, 0);
        ck_assert_int_eq(vfu_client_info(client, &info), cases[i].err);
        if (cases[i].broken)
            check_broken(client);
        else
            check_usable(client);
        script_close(client);
    }
}
END_TEST

/* No reply, for a while, or a part of one. */
START_TEST(silence)
{
    vfu_wire_device_info info = {.argsz = 16};
    for (uint32_t len = 0; len < 16; len += 5) {
        vfu_client *client = script_open_with("{}", 100);
        if (len)
            say_as(script_id, VFU_CMD_DEVICE_GET_INFO, VFU_HDR_REPLY, 0, 32, &info, len, NULL, 0);
        ck_assert_int_eq(vfu_client_info(client, &info), -ETIMEDOUT);
        check_broken(client);
        script_close(client);
    }
}
END_TEST

/* The server dies after each byte of a session: each call ends, well or with -EPIPE, and after the first failure all do. */
START_TEST(server_dies_at_every_byte)
{
    enum { TOTAL = (16 + 4) + 32 + (32 + 8) + 16 };
    for (size_t cut = 0; cut <= TOTAL; cut++) {
        uint8_t bytes[TOTAL], data[8];
        vfu_client *client = NULL;
        vfu_client_desc desc = script_desc(0);
        vfu_wire_device_info info = {.argsz = 16};
        vfu_wire_region_access access = {.count = 8};
        vfu_wire_header headers[4] = {{0, VFU_CMD_VERSION, 20, 1, 0}, {1, VFU_CMD_DEVICE_GET_INFO, 32, 1, 0}, {2, VFU_CMD_REGION_READ, 40, 1, 0},
                                      {3, VFU_CMD_DEVICE_RESET, 16, 1, 0}};
        int sock = script_start(), results[4];
        memset(bytes, 0, sizeof(bytes));
        memcpy(bytes, &headers[0], 16);
        memcpy(bytes + 20, &headers[1], 16);
        memcpy(bytes + 36, &info, 16);
        memcpy(bytes + 52, &headers[2], 16);
        memcpy(bytes + 68, &access, 16);
        memcpy(bytes + 92, &headers[3], 16);
        if (cut)
            send_all(server.sock, bytes, cut, NULL, 0);
        ck_assert_int_eq(shutdown(server.sock, SHUT_WR), 0);
        results[0] = vfu_client_attach(&client, sock, &desc);
        results[1] = client ? vfu_client_info(client, &info) : -EPIPE;
        results[2] = client ? vfu_client_region_read(client, 0, 0, data, sizeof(data)) : -EPIPE;
        results[3] = client ? vfu_client_reset(client) : -EPIPE;
        static const size_t ends[4] = {20, 52, 92, 108};
        for (unsigned i = 0; i < 4; i++)
            ck_assert_int_eq(results[i], cut >= ends[i] ? 0 : -EPIPE);
        script_close(client);
    }
}
END_TEST

/* ---- GET_REGION_INFO ---------------------------------------------------------------------------------------------------- */

enum { INFO_MAX = 32 + 16 + 3000 * 16 };

static uint32_t put_info(uint8_t *out, uint32_t argsz, uint32_t flags, uint32_t index, uint32_t cap_offset)
{
    vfu_wire_region_info info = {.argsz = argsz, .flags = flags, .index = index, .cap_offset = cap_offset, .size = 0x10000, .offset = 0x1000};
    memset(out, 0, INFO_MAX);
    memcpy(out, &info, sizeof(info));
    return 32;
}

static uint32_t put_areas(uint8_t *out, uint16_t id, uint32_t next, uint32_t claimed, uint32_t count, uint64_t offset, uint64_t size)
{
    vfu_wire_cap_sparse_mmap cap = {.header = {.id = id, .version = 1, .next = next}, .nr_areas = claimed};
    memcpy(out + 32, &cap, 16);
    for (uint32_t i = 0; i < count; i++)
        memcpy(out + 48 + 16 * i, &(vfu_wire_sparse_area){offset, size}, 16);
    return 48 + 16 * count;
}

START_TEST(region_info)
{
    enum { F = VFU_REGION_INFO_READ | VFU_REGION_INFO_MMAP, C = VFU_REGION_INFO_CAPS };
    static const struct {
        uint32_t flags, index, cap_offset;
        uint16_t cap;
        uint32_t next, claimed, count;
        uint64_t offset, size;
        int err;
        uint32_t areas;
        bool broken;
    } cases[] = {
        {F | C, 2, 32, 1, 0, 1, 1, 0x1000, 0x2000, 0, 1, false},
        {F | C, 2, 32, 1, 0, 16, 16, 0, 0x10000, 0, 16, false},
        {F | C, 2, 32, 1, 0, 17, 17, 0, 0x1000, 0, 17, false},
        {F | C, 2, 32, 1, 0, 3000, 3000, 0, 0x1000, 0, 3000, false},
        {F | C, 2, 32, 99, 0, 1, 1, 0, 0x1000, 0, 0, false}, /* unknown capability */
        {F | C, 2, 32, 1, 0, 0, 0, 0, 0, 0, 0, false},       /* no areas */
        {F | C, 3, 32, 1, 0, 1, 1, 0x1000, 0x2000, -EPROTO, 0, true}, /* another region */
        {F | C, 2, 32, 1, 32, 1, 1, 0, 0x1000, -EPROTO, 0, true},     /* the chain loops */
        {F | C, 2, 32, 1, 40, 1, 1, 0, 0x1000, -EPROTO, 0, true},
        {F | C, 2, 32, 1, 8, 1, 1, 0, 0x1000, -EPROTO, 0, true},
        {F | C, 2, 32, 1, 64, 1, 1, 0, 0x1000, -EPROTO, 0, true}, /* and leaves the message */
        {F | C, 2, 32, 1, UINT32_MAX, 1, 1, 0, 0x1000, -EPROTO, 0, true},
        {F | C, 2, 8, 1, 0, 1, 1, 0, 0x1000, -EPROTO, 0, true},
        {F | C, 2, UINT32_MAX, 1, 0, 1, 1, 0, 0x1000, -EPROTO, 0, true},
        {F | C, 2, 32, 1, 0, 2, 1, 0, 0x1000, -EPROTO, 0, true}, /* more areas than there are */
        {F | C, 2, 32, 1, 0, UINT32_MAX, 1, 0, 0x1000, -EPROTO, 0, true},
        {F | C, 2, 32, 1, 0, 0x10000001, 1, 0, 0x1000, -EPROTO, 0, true}, /* times 16 wraps */
        {F | C, 2, 32, 1, 0, 1, 1, 0x1000, 0x10000, -EPROTO, 0, true},    /* outside of the region */
        {F | C, 2, 32, 1, 0, 1, 1, 0x10000, 1, -EPROTO, 0, true},
        {F | C, 2, 32, 1, 0, 1, 1, UINT64_MAX, 2, -EPROTO, 0, true},
        {F | C, 2, 32, 1, 0, 1, 1, 1, UINT64_MAX, -EPROTO, 0, true},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint8_t info[INFO_MAX];
        vfu_client_region region;
        vfu_client *client = script_open();
        uint32_t argsz = 48 + 16 * cases[i].count;
        put_info(info, argsz, F, 2, 0); /* the first reply only announces the size */
        reply(VFU_CMD_DEVICE_GET_REGION_INFO, info, 32);
        put_info(info, argsz, cases[i].flags, cases[i].index, cases[i].cap_offset);
        put_areas(info, cases[i].cap, cases[i].next, cases[i].claimed, cases[i].count, cases[i].offset, cases[i].size);
        int fd = memfd("region", PAGE, 0);
        say_as(script_id++, VFU_CMD_DEVICE_GET_REGION_INFO, VFU_HDR_REPLY, 0, 16 + argsz, info, argsz, &fd, 1);
        int err = vfu_client_region_info(client, 2, &region);
        ck_assert_msg(err == cases[i].err, "case %u: %d", i, err);
        if (err) {
            ck_assert_int_eq(region.fd, -1);
        } else {
            ck_assert_uint_eq(region.size, 0x10000);
            ck_assert_uint_eq(region.offset, 0x1000);
            ck_assert_uint_eq(region.area_count, cases[i].areas);
            if (region.area_count) {
                ck_assert_uint_eq(region.areas[0].offset, cases[i].offset);
                ck_assert_uint_eq(region.areas[region.area_count - 1].size, cases[i].size);
            }
            ck_assert_uint_eq(ino_of(region.fd), ino_of(fd));
            close(region.fd);
        }
        if (cases[i].broken)
            check_broken(client);
        else
            check_usable(client);
        close(fd);
        script_close(client);
    }
}
END_TEST

/* A server that never gives what it announces: the areas are not known, so the region isn't wholly mappable. */
START_TEST(region_info_always_cut)
{
    uint8_t info[INFO_MAX];
    vfu_client_region region;
    vfu_client *client = script_open();
    int fd = memfd("region", PAGE, 0);
    for (unsigned i = 0; i < 2; i++) {
        put_info(info, UINT32_MAX, VFU_REGION_INFO_READ | VFU_REGION_INFO_MMAP, 2, 0);
        say_as(script_id++, VFU_CMD_DEVICE_GET_REGION_INFO, VFU_HDR_REPLY, 0, 48, info, 32, &fd, 1);
    }
    ck_assert_int_eq(vfu_client_region_info(client, 2, &region), -EPROTO);
    ck_assert_int_eq(region.fd, -1);
    close(fd);
    script_close(client);
}
END_TEST

/* Descriptors that nobody asked for are closed, and too many are no harm. */
START_TEST(surplus_descriptors)
{
    uint8_t info[INFO_MAX];
    int fds[20];
    for (unsigned i = 0; i < COUNT(fds); i++)
        fds[i] = memfd("surplus", PAGE, 0);
    for (unsigned count = 1; count <= COUNT(fds); count++) {
        vfu_client_region region;
        vfu_client *client = script_open();
        unsigned open = fds_open();
        put_info(info, 32, VFU_REGION_INFO_READ | VFU_REGION_INFO_MMAP, 5, 0);
        say_as(script_id++, VFU_CMD_DEVICE_GET_REGION_INFO, VFU_HDR_REPLY, 0, 48, info, 32, fds, count);
        ck_assert_int_eq(vfu_client_region_info(client, 5, &region), 0);
        ck_assert_uint_eq(ino_of(region.fd), ino_of(fds[0]));
        close(region.fd);
        say_as(script_id++, VFU_CMD_DEVICE_RESET, VFU_HDR_REPLY, 0, 16, NULL, 0, fds, count);
        ck_assert_int_eq(vfu_client_reset(client), 0);
        check_usable(client);
        ck_assert_uint_eq(fds_open(), open);
        script_close(client);
    }
    close_fds(fds, COUNT(fds));
}
END_TEST

/* ---- other calls -------------------------------------------------------------------------------------------------------- */

START_TEST(region_access_replies)
{
    static const struct {
        int64_t offset;
        int32_t region, count;
        uint32_t len; /* of the data */
        int err;
    } cases[] = {
        {0, 0, 0, 8, 0},        {1, 0, 0, 8, -EPROTO}, {0, 1, 0, 8, -EPROTO},         {0, 0, -4, 4, -EPROTO},
        {0, 0, 4, 12, -EPROTO}, {0, 0, 0, 7, -EPROTO}, {0, 0, 0, 9, -EPROTO},         {0, 0, 0, 0, -EPROTO},
        {0, 0, -8, 0, -EPROTO}, {0, 0, INT32_MAX, 8, -EPROTO},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint8_t payload[64] = {0}, data[8];
        vfu_wire_region_access access = {.offset = (uint64_t)(16 + cases[i].offset), .region = (uint32_t)(2 + cases[i].region),
                                         .count = (uint32_t)(8 + (int64_t)cases[i].count)};
        vfu_client *client = script_open();
        memcpy(payload, &access, sizeof(access));
        memcpy(payload + 16, "abcdefghijkl", 12);
        reply(VFU_CMD_REGION_READ, payload, 16 + cases[i].len);
        ck_assert_int_eq(vfu_client_region_read(client, 2, 16, data, 8), cases[i].err);
        if (cases[i].err) {
            check_broken(client);
        } else {
            ck_assert_mem_eq(data, "abcdefgh", 8);
            reply(VFU_CMD_REGION_WRITE, payload, 16);
            ck_assert_int_eq(vfu_client_region_write(client, 2, 16, data, 8), 0);
            check_usable(client);
        }
        script_close(client);
    }
}
END_TEST

/* The server's limit cuts an access; its max_msg_fds cuts an assignment, and de-assignment needs no descriptors. */
START_TEST(limits_of_the_server)
{
    static uint8_t data[300];
    int events[8];
    vfu_client *client = script_open_with("{\"capabilities\":{\"max_msg_fds\":3,\"max_data_xfer_size\":100}}", 0);
    for (unsigned i = 0; i < 3; i++) {
        vfu_wire_region_access access = {.offset = i * 100, .region = 0, .count = i < 2 ? 100 : 50};
        reply(VFU_CMD_REGION_WRITE, &access, sizeof(access));
    }
    ck_assert_int_eq(vfu_client_region_write(client, 0, 0, data, 250), 0);
    for (unsigned i = 0; i < 3; i++)
        ck_assert_uint_eq(heard().u.region.count, i < 2 ? 100 : 50);
    for (unsigned i = 0; i < COUNT(events); i++)
        events[i] = event();
    for (unsigned i = 0; i < 3; i++)
        reply(VFU_CMD_DEVICE_SET_IRQS, NULL, 0);
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 10, 8, events), 0);
    for (unsigned i = 0; i < 3; i++) {
        vfu_msg set = heard();
        ck_assert_uint_eq(set.u.irq_set.start, 10 + i * 3);
        ck_assert_uint_eq(set.u.irq_set.count, i < 2 ? 3 : 2);
        ck_assert_uint_eq(server.fd_count, set.u.irq_set.count);
        ck_assert_uint_eq(set.u.irq_set.argsz, 20);
    }
    reply(VFU_CMD_DEVICE_SET_IRQS, NULL, 0);
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 10, 8, NULL), 0);
    vfu_msg set = heard();
    ck_assert_uint_eq(set.u.irq_set.count, 8);
    ck_assert_uint_eq(server.fd_count, 0);
    close_fds(events, COUNT(events));
    script_close(client);
    /* a server that takes none */
    client = script_open_with("{\"capabilities\":{\"max_msg_fds\":0}}", 0);
    int fd = event();
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 0, 1, &fd), -EINVAL);
    reply(VFU_CMD_DEVICE_SET_IRQS, NULL, 0);
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 0, 1, NULL), 0);
    close(fd);
    script_close(client);
}
END_TEST

static uint64_t client_mappings(vfu_client *client)
{
    vfu_iommu_stats stats;
    vfu_iommu_get_stats(vfu_client_iommu(client), &stats);
    return stats.mappings;
}

/* What the server refuses is not mapped, and what it doesn't let go stays. */
START_TEST(refused_maps)
{
    static uint8_t mem[PAGE];
    vfu_client *client = script_open();
    vfu_wire_dma_unmap unmap = {.argsz = 24, .address = 0x1000, .size = PAGE};
    int file = memfd("map", PAGE, 0);
    say_as(script_id++, VFU_CMD_DMA_MAP, 0x21, EPERM, 16, NULL, 0, NULL, 0);
    ck_assert_int_eq(vfu_client_dma_map(client, 0x1000, PAGE, VFU_IOMMU_READ, mem, -1, 77), -EPERM);
    ck_assert_uint_eq(client_mappings(client), 0);
    vfu_msg map = heard();
    ck_assert_uint_eq(map.u.dma_map.offset, 0); /* without a descriptor */
    ck_assert_uint_eq(map.u.dma_map.flags, VFU_DMA_READABLE);
    reply(VFU_CMD_DMA_MAP, NULL, 0);
    ck_assert_int_eq(vfu_client_dma_map(client, 0x1000, PAGE, VFU_IOMMU_WRITE, mem, file, 0x3000), 0);
    map = heard();
    ck_assert_uint_eq(map.u.dma_map.argsz, 32);
    ck_assert_uint_eq(map.u.dma_map.offset, 0x3000);
    ck_assert_uint_eq(map.u.dma_map.flags, VFU_DMA_WRITEABLE);
    ck_assert_uint_eq(server.fd_count, 1);
    /* the client's own table refuses before the server is asked */
    ck_assert_int_eq(vfu_client_dma_map(client, 0x1000, PAGE, VFU_IOMMU_READ, mem, -1, 0), -EEXIST);
    ck_assert_int_eq(vfu_client_dma_map(client, 0x2001, PAGE, VFU_IOMMU_READ, mem, -1, 0), -EINVAL);
    ck_assert_int_eq(vfu_client_dma_map(client, 0x2000, 0, VFU_IOMMU_READ, mem, -1, 0), -EINVAL);
    ck_assert_int_eq(vfu_client_dma_map(client, 0x2000, PAGE, 0, mem, -1, 0), -EINVAL);
    say_as(script_id++, VFU_CMD_DMA_UNMAP, 0x21, EBUSY, 16, NULL, 0, NULL, 0);
    ck_assert_int_eq(vfu_client_dma_unmap(client, 0x1000, PAGE), -EBUSY);
    ck_assert_uint_eq(client_mappings(client), 1);
    reply(VFU_CMD_DMA_UNMAP, &unmap, sizeof(unmap));
    must(vfu_client_dma_unmap(client, 0x1000, PAGE));
    ck_assert_uint_eq(client_mappings(client), 0);
    close(file);
    script_close(client);
}
END_TEST

/* ---- requests of the device --------------------------------------------------------------------------------------------- */

/* Each is answered while the client waits for something else. */
START_TEST(dma_requests)
{
    enum { RO = 0x1000, WO = 0x2000, RW_ = 0x3000 };
    static const struct {
        uint16_t cmd;
        uint64_t address, count;
        uint32_t len; /* of the data */
        uint32_t flags;
        int err; /* 1: no answer */
    } cases[] = {
        {VFU_CMD_DMA_READ, RO, 16, 0, 0, 0},
        {VFU_CMD_DMA_READ, RO + PAGE - 1, 1, 0, 0, 0},
        {VFU_CMD_DMA_READ, RO, 0, 0, 0, 0},
        {VFU_CMD_DMA_READ, RO, PAGE, 0, 0, 0},
        {VFU_CMD_DMA_READ, RO, PAGE + 1, 0, 0, -EACCES},
        {VFU_CMD_DMA_READ, WO, 8, 0, 0, -EACCES},
        {VFU_CMD_DMA_READ, 0, 8, 0, 0, -ENOENT},
        {VFU_CMD_DMA_READ, RO - 1, 2, 0, 0, -ENOENT},
        {VFU_CMD_DMA_READ, RW_ + PAGE - 1, 2, 0, 0, -ENOENT},
        {VFU_CMD_DMA_READ, UINT64_MAX, 2, 0, 0, -EINVAL},
        {VFU_CMD_DMA_READ, 0, (1 << 20) + 1, 0, 0, -E2BIG},
        {VFU_CMD_DMA_READ, RO, UINT64_C(1) << 63, 0, 0, -E2BIG},
        {VFU_CMD_DMA_READ, RO, UINT64_MAX, 0, 0, -E2BIG},
        {VFU_CMD_DMA_READ, RO, (UINT64_C(1) << 32) + 8, 0, 0, -E2BIG},
        {VFU_CMD_DMA_READ, RO, 8, 8, 0, -EINVAL}, /* with data */
        {VFU_CMD_DMA_READ, RO, 8, 0, VFU_HDR_NO_REPLY, 1},
        {VFU_CMD_DMA_READ, 0, 8, 0, VFU_HDR_NO_REPLY, 1},
        {VFU_CMD_DMA_WRITE, WO, 8, 8, 0, 0},
        {VFU_CMD_DMA_WRITE, RW_ + 100, 100, 100, 0, 0},
        {VFU_CMD_DMA_WRITE, RW_, 0, 0, 0, 0},
        {VFU_CMD_DMA_WRITE, RO, 8, 8, 0, -EACCES},
        {VFU_CMD_DMA_WRITE, RW_ + PAGE - 4, 8, 8, 0, -ENOENT},
        {VFU_CMD_DMA_WRITE, RW_, 8, 7, 0, -EINVAL},
        {VFU_CMD_DMA_WRITE, RW_, 8, 9, 0, -EINVAL},
        {VFU_CMD_DMA_WRITE, RW_, UINT64_C(1) << 63, 8, 0, -EINVAL},
        {VFU_CMD_DMA_WRITE, RW_, UINT64_MAX, 8, 0, -EINVAL},
        {VFU_CMD_DMA_MAP, 0, 0, 16, 0, -ENOSYS}, /* what only a client may ask */
        {VFU_CMD_VERSION, 0, 0, 0, 0, -EINVAL},
        {VFU_CMD_DEVICE_RESET, 0, 0, 0, 0, -EINVAL},
        {0, 0, 0, 0, 0, -ENOSYS},
        {14, 0, 0, 0, 0, -ENOSYS},
        {65535, 0, 0, 30, 0, -ENOSYS},
        {65535, 0, 0, 30, VFU_HDR_NO_REPLY, 1},
    };
    static uint8_t ro[PAGE], wo[PAGE], rw[PAGE];
    static const struct {
        uint64_t at;
        uint32_t prot;
        uint8_t *mem;
    } maps[] = {{RO, VFU_IOMMU_READ, ro}, {WO, VFU_IOMMU_WRITE, wo}, {RW_, VFU_IOMMU_READ | VFU_IOMMU_WRITE, rw}};
    vfu_client *client = script_open();
    for (unsigned i = 0; i < COUNT(maps); i++) {
        reply(VFU_CMD_DMA_MAP, NULL, 0);
        ck_assert_int_eq(vfu_client_dma_map(client, maps[i].at, PAGE, maps[i].prot, maps[i].mem, -1, 0), 0);
        heard();
    }
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint8_t payload[200];
        vfu_wire_dma_access access = {cases[i].address, cases[i].count};
        memset(payload, (int)(0x40 + i), sizeof(payload));
        memset(ro, (int)i, sizeof(ro));
        memcpy(payload, &access, sizeof(access));
        say_as((uint16_t)(7000 + i), cases[i].cmd, cases[i].flags, 0, 32 + cases[i].len, payload, 16 + cases[i].len, NULL, 0);
        check_usable(client);
        ck_assert_uint_eq(heard().cmd, VFU_CMD_DEVICE_GET_INFO);
        if (cases[i].err == 1) {
            ck_assert_int_eq(peer_receive(&server), 0);
            continue;
        }
        ck_assert_int_eq(peer_receive(&server), 1);
        vfu_wire_header header = header_of(server.bytes);
        ck_assert_uint_eq(header.id, 7000 + i);
        ck_assert_uint_eq(header.cmd, cases[i].cmd);
        if (cases[i].err) {
            ck_assert_uint_eq(header.flags, VFU_HDR_REPLY | VFU_HDR_ERROR);
            ck_assert_uint_eq(header.size, 16);
            /* which error doesn't matter to a device for commands that it may not send */
            bool may = cases[i].cmd == VFU_CMD_DMA_READ || cases[i].cmd == VFU_CMD_DMA_WRITE;
            ck_assert_msg(!may || header.error == (uint32_t)-cases[i].err, "case %u: %u", i, header.error);
            ck_assert_uint_gt(header.error, 0);
            continue;
        }
        ck_assert_uint_eq(header.flags, VFU_HDR_REPLY);
        ck_assert_uint_eq(header.size, 32 + (cases[i].cmd == VFU_CMD_DMA_READ ? cases[i].count : 0));
        ck_assert_mem_eq(server.bytes + 16, &access, 16);
        for (uint64_t k = 0; k < cases[i].count; k++)
            if (cases[i].cmd == VFU_CMD_DMA_READ)
                ck_assert_uint_eq(server.bytes[32 + k], i);
            else
                ck_assert_uint_eq((cases[i].address >= RW_ ? rw : wo)[cases[i].address % PAGE + k], 0x40 + i);
    }
    script_close(client);
}
END_TEST

/* A server that asks and never takes the answers: the client's memory is bounded, and it gives up. */
START_TEST(flood_without_reading)
{
    enum { SIZE = 64 << 10 };
    static uint8_t mem[SIZE];
    vfu_wire_dma_access access = {0, SIZE};
    vfu_wire_device_info info;
    vfu_client *client = script_open_with("{}", 100);
    reply(VFU_CMD_DMA_MAP, NULL, 0);
    ck_assert_int_eq(vfu_client_dma_map(client, 0, SIZE, VFU_IOMMU_READ, mem, -1, 0), 0);
    for (unsigned i = 0; i < 100; i++)
        say_as(0, VFU_CMD_DMA_READ, 0, 0, 32, &access, sizeof(access), NULL, 0);
    size_t before = client_heap.live;
    if (_i)
        ck_assert_int_eq(vfu_client_info(client, &info), -ETIMEDOUT);
    else
        ck_assert_int_eq(vfu_client_serve(client, -1, PATIENCE_MS), -ETIMEDOUT);
    ck_assert_uint_le(client_heap.live, before);
    vfu_iommu_unmap_all(vfu_client_iommu(client));
    check_broken(client);
    script_close(client);
}
END_TEST

/* A server that only asks, and takes the answers, is late as well. */
static void *ask_for_ever(void *arg)
{
    uint8_t request[32] = {0}, answers[4096];
    vfu_wire_header header = {.cmd = VFU_CMD_DMA_READ, .size = 32};
    int sock = *(int *)arg;
    memcpy(request, &header, 16);
    for (;;) {
        struct pollfd ready = {.fd = sock, .events = POLLIN | POLLOUT};
        ck_assert_int_ge(poll(&ready, 1, PATIENCE_MS), 1);
        if (ready.revents & POLLIN && recv(sock, answers, sizeof(answers), MSG_DONTWAIT) <= 0)
            return NULL;
        if (ready.revents & POLLOUT && send(sock, request, sizeof(request), MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno != EAGAIN)
            return NULL;
    }
}

START_TEST(flood_with_reading)
{
    vfu_wire_device_info info;
    pthread_t thread;
    vfu_client *client = script_open_with("{}", 50);
    ck_assert_int_eq(pthread_create(&thread, NULL, ask_for_ever, &server.sock), 0);
    ck_assert_int_eq(vfu_client_serve(client, -1, 20), 0);
    ck_assert_int_eq(vfu_client_serve(client, -1, 0), 0);
    int wake = event();
    ck_assert_int_eq(write(wake, &(uint64_t){1}, 8), 8);
    ck_assert_int_eq(vfu_client_serve(client, wake, -1), 1);
    close(wake);
    ck_assert_int_eq(vfu_client_info(client, &info), -ETIMEDOUT);
    check_broken(client);
    pthread_join(thread, NULL);
    script_close(client);
}
END_TEST

/* What is there when serve is called is served, also when no time is left: a caller that waits with poll() relies on it. */
START_TEST(serve_without_waiting)
{
    vfu_wire_dma_access access = {0, 8};
    vfu_client *client = script_open();
    ck_assert_int_eq(vfu_client_serve(client, -1, 0), 0);
    for (unsigned i = 0; i < 20000; i++) {
        say_as((uint16_t)i, VFU_CMD_DMA_READ, 0, 0, 32, &access, sizeof(access), NULL, 0);
        ck_assert_int_eq(vfu_client_serve(client, -1, 0), 0);
        ck_assert_msg(peer_receive(&server) == 1, "request %u was received and not served", i);
    }
    /* likewise when the wake-up came first */
    int wake = event();
    ck_assert_int_eq(write(wake, &(uint64_t){1}, 8), 8);
    say_as(1, VFU_CMD_DMA_READ, 0, 0, 32, &access, sizeof(access), NULL, 0);
    ck_assert_int_eq(vfu_client_serve(client, wake, -1), 1);
    ck_assert_int_eq(peer_receive(&server), 1);
    close(wake);
    script_close(client);
}
END_TEST

/* The end of the server, in all its forms, is -EPIPE to serve. */
START_TEST(serve_ends)
{
    vfu_wire_dma_access access = {0, 8};
    for (unsigned how = 0; how < 3; how++) {
        vfu_client *client = script_open();
        if (how == 1) { /* it leaves with an answer unread: the socket says ECONNRESET */
            say_as(1, VFU_CMD_DMA_READ, 0, 0, 32, &access, sizeof(access), NULL, 0);
            ck_assert_int_eq(vfu_client_serve(client, -1, 0), 0);
        }
        if (how == 2)
            reply(VFU_CMD_DEVICE_RESET, NULL, 0); /* of nothing */
        else
            peer_close(&server);
        ck_assert_int_eq(vfu_client_serve(client, -1, -1), how == 2 ? -EPROTO : -EPIPE);
        check_broken(client);
        script_close(client);
    }
}
END_TEST

/* ---- requests under way ------------------------------------------------------------------------------------------------- */

/* What may be submitted, where the reply's data and descriptors go, and when it leaves. */
START_TEST(submitted)
{
    static const vfu_wire_region_info info = {.argsz = 32, .flags = VFU_REGION_INFO_READ | VFU_REGION_INFO_MMAP, .size = PAGE};
    struct {
        vfu_wire_feature head;
        uint8_t data[16];
    } feature = {{24, VFU_FEATURE_GET | 1}, "data"};
    uint8_t buf[16];
    int file = memfd("region", PAGE, 0), fds[4] = {file, file, file, file}, got[3];
    vfu_completion done;
    vfu_client *client = script_open();
    vfu_client_request request = {.msg = {.cmd = VFU_CMD_VERSION}};
    ck_assert_int_eq(vfu_client_submit(client, &request), -EINVAL);
    request = (vfu_client_request){.msg = {.cmd = VFU_CMD_DEVICE_RESET, .flags = VFU_HDR_REPLY}};
    ck_assert_int_eq(vfu_client_submit(client, &request), -EINVAL);
    request = (vfu_client_request){.msg = {.cmd = VFU_CMD_REGION_READ, .u.region.count = 17}, .buf = buf, .room = 16};
    ck_assert_int_eq(vfu_client_submit(client, &request), -EINVAL);
    request = (vfu_client_request){.msg = {.cmd = VFU_CMD_MIG_DATA_READ, .u.mig_data = {.argsz = 100, .size = 17}}, .buf = buf, .room = 16};
    ck_assert_int_eq(vfu_client_submit(client, &request), -EINVAL);
    ck_assert_uint_eq(vfu_client_in_flight(client), 0);
    ck_assert_int_eq(vfu_client_wait(client, 5, &done), -ENOENT);
    ck_assert_int_eq(vfu_client_wait(client, 70000, &done), -ENOENT);
    ck_assert_int_eq(vfu_client_timeout(client), -1);

    /* a feature, with too little room and with enough */
    for (unsigned round = 0; round < 2; round++) {
        request = (vfu_client_request){.msg = {.cmd = VFU_CMD_DEVICE_FEATURE, .u.feature = {.argsz = 24, .flags = VFU_FEATURE_GET | 1}},
                                       .buf = buf,
                                       .room = round ? 16 : 15,
                                       .user = &feature};
        int id = vfu_client_submit(client, &request);
        must(id);
        ck_assert_int_eq(peer_receive(&server), 0); /* it waits for others */
        ck_assert_int_gt(vfu_client_timeout(client), 0);
        ck_assert_int_eq(vfu_client_flush(client), 0);
        ck_assert_int_eq(heard().id, id);
        script_id = (uint16_t)id;
        reply(VFU_CMD_DEVICE_FEATURE, &feature, sizeof(feature));
        ck_assert_int_eq(vfu_client_poll(client, &done), 1);
        ck_assert_int_eq(done.result, round ? 0 : -EMSGSIZE);
        ck_assert_int_eq(done.id, id);
        ck_assert_ptr_eq(done.user, &feature);
        ck_assert_uint_eq(done.reply.u.feature.data_len, round ? 16 : 0);
        if (round)
            ck_assert_mem_eq(done.reply.u.feature.data, "data", 4);
        ck_assert_int_eq(vfu_client_poll(client, &done), 0);
    }

    /* descriptors, one way and the other; more than the server takes */
    request = (vfu_client_request){.msg = {.cmd = VFU_CMD_DEVICE_GET_REGION_INFO, .u.region_info.argsz = 32}, .received = got, .max_received = 3};
    int id = vfu_client_submit(client, &request);
    script_id = (uint16_t)id;
    say_as(script_id++, VFU_CMD_DEVICE_GET_REGION_INFO, VFU_HDR_REPLY, 0, 48, &info, 32, fds, 2);
    ck_assert_int_eq(vfu_client_wait(client, id, &done), 1);
    ck_assert_int_eq(done.result, 0);
    ck_assert_uint_eq(done.fd_count, 2);
    ck_assert_int_eq(got[2], -1);
    close_fds(got, 3);
    ck_assert_uint_eq(heard().cmd, VFU_CMD_DEVICE_GET_REGION_INFO);
    request = (vfu_client_request){.msg = {.cmd = VFU_CMD_DMA_MAP, .flags = VFU_HDR_NO_REPLY, .u.dma_map = {.argsz = 32, .flags = 3, .size = PAGE}},
                                   .fds = fds,
                                   .fd_count = 4};
    ck_assert_int_eq(vfu_client_submit(client, &request), -EINVAL);
    request.fd_count = 1;
    must(vfu_client_submit(client, &request));
    ck_assert_uint_eq(heard().flags, VFU_HDR_NO_REPLY);
    ck_assert_uint_eq(server.fd_count, 1);
    ck_assert_uint_eq(vfu_client_in_flight(client), 0);
    close(file);
    script_close(client);
}
END_TEST

/* Every command can be submitted; the data of its reply goes to the request's buffer. */
START_TEST(every_command)
{
    static const vfu_wire_dma_unmap unmap = {24, 0, 0x1000, PAGE};
    static const vfu_wire_region_io_fds io_fds = {.argsz = 16, .index = 3};
    static const vfu_wire_write_one one = {.region = 2, .count = 4};
    static const vfu_wire_write_multi multi = {1};
    static const struct {
        vfu_wire_feature head;
        uint8_t data[8];
    } feature = {{16, VFU_FEATURE_GET | 99}, "data"};
    static const struct {
        vfu_wire_mig_data head;
        uint8_t data[8];
    } mig = {{16, 8}, "data"};
    const struct {
        vfu_msg msg;
        const void *reply;
        uint32_t len, data_len;
    } cases[] = {
        {{.cmd = VFU_CMD_DMA_UNMAP, .u.dma_unmap = {.argsz = 24, .address = 0x1000, .size = PAGE}}, &unmap, sizeof(unmap), 0},
        {{.cmd = VFU_CMD_DEVICE_GET_REGION_IO_FDS, .u.region_io_fds = {.argsz = 16, .index = 3}}, &io_fds, sizeof(io_fds), 0},
        {{.cmd = VFU_CMD_DEVICE_SET_IRQS,
          .u.irq_set = {.argsz = 20, .flags = VFU_IRQ_SET_DATA_NONE | VFU_IRQ_SET_ACTION_TRIGGER}},
         NULL, 0, 0},
        {{.cmd = VFU_CMD_REGION_WRITE_MULTI, .u.write_multi = {.count = 1, .data = (const uint8_t *)&one, .data_len = sizeof(one)}},
         &multi, sizeof(multi), 0},
        {{.cmd = VFU_CMD_DEVICE_FEATURE, .u.feature = {.argsz = 16, .flags = VFU_FEATURE_GET | 99}}, &feature, sizeof(feature), 8},
        {{.cmd = VFU_CMD_MIG_DATA_READ, .u.mig_data = {.argsz = 16, .size = 8}}, &mig, sizeof(mig), 8},
        {{.cmd = VFU_CMD_MIG_DATA_WRITE,
          .u.mig_data = {.argsz = 16, .size = 8, .data = (const uint8_t *)"12345678", .data_len = 8}},
         NULL, 0, 0},
        {{.cmd = VFU_CMD_DEVICE_RESET}, NULL, 0, 0},
    };
    vfu_client *client = script_open();
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint8_t buf[8] = {0};
        vfu_completion done;
        vfu_client_request request = {.msg = cases[i].msg, .buf = buf, .room = sizeof(buf)};
        reply(cases[i].msg.cmd, cases[i].reply, cases[i].len);
        must(vfu_client_submit(client, &request));
        ck_assert_int_eq(vfu_client_wait(client, VFU_CLIENT_ANY, &done), 1);
        ck_assert_msg(done.result == 0, "%s: %d", vfu_cmd_name(cases[i].msg.cmd), done.result);
        ck_assert_uint_eq(done.reply.cmd, cases[i].msg.cmd);
        ck_assert_uint_eq(heard().cmd, cases[i].msg.cmd);
        ck_assert_mem_eq(buf, "data", cases[i].data_len / 2);
    }
    script_close(client);
}
END_TEST

/* Answers the read of 4 bytes of region 2 with this id. */
static void answer_read(int id, uint8_t byte)
{
    const vfu_wire_region_access access = {.region = 2, .count = 4};
    uint8_t payload[sizeof(access) + 4];
    memcpy(payload, &access, sizeof(access));
    memset(payload + sizeof(access), byte, 4);
    say_as((uint16_t)id, VFU_CMD_REGION_READ, VFU_HDR_REPLY, 0, 16 + sizeof(payload), payload, sizeof(payload), NULL, 0);
}

/* A request that stays keeps its id, however often the others go round. */
START_TEST(id_is_in_use)
{
    uint32_t first = 0, value = 0;
    vfu_completion done;
    vfu_client *client = script_open();
    int kept = vfu_client_submit_read(client, 2, 0, &first, 4, &first);
    must(kept);
    for (unsigned i = 0; i < 1000; i++) {
        int id = vfu_client_submit_read(client, 2, 0, &value, 4, &value);
        must(id);
        ck_assert_int_ne(id, kept);
        answer_read(id, (uint8_t)i);
        ck_assert_int_eq(vfu_client_wait(client, id, &done), 1);
        ck_assert_int_eq(done.result, 0);
        ck_assert_ptr_eq(done.user, &value);
        ck_assert_uint_eq(value, (i & 255) * 0x01010101u);
        while (peer_receive(&server) > 0) {
        }
    }
    answer_read(kept, 77);
    ck_assert_int_eq(vfu_client_wait(client, kept, &done), 1);
    ck_assert_int_eq(done.result, 0);
    ck_assert_ptr_eq(done.user, &first);
    ck_assert_uint_eq(first, 0x4d4d4d4d);
    script_close(client);
}
END_TEST

/* A server that says it takes 300 descriptors gets as many as anybody takes; and when it doesn't read, those that wait have an
 * end, and each goes with its message later. */
START_TEST(descriptors_wait)
{
    int file = memfd("many", PAGE, 0), fds[VFU_FDS_MAX + 1], err;
    unsigned sent = 0, came = 0;
    vfu_client *client = script_open_with("{\"capabilities\":{\"max_msg_fds\":300}}", 0);
    vfu_client_request request = {.msg = {.cmd = VFU_CMD_DMA_MAP, .flags = VFU_HDR_NO_REPLY, .u.dma_map = {.argsz = 32, .flags = 3, .size = PAGE}},
                                  .fds = fds,
                                  .fd_count = VFU_FDS_MAX + 1};
    for (unsigned i = 0; i < COUNT(fds); i++)
        fds[i] = file;
    ck_assert_int_eq(vfu_client_submit(client, &request), -EINVAL);
    for (request.fd_count = VFU_FDS_MAX; (err = vfu_client_submit(client, &request)) >= 0; sent++) {
    }
    ck_assert_int_eq(err, -EAGAIN);
    ck_assert_uint_gt(sent, 64);
    for (unsigned round = 0; came < sent && round < 2 * sent; round++) {
        while (peer_receive(&server) > 0) {
            ck_assert_uint_eq(server.fd_count, VFU_FDS_MAX);
            ck_assert_uint_eq(header_of(server.bytes).cmd, VFU_CMD_DMA_MAP);
            came++;
        }
        vfu_client_flush(client);
    }
    ck_assert_uint_eq(came, sent);
    close(file);
    script_close(client);
}
END_TEST

/* A call waits for room in the queue, for as long as for a reply. */
START_TEST(call_while_full)
{
    static uint8_t data[32 << 10];
    vfu_client *client = script_open_with("{}", 100);
    for (uint32_t len = sizeof(data); len; len /= 2) {
        int err;
        while ((err = vfu_client_post_write(client, 0, 0, data, len)) == 0) {
        }
        ck_assert_int_eq(err, -EAGAIN);
    }
    ck_assert_int_eq(vfu_client_region_write(client, 0, 0, data, 8), -ETIMEDOUT);
    check_broken(client);
    script_close(client);
}
END_TEST

/* What comes in one go and is more than one poll handles is handled by the next ones, also when the connection has ended. */
START_TEST(poll_has_a_budget)
{
    enum { MANY = 1500 };
    static uint8_t asked[MANY][32];
    static uint8_t data[32 << 10];
    vfu_completion done;
    for (unsigned dead = 0; dead < 2; dead++) {
        unsigned answers = 0;
        vfu_client *client = script_open();
        for (unsigned i = 0; i < MANY; i++) {
            vfu_wire_header header = {.id = (uint16_t)i, .cmd = VFU_CMD_DMA_READ, .size = 32};
            vfu_wire_dma_access access = {0x1000, 64};
            memcpy(asked[i], &header, sizeof(header));
            memcpy(asked[i] + sizeof(header), &access, sizeof(access));
        }
        send_all(server.sock, asked, sizeof(asked), NULL, 0);
        ck_assert_int_eq(vfu_client_poll(client, &done), 0);
        ck_assert_int_eq(vfu_client_timeout(client), 0);
        while (peer_receive(&server) > 0)
            answers++;
        ck_assert_uint_ge(answers, 1024);
        ck_assert_uint_lt(answers, MANY);
        if (dead) {
            peer_close(&server);
            ck_assert_int_eq(vfu_client_post_write(client, 0, 0, data, sizeof(data)), -EPIPE);
            ck_assert_int_eq(vfu_client_poll(client, &done), -EPIPE);
        } else {
            ck_assert_int_eq(vfu_client_poll(client, &done), 0);
            while (peer_receive(&server) > 0)
                answers++;
            ck_assert_uint_eq(answers, MANY);
        }
        script_close(client);
    }
}
END_TEST

/* The server has closed while something waits to be sent; what it has said before is heard first. */
START_TEST(flush_fails)
{
    static uint8_t data[32 << 10];
    vfu_completion done;
    for (unsigned nonsense = 0; nonsense < 2; nonsense++) {
        uint32_t value = 0;
        vfu_client *client = script_open();
        int id = vfu_client_submit_read(client, 2, 0, &value, 4, NULL);
        must(id);
        ck_assert_int_eq(vfu_client_flush(client), 0);
        answer_read(id, 77);
        if (nonsense)
            say_as(0, VFU_CMD_REGION_READ, VFU_HDR_REPLY, 0, 15, NULL, 0, NULL, 0);
        ck_assert_int_eq(vfu_client_post_write(client, 2, 0, data, 4), 0); /* it waits for others */
        peer_close(&server);
        ck_assert_int_eq(vfu_client_post_write(client, 2, 0, data, sizeof(data)), -EPIPE);
        ck_assert_int_eq(vfu_client_wait(client, id, &done), 1);
        ck_assert_int_eq(done.result, 0);
        ck_assert_uint_eq(value, 0x4d4d4d4d);
        script_close(client);
    }
}
END_TEST

/* What the server doesn't take in one message is refused at once. */
START_TEST(too_much_for_the_server)
{
    static vfu_wire_feature_log_range range;
    uint64_t bitmap[2], page_size = PAGE;
    vfu_client *client = script_open_with("{\"capabilities\":{\"max_data_xfer_size\":16}}", 0);
    ck_assert_int_eq(vfu_client_submit_read(client, 2, 0, bitmap, 17, NULL), -EINVAL);
    ck_assert_int_eq(vfu_client_log_start(client, &page_size, &range, 1), -E2BIG);
    ck_assert_int_eq(vfu_client_log_report(client, 0, 64 * PAGE, PAGE, bitmap, 2), -E2BIG);
    ck_assert_int_eq(peer_receive(&server), 0);
    script_close(client);
}
END_TEST

/* Nobody accepts and the backlog is full; or somebody does, and says nothing. */
START_TEST(connecting_has_a_limit)
{
    char path[108];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int waiting[64], sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unsigned count = 0;
    vfu_client *client;
    vfu_client_desc desc = script_desc(30);
    snprintf(path, sizeof(path), "/tmp/vfu-client-full-%d.sock", (int)getpid());
    memcpy(address.sun_path, path, strlen(path));
    must(bind(sock, (struct sockaddr *)&address, sizeof(address)));
    must(listen(sock, 1));
    ck_assert_int_eq(vfu_client_connect(&client, path, &desc), -ETIMEDOUT); /* it isn't greeted */
    for (int fd; count < COUNT(waiting); waiting[count++] = fd) {
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
            ck_assert_int_eq(errno, EAGAIN);
            close(fd);
            break;
        }
    }
    ck_assert_uint_lt(count, COUNT(waiting));
    ck_assert_int_eq(vfu_client_connect(&client, path, &desc), -ETIMEDOUT);
    ck_assert_ptr_null(client);
    close_fds(waiting, count);
    close(sock);
    unlink(path);
}
END_TEST

/* ---- reconnecting ------------------------------------------------------------------------------------------------------- */

static vfu_client *script_reconnecting(void)
{
    vfu_client *client;
    vfu_client_desc desc = script_desc(0);
    int sock = script_start();
    desc.reconnects = true;
    reply(VFU_CMD_VERSION, "\0\0\0", 4);
    ck_assert_int_eq(vfu_client_attach(&client, sock, &desc), 0);
    return client;
}

/* The server has gone, and another takes its place. Returns the client's end. */
static int script_again(void)
{
    int pair[2];
    peer_close(&server);
    make_pair(pair);
    server = (peer){.sock = pair[0]};
    reply(VFU_CMD_VERSION, "\0\0\0", 4);
    return pair[1];
}

/* The new server is told what holds now: the mapping at the end of the address space, and no interrupt of an index that was
 * switched off. */
START_TEST(tells_what_holds)
{
    static uint8_t memory[PAGE];
    static const uint16_t expected[] = {VFU_CMD_VERSION, VFU_CMD_DEVICE_GET_INFO, VFU_CMD_DMA_MAP};
    int fds[2] = {event(), event()};
    vfu_client *client = script_reconnecting();
    reply(VFU_CMD_DEVICE_SET_IRQS, NULL, 0);
    ck_assert_int_eq(vfu_client_irq_assign(client, 2, 0, 1, fds), 0);
    reply(VFU_CMD_DEVICE_SET_IRQS, NULL, 0);
    ck_assert_int_eq(vfu_client_irq_action(client, 2, 0, 0, VFU_IRQ_SET_ACTION_TRIGGER), 0);
    reply(VFU_CMD_DMA_MAP, NULL, 0);
    ck_assert_int_eq(vfu_client_dma_map(client, UINT64_MAX - PAGE + 1, PAGE, VFU_IOMMU_READ, memory, -1, 0), 0);
    check_usable(client);
    int sock = script_again();
    reply(VFU_CMD_DEVICE_GET_INFO, &(vfu_wire_device_info){16, VFU_DEVICE_INFO_PCI, 9, 5}, sizeof(vfu_wire_device_info));
    reply(VFU_CMD_DMA_MAP, NULL, 0);
    ck_assert_int_eq(vfu_client_reattach(client, sock), 0);
    for (unsigned i = 0; i < COUNT(expected); i++)
        ck_assert_uint_eq(heard().cmd, expected[i]);
    ck_assert_uint_eq(header_of(server.bytes).size, 48);
    ck_assert_int_eq(peer_receive(&server), 0);
    close_fds(fds, 2);
    script_close(client);
}
END_TEST

/* Another device than before is not taken. */
START_TEST(another_device)
{
    static const vfu_wire_device_info others[] = {
        {16, VFU_DEVICE_INFO_PCI | VFU_DEVICE_INFO_RESET, 9, 5}, {16, VFU_DEVICE_INFO_PCI, 8, 5}, {16, VFU_DEVICE_INFO_PCI, 9, 4}};
    for (unsigned i = 0; i < COUNT(others); i++) {
        vfu_client *client = script_reconnecting();
        check_usable(client);
        int sock = script_again();
        reply(VFU_CMD_DEVICE_GET_INFO, &others[i], sizeof(others[i]));
        ck_assert_int_eq(vfu_client_reattach(client, sock), -ESTALE);
        check_broken(client);
        script_close(client);
    }
}
END_TEST

typedef struct region_caps {
    vfu_wire_region_info info;
    vfu_wire_cap_type type;
    vfu_wire_cap_sparse_mmap cap;
    vfu_wire_sparse_area areas[2];
} region_caps;

/* The first reply only announces the size. */
static void say_region(const region_caps *said)
{
    vfu_wire_region_info brief = said->info;
    brief.flags = VFU_REGION_INFO_READ;
    brief.cap_offset = 0;
    reply(VFU_CMD_DEVICE_GET_REGION_INFO, &brief, sizeof(brief));
    reply(VFU_CMD_DEVICE_GET_REGION_INFO, said, sizeof(*said));
}

/* A region's areas may change while the server is the same: the last that it said is what the next one is compared with. Its
 * type is a part of it. */
START_TEST(regions_change)
{
    region_caps said = {.info = {.argsz = sizeof(said), .flags = VFU_REGION_INFO_READ | VFU_REGION_INFO_CAPS, .index = 2, .cap_offset = 32, .size = 0x10000},
                        .type = {{VFU_REGION_CAP_TYPE, 1, 48}, 5, 6},
                        .cap = {{VFU_REGION_CAP_SPARSE_MMAP, 1, 0}, 2, 0},
                        .areas = {{0, PAGE}, {2 * PAGE, PAGE}}};
    vfu_client_region region;
    for (unsigned change = 0; change < 3; change++) {
        vfu_client *client = script_reconnecting();
        for (unsigned round = 0; round < 3; round++) {
            said.areas[1].size = (1 + round % 2) * PAGE;
            say_region(&said);
            ck_assert_int_eq(vfu_client_region_info(client, 2, &region), 0);
            ck_assert_uint_eq(region.area_count, 2);
            ck_assert_uint_eq(region.areas[1].size, said.areas[1].size);
            ck_assert_uint_eq(region.type, 5);
            ck_assert_uint_eq(region.subtype, 6);
        }
        int sock = script_again();
        said.type.subtype += change == 1;
        said.areas[0].size += change == 2 ? PAGE : 0;
        reply(VFU_CMD_DEVICE_GET_INFO, &(vfu_wire_device_info){16, VFU_DEVICE_INFO_PCI, 9, 5}, sizeof(vfu_wire_device_info));
        say_region(&said);
        ck_assert_int_eq(vfu_client_reattach(client, sock), change ? -ESTALE : 0);
        said.type.subtype = 6;
        said.areas[0].size = PAGE;
        script_close(client);
    }
}
END_TEST

/* ---- misuse and shortage ------------------------------------------------------------------------------------------------ */

/* A request that can't be sent is the caller's mistake, and the connection stays. */
START_TEST(impossible_requests)
{
    static uint8_t data[(4 << 20)];
    vfu_msg request, answer;
    vfu_client *client = script_open();
    vfu_msg_init(&request, 0, 99);
    ck_assert_int_eq(vfu_client_call(client, &request, NULL, 0, &answer, NULL, 0), -EINVAL);
    script_id++;
    vfu_msg_init(&request, 0, VFU_CMD_REGION_WRITE);
    request.u.region.count = 8;
    ck_assert_int_eq(vfu_client_call(client, &request, NULL, 0, &answer, NULL, 0), -EINVAL);
    script_id++;
    request.u.region.count = request.u.region.data_len = sizeof(data);
    request.u.region.data = data;
    ck_assert_int_eq(vfu_client_call(client, &request, NULL, 0, &answer, NULL, 0), -EINVAL);
    script_id++;
    check_usable(client);
    script_close(client);
}
END_TEST

/* Descriptors of a call: as many as there is room for, -1 in the rest. */
START_TEST(received_descriptors)
{
    int fds[3], got[5];
    vfu_msg request, answer;
    vfu_client *client = script_open();
    for (unsigned i = 0; i < 3; i++)
        fds[i] = memfd("give", PAGE, 0);
    for (unsigned room = 0; room <= 5; room++) {
        vfu_msg_init(&request, 55, VFU_CMD_DEVICE_RESET);
        say_as(script_id++, VFU_CMD_DEVICE_RESET, VFU_HDR_REPLY, 0, 16, NULL, 0, fds, 3);
        ck_assert_int_eq(vfu_client_call(client, &request, NULL, 0, &answer, got, room), 0);
        for (unsigned i = 0; i < room; i++) {
            if (i < 3) {
                ck_assert_uint_eq(ino_of(got[i]), ino_of(fds[i]));
                ck_assert(is_cloexec(got[i]));
                close(got[i]);
            } else {
                ck_assert_int_eq(got[i], -1);
            }
        }
    }
    close_fds(fds, 3);
    script_close(client);
}
END_TEST

START_TEST(allocations_fail)
{
    unsigned long total = 1;
    for (unsigned long n = 0; n <= total; n++) {
        vfu_client *client;
        vfu_client_desc desc = script_desc(0);
        int sock = script_start();
        client_heap.fail_at = n;
        reply(VFU_CMD_VERSION, "\0\0\0\0", 4);
        int err = vfu_client_attach(&client, sock, &desc);
        ck_assert_int_eq(err, n ? -ENOMEM : 0);
        if (!n)
            total = client_heap.count;
        script_close(client);
    }
    ck_assert_uint_gt(total, 4);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client");
    TCase *tc = tcase_create("with our device");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, device_queries);
    tcase_add_test(tc, device_regions);
    tcase_add_test(tc, device_irqs);
    tcase_add_test(tc, device_memory);
    suite_add_tcase(suite, tc);

    tc = tcase_create("with bad servers");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_loop_test(tc, greeting, 0, COUNT(greeting_cases));
    tcase_add_test(tc, greeting_fails);
    tcase_add_test(tc, bad_replies);
    tcase_add_test(tc, silence);
    tcase_add_test(tc, server_dies_at_every_byte);
    tcase_add_test(tc, region_info);
    tcase_add_test(tc, region_info_always_cut);
    tcase_add_test(tc, surplus_descriptors);
    tcase_add_test(tc, region_access_replies);
    tcase_add_test(tc, limits_of_the_server);
    tcase_add_test(tc, refused_maps);
    suite_add_tcase(suite, tc);

    tc = tcase_create("requests of the device");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, dma_requests);
    tcase_add_loop_test(tc, flood_without_reading, 0, 2);
    tcase_add_test(tc, flood_with_reading);
    tcase_add_test(tc, serve_without_waiting);
    tcase_add_test(tc, serve_ends);
    suite_add_tcase(suite, tc);

    tc = tcase_create("requests under way");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, submitted);
    tcase_add_test(tc, every_command);
    tcase_add_test(tc, id_is_in_use);
    tcase_add_test(tc, descriptors_wait);
    tcase_add_test(tc, call_while_full);
    tcase_add_test(tc, poll_has_a_budget);
    tcase_add_test(tc, flush_fails);
    tcase_add_test(tc, too_much_for_the_server);
    tcase_add_test(tc, connecting_has_a_limit);
    suite_add_tcase(suite, tc);

    tc = tcase_create("reconnecting");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, tells_what_holds);
    tcase_add_test(tc, another_device);
    tcase_add_test(tc, regions_change);
    suite_add_tcase(suite, tc);

    tc = tcase_create("misuse and shortage");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, impossible_requests);
    tcase_add_test(tc, received_descriptors);
    tcase_add_test(tc, allocations_fail);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
