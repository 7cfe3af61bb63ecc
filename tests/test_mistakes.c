/* SPDX-License-Identifier: MIT */
/*
 * ==== device, client ==== the mistakes of others
 *
 * What was found wrong in other implementations of the protocol, each by name, against a device with everything: libvfio-user,
 * the vfio-user crate of rust-vmm, and SPDK's NVMe target. Most is tested in more ways beside what it belongs to; here is one
 * place that has all of it, but for one mistake of SPDK's, fields in the client's memory that are checked and then read again: here
 * nothing looks at that memory, so test_double_fetch.c has it.
 */
#include "util.h"

static rig R;
static unsigned fds_at_start;
static void note_fds(void) { fds_at_start = fds_open(); }
static void check_fds(void) { ck_assert_uint_eq(fds_open(), fds_at_start); }

static vfu_wire_header header_with(uint16_t cmd, uint32_t flags, uint32_t size)
{
    return (vfu_wire_header){.id = ++R.id, .cmd = cmd, .size = size, .flags = flags};
}

/* Sends a message of any bytes behind a header of its size. */
static void tell(uint16_t cmd, uint32_t flags, const void *payload, uint32_t len)
{
    static uint8_t bytes[2 * PAGE];
    vfu_wire_header header = header_with(cmd, flags, 16 + len);
    ck_assert_uint_le(16 + len, sizeof(bytes));
    memcpy(bytes, &header, 16);
    if (len)
        memcpy(bytes + 16, payload, len);
    rig_send(&R, bytes, 16 + len, NULL, 0);
}

/* The header of the next message, which may be about a command that there isn't. */
static vfu_wire_header answered(void)
{
    settle(R.dev);
    ck_assert_int_eq(peer_receive(&R.client), 1);
    return header_of(R.client.bytes);
}

/* The next message is the error reply to the last request. */
static void refused(int err)
{
    vfu_wire_header header = answered();
    ck_assert_uint_eq(header.id, R.id);
    ck_assert_uint_eq(header.flags, VFU_HDR_REPLY | VFU_HDR_ERROR);
    ck_assert_uint_eq(header.error, (uint32_t)-err);
}

static int dma(uint64_t iova, void *buf, size_t len, bool to_client)
{
    static vfu_dma d;
    d = (vfu_dma){.iova = iova, .buf = buf, .len = len, .to_client = to_client};
    return vfu_dev_dma(R.dev, &d);
}

/* ---- libvfio-user ------------------------------------------------------------------------------------------------------ */

/* A length that wraps past 2^64 passed the bounds check of the DMA translation. */
START_TEST(dma_length_wraps)
{
    uint8_t buf[64] = {0};
    vfu_iommu_segment segment;
    vfu_iommu_pin pin = {0};
    int file = memfd("wraps", 2 * PAGE, F_SEAL_SHRINK);
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, UINT64_MAX - PAGE + 1, PAGE, RW, file, 0), 0);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, file, PAGE), 0);
    ck_assert_int_eq(dma(UINT64_MAX - 31, buf, 32, false), 0);       /* up to the last byte of all, */
    ck_assert_int_eq(dma(UINT64_MAX - 31, buf, 33, false), -EINVAL); /* but not around it */
    ck_assert_int_eq(dma(UINT64_MAX, buf, 64, true), -EINVAL);
    ck_assert_int_eq(dma(UINT64_MAX - PAGE + 1, buf, SIZE_MAX, true), -EINVAL);
    vfu_iommu_reader *reader = vfu_dev_reader(R.dev);
    ck_assert_int_eq(vfu_iommu_pin_take(reader, &pin, 4, UINT64_MAX - 2, VFU_IOMMU_READ, &segment, 1), -EINVAL);
    ck_assert_int_eq(vfu_iommu_probe(reader, PAGE - 1, UINT64_MAX - PAGE + 3, VFU_IOMMU_READ), -EINVAL);
    ck_assert_int_eq(vfu_iommu_copy(reader, 0, 16, UINT64_MAX), -EINVAL);
    close(file);
    rig_destroy(&R);
}
END_TEST

