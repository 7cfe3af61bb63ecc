/* SPDX-License-Identifier: MIT */
/*
 * ==== device ====
 *
 * A device over a socketpair, seen by a client that sends raw messages: each command, good and bad, with its exact reply; DMA by
 * message with every kind of client; the device's life cycle. The device is polled in the test's own thread, so whatever a test has
 * sent is handled when settle() returns. Each test counts the descriptors of the process at its start and end.
 */
#include "util.h"

#include <signal.h>
#include <sys/timerfd.h>

static rig R;
static unsigned fds_at_start;
static void note_fds(void) { fds_at_start = fds_open(); }
static void check_fds(void) { ck_assert_uint_eq(fds_open(), fds_at_start); }

/* ---- raw messages ------------------------------------------------------------------------------------------------------------------ */

/* Header and payload to out; returns the size. */
static uint32_t put(uint8_t *out, uint16_t id, uint16_t cmd, uint32_t flags, const void *payload, uint32_t len)
{
    vfu_wire_header header = {.id = id, .cmd = cmd, .size = 16 + len, .flags = flags};
    memcpy(out, &header, sizeof(header));
    if (len)
        memcpy(out + 16, payload, len);
    return 16 + len;
}

static void tell(uint16_t cmd, uint32_t flags, const void *payload, uint32_t len, const int *fds, unsigned fd_count)
{
    static uint8_t bytes[(2 << 20) + PAGE];
    rig_send(&R, bytes, put(bytes, ++R.id, cmd, flags, payload, len), fds, fd_count);
}

/* Sends a command as it is; 0, or the negative errno of the error reply, whose form is checked. */
static int ask_raw_with(uint16_t cmd, const void *payload, uint32_t len, const int *fds, unsigned fd_count)
{
    vfu_msg sent = command(cmd);
    tell(cmd, 0, payload, len, fds, fd_count);
    sent.id = R.id;
    ck_assert_int_eq(peer_receive(&R.client), 1);
    return check_reply(&R, &sent);
}

static int ask_raw(uint16_t cmd, const void *payload, uint32_t len) { return ask_raw_with(cmd, payload, len, NULL, 0); }

/* A device with a listener, and a client that has just connected. */
static struct sockaddr_un address;
static socklen_t address_len;

static void serve_at_address(const vfu_dev_desc *desc)
{
    rig_create(&R, desc);
    ck_assert_int_eq(vfu_dev_attach(R.dev, listener(&address, &address_len)), 0);
}

static void come_in(void)
{
    R.client.sock = connect_to(&address, address_len);
    settle(R.dev);
}

/* ---- VERSION ------------------------------------------------------------------------------------------------------------------------ */

static const struct version_case {
    uint16_t major, minor;
    const char *json; /* NULL: none */
    int err;
} version_cases[] = {
    {0, 0, NULL, 0},
    {0, 7, NULL, 0},
    {0, 65535, "{}", 0},
    {1, 0, NULL, -EINVAL},
    {65535, 65535, NULL, -EINVAL},
    {0, 0, "{\"capabilities\":{}}", 0},
    {0, 0, "{\"capabilities\":{\"max_msg_fds\":8,\"unknown\":[1,{\"x\":null}],\"pgsizes\":4096}}", 0},
    {0, 0, "{\"capabilities\":{\"max_data_xfer_size\":1}}", 0},
    {0, 0, "{\"capabilities\":{\"max_data_xfer_size\":18446744073709551615}}", 0},
    {0, 0, "{\"capabilities\":{\"max_data_xfer_size\":0}}", -EINVAL},
    {0, 0, "{\"capabilities\":{\"max_data_xfer_size\":18446744073709551616}}", -EINVAL},
    {0, 0, "{\"capabilities\":{\"max_data_xfer_size\":-1}}", -EINVAL},
    {0, 0, "{\"capabilities\":{\"max_data_xfer_size\":\"1\"}}", -EINVAL},
    {0, 0, "{\"capabilities\":{\"max_msg_fds\":1.5}}", -EINVAL},
    {0, 0, "{\"capabilities\":{\"max_msg_fds\":true}}", -EINVAL},
    {0, 0, "{\"capabilities\":{\"write_multiple\":1}}", -EINVAL},
    {0, 0, "{\"capabilities\":{\"twin_socket\":true}}", -EINVAL},
    {0, 0, "{\"capabilities\":[]}", -EINVAL},
    {0, 0, "{", -EINVAL},
    {0, 0, "[]", -EINVAL},
    {0, 0, "null", -EINVAL},
    {0, 0, "{\"capabilities\":{}}x", -EINVAL},
    {0, 0, "{\"\xff\":1}", -EINVAL},
    {0, 0, "{\"a\":[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]}", -EINVAL},
};

static int ask_version_of(uint16_t major, uint16_t minor, const char *json, size_t len)
{
    static uint8_t payload[8192];
    vfu_wire_version version = {major, minor};
    memcpy(payload, &version, sizeof(version));
    if (len)
        memcpy(payload + 4, json, len);
    return ask_raw(VFU_CMD_VERSION, payload, (uint32_t)(4 + len));
}

/* A good VERSION is answered with 0.0 and capabilities; a bad one with an error, and then the connection is closed. */
START_TEST(version_table)
{
    const struct version_case *c = &version_cases[_i];
    vfu_dev_desc desc = rig_desc(&R);
    rig_create(&R, &desc);
    rig_connect(&R);
    ck_assert_int_eq(ask_version_of(c->major, c->minor, c->json, c->json ? strlen(c->json) + 1 : 0), c->err);
    ck_assert_uint_eq(R.connects, c->err ? 0 : 1);
    if (c->err) {
        check_closed(&R);
    } else {
        ck_assert_int_eq(vfu_msg_decode(R.client.bytes, R.client.have, &R.reply), 0);
        ck_assert_uint_eq(R.reply.u.version.major, 0);
        ck_assert_uint_eq(R.reply.u.version.minor, 0);
        ck_assert_uint_le(R.client.have, 200);
        check_healthy(&R);
    }
    rig_destroy(&R);
    ck_assert_uint_eq(R.disconnects, R.connects);
}
END_TEST

START_TEST(version_text)
{
    static char json[6000];
    vfu_dev_desc desc = rig_desc(&R);
    serve_at_address(&desc);
    /* without its NUL, with several, and with one in the middle */
    come_in();
    ck_assert_int_eq(ask_version_of(0, 0, "{\"capabilities\":{}}", 19), 0);
    rig_leave(&R);
    come_in();
    ck_assert_int_eq(ask_version_of(0, 0, "{}\0\0\0\0\0\0\0", 10), 0);
    rig_leave(&R);
    come_in();
    ck_assert_int_eq(ask_version_of(0, 0, "{}\0garbage", 10), -EINVAL);
    check_closed(&R);
    rig_leave(&R);
    /* as long as may be, and longer */
    memset(json, ' ', sizeof(json));
    json[0] = '{';
    json[VFU_CAPS_JSON_MAX - 1] = '}';
    come_in();
    ck_assert_int_eq(ask_version_of(0, 0, json, VFU_CAPS_JSON_MAX), 0);
    rig_leave(&R);
    come_in();
    json[VFU_CAPS_JSON_MAX - 1] = ' ';
    json[5000] = '}';
    ck_assert_int_eq(ask_version_of(0, 0, json, 5001), -EMSGSIZE);
    check_closed(&R);
    rig_leave(&R);
    /* too short to hold the numbers */
    for (uint32_t len = 0; len < 4; len++) {
        come_in();
        ck_assert_int_eq(ask_raw(VFU_CMD_VERSION, "\0\0\0", len), -EINVAL);
        check_closed(&R);
        rig_leave(&R);
    }
    rig_destroy(&R);
}
END_TEST

/* The reply stays at or below 200 bytes, whatever the device and the client are. */
START_TEST(version_reply)
{
    vfu_caps caps;
    vfu_dev_desc desc = rig_desc(&R);
    desc.max_dma_maps = 2000000;
    desc.max_data_xfer_size = 16 << 20;
    desc.twin_socket = true;
    serve_at_address(&desc);
    come_in();
    ck_assert_int_eq(ask_version(&R, "{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"twin_socket\":{\"supported\":true},"
                                     "\"write_multiple\":true,\"migration\":{\"pgsize\":4096}}}"),
                     0);
    ck_assert_uint_le(R.client.have, 200);
    ck_assert_int_eq(vfu_caps_parse(R.reply.u.version.json, R.reply.u.version.json_len, &caps), 0);
    ck_assert_uint_eq(caps.max_msg_fds, 16);
    ck_assert_uint_eq(caps.max_data_xfer_size, 16 << 20);
    ck_assert_uint_eq(caps.max_dma_maps, 2000000);
    ck_assert_uint_eq(caps.pgsizes, 4096);
    ck_assert(caps.write_multiple && caps.twin_socket);
    ck_assert_int_eq(caps.twin_fd_index, 0);
    ck_assert_uint_eq(R.client.fd_count, 1);
    rig_leave(&R);
    /* what was not offered isn't taken up */
    come_in();
    ck_assert_int_eq(ask_version(&R, NULL), 0);
    ck_assert_int_eq(vfu_caps_parse(R.reply.u.version.json, R.reply.u.version.json_len, &caps), 0);
    ck_assert(!(caps.present & (VFU_CAPS_WRITE_MULTIPLE | VFU_CAPS_TWIN_SOCKET)));
    ck_assert_uint_eq(R.client.fd_count, 0);
    rig_destroy(&R);
}
END_TEST

START_TEST(version_twice)
{
    rig_open(&R);
    ck_assert_int_eq(ask_version(&R, NULL), -EINVAL);
    check_healthy(&R);
    ck_assert_uint_eq(R.connects, 1);
    rig_destroy(&R);
}
END_TEST

/* Anything in front of VERSION is refused and ends the connection; with NO_REPLY it ends it silently. */
START_TEST(version_has_to_come_first)
{
    static const uint8_t payload[64];
    vfu_dev_desc desc = rig_desc(&R);
    serve_at_address(&desc);
    for (uint16_t cmd = 0; cmd < 22; cmd++) {
        if (cmd == VFU_CMD_VERSION)
            continue;
        come_in();
        ck_assert_int_lt(ask_raw(cmd, payload, sizeof(payload)), 0);
        check_closed(&R);
        rig_leave(&R);
        come_in();
        tell(cmd, VFU_HDR_NO_REPLY, payload, sizeof(payload), NULL, 0);
        check_closed(&R);
        rig_leave(&R);
    }
    come_in();
    tell(VFU_CMD_DMA_READ, VFU_HDR_REPLY, payload, 16, NULL, 0);
    check_closed(&R);
    rig_leave(&R);
    come_in();
    tell(VFU_CMD_VERSION, VFU_HDR_NO_REPLY, payload, 4, NULL, 0); /* strange, but no error */
    check_silent(&R);
    check_healthy(&R);
    ck_assert_uint_eq(R.connects, 1);
    rig_destroy(&R);
}
END_TEST

/* ---- dispatch -------------------------------------------------------------------------------------------------------------------------- */

START_TEST(unknown_commands)
{
    static const struct {
        uint16_t cmd;
        int err;
    } cases[] = {{0, -ENOSYS},  {14, -ENOSYS},    {19, -ENOSYS},   {99, -ENOSYS},
                 {255, -ENOSYS}, {65535, -ENOSYS}, {VFU_CMD_DMA_READ, -EOPNOTSUPP}, {VFU_CMD_DMA_WRITE, -EOPNOTSUPP}};
    static const uint8_t payload[16];
    rig_open(&R);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        ck_assert_int_eq(ask_raw(cases[i].cmd, payload, sizeof(payload)), cases[i].err);
        check_healthy(&R);
    }
    rig_destroy(&R);
}
END_TEST

