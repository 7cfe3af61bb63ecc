/* SPDX-License-Identifier: MIT */
/*
 * ==== device ==== answers that come later
 *
 * Callbacks that return VFU_PENDING: every command that may, every way to complete it, and what the client may do meanwhile.
 * Random
 * streams of requests, cut anywhere and completed at any time, are compared with a model that knows nothing of waiting.
 */
#include "util.h"

/* How a callback answers: part of the request, so that the model knows it as well. */
typedef enum way { AT_ONCE = 0, REFUSED = 1, LATER = 2, LATER_REFUSED = 3 } way;
enum { WAY_SHIFT = 10, REFUSAL = -EACCES, LATE_REFUSAL = -ENXIO };

static way way_of(uint64_t offset) { return (way)(offset >> WAY_SHIFT & 3); }
static bool is_late(way w) { return w == LATER || w == LATER_REFUSED; }
static int result_of(way w) { return w == REFUSED ? REFUSAL : w == LATER_REFUSED ? LATE_REFUSAL : 0; }
static uint8_t sample(uint64_t offset, size_t i) { return (uint8_t)(offset * 7 + i * 3 + 1); }

enum { JOURNAL = 4096, ARCS = 512 };

/* What the device has done: each write as its offset and first byte, each migration arc. */
typedef struct journal {
    unsigned count;
    uint32_t entries[JOURNAL];
} journal;

static void note(journal *j, uint32_t entry)
{
    ck_assert_uint_lt(j->count, JOURNAL);
    j->entries[j->count++] = entry;
}

static uint32_t write_entry(uint64_t offset, const uint8_t *data) { return (uint32_t)offset << 8 | data[0]; }
static uint32_t arc_entry(uint32_t from, uint32_t to) { return UINT32_C(0x80000000) | from << 8 | to; }

/* The device: a rig whose callbacks do what the request says. */
typedef struct slow {
    rig r;
    journal done;
    uint64_t ticket; /* 0: nothing is pending */
    uint64_t offset; /* of the pending access */
    size_t wanted;   /* bytes that the pending read gives */
    way pending;
    way arcs[ARCS]; /* how arc number n is answered */
    unsigned arc;
    bool complete_inside; /* complete before the callback returns */
} slow;

static int complete(slow *s)
{
    uint8_t data[256];
    int result = result_of(s->pending);
    for (size_t i = 0; i < s->wanted; i++)
        data[i] = sample(s->offset, i);
    uint64_t ticket = s->ticket;
    s->ticket = 0;
    return vfu_dev_complete(s->r.dev, ticket, result, s->wanted && !result ? data : NULL, result ? 0 : s->wanted);
}

static int postpone(slow *s, way w, uint64_t offset, size_t wanted)
{
    ck_assert_uint_eq(s->ticket, 0); /* no other request while one is pending */
    s->ticket = vfu_dev_ticket(s->r.dev);
    ck_assert_uint_ne(s->ticket, 0);
    ck_assert_uint_eq(vfu_dev_ticket(s->r.dev), s->ticket);
    s->offset = offset;
    s->wanted = wanted;
    s->pending = w;
    if (s->complete_inside)
        ck_assert_int_eq(complete(s), 0);
    return VFU_PENDING;
}

static int slow_read(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    slow *s = ctx;
    way w = way_of(offset);
    (void)region;
    if (is_late(w)) {
        memset(buf, 0xee, len); /* must never be seen */
        return postpone(s, w, offset, len);
    }
    for (size_t i = 0; i < len; i++)
        ((uint8_t *)buf)[i] = sample(offset, i);
    return result_of(w);
}

static int slow_write(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    slow *s = ctx;
    way w = way_of(offset);
    (void)region, (void)len;
    note(&s->done, write_entry(offset, buf));
    return is_late(w) ? postpone(s, w, offset, 0) : result_of(w);
}

static int slow_change(void *ctx, vfu_mig_state from, vfu_mig_state to)
{
    slow *s = ctx;
    ck_assert_uint_lt(s->arc, ARCS);
    way w = s->arcs[s->arc++];
    note(&s->done, arc_entry(from, to));
    return is_late(w) ? postpone(s, w, 0, 0) : result_of(w);
}

static vfu_dev_desc slow_desc(slow *s)
{
    memset(s, 0, sizeof(*s));
    vfu_dev_desc desc = rig_desc(&s->r);
    desc.ctx = s;
    desc.callbacks = (vfu_dev_callbacks){.region_read = slow_read, .region_write = slow_write};
    desc.migration = (vfu_migration){.pre_copy = true, .change = slow_change};
    return desc;
}

static void slow_open_desc(slow *s, const vfu_dev_desc *desc)
{
    rig_create(&s->r, desc);
    rig_connect(&s->r);
    greet(&s->r);
}

static void slow_open(slow *s)
{
    vfu_dev_desc desc = slow_desc(s);
    slow_open_desc(s, &desc);
}

