/* SPDX-License-Identifier: MIT */
/*
 * ==== device ==== descriptors for I/O, regions of its own, the MSI-X table, policies
 *
 * Replies of GET_REGION_IO_FDS and GET_REGION_INFO byte by byte; the MSI-X table with and without masks against a model;
 * what each
 * policy changes, and that nothing changes without it.
 */
#include "util.h"

enum { GET_REGIONS = VFU_CMD_DEVICE_GET_REGION_INFO, GET_IO_FDS = VFU_CMD_DEVICE_GET_REGION_IO_FDS, HEADER = 16 };

static rig the_rig;

static void open_desc(rig *r, const vfu_dev_desc *desc)
{
    rig_create(r, desc);
    rig_connect(r);
}

/* A client that takes that many descriptors in one message. */
static void greet_taking(rig *r, unsigned max_msg_fds)
{
    char json[64];
    snprintf(json, sizeof(json), "{\"capabilities\":{\"max_msg_fds\":%u}}", max_msg_fds);
    ck_assert_int_eq(ask_version(r, json), 0);
}

/* ---- GET_REGION_IO_FDS ------------------------------------------------------------------------------------------------- */

static int ask_io_fds(rig *r, uint32_t argsz, uint32_t flags, uint32_t index, uint32_t count)
{
    vfu_msg m = command(GET_IO_FDS);
    m.u.region_io_fds.argsz = argsz;
    m.u.region_io_fds.flags = flags;
    m.u.region_io_fds.index = index;
    m.u.region_io_fds.count = count;
    return ask(r, &m);
}

enum { EVENTS = 20 };

/* Entries of regions 0, 2 and an own one; two of region 0 share a descriptor, which others do as well. */
static vfu_io_fd io_fds[] = {
    {.region = 0, .type = VFU_IO_FD_IOEVENTFD, .offset = 0x10, .size = 4, .fd = 0, .flags = 1, .data = 0x1122334455667788},
    {.region = 2, .type = VFU_IO_FD_IOREGIONFD, .offset = 0, .size = 4096, .fd = 1, .flags = 2, .data = 42},
    {.region = 0, .type = VFU_IO_FD_IOEVENTFD, .offset = 0x20, .size = 0, .fd = 2},
    {.region = 0, .type = VFU_IO_FD_IOEVENTFD, .offset = 0xff8, .size = 8, .fd = 0},
    {.region = 9, .type = VFU_IO_FD_IOREGIONFD, .offset = 60, .size = 4, .fd = 0, .data = 7},
};

/* What region 0 answers: its three entries, in order. */
static const vfu_wire_sub_region region_0[] = {
    {.offset = 0x10, .size = 4, .fd_index = 0, .type = 0, .flags = 1, .data = 0x1122334455667788},
    {.offset = 0x20, .size = 0, .fd_index = 1, .type = 0},
    {.offset = 0xff8, .size = 8, .fd_index = 0, .type = 0},
};

static int events[EVENTS];

static void make_events(void)
{
    for (unsigned i = 0; i < EVENTS; i++)
        events[i] = event();
}

/* The descriptor of entry i, which stands there as an index into events. */
static vfu_io_fd with_event(vfu_io_fd io)
{
    io.fd = events[io.fd];
    return io;
}

static void open_with_io_fds(rig *r, vfu_io_fd *list, unsigned count)
{
    static const vfu_extra_region own = {.size = 64, .type = 1};
    vfu_dev_desc desc = rig_desc(r);
    for (unsigned i = 0; i < count; i++)
        list[i] = with_event(list[i]);
    desc.io_fds = list;
    desc.io_fd_count = count;
    desc.extra_regions = &own;
    desc.extra_region_count = 1;
    open_desc(r, &desc);
}

/* Is received descriptor `fd` that event? */
static void check_is_event(int fd, int which)
{
    uint64_t one = 1;
    ck_assert_uint_eq(signals(which), 0);
    ck_assert_int_eq(write(fd, &one, sizeof(one)), sizeof(one));
    ck_assert_uint_eq(signals(which), 1);
}

START_TEST(io_fds_by_the_book)
{
    rig *r = &the_rig;
    vfu_io_fd list[COUNT(io_fds)];
    memcpy(list, io_fds, sizeof(list));
    make_events();
    open_with_io_fds(r, list, COUNT(list));
    memset(list, 0xee, sizeof(list)); /* it was copied */
    greet_taking(r, 16);

    ck_assert_int_eq(ask_io_fds(r, 4096, 0, 0, 0), 0);
    vfu_wire_region_io_fds fixed = {.argsz = 16 + 3 * 40, .index = 0, .count = 3};
    ck_assert_uint_eq(r->client.have, HEADER + sizeof(fixed) + sizeof(region_0));
    ck_assert_mem_eq(r->client.bytes + HEADER, &fixed, sizeof(fixed));
    ck_assert_mem_eq(r->client.bytes + HEADER + sizeof(fixed), region_0, sizeof(region_0));
    ck_assert_uint_eq(r->client.fd_count, 2);
    check_is_event(r->client.fds[0], events[0]);
    check_is_event(r->client.fds[1], events[2]);

    ck_assert_int_eq(ask_io_fds(r, 16 + 40, 0, 2, 0), 0);
    vfu_wire_sub_region entry;
    ck_assert_int_eq(vfu_msg_sub_region(&r->reply, 0, &entry), 0);
    ck_assert_uint_eq(entry.type, VFU_IO_FD_IOREGIONFD);
    ck_assert_uint_eq(entry.flags, 2);
    ck_assert_uint_eq(entry.data, 42);
    ck_assert_uint_eq(entry.fd_index, 0);
    ck_assert_uint_eq(r->client.fd_count, 1);
    check_is_event(r->client.fds[0], events[1]);

    ck_assert_int_eq(ask_io_fds(r, 4096, 0, 9, 0), 0);
    ck_assert_uint_eq(r->reply.u.region_io_fds.count, 1);
    check_is_event(r->client.fds[0], events[0]);
    rig_destroy(r);
}
END_TEST

