/* SPDX-License-Identifier: MIT */
/*
 * ==== client ====
 *
 * Against a server that does everything as libvfio-user does it, where that differs from ours: what it demands of requests (exact
 * payload sizes, argsz at least that of the struct, no flags), and how it answers (argsz that says more than comes, structs with
 * the kernel's trailing fields, zeros behind the text of VERSION, its own ids on DMA messages, which may equal ours). Each request
 * is looked at in its bytes.
 */
#include "client.h"

static vfu_client *C;

/* Takes the client's next request: `payload` bytes behind the header, with `fds` descriptors; its argsz, if there is one. */
static vfu_msg demand(uint16_t cmd, uint32_t payload, unsigned fds)
{
    vfu_msg msg = heard();
    vfu_wire_header header = header_of(server.bytes);
    ck_assert_uint_eq(header.cmd, cmd);
    ck_assert_uint_eq(header.size, 16 + payload);
    ck_assert_uint_eq(header.flags, 0);
    ck_assert_uint_eq(header.error, 0);
    ck_assert_uint_eq(server.fd_count, fds);
    return msg;
}

static void start(uint32_t max_data_xfer_size)
{
    char json[300];
    snprintf(json, sizeof(json),
             "{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":%u,\"migration\":{\"pgsize\":4096},\"twin_socket\":{"
             "\"supported\":false}}}\n",
             max_data_xfer_size);
    C = script_open_with(json, 0);
    ck_assert_uint_eq(vfu_client_caps(C)->max_msg_fds, 8);
    ck_assert(!vfu_client_caps(C)->write_multiple);
}

static void end(void) { script_close(C); }

/* Zeros behind the text; the request has text with one. */
START_TEST(version)
{
    static const char text[] = "\0\0\0\0{\"capabilities\":{\"max_msg_fds\":8}}\0\0\0\0\0\0\0";
    vfu_client_desc desc = script_desc(0);
    int sock = script_start();
    reply(VFU_CMD_VERSION, text, sizeof(text));
    ck_assert_int_eq(vfu_client_attach(&C, sock, &desc), 0);
    vfu_msg msg = heard();
    vfu_caps caps;
    ck_assert_int_eq(vfu_caps_parse(msg.u.version.json, msg.u.version.json_len, &caps), 0);
    ck_assert_uint_eq(caps.max_msg_fds, 16);
    ck_assert_uint_eq(server.bytes[server.have - 1], 0);
    ck_assert_uint_ne(server.bytes[server.have - 2], 0);
    end();
}
END_TEST

/* linux/vfio.h's struct has two more words than the specification's. */
START_TEST(device_info)
{
    static const uint32_t words[] = {24, VFU_DEVICE_INFO_PCI | VFU_DEVICE_INFO_RESET, 9, 5, 0, 0};
    vfu_wire_device_info out;
    start(1 << 20);
    reply(VFU_CMD_DEVICE_GET_INFO, words, sizeof(words));
    ck_assert_int_eq(vfu_client_info(C, &out), 0);
    ck_assert_uint_eq(out.num_regions, 9);
    ck_assert_uint_eq(out.num_irqs, 5);
    ck_assert_uint_eq(demand(VFU_CMD_DEVICE_GET_INFO, 16, 0).u.device_info.argsz, 16);
    end();
}
END_TEST

typedef struct region_reply {
    vfu_wire_region_info info;
    vfu_wire_cap_sparse_mmap cap;
    vfu_wire_sparse_area areas[2];
    uint8_t padding[16];
} region_reply;