static slow the_slow;

/* ---- requests ---------------------------------------------------------------------------------------------------------- */

static vfu_msg read_of(uint64_t offset, uint32_t count)
{
    vfu_msg m = command(VFU_CMD_REGION_READ);
    m.u.region.offset = offset;
    m.u.region.count = count;
    return m;
}

static vfu_msg write_of(uint64_t offset, const uint8_t *data, uint32_t count)
{
    vfu_msg m = command(VFU_CMD_REGION_WRITE);
    m.u.region.offset = offset;
    m.u.region.count = m.u.region.data_len = count;
    m.u.region.data = data;
    return m;
}

/* data: 8 bytes that the message borrows */
static vfu_msg state_of(uint32_t state, uint8_t data[8])
{
    vfu_msg m = command(VFU_CMD_DEVICE_FEATURE);
    vfu_wire_feature_mig_state wire = {.state = state};
    m.u.feature.flags = VFU_FEATURE_SET | VFU_FEATURE_MIG_STATE;
    ck_assert_int_eq(vfu_feature_set_mig_state(&m, &wire, data, 8), 0);
    return m;
}

/* entries: as many as count */
static vfu_msg multi_of(const vfu_wire_write_one *entries, uint64_t count)
{
    vfu_msg m = command(VFU_CMD_REGION_WRITE_MULTI);
    m.u.write_multi.count = count;
    m.u.write_multi.data = (const uint8_t *)entries;
    m.u.write_multi.data_len = (uint32_t)(count * sizeof(*entries));
    return m;
}

static vfu_msg info_of(void)
{
    vfu_msg m = command(VFU_CMD_DEVICE_GET_INFO);
    m.u.device_info.argsz = 16;
    return m;
}

static void send_request(rig *r, vfu_msg *m, const int *fds, unsigned fd_count)
{
    size_t len;
    m->id = ++r->id;
    const uint8_t *bytes = encoded(m, &len);
    rig_send(r, bytes, len, fds, fd_count);
}

/* The reply to the request with this id has come: 0 or its errno. */
static int reply_to(rig *r, uint16_t id, uint16_t cmd)
{
    vfu_msg request = {.id = id, .cmd = cmd};
    ck_assert_int_eq(rig_receive(r), 1);
    return check_reply(r, &request);
}

/* ---- one request ------------------------------------------------------------------------------------------------------- */

typedef enum kind { READ, WRITE, MULTI, STATE, KINDS } kind;