/* Every argsz: the reply is whole, with its descriptors, or is the fixed part that says what is needed. */
START_TEST(io_fds_that_do_not_fit)
{
    enum { NEEDED = 16 + 3 * 40 };
    rig *r = &the_rig;
    vfu_io_fd list[COUNT(io_fds)];
    memcpy(list, io_fds, sizeof(list));
    make_events();
    open_with_io_fds(r, list, COUNT(list));
    greet_taking(r, 2);
    for (uint32_t argsz = 0; argsz <= NEEDED + 1; argsz++) {
        int err = ask_io_fds(r, argsz, 0, 0, 0);
        ck_assert_int_eq(err, argsz < 16 ? -EINVAL : 0);
        if (err)
            continue;
        bool fits = argsz >= NEEDED;
        ck_assert_uint_eq(r->client.have, HEADER + (fits ? NEEDED : 16));
        ck_assert_uint_eq(r->reply.u.region_io_fds.argsz, NEEDED);
        ck_assert_uint_eq(r->reply.u.region_io_fds.count, 3);
        ck_assert_uint_eq(r->client.fd_count, fits ? 2 : 0);
    }
    rig_destroy(r);
}
END_TEST

START_TEST(io_fds_refused)
{
    static const struct {
        uint32_t argsz, flags, index, count;
        int err;
    } cases[] = {
        {4096, 0, 10, 0, -EINVAL}, {4096, 0, 0xffffffff, 0, -EINVAL}, {4096, 1, 0, 0, -EINVAL}, {4096, 0, 0, 1, -EINVAL},
        {4096, 0, 8, 0, 0},        {4096, 0, 7, 0, 0},                {16, 0, 1, 0, 0},
    };
    rig *r = &the_rig;
    vfu_io_fd list[COUNT(io_fds)];
    memcpy(list, io_fds, sizeof(list));
    make_events();
    open_with_io_fds(r, list, COUNT(list));
    greet_taking(r, 16);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        ck_assert_int_eq(ask_io_fds(r, cases[i].argsz, cases[i].flags, cases[i].index, cases[i].count), cases[i].err);
        if (cases[i].err)
            continue;
        ck_assert_uint_eq(r->client.have, HEADER + 16); /* a region without any */
        ck_assert_uint_eq(r->reply.u.region_io_fds.count, 0);
        ck_assert_uint_eq(r->reply.u.region_io_fds.argsz, 16);
        ck_assert_uint_eq(r->client.fd_count, 0);
    }
    rig_destroy(r);
}
END_TEST

/* No message has more descriptors than the client takes, which is one if it says nothing. */
START_TEST(no_more_descriptors_than_the_client_takes)
{
    static const struct {
        const char *json;
        int region_0, region_2;
        bool maps; /* BAR 2 can be mapped */
    } cases[] = {
        {NULL, -E2BIG, 0, true},
        {"{\"capabilities\":{\"max_msg_fds\":0}}", -E2BIG, -E2BIG, false},
        {"{\"capabilities\":{\"max_msg_fds\":1}}", -E2BIG, 0, true},
        {"{\"capabilities\":{\"max_msg_fds\":2}}", 0, 0, true},
        {"{\"capabilities\":{\"max_msg_fds\":100}}", 0, 0, true},
    };
    make_events();
    for (unsigned i = 0; i < COUNT(cases); i++) {
        rig *r = &the_rig;
        vfu_io_fd list[COUNT(io_fds)];
        memcpy(list, io_fds, sizeof(list));
        open_with_io_fds(r, list, COUNT(list));
        ck_assert_int_eq(ask_version(r, cases[i].json), 0);
        ck_assert_int_eq(ask_io_fds(r, 4096, 0, 0, 0), cases[i].region_0);
        ck_assert_int_eq(ask_io_fds(r, 4096, 0, 2, 0), cases[i].region_2);
        vfu_msg m = command(GET_REGIONS);
        m.u.region_info.argsz = 4096;
        m.u.region_info.index = 2;
        ck_assert_int_eq(ask(r, &m), 0);
        vfu_region_cap cap = {0};
        ck_assert_uint_eq((r->reply.u.region_info.flags & VFU_REGION_INFO_MMAP) != 0, cases[i].maps);
        ck_assert_uint_eq(vfu_msg_next_cap(&r->reply, &cap), cases[i].maps); /* areas of what can be mapped */
        ck_assert_uint_eq(r->client.fd_count, cases[i].maps);
        rig_destroy(r);
    }
}
END_TEST

START_TEST(io_fds_at_creation)
{
    static const struct {
        vfu_io_fd io;
        int err;
    } cases[] = {
        {{.region = 0, .offset = 4088, .size = 8}, 0},
        {{.region = 0, .offset = 4095, .size = 0}, 0},
        {{.region = 0, .offset = 4089, .size = 8}, -EINVAL},
        {{.region = 0, .offset = 4096, .size = 0}, -EINVAL},
        {{.region = 0, .offset = UINT64_MAX, .size = 2}, -EINVAL},
        {{.region = 0, .offset = 8, .size = UINT64_MAX}, -EINVAL},
        {{.region = 3, .offset = 0, .size = 0}, -EINVAL}, /* no such BAR */
        {{.region = 8, .offset = 0, .size = 4}, -EINVAL},
        {{.region = 9, .offset = 0, .size = 4}, -EINVAL},
        {{.region = 0xffffffff, .offset = 0, .size = 4}, -EINVAL},
    };
    rig *r = &the_rig;
    make_events();
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_dev_desc desc = rig_desc(r);
        vfu_io_fd io = with_event(cases[i].io);
        desc.io_fds = &io;
        desc.io_fd_count = 1;
        int err = vfu_dev_create(&r->dev, &desc);
        ck_assert_msg(err == cases[i].err, "case %u: %d", i, err);
        rig_destroy(r);
    }
    for (unsigned count = 16; count <= 17; count++) { /* descriptors of one region: as many as one message carries */
        vfu_dev_desc desc = rig_desc(r);
        vfu_io_fd many[17];
        for (unsigned i = 0; i < count; i++)
            many[i] = with_event((vfu_io_fd){.region = 0, .offset = i * 8, .size = 8, .fd = (int)i});
        desc.io_fds = many;
        desc.io_fd_count = count;
        ck_assert_int_eq(vfu_dev_create(&r->dev, &desc), count > 16 ? -EINVAL : 0);
        if (count == 16) {
            rig_connect(r);
            greet_taking(r, 16);
            ck_assert_int_eq(ask_io_fds(r, 4096, 0, 0, 0), 0);
            ck_assert_uint_eq(r->client.fd_count, 16);
            for (unsigned i = 0; i < count; i++)
                check_is_event(r->client.fds[i], events[i]);
        }
        rig_destroy(r);
    }
}
END_TEST

/* ---- regions of the device's own --------------------------------------------------------------------------------------- */

static uint8_t own_storage[4][65536];

static int own_read(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    rig *r = ctx;
    r->reads++;
    memcpy(buf, &own_storage[region - VFU_PCI_NUM_REGIONS][offset], len);
    return 0;
}

