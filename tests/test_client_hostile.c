/* SPDX-License-Identifier: MIT */
/*
 * ==== client ====
 *
 * A server that misbehaves, in every way of a table: each row says what the client asks, what the server says, and with which
 * error the client must come out of it. Afterwards the connection must be as good as before, or closed with every later call
 * failing at once; nothing may be left of it, neither a descriptor nor a byte; and the next connection, to a server that behaves,
 * must work. `--list` prints the rows.
 */
#include "client.h"

enum { SAYS_MAX = 4, FDS_MAX = 24, TIMEOUT_MS = 40, LATER = 1 << 20 };

/* What stands behind a descriptor that the server sends. */
typedef enum fd_kind { NO_FD, MEMORY_FD, EMPTY_FD, EVENT_FD, SOCKET_FD, DATAGRAM_FD, DIRECTORY_FD, DEVICE_FD } fd_kind;

/* A message of the server. Everything is right that isn't set: a reply to what the client asks next. */
typedef struct say {
    int id;               /* added to the right one */
    int cmd;              /* instead of the right one; -1: 0 */
    uint32_t flags;       /* instead of REPLY; COMMAND: a command */
    uint32_t error, size; /* size: instead of the right one */
    const void *payload;
    uint32_t len;
    uint32_t repeat; /* so many more of it */
    fd_kind fd;
    unsigned fds; /* how many of them; 0 with a kind: 1 */
} say;

#define COMMAND         0x40u /* a reserved bit, which says "not 0" */
#define FAILS(code)     .flags = VFU_HDR_REPLY | VFU_HDR_ERROR, .error = (code)
#define DATA(type, ...) .payload = &(const type){__VA_ARGS__}, .len = sizeof(type)
#define TEXT(text)      .payload = "\0\0\0\0" text, .len = 4 + sizeof(text)

/* What it does then; with TWIN_ all this over the twin socket. */
typedef enum ending { STAYS, CLOSES, STOPS_TALKING, TWIN_STAYS, TWIN_CLOSES } ending;

typedef struct misdeed {
    const char *name;
    int (*ask)(vfu_client **client); /* what the client does; of VERSION: connects */
    uint16_t cmd;                    /* of the right reply */
    say says[SAYS_MAX];
    ending end;
    int err;
} misdeed;

/* ---- what the client asks ----------------------------------------------------------------------------------------------------- */

static uint8_t memory[PAGE];
static int client_sock; /* that the server has greeted already */

static int want_nothing(vfu_client **c) { return vfu_client_serve(*c, -1, TIMEOUT_MS / 2); }

static int want_version(vfu_client **c)
{
    vfu_client_desc desc = script_desc(TIMEOUT_MS);
    desc.twin_socket = true;
    return vfu_client_attach(c, client_sock, &desc);
}

static int want_info(vfu_client **c)
{
    vfu_wire_device_info info;
    return vfu_client_info(*c, &info);
}

static int want_info_twice(vfu_client **c)
{
    int err = want_info(c);
    return err ? err : want_info(c);
}

static int want_irq(vfu_client **c)
{
    vfu_wire_irq_info info;
    return vfu_client_irq_info(*c, 2, &info);
}

static int want_region(vfu_client **c)
{
    vfu_client_region region;
    int err = vfu_client_region_info(*c, 2, &region);
    ck_assert(!err || region.fd == -1);
    if (region.fd >= 0)
        close(region.fd);
    return err;
}

static int want_memory(vfu_client **c) { return vfu_client_region_open(*c, 2, VFU_CLIENT_BY_MEMORY); }

static int want_memory_access(vfu_client **c)
{
    uint8_t bytes[64] = {0};
    ck_assert_int_eq(want_memory(c), 0);
    ck_assert_int_eq(vfu_client_region_write(*c, 2, 0, bytes, 1), -EFAULT);
    ck_assert_int_eq(vfu_client_region_write(*c, 2, 8, bytes, 64), -EFAULT);
    return vfu_client_region_read(*c, 2, PAGE - 3, bytes, 3);
}