/* A request of that kind that is answered in way w. The views live in static memory. */
static vfu_msg request_of(slow *s, kind k, way w)
{
    static const uint8_t data[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    static uint8_t state[8];
    static vfu_wire_write_one entries[3];
    uint64_t offset = (uint64_t)w << WAY_SHIFT;
    switch (k) {
    case READ: return read_of(offset, 8);
    case WRITE: return write_of(offset, data, 8);
    case MULTI:
        for (unsigned i = 0; i < COUNT(entries); i++) {
            entries[i] = (vfu_wire_write_one){.offset = i == 1 ? offset : 0, .count = 8};
            memcpy(entries[i].data, data, 8);
        }
        return multi_of(entries, COUNT(entries));
    default:
        s->arcs[s->arc] = w;
        return state_of(VFU_MIG_STATE_STOP, state);
    }
}

/* The reply that came is right for that request. */
static void check_answer(slow *s, kind k, way w)
{
    static const uint16_t cmds[KINDS] = {VFU_CMD_REGION_READ, VFU_CMD_REGION_WRITE, VFU_CMD_REGION_WRITE_MULTI,
                                         VFU_CMD_DEVICE_FEATURE};
    rig *r = &s->r;
    ck_assert_int_eq(reply_to(r, r->id, cmds[k]), result_of(w));
    if (result_of(w))
        return;
    if (k == READ)
        for (size_t i = 0; i < 8; i++)
            ck_assert_uint_eq(r->reply.u.region.data[i], sample((uint64_t)w << WAY_SHIFT, i));
    if (k == MULTI)
        ck_assert_uint_eq(r->reply.u.write_multi.count, 3);
    if (k == STATE)
        ck_assert_int_eq(vfu_dev_migration_state(r->dev), VFU_MIG_STATE_STOP);
}

/* Every kind of request, every way, completed inside of the callback and by the thread that polls. */
START_TEST(each_request_each_way)
{
    slow *s = &the_slow;
    for (kind k = READ; k < KINDS; k++) {
        for (way w = AT_ONCE; w <= LATER_REFUSED; w++) {
            for (unsigned inside = 0; inside < 2; inside++) {
                slow_open(s);
                s->complete_inside = inside != 0;
                vfu_msg m = request_of(s, k, w);
                send_request(&s->r, &m, NULL, 0);
                if (is_late(w) && !inside) {
                    ck_assert_uint_ne(s->ticket, 0);
                    check_silent(&s->r);
                    ck_assert_int_eq(complete(s), 0);
                }
                check_answer(s, k, w);
                check_silent(&s->r);
                ck_assert_uint_eq(s->done.count, k == READ ? 0 : k == MULTI ? result_of(w) ? 2 : 3 : 1);
                check_healthy(&s->r);
                rig_destroy(&s->r);
            }
        }
    }
}
END_TEST

/* A change of the migration state that ends, later, in no valid state. */
START_TEST(a_state_that_is_lost)
{
    slow *s = &the_slow;
    slow_open(s);
    vfu_msg m = request_of(s, STATE, LATER);
    send_request(&s->r, &m, NULL, 0);
    ck_assert_int_eq(vfu_dev_complete(s->r.dev, s->ticket, -ENOTRECOVERABLE, NULL, 0), 0);
    ck_assert_int_eq(reply_to(&s->r, m.id, VFU_CMD_DEVICE_FEATURE), -ENOTRECOVERABLE);
    ck_assert_int_eq(vfu_dev_migration_state(s->r.dev), VFU_MIG_STATE_ERROR);
    check_healthy(&s->r);
    rig_destroy(&s->r);
}
END_TEST

/* A command that must not be answered isn't, but those behind it wait. */
START_TEST(posted_writes_wait_too)
{
    slow *s = &the_slow;
    for (way w = LATER; w <= LATER_REFUSED; w++) {
        slow_open(s);
        vfu_msg posted = request_of(s, WRITE, w), info = info_of();
        posted.flags = VFU_HDR_NO_REPLY;
        send_request(&s->r, &posted, NULL, 0);
        send_request(&s->r, &info, NULL, 0);
        check_silent(&s->r);
        ck_assert_int_eq(complete(s), 0);
        ck_assert_int_eq(reply_to(&s->r, info.id, VFU_CMD_DEVICE_GET_INFO), 0);
        check_silent(&s->r);
        rig_destroy(&s->r);
    }
}
END_TEST

/* ---- tickets ----------------------------------------------------------------------------------------------------------- */

START_TEST(only_the_right_completion_counts)
{
    static const struct {
        int64_t ticket_off; /* added to the ticket */
        size_t len;
        int result, expected;
    } cases[] = {
        {1, 8, 0, -ECANCELED},  {-1, 8, 0, -ECANCELED}, {INT64_C(1) << 40, 8, 0, -ECANCELED},
        {0, 7, 0, -EINVAL},     {0, 9, 0, -EINVAL},     {0, 0, 0, -EINVAL},
        {0, 8, 0, 0},           {0, 8, 0, -ECANCELED},  {0, 0, -EIO, -ECANCELED},
    };
    slow *s = &the_slow;
    uint8_t data[16];
    slow_open(s);
    vfu_msg m = request_of(s, READ, LATER);
    send_request(&s->r, &m, NULL, 0);
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = sample(s->offset, i);
    ck_assert_int_eq(vfu_dev_complete(s->r.dev, 0, 0, data, 8), -ECANCELED);
    for (unsigned i = 0; i < COUNT(cases); i++)
        ck_assert_int_eq(
            vfu_dev_complete(s->r.dev, s->ticket + (uint64_t)cases[i].ticket_off, cases[i].result, data, cases[i].len),
            cases[i].expected);
    check_answer(s, READ, LATER);
    ck_assert_int_eq(vfu_dev_complete(s->r.dev, s->ticket, 0, data, 8), -ECANCELED);
    check_silent(&s->r);
    check_healthy(&s->r);
    rig_destroy(&s->r);
}
END_TEST

/* A callback takes a ticket and then answers at once: the ticket is void. */
static int change_of_mind(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    slow *s = ctx;
    (void)region, (void)buf, (void)len;
    s->ticket = vfu_dev_ticket(s->r.dev);
    return offset ? -EPERM : 0;
}

START_TEST(a_ticket_without_pending_is_void)
{
    slow *s = &the_slow;
    uint8_t byte = 1;
    vfu_dev_desc desc = slow_desc(s);
    desc.callbacks.region_write = change_of_mind;
    slow_open_desc(s, &desc);
    for (unsigned i = 0; i < 2; i++) {
        ck_assert_int_eq(ask_write(&s->r, 0, i, &byte, 1), i ? -EPERM : 0);
        ck_assert_uint_ne(s->ticket, 0);
        ck_assert_int_eq(vfu_dev_complete(s->r.dev, s->ticket, 0, NULL, 0), -ECANCELED);
        check_silent(&s->r);
    }
    rig_destroy(&s->r);
}
END_TEST

/* ---- the client meanwhile ---------------------------------------------------------------------------------------------- */

/* Nothing behind a pending request is handled, whatever it is; then everything is, in order. */
START_TEST(commands_wait_in_order)
{
    enum { READS = 20 };
    slow *s = &the_slow;
    uint16_t ids[READS];
    slow_open(s);
    int fd = memfd("pending", PAGE, 0);
    vfu_msg first = request_of(s, READ, LATER);
    send_request(&s->r, &first, NULL, 0);
    for (unsigned i = 0; i < READS; i++) {
        uint8_t byte = (uint8_t)i;
        vfu_msg m = write_of(i, &byte, 1);
        send_request(&s->r, &m, NULL, 0);
        ids[i] = m.id;
    }
    vfu_msg map = command(VFU_CMD_DMA_MAP);
    map.u.dma_map.flags = RW;
    map.u.dma_map.size = PAGE;
    send_request(&s->r, &map, &fd, 1);
    vfu_msg bad = {.cmd = VFU_CMD_REGION_READ, .u.region = {.region = 77, .count = 1}};
    send_request(&s->r, &bad, NULL, 0);
    check_silent(&s->r);
    ck_assert_uint_eq(s->done.count, 0);
    ck_assert_uint_eq(mappings(s->r.dev), 0);
    ck_assert_int_eq(complete(s), 0);
    ck_assert_int_eq(reply_to(&s->r, first.id, VFU_CMD_REGION_READ), 0);
    for (unsigned i = 0; i < READS; i++)
        ck_assert_int_eq(reply_to(&s->r, ids[i], VFU_CMD_REGION_WRITE), 0);
    ck_assert_int_eq(reply_to(&s->r, map.id, VFU_CMD_DMA_MAP), 0);
    ck_assert_int_eq(reply_to(&s->r, bad.id, VFU_CMD_REGION_READ), -EINVAL);
    ck_assert_uint_eq(s->done.count, READS);
    for (unsigned i = 0; i < READS; i++)
        ck_assert_uint_eq(s->done.entries[i], i << 8 | i);
    vfu_iommu_mapping mapping; /* its descriptor has waited with it */
    ck_assert_int_eq(vfu_iommu_next(vfu_dev_iommu(s->r.dev), 0, &mapping), 1);
    ck_assert_ptr_nonnull(mapping.host);
    close(fd);
    rig_destroy(&s->r);
}
END_TEST

/* A client that never stops asking is not received from for ever; what it has sent is handled in the end. */
START_TEST(more_commands_than_fit)
{
    enum { SIZE = 32 + 4096, TOTAL = 1000 };
    static uint8_t bytes[SIZE];
    slow *s = &the_slow;
    unsigned sent = 0, answered = 0;
    size_t part = 0;
    slow_open(s);
    vfu_msg first = request_of(s, READ, LATER);
    send_request(&s->r, &first, NULL, 0);
    vfu_msg m = command(VFU_CMD_REGION_WRITE);
    m.u.region = (__typeof__(m.u.region)){.region = 2, .count = 4096, .data = bytes, .data_len = 4096};
    size_t len;
    const uint8_t *message = encoded(&m, &len);
    ck_assert_uint_eq(len, SIZE);
    bool full = false;
    while (!full) {
        int64_t n = send_some(s->r.client.sock, message + part, SIZE - part, NULL, 0);
        if (n == -EAGAIN) {
            settle(s->r.dev);
            n = send_some(s->r.client.sock, message + part, SIZE - part, NULL, 0);
            full = n == -EAGAIN;
        }
        part += n > 0 ? (size_t)n : 0;
        sent += part == SIZE;
        part %= SIZE;
        ck_assert_uint_lt(sent, TOTAL); /* 1 MiB and a socket's buffer */
    }
    ck_assert_uint_gt(sent, 200);
    ck_assert_uint_eq(s->done.count, 0);
    ck_assert_int_eq(complete(s), 0);
    ck_assert_int_eq(reply_to(&s->r, first.id, VFU_CMD_REGION_READ), 0);
    rig_send(&s->r, message + part, part ? SIZE - part : 0, NULL, 0);
    for (sent += part != 0; answered < sent; answered++)
        ck_assert_int_eq(reply_to(&s->r, 0, VFU_CMD_REGION_WRITE), 0);
    check_silent(&s->r);
    ck_assert_uint_eq(s->done.count, sent);
    rig_destroy(&s->r);
}
END_TEST

/* ---- DMA meanwhile ----------------------------------------------------------------------------------------------------- */

typedef struct transfer {
    vfu_dma dma;
    int result; /* 1: not yet */
} transfer;

static void transfer_done(vfu_dma *dma, int result) { ((transfer *)dma->user)->result = result; }

static void start_read(vfu_dev *dev, transfer *t, uint64_t iova, void *buf, size_t len)
{
    *t = (transfer){.dma = {.iova = iova, .buf = buf, .len = len, .done = transfer_done, .user = t}, .result = 1};
    ck_assert_int_eq(vfu_dev_dma(dev, &t->dma), 1);
}

/* Receives a DMA_READ and makes its reply, by the book, of bytes that are never 0. */
static size_t read_reply(rig *r, uint8_t *out, size_t room)
{
    static uint8_t data[128 << 10];
    ck_assert_int_eq(rig_receive(r), 1);
    ck_assert_uint_eq(r->reply.cmd, VFU_CMD_DMA_READ);
    vfu_msg reply;
    vfu_msg_init_reply(&reply, &r->reply, 0);
    reply.u.dma.address = r->reply.u.dma.address;
    reply.u.dma.count = r->reply.u.dma.count;
    reply.u.dma.data = data;
    reply.u.dma.data_len = (uint32_t)reply.u.dma.count;
    for (uint32_t i = 0; i < reply.u.dma.data_len; i++)
        data[i] = (uint8_t)((reply.u.dma.address + i) % 251 + 1);
    int len = vfu_msg_encode(&reply, out, room);
    must(len);
    return (size_t)len;
}

static void check_read(const uint8_t *buf, uint64_t iova, size_t len)
{
    for (size_t i = 0; i < len; i++)
        ck_assert_uint_eq(buf[i], (iova + i) % 251 + 1);
}

/* Replies to DMA messages are found behind whatever waits, and the transfer ends before the request is completed. */
START_TEST(dma_goes_on)
{
    static const struct {
        const char *name;
        unsigned small, with_fds, large; /* commands in front of the reply */
        size_t cut;                      /* the reply comes in two pieces, cut here; 0: in one */
    } cases[] = {
        {"nothing in front", 0, 0, 0, 0}, {"one command", 1, 0, 0, 0},        {"many commands", 300, 0, 0, 0},
        {"large ones", 0, 0, 8, 0},       {"a cut header", 3, 0, 0, 7},       {"a cut body", 3, 0, 1, 100},
        {"descriptors", 0, 4, 0, 0},      {"many descriptors", 5, 44, 1, 50},
    };
    static uint8_t reply[(128 << 10) + 64], buf[8192], payload[65536];
    for (unsigned c = 0; c < COUNT(cases); c++) {
        slow *s = &the_slow;
        transfer t;
        uint16_t first_id;
        slow_open(s);
        int fd = memfd("pending", PAGE, 0);
        ck_assert_int_eq(ask_map(&s->r, UINT64_C(1) << 32, 1 << 20, RW, -1, 0), 0);
        vfu_msg m = request_of(s, READ, LATER);
        send_request(&s->r, &m, NULL, 0);
        first_id = m.id;
        start_read(s->r.dev, &t, (UINT64_C(1) << 32) + 5, buf, sizeof(buf));
        size_t len = read_reply(&s->r, reply, sizeof(reply));
        for (unsigned i = 0; i < cases[c].small; i++) {
            vfu_msg info = info_of();
            send_request(&s->r, &info, NULL, 0);
        }
        for (unsigned i = 0; i < cases[c].large; i++) {
            vfu_msg large = command(VFU_CMD_REGION_WRITE);
            large.u.region = (__typeof__(large.u.region)){.region = 2, .count = 65536, .data = payload, .data_len = 65536};
            send_request(&s->r, &large, NULL, 0);
        }
        for (unsigned i = 0; i < cases[c].with_fds; i++) {
            vfu_msg map = command(VFU_CMD_DMA_MAP);
            map.u.dma_map.flags = RW;
            map.u.dma_map.address = i * (uint64_t)PAGE;
            map.u.dma_map.size = PAGE;
            send_request(&s->r, &map, &fd, 1);
        }
        if (cases[c].cut) {
            rig_send(&s->r, reply, cases[c].cut, NULL, 0);
            ck_assert_int_eq(t.result, 1);
        }
        rig_send(&s->r, reply + cases[c].cut, len - cases[c].cut, NULL, 0);
        ck_assert_msg(t.result == 0, "%s: the transfer has not ended", cases[c].name);
        check_read(buf, (UINT64_C(1) << 32) + 5, sizeof(buf));
        ck_assert_uint_eq(s->done.count, 0);
        check_silent(&s->r);
        ck_assert_int_eq(complete(s), 0);
        ck_assert_int_eq(reply_to(&s->r, first_id, VFU_CMD_REGION_READ), 0);
        for (unsigned i = 0; i < cases[c].small + cases[c].large + cases[c].with_fds; i++) {
            ck_assert_int_eq(rig_receive(&s->r), 1);
            ck_assert_uint_eq(s->r.reply.id, (uint16_t)(first_id + 1 + i)); /* the commands in order */
            ck_assert(!vfu_msg_is_error(&s->r.reply));
        }
        ck_assert_uint_eq(mappings(s->r.dev), 1 + cases[c].with_fds);
        close(fd);
        rig_destroy(&s->r);
    }
}
END_TEST

/* A transfer whose end completes the request: the DMA message and its reply pass the request that waits for them. */
typedef struct fetch {
    slow *s;
    transfer t;
    uint8_t buf[8];
} fetch;

static void fetched(vfu_dma *dma, int result)
{
    fetch *f = dma->user;
    f->t.result = result;
    ck_assert_int_eq(vfu_dev_complete(f->s->r.dev, f->s->ticket, result, result ? NULL : f->buf, result ? 0 : sizeof(f->buf)), 0);
    f->s->ticket = 0;
}

static fetch the_fetch;

static int fetching_read(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    slow *s = ctx;
    fetch *f = &the_fetch;
    (void)region, (void)offset, (void)buf;
    ck_assert_uint_eq(len, 8);
    *f = (fetch){.s = s, .t = {.dma = {.iova = 0x1000, .buf = f->buf, .len = 8, .done = fetched, .user = f}, .result = 1}};
    int result = vfu_dev_dma(s->r.dev, &f->t.dma);
    if (result <= 0)
        return result;
    s->ticket = vfu_dev_ticket(s->r.dev);
    return VFU_PENDING;
}

START_TEST(a_read_that_needs_dma)
{
    slow *s = &the_slow;
    uint8_t reply[128];
    vfu_dev_desc desc = slow_desc(s);
    desc.callbacks.region_read = fetching_read;
    slow_open_desc(s, &desc);
    ck_assert_int_eq(ask_map(&s->r, 0x1000, PAGE, RW, -1, 0), 0);
    vfu_msg m = read_of(0, 8);
    send_request(&s->r, &m, NULL, 0);
    size_t len = read_reply(&s->r, reply, sizeof(reply));
    rig_send(&s->r, reply, len, NULL, 0);
    ck_assert_int_eq(reply_to(&s->r, m.id, VFU_CMD_REGION_READ), 0);
    check_read(s->r.reply.u.region.data, 0x1000, 8);

    /* the client refuses: so is the read */
    send_request(&s->r, &m, NULL, 0);
    ck_assert_int_eq(rig_receive(&s->r), 1);
    vfu_msg refusal;
    vfu_msg_init_reply(&refusal, &s->r.reply, EFAULT);
    const uint8_t *bytes = encoded(&refusal, &len);
    rig_send(&s->r, bytes, len, NULL, 0);
    ck_assert_int_eq(reply_to(&s->r, m.id, VFU_CMD_REGION_READ), -EIO);
    check_healthy(&s->r);
    rig_destroy(&s->r);
}
END_TEST

/* ---- the client leaves ------------------------------------------------------------------------------------------------- */

static unsigned fds_at_start;

static void connect_again(slow *s)
{
    rig_connect(&s->r);
    greet(&s->r);
}

enum { DEPARTURES = 3 }; /* it closes, breaks the protocol, closes after the completion */

/* Its request is forgotten, whenever it is completed, and the next client's requests have other tickets. */
START_TEST(a_client_that_leaves)
{
    fds_at_start = fds_open();
    for (kind k = READ; k < KINDS; k++) {
        for (unsigned how = 0; how < DEPARTURES; how++) {
            slow *s = &the_slow;
            static const uint32_t no_message[4] = {0, 3, 0, 0};
            slow_open(s);
            vfu_msg m = request_of(s, k, LATER);
            send_request(&s->r, &m, NULL, 0);
            uint64_t old = s->ticket;
            if (how == 1) {
                vfu_msg info = info_of();
                send_request(&s->r, &info, NULL, 0); /* never handled */
                rig_send(&s->r, no_message, sizeof(no_message), NULL, 0);
                check_closed(&s->r);
            } else if (how == 2) {
                ck_assert_int_eq(complete(s), 0);
            }
            rig_leave(&s->r);
            ck_assert_int_eq(vfu_dev_poll(s->r.dev), -ENOTCONN);
            ck_assert_int_eq(vfu_dev_complete(s->r.dev, old, 0, NULL, k == READ ? 8 : 0), -ECANCELED);
            s->ticket = 0;
            s->done.count = 0;

            connect_again(s);
            ck_assert_int_eq(vfu_dev_migration_state(s->r.dev), VFU_MIG_STATE_RUNNING);
            m = request_of(s, k, LATER);
            send_request(&s->r, &m, NULL, 0);
            ck_assert_uint_ne(s->ticket, old);
            ck_assert_int_eq(vfu_dev_complete(s->r.dev, old, -EIO, NULL, 0), -ECANCELED);
            check_silent(&s->r);
            ck_assert_int_eq(complete(s), 0);
            check_answer(s, k, LATER);
            rig_destroy(&s->r);
        }
    }
    ck_assert_uint_eq(fds_open(), fds_at_start);
}
END_TEST

/* The device ends while a request is pending and others wait with descriptors. */
START_TEST(a_device_that_ends)
{
    fds_at_start = fds_open();
    slow *s = &the_slow;
    heap h = {0};
    vfu_dev_desc desc = slow_desc(s);
    desc.alloc = heap_of(&h);
    slow_open_desc(s, &desc);
    int fd = memfd("pending", PAGE, 0);
    vfu_msg m = request_of(s, MULTI, LATER), map = command(VFU_CMD_DMA_MAP);
    send_request(&s->r, &m, NULL, 0);
    map.u.dma_map.size = PAGE;
    send_request(&s->r, &map, &fd, 1);
    close(fd);
    rig_destroy(&s->r);
    ck_assert_uint_eq(h.live, 0);
    ck_assert_uint_eq(fds_open(), fds_at_start);
}
END_TEST

/* ---- policies ---------------------------------------------------------------------------------------------------------- */

/* With complete_accesses an access that fails late is as complete as one that fails at once. */
START_TEST(complete_accesses)
{
    for (way w = AT_ONCE; w <= LATER_REFUSED; w++) {
        slow *s = &the_slow;
        uint8_t byte = 1;
        vfu_dev_desc desc = slow_desc(s);
        desc.policy.complete_accesses = true;
        slow_open_desc(s, &desc);
        uint64_t offset = (uint64_t)w << WAY_SHIFT;
        vfu_msg requests[] = {read_of(offset, 5), write_of(offset, &byte, 1), request_of(s, MULTI, w)};
        for (unsigned i = 0; i < COUNT(requests); i++) {
            send_request(&s->r, &requests[i], NULL, 0);
            if (is_late(w))
                ck_assert_int_eq(complete(s), 0);
            ck_assert_int_eq(reply_to(&s->r, requests[i].id, requests[i].cmd), 0);
            for (size_t at = 0; i == 0 && at < 5; at++)
                ck_assert_uint_eq(s->r.reply.u.region.data[at], result_of(w) ? 0xff : sample(offset, at));
            if (i == 2)
                ck_assert_uint_eq(s->r.reply.u.write_multi.count, 3);
        }
        ck_assert_uint_eq(s->done.count, 4);
        rig_destroy(&s->r);
    }
}
END_TEST

/* ---- random streams ---------------------------------------------------------------------------------------------------- */

enum { STREAM = 1 << 17, COMMANDS = 120 };

/* What a stream consists of, what must come back, and what the device must have done. */
typedef struct script {
    uint8_t sent[STREAM], expected[STREAM];
    size_t sent_len, expected_len;
    journal done;
    vfu_mig_state state;
    unsigned arc;
    uint64_t iova;
} script;

static script the_script;

static void put(uint8_t *out, size_t *len, const vfu_msg *m)
{
    int n = vfu_msg_encode(m, out + *len, STREAM - *len);
    must(n);
    *len += (size_t)n;
}

/* The model: a request and the reply that it gets. */
static void add(script *x, vfu_msg *m, vfu_msg *reply, int err)
{
    vfu_msg refusal;
    m->id = reply->id = (uint16_t)(x->sent_len * 31);
    put(x->sent, &x->sent_len, m);
    if (m->flags & VFU_HDR_NO_REPLY)
        return;
    vfu_msg_init_reply(&refusal, m, err);
    put(x->expected, &x->expected_len, err ? &refusal : reply);
}

static void add_read(script *x, chance *c)
{
    uint8_t data[64];
    vfu_msg m = read_of(below(c, 4096 - 64), 1 + below(c, 64)), reply;
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = sample(m.u.region.offset, i);
    vfu_msg_init_reply(&reply, &m, 0);
    reply.u.region = m.u.region;
    reply.u.region.data = data;
    reply.u.region.data_len = m.u.region.count;
    add(x, &m, &reply, result_of(way_of(m.u.region.offset)));
}

static void add_write(script *x, chance *c)
{
    uint8_t data[64];
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)draw(c);
    vfu_msg m = write_of(below(c, 4096 - 64), data, 1 + below(c, 64)), reply;
    vfu_msg_init_reply(&reply, &m, 0);
    reply.u.region = m.u.region;
    reply.u.region.data = NULL;
    reply.u.region.data_len = 0;
    m.flags |= below(c, 3) ? 0 : VFU_HDR_NO_REPLY;
    note(&x->done, write_entry(m.u.region.offset, data));
    add(x, &m, &reply, result_of(way_of(m.u.region.offset)));
}