static int own_write(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    rig *r = ctx;
    r->writes++;
    memcpy(&own_storage[region - VFU_PCI_NUM_REGIONS][offset], buf, len);
    return 0;
}

enum { RW_FLAGS = VFU_REGION_INFO_READ | VFU_REGION_INFO_WRITE };

/* The reply to GET_REGION_INFO, byte by byte, for each argsz. */
typedef struct own_case {
    uint32_t index, flags, argsz_needed;
    uint64_t size, offset;
    uint32_t caps[16]; /* the capabilities as words */
} own_case;

static const own_case own_cases[] = {
    /* a type capability: id 2, version 1, next 0, type, subtype */
    {9, RW_FLAGS | VFU_REGION_INFO_CAPS, 48, 65536, 0, {2 | 1 << 16, 0, 0x80001234, 7}},
    {10, VFU_REGION_INFO_READ | VFU_REGION_INFO_CAPS, 48, 100, 0, {2 | 1 << 16, 0, 1, 0}},
    /* all of it can be mapped */
    {11, RW_FLAGS | VFU_REGION_INFO_MMAP | VFU_REGION_INFO_CAPS, 48, 8192, 4096, {2 | 1 << 16, 0, 1, 2}},
    /* two areas: a sparse mmap capability as well */
    {12,
     RW_FLAGS | VFU_REGION_INFO_MMAP | VFU_REGION_INFO_CAPS,
     96,
     65536,
     0,
     {2 | 1 << 16, 48, 1, 3, 1 | 1 << 16, 0, 2, 0, 4096, 0, 4096, 0, 16384, 0, 49152, 0}},
};

static void open_own(rig *r)
{
    static const vfu_wire_sparse_area areas[] = {{4096, 4096}, {16384, 49152}};
    static vfu_region_share whole, parts;
    static vfu_extra_region own[4];
    vfu_dev_desc desc = rig_desc(r);
    whole = (vfu_region_share){.fd = r->ram, .offset = 4096};
    parts = (vfu_region_share){.fd = r->ram, .areas = areas, .area_count = 2};
    own[0] = (vfu_extra_region){.size = 65536, .type = 0x80001234, .subtype = 7};
    own[1] = (vfu_extra_region){.size = 100, .type = 1, .read_only = true};
    own[2] = (vfu_extra_region){.size = 8192, .type = 1, .subtype = 2, .share = &whole};
    own[3] = (vfu_extra_region){.size = 65536, .type = 1, .subtype = 3, .share = &parts};
    desc.extra_regions = own;
    desc.extra_region_count = 4;
    desc.callbacks.region_read = own_read;
    desc.callbacks.region_write = own_write;
    open_desc(r, &desc);
    memset(own, 0xee, sizeof(own)); /* all was copied */
    memset(&whole, 0xee, sizeof(whole));
    memset(&parts, 0xee, sizeof(parts));
    greet(r);
}

static void check_own_info(rig *r, const own_case *c, uint32_t argsz)
{
    vfu_msg m = command(GET_REGIONS);
    vfu_wire_region_info want = {
        .argsz = c->argsz_needed, .flags = c->flags, .index = c->index, .size = c->size, .offset = c->offset};
    bool fits = argsz >= c->argsz_needed;
    m.u.region_info.argsz = argsz;
    m.u.region_info.index = c->index;
    ck_assert_int_eq(ask(r, &m), 0);
    want.cap_offset = fits ? 32 : 0;
    want.flags &= fits ? ~0u : ~VFU_REGION_INFO_CAPS; /* QEMU refuses CAPS without an offset */
    ck_assert_uint_eq(r->client.have, HEADER + (fits ? c->argsz_needed : 32));
    ck_assert_mem_eq(r->client.bytes + HEADER, &want, sizeof(want));
    if (fits && is_little_endian())
        ck_assert_mem_eq(r->client.bytes + HEADER + sizeof(want), c->caps, c->argsz_needed - 32);
    bool maps = fits && c->flags & VFU_REGION_INFO_MMAP;
    ck_assert_uint_eq(r->client.fd_count, maps);
    if (maps)
        ck_assert_uint_eq(ino_of(r->client.fds[0]), ino_of(r->ram));
}

START_TEST(own_regions_are_described)
{
    rig *r = &the_rig;
    open_own(r);
    vfu_msg info = command(VFU_CMD_DEVICE_GET_INFO);
    info.u.device_info.argsz = 16;
    ck_assert_int_eq(ask(r, &info), 0);
    ck_assert_uint_eq(r->reply.u.device_info.num_regions, 13);
    for (unsigned i = 0; i < COUNT(own_cases); i++)
        for (uint32_t argsz = 32; argsz < 100; argsz += 4)
            check_own_info(r, &own_cases[i], argsz);
    vfu_msg none = command(GET_REGIONS);
    none.u.region_info.argsz = 32;
    none.u.region_info.index = 13;
    ck_assert_int_eq(ask(r, &none), -EINVAL);
    rig_destroy(r);
}
END_TEST

START_TEST(own_regions_are_accessed)
{
    static const struct {
        uint32_t region;
        uint64_t offset;
        uint32_t count;
        int read, write;
    } cases[] = {
        {9, 0, 8, 0, 0},   {9, 65535, 1, 0, 0}, {9, 65535, 2, -EINVAL, -EINVAL}, {9, UINT64_MAX, 2, -EINVAL, -EINVAL},
        {10, 0, 100, 0, -EINVAL}, {10, 99, 2, -EINVAL, -EINVAL}, {11, 4000, 4192, 0, 0}, {12, 0, 65536, 0, 0},
        {13, 0, 1, -EINVAL, -EINVAL},
    };
    static uint8_t data[65536], back[65536];
    rig *r = &the_rig;
    open_own(r);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        memset(data, (int)i + 1, sizeof(data));
        unsigned reads = r->reads, writes = r->writes;
        ck_assert_int_eq(ask_write(r, cases[i].region, cases[i].offset, data, cases[i].count), cases[i].write);
        ck_assert_int_eq(ask_read(r, cases[i].region, cases[i].offset, back, cases[i].count), cases[i].read);
        ck_assert_uint_eq(r->writes - writes, !cases[i].write);
        ck_assert_uint_eq(r->reads - reads, !cases[i].read);
        if (!cases[i].read && !cases[i].write)
            ck_assert_mem_eq(back, data, cases[i].count);
    }
    rig_destroy(r);
}
END_TEST