static int want_io_fds(vfu_client **c)
{
    vfu_client_io_fd list[2];
    int fds[VFU_FDS_MAX], got = vfu_client_io_fds(*c, 2, list, COUNT(list), fds);
    for (unsigned i = 0; i < VFU_FDS_MAX; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    return got;
}

static int want_eventfds(vfu_client **c) { return vfu_client_region_open(*c, 2, VFU_CLIENT_BY_EVENTFD); }

static int want_read(vfu_client **c)
{
    uint8_t bytes[8];
    return vfu_client_region_read(*c, 2, 16, bytes, 8);
}

static int want_write(vfu_client **c) { return vfu_client_region_write(*c, 2, 16, "12345678", 8); }

static int want_multi(vfu_client **c)
{
    vfu_wire_write_one writes[2] = {{.offset = 0, .region = 2, .count = 4}, {.offset = 4, .region = 2, .count = 4}};
    return vfu_client_write_multi(*c, writes, 2);
}

static int want_map(vfu_client **c)
{
    vfu_iommu_stats stats;
    int err = vfu_client_dma_map(*c, 0x1000, PAGE, VFU_IOMMU_READ | VFU_IOMMU_WRITE, memory, -1, 0);
    vfu_iommu_get_stats(vfu_client_iommu(*c), &stats);
    ck_assert_uint_eq(stats.mappings, err == 0);
    return err;
}

static int want_unmap(vfu_client **c)
{
    vfu_iommu_stats stats;
    vfu_iommu_mapping mapping = {.iova = 0x1000, .size = PAGE, .prot = VFU_IOMMU_READ, .host = memory};
    ck_assert_int_eq(vfu_iommu_map(vfu_client_iommu(*c), &mapping), 0);
    int err = vfu_client_dma_unmap(*c, 0x1000, PAGE);
    vfu_iommu_get_stats(vfu_client_iommu(*c), &stats);
    ck_assert_uint_eq(stats.mappings, err < 0); /* what the server didn't let go stays */
    return err;
}

static int want_irqs(vfu_client **c)
{
    int fd = event(), err = vfu_client_irq_assign(*c, 2, 0, 1, &fd);
    close(fd);
    return err;
}

static int want_reset(vfu_client **c) { return vfu_client_reset(*c); }

static int want_mig_flags(vfu_client **c)
{
    uint64_t flags;
    return vfu_client_mig_flags(*c, &flags);
}

static int want_mig_state(vfu_client **c)
{
    vfu_mig_state state;
    return vfu_client_mig_state(*c, &state);
}

static int want_mig_go(vfu_client **c) { return vfu_client_mig_go(*c, VFU_MIG_STATE_STOP, NULL); }

static int want_mig_read(vfu_client **c)
{
    uint8_t bytes[8];
    return (int)vfu_client_mig_read(*c, bytes, sizeof(bytes));
}

static int want_log_start(vfu_client **c)
{
    uint64_t page_size = PAGE;
    int err = vfu_client_log_start(*c, &page_size, NULL, 0);
    ck_assert_uint_eq(page_size, PAGE);
    return err;
}

static int want_log(vfu_client **c)
{
    uint64_t bitmap[2];
    return vfu_client_log_report(*c, 0, 128 * PAGE, PAGE, bitmap, 2);
}

/* Three reads in flight; the worst result of the three. */
static int want_three(vfu_client **c)
{
    uint8_t bytes[3][8];
    vfu_completion done;
    int err = 0, ids[3];
    for (unsigned i = 0; i < 3; i++) {
        ids[i] = vfu_client_submit_read(*c, 2, 16, bytes[i], 8, NULL);
        must(ids[i]);
    }
    for (unsigned i = 0; i < 3; i++) {
        ck_assert_int_eq(vfu_client_wait(*c, ids[i], &done), 1);
        err = done.result ? done.result : err;
    }
    return err;
}

/* Submits until no more is taken, and waits. */
static int want_many(vfu_client **c)
{
    static uint8_t data[32 << 10];
    vfu_completion done;
    int got = 0, err = 0;
    while ((got = vfu_client_submit_write(*c, 2, 0, data, sizeof(data), NULL)) >= 0) {
    }
    ck_assert_int_eq(got, -EAGAIN);
    while ((got = vfu_client_wait(*c, VFU_CLIENT_ANY, &done)) == 1) {
        ck_assert_int_lt(done.result, 0);
        err = done.result;
    }
    ck_assert_int_eq(got, -EPIPE);
    return err;
}

static int want_post_many(vfu_client **c)
{
    static uint8_t data[32 << 10];
    vfu_completion done;
    int got;
    while ((got = vfu_client_post_write(*c, 2, 0, data, sizeof(data))) == 0) {
    }
    ck_assert_int_eq(got, -EAGAIN);
    while ((got = vfu_client_poll(*c, &done)) == 0) {
        struct pollfd fd = {.fd = vfu_client_fd(*c), .events = POLLIN};
        int timeout = vfu_client_timeout(*c);
        ck_assert_int_ge(timeout, 0); /* there is a limit */
        poll(&fd, 1, timeout);
    }
    return got;
}

/* While hardly another descriptor can be opened. */
static int want_more_than_the_limit(vfu_client **c)
{
    struct rlimit before, limit;
    int next = null_fd();
    close(next);
    must(getrlimit(RLIMIT_NOFILE, &before));
    limit = (struct rlimit){.rlim_cur = (rlim_t)next + 4, .rlim_max = before.rlim_max};
    must(setrlimit(RLIMIT_NOFILE, &limit));
    int err = want_reset(c);
    must(setrlimit(RLIMIT_NOFILE, &before));
    return err;
}

/* ---- the table ------------------------------------------------------------------------------------------------------------------ */

typedef struct info_areas {
    vfu_wire_region_info info;
    vfu_wire_cap_sparse_mmap cap;
    vfu_wire_sparse_area areas[2];
} info_areas;

typedef struct io_reply {
    vfu_wire_region_io_fds head;
    vfu_wire_sub_region one;
} io_reply;

/* libvfio-user's: an offset into the shared memory before the datamatch */
typedef struct io_reply_48 {
    vfu_wire_region_io_fds head;
    vfu_wire_sub_region one;
    uint64_t datamatch;
} io_reply_48;

typedef struct access_reply {
    vfu_wire_region_access access;
    uint8_t data[8];
} access_reply;

typedef struct feature_reply {
    vfu_wire_feature head;
    uint32_t payload[10];
} feature_reply;

typedef struct log_reply {
    vfu_wire_feature head;
    vfu_wire_feature_log_report report;
    uint64_t bits[2];
} log_reply;

typedef struct mig_reply {
    vfu_wire_mig_data head;
    uint8_t data[16];
} mig_reply;

#define R VFU_REGION_INFO_READ
#define W VFU_REGION_INFO_WRITE
#define M VFU_REGION_INFO_MMAP
#define C VFU_REGION_INFO_CAPS

#define INFO(...) DATA(vfu_wire_region_info, .argsz = 32, .index = 2, .size = 0x10000, __VA_ARGS__)
#define AREAS(x, n, ...) \
    DATA(info_areas, .info = {.argsz = 80, .flags = R | M | C, .index = 2, .cap_offset = 32, .size = 0x10000}, \
         .cap = {.header = {.id = 1, .version = 1, .next = (x)}, .nr_areas = (n)}, .areas = {__VA_ARGS__})
#define IO(...)         DATA(io_reply, .head = {.argsz = 56, .index = 2, .count = 1}, .one = {.size = 4, __VA_ARGS__})
#define IO_48(...)      DATA(io_reply_48, .head = {.argsz = 64, .index = 2, .count = 1}, .one = {.size = 4, __VA_ARGS__})
#define ACCESS(o, r, n) DATA(access_reply, .access = {(o), (r), (n)})
#define FEATURE(f)      DATA(feature_reply, .head = {48, (f)})
#define LOG(...)        DATA(log_reply, .head = {48, VFU_FEATURE_GET | VFU_FEATURE_LOGGING_REPORT}, .report = {__VA_ARGS__})
#define GET             VFU_FEATURE_GET
#define SET             VFU_FEATURE_SET

#define TWO \
    {0, 0x1000}, { 0x1000, 0x1000 }
#define NINE       DATA(vfu_wire_device_info, 16, 2, 9, 5)
#define EIGHT      ACCESS(16, 2, 8)
#define ASKS(c)    .cmd = (c), .flags = COMMAND
#define DMA(a, n)  DATA(vfu_wire_dma_access, (a), (n))
#define VER        want_version, VFU_CMD_VERSION
#define INF        want_info, VFU_CMD_DEVICE_GET_INFO
#define REG        want_region, VFU_CMD_DEVICE_GET_REGION_INFO
#define MEM        want_memory, VFU_CMD_DEVICE_GET_REGION_INFO
#define IOF        want_io_fds, VFU_CMD_DEVICE_GET_REGION_IO_FDS
#define TWIN(text) TEXT("{\"capabilities\":{\"max_msg_fds\":8,\"twin_socket\":{\"supported\":true" text "}}}")

#define ASK(function, command) want_##function, VFU_CMD_##command
#define ROW(name, who, end, err, ...) \
    { \
        name, who, {__VA_ARGS__}, end, err \
    }

static const misdeed misdeeds[] = {
    /* VERSION */
    ROW("greets with major version 1", VER, STAYS, -EPROTO, {.payload = "\1\0\0\0{}", .len = 7}),
    ROW("greets with a minor version above ours", VER, STAYS, -EPROTO, {.payload = "\0\0\1\0{}", .len = 7}),
    ROW("greets with two bytes", VER, STAYS, -EPROTO, {.payload = "\0\0", .len = 2}),
    ROW("greets with text that is no JSON", VER, STAYS, -EPROTO, {TEXT("{\"capabilities\"")}),
    ROW("greets with a JSON array", VER, STAYS, -EPROTO, {TEXT("[]")}),
    ROW("greets with bytes that are no UTF-8", VER, STAYS, -EPROTO, {TEXT("{\"\xff\xfe\":1}")}),
    ROW("greets with JSON too deep", VER, STAYS, -EPROTO, {TEXT("{\"a\":[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]}")}),
    ROW("greets with a page of zeros and more", VER, STAYS, 0, {.payload = memory, .len = PAGE}),
    ROW("takes no data at all (max_data_xfer_size 0)", VER, STAYS, -EPROTO,
        {TEXT("{\"capabilities\":{\"max_data_xfer_size\":0}}")}),
    ROW("has a limit that is a string", VER, STAYS, -EPROTO, {TEXT("{\"capabilities\":{\"max_msg_fds\":\"8\"}}")}),
    ROW("has a limit of minus one", VER, STAYS, -EPROTO, {TEXT("{\"capabilities\":{\"max_msg_fds\":-1}}")}),
    ROW("refuses VERSION", VER, STAYS, -EPERM, {FAILS(EPERM)}),
    ROW("refuses VERSION without an errno", VER, STAYS, -EIO, {FAILS(0)}),
    ROW("answers VERSION with another command", VER, STAYS, -EPROTO, {.cmd = VFU_CMD_DMA_MAP}),
    ROW("answers VERSION with another id", VER, STAYS, -EPROTO, {.id = 5, TEXT("{}")}),
    ROW("is silent from the start", VER, STAYS, -ETIMEDOUT, {.size = LATER}),
    ROW("closes instead of a greeting", VER, CLOSES, -EPIPE, {.size = LATER}),
    ROW("promises a twin socket and doesn't say which", VER, STAYS, -EPROTO, {TWIN(""), .fd = SOCKET_FD}),
    ROW("promises a twin socket and doesn't send it", VER, STAYS, -EPROTO, {TWIN(",\"fd_index\":0")}),
    ROW("names a twin socket behind the descriptors", VER, STAYS, -EPROTO, {TWIN(",\"fd_index\":7"), .fd = SOCKET_FD}),
    ROW("names a twin socket that no message could have", VER, STAYS, -EPROTO,
        {TWIN(",\"fd_index\":2000000000"), .fd = SOCKET_FD}),
    ROW("gives a file for a twin socket", VER, STAYS, -EPROTO, {TWIN(",\"fd_index\":0"), .fd = MEMORY_FD}),
    ROW("gives a datagram socket for a twin socket", VER, STAYS, -EPROTO, {TWIN(",\"fd_index\":0"), .fd = DATAGRAM_FD}),
    ROW("greets with 24 descriptors", VER, STAYS, 0, {TEXT("{}"), .fd = MEMORY_FD, .fds = FDS_MAX}),

    /* the frame */
    ROW("answers with the next id", INF, STAYS, -EPROTO, {.id = 1, NINE}),
    ROW("answers with the last id", INF, STAYS, -EPROTO, {.id = -1, NINE}),
    ROW("answers twice", ASK(info_twice, DEVICE_GET_INFO), STAYS, -EPROTO, {NINE}, {.id = -1, NINE}),
    ROW("answers with another command", INF, STAYS, -EPROTO, {.cmd = VFU_CMD_DEVICE_RESET}),
    ROW("answers with no command", INF, STAYS, -EPROTO, {.cmd = -1}),
    ROW("answers with a command that nobody knows", INF, STAYS, -EPROTO, {.cmd = 99}),
    ROW("sends type 2", INF, STAYS, -EPROTO, {.flags = 2, NINE}),
    ROW("sends type 15", INF, STAYS, -EPROTO, {.flags = 15, NINE}),
    ROW("has a size of 0", INF, STAYS, -EPROTO, {.size = UINT32_MAX - 1}),
    ROW("has a size of 15", INF, STAYS, -EPROTO, {.size = 15}),
    ROW("has a size above the limit", INF, STAYS, -EPROTO, {.size = (1 << 20) + PAGE + 1}),
    ROW("has a size of 4 GiB", INF, STAYS, -EPROTO, {.size = UINT32_MAX}),
    ROW("sends a size below the payload", INF, STAYS, -EPROTO, {.size = 20, NINE}),
    ROW("sends less than the size and stops", INF, STAYS, -ETIMEDOUT, {.size = 64, NINE}),
    ROW("sends less than the size and closes", INF, CLOSES, -EPIPE, {.size = 64, NINE}),
    ROW("sends less than the size and shuts down", INF, STOPS_TALKING, -EPIPE, {.size = 64, NINE}),
    ROW("is silent", INF, STAYS, -ETIMEDOUT, {.size = LATER}),
    ROW("closes", INF, CLOSES, -EPIPE, {.size = LATER}),
    ROW("shuts down", INF, STOPS_TALKING, -EPIPE, {.size = LATER}),
    ROW("refuses", INF, STAYS, -ENOENT, {FAILS(ENOENT)}),
    ROW("refuses without an errno", INF, STAYS, -EIO, {FAILS(0)}),
    ROW("refuses with errno 4096", INF, STAYS, -EIO, {FAILS(4096)}),
    ROW("refuses with a negative errno", INF, STAYS, -EIO, {FAILS(UINT32_MAX - 21)}),
    ROW("refuses another command", INF, STAYS, -EPROTO, {.cmd = VFU_CMD_DMA_MAP, FAILS(ENOENT)}),
    ROW("refuses with a payload", INF, STAYS, -EBUSY, {FAILS(EBUSY), NINE}),
    ROW("refuses with descriptors", IOF, STAYS, -EBUSY, {FAILS(EBUSY), .fd = EVENT_FD, .fds = 5}),
    ROW("refuses to reset with the errno of a closed socket", ASK(reset, DEVICE_RESET), STAYS, -EPIPE, {FAILS(EPIPE)}),
    ROW("adds 24 descriptors", ASK(reset, DEVICE_RESET), STAYS, 0, {.fd = EVENT_FD, .fds = FDS_MAX}),
    ROW("sends more descriptors than the process may open", ASK(more_than_the_limit, DEVICE_RESET), STAYS, -EPROTO,
        {.fd = EVENT_FD, .fds = FDS_MAX}),

    /* GET_INFO, GET_IRQ_INFO */
    ROW("describes the device in 15 bytes", INF, STAYS, -EPROTO, {.payload = memory, .len = 15}),
    ROW("describes the device in no bytes", INF, STAYS, -EPROTO, {.id = 0}),
    ROW("describes another interrupt", ASK(irq, DEVICE_GET_IRQ_INFO), STAYS, -EPROTO, {DATA(vfu_wire_irq_info, 16, 1, 3, 4)}),
    ROW("describes an interrupt in 12 bytes", ASK(irq, DEVICE_GET_IRQ_INFO), STAYS, -EPROTO, {.payload = memory, .len = 12}),
    ROW("refuses an eventfd", ASK(irqs, DEVICE_SET_IRQS), STAYS, -ENOSPC, {FAILS(ENOSPC)}),

    /* GET_REGION_INFO */
    ROW("describes another region", REG, STAYS, -EPROTO, {DATA(vfu_wire_region_info, .argsz = 32, .index = 3)}),
    ROW("describes a region in 31 bytes", REG, STAYS, -EPROTO, {.payload = memory, .len = 31}),
    ROW("has an area behind the end", REG, STAYS, -EPROTO, {AREAS(0, 2, {0, 0x1000}, {0x10000, 0x1000}), .fd = MEMORY_FD}),
    ROW("has an area larger than the region", REG, STAYS, -EPROTO, {AREAS(0, 2, {0, 0x1000}, {0, 0x10001}), .fd = MEMORY_FD}),
    ROW("has an area that wraps", REG, STAYS, -EPROTO, {AREAS(0, 2, {0, 0x1000}, {UINT64_MAX, 2}), .fd = MEMORY_FD}),
    ROW("has more areas than come", REG, STAYS, -EPROTO, {AREAS(0, 3, TWO), .fd = MEMORY_FD}),
    ROW("has 4 G areas", REG, STAYS, -EPROTO, {AREAS(0, UINT32_MAX, TWO), .fd = MEMORY_FD}),
    ROW("has areas whose size overflows", REG, STAYS, -EPROTO, {AREAS(0, 0x10000002, TWO), .fd = MEMORY_FD}),
    ROW("has a capability chain that is a ring", REG, STAYS, -EPROTO, {AREAS(32, 2, TWO), .fd = MEMORY_FD}),
    ROW("has a capability chain into itself", REG, STAYS, -EPROTO, {AREAS(40, 2, TWO), .fd = MEMORY_FD}),
    ROW("has a capability chain into the header", REG, STAYS, -EPROTO, {AREAS(8, 2, TWO), .fd = MEMORY_FD}),
    ROW("has a capability chain out of the message", REG, STAYS, -EPROTO, {AREAS(76, 2, TWO), .fd = MEMORY_FD}),
    ROW("has a capability chain far away", REG, STAYS, -EPROTO, {AREAS(UINT32_MAX, 2, TWO), .fd = MEMORY_FD}),
    ROW("has capabilities outside of the message", REG, STAYS, -EPROTO, {INFO(.flags = R | C, .cap_offset = 64)}),
    ROW("has capabilities and no place for them", REG, STAYS, 0, {INFO(.flags = R | C, .cap_offset = 0)}),
    ROW("forgets the descriptor of a region", REG, STAYS, -EPROTO, {INFO(.flags = R | M)}),
    ROW("has a region that ends behind 2^63 in its file", REG, STAYS, -EPROTO,
        {INFO(.flags = R | M, .offset = INT64_MAX), .fd = MEMORY_FD}),
    ROW("announces more of a region again and again", REG, STAYS, -EPROTO, {DATA(vfu_wire_region_info, .argsz = 64, .index = 2)},
        {DATA(vfu_wire_region_info, .argsz = 128, .index = 2)}),
    ROW("announces 4 GiB of a region", REG, STAYS, -EPROTO, {DATA(vfu_wire_region_info, .argsz = UINT32_MAX, .index = 2)},
        {DATA(vfu_wire_region_info, .argsz = UINT32_MAX, .index = 2)}),
    ROW("adds a descriptor to a region that can't be mapped", REG, STAYS, 0, {INFO(.flags = R), .fd = MEMORY_FD, .fds = 3}),

    /* memory and ioeventfds */
    ROW("gives an eventfd for memory", MEM, STAYS, -ENODEV, {INFO(.flags = R | M), .fd = EVENT_FD}),
    ROW("gives a socket for memory", MEM, STAYS, -ENODEV, {INFO(.flags = R | M), .fd = SOCKET_FD}),
    ROW("gives a directory for memory", MEM, STAYS, -ENODEV, {INFO(.flags = R | M), .fd = DIRECTORY_FD}),
    ROW("gives a device for memory", MEM, STAYS, -ENODEV, {INFO(.flags = R | M), .fd = DEVICE_FD}),
    ROW("gives a file that is too short for its region", ASK(memory_access, DEVICE_GET_REGION_INFO), STAYS, -EFAULT,
        {INFO(.flags = R | W | M), .fd = EMPTY_FD}),
    ROW("names a descriptor that didn't come", IOF, STAYS, -EPROTO, {IO(.fd_index = 1), .fd = EVENT_FD}),
    ROW("names descriptor 2^32 - 1", IOF, STAYS, -EPROTO, {IO(.fd_index = UINT32_MAX), .fd = EVENT_FD}),
    ROW("has an ioeventfd and no descriptor", IOF, STAYS, -EPROTO, {IO(.fd_index = 0)}),
    ROW("has an ioeventfd that wraps", IOF, STAYS, -EPROTO, {IO(.offset = UINT64_MAX - 2), .fd = EVENT_FD}),
    ROW("has ioeventfds of another region", IOF, STAYS, -EPROTO,
        {DATA(io_reply, .head = {.argsz = 56, .index = 3, .count = 1}), .fd = EVENT_FD}),
    ROW("has ioeventfds of 20 bytes", IOF, STAYS, -EPROTO,
        {DATA(io_reply, .head = {.argsz = 56, .index = 2, .count = 2}), .fd = EVENT_FD}),
    ROW("has 4 G ioeventfds", IOF, STAYS, -EPROTO,
        {DATA(io_reply, .head = {.argsz = 56, .index = 2, .count = UINT32_MAX}), .fd = EVENT_FD}),
    ROW("announces more ioeventfds again and again", IOF, STAYS, -EPROTO, {DATA(vfu_wire_region_io_fds, 8192, 0, 2, 100)},
        {DATA(vfu_wire_region_io_fds, 16384, 0, 2, 200)}),
    ROW("gives a file for an ioeventfd", ASK(eventfds, DEVICE_GET_REGION_INFO), STAYS, -ENODEV, {INFO(.flags = R)},
        {.cmd = VFU_CMD_DEVICE_GET_REGION_IO_FDS, IO(.offset = 0), .fd = MEMORY_FD}),
    ROW("gives an eventfd for the shadow of an ioeventfd", ASK(eventfds, DEVICE_GET_REGION_INFO), STAYS, -ENODEV,
        {INFO(.flags = R)}, {.cmd = VFU_CMD_DEVICE_GET_REGION_IO_FDS, IO_48(.type = 2), .fd = EVENT_FD}),
    ROW("names a shadow that didn't come", IOF, STAYS, -EPROTO, {IO_48(.type = 2, .padding = 1), .fd = EVENT_FD}),
    ROW("names shadow 2^32 - 1", IOF, STAYS, -EPROTO, {IO_48(.type = 2, .padding = UINT32_MAX), .fd = EVENT_FD}),

    /* accesses */
    ROW("reads at another offset", ASK(read, REGION_READ), STAYS, -EPROTO, {ACCESS(17, 2, 8)}),
    ROW("reads another region", ASK(read, REGION_READ), STAYS, -EPROTO, {ACCESS(16, 3, 8)}),
    ROW("reads fewer bytes", ASK(read, REGION_READ), STAYS, -EPROTO, {DATA(vfu_wire_region_access, 16, 2, 0)}),
    ROW("reads more bytes than it sends", ASK(read, REGION_READ), STAYS, -EPROTO, {ACCESS(16, 2, 16)}),
    ROW("reads 4 GiB", ASK(read, REGION_READ), STAYS, -EPROTO, {ACCESS(16, 2, UINT32_MAX)}),
    ROW("reads without data", ASK(read, REGION_READ), STAYS, -EPROTO, {DATA(vfu_wire_region_access, 16, 2, 8)}),
    ROW("writes fewer bytes", ASK(write, REGION_WRITE), STAYS, -EPROTO, {DATA(vfu_wire_region_access, 16, 2, 7)}),
    ROW("writes elsewhere", ASK(write, REGION_WRITE), STAYS, -EPROTO, {DATA(vfu_wire_region_access, 0, 2, 8)}),
    ROW("writes more often than asked", ASK(multi, REGION_WRITE_MULTI), STAYS, -EPROTO, {DATA(vfu_wire_write_multi, 3)}),
    ROW("writes UINT64_MAX times", ASK(multi, REGION_WRITE_MULTI), STAYS, -EPROTO, {DATA(vfu_wire_write_multi, UINT64_MAX)}),
    ROW("stops in the middle of several writes", ASK(multi, REGION_WRITE_MULTI), STAYS, 1, {DATA(vfu_wire_write_multi, 1)}),

    /* DMA_MAP, DMA_UNMAP */
    ROW("refuses a mapping", ASK(map, DMA_MAP), STAYS, -ENOMEM, {FAILS(ENOMEM)}),
    ROW("dies while it maps", ASK(map, DMA_MAP), CLOSES, -EPIPE, {.size = LATER}),
    ROW("keeps a mapping", ASK(unmap, DMA_UNMAP), STAYS, -EBUSY, {FAILS(EBUSY)}),
    ROW("unmaps elsewhere", ASK(unmap, DMA_UNMAP), STAYS, -EPROTO, {DATA(vfu_wire_dma_unmap, 24, 0, 0x2000, PAGE)}),
    ROW("unmaps in 8 bytes", ASK(unmap, DMA_UNMAP), STAYS, -EPROTO, {.payload = memory, .len = 8}),

    /* migration */
    ROW("answers about another feature", ASK(mig_flags, DEVICE_FEATURE), STAYS, -EPROTO, {FEATURE(GET | 2)}),
    ROW("answers to SET what was a GET", ASK(mig_flags, DEVICE_FEATURE), STAYS, -EPROTO, {FEATURE(SET | 1)}),
    ROW("has no payload for a feature", ASK(mig_flags, DEVICE_FEATURE), STAYS, -EPROTO, {DATA(vfu_wire_feature, 8, GET | 1)}),
    ROW("has a feature of 7 bytes", ASK(mig_flags, DEVICE_FEATURE), STAYS, -EPROTO, {.payload = memory, .len = 7}),
    ROW("is in migration state 99", ASK(mig_state, DEVICE_FEATURE), STAYS, -EPROTO, {DATA(feature_reply, {48, GET | 2}, {99})}),
    ROW("accepts a migration state and stays where it is", ASK(mig_go, DEVICE_FEATURE), STAYS, -EIO, {FEATURE(GET | 1)},
        {DATA(feature_reply, {48, GET | 2}, {2})}, {DATA(feature_reply, {48, SET | 2}, {1})},
        {DATA(feature_reply, {48, GET | 2}, {2})}),
    ROW("goes to another migration state than asked", ASK(mig_go, DEVICE_FEATURE), STAYS, -EIO, {FEATURE(GET | 1)},
        {DATA(feature_reply, {48, GET | 2}, {2})}, {DATA(feature_reply, {48, SET | 2}, {1})},
        {DATA(feature_reply, {48, GET | 2}, {4})}),
    ROW("dies on the way to another migration state", ASK(mig_go, DEVICE_FEATURE), STOPS_TALKING, -EPIPE, {FEATURE(GET | 1)},
        {DATA(feature_reply, {48, GET | 2}, {2})}),
    ROW("has more migration data than asked for", ASK(mig_read, MIG_DATA_READ), STAYS, -EPROTO,
        {DATA(mig_reply, .head = {24, 16})}),
    ROW("has less migration data than it says", ASK(mig_read, MIG_DATA_READ), STAYS, -EPROTO, {DATA(vfu_wire_mig_data, 16, 8)}),
    ROW("starts a dirty log with pages of 3 bytes", ASK(log_start, DEVICE_FEATURE), STAYS, -EPROTO,
        {DATA(feature_reply, {24, SET | 6}, {3})}),
    ROW("reports another range of the dirty log", ASK(log, DEVICE_FEATURE), STAYS, -EPROTO, {LOG(PAGE, 128 * PAGE, PAGE)}),
    ROW("reports another page size", ASK(log, DEVICE_FEATURE), STAYS, -EPROTO, {LOG(0, 128 * PAGE, PAGE / 2)}),
    ROW("reports a part of the bitmap", ASK(log, DEVICE_FEATURE), STAYS, -EPROTO, {DATA(feature_reply, {48, GET | 8}, {0})}),
    ROW("reports no bitmap", ASK(log, DEVICE_FEATURE), STAYS, -EPROTO, {DATA(vfu_wire_feature, 8, GET | 8)}),

    /* what the device asks */
    ROW("reads memory that it wasn't given", INF, STAYS, 0, {ASKS(VFU_CMD_DMA_READ), DMA(0x1000, 64)}, {NINE}),
    ROW("reads memory at the end of the world", INF, STAYS, 0, {ASKS(VFU_CMD_DMA_READ), DMA(UINT64_MAX, 64)}, {NINE}),
    ROW("reads 2^63 bytes", INF, STAYS, 0, {ASKS(VFU_CMD_DMA_READ), DMA(0, UINT64_C(1) << 63)}, {NINE}),
    ROW("writes less than it says", INF, STAYS, 0, {ASKS(VFU_CMD_DMA_WRITE), DMA(0, 64)}, {NINE}),
    ROW("asks in 8 bytes", INF, STAYS, 0, {ASKS(VFU_CMD_DMA_READ), .payload = memory, .len = 8}, {NINE}),
    ROW("asks what only a client may", INF, STAYS, 0, {ASKS(VFU_CMD_DEVICE_RESET)}, {NINE}),
    ROW("asks what nobody knows", INF, STAYS, 0, {ASKS(99)}, {NINE}),
    ROW("asks and adds 24 descriptors", INF, STAYS, 0, {ASKS(VFU_CMD_DMA_READ), DMA(0, 8), .fd = EVENT_FD, .fds = FDS_MAX},
        {NINE}),
    ROW("asks two hundred times at once", INF, STAYS, 0, {ASKS(VFU_CMD_DMA_READ), DMA(0, 8), .repeat = 200}, {NINE}),
    ROW("asks, and closes before the answer", INF, CLOSES, -EPIPE, {ASKS(VFU_CMD_DMA_READ), DMA(0, 8), .repeat = 3}),
    ROW("answers what nobody asked", ASK(nothing, DEVICE_RESET), STAYS, -EPROTO, {.id = 0}),
    ROW("answers over the twin socket", ASK(nothing, DEVICE_RESET), TWIN_STAYS, -EPROTO, {.id = 0}),
    ROW("closes the twin socket", ASK(nothing, DEVICE_RESET), TWIN_CLOSES, -EPIPE, {.size = LATER}),
    ROW("sends half a message over the twin socket and closes it", ASK(nothing, DMA_READ), TWIN_CLOSES, -EPIPE,
        {.size = 64, .flags = COMMAND}),
    ROW("has a size of 15 over the twin socket", ASK(nothing, DMA_READ), TWIN_STAYS, -EPROTO, {.size = 15, .flags = COMMAND}),

    /* many in flight */
    ROW("answers three requests in the wrong order", ASK(three, REGION_READ), STAYS, 0, {.id = 2, EIGHT}, {.id = 0, EIGHT},
        {.id = -2, EIGHT}),
    ROW("answers one of three requests twice", ASK(three, REGION_READ), STAYS, -EPROTO, {EIGHT}, {.id = -1, EIGHT}),
    ROW("answers two of three requests", ASK(three, REGION_READ), STAYS, -ETIMEDOUT, {EIGHT}, {EIGHT}),
    ROW("answers two of three requests and dies", ASK(three, REGION_READ), STOPS_TALKING, -EPIPE, {EIGHT}, {EIGHT}),
    ROW("refuses one of three requests", ASK(three, REGION_READ), STAYS, -EAGAIN, {EIGHT}, {FAILS(EAGAIN)}, {EIGHT}),
    ROW("takes requests until it is full, and no more", ASK(many, REGION_WRITE), STAYS, -ETIMEDOUT, {.size = LATER}),
    ROW("takes posted writes until it is full, and no more", ASK(post_many, REGION_WRITE), STAYS, -ETIMEDOUT, {.size = LATER}),
};

/* ---- the server ------------------------------------------------------------------------------------------------------------------- */

static int make_fd(fd_kind kind)
{
    int pair[2], fd = -1;
    switch (kind) {
    case MEMORY_FD: return memfd("hostile", 0x10000, 0);
    case EMPTY_FD: return memfd("hostile", 0, 0);
    case EVENT_FD: return event();
    case DIRECTORY_FD: fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC); break;
    case DEVICE_FD: return null_fd();
    case SOCKET_FD:
    case DATAGRAM_FD:
        must(socketpair(AF_UNIX, (kind == SOCKET_FD ? SOCK_STREAM : SOCK_DGRAM) | SOCK_CLOEXEC, 0, pair));
        close(pair[0]);
        return pair[1];
    default: break;
    }
    must(fd);
    return fd;
}