/* Read permission was never checked. */
START_TEST(dma_without_permission)
{
    uint8_t buf[16] = {0};
    vfu_iommu_segment segment;
    vfu_iommu_pin pin = {0};
    int file = memfd("permission", 2 * PAGE, F_SEAL_SHRINK);
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, VFU_DMA_WRITEABLE, file, 0), 0);
    ck_assert_int_eq(ask_map(&R, PAGE, PAGE, VFU_DMA_READABLE, file, PAGE), 0);
    ck_assert_int_eq(dma(0, buf, 16, false), -EACCES);
    ck_assert_int_eq(dma(0, buf, 16, true), 0);
    ck_assert_int_eq(dma(PAGE, buf, 16, true), -EACCES);
    ck_assert_int_eq(dma(PAGE, buf, 16, false), 0);
    ck_assert_int_eq(dma(PAGE - 8, buf, 16, false), -EACCES);
    ck_assert_int_eq(dma(PAGE - 8, buf, 16, true), -EACCES);
    ck_assert_int_eq(vfu_iommu_pin_take(vfu_dev_reader(R.dev), &pin, 0, 16, VFU_IOMMU_READ, &segment, 1), -EACCES);
    close(file);
    rig_destroy(&R);
}
END_TEST

static int ask_log(uint32_t flags, const void *data, uint32_t len)
{
    vfu_msg m = command(VFU_CMD_DEVICE_FEATURE);
    m.u.feature.argsz = 65536;
    m.u.feature.flags = flags;
    m.u.feature.data = data;
    m.u.feature.data_len = len;
    return ask(&R, &m);
}

/* Dirty bitmaps with another page size than the mappings' looped for ever, or lost pages beyond 256. */
START_TEST(dirty_page_sizes)
{
    enum { PAGES = 1024 };
    uint8_t byte = 1;
    int file = memfd("dirty", PAGES * PAGE, F_SEAL_SHRINK);
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, 0, PAGES * PAGE, RW, file, 0), 0);
    for (unsigned shift = 0; shift < 40; shift++) {
        vfu_wire_feature_log_control start = {.page_size = UINT64_C(1) << shift};
        vfu_wire_feature_log_report report = {.length = PAGES * PAGE, .page_size = PAGE};
        ck_assert_int_eq(ask_log(VFU_FEATURE_LOGGING_START | VFU_FEATURE_SET, &start, sizeof(start)), 0);
        for (unsigned page = 0; page < PAGES; page += 255)
            ck_assert_int_eq(dma((uint64_t)page * PAGE + page, &byte, 1, true), 0);
        ck_assert_int_eq(ask_log(VFU_FEATURE_LOGGING_REPORT | VFU_FEATURE_GET, &report, sizeof(report)), 0);
        ck_assert_uint_eq(R.reply.u.feature.data_len, sizeof(report) + PAGES / 8);
        for (unsigned page = 0; page < PAGES; page++) {
            uint64_t word;
            memcpy(&word, R.reply.u.feature.data + sizeof(report) + page / 64 * 8, sizeof(word));
            unsigned bit = word >> page % 64 & 1;
            uint64_t coarse = UINT64_C(1) << (shift > 12 ? shift - 12 : 0); /* pages that share a bit of the log */
            bool wrote = false;
            for (unsigned at = 0; at < PAGES; at += 255)
                wrote = wrote || at / coarse == page / coarse;
            ck_assert_msg(bit == wrote, "pages of 2^%u bytes: page %u", shift, page);
        }
        ck_assert_int_eq(ask_log(VFU_FEATURE_LOGGING_STOP | VFU_FEATURE_SET, NULL, 0), 0);
    }
    close(file);
    rig_destroy(&R);
}
END_TEST