START_TEST(own_regions_at_creation)
{
    static vfu_wire_sparse_area areas[65];
    rig *r = &the_rig;
    vfu_extra_region many[65];
    for (unsigned i = 0; i < COUNT(many); i++)
        many[i] = (vfu_extra_region){.size = 4096 * (i + 1), .type = i};
    for (unsigned i = 0; i < COUNT(areas); i++)
        areas[i] = (vfu_wire_sparse_area){.offset = i * UINT64_C(8192), .size = 4096};
    static const struct {
        uint32_t regions, areas;
        int err;
    } cases[] = {{0, 0, 0}, {64, 0, 0}, {65, 0, -EINVAL}, {1, 64, 0}, {1, 65, -EINVAL}};
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_dev_desc desc = rig_desc(r);
        heap h = {0};
        vfu_region_share share = {.fd = r->ram, .areas = areas, .area_count = cases[i].areas};
        many[0].size = 65 * 8192;
        many[0].share = cases[i].areas ? &share : NULL;
        desc.extra_regions = many;
        desc.extra_region_count = cases[i].regions;
        desc.alloc = heap_of(&h);
        ck_assert_int_eq(vfu_dev_create(&r->dev, &desc), cases[i].err);
        if (!cases[i].err) {
            rig_connect(r);
            greet(r);
            vfu_msg m = command(GET_REGIONS);
            m.u.region_info.argsz = 4096;
            m.u.region_info.index = 8 + cases[i].regions;
            ck_assert_int_eq(ask(r, &m), 0);
            ck_assert_uint_eq(r->reply.u.region_info.size, !cases[i].regions ? 0 : many[cases[i].regions - 1].size);
            ck_assert_uint_eq(r->reply.u.region_info.argsz, cases[i].areas ? 32 + 16 + 16 + 64 * 16 : cases[i].regions ? 48 : 32);
        }
        rig_destroy(r);
        ck_assert_uint_eq(h.live, 0);
    }
}
END_TEST

/* Creation with own regions, areas and I/O descriptors, where each allocation fails in turn. */
START_TEST(creation_without_memory)
{
    rig *r = &the_rig;
    make_events();
    for (unsigned long fail_at = 1;; fail_at++) {
        static const vfu_wire_sparse_area area = {.offset = 0, .size = 4096};
        vfu_dev_desc desc = rig_desc(r);
        heap h = {.fail_at = fail_at};
        vfu_region_share share = {.fd = r->ram, .areas = &area, .area_count = 1};
        vfu_extra_region own = {.size = 8192, .type = 1, .share = &share};
        vfu_io_fd io = with_event(io_fds[0]);
        desc.extra_regions = &own;
        desc.extra_region_count = 1;
        desc.io_fds = &io;
        desc.io_fd_count = 1;
        desc.alloc = heap_of(&h);
        int err = vfu_dev_create(&r->dev, &desc);
        bool failed = h.count >= fail_at;
        ck_assert_int_eq(err, failed ? -ENOMEM : 0);
        if (failed)
            ck_assert_ptr_null(r->dev);
        rig_destroy(r);
        ck_assert_uint_eq(h.live, 0);
        if (!failed)
            break;
        ck_assert_uint_lt(fail_at, 100);
    }
}
END_TEST

/* ---- the MSI-X table --------------------------------------------------------------------------------------------------- */

enum { VECTORS = 70, TABLE_AT = 0x80, PBA_AT = 0x800, PBA_LEN = 16, PBA_BAR = 5, TABLE_BAR = 4 };

typedef struct msix_model {
    bool masks; /* the policy */
    uint8_t table[VECTORS * 16];
    bool pending[VECTORS], enabled, all_masked, assigned[VECTORS];
    uint64_t signals[VECTORS];
    int fds[VECTORS];
} msix_model;

static bool model_masked(const msix_model *x, unsigned v)
{
    return x->masks && (!x->enabled || x->all_masked || x->table[v * 16 + 12] & 1);
}

static void model_signal(msix_model *x, unsigned v) { x->signals[v] += x->assigned[v]; }

static void model_update(msix_model *x)
{
    for (unsigned v = 0; v < VECTORS; v++) {
        if (x->pending[v] && !model_masked(x, v)) {
            x->pending[v] = false;
            model_signal(x, v);
        }
    }
}

/* As after a reset: all vectors masked if masks count. */
static void model_reset(msix_model *x)
{
    memset(x->table, 0, sizeof(x->table));
    for (unsigned v = 0; v < VECTORS; v++) {
        x->table[v * 16 + 12] = x->masks;
        x->pending[v] = false;
    }
    x->enabled = x->all_masked = false;
}

static void compare_msix(rig *r, msix_model *x)
{
    uint8_t table[VECTORS * 16], pba[PBA_LEN], want[PBA_LEN] = {0};
    for (unsigned v = 0; v < VECTORS; v++) {
        want[v / 8] |= (uint8_t)(x->pending[v] << v % 8);
        ck_assert_uint_eq(signals(x->fds[v]), x->signals[v]);
        x->signals[v] = 0;
    }
    ck_assert_int_eq(ask_read(r, TABLE_BAR, TABLE_AT, table, sizeof(table)), 0);
    ck_assert_int_eq(ask_read(r, PBA_BAR, PBA_AT, pba, sizeof(pba)), 0);
    ck_assert_mem_eq(table, x->table, sizeof(table));
    ck_assert_mem_eq(pba, want, sizeof(pba));
}

static void write_table(rig *r, msix_model *x, chance *c)
{
    uint8_t data[40];
    uint32_t at = below(c, sizeof(x->table)), len = 1 + below(c, sizeof(data));
    if (below(c, 2)) { /* a driver's access: the vector control word */
        at = below(c, VECTORS) * 16 + 12;
        len = 4;
    }
    if (len > sizeof(x->table) - at)
        len = (uint32_t)sizeof(x->table) - at;
    for (uint32_t i = 0; i < len; i++)
        data[i] = (uint8_t)draw(c);
    ck_assert_int_eq(ask_write(r, TABLE_BAR, TABLE_AT + at, data, len), 0);
    memcpy(x->table + at, data, len);
    model_update(x);
}

/* Message control: all of it, or just its upper byte. */
static void write_control(rig *r, msix_model *x, chance *c)
{
    uint32_t at = vfu_pci_capability(vfu_dev_pci(r->dev), 0x11) + 2u;
    uint32_t value = (below(c, 3) ? 0x8000u : 0) | (below(c, 3) ? 0 : 0x4000u);
    if (below(c, 2))
        ck_assert_int_eq(write_config(r, at, value | 0x3fff, 2), 0);
    else
        ck_assert_int_eq(write_config(r, at + 1, value >> 8, 1), 0);
    ck_assert_uint_eq(read_config(r, at, 2), value | (VECTORS - 1));
    x->enabled = value & 0x8000;
    x->all_masked = value & 0x4000;
    model_update(x);
}