/* The size of each command's fixed part: one byte less is an error reply, and the stream stays in place. */
START_TEST(short_payloads)
{
    static const struct {
        uint16_t cmd;
        uint32_t len;
    } cases[] = {{VFU_CMD_DMA_MAP, 32},        {VFU_CMD_DMA_UNMAP, 24},        {VFU_CMD_DEVICE_GET_INFO, 16},
                 {VFU_CMD_DEVICE_GET_REGION_INFO, 32}, {VFU_CMD_DEVICE_GET_REGION_IO_FDS, 16}, {VFU_CMD_DEVICE_GET_IRQ_INFO, 16},
                 {VFU_CMD_DEVICE_SET_IRQS, 20}, {VFU_CMD_REGION_READ, 16},     {VFU_CMD_REGION_WRITE, 16},
                 {VFU_CMD_REGION_WRITE_MULTI, 8}, {VFU_CMD_DEVICE_FEATURE, 8}, {VFU_CMD_MIG_DATA_READ, 8},
                 {VFU_CMD_MIG_DATA_WRITE, 8}};
    static const uint8_t payload[64];
    rig_open(&R);
    for (unsigned i = 0; i < COUNT(cases); i++)
        for (uint32_t len = 0; len < cases[i].len; len++)
            ck_assert_int_eq(ask_raw(cases[i].cmd, payload, len), -EINVAL);
    /* a write whose data isn't as long as it says */
    vfu_wire_region_access access = {.region = 0, .count = 4};
    uint8_t write[40] = {0};
    memcpy(write, &access, sizeof(access));
    for (uint32_t len = 16; len <= sizeof(write); len++)
        ck_assert_int_eq(ask_raw(VFU_CMD_REGION_WRITE, write, len), len == 20 ? 0 : -EINVAL);
    ck_assert_uint_eq(R.writes, 1);
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* What can't be a message ends the connection, and nothing else does. */
START_TEST(framing)
{
    static const struct {
        uint32_t size, flags;
        bool closed;
    } cases[] = {{0, 0, true},  {15, 0, true}, {(1 << 20) + 4097, 0, true}, {0xffffffff, 0, true}, {16, 2, true},
                 {16, 15, true}, {16, 1, false} /* a reply to nothing */,     {16, 0xffffffe0, false}};
    vfu_dev_desc desc = rig_desc(&R);
    serve_at_address(&desc);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_wire_header header = {.id = 7, .cmd = VFU_CMD_DEVICE_RESET, .size = cases[i].size, .flags = cases[i].flags};
        come_in();
        greet(&R);
        rig_send(&R, &header, sizeof(header), NULL, 0);
        if (cases[i].closed) {
            check_closed(&R);
        } else {
            if (!(cases[i].flags & 1) && !(cases[i].flags & VFU_HDR_NO_REPLY))
                ck_assert_int_eq(rig_receive(&R), 1);
            check_healthy(&R);
        }
        rig_leave(&R);
    }
    /* the largest message is handled: as much data as may be, and refused, but not the end */
    static uint8_t large[(1 << 20) + PAGE];
    come_in();
    greet(&R);
    vfu_wire_header header = {.id = ++R.id, .cmd = VFU_CMD_REGION_WRITE, .size = sizeof(large)};
    vfu_wire_region_access access = {.region = 2, .count = sizeof(large) - 32};
    memcpy(large, &header, sizeof(header));
    memcpy(large + 16, &access, sizeof(access));
    rig_send(&R, large, sizeof(large), NULL, 0);
    ck_assert_int_eq(rig_receive(&R), 1);
    ck_assert_uint_eq(R.reply.error, EINVAL);
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* The header's error field, and bits that mean nothing in a command, change nothing. */
START_TEST(byte_by_byte)
{
    uint8_t bytes[64];
    vfu_wire_device_info info = {.argsz = 16};
    rig_open(&R);
    for (unsigned round = 0; round < 3; round++) {
        uint32_t len = put(bytes, (uint16_t)(0x8000 + round), VFU_CMD_DEVICE_GET_INFO, 0, &info, sizeof(info));
        for (uint32_t i = 0; i < len; i++) {
            ck_assert_int_eq(rig_receive(&R), 0);
            rig_send(&R, bytes + i, 1, NULL, 0);
        }
        ck_assert_int_eq(rig_receive(&R), 1);
        ck_assert_uint_eq(R.reply.id, 0x8000 + round);
        ck_assert_uint_eq(R.reply.u.device_info.flags, VFU_DEVICE_INFO_PCI | VFU_DEVICE_INFO_RESET);
        ck_assert_uint_eq(R.reply.u.device_info.argsz, 16);
        ck_assert_uint_eq(R.reply.u.device_info.num_irqs, 5);
    }
    info.argsz = 15;
    ck_assert_int_eq(ask_raw(VFU_CMD_DEVICE_GET_INFO, &info, sizeof(info)), -EINVAL);
    rig_destroy(&R);
}
END_TEST

/* Puts request number i of a mix, good and bad ones, to out. */
static uint32_t put_mixed(uint8_t *out, unsigned i, uint16_t id, uint32_t flags)
{
    static const uint8_t zeros[64];
    vfu_wire_device_info info = {.argsz = i % 2 ? 16 : 3};
    vfu_wire_region_info region = {.argsz = 32, .index = i};
    vfu_wire_irq_info irq = {.argsz = 16, .index = i % 7};
    vfu_wire_irq_set set = {.argsz = 20, .flags = i % 64, .index = i % 6};
    vfu_wire_dma_map map = {.argsz = 32, .flags = 3, .address = i * UINT64_C(4096), .size = i % 3 * 4096};
    vfu_wire_dma_unmap unmap = {.argsz = 24, .address = i * UINT64_C(4096), .size = 4096};
    vfu_wire_region_access access = {.region = i % 11, .offset = i * 13, .count = 4};
    switch (i % 12) {
    case 0: return put(out, id, VFU_CMD_DEVICE_GET_INFO, flags, &info, sizeof(info));
    case 1: return put(out, id, VFU_CMD_DEVICE_GET_REGION_INFO, flags, &region, sizeof(region));
    case 2: return put(out, id, VFU_CMD_DEVICE_GET_IRQ_INFO, flags, &irq, sizeof(irq));
    case 3: return put(out, id, VFU_CMD_DEVICE_SET_IRQS, flags, &set, sizeof(set));
    case 4: return put(out, id, VFU_CMD_DMA_MAP, flags, &map, sizeof(map));
    case 5: return put(out, id, VFU_CMD_DMA_UNMAP, flags, &unmap, sizeof(unmap));
    case 6: return put(out, id, VFU_CMD_REGION_READ, flags, &access, sizeof(access));
    case 7: return put(out, id, (uint16_t)(100 + i), flags, zeros, i % 60);
    case 8: return put(out, id, VFU_CMD_DEVICE_RESET, flags, zeros, 0);
    case 9: return put(out, id, VFU_CMD_VERSION, flags, zeros, 4);
    case 10: return put(out, id, VFU_CMD_REGION_WRITE_MULTI, flags, zeros, i % 2 ? 8 : 9);
    default: return put(out, id, (uint16_t)(i % 20), flags, zeros, i % 64);
    }
}

/* Everything is answered once, in the order in which it came, with its own id and command. */
START_TEST(replies_in_order)
{
    static uint8_t bytes[300 * 80];
    uint32_t len = 0, at = 0;
    rig_open(&R);
    for (unsigned i = 0; i < 300; i++)
        len += put_mixed(bytes + len, i, (uint16_t)(i * 7919), 0);
    rig_send(&R, bytes, len, NULL, 0);
    for (unsigned i = 0; i < 300; i++) {
        settle(R.dev);
        ck_assert_int_eq(peer_receive(&R.client), 1);
        ck_assert_uint_eq(header_of(R.client.bytes).id, (uint16_t)(i * 7919));
        ck_assert_uint_eq(header_of(R.client.bytes).cmd, header_of(bytes + at).cmd);
        at += header_of(bytes + at).size;
    }
    check_silent(&R);
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* A connection whose other end sees what each sendmsg() sent: a record. Receives one: its length; 0: there is none. */
static size_t receive_record(int sock, uint8_t *bytes, size_t size, unsigned *fd_count)
{
    peer p = {.sock = sock};
    int64_t n = peer_read(&p, size);
    if (n > 0)
        memcpy(bytes, p.bytes, (size_t)n);
    *fd_count = p.fd_count;
    p.sock = -1;
    peer_close(&p);
    return n > 0 ? (size_t)n : 0;
}

/* Sends 20 mixed requests, one whose reply has a descriptor, 20 mixed, one with a long reply, and 5 mixed. Receives all replies. */
static size_t ask_much(bool together, uint8_t *replies, size_t size, size_t *records, unsigned *fds_at)
{
    static uint8_t bytes[60 * 80];
    vfu_wire_region_info info = {.argsz = 256, .index = 2};
    vfu_wire_region_access read = {.region = 2, .count = 8000};
    int pair[2];
    uint32_t len = 0;
    size_t got = 0, n;
    unsigned fd_count;
    vfu_dev_desc desc = rig_desc(&R);
    rig_create(&R, &desc);
    must(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
    ck_assert_int_eq(vfu_dev_attach(R.dev, pair[0]), 0);
    must(send(pair[1], bytes, put(bytes, 0, VFU_CMD_VERSION, 0, "\0\0\0\0", 4), 0));
    settle(R.dev);
    ck_assert_uint_gt(receive_record(pair[1], replies, size, &fd_count), 0);
    for (unsigned i = 0; i < 47; i++) {
        if (i == 20)
            len += put(bytes + len, (uint16_t)i, VFU_CMD_DEVICE_GET_REGION_INFO, 0, &info, sizeof(info));
        else if (i == 41)
            len += put(bytes + len, (uint16_t)i, VFU_CMD_REGION_READ, 0, &read, sizeof(read));
        else
            len += put_mixed(bytes + len, i, (uint16_t)i, 0);
        if (together && i < 46)
            continue;
        must(send(pair[1], bytes, len, 0));
        len = 0;
        ck_assert_int_eq(vfu_dev_poll(R.dev), 0);
        for (; (n = receive_record(pair[1], replies + got, size - got, &fd_count)) != 0; got += n) {
            if (fd_count)
                *fds_at = header_of(replies + got).id;
            ++*records;
        }
    }
    close(pair[1]);
    rig_destroy(&R);
    return got;
}

/* Requests that come together are answered together, with the same bytes as if they came one by one. */
START_TEST(answered_together)
{
    static uint8_t one[65536], all[65536];
    size_t one_records = 0, all_records = 0;
    unsigned one_fds = 0, all_fds = 0;
    size_t one_len = ask_much(false, one, sizeof(one), &one_records, &one_fds);
    size_t all_len = ask_much(true, all, sizeof(all), &all_records, &all_fds);
    ck_assert_uint_eq(one_records, 47);
    ck_assert_uint_eq(all_records, 4); /* what goes before a descriptor, its own, up to the long one, the rest */
    ck_assert_uint_eq(one_len, all_len);
    ck_assert_mem_eq(one, all, one_len);
    ck_assert_uint_eq(one_fds, 20);
    ck_assert_uint_eq(all_fds, 20);
}
END_TEST

START_TEST(no_reply_is_never_answered)
{
    static uint8_t bytes[300 * 80];
    uint32_t len = 0;
    rig_open(&R);
    for (unsigned i = 0; i < 300; i++)
        len += put_mixed(bytes + len, i, (uint16_t)i, VFU_HDR_NO_REPLY);
    rig_send(&R, bytes, len, NULL, 0);
    check_silent(&R);
    /* but done: a posted write arrives */
    vfu_wire_region_access access = {.region = 0, .count = 4};
    uint8_t write[20];
    unsigned before = R.writes;
    memcpy(write, &access, 16);
    memcpy(write + 16, "\1\2\3\4", 4);
    tell(VFU_CMD_REGION_WRITE, VFU_HDR_NO_REPLY, write, sizeof(write), NULL, 0);
    check_silent(&R);
    ck_assert_uint_eq(R.writes, before + 1);
    ck_assert_mem_eq(R.storage[0], "\1\2\3\4", 4);
    R.refuse = -EIO;
    tell(VFU_CMD_REGION_WRITE, VFU_HDR_NO_REPLY, write, sizeof(write), NULL, 0);
    check_silent(&R);
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* Descriptors where none belong are closed, and too many of them are an error. */
START_TEST(surplus_descriptors)
{
    vfu_wire_device_info info = {.argsz = 16};
    int fds[40];
    rig_open(&R);
    for (unsigned i = 0; i < COUNT(fds); i++)
        fds[i] = null_fd();
    unsigned open = fds_open();
    for (unsigned count = 1; count <= COUNT(fds); count++) {
        tell(VFU_CMD_DEVICE_GET_INFO, 0, &info, sizeof(info), fds, count);
        ck_assert_int_eq(rig_receive(&R), 1);
        ck_assert_uint_eq(R.reply.error, count > VFU_FDS_MAX ? EINVAL : 0);
    }
    check_healthy(&R);
    ck_assert_uint_eq(fds_open(), open);
    close_fds(fds, COUNT(fds));
    rig_destroy(&R);
}
END_TEST

/* ---- DMA_MAP, DMA_UNMAP ---------------------------------------------------------------------------------------------------------------- */

START_TEST(map_arguments)
{
    static const struct {
        uint64_t iova, size;
        uint32_t flags;
        int err;
    } cases[] = {
        {0x1000, 0x1000, RW, 0},
        {0x1000, 0x1000, RW, -EEXIST},
        {0, 0x2000, RW, -EEXIST},
        {0, UINT64_C(1) << 63, RW, -EEXIST},
        {0x1800, 0x1000, RW, -EINVAL}, /* no multiple of the page size */
        {0x3000, 0x800, RW, -EINVAL},
        {0x3000, 0, RW, -EINVAL},
        {0x3000, 0x1000, 0, -EINVAL}, /* no permission at all */
        {UINT64_MAX - 0xfff, 0x2000, RW, -EINVAL},
        {0x1000, UINT64_MAX, RW, -EINVAL},
        {0x2000, 0x1000, VFU_DMA_READABLE, 0},
        {0x3000, 0x1000, VFU_DMA_WRITEABLE, 0},
        {UINT64_MAX - 0xfff, 0x1000, RW, 0}, /* ends at 2^64 */
        {UINT64_C(1) << 63, UINT64_C(1) << 62, RW, 0},
    };
    rig_open(&R);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        ck_assert_int_eq(ask_map(&R, cases[i].iova, cases[i].size, cases[i].flags, -1, 0), cases[i].err);
        ck_assert(cases[i].err || R.client.have == 16);
    }
    ck_assert_uint_eq(mappings(R.dev), 5);
    ck_assert_uint_eq(R.maps, 5);
    check_healthy(&R);
    rig_destroy(&R);
    ck_assert_uint_eq(R.unmaps, 5);
}
END_TEST

START_TEST(map_limit)
{
    vfu_dev_desc desc = rig_desc(&R);
    desc.max_dma_maps = 10;
    rig_create(&R, &desc);
    rig_connect(&R);
    greet(&R);
    for (unsigned i = 0; i < 12; i++)
        ck_assert_int_eq(ask_map(&R, i * UINT64_C(8192), 4096, RW, -1, 0), i < 10 ? 0 : -ENOSPC);
    ck_assert_int_eq(ask_unmap(&R, 0, 4096, 0), 0);
    ck_assert_int_eq(ask_map(&R, 1 << 20, 4096, RW, -1, 0), 0);
    rig_destroy(&R);
}
END_TEST

/* The kernel's type1v2 semantics; the reply repeats what was asked. */
START_TEST(unmap_arguments)
{
    static const struct {
        uint64_t iova, size;
        uint32_t flags;
        int err;
        unsigned left;
    } cases[] = {
        {0x10000, 0x1000, 0, 0, 5},       /* nothing there */
        {0, UINT64_MAX - 0xfff, 0, -EINVAL, 5}, /* would split the one at the end */
        {0x2000, 0x1000, 0, -EINVAL, 5},  /* would split [0x2000, 0x4000) */
        {0x3000, 0x1000, 0, -EINVAL, 5},
        {0x1000, 0x2000, 0, -EINVAL, 5},
        {0x2000, 0, 0, -EINVAL, 5},
        {0, 0, 0, -EINVAL, 5},
        {0x2001, 0x1000, 0, -EINVAL, 5},
        {0x2000, 0x2001, 0, -EINVAL, 5},
        {0x2000, UINT64_MAX, 0, -EINVAL, 5},
        {0, 0, 1, -EINVAL, 5},            /* dirty bitmap */
        {0, 0, 4, -EINVAL, 5},
        {0x1000, 0, 2, -EINVAL, 5},       /* all, but with a range */
        {0, 0x1000, 2, -EINVAL, 5},
        {0x1000, 0x3000, 0, 0, 3},        /* two at once */
        {0x1000, 0x3000, 0, 0, 3},
        {0x5000, 0x1000, 0, 0, 2},        /* exact */
        {0, 0, 2, 0, 0},
        {0, 0, 2, 0, 0},
    };
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, 0x1000, 0x1000, RW, -1, 0), 0);
    ck_assert_int_eq(ask_map(&R, 0x2000, 0x2000, RW, -1, 0), 0);
    ck_assert_int_eq(ask_map(&R, 0x5000, 0x1000, RW, -1, 0), 0);
    ck_assert_int_eq(ask_map(&R, 0x7000, 0x1000, RW, -1, 0), 0);
    ck_assert_int_eq(ask_map(&R, UINT64_MAX - 0x1fff, 0x2000, RW, -1, 0), 0);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_wire_dma_unmap unmap = {.argsz = 24, .flags = cases[i].flags, .address = cases[i].iova, .size = cases[i].size};
        ck_assert_int_eq(ask_raw(VFU_CMD_DMA_UNMAP, &unmap, sizeof(unmap)), cases[i].err);
        ck_assert_uint_eq(mappings(R.dev), cases[i].left);
        ck_assert_uint_eq(R.unmaps, 5 - cases[i].left);
        if (cases[i].err)
            continue;
        ck_assert_uint_eq(R.client.have, 40);
        ck_assert_int_eq(vfu_msg_decode(R.client.bytes, R.client.have, &R.reply), 0);
        ck_assert_uint_eq(R.reply.u.dma_unmap.argsz, 24);
        ck_assert_uint_eq(R.reply.u.dma_unmap.flags, cases[i].flags);
        ck_assert_uint_eq(R.reply.u.dma_unmap.address, cases[i].iova);
        ck_assert_uint_eq(R.reply.u.dma_unmap.size, cases[i].size);
    }
    rig_destroy(&R);
}
END_TEST

/* INTEROP.md: when a guest enables intel-iommu, QEMU unmaps the aperture of 48 bits as powers of two, around the MSI window. */
START_TEST(unmap_as_qemu_does)
{
    rig_open(&R);
    for (unsigned i = 0; i < 100; i++)
        ck_assert_int_eq(ask_map(&R, UINT64_C(0x12345000) * (i + 1), 0x1000, RW, -1, 0), 0);
    unsigned before = R.unmaps;
    uint64_t at = 0, chunks = 0, end = UINT64_C(1) << 48;
    while (at < end) { /* as memory_region_notify_iommu_one splits it: each chunk aligned to its own size */
        uint64_t size = at ? at & -at : UINT64_C(1) << 20;
        while (size > end - at || (at < 0xfee00000 && at + size > 0xfee00000))
            size >>= 1;
        ck_assert_int_eq(ask_unmap(&R, at, size, 0), 0);
        at += size;
        chunks++;
        if (at == 0xfee00000)
            at = 0xfef00000;
    }
    ck_assert_uint_ge(chunks, 28);
    ck_assert_uint_eq(R.unmaps - before, 100);
    ck_assert_uint_eq(mappings(R.dev), 0);
    /* what it says last, and amd-iommu's top chunk */
    ck_assert_int_eq(ask_map(&R, UINT64_MAX - 0xfff, 0x1000, RW, -1, 0), 0);
    ck_assert_int_eq(ask_unmap(&R, 0xfef00000, UINT64_MAX - 0xfef00000 + 1, 0), 0);
    ck_assert_uint_eq(mappings(R.dev), 0);
    ck_assert_int_eq(ask_map(&R, UINT64_MAX - 0xfff, 0x1000, RW, -1, 0), 0);
    ck_assert_int_eq(ask_unmap(&R, UINT64_C(1) << 63, UINT64_C(1) << 63, 0), 0);
    ck_assert_uint_eq(mappings(R.dev), 0);
    /* virtio-iommu: all of an empty table */
    ck_assert_int_eq(ask_unmap(&R, 0, 0, VFU_DMA_UNMAP_ALL), 0);
    rig_destroy(&R);
}
END_TEST

enum { FILE_PAGES = 16 };

/* What kinds of descriptor can be mapped, and with which permission. */
START_TEST(map_descriptors)
{
    enum { SEALED, UNSEALED, NO_WRITING, READ_ONLY, WRITE_ONLY, DIRECTORY, PIPE, SOCKET, NULL_DEVICE, PATH, EVENT };
    static const struct {
        int kind;
        uint32_t flags;
        uint64_t offset, size; /* pages */
        int err;
    } cases[] = {
        {SEALED, RW, 0, 16, 0},
        {SEALED, RW, 15, 1, 0},
        {SEALED, RW, 15, 2, -EINVAL}, /* the file is shorter */
        {SEALED, RW, 16, 1, -EINVAL},
        {SEALED, RW, UINT64_MAX >> 12, 1, -EINVAL},
        {SEALED, RW, UINT64_MAX >> 12, 2, -EINVAL}, /* wraps */
        {SEALED, RW, 0, UINT64_MAX >> 12, -EINVAL},
        {UNSEALED, RW, 0, 16, 0},
        {UNSEALED, VFU_DMA_READABLE, 3, 4, 0},
        {NO_WRITING, RW, 0, 16, -EPERM}, /* sealed against writing: what mmap() says */
        {NO_WRITING, VFU_DMA_READABLE, 0, 16, 0},
        {READ_ONLY, RW, 0, 16, -EACCES},
        {READ_ONLY, VFU_DMA_READABLE, 0, 16, 0},
        {WRITE_ONLY, VFU_DMA_WRITEABLE, 0, 16, -EACCES},
        {WRITE_ONLY, VFU_DMA_READABLE, 0, 16, -EACCES},
        {DIRECTORY, VFU_DMA_READABLE, 0, 1, -ENODEV},
        {PIPE, RW, 0, 1, -ENODEV},
        {SOCKET, RW, 0, 1, -ENODEV},
        {NULL_DEVICE, RW, 0, 1, -ENODEV},
        {EVENT, RW, 0, 1, -ENODEV},
        {PATH, VFU_DMA_READABLE, 0, 1, -EBADF},
    };
    rig_open(&R);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        char path[64];
        int pair[2] = {-1, -1}, fd = -1, kind = cases[i].kind;
        int file = memfd("map-me", FILE_PAGES * PAGE, kind == SEALED ? F_SEAL_SHRINK : kind == NO_WRITING ? F_SEAL_SHRINK | F_SEAL_WRITE : 0);
        snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
        switch (kind) {
        case READ_ONLY: fd = open(path, O_RDONLY | O_CLOEXEC); break;
        case WRITE_ONLY: fd = open(path, O_WRONLY | O_CLOEXEC); break;
        case PATH: fd = open(path, O_PATH | O_CLOEXEC); break;
        case DIRECTORY: fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC); break;
        case PIPE: must(pipe2(pair, O_CLOEXEC)); break;
        case SOCKET: make_pair(pair); break;
        case NULL_DEVICE: fd = null_fd(); break;
        case EVENT: fd = event(); break;
        default: break;
        }
        unsigned open_before = fds_open(), maps = vmas_of("map-me");
        ck_assert_int_eq(ask_map(&R, 0, cases[i].size << 12, cases[i].flags, fd >= 0 ? fd : pair[0] >= 0 ? pair[0] : file, cases[i].offset << 12),
                         cases[i].err);
        ck_assert_uint_eq(mappings(R.dev), cases[i].err ? 0 : 1);
        ck_assert_int_eq(ask_unmap(&R, 0, 0, VFU_DMA_UNMAP_ALL), 0);
        ck_assert_uint_eq(fds_open(), open_before);
        ck_assert_uint_eq(vmas_of("map-me"), maps);
        check_healthy(&R);
        close_fds(pair, 2);
        close_fds(&fd, 1);
        close(file);
    }
    /* two descriptors with one map */
    int fds[2] = {memfd("map-me", PAGE, 0), memfd("map-me", PAGE, 0)};
    vfu_wire_dma_map map = {.argsz = 32, .flags = RW, .size = PAGE};
    tell(VFU_CMD_DMA_MAP, 0, &map, sizeof(map), fds, 2);
    ck_assert_int_eq(rig_receive(&R), 1);
    ck_assert_uint_eq(R.reply.error, EINVAL);
    close_fds(fds, 2);
    rig_destroy(&R);
}
END_TEST