/* Writes of the configuration space that run over the end of an MSI or MSI-X capability overflowed the stack. */
START_TEST(config_writes_over_capabilities)
{
    enum { CONFIG = 4096 };
    static uint8_t ones[CONFIG];
    vfu_dev_desc desc = rig_desc(&R);
    desc.pci.msi.vectors = 4;
    desc.pci.msi.mask = true;
    rig_create(&R, &desc);
    rig_connect(&R);
    greet(&R);
    memset(ones, 0xff, sizeof(ones));
    for (uint32_t offset = 0; offset < 256; offset++)
        for (uint32_t len = 1; len <= CONFIG - offset; len = len < 80 ? len + 1 : len * 7)
            ck_assert_int_eq(ask_write(&R, VFU_PCI_REGION_CONFIG, offset, ones, len), 0);
    ck_assert_int_eq(ask_write(&R, VFU_PCI_REGION_CONFIG, 0, ones, CONFIG), 0);
    ck_assert_int_eq(ask_write(&R, VFU_PCI_REGION_CONFIG, 1, ones, CONFIG), -EINVAL);
    ck_assert_uint_eq(read_config(&R, 0, 4), 0xd3a11234); /* read-only stays read-only */
    rig_destroy(&R);
}
END_TEST

/* An assertion was reachable from the client: arguments at their ends, each of which is refused or done. */
START_TEST(no_argument_is_fatal)
{
    static const uint64_t ends[] = {0,         1, PAGE, UINT32_MAX, UINT64_C(1) << 32, UINT64_C(1) << 63, UINT64_MAX - PAGE + 1,
                                    UINT64_MAX};
    rig_open(&R);
    for (unsigned cmd = 2; cmd < 20; cmd++)
        for (unsigned word = 0; word < 8; word++)
            for (unsigned i = 0; i < COUNT(ends); i++)
                for (unsigned j = 0; j < COUNT(ends); j++) {
                    uint8_t payload[64] = {0};
                    memcpy(payload + word * 4, &ends[i], 8);
                    memcpy(payload + (word * 4 + 8) % 56, &ends[j], 8);
                    for (uint32_t len = 0; len <= 32; len += 8)
                        tell((uint16_t)cmd, 0, payload, len);
                    for (uint32_t len = 0; len <= 32; len += 8)
                        ck_assert_uint_eq(answered().cmd, cmd);
                }
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* A file shorter than its mapping killed the server with SIGBUS: when it is mapped, and when it becomes so. */
START_TEST(file_is_shorter)
{
    uint8_t buf[2 * PAGE] = {0};
    int file = memfd("shorter", 2 * PAGE, 0);
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, 0, 3 * PAGE, RW, file, 0), -EINVAL);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, file, 2 * PAGE), -EINVAL);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, file, UINT64_MAX - PAGE + 1), -EINVAL);
    ck_assert_int_eq(ask_map(&R, 0, 2 * PAGE, RW, file, 0), 0);
    must(ftruncate(file, PAGE + 1)); /* the rest of a page stays */
    ck_assert_int_eq(dma(0, buf, 2 * PAGE, true), 0);
    must(ftruncate(file, 0));
    ck_assert_int_eq(dma(0, buf, 2 * PAGE, true), -EFAULT);
    ck_assert_int_eq(dma(PAGE, buf, 1, false), -EFAULT);
    check_healthy(&R);
    close(file);
    rig_destroy(&R);
}
END_TEST

/* A message whose body arrives in pieces was refused. */
START_TEST(body_in_pieces)
{
    uint8_t bytes[16 + 16 + 8], back[8];
    vfu_wire_region_access access = {.region = 0, .count = 8};
    rig_open(&R);
    for (size_t cut = 1; cut < sizeof(bytes); cut++) {
        vfu_wire_header header = header_with(VFU_CMD_REGION_WRITE, 0, sizeof(bytes));
        memcpy(bytes, &header, 16);
        memcpy(bytes + 16, &access, 16);
        memset(bytes + 32, (int)cut, 8);
        rig_send(&R, bytes, cut, NULL, 0);
        check_silent(&R);
        rig_send(&R, bytes + cut, sizeof(bytes) - cut, NULL, 0);
        ck_assert_int_eq(rig_receive(&R), 1);
        ck_assert_uint_eq(header_of(R.client.bytes).flags, VFU_HDR_REPLY);
        ck_assert_int_eq(ask_read(&R, 0, 0, back, 8), 0);
        ck_assert_mem_eq(back, bytes + 32, 8);
    }
    rig_destroy(&R);
}
END_TEST