static void raise_one(rig *r, msix_model *x, chance *c)
{
    unsigned v = below(c, VECTORS);
    int want = 0;
    if (model_masked(x, v))
        x->pending[v] = true;
    else if (x->assigned[v])
        model_signal(x, v);
    else
        want = -ENOENT;
    ck_assert_int_eq(vfu_dev_raise(r->dev, VFU_PCI_IRQ_MSIX, v), want);
}

static void assign_some(rig *r, msix_model *x, chance *c)
{
    uint32_t start = below(c, VECTORS), count = 1 + below(c, 16);
    bool on = below(c, 3) != 0;
    if (count > VECTORS - start)
        count = VECTORS - start;
    ck_assert_int_eq(ask_irqs(r, VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_TRIGGER, VFU_PCI_IRQ_MSIX, start, count, NULL,
                              x->fds + start, on ? count : 0),
                     0);
    for (uint32_t v = start; v < start + count; v++)
        x->assigned[v] = on;
}

/* The client's own trial of its eventfds passes the masks. */
static void loop_back(rig *r, msix_model *x, chance *c)
{
    uint32_t v = below(c, VECTORS);
    ck_assert_int_eq(ask_irqs(r, VFU_IRQ_SET_DATA_NONE | VFU_IRQ_SET_ACTION_TRIGGER, VFU_PCI_IRQ_MSIX, v, 1, NULL, NULL, 0), 0);
    model_signal(x, v);
}

static void reset_msix(rig *r, msix_model *x, chance *c)
{
    if (below(c, 2)) {
        vfu_msg m = command(VFU_CMD_DEVICE_RESET);
        ck_assert_int_eq(ask(r, &m), 0);
    } else {
        uint32_t at = vfu_pci_capability(vfu_dev_pci(r->dev), 0x10) + 8u;
        ck_assert_int_eq(write_config(r, at, 0x8000, 2), 0);
    }
    model_reset(x);
}

/* A client leaves: its interrupts and what was pending for it are gone, MSI-X is off; the table is as it was. */
static void change_client(rig *r, msix_model *x)
{
    compare_msix(r, x);
    rig_leave(r);
    memset(x->assigned, 0, sizeof(x->assigned));
    memset(x->pending, 0, sizeof(x->pending));
    x->enabled = false;
    rig_connect(r);
    greet_taking(r, 16);
    uint32_t at = vfu_pci_capability(vfu_dev_pci(r->dev), 0x11) + 2u;
    x->all_masked = read_config(r, at, 2) & 0x4000;
}

static void open_msix(rig *r, msix_model *x, bool masks)
{
    vfu_dev_desc desc = rig_desc(r);
    memset(x, 0, sizeof(*x));
    x->masks = masks;
    for (unsigned v = 0; v < VECTORS; v++)
        x->fds[v] = event();
    model_reset(x);
    desc.policy.msix_masks = masks;
    desc.pci.msix = (__typeof__(desc.pci.msix)){
        .vectors = VECTORS, .table_bar = TABLE_BAR, .pba_bar = PBA_BAR, .table_offset = TABLE_AT, .pba_offset = PBA_AT};
    open_desc(r, &desc);
    greet_taking(r, 16);
}

static void close_msix(rig *r, msix_model *x)
{
    for (unsigned v = 0; v < VECTORS; v++)
        close(x->fds[v]);
    rig_destroy(r);
}

/* Even loops with the policy, odd ones without. */
START_TEST(msix_like_the_model)
{
    static msix_model x;
    rig *r = &the_rig;
    chance c = seeded((uint64_t)_i + 7);
    open_msix(r, &x, _i % 2 == 0);
    for (unsigned i = 0; i < 1500; i++) {
        switch (below(&c, 40)) {
        case 0: reset_msix(r, &x, &c); break;
        case 1: change_client(r, &x); break;
        case 2:
        case 3:
        case 4: write_control(r, &x, &c); break;
        case 5:
        case 6:
        case 7:
        case 8: assign_some(r, &x, &c); break;
        case 9: loop_back(r, &x, &c); break;
        case 10: compare_msix(r, &x); break;
        case 11: { /* the PBA is read-only */
            uint8_t ones[PBA_LEN];
            memset(ones, 0xff, sizeof(ones));
            ck_assert_int_eq(ask_write(r, PBA_BAR, PBA_AT + below(&c, 8), ones, 1 + below(&c, 8)), 0);
            break;
        }
        default:
            if (below(&c, 2))
                write_table(r, &x, &c);
            else
                raise_one(r, &x, &c);
        }
    }
    compare_msix(r, &x);
    ck_assert_uint_eq(r->reads + r->writes, 0); /* the device has nothing to do with it */
    close_msix(r, &x);
}
END_TEST

/* Each way of masking by itself: held back, shown, delivered once on unmask. */
START_TEST(msix_masks_one_by_one)
{
    static const struct {
        const char *name;
        bool masks, enabled, all_masked, vector_masked, held;
    } cases[] = {
        {"nothing masked", true, true, false, false, false}, {"vector", true, true, false, true, true},
        {"function", true, true, true, false, true},         {"both", true, true, true, true, true},
        {"disabled", true, false, false, false, true},       {"no policy, vector", false, true, false, true, false},
        {"no policy, function", false, true, true, false, false}, {"no policy, disabled", false, false, false, false, false},
    };
    static msix_model x;
    rig *r = &the_rig;
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint8_t pba[PBA_LEN], control = cases[i].vector_masked;
        open_msix(r, &x, cases[i].masks);
        uint32_t at = vfu_pci_capability(vfu_dev_pci(r->dev), 0x11) + 2u, v = 65;
        ck_assert_int_eq(
            ask_irqs(r, VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_TRIGGER, VFU_PCI_IRQ_MSIX, v, 1, NULL, x.fds + v, 1),
            0);
        ck_assert_int_eq(ask_write(r, TABLE_BAR, TABLE_AT + v * 16 + 12, &control, 1), 0);
        write_config(r, at, (cases[i].enabled ? 0x8000u : 0) | (cases[i].all_masked ? 0x4000u : 0), 2);
        for (unsigned times = 0; times < 3; times++)
            ck_assert_int_eq(vfu_dev_raise(r->dev, VFU_PCI_IRQ_MSIX, v), 0);
        ck_assert_msg(signals(x.fds[v]) == (cases[i].held ? 0 : 3), "%s", cases[i].name);
        ck_assert_int_eq(ask_read(r, PBA_BAR, PBA_AT, pba, sizeof(pba)), 0);
        for (unsigned b = 0; b < PBA_LEN; b++)
            ck_assert_uint_eq(pba[b], cases[i].held && b == v / 8 ? 1u << v % 8 : 0);
        control = 0;
        ck_assert_int_eq(ask_write(r, TABLE_BAR, TABLE_AT + v * 16 + 12, &control, 1), 0);
        write_config(r, at, 0x8000, 2);
        ck_assert_msg(signals(x.fds[v]) == (cases[i].held ? 1 : 0), "%s", cases[i].name);
        ck_assert_int_eq(ask_read(r, PBA_BAR, PBA_AT, pba, sizeof(pba)), 0);
        ck_assert_uint_eq(pba[v / 8], 0);
        close_msix(r, &x);
    }
}
END_TEST