/* A first reply that is cut, with flags that promise what isn't there yet; the second is longer than it needs to be. */
START_TEST(region_info)
{
    region_reply r = {.info = {.argsz = 80,
                               .flags = VFU_REGION_INFO_READ | VFU_REGION_INFO_WRITE | VFU_REGION_INFO_MMAP,
                               .size = 0x4000},
                      .cap = {.header = {VFU_REGION_CAP_SPARSE_MMAP, 1, 0}, .nr_areas = 2},
                      .areas = {{0x1000, 0x1000}, {0x3000, 0x1000}}};
    vfu_client_region out;
    int file = memfd("bar", 0x4000, 0);
    uint32_t value = 0x01020304;
    start(1 << 20);
    for (unsigned round = 0; round < 2; round++) {
        r.info.flags &= ~VFU_REGION_INFO_CAPS;
        r.info.cap_offset = 0;
        reply(VFU_CMD_DEVICE_GET_REGION_INFO, &r.info, sizeof(r.info));
        r.info.flags |= VFU_REGION_INFO_CAPS;
        r.info.cap_offset = 32;
        say_as(script_id++, VFU_CMD_DEVICE_GET_REGION_INFO, VFU_HDR_REPLY, 0, 16 + sizeof(r), &r, sizeof(r), &file, 1);
        if (round == 0) {
            ck_assert_int_eq(vfu_client_region_info(C, 0, &out), 0);
            ck_assert_uint_eq(out.area_count, 2);
            ck_assert_uint_eq(out.areas[1].offset, 0x3000);
            ck_assert_uint_eq(ino_of(out.fd), ino_of(file));
            close(out.fd);
        } else {
            ck_assert_int_eq(vfu_client_region_open(C, 0, VFU_CLIENT_BY_MEMORY), 0);
        }
        ck_assert_uint_eq(demand(VFU_CMD_DEVICE_GET_REGION_INFO, 32, 0).u.region_info.argsz, 32);
        ck_assert_uint_eq(demand(VFU_CMD_DEVICE_GET_REGION_INFO, 32, 0).u.region_info.argsz, 80);
    }
    ck_assert_int_eq(vfu_client_region_write(C, 0, 0x3ffc, &value, 4), 0);
    ck_assert_int_eq(pread(file, &value, 4, 0x3ffc), 4);
    ck_assert_uint_eq(value, 0x01020304);
    ck_assert_int_eq(peer_receive(&server), 0); /* no message */
    close(file);
    end();
}
END_TEST