/* libvfio-user and rust-vmm: after an error the body was not drained, and the stream lost its place. */
START_TEST(body_after_an_error)
{
    static uint8_t body[PAGE];
    rig_open(&R);
    memset(body, 0xff, sizeof(body)); /* no header in it */
    for (uint32_t len = 1; len <= sizeof(body); len *= 2) {
        tell(99, 0, body, len);
        refused(-ENOSYS);
        check_healthy(&R);
        tell(VFU_CMD_DMA_MAP, 0, body, len == 32 ? 33 : len);
        refused(-EINVAL);
        check_healthy(&R);
        tell(VFU_CMD_DEVICE_RESET, 0, body, len);
        refused(-EINVAL);
        check_healthy(&R);
    }
    rig_destroy(&R);
}
END_TEST

static int crossed_result;
static void crossed(vfu_dma *d, int result)
{
    (void)d;
    crossed_result = result;
}

/* A command of the client that crosses a DMA message desynchronised the connection. */
START_TEST(command_crosses_dma)
{
    static uint8_t buf[16], reply[32 + 16];
    static vfu_dma d;
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, -1, 0), 0);
    crossed_result = 1;
    d = (vfu_dma){.iova = 8, .buf = buf, .len = 16, .done = crossed};
    ck_assert_int_eq(vfu_dev_dma(R.dev, &d), 1);
    vfu_msg info = command(VFU_CMD_DEVICE_GET_INFO);
    size_t len;
    info.u.device_info.argsz = 16;
    const uint8_t *bytes = encoded(&info, &len);
    rig_send(&R, bytes, len, NULL, 0); /* before the message was read */
    ck_assert_int_eq(rig_receive(&R), 1);
    ck_assert_uint_eq(R.reply.cmd, VFU_CMD_DMA_READ);
    vfu_wire_header header = {.id = R.reply.id, .cmd = VFU_CMD_DMA_READ, .size = sizeof(reply), .flags = VFU_HDR_REPLY};
    vfu_wire_dma_access access = {.address = 8, .count = 16};
    memcpy(reply, &header, 16);
    memcpy(reply + 16, &access, 16);
    memset(reply + 32, 0x77, 16);
    ck_assert_int_eq(rig_receive(&R), 1);
    ck_assert_uint_eq(R.reply.cmd, VFU_CMD_DEVICE_GET_INFO);
    ck_assert(vfu_msg_is_reply(&R.reply));
    ck_assert_int_eq(crossed_result, 1);
    rig_send(&R, reply, sizeof(reply), NULL, 0);
    ck_assert_int_eq(crossed_result, 0);
    ck_assert_uint_eq(buf[0], 0x77);
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* 65,370 mappings were the end: one mmap() each, against vm.max_map_count. */
START_TEST(many_mappings)
{
    enum { MAPPINGS = 65535 };
    uint8_t byte = 1;
    int file = memfd("many-mappings", MAPPINGS * (size_t)PAGE, F_SEAL_SHRINK);
    rig_open(&R);
    for (uint32_t i = 0; i < MAPPINGS; i++)
        ck_assert_int_eq(ask_map(&R, i * UINT64_C(8192), PAGE, RW, file, (uint64_t)i * PAGE), 0);
    ck_assert_int_eq(ask_map(&R, UINT64_C(1) << 50, PAGE, RW, file, 0), -ENOSPC); /* what VERSION has said */
    ck_assert_uint_eq(mappings(R.dev), MAPPINGS);
    ck_assert_int_eq(dma((MAPPINGS - 1) * UINT64_C(8192), &byte, 1, true), 0);
    ck_assert_uint_le(vmas_of("many-mappings"), 1);
    ck_assert_int_eq(ask_unmap(&R, 0, MAPPINGS * UINT64_C(8192), 0), 0);
    ck_assert_uint_eq(mappings(R.dev), 0);
    ck_assert_uint_eq(vmas_of("many-mappings"), 0);
    close(file);
    rig_destroy(&R);
}
END_TEST