/* A file is mapped once, however many mappings name it, each with a descriptor of its own; SPDK attaches one to UNMAP as well. */
START_TEST(one_file_a_thousand_times)
{
    enum { TIMES = 1000 };
    int file = memfd("vfu-many", TIMES * PAGE, F_SEAL_SHRINK);
    rig_open(&R);
    unsigned open_before = fds_open();
    for (unsigned i = 0; i < TIMES; i++) {
        int fd = fcntl(file, F_DUPFD_CLOEXEC, 0);
        ck_assert_int_eq(ask_map(&R, i * UINT64_C(8192), PAGE, i % 2 ? RW : VFU_DMA_READABLE, fd, i * (uint64_t)PAGE), 0);
        close(fd);
        ck_assert_uint_eq(fds_open(), open_before);
    }
    ck_assert_uint_le(vmas_of("vfu-many"), 2);
    ck_assert_uint_eq(mappings(R.dev), TIMES);
    /* the client has shown that it may write to this file: further descriptors of it are not asked */
    char path[32];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
    int read_only = open(path, O_RDONLY | O_CLOEXEC);
    ck_assert_int_eq(ask_map(&R, UINT64_C(1) << 40, PAGE, RW, read_only, 0), 0);
    ck_assert_int_eq(vfu_iommu_unmap(vfu_dev_iommu(R.dev), UINT64_C(1) << 40, PAGE), 1);
    close(read_only);
    ck_assert_uint_eq(fds_open(), open_before);
    /* and each is the page that it should be */
    uint32_t *pages = mmap(NULL, TIMES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    for (uint32_t i = 0; i < TIMES; i++) {
        uint32_t value = 0;
        pages[i * PAGE / 4 + i] = i + 1;
        ck_assert_int_eq(vfu_iommu_read(vfu_dev_reader(R.dev), i * UINT64_C(8192) + i * 4, &value, 4), 0);
        ck_assert_uint_eq(value, i + 1);
        ck_assert_int_eq(vfu_iommu_write(vfu_dev_reader(R.dev), i * UINT64_C(8192), &value, 4), i % 2 ? 0 : -EACCES);
    }
    munmap(pages, TIMES * PAGE);
    for (unsigned i = 0; i < TIMES; i++) {
        vfu_wire_dma_unmap unmap = {.argsz = 24, .address = i * UINT64_C(8192), .size = PAGE};
        tell(VFU_CMD_DMA_UNMAP, 0, &unmap, sizeof(unmap), &file, 1);
        ck_assert_int_eq(rig_receive(&R), 1);
        ck_assert_uint_eq(R.reply.flags, VFU_HDR_REPLY);
        ck_assert_uint_eq(mappings(R.dev), TIMES - 1 - i);
    }
    ck_assert_uint_eq(fds_open(), open_before);
    ck_assert_uint_eq(vmas_of("vfu-many"), 0);
    close(file);
    rig_destroy(&R);
}
END_TEST

/* A client that truncates its file gets errors, and the device lives. */
START_TEST(file_is_truncated)
{
    static uint8_t buf[FILE_PAGES * PAGE];
    int file = memfd("shrinks", FILE_PAGES * PAGE, 0);
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, 0x100000, FILE_PAGES * PAGE, RW, file, 0), 0);
    vfu_dma dma = {.iova = 0x100000, .buf = buf, .len = sizeof(buf)};
    ck_assert_int_eq(vfu_dev_dma(R.dev, &dma), 0);
    must(ftruncate(file, 5 * PAGE));
    for (unsigned round = 0; round < 4; round++) {
        dma = (vfu_dma){.iova = 0x100000 + round, .buf = buf, .len = sizeof(buf) - round, .to_client = round & 1};
        ck_assert_int_eq(vfu_dev_dma(R.dev, &dma), -EFAULT);
        ck_assert_uint_eq(dma.fault, 0x100000 + 5 * PAGE);
    }
    dma = (vfu_dma){.iova = 0x100000, .buf = buf, .len = 5 * PAGE};
    ck_assert_int_eq(vfu_dev_dma(R.dev, &dma), 0);
    dma = (vfu_dma){.iova = 0x100000 + 9 * PAGE + 77, .buf = buf, .len = 1};
    ck_assert_int_eq(vfu_dev_dma(R.dev, &dma), -EFAULT);
    ck_assert_uint_eq(dma.fault, 0x100000 + 9 * PAGE + 77);
    must(ftruncate(file, FILE_PAGES * PAGE)); /* and comes back */
    dma = (vfu_dma){.iova = 0x100000, .buf = buf, .len = sizeof(buf), .to_client = true};
    ck_assert_int_eq(vfu_dev_dma(R.dev, &dma), 0);
    check_healthy(&R);
    close(file);
    rig_destroy(&R);
}
END_TEST

static volatile sig_atomic_t handled;
static int gone_file = -1;

static void bring_back(int number)
{
    handled += number == SIGBUS && ftruncate(gone_file, PAGE) == 0;
}

static void bring_back_info(int number, siginfo_t *info, void *context)
{
    (void)context;
    handled += info->si_code == BUS_ADRERR;
    bring_back(number);
}

/* A SIGBUS that isn't the library's goes to the handler that the program had before. */
START_TEST(handler_of_the_program)
{
    struct sigaction action = {.sa_handler = bring_back};
    uint8_t byte = 1;
    int file = memfd("client's", PAGE, 0);
    if (_i) {
        action.sa_flags = SA_SIGINFO;
        action.sa_sigaction = bring_back_info;
    }
    gone_file = memfd("program's", 0, 0);
    must(sigaction(SIGBUS, &action, NULL));
    volatile uint8_t *own = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gone_file, 0);
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, file, 0), 0);
    must(ftruncate(file, 0));
    vfu_dma dma = {.buf = &byte, .len = 1};
    ck_assert_int_eq(vfu_dev_dma(R.dev, &dma), -EFAULT);
    ck_assert_int_eq(handled, 0);
    ck_assert_uint_eq(*own, 0);
    ck_assert_int_eq(handled, _i ? 2 : 1);
    must(ftruncate(gone_file, 0));
    ck_assert_uint_eq(*own, 0);
    ck_assert_int_eq(handled, _i ? 4 : 2);
    check_healthy(&R);
    munmap((void *)(uintptr_t)own, PAGE);
    close(file);
    close(gone_file);
    rig_destroy(&R);
}
END_TEST

/* A file that would take more than half of the address space isn't mapped: only messages reach that memory. */
START_TEST(half_the_address_space)
{
    enum { GIB = 1 << 30 };
    if (sizeof(off_t) < 8)
        return; /* such a program opens no larger file */
    int file = memfd("large", 0, 0);
    must(ftruncate(file, (off_t)(INT64_C(3) * GIB)));
    vfu_iommu_mapping mapping;
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, 0, UINT64_C(3) * GIB, RW, file, 0), 0);
    ck_assert(vfu_iommu_next(vfu_dev_iommu(R.dev), 0, &mapping));
    ck_assert_int_eq(mapping.host != NULL, SIZE_MAX > UINT32_MAX);
    check_healthy(&R);
    close(file);
    rig_destroy(&R);
}
END_TEST

/* ---- GET_REGION_INFO, GET_IRQ_INFO -------------------------------------------------------------------------------------------------------- */

START_TEST(region_info)
{
    enum { R_ = VFU_REGION_INFO_READ, W_ = VFU_REGION_INFO_WRITE, M_ = VFU_REGION_INFO_MMAP, C_ = VFU_REGION_INFO_CAPS };
    static const struct {
        uint32_t index, argsz;
        int err;
        uint32_t flags, reply_argsz;
        uint64_t size;
        bool fd;
    } cases[] = {
        {0, 0, -EINVAL, 0, 0, 0, false},
        {0, 31, -EINVAL, 0, 0, 0, false},
        {0, 32, 0, R_ | W_, 32, RIG_BAR0, false},
        {0, 33, 0, R_ | W_, 32, RIG_BAR0, false},
        {0, UINT32_MAX, 0, R_ | W_, 32, RIG_BAR0, false},
        {1, 32, 0, R_ | W_, 32, RIG_BAR1, false},
        {2, 31, -EINVAL, 0, 0, 0, false},
        {2, 32, 0, R_ | W_ | M_, 64, RIG_BAR2, false}, /* cut: no capabilities, no descriptor */
        {2, 63, 0, R_ | W_ | M_, 64, RIG_BAR2, false},
        {2, 64, 0, R_ | W_ | M_ | C_, 64, RIG_BAR2, true},
        {2, UINT32_MAX, 0, R_ | W_ | M_ | C_, 64, RIG_BAR2, true},
        {3, 32, 0, 0, 32, 0, false}, /* the upper half of BAR 2: no region */
        {4, 32, 0, R_ | W_, 32, RIG_BAR4, false},
        {5, 32, 0, R_ | W_ | M_, 32, RIG_BAR5, true},
        {5, 1000, 0, R_ | W_ | M_, 32, RIG_BAR5, true},
        {6, 32, 0, R_, 32, RIG_ROM, false},
        {7, 32, 0, R_ | W_, 32, 4096, false},
        {8, 32, 0, 0, 32, 0, false},
        {9, 32, -EINVAL, 0, 0, 0, false},
        {UINT32_MAX, 32, -EINVAL, 0, 0, 0, false},
    };
    rig_open(&R);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_msg m = command(VFU_CMD_DEVICE_GET_REGION_INFO);
        m.u.region_info.index = cases[i].index;
        m.u.region_info.argsz = cases[i].argsz;
        ck_assert_int_eq(ask(&R, &m), cases[i].err);
        if (cases[i].err)
            continue;
        ck_assert_uint_eq(R.reply.u.region_info.index, cases[i].index);
        ck_assert_uint_eq(R.reply.u.region_info.argsz, cases[i].reply_argsz);
        ck_assert_uint_eq(R.reply.u.region_info.flags, cases[i].flags);
        ck_assert_uint_eq(R.reply.u.region_info.size, cases[i].size);
        ck_assert_uint_eq(R.client.fd_count, cases[i].fd);
        ck_assert_uint_eq(R.client.have, 16 + (cases[i].flags & C_ ? 64 : 32));
        ck_assert_uint_eq(R.reply.u.region_info.cap_offset, cases[i].flags & C_ ? 32 : 0);
        if (cases[i].fd) {
            ck_assert_uint_eq(ino_of(R.client.fds[0]), ino_of(R.ram));
            ck_assert_uint_eq(R.reply.u.region_info.offset, cases[i].index == 5 ? RIG_BAR2 : 0);
        }
        if (cases[i].flags & C_) {
            vfu_region_cap cap = {0};
            vfu_wire_sparse_area area;
            uint32_t count;
            ck_assert(vfu_msg_next_cap(&R.reply, &cap));
            ck_assert_int_eq(vfu_region_cap_areas(&cap, &count), 0);
            ck_assert_uint_eq(count, 1);
            ck_assert_int_eq(vfu_region_cap_area(&cap, 0, &area), 0);
            ck_assert_uint_eq(area.offset, PAGE);
            ck_assert_uint_eq(area.size, RIG_BAR2 - PAGE);
            ck_assert(!vfu_msg_next_cap(&R.reply, &cap));
        }
    }
    rig_destroy(&R);
}
END_TEST

START_TEST(irq_info)
{
    static const struct {
        uint32_t index, argsz;
        int err;
        uint32_t flags, count;
    } cases[] = {
        {0, 16, 0, VFU_IRQ_INFO_EVENTFD | VFU_IRQ_INFO_MASKABLE | VFU_IRQ_INFO_AUTOMASKED, 1},
        {1, 16, 0, VFU_IRQ_INFO_EVENTFD, 0},
        {2, 16, 0, VFU_IRQ_INFO_EVENTFD, RIG_VECTORS},
        {3, 100, 0, VFU_IRQ_INFO_EVENTFD, 1},
        {4, 16, 0, VFU_IRQ_INFO_EVENTFD, 1},
        {5, 16, -EINVAL, 0, 0},
        {UINT32_MAX, 16, -EINVAL, 0, 0},
        {0, 15, -EINVAL, 0, 0},
        {0, 0, -EINVAL, 0, 0},
    };
    rig_open(&R);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_msg m = command(VFU_CMD_DEVICE_GET_IRQ_INFO);
        m.u.irq_info.index = cases[i].index;
        m.u.irq_info.argsz = cases[i].argsz;
        ck_assert_int_eq(ask(&R, &m), cases[i].err);
        if (cases[i].err)
            continue;
        ck_assert_uint_eq(R.client.have, 32);
        ck_assert_uint_eq(R.reply.u.irq_info.argsz, 16);
        ck_assert_uint_eq(R.reply.u.irq_info.flags, cases[i].flags);
        ck_assert_uint_eq(R.reply.u.irq_info.index, cases[i].index);
        ck_assert_uint_eq(R.reply.u.irq_info.count, cases[i].count);
    }
    rig_destroy(&R);
}
END_TEST

/* ---- SET_IRQS ------------------------------------------------------------------------------------------------------------------------------- */

enum { NONE = VFU_IRQ_SET_DATA_NONE, BOOL = VFU_IRQ_SET_DATA_BOOL, EVENTFD = VFU_IRQ_SET_DATA_EVENTFD };
enum { MASK = VFU_IRQ_SET_ACTION_MASK, UNMASK = VFU_IRQ_SET_ACTION_UNMASK, TRIGGER = VFU_IRQ_SET_ACTION_TRIGGER };

/* Which of the MSI-X vectors have an eventfd, as a bit mask: raises them all and sees who is signalled. */
static unsigned assigned(const int events[RIG_VECTORS])
{
    unsigned mask = 0;
    for (unsigned v = 0; v < RIG_VECTORS; v++) {
        int err = vfu_dev_raise(R.dev, VFU_PCI_IRQ_MSIX, v);
        uint64_t count = signals(events[v]);
        ck_assert_int_eq(err, count ? 0 : -ENOENT);
        ck_assert_uint_le(count, 1);
        mask |= (unsigned)count << v;
    }
    return mask;
}

START_TEST(set_irqs_table)
{
    static const struct {
        uint32_t flags, index, start, count;
        unsigned fds; /* of the eventfds of the vectors from start on */
        int err;
        unsigned after; /* vectors assigned */
    } cases[] = {
        {EVENTFD | TRIGGER, 2, 0, 4, 4, 0, 0xf},
        {EVENTFD | TRIGGER, 2, 1, 2, 0, 0, 0x9}, /* exactly [1, 3) */
        {EVENTFD | TRIGGER, 2, 1, 2, 0, 0, 0x9},
        {EVENTFD | TRIGGER, 2, 2, 1, 1, 0, 0xd},
        {EVENTFD | TRIGGER, 2, 0, 1, 0, 0, 0xc},
        {EVENTFD | TRIGGER, 2, 3, 1, 0, 0, 0x4},
        {EVENTFD | TRIGGER, 2, 0, 4, 0, 0, 0x0},
        {EVENTFD | TRIGGER, 2, 0, 3, 3, 0, 0x7},
        {EVENTFD | TRIGGER, 2, 0, 3, 3, 0, 0x7}, /* again, over what is there */
        {EVENTFD | TRIGGER, 2, 0, 2, 1, -EINVAL, 0x7},
        {EVENTFD | TRIGGER, 2, 0, 1, 2, -EINVAL, 0x7},
        {EVENTFD | TRIGGER, 2, 0, 4, 3, -EINVAL, 0x7},
        {EVENTFD | TRIGGER, 2, 4, 1, 0, -EINVAL, 0x7},
        {EVENTFD | TRIGGER, 2, 3, 2, 0, -EINVAL, 0x7},
        {EVENTFD | TRIGGER, 2, 0, 5, 0, -EINVAL, 0x7},
        {EVENTFD | TRIGGER, 2, 1, UINT32_MAX, 0, -EINVAL, 0x7},
        {EVENTFD | TRIGGER, 2, UINT32_MAX, 1, 0, -EINVAL, 0x7},
        {EVENTFD | TRIGGER, 2, 0, 0, 0, -EINVAL, 0x7},
        {EVENTFD | TRIGGER, 5, 0, 1, 0, -EINVAL, 0x7},
        {EVENTFD | TRIGGER, 1, 0, 1, 0, -EINVAL, 0x7}, /* there are no MSI */
        {EVENTFD | TRIGGER, UINT32_MAX, 0, 1, 0, -EINVAL, 0x7},
        {NONE | TRIGGER, 2, 1, 0, 0, -EINVAL, 0x7},
        {NONE | TRIGGER, 2, 0, 4, 1, -EINVAL, 0x7},
        {NONE | TRIGGER, 2, 0, 0, 1, -EINVAL, 0x7},
        {NONE | MASK, 2, 0, 1, 0, -ENOTTY, 0x7},
        {NONE | UNMASK, 2, 0, 4, 0, -ENOTTY, 0x7},
        {NONE | MASK, 2, 0, 0, 0, -EINVAL, 0x7},
        {EVENTFD | UNMASK, 2, 0, 1, 1, -ENOTTY, 0x7},
        {EVENTFD | MASK, 2, 0, 1, 1, -ENOTTY, 0x7},
        {NONE | TRIGGER, 1, 0, 0, 0, 0, 0x7}, /* switches off what isn't there */
        {NONE | TRIGGER, 3, 0, 0, 0, 0, 0x7},
        {NONE | TRIGGER, 2, 0, 0, 0, 0, 0x0}, /* switches off the index */
        {NONE | TRIGGER, 2, 0, 0, 0, 0, 0x0},
        {NONE | TRIGGER, 2, 0, 4, 0, 0, 0x0}, /* loopback of nothing */
    };
    int events[RIG_VECTORS + 1];
    rig_open(&R);
    unsigned open = fds_open();
    for (unsigned i = 0; i <= RIG_VECTORS; i++)
        events[i] = event();
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_wire_irq_set set = {.argsz = 20, .flags = cases[i].flags, .index = cases[i].index, .start = cases[i].start, .count = cases[i].count};
        ck_assert_int_eq(ask_raw_with(VFU_CMD_DEVICE_SET_IRQS, &set, sizeof(set), events + (cases[i].fds ? cases[i].start % RIG_VECTORS : 0),
                                      cases[i].fds),
                         cases[i].err);
        ck_assert(cases[i].err || R.client.have == 16);
        ck_assert_uint_eq(assigned(events), cases[i].after);
        ck_assert_uint_eq(fds_open(), open + COUNT(events) + (unsigned)__builtin_popcount(cases[i].after));
    }
    /* every combination of flags that isn't one DATA and one ACTION bit */
    for (uint32_t flags = 0; flags < 256; flags++) {
        uint32_t data = flags & 7, action = flags >> 3 & 7;
        vfu_wire_irq_set set = {.argsz = 20, .flags = flags, .index = 2, .count = 1};
        if (flags < 64 && data && action && !(data & (data - 1)) && !(action & (action - 1)))
            continue;
        ck_assert_int_eq(ask_raw(VFU_CMD_DEVICE_SET_IRQS, &set, sizeof(set)), -EINVAL);
    }
    ck_assert_uint_eq(assigned(events), 0);
    close_fds(events, COUNT(events));
    rig_destroy(&R);
}
END_TEST