static void add_multi(script *x, chance *c)
{
    vfu_wire_write_one entries[6];
    uint64_t count = below(c, COUNT(entries) + 1), done = 0;
    int err = 0;
    for (unsigned i = 0; i < count; i++) {
        entries[i] = (vfu_wire_write_one){.offset = below(c, 4096 - 8), .count = 1 + below(c, 8)};
        for (unsigned b = 0; b < 8; b++)
            entries[i].data[b] = (uint8_t)draw(c);
        if (below(c, 3)) /* so that most go on to the next */
            entries[i].offset &= ~(UINT64_C(1) << WAY_SHIFT);
        if (err)
            continue;
        note(&x->done, write_entry(entries[i].offset, entries[i].data));
        err = result_of(way_of(entries[i].offset));
        done += !err;
    }
    vfu_msg m = multi_of(entries, count), reply;
    vfu_msg_init_reply(&reply, &m, 0);
    reply.u.write_multi.count = done;
    add(x, &m, &reply, err);
}

/* Between STOP and RUNNING there is one arc. */
static void add_state(script *x, slow *s, chance *c)
{
    uint8_t data[8];
    vfu_mig_state to = x->state == VFU_MIG_STATE_STOP ? VFU_MIG_STATE_RUNNING : VFU_MIG_STATE_STOP;
    vfu_msg m = state_of(to, data), reply;
    int err = result_of(s->arcs[x->arc++] = (way)below(c, 4));
    note(&x->done, arc_entry(x->state, to));
    x->state = err ? x->state : to;
    vfu_msg_init_reply(&reply, &m, 0);
    reply.u.feature = m.u.feature;
    add(x, &m, &reply, err);
}