/* Says all of it, to the socket that `server` holds. */
static void say_it(const misdeed *m)
{
    for (unsigned i = 0; i < SAYS_MAX; i++) {
        const say *s = &m->says[i];
        int fds[FDS_MAX];
        unsigned count = s->fd == NO_FD ? 0 : s->fds ? s->fds : 1;
        bool asked = s->flags == COMMAND;
        if (s->size == LATER || (i && !s->payload && !s->flags && !s->cmd))
            break;
        for (unsigned k = 0; k < count; k++)
            fds[k] = make_fd(s->fd);
        uint16_t cmd = s->cmd < 0 ? 0 : s->cmd ? (uint16_t)s->cmd : m->cmd;
        uint32_t size = s->size == UINT32_MAX - 1 ? 0 : s->size ? s->size : 16 + s->len;
        for (uint32_t k = 0; k <= s->repeat; k++)
            say_as(asked ? 7 : (uint16_t)(script_id + s->id), cmd, s->flags ? s->flags : VFU_HDR_REPLY, s->error, size,
                   s->payload, s->len, fds, count);
        script_id = (uint16_t)(script_id + !asked);
        close_fds(fds, count);
    }
}

/* A client that was greeted, with a twin socket in `twin` if it shall have one. */
static vfu_client *greeted(bool with_twin, int *twin)
{
    static const say hello = {TWIN(",\"fd_index\":0")},
                     plain = {TEXT("{\"capabilities\":{\"max_msg_fds\":3,\"write_multiple\":true}}")};
    const say *s = with_twin ? &hello : &plain;
    vfu_client_desc desc = script_desc(TIMEOUT_MS);
    vfu_client *client;
    int pair[2], sock = script_start();
    make_pair(pair);
    desc.twin_socket = with_twin;
    say_as(script_id++, VFU_CMD_VERSION, VFU_HDR_REPLY, 0, 16 + s->len, s->payload, s->len, &pair[0], with_twin);
    ck_assert_int_eq(vfu_client_attach(&client, sock, &desc), 0);
    heard();
    close(pair[0]);
    *twin = pair[1];
    return client;
}