/* Only eventfds are taken, all or none. */
START_TEST(irq_descriptors)
{
    int pair[2], pipes[2], events[RIG_VECTORS], bad[8];
    rig_open(&R);
    make_pair(pair);
    must(pipe2(pipes, O_CLOEXEC));
    for (unsigned i = 0; i < RIG_VECTORS; i++)
        events[i] = event();
    bad[0] = pair[0];
    bad[1] = pipes[1];
    bad[2] = pipes[0];
    bad[3] = null_fd();
    bad[4] = memfd("no-event", PAGE, 0);
    bad[5] = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bad[6] = open("/", O_PATH | O_CLOEXEC);
    bad[7] = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    for (unsigned i = 0; i < COUNT(bad); i++) {
        int fds[2] = {events[0], bad[i]};
        must(bad[i]);
        ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, 2, 0, 1, NULL, &bad[i], 1), -EINVAL);
        ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, 2, 0, 2, NULL, fds, 2), -EINVAL);
        ck_assert_int_eq(ask_irqs(&R, EVENTFD | UNMASK, 0, 0, 1, NULL, &bad[i], 1), -EINVAL);
        ck_assert_uint_eq(assigned(events), 0);
    }
    int full = event();
    ck_assert_int_eq(write(full, &(uint64_t){UINT64_MAX - 1}, 8), 8);
    ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, 2, 0, 1, NULL, &full, 1), 0);
    ck_assert_int_eq(vfu_dev_raise(R.dev, 2, 0), 0); /* is signalled already: nothing blocks */
    close(full);
    close_fds(pair, 2);
    close_fds(pipes, 1);
    close_fds(bad + 1, 1);
    close_fds(bad + 3, 5);
    close_fds(events, RIG_VECTORS);
    rig_destroy(&R);
}
END_TEST

/* A client can fill its eventfd, also one that blocks: the device never waits for it. */
START_TEST(full_eventfds)
{
    for (unsigned how = 0; how < 2; how++) {
        int fd = eventfd(0, EFD_CLOEXEC | (how ? EFD_NONBLOCK : 0));
        must(fd);
        rig_open(&R);
        ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, 2, 0, 1, NULL, &fd, 1), 0);
        ck_assert_int_eq(write(fd, &(uint64_t){UINT64_MAX - 1}, 8), 8);
        ck_assert_int_eq(vfu_dev_raise(R.dev, 2, 0), 0);
        ck_assert_int_eq(vfu_dev_raise(R.dev, 2, 0), 0);
        check_healthy(&R);
        rig_destroy(&R);
        close(fd);
    }
}
END_TEST

/* The client can trigger its own interrupts. */
START_TEST(irq_loopback)
{
    static const struct {
        uint32_t flags, start, count;
        uint8_t data[4];
        unsigned signalled;
    } cases[] = {
        {NONE | TRIGGER, 1, 2, {0}, 0x6},          {NONE | TRIGGER, 0, 4, {0}, 0xf},          {BOOL | TRIGGER, 0, 4, {1, 0, 1, 0}, 0x5},
        {BOOL | TRIGGER, 0, 4, {0, 0, 0, 0}, 0x0}, {BOOL | TRIGGER, 2, 2, {0xff, 1}, 0xc}, {NONE | TRIGGER, 3, 1, {0}, 0x8},
    };
    int events[RIG_VECTORS];
    rig_open(&R);
    for (unsigned i = 0; i < RIG_VECTORS; i++)
        events[i] = event();
    ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, 2, 0, 4, NULL, events, 4), 0);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        unsigned signalled = 0;
        ck_assert_int_eq(ask_irqs(&R, cases[i].flags, 2, cases[i].start, cases[i].count, cases[i].flags & BOOL ? cases[i].data : NULL, NULL, 0), 0);
        for (unsigned v = 0; v < RIG_VECTORS; v++)
            signalled |= (unsigned)signals(events[v]) << v;
        ck_assert_uint_eq(signalled, cases[i].signalled);
    }
    /* BOOL without its bytes */
    vfu_wire_irq_set set = {.argsz = 20, .flags = BOOL | TRIGGER, .index = 2, .count = 4};
    ck_assert_int_eq(ask_raw(VFU_CMD_DEVICE_SET_IRQS, &set, sizeof(set)), -EINVAL);
    close_fds(events, RIG_VECTORS);
    rig_destroy(&R);
}
END_TEST

/* ERR and REQ are interrupts like others; raise knows what there is. */
START_TEST(irq_raise)
{
    int fds[2] = {event(), event()};
    rig_open(&R);
    ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, VFU_PCI_IRQ_ERR, 0, 1, NULL, &fds[0], 1), 0);
    ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, VFU_PCI_IRQ_REQ, 0, 1, NULL, &fds[1], 1), 0);
    ck_assert_int_eq(vfu_dev_raise(R.dev, VFU_PCI_IRQ_ERR, 0), 0);
    ck_assert_uint_eq(signals(fds[0]), 1);
    ck_assert_uint_eq(signals(fds[1]), 0);
    ck_assert_int_eq(vfu_dev_raise(R.dev, VFU_PCI_IRQ_REQ, 0), 0);
    ck_assert_uint_eq(signals(fds[1]), 1);
    ck_assert_int_eq(vfu_dev_raise(R.dev, VFU_PCI_IRQ_ERR, 1), -EINVAL);
    ck_assert_int_eq(vfu_dev_raise(R.dev, VFU_PCI_IRQ_MSI, 0), -EINVAL);
    ck_assert_int_eq(vfu_dev_raise(R.dev, VFU_PCI_IRQ_MSIX, RIG_VECTORS), -EINVAL);
    ck_assert_int_eq(vfu_dev_raise(R.dev, VFU_PCI_IRQ_INTX, 0), -EINVAL);
    ck_assert_int_eq(vfu_dev_raise(R.dev, 5, 0), -EINVAL);
    rig_leave(&R);
    ck_assert_int_eq(vfu_dev_raise(R.dev, VFU_PCI_IRQ_ERR, 0), -ENOENT);
    close_fds(fds, 2);
    rig_destroy(&R);
}
END_TEST

static unsigned intx_status(void) { return read_config(&R, 6, 2) & VFU_PCI_STATUS_INTX; }

/* INTx: a level, signalled when it rises, held back until it is unmasked, and signalled again if it is still up. */
START_TEST(intx)
{
    int fd = event(), resample = event();
    uint64_t one = 1;
    rig_open(&R);
    vfu_dev_set_intx(R.dev, true); /* before anybody listens */
    ck_assert_uint_eq(intx_status(), VFU_PCI_STATUS_INTX);
    ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, 0, 0, 1, NULL, &fd, 1), 0);
    ck_assert_uint_eq(signals(fd), 1);
    vfu_dev_set_intx(R.dev, true);
    ck_assert_uint_eq(signals(fd), 0); /* masked by itself */
    ck_assert_int_eq(ask_irqs(&R, NONE | UNMASK, 0, 0, 1, NULL, NULL, 0), 0);
    ck_assert_uint_eq(signals(fd), 1); /* still up */
    vfu_dev_set_intx(R.dev, false);
    ck_assert_uint_eq(intx_status(), 0);
    ck_assert_int_eq(ask_irqs(&R, NONE | UNMASK, 0, 0, 1, NULL, NULL, 0), 0);
    ck_assert_uint_eq(signals(fd), 0);
    /* masked by the client */
    ck_assert_int_eq(ask_irqs(&R, NONE | MASK, 0, 0, 1, NULL, NULL, 0), 0);
    vfu_dev_set_intx(R.dev, true);
    ck_assert_uint_eq(signals(fd), 0);
    ck_assert_uint_eq(intx_status(), VFU_PCI_STATUS_INTX);
    ck_assert_int_eq(ask_irqs(&R, BOOL | UNMASK, 0, 0, 1, (const uint8_t[]){0}, NULL, 0), 0);
    ck_assert_uint_eq(signals(fd), 0);
    ck_assert_int_eq(ask_irqs(&R, BOOL | UNMASK, 0, 0, 1, (const uint8_t[]){1}, NULL, 0), 0);
    ck_assert_uint_eq(signals(fd), 1);
    vfu_dev_set_intx(R.dev, false);
    ck_assert_int_eq(ask_irqs(&R, NONE | UNMASK, 0, 0, 1, NULL, NULL, 0), 0);
    ck_assert_int_eq(ask_irqs(&R, BOOL | MASK, 0, 0, 1, (const uint8_t[]){0}, NULL, 0), 0);
    vfu_dev_set_intx(R.dev, true);
    ck_assert_uint_eq(signals(fd), 1);
    /* the end of the interrupt by eventfd */
    ck_assert_int_eq(ask_irqs(&R, EVENTFD | UNMASK, 0, 0, 1, NULL, &resample, 1), 0);
    ck_assert_int_eq(write(resample, &one, 8), 8);
    settle(R.dev);
    ck_assert_uint_eq(signals(fd), 1);
    ck_assert_uint_eq(signals(resample), 0);
    vfu_dev_set_intx(R.dev, false);
    ck_assert_int_eq(write(resample, &one, 8), 8);
    settle(R.dev);
    ck_assert_uint_eq(signals(fd), 0);
    vfu_dev_set_intx(R.dev, true);
    ck_assert_uint_eq(signals(fd), 1);
    ck_assert_int_eq(ask_irqs(&R, EVENTFD | UNMASK, 0, 0, 1, NULL, NULL, 0), 0); /* taken away again */
    ck_assert_int_eq(write(resample, &one, 8), 8);
    settle(R.dev);
    ck_assert_uint_eq(signals(fd), 0);
    vfu_dev_set_intx(R.dev, false);
    ck_assert_int_eq(ask_irqs(&R, NONE | UNMASK, 0, 0, 1, NULL, NULL, 0), 0);
    /* the disable bit of the command register */
    ck_assert_int_eq(write_config(&R, 4, VFU_PCI_COMMAND_INTX_DISABLE, 2), 0);
    vfu_dev_set_intx(R.dev, true);
    ck_assert_uint_eq(signals(fd), 0);
    ck_assert_uint_eq(intx_status(), VFU_PCI_STATUS_INTX);
    ck_assert_int_eq(write_config(&R, 4, 0, 2), 0);
    ck_assert_uint_eq(signals(fd), 1);
    /* masks without an eventfd mask, and index without interrupts */
    ck_assert_int_eq(ask_irqs(&R, EVENTFD | MASK, 0, 0, 1, NULL, &fd, 1), -ENOTTY);
    ck_assert_int_eq(ask_irqs(&R, NONE | MASK, 0, 0, 2, NULL, NULL, 0), -EINVAL);
    ck_assert_int_eq(ask_irqs(&R, NONE | MASK, 0, 1, 1, NULL, NULL, 0), -EINVAL);
    /* switched off */
    ck_assert_int_eq(ask_irqs(&R, NONE | TRIGGER, 0, 0, 0, NULL, NULL, 0), 0);
    vfu_dev_set_intx(R.dev, false);
    vfu_dev_set_intx(R.dev, true);
    ck_assert_uint_eq(signals(fd), 0);
    close(fd);
    close(resample);
    rig_destroy(&R);
}
END_TEST

/* ---- REGION_READ, REGION_WRITE, REGION_WRITE_MULTI, DEVICE_RESET -------------------------------------------------------------------------- */

/* Bounds, for reads and writes alike. The callback sees only what lies inside. */
START_TEST(region_bounds)
{
    static const struct {
        uint32_t region;
        uint64_t offset;
        uint32_t count;
        int read, write;
    } cases[] = {
        {0, 0, RIG_BAR0, 0, 0},
        {0, RIG_BAR0 - 1, 1, 0, 0},
        {0, RIG_BAR0, 0, 0, 0},
        {0, 17, 0, 0, 0},
        {0, RIG_BAR0 + 1, 0, -EINVAL, -EINVAL},
        {0, RIG_BAR0, 1, -EINVAL, -EINVAL},
        {0, RIG_BAR0 - 1, 2, -EINVAL, -EINVAL},
        {0, 0, RIG_BAR0 + 1, -EINVAL, -EINVAL},
        {0, UINT64_MAX, 1, -EINVAL, -EINVAL},
        {0, UINT64_MAX, 2, -EINVAL, -EINVAL},
        {0, UINT64_MAX - 3, 8, -EINVAL, -EINVAL},
        {0, UINT64_C(1) << 32, 4, -EINVAL, -EINVAL},
        {1, 60, 4, 0, 0},
        {1, 61, 4, -EINVAL, -EINVAL},
        {2, 0, RIG_BAR2, 0, 0},
        {2, RIG_BAR2 - 8, 8, 0, 0},
        {3, 0, 4, -EINVAL, -EINVAL},
        {3, 0, 0, -EINVAL, -EINVAL},
        {5, 8191, 1, 0, 0},
        {6, 0, RIG_ROM, 0, -EINVAL},
        {6, RIG_ROM - 4, 4, 0, -EINVAL},
        {6, RIG_ROM, 4, -EINVAL, -EINVAL},
        {8, 0, 1, -EINVAL, -EINVAL},
        {9, 0, 1, -EINVAL, -EINVAL},
        {UINT32_MAX, 0, 1, -EINVAL, -EINVAL},
    };
    static uint8_t data[RIG_BAR2], back[RIG_BAR2];
    rig_open(&R);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        unsigned reads = R.reads, writes = R.writes;
        bool called = cases[i].count > 0;
        for (uint32_t k = 0; k < cases[i].count && k < sizeof(data); k++)
            data[k] = (uint8_t)(k * 3 + i + 1);
        ck_assert_int_eq(ask_write(&R, cases[i].region, cases[i].offset, data, cases[i].count), cases[i].write);
        ck_assert_uint_eq(R.writes - writes, called && !cases[i].write);
        if (called && !cases[i].write) {
            ck_assert_uint_eq(R.last_region, cases[i].region);
            ck_assert_uint_eq(R.last_offset, cases[i].offset);
            ck_assert_uint_eq(R.last_len, cases[i].count);
        }
        ck_assert_int_eq(ask_read(&R, cases[i].region, cases[i].offset, back, cases[i].count), cases[i].read);
        ck_assert_uint_eq(R.reads - reads, called && !cases[i].read);
        if (called && !cases[i].write)
            ck_assert_mem_eq(back, data, cases[i].count);
    }
    /* the device refuses */
    R.refuse = -ENXIO;
    ck_assert_int_eq(ask_read(&R, 0, 0, back, 4), -ENXIO);
    ck_assert_int_eq(ask_write(&R, 0, 0, data, 4), -ENXIO);
    R.refuse = 0;
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* More than max_data_xfer_size is refused, also where the region has it; no allocation follows a client's number. */
START_TEST(region_access_limit)
{
    static uint8_t data[2 * PAGE];
    vfu_dev_desc desc = rig_desc(&R);
    desc.max_data_xfer_size = PAGE;
    rig_create(&R, &desc);
    rig_connect(&R);
    greet(&R);
    ck_assert_int_eq(ask_write(&R, 2, 0, data, PAGE), 0);
    ck_assert_int_eq(ask_read(&R, 2, 0, data, PAGE), 0);
    ck_assert_int_eq(ask_read(&R, 2, 0, data, PAGE + 1), -EINVAL);
    ck_assert_int_eq(ask_read(&R, 2, 0, data, UINT32_MAX), -EINVAL);
    ck_assert_int_eq(ask_write(&R, 2, 0, data, PAGE + 1), -EINVAL);
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* A device without callbacks reads as zeros. */
START_TEST(region_without_callbacks)
{
    uint8_t data[16], zeros[16] = {0};
    vfu_dev_desc desc = rig_desc(&R);
    memset(&desc.callbacks, 0, sizeof(desc.callbacks));
    rig_create(&R, &desc);
    rig_connect(&R);
    greet(&R);
    memset(data, 0xee, sizeof(data));
    ck_assert_int_eq(ask_write(&R, 0, 0, data, sizeof(data)), 0);
    ck_assert_int_eq(ask_read(&R, 0, 0, data, sizeof(data)), 0);
    ck_assert_mem_eq(data, zeros, sizeof(zeros));
    vfu_msg m = command(VFU_CMD_DEVICE_RESET);
    ck_assert_int_eq(ask(&R, &m), 0);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, -1, 0), 0);
    ck_assert_int_eq(write_config(&R, 4, 7, 2), 0);
    rig_leave(&R);
    rig_destroy(&R);
}
END_TEST

static int ask_multi(uint64_t count, const vfu_wire_write_one *ones, uint32_t len)
{
    static uint8_t payload[(1 << 20) + PAGE];
    memcpy(payload, &count, 8);
    if (len)
        memcpy(payload + 8, ones, len);
    int err = ask_raw(VFU_CMD_REGION_WRITE_MULTI, payload, 8 + len);
    if (!err)
        ck_assert_int_eq(vfu_msg_decode(R.client.bytes, R.client.have, &R.reply), 0);
    return err;
}

START_TEST(write_multi)
{
    static vfu_wire_write_one ones[40000];
    rig_open(&R);
    for (uint32_t i = 0; i < 100; i++)
        ones[i] = (vfu_wire_write_one){.offset = i * 8, .region = i % 2 ? 0 : 2, .count = i % 8 + 1, .data = {(uint8_t)i, 1, 2, 3, 4, 5, 6, 7}};
    ck_assert_int_eq(ask_multi(100, ones, 100 * 24), 0);
    ck_assert_uint_eq(R.client.have, 24);
    ck_assert_uint_eq(R.reply.u.write_multi.count, 100);
    ck_assert_uint_eq(R.writes, 100);
    for (uint32_t i = 0; i < 100; i++)
        ck_assert_mem_eq(&R.storage[ones[i].region][ones[i].offset], ones[i].data, ones[i].count);
    ck_assert_int_eq(ask_multi(0, NULL, 0), 0);
    ck_assert_uint_eq(R.reply.u.write_multi.count, 0);
    /* counts that don't fit what came */
    ck_assert_int_eq(ask_multi(2, ones, 24), -EINVAL);
    ck_assert_int_eq(ask_multi(1, ones, 48), -EINVAL);
    ck_assert_int_eq(ask_multi(UINT64_MAX, ones, 24), -EINVAL);
    ck_assert_int_eq(ask_multi(UINT64_MAX / 24 + 2, ones, 24), -EINVAL); /* wraps to one entry */
    ones[1].count = 9;
    ck_assert_int_eq(ask_multi(2, ones, 48), -EINVAL);
    /* the one that fails ends it; those before are done */
    ones[1] = (vfu_wire_write_one){.region = 0, .offset = RIG_BAR0, .count = 1};
    unsigned before = R.writes;
    ck_assert_int_eq(ask_multi(3, ones, 72), -EINVAL);
    ck_assert_uint_eq(R.writes, before + 1);
    /* as many as fit one message */
    for (uint32_t i = 0; i < COUNT(ones); i++)
        ones[i] = (vfu_wire_write_one){.offset = i % RIG_BAR0, .region = 0, .count = 1, .data = {(uint8_t)i}};
    before = R.writes;
    ck_assert_int_eq(ask_multi(COUNT(ones), ones, sizeof(ones)), 0);
    ck_assert_uint_eq(R.writes, before + COUNT(ones));
    /* to the configuration space */
    ones[0] = (vfu_wire_write_one){.offset = 4, .region = 7, .count = 2, .data = {6}};
    ck_assert_int_eq(ask_multi(1, ones, 24), 0);
    ck_assert_uint_eq(read_config(&R, 4, 2), 6);
    rig_destroy(&R);
}
END_TEST