static void add_map(script *x)
{
    vfu_msg m = command(VFU_CMD_DMA_MAP), reply;
    m.u.dma_map.argsz = 32;
    m.u.dma_map.flags = RW;
    m.u.dma_map.address = x->iova;
    m.u.dma_map.size = PAGE;
    x->iova += PAGE;
    vfu_msg_init_reply(&reply, &m, 0);
    add(x, &m, &reply, 0);
}

static void add_unknown(script *x)
{
    vfu_msg m = read_of(4096, 1), reply;
    vfu_msg_init_reply(&reply, &m, 0);
    add(x, &m, &reply, -EINVAL);
}

static void write_script(script *x, slow *s, chance *c)
{
    memset(x, 0, sizeof(*x));
    x->state = VFU_MIG_STATE_RUNNING;
    for (unsigned i = 0; i < COMMANDS; i++) {
        switch (below(c, 8)) {
        case 0: add_state(x, s, c); break;
        case 1: add_map(x); break;
        case 2: add_unknown(x); break;
        case 3: add_multi(x, c); break;
        case 4:
        case 5: add_write(x, c); break;
        default: add_read(x, c); break;
        }
    }
}

/* Receives what there is and compares it. */
static void compare_replies(script *x, slow *s, size_t *received)
{
    while (rig_receive(&s->r) == 1) {
        ck_assert_uint_le(*received + s->r.client.have, x->expected_len);
        ck_assert_mem_eq(s->r.client.bytes, x->expected + *received, s->r.client.have);
        *received += s->r.client.have;
    }
}