/* ---- the other kinds of interrupt, and the hooks of the configuration space -------------------------------------------- */

static vfu_dev_desc msi_desc(rig *r)
{
    vfu_dev_desc desc = rig_desc(r);
    desc.pci.msi.vectors = 8;
    desc.pci.msi.mask = true;
    return desc;
}

START_TEST(each_index_is_raised)
{
    static const struct {
        uint32_t index, vector;
        int err; /* without an eventfd */
    } cases[] = {
        {VFU_PCI_IRQ_INTX, 0, -EINVAL},
        {VFU_PCI_IRQ_MSI, 0, -ENOENT},
        {VFU_PCI_IRQ_MSI, 7, -ENOENT},
        {VFU_PCI_IRQ_MSI, 8, -EINVAL},
        {VFU_PCI_IRQ_MSIX, 3, -ENOENT},
        {VFU_PCI_IRQ_MSIX, 4, -EINVAL},
        {VFU_PCI_IRQ_ERR, 0, -ENOENT},
        {VFU_PCI_IRQ_ERR, 1, -EINVAL},
        {VFU_PCI_IRQ_REQ, 0, -ENOENT},
        {VFU_PCI_IRQ_REQ, 1, -EINVAL},
        {5, 0, -EINVAL},
        {UINT32_MAX, 0, -EINVAL},
        {VFU_PCI_IRQ_MSI, UINT32_MAX, -EINVAL},
    };
    rig *r = &the_rig;
    vfu_dev_desc desc = msi_desc(r);
    open_desc(r, &desc);
    greet(r);
    int fd = event();
    for (unsigned i = 0; i < COUNT(cases); i++) {
        ck_assert_int_eq(vfu_dev_raise(r->dev, cases[i].index, cases[i].vector), cases[i].err);
        if (cases[i].err == -EINVAL)
            continue;
        uint32_t flags = VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_TRIGGER;
        ck_assert_int_eq(ask_irqs(r, flags, cases[i].index, cases[i].vector, 1, NULL, &fd, 1), 0);
        ck_assert_int_eq(vfu_dev_raise(r->dev, cases[i].index, cases[i].vector), 0);
        ck_assert_uint_eq(signals(fd), 1);
        ck_assert_int_eq(ask_irqs(r, flags, cases[i].index, cases[i].vector, 1, NULL, NULL, 0), 0);
        ck_assert_int_eq(vfu_dev_raise(r->dev, cases[i].index, cases[i].vector), -ENOENT);
        ck_assert_uint_eq(signals(fd), 0);
    }
    close(fd);
    rig_destroy(r);
}
END_TEST

typedef struct hook {
    uint32_t offset, len;
    uint8_t data[8];
    unsigned calls;
    int result;
} hook;

static hook the_hook;

static int writing(void *ctx, uint32_t offset, const void *buf, uint32_t len)
{
    (void)ctx;
    the_hook.calls++;
    the_hook.offset = offset;
    the_hook.len = len;
    ck_assert_uint_le(len, sizeof(the_hook.data));
    memcpy(the_hook.data, buf, len);
    return the_hook.result;
}

/* The hook before a write may refuse it, and then nothing has changed; the one after it says what has. */
START_TEST(config_hooks)
{
    static const struct {
        uint32_t offset, value, width, changed;
    } cases[] = {
        {0x04, 0x0406, 2, VFU_PCI_CHANGED_COMMAND}, {0x10, 0xfeb00000, 4, VFU_PCI_CHANGED_BAR}, {0x3c, 11, 1, 0},
        {0x30, 0xfe000001, 4, VFU_PCI_CHANGED_BAR}, {0x00, 0xffff, 2, 0},
    };
    rig *r = &the_rig;
    for (unsigned complete = 0; complete < 2; complete++) {
        vfu_dev_desc desc = msi_desc(r);
        desc.callbacks.config_writing = writing;
        desc.policy.complete_accesses = complete != 0;
        open_desc(r, &desc);
        greet(r);
        for (unsigned i = 0; i < COUNT(cases); i++) {
            uint32_t before = read_config(r, cases[i].offset, cases[i].width);
            the_hook = (hook){.result = -EPERM};
            r->configs = 0;
            ck_assert_int_eq(write_config(r, cases[i].offset, cases[i].value, cases[i].width), complete ? 0 : -EPERM);
            ck_assert_uint_eq(the_hook.calls, 1);
            ck_assert_uint_eq(the_hook.offset, cases[i].offset);
            ck_assert_uint_eq(the_hook.len, cases[i].width);
            for (uint32_t k = 0; k < cases[i].width; k++)
                ck_assert_uint_eq(the_hook.data[k], cases[i].value >> 8 * k & 0xff);
            ck_assert_uint_eq(read_config(r, cases[i].offset, cases[i].width), before);
            ck_assert_uint_eq(r->configs, 0);
            the_hook.result = 0;
            ck_assert_int_eq(write_config(r, cases[i].offset, cases[i].value, cases[i].width), 0);
            ck_assert_uint_eq(r->configs, cases[i].changed != 0);
            if (cases[i].changed)
                ck_assert_uint_eq(r->last_changed, cases[i].changed);
        }
        uint32_t msi = vfu_pci_capability(vfu_dev_pci(r->dev), 0x05);
        ck_assert_int_eq(write_config(r, msi + 2, 1, 2), 0);
        ck_assert_uint_eq(r->last_changed, VFU_PCI_CHANGED_MSI);
        ck_assert(vfu_pci_msi_enabled(vfu_dev_pci(r->dev)));
        rig_destroy(r);
    }
}
END_TEST