/* De-assigning a part of an interrupt range left vectors armed. */
START_TEST(part_of_an_irq_range)
{
    int events[RIG_VECTORS];
    for (uint32_t start = 0; start < RIG_VECTORS; start++) {
        for (uint32_t count = 1; count <= RIG_VECTORS - start; count++) {
            rig_open(&R);
            for (unsigned v = 0; v < RIG_VECTORS; v++)
                events[v] = event();
            ck_assert_int_eq(ask_irqs(&R, 0x24, VFU_PCI_IRQ_MSIX, 0, RIG_VECTORS, NULL, events, RIG_VECTORS), 0);
            ck_assert_int_eq(ask_irqs(&R, 0x24, VFU_PCI_IRQ_MSIX, start, count, NULL, NULL, 0), 0);
            for (uint32_t v = 0; v < RIG_VECTORS; v++) {
                bool gone = v >= start && v < start + count;
                ck_assert_int_eq(vfu_dev_raise(R.dev, VFU_PCI_IRQ_MSIX, v), gone ? -ENOENT : 0);
                ck_assert_uint_eq(signals(events[v]), gone ? 0 : 1);
            }
            rig_destroy(&R);
            close_fds(events, RIG_VECTORS);
        }
    }
}
END_TEST

/* max_data_xfer_size 0 looped for ever; below 16, too, would need a chunk of nothing. */
START_TEST(no_data_in_a_message)
{
    static const char *const offers[] = {
        "{\"capabilities\":{\"max_data_xfer_size\":0}}",
        "{\"capabilities\":{\"max_data_xfer_size\":1}}",
        "{\"capabilities\":{\"max_msg_fds\":0,\"max_data_xfer_size\":1}}",
    };
    for (unsigned i = 0; i < COUNT(offers); i++) {
        static vfu_dma d;
        static uint8_t buf[2];
        vfu_dev_desc desc = rig_desc(&R);
        rig_create(&R, &desc);
        rig_connect(&R);
        int err = ask_version(&R, offers[i]);
        ck_assert_int_eq(err, i ? 0 : -EINVAL);
        if (!err) { /* a byte at a time */
            ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, -1, 0), 0);
            d = (vfu_dma){.buf = buf, .len = 2, .done = crossed};
            ck_assert_int_eq(vfu_dev_dma(R.dev, &d), 1);
            ck_assert_int_eq(rig_receive(&R), 1);
            ck_assert_uint_eq(R.reply.u.dma.count, 1);
        } else {
            check_closed(&R);
        }
        rig_destroy(&R);
    }
}
END_TEST

/* ---- rust-vmm ---------------------------------------------------------------------------------------------------------- */