/* The device's own memory and interrupts survive a reset, its configuration doesn't. */
START_TEST(device_reset)
{
    int fd = event();
    uint8_t entry[16], zeros[16] = {0};
    rig_open(&R);
    vfu_msg m = command(VFU_CMD_DEVICE_RESET);
    ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, 2, 1, 1, NULL, &fd, 1), 0);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, -1, 0), 0);
    ck_assert_int_eq(write_config(&R, 4, 0x407, 2), 0);
    ck_assert_int_eq(write_config(&R, 0x10, 0xfe000000, 4), 0);
    memset(entry, 0x5a, sizeof(entry));
    ck_assert_int_eq(ask_write(&R, 4, 16, entry, sizeof(entry)), 0);
    vfu_dev_set_intx(R.dev, true);
    ck_assert_int_eq(ask(&R, &m), 0);
    ck_assert_uint_eq(R.client.have, 16);
    ck_assert_uint_eq(R.resets, 1);
    ck_assert_uint_eq(R.last_reset, VFU_RESET_BY_CLIENT);
    ck_assert_uint_eq(read_config(&R, 4, 2), 0);
    ck_assert_uint_eq(read_config(&R, 0x10, 4), 0);
    ck_assert_uint_eq(intx_status(), 0);
    ck_assert_int_eq(ask_read(&R, 4, 16, entry, sizeof(entry)), 0);
    ck_assert_mem_eq(entry, zeros, sizeof(zeros));
    ck_assert_uint_eq(mappings(R.dev), 1);
    ck_assert_int_eq(vfu_dev_raise(R.dev, 2, 1), 0);
    ck_assert_uint_eq(signals(fd), 1);
    /* function-level reset, as Linux asks for it */
    uint32_t express = vfu_pci_capability(vfu_dev_pci(R.dev), 0x10);
    ck_assert_int_eq(write_config(&R, 4, 6, 2), 0);
    ck_assert_int_eq(write_config(&R, express + 8, 0x8000, 2), 0);
    ck_assert_uint_eq(R.resets, 2);
    ck_assert_uint_eq(R.last_reset, VFU_RESET_BY_FUNCTION);
    ck_assert_uint_eq(read_config(&R, 4, 2), 0);
    ck_assert_uint_eq(mappings(R.dev), 1);
    close(fd);
    rig_destroy(&R);
}
END_TEST

/* The MSI-X table is storage of the library's, the PBA reads as what is pending: nothing, without the policy. */
START_TEST(msix_table)
{
    static uint8_t all[RIG_BAR4], expected[RIG_VECTORS * 16], ones[64];
    rig_open(&R);
    for (uint32_t i = 0; i < sizeof(expected); i++) {
        expected[i] = (uint8_t)(i * 5 + 1);
        ck_assert_int_eq(ask_write(&R, 4, i, &expected[i], 1), 0);
    }
    ck_assert_uint_eq(R.writes, 0);
    for (uint32_t width = 1; width <= 16; width *= 2)
        for (uint32_t at = 0; at + width <= sizeof(expected); at += width) {
            ck_assert_int_eq(ask_read(&R, 4, at, all, width), 0);
            ck_assert_mem_eq(all, expected + at, width);
        }
    memset(ones, 0xff, sizeof(ones));
    ck_assert_int_eq(ask_write(&R, 4, RIG_PBA, ones, 8), 0);
    ck_assert_int_eq(ask_read(&R, 4, RIG_PBA, all, 8), 0);
    ck_assert_mem_eq(all, "\0\0\0\0\0\0\0\0", 8);
    ck_assert_uint_eq(R.reads + R.writes, 0);
    /* accesses that begin before or end behind one of them */
    ck_assert_int_eq(ask_write(&R, 4, sizeof(expected) - 4, ones, 8), 0);
    memset(expected + sizeof(expected) - 4, 0xff, 4);
    ck_assert_int_eq(ask_read(&R, 4, 0, all, sizeof(all)), 0);
    ck_assert_mem_eq(all, expected, sizeof(expected));
    ck_assert_int_eq(ask_write(&R, 4, RIG_PBA - 4, ones, 16), 0);
    ck_assert_int_eq(ask_read(&R, 4, RIG_PBA - 4, all, 16), 0);
    ck_assert_mem_eq(all + 4, "\0\0\0\0\0\0\0\0", 8);
    /* what is behind belongs to the device */
    ck_assert_int_eq(ask_write(&R, 4, RIG_PBA + 8, ones, 4), 0);
    ck_assert_int_eq(ask_write(&R, 4, sizeof(expected), ones, 4), 0);
    ck_assert_uint_eq(R.writes, 2);
    rig_destroy(&R);
}
END_TEST

/* The whole space in one read, as QEMU takes it, is what single accesses give; what a write changes is told. */
START_TEST(config_space)
{
    static uint8_t all[4096];
    static const struct {
        uint32_t offset, width, value;
        unsigned changed;
    } cases[] = {
        {4, 2, 6, VFU_PCI_CHANGED_COMMAND}, {4, 2, 6, 0},          {0x10, 4, 0xffffffff, VFU_PCI_CHANGED_BAR},
        {0x30, 4, 1, VFU_PCI_CHANGED_BAR},  {0x3c, 1, 11, 0},      {0, 4, 0xffffffff, 0},
        {0xff0, 4, 0xffffffff, 0},          {5, 1, 4, VFU_PCI_CHANGED_COMMAND},
    };
    rig_open(&R);
    ck_assert_int_eq(ask_read(&R, 7, 0, all, sizeof(all)), 0);
    for (uint32_t width = 1; width <= 4; width *= 2)
        for (uint32_t at = 0; at < 0x200; at += width) {
            uint32_t value = read_config(&R, at, width);
            for (uint32_t i = 0; i < width; i++)
                ck_assert_uint_eq(value >> 8 * i & 0xff, all[at + i]);
        }
    ck_assert_uint_eq(read_config(&R, 0, 4), 0xd3a11234);
    ck_assert_int_eq(ask_read(&R, 7, 0, all, 256), 0);
    ck_assert_int_eq(ask_read(&R, 7, 4093, all, 4), -EINVAL);
    ck_assert_int_eq(ask_read(&R, 7, 4095, all, 1), 0);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        unsigned before = R.configs;
        ck_assert_int_eq(write_config(&R, cases[i].offset, cases[i].value, cases[i].width), 0);
        ck_assert_uint_eq(R.configs - before, cases[i].changed != 0);
        if (cases[i].changed)
            ck_assert_uint_eq(R.last_changed, cases[i].changed);
    }
    ck_assert_uint_eq(read_config(&R, 0x10, 4), 0xfffff000);
    ck_assert_uint_eq(R.reads + R.writes, 0);
    uint32_t msix = vfu_pci_capability(vfu_dev_pci(R.dev), 0x11), pm = vfu_pci_capability(vfu_dev_pci(R.dev), 1);
    ck_assert_int_eq(write_config(&R, msix + 2, 0x8000, 2), 0);
    ck_assert_uint_eq(R.last_changed, VFU_PCI_CHANGED_MSIX);
    ck_assert_int_eq(write_config(&R, pm + 4, 3, 2), 0);
    ck_assert_uint_eq(R.last_changed, VFU_PCI_CHANGED_POWER);
    ck_assert_uint_eq(vfu_pci_power(vfu_dev_pci(R.dev)), 3);
    rig_destroy(&R);
}
END_TEST

/* ---- DMA by message ---------------------------------------------------------------------------------------------------------------------- */

/* Memory of the client that the device reaches by messages, and how the client answers them. */
typedef struct guest {
    uint64_t base;
    uint8_t *mem;
    size_t size;
    bool qemu10;  /* INTEROP.md: 32-bit count, data at byte 28, replies padded with zeros */
    unsigned ack; /* bytes of payload of a reply to a write: 0, 12 or 16 */
    unsigned messages, reads, writes;
    uint64_t largest, under_way, most_under_way; /* bytes in one message; asked for by reads and not answered */
} guest;

typedef struct transfer {
    vfu_dma dma;
    unsigned calls;
    int result;
} transfer;

static void note_done(vfu_dma *dma, int result)
{
    transfer *t = dma->user;
    t->calls++;
    t->result = result;
}

static void start_transfer(transfer *t, uint64_t iova, void *buf, size_t len, bool to_client)
{
    *t = (transfer){.dma = {.iova = iova, .buf = buf, .len = len, .to_client = to_client, .done = note_done, .user = t}};
}

/* The reply to a DMA message, as this client gives it, to out; returns its length. Carries the message out. */
static uint32_t guest_answer(guest *g, const uint8_t *in, uint32_t len, uint8_t *out)
{
    vfu_wire_header header = header_of(in);
    vfu_wire_dma_access access;
    uint32_t count32;
    ck_assert_uint_ge(len, 32);
    ck_assert_uint_eq(header.flags, VFU_HDR_COMMAND);
    ck_assert(header.cmd == VFU_CMD_DMA_READ || header.cmd == VFU_CMD_DMA_WRITE);
    memcpy(&access, in + 16, sizeof(access));
    memcpy(&count32, in + 24, 4);
    uint64_t count = g->qemu10 ? count32 : access.count;
    uint32_t data_at = g->qemu10 ? 28 : 32;
    ck_assert_uint_ge(access.address, g->base);
    ck_assert_uint_le(count, g->size);
    ck_assert_uint_le(access.address - g->base, g->size - count);
    uint8_t *mem = g->mem + (access.address - g->base);
    uint64_t needed = header.cmd == VFU_CMD_DMA_WRITE ? data_at + count : 0;
    ck_assert_uint_ge(len, needed);
    /* In the other layout a big-endian client finds a count of 0. */
    ck_assert_uint_le(len, needed + 4 > 32 ? needed + 4 : count ? 32 : (uint32_t)access.count + 32);
    g->messages++;
    g->largest = count > g->largest ? count : g->largest;
    header.flags = VFU_HDR_REPLY;
    if (header.cmd == VFU_CMD_DMA_WRITE) {
        g->writes++;
        memcpy(mem, in + data_at, count);
        header.size = 16 + g->ack;
        memcpy(out + 16, in + 16, 16);
        if (g->ack == 12) { /* with a count of 32 bits */
            count32 = (uint32_t)count;
            memcpy(out + 24, &count32, 4);
        }
    } else {
        g->reads++;
        header.size = 32 + (uint32_t)count;
        memcpy(out + 16, in + 16, 16);
        if (g->qemu10)
            memset(out + 28 + count, 0, 4);
        memcpy(out + data_at, mem, count);
    }
    memcpy(out, &header, 16);
    return header.size;
}

static uint8_t guest_reply[(1 << 20) + PAGE];

/* Answers messages until the device sends no more. */
static void guest_serve(guest *g)
{
    for (;;) {
        settle(R.dev);
        if (peer_receive(&R.client) != 1) {
            size_t have = R.client.have;
            settle(R.dev);
            int got = peer_receive(&R.client);
            if (got != 1 && R.client.have == have)
                return;
            if (got != 1)
                continue;
        }
        rig_send(&R, guest_reply, guest_answer(g, R.client.bytes, (uint32_t)R.client.have, guest_reply), NULL, 0);
    }
}

/* Does a transfer with the guest and returns its result. */
static int guest_dma(guest *g, uint64_t iova, void *buf, size_t len, bool to_client)
{
    transfer t;
    start_transfer(&t, iova, buf, len, to_client);
    int result = vfu_dev_dma(R.dev, &t.dma);
    if (result != 1)
        return result;
    guest_serve(g);
    ck_assert_uint_eq(t.calls, 1);
    return t.result;
}

enum { GUEST_BASE = 0x100000, GUEST_SIZE = 1 << 20, CHUNK = 128 << 10 };
static uint8_t guest_memory[GUEST_SIZE], device_buffer[GUEST_SIZE], guest_expected[GUEST_SIZE];

static void check_same(const uint8_t *a, const uint8_t *b, size_t len)
{
    size_t i = 0;
    while (i < len && a[i] == b[i])
        i++;
    ck_assert_msg(i == len, "byte %zu is 0x%02x, not 0x%02x", i, i < len ? a[i] : 0, i < len ? b[i] : 0);
}

static guest new_guest(bool qemu10, unsigned ack)
{
    return (guest){.base = GUEST_BASE, .mem = guest_memory, .size = GUEST_SIZE, .qemu10 = qemu10, .ack = ack};
}

/* Opens the device with a client that has GUEST_SIZE bytes of message memory. */
static void guest_open(const char *json)
{
    vfu_dev_desc desc = rig_desc(&R);
    rig_create(&R, &desc);
    rig_connect(&R);
    ck_assert_int_eq(ask_version(&R, json), 0);
    ck_assert_int_eq(ask_map(&R, GUEST_BASE, GUEST_SIZE, RW, -1, 0), 0);
}

static const size_t dma_lengths[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 100, 4096, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 8, 3 * CHUNK + 5};

/* Contents that tell the layouts apart with more or less ease. */
static void fill_pattern(uint8_t *out, size_t len, unsigned pattern)
{
    memset(out, 0, len);
    for (size_t i = 0; i < len; i++)
        switch (pattern) {
        case 0: break;                                               /* nothing but zeros */
        case 1: out[i] = (uint8_t)(i % 251 + 1); break;              /* no zero at all */
        case 2: out[i] = i < 4 ? 0 : (uint8_t)(i % 251 + 1); break;  /* first word zero */
        case 3: out[i] = i + 4 < len ? (uint8_t)(i % 251 + 1) : 0; break; /* last word zero */
        case 4: out[i] = i == len - 1; break;
        case 5: out[i] = i == 0; break;
        case 6: out[i] = i < 4 || i + 4 >= len ? 0 : (uint8_t)(i % 251 + 1); break; /* both zero */
        default: out[i] = 0xff; break;
        }
}
enum { PATTERNS = 8 };

/* Whatever layout the client has and whatever the data is: the first transfer of a connection moves the right bytes, and only those. */
START_TEST(dma_layouts)
{
    bool qemu10 = _i & 1, to_client = _i & 2, then_back = _i & 4;
    if (qemu10 && !is_little_endian())
        return; /* a device has to be told of such clients there */
    static const unsigned acks[] = {0, 12, 16};
    vfu_dev_desc desc = rig_desc(&R);
    serve_at_address(&desc);
    for (unsigned l = 0; l < COUNT(dma_lengths); l++) {
        for (unsigned pattern = 0; pattern < PATTERNS; pattern++) {
            size_t len = dma_lengths[l];
            uint64_t at = 64 + pattern;
            guest g = new_guest(qemu10, qemu10 ? 0 : acks[(l + pattern) % 3]);
            come_in();
            greet(&R);
            ck_assert_int_eq(ask_map(&R, GUEST_BASE, GUEST_SIZE, RW, -1, 0), 0);
            size_t shown = len + 256;
            memset(guest_memory, 0x77, shown);
            memset(guest_expected, 0x77, shown);
            fill_pattern(guest_expected + at, len, pattern);
            if (to_client)
                memcpy(device_buffer, guest_expected + at, len);
            else
                memcpy(guest_memory, guest_expected, shown);
            ck_assert_int_eq(guest_dma(&g, GUEST_BASE + at, device_buffer, len, to_client), 0);
            check_same(guest_memory, guest_expected, shown);
            ck_assert_mem_eq(device_buffer, guest_expected + at, len);
            ck_assert_uint_le(g.largest, CHUNK);
            if (then_back) { /* the other way, with other data */
                for (size_t i = 0; i < len; i++)
                    device_buffer[i] = guest_expected[at + i] = (uint8_t)(i ^ pattern);
                if (to_client)
                    memcpy(guest_memory, guest_expected, shown);
                memset(device_buffer, to_client ? 0 : 1, to_client ? len : 0);
                ck_assert_int_eq(guest_dma(&g, GUEST_BASE + at, device_buffer, len, !to_client), 0);
                check_same(guest_memory, guest_expected, shown);
                ck_assert_mem_eq(device_buffer, guest_expected + at, len);
            }
            rig_leave(&R);
        }
    }
    rig_destroy(&R);
}
END_TEST

/* A client of QEMU's layout that takes all the messages before it answers the first: what was written in the wrong layout is written
 * again, however much that is. */
START_TEST(dma_layout_late)
{
    static uint8_t received[40][CHUNK + 64];
    bool qemu10 = _i;
    guest g = new_guest(qemu10, 0);
    transfer t;
    unsigned count = 0;
    if (qemu10 && !is_little_endian())
        return;
    guest_open(NULL);
    fill_pattern(device_buffer, GUEST_SIZE, 1);
    transfer more[3];
    start_transfer(&t, GUEST_BASE, device_buffer, GUEST_SIZE, true);
    ck_assert_int_eq(vfu_dev_dma(R.dev, &t.dma), 1);
    for (unsigned i = 0; i < 3; i++) { /* 4 MiB in all */
        start_transfer(&more[i], GUEST_BASE, device_buffer, GUEST_SIZE, true);
        ck_assert_int_eq(vfu_dev_dma(R.dev, &more[i].dma), 1);
    }
    for (unsigned quiet = 0; quiet < 3;) {
        settle(R.dev);
        size_t have = R.client.have;
        if (peer_receive(&R.client) == 1) {
            ck_assert_uint_lt(count, COUNT(received));
            ck_assert_uint_le(R.client.have, sizeof(received[0]));
            memcpy(received[count++], R.client.bytes, R.client.have);
            quiet = 0;
        } else {
            quiet += R.client.have == have;
        }
    }
    ck_assert_uint_gt(count, 16);
    for (unsigned i = 0; i < count; i++)
        rig_send(&R, guest_reply, guest_answer(&g, received[i], header_of(received[i]).size, guest_reply), NULL, 0);
    guest_serve(&g);
    ck_assert_uint_eq(t.calls, 1);
    ck_assert_int_eq(t.result, 0);
    for (unsigned i = 0; i < 3; i++) {
        ck_assert_uint_eq(more[i].calls, 1);
        ck_assert_int_eq(more[i].result, 0);
    }
    ck_assert_mem_eq(guest_memory, device_buffer, GUEST_SIZE);
    rig_destroy(&R);
}
END_TEST