/* ---- policies ---------------------------------------------------------------------------------------------------------- */

/* A line of the memory map: the n-th one of a file. False: there are fewer. */
static bool vma_of(const char *name, unsigned n, uint64_t *size, char access[5])
{
    char line[512];
    bool found = false;
    FILE *maps = fopen("/proc/self/maps", "re");
    ck_assert_ptr_nonnull(maps);
    while (!found && fgets(line, sizeof(line), maps)) {
        unsigned long long first, end;
        if (!strstr(line, name) || n--)
            continue;
        ck_assert_int_eq(sscanf(line, "%llx-%llx %4s", &first, &end, access), 3);
        *size = end - first;
        found = true;
    }
    fclose(maps);
    return found;
}

/* With map_exactly each mapping has its own pages and access, and they go with it; without, there is one of the whole file. */
START_TEST(mappings_exactly_or_not)
{
    enum { FILE_SIZE = 64 * PAGE };
    static const struct {
        uint64_t offset, size;
        uint32_t flags;
    } maps[] = {{0, PAGE, RW}, {8 * PAGE, 3 * PAGE, VFU_DMA_READABLE}, {32 * PAGE, 4 * PAGE, RW}};
    rig *r = &the_rig;
    for (unsigned exactly = 0; exactly < 2; exactly++) {
        uint64_t size;
        char access[5];
        vfu_dev_desc desc = rig_desc(r);
        desc.policy.map_exactly = exactly != 0;
        open_desc(r, &desc);
        greet(r);
        int fd = memfd("exactly", FILE_SIZE, 0);
        for (unsigned i = 0; i < COUNT(maps); i++)
            ck_assert_int_eq(ask_map(r, i << 20, maps[i].size, maps[i].flags, fd, maps[i].offset), 0);
        ck_assert_uint_eq(vmas_of("memfd:exactly"), exactly ? COUNT(maps) : 1);
        uint64_t sum = 0;
        unsigned read_only = 0;
        for (unsigned n = 0; vma_of("memfd:exactly", n, &size, access); n++) {
            sum += size;
            read_only += strcmp(access, "r--s") == 0;
        }
        ck_assert_uint_eq(sum, exactly ? 8 * PAGE : FILE_SIZE);
        ck_assert_uint_eq(read_only, exactly);
        for (unsigned i = 0; i < COUNT(maps); i++) { /* it is the right memory */
            uint32_t seen = 0, sent = 0xabcd0000 + i;
            ck_assert_int_eq(pwrite(fd, &sent, 4, (off_t)(maps[i].offset + 8)), 4);
            ck_assert_int_eq(vfu_iommu_read(vfu_dev_reader(r->dev), (i << 20) + 8, &seen, 4), 0);
            ck_assert_uint_eq(seen, sent);
        }
        ck_assert_int_eq(ask_unmap(r, 1 << 20, 3 * PAGE, 0), 0);
        ck_assert_uint_eq(vmas_of("memfd:exactly"), exactly ? 2 : 1);
        ck_assert_int_eq(ask_unmap(r, 0, 4 << 20, 0), 0);
        ck_assert_uint_eq(vmas_of("memfd:exactly"), 0);
        close(fd);
        rig_destroy(r);
    }
}
END_TEST

START_TEST(never_maps)
{
    rig *r = &the_rig;
    vfu_dev_desc desc = rig_desc(r);
    vfu_iommu_mapping mapping;
    uint8_t byte;
    desc.policy.no_mmap = true;
    open_desc(r, &desc);
    greet(r);
    int fd = memfd("never", 16 * PAGE, 0);
    unsigned fds = fds_open();
    ck_assert_int_eq(ask_map(r, 0, 4 * PAGE, RW, fd, 0), 0);
    ck_assert_int_eq(ask_map(r, 1 << 20, 64 * PAGE, VFU_DMA_READABLE, fd, 0), 0); /* nobody looks how long the file is */
    ck_assert_uint_eq(fds_open(), fds);
    ck_assert_uint_eq(vmas_of("memfd:never"), 0);
    ck_assert_int_eq(vfu_iommu_next(vfu_dev_iommu(r->dev), 0, &mapping), 1);
    ck_assert_ptr_nonnull(mapping.io);
    ck_assert_ptr_null(mapping.host);
    ck_assert_int_eq(vfu_iommu_read(vfu_dev_reader(r->dev), 0, &byte, 1), -EDEADLK); /* by this thread, which polls */
    vfu_dma dma = {.iova = 16, .buf = &byte, .len = 1, .done = NULL};
    ck_assert_int_eq(vfu_dev_dma(r->dev, &dma), 1);
    ck_assert_int_eq(rig_receive(r), 1);
    ck_assert_uint_eq(r->reply.cmd, VFU_CMD_DMA_READ);
    vfu_dev_dma_cancel(r->dev, &dma);
    close(fd);
    rig_destroy(r);
}
END_TEST