/* Short messages, and strings that are none, were a panic. */
START_TEST(short_messages_and_strings)
{
    static const char *const strings[] = {
        "",
        "{",
        "{}",
        "\"",
        "\"\\",
        "[",
        "null",
        "{\"capabilities\"",
        "{\"capabilities\":",
        "{\"capabilities\":{\"max_msg_fds\":",
        "{\"capabilities\":{\"max_msg_fds\":1e999}}",
        "{\"capabilities\":{\"max_msg_fds\":-1}}",
        "{\"capabilities\":\"\xff\xfe\"}",
        "{\"capabilities\":{\"pgsizes\":\"\\ud800\"}}",
    };
    uint8_t payload[128] = {0};
    for (unsigned i = 0; i < COUNT(strings); i++) {
        for (unsigned nul = 0; nul < 2; nul++) {
            vfu_dev_desc desc = rig_desc(&R);
            rig_create(&R, &desc);
            rig_connect(&R);
            memcpy(payload + 4, strings[i], strlen(strings[i]) + 1);
            tell(VFU_CMD_VERSION, 0, payload, (uint32_t)(4 + strlen(strings[i]) + nul));
            ck_assert_uint_eq(answered().cmd, VFU_CMD_VERSION);
            rig_destroy(&R);
        }
    }
    rig_open(&R);
    for (uint16_t cmd = 1; cmd < 20; cmd++) {
        for (uint32_t len = 0; len < 16; len++) {
            tell(cmd, 0, payload, len);
            ck_assert_uint_eq(answered().cmd, cmd);
        }
    }
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* The server allocated whatever size the client named. */
START_TEST(no_allocation_of_any_size)
{
    heap h = {0};
    static const uint32_t sizes[] = {0x7fffffff, 0x80000000, 0xffffffff, (1 << 20) + 4096 + 1};
    vfu_dev_desc desc = rig_desc(&R);
    desc.alloc = heap_of(&h);
    rig_create(&R, &desc);
    size_t idle = h.live, busy = 0;
    for (unsigned i = 0; i < COUNT(sizes); i++) {
        rig_connect(&R);
        greet(&R);
        busy = busy ? busy : h.live;
        ck_assert_uint_eq(h.live, busy);
        vfu_wire_header header = header_with(VFU_CMD_REGION_WRITE, 0, sizes[i]);
        rig_send(&R, &header, sizeof(header), NULL, 0);
        check_closed(&R);
        ck_assert_uint_eq(h.live, idle);
        peer_close(&R.client);
    }
    /* nor what a payload names: a dirty log of every byte, a read of 4 GiB */
    rig_connect(&R);
    greet(&R);
    vfu_wire_feature_log_control log = {.page_size = 1, .num_ranges = UINT32_MAX};
    vfu_wire_region_access access = {.count = UINT32_MAX};
    ck_assert_int_eq(ask_log(VFU_FEATURE_LOGGING_START | VFU_FEATURE_SET, &log, sizeof(log)), -EINVAL);
    tell(VFU_CMD_REGION_READ, 0, &access, sizeof(access));
    refused(-EINVAL);
    ck_assert_uint_eq(h.live, busy);
    rig_destroy(&R);
    ck_assert_uint_eq(h.live, 0);
}
END_TEST

/* Requests that ask for no reply were answered when they failed. */
START_TEST(errors_without_a_reply)
{
    uint8_t payload[64];
    memset(payload, 0xff, sizeof(payload));
    rig_open(&R);
    for (uint16_t cmd = 1; cmd < 22; cmd++)
        for (uint32_t len = 0; len <= sizeof(payload); len += 4)
            tell(cmd, VFU_HDR_NO_REPLY, payload, len);
    check_silent(&R);
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* ---- SPDK -------------------------------------------------------------------------------------------------------------- */

/* Pointers into memory that a guest with an IOMMU has taken away were used on: by a device that remembers where a range was,
 * there is nothing to remember but the address. */
START_TEST(memory_taken_away)
{
    uint8_t buf[16] = {0};
    static vfu_dma d;
    int file = memfd("taken-away", 4 * PAGE, F_SEAL_SHRINK);
    rig_open(&R);
    for (unsigned round = 0; round < 3; round++) {
        ck_assert_int_eq(ask_map(&R, 0x10000, PAGE, RW, file, round * (uint64_t)PAGE), 0);
        ck_assert_int_eq(ask_map(&R, 0x20000, PAGE, RW, -1, 0), 0);
        buf[0] = (uint8_t)(round + 1);
        ck_assert_int_eq(dma(0x10000, buf, 16, true), 0);
        d = (vfu_dma){.iova = 0x20000, .buf = buf, .len = 16, .to_client = true, .done = crossed};
        crossed_result = 1;
        ck_assert_int_eq(vfu_dev_dma(R.dev, &d), 1); /* its reply never comes */
        ck_assert_int_eq(rig_receive(&R), 1);
        ck_assert_int_eq(ask_unmap(&R, 0, UINT64_C(1) << 47, 0), 0); /* as QEMU does it: far more than was mapped */
        ck_assert_int_eq(crossed_result, -ENOENT);
        ck_assert_int_eq(dma(0x10000, buf, 16, true), -ENOENT);
        ck_assert_uint_eq(mappings(R.dev), 0);
        ck_assert_uint_eq(vmas_of("taken-away"), 0);
    }
    for (unsigned page = 0; page < 3; page++) { /* each write went where the range was at that time */
        ck_assert_int_eq(pread(file, buf, 1, page * (off_t)PAGE), 1);
        ck_assert_uint_eq(buf[0], page + 1);
    }
    close(file);
    rig_destroy(&R);
}
END_TEST

/* Transfers that span two mappings were refused. */
START_TEST(transfer_over_two_mappings)
{
    uint8_t out[64], back[64];
    vfu_iommu_segment segments[3];
    vfu_iommu_pin pin = {0};
    int one = memfd("one", 2 * PAGE, F_SEAL_SHRINK), two = memfd("two", PAGE, F_SEAL_SHRINK);
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, one, PAGE), 0);
    ck_assert_int_eq(ask_map(&R, PAGE, PAGE, RW, two, 0), 0);
    memset(out, 0x42, sizeof(out));
    for (unsigned i = 0; i <= 64; i++) {
        memset(back, 0, sizeof(back));
        ck_assert_int_eq(dma(PAGE - i, out, 64, true), 0);
        ck_assert_int_eq(dma(PAGE - i, back, 64, false), 0);
        ck_assert_mem_eq(out, back, 64);
    }
    vfu_iommu_reader *reader = vfu_dev_reader(R.dev);
    ck_assert_int_eq(vfu_iommu_pin_take(reader, &pin, PAGE - 32, 64, VFU_IOMMU_READ, segments, 3), 2);
    ck_assert_mem_eq(segments[0].host, out, 32);
    ck_assert_mem_eq(segments[1].host, out, 32);
    vfu_iommu_pin_drop(vfu_dev_iommu(R.dev), &pin);
    close(one);
    close(two);
    rig_destroy(&R);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("mistakes of others");
    TCase *libvfio_user = tcase_create("libvfio-user"), *rust_vmm = tcase_create("rust-vmm"), *spdk = tcase_create("SPDK");
    tcase_add_checked_fixture(libvfio_user, note_fds, check_fds);
    tcase_add_checked_fixture(rust_vmm, note_fds, check_fds);
    tcase_add_checked_fixture(spdk, note_fds, check_fds);
    tcase_add_test(libvfio_user, dma_length_wraps);
    tcase_add_test(libvfio_user, dma_without_permission);
    tcase_add_test(libvfio_user, dirty_page_sizes);
    tcase_add_test(libvfio_user, config_writes_over_capabilities);
    tcase_add_test(libvfio_user, no_argument_is_fatal);
    tcase_add_test(libvfio_user, file_is_shorter);
    tcase_add_test(libvfio_user, body_in_pieces);
    tcase_add_test(libvfio_user, body_after_an_error);
    tcase_add_test(libvfio_user, command_crosses_dma);
    tcase_add_test(libvfio_user, many_mappings);
    tcase_add_test(libvfio_user, part_of_an_irq_range);
    tcase_add_test(libvfio_user, no_data_in_a_message);
    tcase_add_test(rust_vmm, short_messages_and_strings);
    tcase_add_test(rust_vmm, no_allocation_of_any_size);
    tcase_add_test(rust_vmm, errors_without_a_reply);
    tcase_add_test(spdk, memory_taken_away);
    tcase_add_test(spdk, transfer_over_two_mappings);
    suite_add_tcase(suite, libvfio_user);
    suite_add_tcase(suite, rust_vmm);
    suite_add_tcase(suite, spdk);
    return run_suite(suite);
}