/* Entries of 48 bytes: an ioeventfd, and one whose value lies in shared memory. */
START_TEST(shadow_ioeventfd)
{
    typedef struct entry {
        vfu_wire_sub_region one; /* `padding` is the shadow's descriptor, `data` its offset */
        uint64_t datamatch;
    } entry;
    struct {
        vfu_wire_region_io_fds head;
        entry entries[3];
    } r = {.head = {.argsz = 16 + 3 * 48, .index = 0, .count = 3},
           .entries = {{{.offset = 0x1000, .size = 4, .fd_index = 0, .type = 0}, 0},
                       {{.offset = 0x1008, .size = 4, .fd_index = 1, .type = 2, .padding = 2, .data = 0x1010}, 0},
                       {{.offset = 0x1010, .size = 4, .fd_index = 0, .type = 0, .flags = 1}, 77}}};
    static const vfu_wire_region_info info = {.argsz = 32, .flags = VFU_REGION_INFO_READ | VFU_REGION_INFO_WRITE, .size = 0x4000};
    int fds[3] = {event(), event(), memfd("shadow", 0x2000, 0)}, got[VFU_FDS_MAX];
    vfu_client_io_fd list[3];
    start(1 << 20);
    say_as(script_id++, VFU_CMD_DEVICE_GET_REGION_IO_FDS, VFU_HDR_REPLY, 0, 16 + sizeof(r), &r, sizeof(r), fds, 3);
    ck_assert_int_eq(vfu_client_io_fds(C, 0, list, 3, got), 3);
    ck_assert_uint_eq(list[0].data, 0);
    ck_assert_int_eq(list[0].shadow_index, -1);
    ck_assert_int_eq(list[1].shadow_index, 2);
    ck_assert_uint_eq(list[1].shadow_offset, 0x1010);
    ck_assert_uint_eq(list[2].data, 77);
    close_fds(got, VFU_FDS_MAX);
    vfu_msg request = demand(VFU_CMD_DEVICE_GET_REGION_IO_FDS, 16, 0);
    ck_assert_uint_eq(request.u.region_io_fds.flags, 0);
    ck_assert_uint_eq(request.u.region_io_fds.count, 0);
    reply(VFU_CMD_DEVICE_GET_REGION_INFO, &info, sizeof(info));
    say_as(script_id++, VFU_CMD_DEVICE_GET_REGION_IO_FDS, VFU_HDR_REPLY, 0, 16 + sizeof(r), &r, sizeof(r), fds, 3);
    ck_assert_int_eq(vfu_client_region_open(C, 0, VFU_CLIENT_BY_EVENTFD | VFU_CLIENT_BY_MEMORY), 0);
    demand(VFU_CMD_DEVICE_GET_REGION_INFO, 32, 0);
    demand(VFU_CMD_DEVICE_GET_REGION_IO_FDS, 16, 0);
    for (uint32_t value = 100; value < 103; value++) {
        uint32_t seen = 0;
        ck_assert_int_eq(vfu_client_region_write(C, 0, 0x1008, &value, 4), 0);
        ck_assert_uint_eq(signals(fds[1]), 1);
        ck_assert_int_eq(pread(fds[2], &seen, 4, 0x1010), 4);
        ck_assert_uint_eq(seen, value);
        ck_assert_int_eq(vfu_client_region_write(C, 0, 0x1000, &value, 4), 0);
        ck_assert_uint_eq(signals(fds[0]), 1);
    }
    ck_assert_int_eq(vfu_client_region_write(C, 0, 0x1010, &(uint32_t){77}, 4), 0);
    ck_assert_uint_eq(signals(fds[0]), 1);
    ck_assert_int_eq(peer_receive(&server), 0); /* no message */
    ck_assert_int_eq(ftruncate(fds[2], 0), 0);
    ck_assert_int_eq(vfu_client_region_write(C, 0, 0x1008, &(uint32_t){1}, 4), -EFAULT);
    /* a shadow that can't be written */
    char path[32];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fds[2]);
    int read_only = open(path, O_RDONLY | O_CLOEXEC), shadow = fds[2];
    must(read_only);
    fds[2] = read_only;
    reply(VFU_CMD_DEVICE_GET_REGION_INFO, &info, sizeof(info));
    say_as(script_id++, VFU_CMD_DEVICE_GET_REGION_IO_FDS, VFU_HDR_REPLY, 0, 16 + sizeof(r), &r, sizeof(r), fds, 3);
    ck_assert_int_eq(vfu_client_region_open(C, 0, VFU_CLIENT_BY_EVENTFD), -ENODEV);
    close(shadow);
    close_fds(fds, 3);
    end();
}
END_TEST

/* In chunks of its max_msg_fds; argsz is the size of the payload, neither more nor less. */
START_TEST(interrupts)
{
    static const uint32_t words[] = {16, VFU_IRQ_INFO_EVENTFD | VFU_IRQ_INFO_NORESIZE, 2, 20, 0, 0};
    vfu_wire_irq_info out;
    int events[20];
    start(1 << 20);
    reply(VFU_CMD_DEVICE_GET_IRQ_INFO, words, sizeof(words));
    ck_assert_int_eq(vfu_client_irq_info(C, 2, &out), 0);
    ck_assert_uint_eq(out.count, 20);
    ck_assert_uint_eq(demand(VFU_CMD_DEVICE_GET_IRQ_INFO, 16, 0).u.irq_info.argsz, 16);
    for (unsigned i = 0; i < COUNT(events); i++)
        events[i] = event();
    for (unsigned i = 0; i < 3; i++)
        reply(VFU_CMD_DEVICE_SET_IRQS, NULL, 0);
    ck_assert_int_eq(vfu_client_irq_assign(C, 2, 0, COUNT(events), events), 0);
    for (unsigned i = 0; i < 3; i++) {
        vfu_msg set = demand(VFU_CMD_DEVICE_SET_IRQS, 20, i < 2 ? 8 : 4);
        ck_assert_uint_eq(set.u.irq_set.argsz, 20);
        ck_assert_uint_eq(set.u.irq_set.start, i * 8);
        ck_assert_uint_eq(set.u.irq_set.count, i < 2 ? 8 : 4);
    }
    reply(VFU_CMD_DEVICE_SET_IRQS, NULL, 0);
    ck_assert_int_eq(vfu_client_irq_unmask_by(C, 0, 0, 1, events), 0);
    ck_assert_uint_eq(demand(VFU_CMD_DEVICE_SET_IRQS, 20, 1).u.irq_set.flags,
                      VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_UNMASK);
    close_fds(events, COUNT(events));
    end();
}
END_TEST