START_TEST(unmap_exactly_or_not)
{
    static const struct {
        uint64_t iova, size;
        uint32_t flags;
        int usual, exact;
        unsigned usual_left, exact_left; /* of the mappings [0, 1), [1, 3), [8, 9) in pages */
    } cases[] = {
        {0, PAGE, 0, 0, 0, 2, 2},
        {PAGE, 2 * PAGE, 0, 0, 0, 2, 2},
        {PAGE, PAGE, 0, -EINVAL, -ENOENT, 3, 3},
        {0, 3 * PAGE, 0, 0, -ENOENT, 1, 3},
        {0, 0x80000000, 0, 0, -ENOENT, 0, 3},
        {4 * PAGE, PAGE, 0, 0, -ENOENT, 3, 3},
        {7 * PAGE, 2 * PAGE, 0, 0, -ENOENT, 2, 3},
        {8 * PAGE, 2 * PAGE, 0, 0, -ENOENT, 2, 3},
        {UINT64_C(1) << 47, UINT64_C(1) << 47, 0, 0, -ENOENT, 3, 3},
        {0, 0, VFU_DMA_UNMAP_ALL, 0, 0, 0, 0},
        {0, 0, 0, -EINVAL, -ENOENT, 3, 3},
        {PAGE, 0, VFU_DMA_UNMAP_ALL, -EINVAL, -EINVAL, 3, 3},
        {0, PAGE, VFU_DMA_UNMAP_ALL, -EINVAL, -EINVAL, 3, 3},
        {0, PAGE, VFU_DMA_UNMAP_GET_DIRTY_BITMAP, -EINVAL, -EINVAL, 3, 3},
        {0, PAGE, 4, -EINVAL, -EINVAL, 3, 3},
    };
    rig *r = &the_rig;
    for (unsigned i = 0; i < COUNT(cases); i++) {
        for (unsigned exact = 0; exact < 2; exact++) {
            vfu_dev_desc desc = rig_desc(r);
            desc.policy.exact_unmap = exact != 0;
            open_desc(r, &desc);
            greet(r);
            ck_assert_int_eq(ask_map(r, 0, PAGE, RW, -1, 0), 0);
            ck_assert_int_eq(ask_map(r, PAGE, 2 * PAGE, RW, -1, 0), 0);
            ck_assert_int_eq(ask_map(r, 8 * PAGE, PAGE, RW, -1, 0), 0);
            bool bitmap = cases[i].flags == VFU_DMA_UNMAP_GET_DIRTY_BITMAP;
            uint64_t words[2] = {PAGE, 8};
            vfu_msg m = command(VFU_CMD_DMA_UNMAP);
            m.u.dma_unmap.argsz = 48;
            m.u.dma_unmap.flags = cases[i].flags;
            m.u.dma_unmap.address = cases[i].iova;
            m.u.dma_unmap.size = cases[i].size;
            m.u.dma_unmap.data = bitmap ? (const uint8_t *)words : NULL;
            m.u.dma_unmap.data_len = bitmap ? sizeof(words) : 0;
            int err = ask(r, &m);
            ck_assert_msg(err == (exact ? cases[i].exact : cases[i].usual), "case %u, %u: %d", i, exact, err);
            ck_assert_uint_eq(mappings(r->dev), exact ? cases[i].exact_left : cases[i].usual_left);
            if (!err) {
                ck_assert_uint_eq(r->client.have, 40); /* Cloud Hypervisor reads as much */
                ck_assert_uint_eq(r->reply.u.dma_unmap.address, cases[i].iova);
                ck_assert_uint_eq(r->reply.u.dma_unmap.size, cases[i].size);
            }
            rig_destroy(r);
        }
    }
}
END_TEST

/* With complete_accesses no access to a region is answered with an error, but for one that no message could carry. */
START_TEST(accesses_that_fail)
{
    enum { XFER = 8192 };
    static const struct {
        uint32_t region;
        uint64_t offset;
        uint32_t count;
        int refuse; /* what the device says */
        int usual;
        bool too_long;
    } cases[] = {
        {0, 0, 4, 0, 0, false},       {0, 0, 4, -EIO, -EIO, false},        {0, 4096, 1, 0, -EINVAL, false},
        {0, 4095, 2, 0, -EINVAL, false}, {0, UINT64_MAX, 4, 0, -EINVAL, false}, {3, 0, 4, 0, -EINVAL, false},
        {8, 0, 1, 0, -EINVAL, false}, {9, 0, 4, 0, -EINVAL, false},        {0xffffffff, 0, 4, 0, -EINVAL, false},
        {7, 4096, 4, 0, -EINVAL, false}, {7, 4092, 8, 0, -EINVAL, false},  {2, 0, XFER, -EPERM, -EPERM, false},
        {2, 0, XFER + 1, 0, -EINVAL, true},
    };
    rig *r = &the_rig;
    static uint8_t data[XFER + 1];
    for (unsigned complete = 0; complete < 2; complete++) {
        vfu_dev_desc desc = rig_desc(r);
        desc.policy.complete_accesses = complete != 0;
        desc.max_data_xfer_size = XFER;
        open_desc(r, &desc);
        greet(r);
        for (unsigned i = 0; i < COUNT(cases); i++) {
            int want = complete && !cases[i].too_long ? 0 : cases[i].usual;
            r->refuse = cases[i].refuse;
            memset(data, 0x55, sizeof(data));
            int err = ask_read(r, cases[i].region, cases[i].offset, data, cases[i].count);
            ck_assert_msg(err == want, "read %u: %d", i, err);
            for (uint32_t k = 0; !err && cases[i].usual && k < cases[i].count; k++)
                ck_assert_uint_eq(data[k], 0xff);
            memset(data, 0x55, sizeof(data));
            err = ask_write(r, cases[i].region, cases[i].offset, data, cases[i].count);
            ck_assert_msg(err == want, "write %u: %d", i, err);
        }
        ck_assert_uint_eq(r->storage[2][0], 0);
        vfu_wire_write_one entries[] = {{.region = 0, .offset = 8, .count = 1, .data = {1}},
                                        {.region = 3, .count = 1},
                                        {.region = 0, .offset = 9, .count = 1, .data = {2}}};
        vfu_msg m = command(VFU_CMD_REGION_WRITE_MULTI);
        r->refuse = 0;
        m.u.write_multi.count = COUNT(entries);
        m.u.write_multi.data = (const uint8_t *)entries;
        m.u.write_multi.data_len = sizeof(entries);
        ck_assert_int_eq(ask(r, &m), complete ? 0 : -EINVAL);
        ck_assert_uint_eq(r->storage[0][8], 1);
        ck_assert_uint_eq(r->storage[0][9], complete ? 2 : 0);
        rig_destroy(r);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("device: regions");
    TCase *io = tcase_create("descriptors for I/O");
    tcase_add_test(io, io_fds_by_the_book);
    tcase_add_test(io, io_fds_that_do_not_fit);
    tcase_add_test(io, io_fds_refused);
    tcase_add_test(io, no_more_descriptors_than_the_client_takes);
    tcase_add_test(io, io_fds_at_creation);
    suite_add_tcase(suite, io);
    TCase *own = tcase_create("regions of its own");
    tcase_add_test(own, own_regions_are_described);
    tcase_add_test(own, own_regions_are_accessed);
    tcase_add_test(own, own_regions_at_creation);
    tcase_add_test(own, creation_without_memory);
    suite_add_tcase(suite, own);
    TCase *irqs = tcase_create("interrupts");
    tcase_add_loop_test(irqs, msix_like_the_model, 0, 8);
    tcase_add_test(irqs, msix_masks_one_by_one);
    tcase_add_test(irqs, each_index_is_raised);
    tcase_add_test(irqs, config_hooks);
    suite_add_tcase(suite, irqs);
    TCase *policies = tcase_create("policies");
    tcase_add_test(policies, mappings_exactly_or_not);
    tcase_add_test(policies, never_maps);
    tcase_add_test(policies, unmap_exactly_or_not);
    tcase_add_test(policies, accesses_that_fail);
    suite_add_tcase(suite, policies);
    return run_suite(suite);
}