START_TEST(random_streams)
{
    slow *s = &the_slow;
    script *x = &the_script;
    chance c = seeded((uint64_t)_i + 1);
    size_t sent = 0, received = 0;
    slow_open(s);
    write_script(x, s, &c);
    while (sent < x->sent_len || s->ticket) {
        size_t piece = 1 + below(&c, below(&c, 4) ? 50 : 5000);
        switch (below(&c, 4)) {
        case 0:
            if (s->ticket)
                ck_assert_int_eq(complete(s), 0);
            settle(s->r.dev); /* and the next that takes a ticket takes it */
            break;
        case 1: compare_replies(x, s, &received); break;
        case 2: s->complete_inside = below(&c, 3) == 0; break;
        default:
            piece = piece < x->sent_len - sent ? piece : x->sent_len - sent;
            rig_send(&s->r, x->sent + sent, piece, NULL, 0);
            sent += piece;
            break;
        }
    }
    compare_replies(x, s, &received);
    ck_assert_uint_eq(received, x->expected_len);
    ck_assert_uint_eq(s->done.count, x->done.count);
    ck_assert_mem_eq(s->done.entries, x->done.entries, x->done.count * sizeof(x->done.entries[0]));
    ck_assert_int_eq(vfu_dev_migration_state(s->r.dev), x->state);
    ck_assert_uint_eq(mappings(s->r.dev), x->iova / PAGE);
    rig_destroy(&s->r);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("device: answers that come later");
    TCase *one = tcase_create("one request");
    tcase_add_test(one, each_request_each_way);
    tcase_add_test(one, a_state_that_is_lost);
    tcase_add_test(one, posted_writes_wait_too);
    tcase_add_test(one, only_the_right_completion_counts);
    tcase_add_test(one, a_ticket_without_pending_is_void);
    tcase_add_test(one, complete_accesses);
    suite_add_tcase(suite, one);
    TCase *meanwhile = tcase_create("meanwhile");
    tcase_add_test(meanwhile, commands_wait_in_order);
    tcase_add_test(meanwhile, more_commands_than_fit);
    tcase_add_test(meanwhile, dma_goes_on);
    tcase_add_test(meanwhile, a_read_that_needs_dma);
    suite_add_tcase(suite, meanwhile);
    TCase *leaving = tcase_create("leaving");
    tcase_add_test(leaving, a_client_that_leaves);
    tcase_add_test(leaving, a_device_that_ends);
    suite_add_tcase(suite, leaving);
    TCase *streams = tcase_create("random streams");
    tcase_add_loop_test(streams, random_streams, 0, 60);
    suite_add_tcase(suite, streams);
    return run_suite(suite);
}