static void finish(const misdeed *m)
{
    if (m->end == CLOSES || m->end == TWIN_CLOSES)
        peer_close(&server);
    else if (m->end == STOPS_TALKING)
        ck_assert_int_eq(shutdown(server.sock, SHUT_WR), 0);
}

/* The connection has ended, and says so at once. */
static void check_ended(vfu_client *client)
{
    vfu_completion done;
    ck_assert_int_eq(want_info(&client), -EPIPE);
    ck_assert_int_eq(vfu_client_poll(client, &done), -EPIPE);
    ck_assert_int_eq(vfu_client_submit_read(client, 0, 0, memory, 4, NULL), -EPIPE);
    ck_assert_int_eq(vfu_client_flush(client), -EPIPE);
    ck_assert_int_eq(vfu_client_timeout(client), -1);
    ck_assert_uint_eq(vfu_client_in_flight(client), 0);
}

START_TEST(misbehaves)
{
    const misdeed *m = &misdeeds[_i];
    vfu_client *client = NULL;
    if (m->ask == want_more_than_the_limit && emulated_by("valgrind"))
        return;
    int twin = -1, main_sock = -1, err;
    if (m->cmd == VFU_CMD_VERSION) {
        client_sock = script_start();
        say_it(m);
        finish(m);
        err = m->ask(&client);
    } else {
        bool over_twin = m->end == TWIN_STAYS || m->end == TWIN_CLOSES;
        client = greeted(over_twin, &twin);
        if (over_twin) {
            main_sock = server.sock;
            server.sock = twin;
            twin = -1;
        }
        say_it(m);
        finish(m);
        err = m->ask(&client);
    }
    ck_assert_msg(err == m->err, "%s: %d, not %d", m->name, err, m->err);
    bool refused = m->says[0].flags & VFU_HDR_ERROR || m->says[1].flags & VFU_HDR_ERROR;
    if (client && (err == -EPROTO || (!refused && (err == -EPIPE || err == -ETIMEDOUT)))) {
        check_ended(client);
    } else if (client) {
        ck_assert_msg(vfu_client_fd(client) >= 0, "%s", m->name);
        check_usable(client);
    }
    vfu_client_destroy(client);
    peer_close(&server);
    close_fds((int[]){twin, main_sock}, 2);
    ck_assert_uint_eq(client_heap.live, 0);

    client = greeted(false, &twin); /* and to one that behaves */
    check_usable(client);
    close(twin);
    script_close(client);
}
END_TEST