/* Messages are cut to what both ends take: the client's limit, the device's, and 128 KiB. */
START_TEST(dma_chunks)
{
    static const struct {
        uint32_t device;
        const char *json;
        uint32_t largest;
    } cases[] = {
        {0, NULL, CHUNK},
        {16 << 20, "{\"capabilities\":{\"max_data_xfer_size\":16777216}}", CHUNK},
        {0, "{\"capabilities\":{\"max_data_xfer_size\":1024}}", 1024},
        {0, "{\"capabilities\":{\"max_data_xfer_size\":1000}}", 1000},
        {4096, NULL, 4096},
        {65536, "{\"capabilities\":{\"max_data_xfer_size\":8192}}", 8192},
        {8192, "{\"capabilities\":{\"max_data_xfer_size\":65536}}", 8192},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_dev_desc desc = rig_desc(&R);
        guest g = new_guest(false, 12);
        desc.max_data_xfer_size = cases[i].device;
        rig_create(&R, &desc);
        rig_connect(&R);
        ck_assert_int_eq(ask_version(&R, cases[i].json), 0);
        ck_assert_int_eq(ask_map(&R, GUEST_BASE, GUEST_SIZE, RW, -1, 0), 0);
        fill_pattern(guest_memory, GUEST_SIZE, 1);
        memset(device_buffer, 0, GUEST_SIZE);
        ck_assert_int_eq(guest_dma(&g, GUEST_BASE + 3, device_buffer, GUEST_SIZE - 7, false), 0);
        ck_assert_mem_eq(device_buffer, guest_memory + 3, GUEST_SIZE - 7);
        memset(guest_memory, 0, GUEST_SIZE);
        ck_assert_int_eq(guest_dma(&g, GUEST_BASE + 5, device_buffer, GUEST_SIZE - 7, true), 0);
        ck_assert_mem_eq(device_buffer, guest_memory + 5, GUEST_SIZE - 7);
        ck_assert_uint_eq(g.largest, cases[i].largest);
        check_healthy(&R);
        rig_destroy(&R);
    }
    /* one byte at a time, if the client wants that */
    guest g = new_guest(false, 16);
    guest_open("{\"capabilities\":{\"max_data_xfer_size\":1}}");
    fill_pattern(guest_memory, 300, 1);
    ck_assert_int_eq(guest_dma(&g, GUEST_BASE, device_buffer, 300, false), 0);
    ck_assert_mem_eq(device_buffer, guest_memory, 300);
    ck_assert_uint_eq(g.largest, 1);
    rig_destroy(&R);
}
END_TEST

/* A transfer over memory of both kinds. */
START_TEST(dma_mixed_memory)
{
    enum { AT = 0x10000, LEN = 4 * PAGE };
    int file = memfd("mixed", 2 * PAGE, F_SEAL_SHRINK);
    uint8_t *mapped = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    guest g = {.base = AT + PAGE, .mem = guest_memory, .size = PAGE, .ack = 12};
    rig_open(&R);
    ck_assert_int_eq(ask_map(&R, AT, PAGE, RW, file, 0), 0);
    ck_assert_int_eq(ask_map(&R, AT + PAGE, PAGE, RW, -1, 0), 0);
    ck_assert_int_eq(ask_map(&R, AT + 2 * PAGE, PAGE, RW, file, PAGE), 0);
    ck_assert_int_eq(ask_map(&R, AT + 3 * PAGE, PAGE, VFU_DMA_READABLE, -1, 0), 0);
    fill_pattern(device_buffer, LEN, 1);
    ck_assert_int_eq(guest_dma(&g, AT + 10, device_buffer, 3 * PAGE - 20, true), 0);
    ck_assert_mem_eq(mapped + 10, device_buffer, PAGE - 10);
    ck_assert_mem_eq(guest_memory, device_buffer + PAGE - 10, PAGE);
    ck_assert_mem_eq(mapped + PAGE, device_buffer + 2 * PAGE - 10, PAGE - 10);
    memset(guest_expected, 0, LEN);
    ck_assert_int_eq(guest_dma(&g, AT + 10, guest_expected, 3 * PAGE - 20, false), 0);
    ck_assert_mem_eq(guest_expected, device_buffer, 3 * PAGE - 20);
    /* refused as a whole: nothing is sent, nothing is written */
    unsigned messages = g.messages;
    memset(mapped, 0, 2 * PAGE);
    static const struct {
        uint64_t iova, len;
        bool to_client;
        int err;
        uint64_t fault;
    } cases[] = {
        {AT, LEN, true, -EACCES, AT + 3 * PAGE},
        {AT, LEN + 1, false, -ENOENT, AT + LEN},
        {AT - 1, 2, true, -ENOENT, AT - 1},
        {0, 1, false, -ENOENT, 0},
        {UINT64_MAX, 2, false, -EINVAL, UINT64_MAX},
#if SIZE_MAX > UINT32_MAX
        {AT, SIZE_MAX, false, -EINVAL, AT},
#endif
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_dma dma = {.iova = cases[i].iova, .buf = device_buffer, .len = cases[i].len, .to_client = cases[i].to_client, .done = note_done};
        ck_assert_int_eq(vfu_dev_dma(R.dev, &dma), cases[i].err);
        ck_assert_uint_eq(dma.fault, cases[i].fault);
    }
    guest_serve(&g);
    ck_assert_uint_eq(g.messages, messages);
    ck_assert_uint_eq(mapped[0], 0);
    vfu_dma nothing = {.iova = AT, .buf = device_buffer, .len = 0, .done = note_done};
    ck_assert_int_eq(vfu_dev_dma(R.dev, &nothing), 0);
    munmap(mapped, 2 * PAGE);
    close(file);
    rig_destroy(&R);
}
END_TEST

/* The next message of the device, to r->client.bytes; its header is checked. */
static vfu_wire_dma_access next_dma(uint16_t cmd)
{
    vfu_wire_dma_access access;
    ck_assert_int_eq(rig_receive(&R), 1);
    ck_assert_uint_eq(R.reply.cmd, cmd);
    ck_assert_uint_eq(R.reply.flags, VFU_HDR_COMMAND);
    memcpy(&access, R.client.bytes + 16, sizeof(access));
    return access;
}

static void answer_dma(uint16_t id, uint16_t cmd, uint32_t flags, uint32_t error, const void *payload, uint32_t len)
{
    static uint8_t bytes[4096];
    put(bytes, id, cmd, flags, payload, len);
    memcpy(bytes + 12, &error, 4);
    rig_send(&R, bytes, 16 + len, NULL, 0);
}

/* What fails after messages of the same transfer have been answered ends it, once, with the place. */
START_TEST(dma_fails_at_last)
{
    int file = memfd("gone", PAGE, 0);
    guest g = new_guest(false, 16);
    transfer t;
    for (unsigned to_client = 0; to_client < 2; to_client++) {
        guest_open(NULL);
        ck_assert_int_eq(ask_map(&R, GUEST_BASE + GUEST_SIZE, PAGE, RW, file, 0), 0);
        ck_assert_int_eq(guest_dma(&g, GUEST_BASE, device_buffer, 8, false), 0); /* the layout is known */
        must(ftruncate(file, 0));
        start_transfer(&t, GUEST_BASE + PAGE, device_buffer, GUEST_SIZE, to_client);
        ck_assert_int_eq(vfu_dev_dma(R.dev, &t.dma), 1);
        guest_serve(&g);
        ck_assert_uint_eq(t.calls, 1);
        ck_assert_int_eq(t.result, -EFAULT);
        ck_assert_uint_eq(t.dma.fault, GUEST_BASE + GUEST_SIZE);
        must(ftruncate(file, PAGE));
        check_healthy(&R);
        rig_destroy(&R);
    }
    close(file);
}
END_TEST

/* A client that leaves in the midst of finding out which layout it has: nothing stays under way. */
START_TEST(dma_layout_and_gone)
{
    /* Messages that it answers before it closes. The fourth shows the layout, which other machines see in the first. */
    const unsigned most = is_little_endian() ? 4 : 3;
    uint8_t data[64];
    fill_pattern(data, sizeof(data), 3);
    for (unsigned answers = 0; answers <= most; answers++) {
        transfer t[3];
        guest_open(NULL);
        for (unsigned i = 0; i < COUNT(t); i++) { /* each reply fits both layouts */
            start_transfer(&t[i], GUEST_BASE + i * PAGE, device_buffer + i * PAGE, sizeof(data), false);
            ck_assert_int_eq(vfu_dev_dma(R.dev, &t[i].dma), 1);
        }
        settle(R.dev);
        for (unsigned i = 0; i < answers; i++) {
            vfu_wire_dma_access access = next_dma(VFU_CMD_DMA_READ);
            uint8_t payload[sizeof(access) + sizeof(data)], bytes[sizeof(vfu_wire_header) + sizeof(payload)];
            ck_assert_uint_le(access.address % PAGE + access.count, sizeof(data));
            memcpy(payload, &access, sizeof(access));
            memcpy(payload + sizeof(access), data + access.address % PAGE, (size_t)access.count);
            uint32_t len = put(bytes, header_of(R.client.bytes).id, VFU_CMD_DMA_READ, VFU_HDR_REPLY, payload,
                               (uint32_t)(sizeof(access) + access.count));
            for (unsigned copies = i ? 1 : 2; copies; copies--) /* a second one is none */
                must(send(R.client.sock, bytes, len, 0));
            if (i + 1 == answers)
                must(shutdown(R.client.sock, SHUT_RD)); /* it speaks, and doesn't listen any more */
            settle(R.dev);
        }
        peer_close(&R.client);
        settle(R.dev);
        for (unsigned i = 0; i < COUNT(t); i++) {
            ck_assert_uint_le(t[i].calls, 1); /* it failed, or was forgotten */
            ck_assert(t[i].result == 0 || t[i].result == -EIO);
            ck_assert(!t[i].dma.active);
        }
        rig_destroy(&R);
    }
}
END_TEST

/* Wrong answers: -EIO, or it is no answer at all and the right one is still awaited. */
START_TEST(dma_wrong_answers)
{
    static const struct {
        bool to_client;
        int id, cmd;            /* added to the right ones */
        uint32_t flags, error;
        int64_t address, count; /* added to the right ones */
        uint32_t len;           /* of the payload */
        int result;             /* 1: not an answer */
        bool closed;
    } cases[] = {
        {false, 0, 0, 1, 0, 0, 0, 24, 0, false},
        {false, 1, 0, 1, 0, 0, 0, 24, 1, false},
        {false, 32, 0, 1, 0, 0, 0, 24, 1, false},
        {false, -32, 0, 1, 0, 0, 0, 24, 1, false},
        {false, 0, 0, 1, 0, 1, 0, 24, -EIO, false},
        {false, 0, 0, 1, 0, -4096, 0, 24, -EIO, false},
        {false, 0, 0, 1, 0, 0, 1, 25, -EIO, false},
        {false, 0, 0, 1, 0, 0, -1, 23, -EIO, false},
        {false, 0, 0, 1, 0, 0, -8, 16, -EIO, false},
        {false, 0, 0, 1, 0, 0, 0, 23, -EIO, false},
        {false, 0, 0, 1, 0, 0, 0, 25, -EIO, false},
        {false, 0, 0, 1, 0, 0, 0, 16, -EIO, false},
        {false, 0, 0, 1, 0, 0, 0, 15, -EIO, false},
        {false, 0, 0, 1, 0, 0, 0, 0, -EIO, false},
        {false, 0, 0, 1, 0, 0, INT64_MAX, 24, -EIO, false},
        {false, 0, 0, 0x21, EFAULT, 0, 0, 0, -EIO, false},
        {false, 0, 0, 0x21, 0, 0, 0, 0, -EIO, false},
        {false, 0, 0, 0x21, UINT32_MAX, 0, 0, 24, -EIO, false},
        {false, 0, 1, 1, 0, 0, 0, 16, -EIO, false}, /* to DMA_WRITE, which was not asked */
        {false, 0, 30, 1, 0, 0, 0, 24, -EIO, false}, /* to an unknown command */
        {false, 0, 0, 2, 0, 0, 0, 24, 0, true},
        {true, 0, 0, 1, 0, 0, 0, 0, 0, false},
        {true, 0, 0, 1, 0, 0, 0, 12, 0, false},
        {true, 0, 0, 1, 0, 0, 0, 16, 0, false},
        {true, 0, 0, 1, 0, 0, 0, 8, -EIO, false},
        {true, 0, 0, 1, 0, 0, 0, 13, -EIO, false},
        {true, 0, 0, 1, 0, 0, 0, 24, -EIO, false},
        {true, 0, 0, 1, 0, 0, 1, 12, -EIO, false},
        {true, 0, 0, 1, 0, 0, -8, 16, -EIO, false},
        {true, 0, 0, 1, 0, 8, 0, 16, -EIO, false},
        {true, 33, 0, 1, 0, 0, 0, 16, 1, false},
        {true, 0, 0, 0x21, ENODEV, 0, 0, 0, -EIO, false},
        {true, 0, -1, 1, 0, 0, 0, 24, -EIO, false},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint8_t payload[64];
        transfer t;
        uint16_t cmd = cases[i].to_client ? VFU_CMD_DMA_WRITE : VFU_CMD_DMA_READ;
        guest_open(NULL);
        memset(device_buffer, 0, 16); /* zeros written need no second look at the layout */
        memset(payload, 0xab, sizeof(payload));
        start_transfer(&t, GUEST_BASE + 8, device_buffer, 8, cases[i].to_client);
        ck_assert_int_eq(vfu_dev_dma(R.dev, &t.dma), 1);
        vfu_wire_dma_access access = next_dma(cmd), wrong = access;
        uint16_t id = header_of(R.client.bytes).id;
        wrong.address += (uint64_t)cases[i].address;
        wrong.count += (uint64_t)cases[i].count;
        memcpy(payload, &wrong, sizeof(wrong));
        if (cases[i].len == 12) { /* the count has 32 bits there */
            uint32_t count32 = (uint32_t)wrong.count;
            memcpy(payload + 8, &count32, sizeof(count32));
        }
        answer_dma((uint16_t)(id + cases[i].id), (uint16_t)(cmd + cases[i].cmd), cases[i].flags, cases[i].error, payload, cases[i].len);
        if (cases[i].closed) {
            check_closed(&R);
            ck_assert_uint_eq(t.calls, 0);
            rig_destroy(&R);
            continue;
        }
        if (cases[i].result == 1) {
            ck_assert_uint_eq(t.calls, 0);
            memcpy(payload, &access, sizeof(access));
            answer_dma(id, cmd, VFU_HDR_REPLY, 0, payload, cases[i].to_client ? 16 : 24);
        }
        ck_assert_msg(t.calls == 1, "case %u", i);
        ck_assert_msg(t.result == (cases[i].result == 1 ? 0 : cases[i].result), "case %u: %d", i, t.result);
        if (t.result)
            ck_assert_uint_eq(t.dma.fault, GUEST_BASE + 8);
        else if (!cases[i].to_client)
            ck_assert_mem_eq(device_buffer, payload + 16, 8);
        answer_dma(id, cmd, VFU_HDR_REPLY, 0, payload, cases[i].to_client ? 16 : 24); /* once more: nobody waits for it */
        ck_assert_uint_eq(t.calls, 1);
        check_healthy(&R);
        rig_destroy(&R);
    }
}
END_TEST

/* Starts a read of two chunks and gives the id of its first message. */
static uint16_t start_two_chunks(transfer *t)
{
    guest_open(NULL);
    start_transfer(t, GUEST_BASE, device_buffer, 2 * CHUNK, false);
    ck_assert_int_eq(vfu_dev_dma(R.dev, &t->dma), 1);
    vfu_wire_dma_access access = next_dma(VFU_CMD_DMA_READ);
    ck_assert_uint_eq(access.count, CHUNK);
    return header_of(R.client.bytes).id;
}

/* Sends the good reply to the first of two chunks. */
static void answer_chunk(uint16_t id)
{
    vfu_wire_dma_access access = {.address = GUEST_BASE, .count = CHUNK};
    vfu_wire_header header = {.id = id, .cmd = VFU_CMD_DMA_READ, .flags = VFU_HDR_REPLY, .size = 32 + CHUNK};
    memset(guest_reply, 0xcd, 32 + CHUNK);
    memcpy(guest_reply, &header, 16);
    memcpy(guest_reply + 16, &access, 16);
    rig_send(&R, guest_reply, header.size, NULL, 0);
}