/* Accesses of 1024 bytes at most, each of exactly the size that it says. */
START_TEST(accesses)
{
    static uint8_t data[2500], payload[16 + 1024];
    start(1024);
    for (unsigned direction = 0; direction < 2; direction++) {
        for (uint32_t at = 0; at < sizeof(data); at += 1024) {
            uint32_t part = sizeof(data) - at < 1024 ? (uint32_t)sizeof(data) - at : 1024;
            memcpy(payload, &(vfu_wire_region_access){at, 1, part}, 16);
            memset(payload + 16, (int)(at / 1024 + 1), part);
            reply(direction ? VFU_CMD_REGION_WRITE : VFU_CMD_REGION_READ, payload, 16 + (direction ? 0 : part));
        }
        ck_assert_int_eq(direction ? vfu_client_region_write(C, 1, 0, data, sizeof(data))
                                   : vfu_client_region_read(C, 1, 0, data, sizeof(data)),
                         0);
        demand(direction ? VFU_CMD_REGION_WRITE : VFU_CMD_REGION_READ, 16 + (direction ? 1024 : 0), 0);
        demand(direction ? VFU_CMD_REGION_WRITE : VFU_CMD_REGION_READ, 16 + (direction ? 1024 : 0), 0);
        demand(direction ? VFU_CMD_REGION_WRITE : VFU_CMD_REGION_READ, 16 + (direction ? 452 : 0), 0);
    }
    ck_assert_uint_eq(data[0], 1);
    ck_assert_uint_eq(data[2499], 3);
    /* it doesn't know REGION_WRITE_MULTI: one by one */
    vfu_wire_write_one writes[2] = {{.offset = 8, .region = 1, .count = 4}, {.offset = 16, .region = 1, .count = 8}};
    for (unsigned i = 0; i < 2; i++)
        reply(VFU_CMD_REGION_WRITE, &(vfu_wire_region_access){writes[i].offset, 1, writes[i].count}, 16);
    ck_assert_int_eq(vfu_client_write_multi(C, writes, 2), 2);
    demand(VFU_CMD_REGION_WRITE, 20, 0);
    demand(VFU_CMD_REGION_WRITE, 24, 0);
    end();
}
END_TEST