/* Sends a byte now and then, for ever: of a message that never ends. */
static void *trickle(void *arg)
{
    int sock = *(int *)arg;
    vfu_wire_header header = {.size = 1 << 20, .cmd = VFU_CMD_DEVICE_GET_INFO, .flags = VFU_HDR_REPLY, .id = 1};
    for (size_t i = 0; send(sock, (const uint8_t *)&header + (i < 16 ? i : 15), 1, MSG_NOSIGNAL) == 1; i++)
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    return NULL;
}

/* Asks as fast as it can, for ever, and takes the answers. */
static void *flood(void *arg)
{
    uint8_t request[32] = {0}, answers[4096];
    int sock = *(int *)arg;
    memcpy(request, &(vfu_wire_header){.cmd = VFU_CMD_DMA_READ, .size = 32}, 16);
    for (;;) {
        struct pollfd ready = {.fd = sock, .events = POLLIN | POLLOUT};
        if (poll(&ready, 1, PATIENCE_MS) < 1 ||
            ((ready.revents & POLLIN) && recv(sock, answers, sizeof(answers), MSG_DONTWAIT) <= 0) ||
            ((ready.revents & POLLOUT) && send(sock, request, sizeof(request), MSG_DONTWAIT | MSG_NOSIGNAL) < 0 &&
             errno != EAGAIN))
            return NULL;
    }
}