START_TEST(dma_unmap_meanwhile)
{
    transfer t;
    uint16_t id = start_two_chunks(&t);
    ck_assert_int_eq(ask_unmap(&R, GUEST_BASE, GUEST_SIZE, 0), 0);
    ck_assert_uint_eq(t.calls, 1);
    ck_assert_int_eq(t.result, -ENOENT);
    ck_assert_uint_eq(t.dma.fault, GUEST_BASE);
    memset(device_buffer, 0, CHUNK);
    answer_chunk(id); /* late */
    ck_assert_uint_eq(t.calls, 1);
    ck_assert_uint_eq(device_buffer[0], 0);
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* A mapping beside the transfer's can go. */
START_TEST(dma_unmap_beside)
{
    transfer t;
    guest g = new_guest(false, 0);
    uint16_t id = start_two_chunks(&t);
    ck_assert_int_eq(ask_map(&R, GUEST_BASE + GUEST_SIZE, PAGE, RW, -1, 0), 0);
    ck_assert_int_eq(ask_unmap(&R, GUEST_BASE + GUEST_SIZE, PAGE, 0), 0);
    ck_assert_int_eq(ask_unmap(&R, GUEST_BASE, PAGE, 0), -EINVAL);
    ck_assert_uint_eq(t.calls, 0);
    answer_chunk(id);
    guest_serve(&g);
    ck_assert_uint_eq(t.calls, 1);
    ck_assert_int_eq(t.result, 0);
    rig_destroy(&R);
}
END_TEST

/* A reset, a disconnection and a cancellation forget the transfer without a word; a late reply finds nobody. */
START_TEST(dma_forgotten)
{
    transfer t;
    uint16_t id = start_two_chunks(&t);
    vfu_msg reset = command(VFU_CMD_DEVICE_RESET);
    memset(device_buffer, 0, CHUNK);
    if (_i == 0)
        ck_assert_int_eq(ask(&R, &reset), 0);
    else if (_i == 1)
        vfu_dev_dma_cancel(R.dev, &t.dma);
    else
        rig_leave(&R);
    if (_i < 2) {
        answer_chunk(id);
        check_healthy(&R);
        ck_assert_int_eq(ask_unmap(&R, GUEST_BASE, GUEST_SIZE, 0), 0);
    } else {
        ck_assert_int_eq(vfu_dev_dma(R.dev, &t.dma), -ENOTCONN);
    }
    ck_assert_uint_eq(t.calls, 0);
    ck_assert_uint_eq(device_buffer[0], 0);
    vfu_dev_dma_cancel(R.dev, &t.dma); /* of one that isn't under way: nothing */
    rig_destroy(&R);
    ck_assert_uint_eq(t.calls, 0);
}
END_TEST

/* Commands of the client are served while a DMA message waits for its answer, and many transfers are under way at once. */
START_TEST(dma_and_commands)
{
    enum { TRANSFERS = 100 };
    static transfer t[TRANSFERS];
    guest g = new_guest(false, 12);
    uint8_t data[8] = {1, 2, 3};
    guest_open(NULL);
    fill_pattern(guest_memory, GUEST_SIZE, 1);
    start_transfer(&t[0], GUEST_BASE, device_buffer, 64, false);
    ck_assert_int_eq(vfu_dev_dma(R.dev, &t[0].dma), 1);
    next_dma(VFU_CMD_DMA_READ);
    static uint8_t first[64];
    uint32_t first_len = (uint32_t)R.client.have;
    memcpy(first, R.client.bytes, first_len);
    check_healthy(&R);
    ck_assert_int_eq(ask_write(&R, 0, 0, data, 8), 0);
    ck_assert_int_eq(ask_read(&R, 0, 0, data, 8), 0);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, -1, 0), 0);
    ck_assert_uint_eq(t[0].calls, 0);
    rig_send(&R, guest_reply, guest_answer(&g, first, first_len, guest_reply), NULL, 0);
    ck_assert_uint_eq(t[0].calls, 1);
    for (unsigned i = 0; i < TRANSFERS; i++) {
        start_transfer(&t[i], GUEST_BASE + i * 1000, device_buffer + i * 1000, 1000, i % 3 == 0);
        if (i % 3 == 0)
            fill_pattern(device_buffer + i * 1000, 1000, 5);
        ck_assert_int_eq(vfu_dev_dma(R.dev, &t[i].dma), 1);
    }
    guest_serve(&g);
    for (unsigned i = 0; i < TRANSFERS; i++) {
        ck_assert_uint_eq(t[i].calls, 1);
        ck_assert_int_eq(t[i].result, 0);
    }
    ck_assert_mem_eq(guest_memory, device_buffer, TRANSFERS * 1000);
    rig_destroy(&R);
}
END_TEST

/* done() may start another transfer, cancel others, and look at the device. */
static transfer chain[3];
static void chain_done(vfu_dma *dma, int result)
{
    note_done(dma, result);
    if (chain[0].calls == 3)
        return;
    chain[0].dma.iova += 64;
    ck_assert_int_eq(vfu_dev_dma(R.dev, &chain[0].dma), 1);
    vfu_dev_dma_cancel(R.dev, &chain[1].dma);
}

START_TEST(dma_chain)
{
    guest g = new_guest(false, 12);
    guest_open(NULL);
    fill_pattern(guest_memory, GUEST_SIZE, 1);
    start_transfer(&chain[0], GUEST_BASE, device_buffer, 64, false);
    start_transfer(&chain[1], GUEST_BASE, device_buffer + 4096, 64, false);
    start_transfer(&chain[2], GUEST_BASE, device_buffer + 8192, 64, false);
    chain[0].dma.done = chain_done;
    for (unsigned i = 0; i < 3; i++)
        ck_assert_int_eq(vfu_dev_dma(R.dev, &chain[i].dma), 1);
    guest_serve(&g);
    ck_assert_uint_eq(chain[0].calls, 3);
    ck_assert_uint_eq(chain[1].calls, 0);
    ck_assert_uint_eq(chain[2].calls, 1);
    ck_assert_mem_eq(device_buffer, guest_memory + 128, 64);
    rig_destroy(&R);
}
END_TEST

/* A region callback that reads message memory by the reader would wait for itself: -EDEADLK. vfu_dev_dma works there. */
static transfer deferred;
static void read_in_callback(rig *r)
{
    uint8_t byte;
    ck_assert_int_eq(vfu_iommu_read(vfu_dev_reader(r->dev), GUEST_BASE, &byte, 1), -EDEADLK);
    start_transfer(&deferred, GUEST_BASE, device_buffer, 8, false);
    ck_assert_int_eq(vfu_dev_dma(r->dev, &deferred.dma), 1);
}

START_TEST(dma_in_callback)
{
    guest g = new_guest(false, 0);
    uint8_t byte = 1;
    guest_open(NULL);
    fill_pattern(guest_memory, 64, 1);
    R.on_write = read_in_callback;
    vfu_wire_region_access access = {.region = 0, .count = 1};
    uint8_t write[17];
    memcpy(write, &access, 16);
    write[16] = byte;
    tell(VFU_CMD_REGION_WRITE, 0, write, sizeof(write), NULL, 0);
    /* the DMA message went out before the reply, whose turn came later: both are here, in that order */
    unsigned dma = 0, replies = 0;
    for (unsigned i = 0; i < 2; i++) {
        ck_assert_int_eq(rig_receive(&R), 1);
        if (vfu_msg_is_reply(&R.reply)) {
            ck_assert_uint_eq(R.reply.cmd, VFU_CMD_REGION_WRITE);
            replies++;
        } else {
            dma++;
            uint32_t len = guest_answer(&g, R.client.bytes, (uint32_t)R.client.have, guest_reply);
            rig_send(&R, guest_reply, len, NULL, 0);
        }
    }
    ck_assert(dma == 1 && replies == 1);
    ck_assert_uint_eq(deferred.calls, 1);
    ck_assert_mem_eq(device_buffer, guest_memory, 8);
    rig_destroy(&R);
}
END_TEST

/* What a callback sends comes behind the replies to the requests before, though those were held back for the next ones. */
START_TEST(dma_in_callback_in_order)
{
    guest g = new_guest(false, 0);
    vfu_wire_device_info info = {.argsz = 16};
    vfu_wire_region_access access = {.region = 0, .count = 1};
    static const uint16_t expected[] = {VFU_CMD_DEVICE_GET_INFO, VFU_CMD_DMA_READ, VFU_CMD_REGION_WRITE, VFU_CMD_DEVICE_GET_INFO};
    uint8_t bytes[128], write[17] = {0};
    uint32_t len;
    guest_open(NULL);
    fill_pattern(guest_memory, 64, 1);
    R.on_write = read_in_callback;
    memcpy(write, &access, 16);
    len = put(bytes, 1, VFU_CMD_DEVICE_GET_INFO, 0, &info, sizeof(info));
    len += put(bytes + len, 2, VFU_CMD_REGION_WRITE, 0, write, sizeof(write));
    len += put(bytes + len, 3, VFU_CMD_DEVICE_GET_INFO, 0, &info, sizeof(info));
    rig_send(&R, bytes, len, NULL, 0);
    uint8_t answer[128];
    for (unsigned i = 0; i < COUNT(expected); i++) {
        ck_assert_int_eq(rig_receive(&R), 1);
        ck_assert_uint_eq(R.reply.cmd, expected[i]);
        if (!vfu_msg_is_reply(&R.reply))
            len = guest_answer(&g, R.client.bytes, (uint32_t)R.client.have, answer);
    }
    rig_send(&R, answer, len, NULL, 0);
    ck_assert_uint_eq(deferred.calls, 1);
    rig_destroy(&R);
}
END_TEST

/* Waits until the device has something to do, as its user would. */
static void poll_once(vfu_dev *dev)
{
    vfu_pollfd wanted[VFU_DEV_FDS];
    struct pollfd fds[VFU_DEV_FDS];
    unsigned count = vfu_dev_fds(dev, wanted);
    for (unsigned i = 0; i < count; i++)
        fds[i] = (struct pollfd){.fd = wanted[i].fd, .events = wanted[i].events};
    must(poll(fds, count, vfu_dev_timeout(dev)));
    vfu_dev_poll(dev);
}

START_TEST(dma_timeout)
{
    transfer t;
    vfu_dev_desc desc = rig_desc(&R);
    desc.dma_timeout_ms = 20;
    rig_create(&R, &desc);
    rig_connect(&R);
    greet(&R);
    ck_assert_int_eq(vfu_dev_timeout(R.dev), -1);
    ck_assert_int_eq(ask_map(&R, GUEST_BASE, GUEST_SIZE, RW, -1, 0), 0);
    start_transfer(&t, GUEST_BASE, device_buffer, CHUNK * 2, _i);
    ck_assert_int_eq(vfu_dev_dma(R.dev, &t.dma), 1);
    ck_assert_int_le(vfu_dev_timeout(R.dev), 20);
    while (!t.calls)
        poll_once(R.dev);
    ck_assert_int_eq(t.result, -ETIMEDOUT);
    ck_assert_int_eq(vfu_dev_timeout(R.dev), -1);
    rig_destroy(&R);
}
END_TEST

/* A device whose user does no mapping at all: each access is a message, descriptor or not. */
START_TEST(dma_policy_no_mmap)
{
    int file = memfd("not-mapped", GUEST_SIZE, F_SEAL_SHRINK);
    guest g = new_guest(false, 12);
    vfu_dev_desc desc = rig_desc(&R);
    desc.policy.no_mmap = true;
    rig_create(&R, &desc);
    rig_connect(&R);
    greet(&R);
    ck_assert_int_eq(ask_map(&R, GUEST_BASE, GUEST_SIZE, RW, file, 0), 0);
    ck_assert_uint_eq(vmas_of("not-mapped"), 0);
    fill_pattern(guest_memory, 64, 1);
    ck_assert_int_eq(guest_dma(&g, GUEST_BASE, device_buffer, 64, false), 0);
    ck_assert_mem_eq(device_buffer, guest_memory, 64);
    ck_assert_uint_gt(g.messages, 0);
    close(file);
    rig_destroy(&R);
}
END_TEST

/* ---- life cycle ---------------------------------------------------------------------------------------------------------------------------- */

/* Who doesn't greet in time is dropped, and the next is served. */
START_TEST(greeting_timeout)
{
    vfu_dev_desc desc = rig_desc(&R);
    desc.greeting_ms = 20;
    serve_at_address(&desc);
    come_in();
    int second = connect_to(&address, address_len);
    ck_assert_int_ge(vfu_dev_timeout(R.dev), 0);
    ck_assert_int_le(vfu_dev_timeout(R.dev), 20);
    char byte;
    while (recv(R.client.sock, &byte, 1, MSG_DONTWAIT) < 0)
        poll_once(R.dev);
    close(R.client.sock);
    R.client.sock = second;
    greet(&R);
    ck_assert_int_eq(vfu_dev_timeout(R.dev), -1); /* who has greeted may be silent */
    ck_assert_uint_eq(R.connects, 1);
    rig_destroy(&R);
}
END_TEST

START_TEST(second_client_waits)
{
    vfu_dev_desc desc = rig_desc(&R);
    serve_at_address(&desc);
    come_in();
    greet(&R);
    int second = connect_to(&address, address_len), third = connect_to(&address, address_len);
    uint8_t version[20];
    send_all(second, version, put(version, 5, VFU_CMD_VERSION, 0, "\0\0\0\0", 4), NULL, 0);
    check_healthy(&R);
    struct pollfd ready = {.fd = second, .events = POLLIN};
    ck_assert_int_eq(poll(&ready, 1, 0), 0);
    rig_leave(&R);
    ck_assert_int_eq(poll(&ready, 1, 0), 1);
    R.client.sock = second;
    ck_assert_int_eq(rig_receive(&R), 1);
    ck_assert_uint_eq(R.reply.id, 5);
    check_healthy(&R);
    rig_leave(&R);
    R.client.sock = third;
    greet(&R);
    ck_assert_uint_eq(R.connects, 3);
    ck_assert_uint_eq(R.disconnects, 2);
    rig_destroy(&R);
}
END_TEST

/* What a client leaves behind, or is dropped from: nothing. Its device keeps its own state. */
START_TEST(disconnection_drops_everything)
{
    vfu_dev_desc desc = rig_desc(&R);
    uint8_t data[4] = {1, 2, 3, 4};
    serve_at_address(&desc);
    unsigned open = fds_open();
    vfu_dev_disconnect(R.dev); /* nobody */
    ck_assert_uint_eq(R.disconnects, 0);
    for (unsigned round = 0; round < 5; round++) {
        int file = memfd("left-behind", 4 * PAGE, round & 1 ? F_SEAL_SHRINK : 0), events[RIG_VECTORS + 2];
        for (unsigned i = 0; i < COUNT(events); i++)
            events[i] = event();
        come_in();
        greet(&R);
        ck_assert_int_eq(ask_map(&R, 0, 2 * PAGE, RW, file, 0), 0);
        ck_assert_int_eq(ask_map(&R, 0x10000, PAGE, RW, file, PAGE), 0);
        ck_assert_int_eq(ask_map(&R, 0x20000, PAGE, RW, -1, 0), 0);
        ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, 2, 0, RIG_VECTORS, NULL, events, RIG_VECTORS), 0);
        ck_assert_int_eq(ask_irqs(&R, EVENTFD | TRIGGER, 0, 0, 1, NULL, &events[RIG_VECTORS], 1), 0);
        ck_assert_int_eq(ask_irqs(&R, EVENTFD | UNMASK, 0, 0, 1, NULL, &events[RIG_VECTORS + 1], 1), 0);
        ck_assert_int_eq(ask_write(&R, 0, 8, data, 4), 0);
        ck_assert_int_eq(write_config(&R, 4, 6, 2), 0);
        ck_assert_int_eq(write_config(&R, 0x3c, 9, 1), 0);
        vfu_dev_set_intx(R.dev, true);
        ck_assert_uint_gt(vmas_of("left-behind"), 0);
        if (round >= 3) {
            vfu_dev_disconnect(R.dev);
            ck_assert_uint_eq(R.disconnects, round + 1);
            ck_assert_uint_eq(mappings(R.dev), 0);
            check_closed(&R);
        }
        rig_leave(&R);
        close(file);
        close_fds(events, COUNT(events));
        ck_assert_uint_eq(fds_open(), open);
        ck_assert_uint_eq(vmas_of("left-behind"), 0);
        ck_assert_uint_eq(mappings(R.dev), 0);
        ck_assert_uint_eq(vfu_pci_command(vfu_dev_pci(R.dev)), 0);
        ck_assert_int_eq(vfu_dev_raise(R.dev, 2, 0), -ENOENT);
        ck_assert_uint_eq(R.disconnects, round + 1);
        ck_assert_mem_eq(&R.storage[0][8], data, 4);
    }
    come_in();
    greet(&R);
    ck_assert_uint_eq(intx_status(), 0);
    ck_assert_int_eq(ask_read(&R, 0, 8, data, 4), 0);
    ck_assert_mem_eq(data, "\1\2\3\4", 4);
    rig_destroy(&R);
}
END_TEST

/* One session, with descriptors at three of its messages. */
typedef struct session {
    uint8_t bytes[1024];
    uint32_t len, ends[16], count;
    int fds[16][4];
    unsigned fd_counts[16];
} session;

static void session_add(session *s, uint16_t cmd, uint32_t flags, const void *payload, uint32_t len, const int *fds, unsigned fd_count)
{
    s->len += put(s->bytes + s->len, (uint16_t)(s->count + 1), cmd, flags, payload, len);
    for (unsigned i = 0; i < fd_count; i++)
        s->fds[s->count][i] = fds[i];
    s->fd_counts[s->count] = fd_count;
    s->ends[s->count++] = s->len;
}

static void session_make(session *s, int file, const int events[RIG_VECTORS])
{
    vfu_wire_dma_map map = {.argsz = 32, .flags = RW, .address = 0x1000, .size = PAGE}, by_message = map;
    vfu_wire_irq_set set = {.argsz = 20, .flags = EVENTFD | TRIGGER, .index = 2, .count = RIG_VECTORS};
    vfu_wire_region_access access = {.region = 0, .count = 4};
    vfu_wire_dma_unmap unmap = {.argsz = 24, .address = 0x1000, .size = PAGE};
    uint8_t write[20] = {0};
    *s = (session){0};
    by_message.address = 0x8000;
    memcpy(write, &access, sizeof(access));
    session_add(s, VFU_CMD_VERSION, 0, "\0\0\0\0{\"capabilities\":{}}", 24, NULL, 0);
    session_add(s, VFU_CMD_DMA_MAP, 0, &map, sizeof(map), &file, 1);
    session_add(s, VFU_CMD_DMA_MAP, 0, &by_message, sizeof(map), NULL, 0);
    session_add(s, VFU_CMD_DEVICE_SET_IRQS, 0, &set, sizeof(set), events, RIG_VECTORS);
    session_add(s, VFU_CMD_REGION_WRITE, 0, write, sizeof(write), NULL, 0);
    session_add(s, VFU_CMD_REGION_WRITE, VFU_HDR_NO_REPLY, write, sizeof(write), NULL, 0);
    session_add(s, VFU_CMD_DMA_UNMAP, 0, &unmap, sizeof(unmap), &file, 1);
    session_add(s, VFU_CMD_DEVICE_RESET, 0, NULL, 0, NULL, 0);
}

/* Sends the first `cut` bytes, each message in one piece with its descriptors. */
static void session_send(const session *s, int sock, uint32_t cut)
{
    for (uint32_t i = 0, at = 0; i < s->count && at < cut; at = s->ends[i++]) {
        uint32_t end = s->ends[i] < cut ? s->ends[i] : cut;
        send_all(sock, s->bytes + at, end - at, s->fds[i], s->fd_counts[i]);
    }
}

/* A client dies after each byte of a session, once at rest and once with everything unread: nothing is left of it. */
START_TEST(client_dies_at_every_byte)
{
    int file = memfd("dies", PAGE, 0), events[RIG_VECTORS];
    session s;
    vfu_dev_desc desc = rig_desc(&R);
    for (unsigned i = 0; i < RIG_VECTORS; i++)
        events[i] = event();
    session_make(&s, file, events);
    serve_at_address(&desc);
    unsigned open = fds_open();
    for (uint32_t cut = 0; cut <= s.len; cut++)
        for (unsigned how = 0; how < 2; how++) {
            int sock = connect_to(&address, address_len);
            if (how)
                settle(R.dev);
            session_send(&s, sock, cut);
            if (how)
                settle(R.dev);
            close(sock);
            settle(R.dev);
            ck_assert_uint_eq(mappings(R.dev), 0);
            ck_assert_uint_eq(fds_open(), open);
            ck_assert_uint_eq(vmas_of("dies"), 0);
            ck_assert_int_eq(vfu_dev_raise(R.dev, 2, 0), -ENOENT);
            ck_assert_uint_eq(R.connects, R.disconnects);
        }
    ck_assert_uint_gt(R.connects, 0);
    come_in();
    greet(&R);
    check_healthy(&R);
    close(file);
    close_fds(events, RIG_VECTORS);
    rig_destroy(&R);
}
END_TEST