/* DMA_MAP of exactly 32 bytes, DMA_UNMAP of 24; and while that is asked, DMA messages whose ids are those of our own requests. */
START_TEST(memory)
{
    static uint8_t mem[PAGE];
    struct {
        vfu_wire_dma_access access;
        uint8_t data[8];
    } write = {{0x10000, 8}, {1, 2, 3, 4, 5, 6, 7, 8}};
    vfu_wire_dma_unmap unmap = {24, 0, 0x10000, PAGE};
    int file = memfd("guest", PAGE, 0);
    start(1 << 20);
    reply(VFU_CMD_DMA_MAP, NULL, 0);
    ck_assert_int_eq(vfu_client_dma_map(C, 0x10000, PAGE, VFU_IOMMU_READ | VFU_IOMMU_WRITE, mem, file, 0), 0);
    ck_assert_uint_eq(demand(VFU_CMD_DMA_MAP, 32, 1).u.dma_map.argsz, 32);
    say_as(script_id, VFU_CMD_DMA_WRITE, 0, 0, 16 + sizeof(write), &write, sizeof(write), NULL, 0);
    say_as(script_id, VFU_CMD_DMA_READ, 0, 0, 32, &write.access, 16, NULL, 0);
    reply(VFU_CMD_DMA_UNMAP, &unmap, sizeof(unmap));
    ck_assert_int_eq(vfu_client_dma_unmap(C, 0x10000, PAGE), 1);
    ck_assert_uint_eq(demand(VFU_CMD_DMA_UNMAP, 24, 0).u.dma_unmap.argsz, 24);
    ck_assert_mem_eq(mem, write.data, 8);
    vfu_msg answer = heard();
    ck_assert_uint_eq(answer.cmd, VFU_CMD_DMA_WRITE);
    ck_assert_uint_eq(server.have, 32); /* it looks for 16 bytes of payload */
    answer = heard();
    ck_assert_uint_eq(answer.cmd, VFU_CMD_DMA_READ);
    ck_assert_uint_eq(server.have, 40);
    ck_assert_mem_eq(server.bytes + 32, write.data, 8);
    close(file);
    end();
}
END_TEST

/* argsz of a feature request covers its reply; the reply may say more. */
START_TEST(features)
{
    struct {
        vfu_wire_feature head;
        uint64_t words[2];
    } r = {{24, VFU_FEATURE_GET | VFU_FEATURE_MIGRATION}, {VFU_MIG_STOP_COPY | VFU_MIG_PRE_COPY, 0}};
    struct {
        vfu_wire_mig_data head;
        uint8_t data[5];
    } data = {{13, 5}, "abcde"};
    uint8_t buf[100];
    uint64_t flags;
    start(1 << 20);
    reply(VFU_CMD_DEVICE_FEATURE, &r, sizeof(r));
    ck_assert_int_eq(vfu_client_mig_flags(C, &flags), 0);
    ck_assert_uint_eq(flags, VFU_MIG_STOP_COPY | VFU_MIG_PRE_COPY);
    ck_assert_uint_eq(demand(VFU_CMD_DEVICE_FEATURE, 8, 0).u.feature.argsz, 16);
    say_as(script_id++, VFU_CMD_MIG_DATA_READ, VFU_HDR_REPLY, 0, 16 + 13, &data, 13, NULL, 0);
    ck_assert_int_eq(vfu_client_mig_read(C, buf, sizeof(buf)), 5);
    ck_assert_uint_eq(demand(VFU_CMD_MIG_DATA_READ, 8, 0).u.mig_data.argsz, 8 + sizeof(buf));
    reply(VFU_CMD_MIG_DATA_WRITE, NULL, 0);
    ck_assert_int_eq(vfu_client_mig_write(C, "12345", 5), 0);
    ck_assert_uint_eq(demand(VFU_CMD_MIG_DATA_WRITE, 8 + 5, 0).u.mig_data.argsz, 13);
    say_as(script_id++, VFU_CMD_DEVICE_FEATURE, VFU_HDR_REPLY | VFU_HDR_ERROR, ENOTSUP, 16, NULL, 0, NULL, 0);
    ck_assert_int_eq(vfu_client_log_stop(C), -ENOTSUP);
    end();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client and other servers");
    TCase *tc = tcase_create("as libvfio-user");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, version);
    tcase_add_test(tc, device_info);
    tcase_add_test(tc, region_info);
    tcase_add_test(tc, shadow_ioeventfd);
    tcase_add_test(tc, interrupts);
    tcase_add_test(tc, accesses);
    tcase_add_test(tc, memory);
    tcase_add_test(tc, features);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