static const struct {
    const char *name;
    void *(*run)(void *sock);
} endless[] = {{"sends a byte now and then, for ever", trickle}, {"asks for ever, and takes the answers", flood}};

START_TEST(never_ends)
{
    pthread_t thread;
    int twin;
    vfu_client *client = greeted(false, &twin);
    close(twin);
    ck_assert_int_eq(pthread_create(&thread, NULL, endless[_i].run, &server.sock), 0);
    size_t before = client_heap.live;
    ck_assert_int_eq(want_info(&client), -ETIMEDOUT);
    ck_assert_uint_le(client_heap.live, before);
    check_ended(client);
    pthread_join(thread, NULL);
    script_close(client);
    client = greeted(false, &twin);
    close(twin);
    check_usable(client);
    script_close(client);
}
END_TEST

/* What comes over the twin socket is handled by poll as well, and answered there. */
START_TEST(polls_the_twin)
{
    static const vfu_wire_dma_access access = {0x1000, 8};
    vfu_completion done;
    int twin, main_sock;
    vfu_client *client = greeted(true, &twin);
    main_sock = server.sock;
    server.sock = twin;
    say_as(7, VFU_CMD_DMA_READ, COMMAND, 0, 32, &access, sizeof(access), NULL, 0);
    ck_assert_int_eq(vfu_client_poll(client, &done), 0);
    ck_assert_int_eq(peer_receive(&server), 1);
    ck_assert_uint_eq(header_of(server.bytes).id, 7);
    ck_assert_uint_eq(header_of(server.bytes).flags, VFU_HDR_REPLY | VFU_HDR_ERROR);
    server.sock = main_sock;
    ck_assert_int_eq(peer_receive(&server), 0);
    close(twin);
    script_close(client);
}
END_TEST