START_TEST(where_clients_come_from)
{
    int pair[2], pipes[2];
    char dir[] = "/tmp/vfu-dev-XXXXXX", path[64];
    struct stat st;
    vfu_dev_desc desc = rig_desc(&R);
    rig_create(&R, &desc);
    ck_assert_int_eq(vfu_dev_poll(R.dev), -ENOTCONN); /* nobody can come */
    ck_assert_int_eq(vfu_dev_timeout(R.dev), -1);
    ck_assert_int_eq(vfu_dev_run(R.dev), -ENOTCONN);
    /* what is no socket is closed all the same */
    must(pipe2(pipes, O_CLOEXEC));
    ck_assert_int_eq(vfu_dev_attach(R.dev, pipes[0]), -ENOTSOCK);
    ck_assert_int_eq(fcntl(pipes[0], F_GETFD), -1);
    close(pipes[1]);
    ck_assert_int_eq(vfu_dev_attach(R.dev, null_fd()), -ENOTSOCK);
    ck_assert_int_eq(vfu_dev_attach(R.dev, -1), -EBADF);
    /* a connected one, and then no other */
    make_pair(pair);
    ck_assert_int_eq(vfu_dev_attach(R.dev, pair[0]), 0);
    R.client.sock = pair[1];
    ck_assert(is_cloexec(pair[0]));
    greet(&R);
    make_pair(pair);
    ck_assert_int_eq(vfu_dev_attach(R.dev, pair[0]), -EBUSY);
    ck_assert_int_eq(fcntl(pair[0], F_GETFD), -1);
    close(pair[1]);
    must(mkdtemp(dir) ? 0 : -1);
    snprintf(path, sizeof(path), "%s/sock", dir);
    ck_assert_int_eq(vfu_dev_listen(R.dev, path), -EBUSY);
    peer_close(&R.client);
    ck_assert_int_eq(settle(R.dev), -ENOTCONN);
    /* a path, whose file goes with the device */
    ck_assert_int_eq(vfu_dev_listen(R.dev, dir), -EADDRINUSE);
    ck_assert_int_eq(vfu_dev_listen(R.dev, path), 0);
    ck_assert_int_eq(vfu_dev_listen(R.dev, path), -EBUSY);
    ck_assert_int_eq(lstat(path, &st), 0);
    R.client.sock = vfu_sock_connect(path);
    must(R.client.sock);
    greet(&R);
    rig_leave(&R);
    ck_assert_int_eq(vfu_dev_poll(R.dev), 0); /* others can come */
    rig_destroy(&R);
    ck_assert_int_eq(lstat(path, &st), -1);
    /* but not when it is somebody else's by then */
    desc = rig_desc(&R);
    rig_create(&R, &desc);
    ck_assert_int_eq(vfu_dev_listen(R.dev, path), 0);
    must(unlink(path));
    int other = vfu_sock_listen(path);
    must(other);
    rig_destroy(&R);
    ck_assert_int_eq(lstat(path, &st), 0);
    close(other);
    must(unlink(path));
    must(rmdir(dir));
}
END_TEST

static bool work_again;
static bool work_more(void *ctx)
{
    ((rig *)ctx)->works++;
    return work_again;
}

/* The work callback comes when it was asked for, without a request under way. */
START_TEST(work)
{
    vfu_dev_desc desc = rig_desc(&R);
    desc.callbacks.work = work_more;
    rig_create(&R, &desc);
    rig_connect(&R);
    greet(&R);
    ck_assert_uint_eq(R.works, 0);
    vfu_dev_want_work(R.dev);
    ck_assert_int_eq(vfu_dev_timeout(R.dev), 0);
    vfu_dev_poll(R.dev);
    ck_assert_uint_eq(R.works, 1);
    ck_assert_int_eq(vfu_dev_timeout(R.dev), -1);
    work_again = true;
    vfu_dev_want_work(R.dev);
    for (unsigned i = 0; i < 5; i++)
        vfu_dev_poll(R.dev);
    ck_assert_uint_eq(R.works, 6);
    work_again = false;
    settle(R.dev);
    ck_assert_uint_eq(R.works, 7);
    rig_destroy(&R);
}
END_TEST

/* A client that asks and doesn't read: the device waits for it, without growing, and all answers come when it reads. */
START_TEST(client_that_does_not_read)
{
    uint8_t request[32];
    vfu_wire_region_access access = {.region = 2, .count = RIG_BAR2};
    unsigned sent = 0, received = 0;
    rig_open(&R);
    put(request, 0, VFU_CMD_REGION_READ, 0, &access, sizeof(access));
    for (;;) {
        uint16_t id = (uint16_t)sent;
        memcpy(request, &id, sizeof(id));
        if (send_some(R.client.sock, request, sizeof(request), NULL, 0) != sizeof(request))
            break;
        settle(R.dev);
        sent++;
    }
    ck_assert_uint_gt(sent, 10);
    ck_assert_uint_lt(R.reads, sent);
    while (rig_receive(&R) == 1) {
        ck_assert_uint_eq(R.reply.id, received);
        received++;
    }
    ck_assert_uint_eq(received, sent);
    ck_assert_uint_eq(R.reads, sent);
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* ---- allocation failure ------------------------------------------------------------------------------------------------------------------ */

/* A life from creation to end; whatever fails on the way is no matter, but nothing crashes and nothing is left. */
static void live(heap *h, int file, const int events[RIG_VECTORS])
{
    int pair[2];
    session s;
    transfer t[2];
    vfu_dev_desc desc = rig_desc(&R);
    vfu_iommu_range range = {0, 1 << 20};
    desc.alloc = heap_of(h);
    if (vfu_dev_create(&R.dev, &desc) == 0) {
        make_pair(pair);
        R.client.sock = pair[1];
        if (vfu_dev_attach(R.dev, pair[0]) == 0) {
            session_make(&s, file, events);
            session_send(&s, pair[1], s.ends[4]);
            settle(R.dev);
            start_transfer(&t[0], 0x1000, device_buffer, 64, true);
            vfu_dev_dma(R.dev, &t[0].dma);
            vfu_iommu_dirty_start(vfu_dev_iommu(R.dev), PAGE, &range, 1);
            start_transfer(&t[1], 0x8000, device_buffer, 64, true);
            vfu_dev_dma(R.dev, &t[1].dma);
            settle(R.dev);
        }
    }
    rig_destroy(&R);
}

START_TEST(allocations_fail)
{
    int file = memfd("alloc", PAGE, 0), events[RIG_VECTORS];
    for (unsigned i = 0; i < RIG_VECTORS; i++)
        events[i] = event();
    unsigned open = fds_open();
    heap h = {0};
    live(&h, file, events);
    unsigned long total = h.count;
    ck_assert_uint_eq(h.live, 0);
    ck_assert_uint_gt(total, 8);
    for (unsigned long n = 1; n <= total; n++) {
        h = (heap){.fail_at = n};
        live(&h, file, events);
        ck_assert_uint_eq(h.live, 0);
        ck_assert_uint_eq(fds_open(), open);
        ck_assert_uint_eq(vmas_of("alloc"), 0);
    }
    close(file);
    close_fds(events, RIG_VECTORS);
}
END_TEST

/* A listening device survives a client that it has no memory for. */
START_TEST(no_memory_for_a_client)
{
    heap h = {0};
    vfu_dev_desc desc = rig_desc(&R);
    desc.alloc = heap_of(&h);
    serve_at_address(&desc);
    for (unsigned long n = 1; n <= 3; n++) {
        char byte;
        h.fail_at = h.count + n;
        come_in();
        while (recv(R.client.sock, &byte, 1, MSG_DONTWAIT) < 0) /* the device waits a little after such a failure */
            poll_once(R.dev);
        rig_leave(&R);
    }
    come_in();
    uint8_t version[20];
    send_all(R.client.sock, version, put(version, 1, VFU_CMD_VERSION, 0, "\0\0\0\0", 4), NULL, 0);
    while (!R.connects)
        poll_once(R.dev);
    ck_assert_int_eq(rig_receive(&R), 1);
    rig_destroy(&R);
    ck_assert_uint_eq(h.live, 0);
}
END_TEST

/* A client that asks for much and leaves: the replies that were held back meet a closed socket. */
START_TEST(asks_and_leaves)
{
    uint8_t bytes[128];
    vfu_dev_desc desc = rig_desc(&R);
    serve_at_address(&desc);
    for (unsigned both = 0; both < 2; both++) {
        vfu_wire_region_access read = {.offset = 0, .region = 0, .count = 4};
        vfu_wire_region_info info = {.argsz = 64, .index = 2}; /* its reply has a descriptor */
        come_in();
        greet(&R);
        unsigned disconnects = R.disconnects;
        size_t len = put(bytes, 1, VFU_CMD_REGION_READ, 0, &read, sizeof(read));
        len += put(bytes + len, 2, both ? VFU_CMD_DEVICE_GET_REGION_INFO : VFU_CMD_REGION_READ, 0, both ? (void *)&info : (void *)&read,
                   both ? sizeof(info) : sizeof(read));
        must(send(R.client.sock, bytes, len, 0));
        rig_leave(&R);
        ck_assert_uint_eq(R.disconnects, disconnects + 1);
    }
    come_in();
    greet(&R);
    check_healthy(&R);
    rig_destroy(&R);
}
END_TEST

/* No descriptor is left for a client: the listening device waits a little, and polls in between do nothing. */
START_TEST(no_descriptor_for_a_client)
{
    struct rlimit before, limit;
    vfu_dev_desc desc = rig_desc(&R);
    serve_at_address(&desc);
    R.client.sock = connect_to(&address, address_len);
    int next = null_fd();
    close(next);
    must(getrlimit(RLIMIT_NOFILE, &before));
    limit = (struct rlimit){.rlim_cur = (rlim_t)next, .rlim_max = before.rlim_max};
    must(setrlimit(RLIMIT_NOFILE, &limit));
    for (unsigned i = 0; i < 10; i++)
        ck_assert_int_eq(vfu_dev_poll(R.dev), 0);
    must(setrlimit(RLIMIT_NOFILE, &before));
    ck_assert_int_eq(vfu_dev_poll(R.dev), 0); /* too early */
    int wait = vfu_dev_timeout(R.dev);
    ck_assert_int_gt(wait, 0);
    poll(NULL, 0, wait + 1);
    greet(&R);
    rig_destroy(&R);
}
END_TEST

static unsigned said[VFU_LEVEL_TRACE + 1];

static void count_lines(void *ctx, vfu_level level, const char *line)
{
    (void)ctx, (void)line;
    said[level]++;
}

/* What is above the logger's level isn't said. */
START_TEST(log_levels)
{
    for (vfu_level level = VFU_LEVEL_ERROR; level <= VFU_LEVEL_TRACE; level++) {
        uint8_t byte;
        memset(said, 0, sizeof(said));
        vfu_dev_desc desc = rig_desc(&R);
        desc.logger = (vfu_logger){.write = count_lines, .level = level};
        rig_create(&R, &desc);
        rig_connect(&R);
        greet(&R);
        ck_assert_int_eq(ask_read(&R, 77, 0, &byte, 1), -EINVAL);
        for (vfu_level l = VFU_LEVEL_ERROR; l <= VFU_LEVEL_TRACE; l++)
            if (l > level)
                ck_assert_uint_eq(said[l], 0);
        ck_assert_uint_eq(said[VFU_LEVEL_WARNING], level >= VFU_LEVEL_WARNING);
        ck_assert_uint_eq(said[VFU_LEVEL_TRACE] != 0, level == VFU_LEVEL_TRACE);
        rig_destroy(&R);
    }
}
END_TEST

static vfu_iommu_pin kept_pin;

/* The device's own thread lets go of memory when it hears that somebody waits for it. */
static void let_go(void *ctx, vfu_level level, const char *line)
{
    (void)ctx;
    if (level == VFU_LEVEL_ERROR && strstr(line, "still holds memory"))
        vfu_iommu_pin_drop(vfu_dev_iommu(R.dev), &kept_pin);
}

/* Memory that the device holds when the client leaves is awaited, and that is said. */
START_TEST(pinned_at_the_end)
{
    vfu_iommu_reader *reader;
    vfu_iommu_segment segment;
    int file = memfd("pinned", PAGE, F_SEAL_SHRINK);
    vfu_dev_desc desc = rig_desc(&R);
    desc.logger.write = let_go;
    rig_create(&R, &desc);
    rig_connect(&R);
    greet(&R);
    ck_assert_int_eq(ask_map(&R, 0, PAGE, RW, file, 0), 0);
    ck_assert_int_eq(vfu_iommu_reader_open(vfu_dev_iommu(R.dev), &reader), 0);
    ck_assert_int_eq(vfu_iommu_pin_take(reader, &kept_pin, 0, PAGE, VFU_IOMMU_READ, &segment, 1), 1);
    rig_leave(&R);
    ck_assert_uint_eq(mappings(R.dev), 0);
    ck_assert_uint_eq(R.disconnects, 1);
    vfu_iommu_reader_close(reader);
    close(file);
    rig_destroy(&R);
}
END_TEST

/* What can't be a device. */
START_TEST(impossible_devices)
{
    vfu_region_share share = {.fd = -1};
    vfu_wire_sparse_area areas[65] = {{0}};
    for (unsigned i = 0; i < 8; i++) {
        vfu_dev *dev = (vfu_dev *)&share;
        vfu_dev_desc desc = rig_desc(&R);
        switch (i) {
        case 0: desc.max_data_xfer_size = 4095; break;
        case 1: desc.max_data_xfer_size = (16 << 20) + 1; break;
        case 2: desc.pci.bar[0].size = 5000; break;
        case 3: desc.share[3] = &share; break; /* of a BAR that isn't there */
        case 4: desc.extra_region_count = 65; break;
        case 5: desc.pci.msix.table_offset = RIG_BAR4; break;
        case 6: share.areas = areas, share.area_count = 65, desc.share[0] = &share; break;
        default: share.areas = NULL, share.area_count = 1, desc.share[0] = &share; break;
        }
        ck_assert_int_eq(vfu_dev_create(&dev, &desc), -EINVAL);
        ck_assert_ptr_null(dev);
        close(R.ram);
    }
    vfu_dev_destroy(NULL);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("device");
    TCase *tc = tcase_create("VERSION");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_loop_test(tc, version_table, 0, COUNT(version_cases));
    tcase_add_test(tc, version_text);
    tcase_add_test(tc, version_reply);
    tcase_add_test(tc, version_twice);
    tcase_add_test(tc, version_has_to_come_first);
    suite_add_tcase(suite, tc);

    tc = tcase_create("dispatch");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, unknown_commands);
    tcase_add_test(tc, short_payloads);
    tcase_add_test(tc, framing);
    tcase_add_test(tc, byte_by_byte);
    tcase_add_test(tc, replies_in_order);
    tcase_add_test(tc, answered_together);
    tcase_add_test(tc, no_reply_is_never_answered);
    tcase_add_test(tc, surplus_descriptors);
    suite_add_tcase(suite, tc);

    tc = tcase_create("memory");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, map_arguments);
    tcase_add_test(tc, map_limit);
    tcase_add_test(tc, unmap_arguments);
    tcase_add_test(tc, unmap_as_qemu_does);
    tcase_add_test(tc, map_descriptors);
    tcase_add_test(tc, one_file_a_thousand_times);
    tcase_add_test(tc, file_is_truncated);
    tcase_add_loop_test(tc, handler_of_the_program, 0, 2);
    tcase_add_test(tc, half_the_address_space);
    suite_add_tcase(suite, tc);

    tc = tcase_create("info and interrupts");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, region_info);
    tcase_add_test(tc, irq_info);
    tcase_add_test(tc, set_irqs_table);
    tcase_add_test(tc, irq_descriptors);
    tcase_add_test(tc, full_eventfds);
    tcase_add_test(tc, irq_loopback);
    tcase_add_test(tc, irq_raise);
    tcase_add_test(tc, intx);
    suite_add_tcase(suite, tc);

    tc = tcase_create("regions");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, region_bounds);
    tcase_add_test(tc, region_access_limit);
    tcase_add_test(tc, region_without_callbacks);
    tcase_add_test(tc, write_multi);
    tcase_add_test(tc, device_reset);
    tcase_add_test(tc, msix_table);
    tcase_add_test(tc, config_space);
    suite_add_tcase(suite, tc);

    tc = tcase_create("DMA by message");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_loop_test(tc, dma_layouts, 0, 8);
    tcase_add_loop_test(tc, dma_layout_late, 0, 2);
    tcase_add_test(tc, dma_chunks);
    tcase_add_test(tc, dma_mixed_memory);
    tcase_add_test(tc, dma_fails_at_last);
    tcase_add_test(tc, dma_layout_and_gone);
    tcase_add_test(tc, dma_wrong_answers);
    tcase_add_test(tc, dma_unmap_meanwhile);
    tcase_add_test(tc, dma_unmap_beside);
    tcase_add_loop_test(tc, dma_forgotten, 0, 3);
    tcase_add_test(tc, dma_and_commands);
    tcase_add_test(tc, dma_chain);
    tcase_add_test(tc, dma_in_callback);
    tcase_add_test(tc, dma_in_callback_in_order);
    tcase_add_loop_test(tc, dma_timeout, 0, 2);
    tcase_add_test(tc, dma_policy_no_mmap);
    suite_add_tcase(suite, tc);

    tc = tcase_create("life cycle");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, greeting_timeout);
    tcase_add_test(tc, second_client_waits);
    tcase_add_test(tc, disconnection_drops_everything);
    tcase_add_test(tc, client_dies_at_every_byte);
    tcase_add_test(tc, where_clients_come_from);
    tcase_add_test(tc, work);
    tcase_add_test(tc, client_that_does_not_read);
    tcase_add_test(tc, allocations_fail);
    tcase_add_test(tc, no_memory_for_a_client);
    tcase_add_test(tc, asks_and_leaves);
    tcase_add_test(tc, no_descriptor_for_a_client);
    tcase_add_test(tc, log_levels);
    tcase_add_test(tc, pinned_at_the_end);
    tcase_add_test(tc, impossible_devices);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