/* The file of a mapped region loses its pages while it is in use. */
START_TEST(truncates_mapped_memory)
{
    static const vfu_wire_region_info info = {.argsz = 32, .flags = R | W | M, .index = 2, .size = 0x4000};
    uint8_t bytes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    int twin, file = memfd("shrinks", 0x4000, 0);
    vfu_client *client = greeted(false, &twin);
    close(twin);
    say_as(script_id++, VFU_CMD_DEVICE_GET_REGION_INFO, VFU_HDR_REPLY, 0, 48, &info, 32, &file, 1);
    ck_assert_int_eq(want_memory(&client), 0);
    ck_assert_int_eq(vfu_client_region_write(client, 2, 0x2000, bytes, 8), 0);
    ck_assert_int_eq(ftruncate(file, 0x2000), 0);
    ck_assert_int_eq(vfu_client_region_write(client, 2, 0x2000, bytes, 8), -EFAULT);
    ck_assert_int_eq(vfu_client_region_read(client, 2, 0x1ffc, bytes, 8), -EFAULT);
    ck_assert_int_eq(vfu_client_region_read(client, 2, 0x1ff8, bytes, 8), 0);
    ck_assert_int_eq(ftruncate(file, 0x4000), 0);
    ck_assert_int_eq(vfu_client_region_read(client, 2, 0x2000, bytes, 8), 0); /* it lives on */
    check_usable(client);
    close(file);
    script_close(client);
}
END_TEST

/* One way that is in no table above. */
static const char *const further[] = {"truncates the file of a mapped region"};

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--list")) {
        for (unsigned i = 0; i < COUNT(misdeeds); i++)
            printf("%s: %s\n", misdeeds[i].name, misdeeds[i].err < 0 ? vfu_errno_name(misdeeds[i].err) : "no harm");
        for (unsigned i = 0; i < COUNT(endless); i++)
            printf("%s: ETIMEDOUT\n", endless[i].name);
        printf("%s: EFAULT\n", further[0]);
        return 0;
    }
    printf("%zu ways in which a server misbehaves\n", COUNT(misdeeds) + COUNT(endless) + COUNT(further));
    fflush(stdout);
    Suite *suite = suite_create("client with a hostile server");
    TCase *tc = tcase_create("misdeeds");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_loop_test(tc, misbehaves, 0, COUNT(misdeeds));
    tcase_add_loop_test(tc, never_ends, 0, COUNT(endless));
    tcase_add_test(tc, polls_the_twin);
    tcase_add_test(tc, truncates_mapped_memory);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
