/* SPDX-License-Identifier: MIT */
/*
 * ==== device ==== DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE
 *
 * What each feature takes and gives, byte by byte; every pair of migration states against a search of the specification's
 * arcs, with a
 * failure at every arc; the dirty log against a plain array of pages, with memory of every kind.
 */
#include "util.h"

enum { MAX_ARCS = 16, STATES = 8 };

/* The device: a rig that records the arcs that it is taken along. */
typedef struct mover {
    rig r;
    unsigned arcs;
    vfu_mig_state from[MAX_ARCS], to[MAX_ARCS];
    unsigned fail_at; /* the arc that fails, counted from 1; 0: none */
    int failure;
    uint8_t stream[8192]; /* what it saves, or has restored */
    size_t saved, stream_len;
    int read_result, write_result; /* 0, or what fails them */
    unsigned calls; /* of read and write */
    vfu_mig_state state_at_reset;
} mover;

static int mover_change(void *ctx, vfu_mig_state from, vfu_mig_state to)
{
    mover *m = ctx;
    ck_assert_uint_lt(m->arcs, MAX_ARCS);
    ck_assert_int_eq(vfu_dev_migration_state(m->r.dev), from);
    m->from[m->arcs] = from;
    m->to[m->arcs++] = to;
    return m->arcs == m->fail_at ? m->failure : 0;
}

static int64_t mover_read(void *ctx, void *buf, size_t len)
{
    mover *m = ctx;
    size_t left = m->stream_len - m->saved, part = len < left ? len : left;
    m->calls++;
    if (m->read_result)
        return m->read_result;
    memcpy(buf, m->stream + m->saved, part);
    m->saved += part;
    return (int64_t)part;
}

static int mover_write(void *ctx, const void *buf, size_t len)
{
    mover *m = ctx;
    m->calls++;
    if (m->write_result)
        return m->write_result;
    ck_assert_uint_le(len, sizeof(m->stream) - m->stream_len);
    memcpy(m->stream + m->stream_len, buf, len);
    m->stream_len += len;
    return 0;
}

static void mover_reset(void *ctx, vfu_reset_kind kind)
{
    mover *m = ctx;
    m->r.resets++;
    m->r.last_reset = kind;
    m->state_at_reset = vfu_dev_migration_state(m->r.dev);
}

static vfu_dev_desc mover_desc(mover *m, bool pre_copy)
{
    memset(m, 0, sizeof(*m));
    vfu_dev_desc desc = rig_desc(&m->r);
    desc.ctx = m;
    desc.callbacks = (vfu_dev_callbacks){.work = rig_work, .reset = mover_reset}; /* the rig is the mover's beginning */
    desc.migration = (vfu_migration){.pre_copy = pre_copy, .change = mover_change, .read = mover_read, .write = mover_write};
    return desc;
}

static void mover_open_desc(mover *m, const vfu_dev_desc *desc)
{
    rig_create(&m->r, desc);
    rig_connect(&m->r);
    greet(&m->r);
}

static void mover_open(mover *m, bool pre_copy)
{
    vfu_dev_desc desc = mover_desc(m, pre_copy);
    mover_open_desc(m, &desc);
}

static mover the_mover;

/* ---- requests ---------------------------------------------------------------------------------------------------------- */

/* Written by hand, since the encoder refuses flags that mean nothing. */
static int ask_feature(rig *r, uint32_t flags, uint32_t argsz, const void *data, uint32_t data_len)
{
    uint8_t bytes[512];
    vfu_wire_feature feature = {.argsz = argsz, .flags = flags};
    vfu_msg request = command(VFU_CMD_DEVICE_FEATURE);
    uint32_t size = (uint32_t)(sizeof(vfu_wire_header) + sizeof(feature)) + data_len;
    request.id = ++r->id;
    vfu_wire_header header = {.id = request.id, .cmd = request.cmd, .size = size};
    ck_assert_uint_le(size, sizeof(bytes));
    memcpy(bytes, &header, sizeof(header));
    memcpy(bytes + sizeof(header), &feature, sizeof(feature));
    if (data_len)
        memcpy(bytes + sizeof(header) + sizeof(feature), data, data_len);
    rig_send(r, bytes, size, NULL, 0);
    ck_assert_int_eq(rig_receive(r), 1);
    return check_reply(r, &request);
}

static int set_state(rig *r, uint32_t state)
{
    vfu_wire_feature_mig_state wire = {.state = state, .data_fd = -1};
    int err = ask_feature(r, VFU_FEATURE_SET | VFU_FEATURE_MIG_STATE, 16, &wire, sizeof(wire));
    if (!err) { /* "the same as the request payload" */
        ck_assert_uint_eq(r->client.have, 32);
        ck_assert_mem_eq(r->client.bytes + 24, &wire, sizeof(wire));
    }
    return err;
}

/* The state that GET says, which is the one that the device itself is told. */
static vfu_mig_state get_state(rig *r)
{
    vfu_wire_feature_mig_state wire;
    ck_assert_int_eq(ask_feature(r, VFU_FEATURE_GET | VFU_FEATURE_MIG_STATE, 16, NULL, 0), 0);
    ck_assert_int_eq(vfu_feature_mig_state(&r->reply, &wire), 0);
    ck_assert_uint_eq(wire.state, (uint32_t)vfu_dev_migration_state(r->dev));
    return (vfu_mig_state)wire.state;
}

static int device_reset(rig *r)
{
    vfu_msg m = command(VFU_CMD_DEVICE_RESET);
    return ask(r, &m);
}

/* ---- what a feature takes ---------------------------------------------------------------------------------------------- */

enum { GET = VFU_FEATURE_GET, SET = VFU_FEATURE_SET, PROBE = VFU_FEATURE_PROBE };

typedef struct feature_case {
    uint32_t flags, argsz;
    uint32_t data_len; /* of the request, zeros */
    int err;
    int32_t reply_len;   /* of the feature's own data; -1: the request's payload comes back */
    uint32_t reply_word; /* the first 4 bytes of that data */
} feature_case;

/* Of a device that can migrate, with PRE_COPY, in RUNNING, with no log. */
static const feature_case of_all[] = {
    {GET | 1, 16, 0, 0, 8, VFU_MIG_STOP_COPY | VFU_MIG_PRE_COPY},
    {GET | 1, 4096, 0, 0, 8, VFU_MIG_STOP_COPY | VFU_MIG_PRE_COPY},
    {GET | 1, 15, 0, -EINVAL, 0, 0},
    {GET | 1, 0, 0, -EINVAL, 0, 0},
    {SET | 1, 16, 8, -EINVAL, 0, 0},
    {PROBE | 1, 8, 0, 0, -1, 0},
    {PROBE | GET | 1, 8, 0, 0, -1, 0},
    {PROBE | SET | 1, 8, 0, -EINVAL, 0, 0},
    {PROBE | GET | SET | 1, 8, 0, -EINVAL, 0, 0},
    {GET | 2, 16, 0, 0, 8, VFU_MIG_STATE_RUNNING},
    {GET | 2, 16, 8, 0, 8, VFU_MIG_STATE_RUNNING},
    {GET | 2, 12, 0, -EINVAL, 0, 0},
    {SET | 2, 16, 7, -EINVAL, 0, 0},
    {SET | 2, 16, 0, -EINVAL, 0, 0},
    {SET | 2, 16, 8, -EINVAL, 0, 0}, /* ERROR is no state to ask for */
    {PROBE | 2, 8, 0, 0, -1, 0},
    {PROBE | GET | SET | 2, 8, 0, 0, -1, 0},
    {PROBE | SET | 2, 16, 8, 0, -1, 0}, /* the data isn't used */
    {PROBE | SET | 2, 4096, 0, 0, -1, 0},
    {PROBE | SET | 6, 8, 0, 0, -1, 0},
    {PROBE | GET | 6, 8, 0, -EINVAL, 0, 0},
    {GET | 6, 32, 16, -EINVAL, 0, 0},
    {SET | 6, 24, 15, -EINVAL, 0, 0},
    {PROBE | SET | 7, 8, 0, 0, -1, 0},
    {SET | 7, 8, 0, -EINVAL, 0, 0},
    {GET | 7, 8, 0, -EINVAL, 0, 0},
    {PROBE | GET | 8, 8, 0, 0, -1, 0},
    {PROBE | SET | 8, 8, 0, -EINVAL, 0, 0},
    {SET | 8, 32, 24, -EINVAL, 0, 0},
    {GET | 8, 32, 23, -EINVAL, 0, 0},
    {GET | SET | 2, 16, 8, -EINVAL, 0, 0}, /* mutually exclusive */
    {2, 16, 8, -EINVAL, 0, 0},
    {GET | 2 | 0x80000, 16, 0, -EINVAL, 0, 0},
    {GET | 2 | 0x80000000, 16, 0, -EINVAL, 0, 0},
};

/* Features that nobody has. */
static const uint32_t absent[] = {0, 3, 4, 5, 9, 10, 255, 256, 0x8001, 0xffff};

static void check_feature(rig *r, const feature_case *c)
{
    static const uint8_t zeros[64];
    int err = ask_feature(r, c->flags, c->argsz, zeros, c->data_len);
    ck_assert_msg(err == c->err, "flags %#x argsz %u: %d, not %d", c->flags, c->argsz, err, c->err);
    if (err)
        return;
    uint32_t words[3];
    memcpy(words, r->client.bytes + 16, sizeof(words));
    ck_assert_uint_eq(words[1], c->flags);
    if (c->reply_len < 0) { /* "The reply payload must be the same as the request payload for setting or probing a feature." */
        ck_assert_msg(words[0] == c->argsz, "flags %#x: argsz %u, not %u", c->flags, words[0], c->argsz);
        ck_assert_uint_eq(r->client.have, 24 + c->data_len);
    } else {
        ck_assert_uint_eq(words[0], 8 + (uint32_t)c->reply_len);
        ck_assert_uint_eq(r->client.have, 24 + (uint32_t)c->reply_len);
        uint64_t wide; /* the flags of MIGRATION */
        memcpy(&wide, r->client.bytes + 24, sizeof(wide));
        ck_assert_uint_eq((c->flags & VFU_FEATURE_INDEX_MASK) == VFU_FEATURE_MIGRATION ? wide : words[2], c->reply_word);
    }
}

START_TEST(features)
{
    mover *m = &the_mover;
    mover_open(m, true);
    for (unsigned i = 0; i < COUNT(of_all); i++)
        check_feature(&m->r, &of_all[i]);
    for (unsigned i = 0; i < COUNT(absent); i++) {
        static const uint32_t how[] = {GET, SET, PROBE, PROBE | GET, PROBE | SET};
        for (unsigned k = 0; k < COUNT(how); k++)
            ck_assert_int_eq(ask_feature(&m->r, how[k] | absent[i], 64, NULL, 0), -ENOTTY);
    }
    ck_assert_uint_eq(m->arcs, 0);
    check_healthy(&m->r);
    rig_destroy(&m->r);
}
END_TEST

START_TEST(features_without_pre_copy)
{
    static const feature_case c = {GET | 1, 16, 0, 0, 8, VFU_MIG_STOP_COPY};
    mover *m = &the_mover;
    mover_open(m, false);
    check_feature(&m->r, &c);
    rig_destroy(&m->r);
}
END_TEST

/* A device without a migration has no such feature, and is always running; it has a dirty log. */
START_TEST(features_without_migration)
{
    static const feature_case cases[] = {
        {PROBE | 1, 8, 0, -ENOTTY, 0, 0},      {GET | 1, 16, 0, -ENOTTY, 0, 0}, {PROBE | 2, 8, 0, -ENOTTY, 0, 0},
        {SET | 2, 16, 8, -ENOTTY, 0, 0},       {GET | 2, 16, 0, -ENOTTY, 0, 0}, {PROBE | SET | 6, 8, 0, 0, -1, 0},
        {PROBE | SET | 7, 8, 0, 0, -1, 0},     {PROBE | GET | 8, 8, 0, 0, -1, 0},
    };
    mover *m = &the_mover;
    vfu_dev_desc desc = mover_desc(m, false);
    desc.migration = (vfu_migration){0};
    mover_open_desc(m, &desc);
    for (unsigned i = 0; i < COUNT(cases); i++)
        check_feature(&m->r, &cases[i]);
    ck_assert_int_eq(vfu_dev_migration_state(m->r.dev), VFU_MIG_STATE_RUNNING);
    vfu_msg read = command(VFU_CMD_MIG_DATA_READ), write = command(VFU_CMD_MIG_DATA_WRITE);
    read.u.mig_data.argsz = 64;
    read.u.mig_data.size = 8;
    ck_assert_int_lt(ask(&m->r, &read), 0);
    ck_assert_int_lt(ask(&m->r, &write), 0);
    rig_destroy(&m->r);
}
END_TEST

/* ---- the state machine ------------------------------------------------------------------------------------------------- */

/* The arcs of the specification, "Direct State Transitions". */
static const struct {
    vfu_mig_state from, to;
} arcs[] = {
    {VFU_MIG_STATE_RUNNING, VFU_MIG_STATE_STOP},       {VFU_MIG_STATE_STOP_COPY, VFU_MIG_STATE_STOP},
    {VFU_MIG_STATE_RESUMING, VFU_MIG_STATE_STOP},      {VFU_MIG_STATE_PRE_COPY, VFU_MIG_STATE_RUNNING},
    {VFU_MIG_STATE_STOP, VFU_MIG_STATE_RUNNING},       {VFU_MIG_STATE_RUNNING, VFU_MIG_STATE_PRE_COPY},
    {VFU_MIG_STATE_STOP, VFU_MIG_STATE_STOP_COPY},     {VFU_MIG_STATE_PRE_COPY, VFU_MIG_STATE_STOP_COPY},
    {VFU_MIG_STATE_STOP, VFU_MIG_STATE_RESUMING},
};

static const vfu_mig_state states[] = {VFU_MIG_STATE_STOP, VFU_MIG_STATE_RUNNING, VFU_MIG_STATE_STOP_COPY, VFU_MIG_STATE_RESUMING,
                                       VFU_MIG_STATE_PRE_COPY};

static const uint32_t wanted_states[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 256 + VFU_MIG_STATE_STOP, 0x80000001, 0xffffffff};

static bool is_saving(vfu_mig_state s) { return s == VFU_MIG_STATE_PRE_COPY || s == VFU_MIG_STATE_STOP_COPY; }

typedef struct path {
    unsigned len; /* arcs */
    unsigned ways; /* paths of that length; 0: none */
    vfu_mig_state to[MAX_ARCS];
} path;

/* All paths of up to `limit` arcs from at to goal without a saving state in between; the last one found stays in *out. */
static void search(vfu_mig_state at, vfu_mig_state goal, unsigned depth, unsigned limit, bool pre_copy, path *trial, path *out)
{
    if (at == goal && depth == limit) {
        unsigned ways = out->ways + 1;
        *out = *trial;
        out->len = depth;
        out->ways = ways;
        return;
    }
    if (depth == limit || (depth && is_saving(at)))
        return;
    for (unsigned i = 0; i < COUNT(arcs); i++) {
        bool has_pre_copy = arcs[i].from == VFU_MIG_STATE_PRE_COPY || arcs[i].to == VFU_MIG_STATE_PRE_COPY;
        if (arcs[i].from != at || (has_pre_copy && !pre_copy))
            continue;
        trial->to[depth] = arcs[i].to;
        search(arcs[i].to, goal, depth + 1, limit, pre_copy, trial, out);
    }
}

static path shortest(vfu_mig_state from, uint32_t to, bool pre_copy)
{
    path trial = {0}, out = {0};
    /* "The STOP_COPY -> PRE_COPY transition is explicitly not allowed" */
    if (from == VFU_MIG_STATE_ERROR || to == VFU_MIG_STATE_ERROR || to >= STATES ||
        (from == VFU_MIG_STATE_STOP_COPY && to == VFU_MIG_STATE_PRE_COPY))
        return out;
    for (unsigned limit = 0; limit < 6 && !out.ways; limit++)
        search(from, (vfu_mig_state)to, 0, limit, pre_copy, &trial, &out);
    return out;
}

/* A device that is in that state, with no arcs recorded. */
static void bring_to(mover *m, vfu_mig_state state, bool pre_copy)
{
    mover_open(m, pre_copy);
    if (state == VFU_MIG_STATE_ERROR) {
        m->fail_at = 1;
        m->failure = -ENOTRECOVERABLE;
        ck_assert_int_eq(set_state(&m->r, VFU_MIG_STATE_STOP), -ENOTRECOVERABLE);
    } else if (state != VFU_MIG_STATE_RUNNING) {
        ck_assert_int_eq(set_state(&m->r, state), 0);
    }
    ck_assert_int_eq(get_state(&m->r), state);
    m->arcs = m->fail_at = 0;
}

static void check_path(const mover *m, vfu_mig_state from, const path *p, unsigned len)
{
    ck_assert_uint_eq(m->arcs, len);
    for (unsigned i = 0; i < len; i++) {
        ck_assert_int_eq(m->from[i], i ? p->to[i - 1] : from);
        ck_assert_int_eq(m->to[i], p->to[i]);
    }
}

/* From every state to every state, and to what is none. */
START_TEST(every_transition)
{
    bool pre_copy = _i != 0;
    mover *m = &the_mover;
    for (unsigned f = 0; f <= COUNT(states); f++) {
        vfu_mig_state from = f == COUNT(states) ? VFU_MIG_STATE_ERROR : states[f];
        if (from == VFU_MIG_STATE_PRE_COPY && !pre_copy)
            continue;
        for (unsigned t = 0; t < COUNT(wanted_states); t++) {
            path p = shortest(from, wanted_states[t], pre_copy);
            ck_assert_uint_le(p.ways, 1); /* the rules leave no choice */
            bring_to(m, from, pre_copy);
            int err = set_state(&m->r, wanted_states[t]);
            ck_assert_msg(err == (p.ways ? 0 : -EINVAL), "%d to %u: %d", from, wanted_states[t], err);
            check_path(m, from, &p, p.len);
            ck_assert_int_eq(get_state(&m->r), p.ways ? (vfu_mig_state)wanted_states[t] : from);
            rig_destroy(&m->r);
        }
    }
}
END_TEST

/* A failure at every arc of every path: the device stays where it was, or is in ERROR until it is reset. */
START_TEST(every_failure)
{
    static const int failures[] = {-EIO, -EPERM, -ENOTRECOVERABLE};
    mover *m = &the_mover;
    for (unsigned f = 0; f < COUNT(states); f++) {
        for (unsigned t = 0; t < COUNT(states); t++) {
            path p = shortest(states[f], states[t], true);
            for (unsigned at = 1; at <= p.len; at++) {
                int failure = failures[(unsigned)_i];
                bring_to(m, states[f], true);
                m->fail_at = at;
                m->failure = failure;
                ck_assert_int_eq(set_state(&m->r, states[t]), failure);
                check_path(m, states[f], &p, at);
                vfu_mig_state before = at > 1 ? p.to[at - 2] : states[f];
                ck_assert_int_eq(get_state(&m->r), failure == -ENOTRECOVERABLE ? VFU_MIG_STATE_ERROR : before);
                rig_destroy(&m->r);
            }
        }
    }
}
END_TEST

/* ERROR: everything but a reset is refused, and a reset of either kind ends it. Any other state is ended by it, too. */
START_TEST(reset_ends_every_state)
{
    mover *m = &the_mover;
    for (unsigned f = 0; f <= COUNT(states); f++) {
        for (unsigned kind = 0; kind < 2; kind++) {
            vfu_mig_state from = f == COUNT(states) ? VFU_MIG_STATE_ERROR : states[f];
            bring_to(m, from, true);
            for (uint32_t to = 0; from == VFU_MIG_STATE_ERROR && to < STATES; to++)
                ck_assert_int_eq(set_state(&m->r, to), -EINVAL);
            if (kind == 0) {
                ck_assert_int_eq(device_reset(&m->r), 0);
            } else {
                uint32_t at = vfu_pci_capability(vfu_dev_pci(m->r.dev), 0x10) + 8u;
                ck_assert_int_eq(write_config(&m->r, at, 0x8000, 2), 0);
            }
            ck_assert_uint_eq(m->r.resets, 1);
            ck_assert_int_eq(m->state_at_reset, VFU_MIG_STATE_RUNNING);
            ck_assert_int_eq(get_state(&m->r), VFU_MIG_STATE_RUNNING);
            ck_assert_uint_eq(m->arcs, 0);
            ck_assert_int_eq(set_state(&m->r, VFU_MIG_STATE_STOP), 0);
            rig_destroy(&m->r);
        }
    }
}
END_TEST

/* A client that leaves in any state leaves a device that runs. */
START_TEST(the_next_client_finds_it_running)
{
    mover *m = &the_mover;
    for (unsigned f = 0; f <= COUNT(states); f++) {
        bring_to(m, f == COUNT(states) ? VFU_MIG_STATE_ERROR : states[f], true);
        rig_leave(&m->r);
        rig_connect(&m->r);
        greet(&m->r);
        ck_assert_int_eq(get_state(&m->r), VFU_MIG_STATE_RUNNING);
        rig_destroy(&m->r);
    }
}
END_TEST

/* Work is done in RUNNING and PRE_COPY, and what was asked for meanwhile is done when the device runs again. */
START_TEST(work_rests_while_stopped)
{
    mover *m = &the_mover;
    for (unsigned f = 0; f < COUNT(states); f++) {
        bool runs = states[f] == VFU_MIG_STATE_RUNNING || states[f] == VFU_MIG_STATE_PRE_COPY;
        bring_to(m, states[f], true);
        vfu_dev_want_work(m->r.dev);
        check_healthy(&m->r);
        ck_assert_uint_eq(m->r.works, runs ? 1 : 0);
        ck_assert_int_eq(vfu_dev_timeout(m->r.dev), -1); /* a stopped device is not polled in vain */
        ck_assert_int_eq(set_state(&m->r, VFU_MIG_STATE_RUNNING), 0);
        settle(m->r.dev);
        ck_assert_uint_eq(m->r.works, 1);
        rig_destroy(&m->r);
    }
}
END_TEST

/* ---- migration data ---------------------------------------------------------------------------------------------------- */

static int ask_data(rig *r, uint32_t argsz, uint32_t size)
{
    vfu_msg m = command(VFU_CMD_MIG_DATA_READ);
    m.u.mig_data.argsz = argsz;
    m.u.mig_data.size = size;
    return ask(r, &m);
}

static int give_data(rig *r, const void *data, uint32_t size)
{
    vfu_msg m = command(VFU_CMD_MIG_DATA_WRITE);
    m.u.mig_data.argsz = 8 + size;
    m.u.mig_data.size = m.u.mig_data.data_len = size;
    m.u.mig_data.data = data;
    return ask(r, &m);
}

/* Data goes out in the saving states and in while resuming, and the device isn't asked otherwise. */
START_TEST(data_in_each_state)
{
    mover *m = &the_mover;
    for (unsigned f = 0; f <= COUNT(states); f++) {
        vfu_mig_state state = f == COUNT(states) ? VFU_MIG_STATE_ERROR : states[f];
        bring_to(m, state, true);
        m->stream_len = 100;
        ck_assert_int_eq(ask_data(&m->r, 24, 16), is_saving(state) ? 0 : -EINVAL);
        ck_assert_uint_eq(m->calls, is_saving(state));
        m->calls = 0;
        ck_assert_int_eq(give_data(&m->r, "0123456789", 10), state == VFU_MIG_STATE_RESUMING ? 0 : -EINVAL);
        ck_assert_uint_eq(m->calls, state == VFU_MIG_STATE_RESUMING);
        if (state == VFU_MIG_STATE_RESUMING)
            ck_assert_uint_eq(m->r.client.have, 16); /* "There is no reply payload" */
        check_healthy(&m->r);
        rig_destroy(&m->r);
    }
}
END_TEST

START_TEST(data_is_a_stream)
{
    static const struct {
        uint32_t argsz, size;
        int read_result, err;
        uint32_t got;
    } cases[] = {
        {8 + 10, 10, 0, 0, 10},      {8 + 100, 10, 0, 0, 10},         {8 + 9, 10, 0, -EINVAL, 0}, {7, 0, 0, -EINVAL, 0},
        {8, 0, 0, 0, 0},             {0, 0, 0, -EINVAL, 0},           {8, 1, 0, -EINVAL, 0},      {8 + 50, 50, -EIO, -EIO, 0},
        {8 + 4096, 4096, 0, 0, 4096}, {8 + 65536, 65536, 0, -EINVAL, 0}, {0xffffffff, 0xffffffff, 0, -EINVAL, 0},
        {0xffffffff, 4096, 0, 0, 3984}, {8 + 10, 10, 0, 0, 0}, /* the last two: less than asked for, there is no more */
    };
    mover *m = &the_mover;
    vfu_dev_desc desc = mover_desc(m, true);
    desc.max_data_xfer_size = 32768;
    mover_open_desc(m, &desc);
    size_t at = 0;
    for (size_t i = 0; i < 8100; i++)
        m->stream[i] = (uint8_t)(i * 13 + i / 256);
    m->stream_len = 8100;
    ck_assert_int_eq(set_state(&m->r, VFU_MIG_STATE_STOP_COPY), 0);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        m->read_result = cases[i].read_result;
        int err = ask_data(&m->r, cases[i].argsz, cases[i].size);
        ck_assert_msg(err == cases[i].err, "case %u: %d", i, err);
        if (err)
            continue;
        ck_assert_uint_eq(m->r.client.have, 24 + cases[i].got);
        ck_assert_uint_eq(m->r.reply.u.mig_data.size, cases[i].got);
        ck_assert_uint_eq(m->r.reply.u.mig_data.argsz, 8 + cases[i].got);
        if (cases[i].got)
            ck_assert_mem_eq(m->r.reply.u.mig_data.data, m->stream + at, cases[i].got);
        at += cases[i].got;
    }
    ck_assert_uint_eq(at, 8100);
    rig_destroy(&m->r);
}
END_TEST

START_TEST(data_is_restored)
{
    static const struct {
        uint32_t size;
        int write_result, err;
    } cases[] = {{1, 0, 0},           {0, 0, 0},   {4096, 0, 0}, {100, -EIO, -EIO}, {100, -ENOSPC, -ENOSPC},
                 {32769, 0, -EINVAL}, {3000, 0, 0}};
    static uint8_t data[65536];
    mover *m = &the_mover;
    vfu_dev_desc desc = mover_desc(m, true);
    desc.max_data_xfer_size = 32768;
    mover_open_desc(m, &desc);
    size_t at = 0;
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(i * 17 + i / 256);
    ck_assert_int_eq(set_state(&m->r, VFU_MIG_STATE_RESUMING), 0);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        m->write_result = cases[i].write_result;
        ck_assert_int_eq(give_data(&m->r, data + at, cases[i].size), cases[i].err);
        at += cases[i].err ? 0 : cases[i].size;
    }
    ck_assert_uint_eq(m->stream_len, at);
    ck_assert_mem_eq(m->stream, data, at);
    rig_destroy(&m->r);
}
END_TEST

/* ---- the dirty log: what it takes -------------------------------------------------------------------------------------- */

typedef struct log_start {
    vfu_wire_feature_log_control control;
    vfu_wire_feature_log_range ranges[8];
} log_start;

static int start_log(rig *r, const log_start *s)
{
    return ask_feature(r, SET | VFU_FEATURE_LOGGING_START, 4096, s,
                       (uint32_t)(sizeof(s->control) + s->control.num_ranges * sizeof(s->ranges[0])));
}

static int stop_log(rig *r) { return ask_feature(r, SET | VFU_FEATURE_LOGGING_STOP, 8, NULL, 0); }

/* The bitmap's words to out, of which there are exactly as many as the range has. */
static int report(rig *r, uint64_t iova, uint64_t length, uint64_t page_size, uint64_t *out, size_t words)
{
    vfu_wire_feature_log_report wire = {.iova = iova, .length = length, .page_size = page_size}, got;
    const uint8_t *bitmap;
    uint32_t len;
    int err = ask_feature(r, GET | VFU_FEATURE_LOGGING_REPORT, 1 << 20, &wire, sizeof(wire));
    if (err)
        return err;
    ck_assert_int_eq(vfu_feature_log_report(&r->reply, &got, &bitmap, &len), 0);
    ck_assert_mem_eq(&got, &wire, sizeof(wire)); /* "The data field of the response is identical" */
    ck_assert_uint_eq(len, words * 8);
    ck_assert_uint_eq(r->reply.u.feature.argsz, 8 + 24 + len);
    memcpy(out, bitmap, len);
    return 0;
}

START_TEST(log_start_and_stop)
{
    static const struct {
        log_start start;
        int err;
    } cases[] = {
        {{.control = {.page_size = 4096}}, 0},
        {{.control = {.page_size = 1}}, 0},
        {{.control = {.page_size = UINT64_C(1) << 40}}, 0},
        {{.control = {.page_size = 0}}, -EINVAL},
        {{.control = {.page_size = 4097}}, -EINVAL},
        {{.control = {.page_size = 4096, .num_ranges = 2}, .ranges = {{0, 4096}, {UINT64_MAX - 4095, 4096}}}, 0},
        {{.control = {.page_size = 4096, .num_ranges = 2}, .ranges = {{0, 4096}, {8192, 0}}}, -EINVAL},
        {{.control = {.page_size = 4096, .num_ranges = 1}, .ranges = {{UINT64_MAX - 4095, 4097}}}, -EINVAL},
        {{.control = {.page_size = 4096, .num_ranges = 3}, .ranges = {{0, 8192}, {4096, 8192}, {0, 4096}}}, 0}, /* overlaps */
    };
    mover *m = &the_mover;
    uint64_t word;
    mover_open(m, true);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        int err = start_log(&m->r, &cases[i].start);
        ck_assert_msg(err == cases[i].err, "case %u: %d", i, err);
        if (err) {
            ck_assert_int_eq(stop_log(&m->r), -EINVAL);
            continue;
        }
        uint32_t len = (uint32_t)(sizeof(vfu_wire_feature_log_control) + cases[i].start.control.num_ranges * 16);
        ck_assert_uint_eq(m->r.client.have, 24 + len);
        ck_assert_mem_eq(m->r.client.bytes + 24, &cases[i].start, len);
        ck_assert_int_eq(start_log(&m->r, &cases[i].start), -EBUSY);
        ck_assert_int_eq(report(&m->r, 0, 4096, 4096, &word, 1), 0);
        ck_assert_uint_eq(word, 0);
        ck_assert_int_eq(stop_log(&m->r), 0);
        ck_assert_int_eq(stop_log(&m->r), -EINVAL);
        ck_assert_int_eq(report(&m->r, 0, 4096, 4096, &word, 1), -EINVAL);
    }
    /* ranges that are said to be there and aren't */
    vfu_wire_feature_log_control control = {.page_size = 4096, .num_ranges = 0x10000000};
    ck_assert_int_eq(ask_feature(&m->r, SET | VFU_FEATURE_LOGGING_START, 24, &control, sizeof(control)), -EINVAL);
    rig_destroy(&m->r);
}
END_TEST

/* The log ends with its client. */
START_TEST(log_ends_with_the_client)
{
    static const log_start all = {.control = {.page_size = 4096}};
    mover *m = &the_mover;
    uint64_t word;
    mover_open(m, true);
    ck_assert_int_eq(start_log(&m->r, &all), 0);
    rig_leave(&m->r);
    rig_connect(&m->r);
    greet(&m->r);
    ck_assert_int_eq(report(&m->r, 0, 4096, 4096, &word, 1), -EINVAL);
    ck_assert_int_eq(start_log(&m->r, &all), 0);
    rig_destroy(&m->r);
}
END_TEST

/* Bitmaps that don't fit argsz, or any message; nothing that was noted gets lost by asking. */
START_TEST(log_reports_of_every_size)
{
    static const struct {
        uint64_t iova, length, page_size;
        uint32_t argsz;
        int err;
        uint32_t reply; /* argsz of the reply */
    } cases[] = {
        {0x100000, 65536, 4096, 32 + 8, 0, 32 + 8}, /* the first one fetches the page that is dirty */
        {0x100000, 65536, 4096, 32 + 7, 0, 32 + 8},
        {0x100000, 65536, 4096, 32, 0, 32 + 8},
        {0x100000, 65 * 4096, 4096, 1000, 0, 32 + 16},
        {0x100000, 64 * 4096, 4096, 1000, 0, 32 + 8},
        {0x100000, 65536, 0, 1000, -EINVAL, 0},
        {0x100000, 65536, 4095, 1000, -EINVAL, 0},
        {0x100000, 0, 4096, 1000, -EINVAL, 0},
        {UINT64_MAX - 4095, 4097, 4096, 1000, -EINVAL, 0},
        {UINT64_MAX - 4095, 4096, 4096, 1000, 0, 32 + 8},
        {0, UINT64_C(1) << 63, 4096, 0xffffffff, -E2BIG, 0},
        {0, UINT64_C(1) << 63, UINT64_C(1) << 60, 0xffffffff, 0, 32 + 8},
        {0, UINT64_MAX, 1, 0xffffffff, -E2BIG, 0},
        {1, 1, UINT64_C(1) << 63, 1000, 0, 32 + 8},
    };
    static const log_start all = {.control = {.page_size = 4096}};
    mover *m = &the_mover;
    uint8_t byte = 1;
    mover_open(m, true);
    int fd = memfd("dirty", 1 << 20, F_SEAL_SHRINK);
    ck_assert_int_eq(ask_map(&m->r, 0x100000, 1 << 20, RW, fd, 0), 0);
    ck_assert_int_eq(start_log(&m->r, &all), 0);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vfu_wire_feature_log_report wire = {.iova = cases[i].iova, .length = cases[i].length, .page_size = cases[i].page_size};
        ck_assert_int_eq(vfu_iommu_write(vfu_dev_reader(m->r.dev), 0x103000, &byte, 1), 0);
        int err = ask_feature(&m->r, GET | VFU_FEATURE_LOGGING_REPORT, cases[i].argsz, &wire, sizeof(wire));
        ck_assert_msg(err == cases[i].err, "case %u: %d", i, err);
        if (err)
            continue;
        bool fits = cases[i].argsz >= cases[i].reply;
        ck_assert_uint_eq(m->r.reply.u.feature.argsz, cases[i].reply);
        ck_assert_uint_eq(m->r.client.have, 16 + (fits ? cases[i].reply : 32));
        if (fits || cases[i].iova != 0x100000)
            continue;
        uint64_t word = 0;
        ck_assert_int_eq(report(&m->r, 0x100000, 65536, 4096, &word, 1), 0);
        ck_assert_uint_eq(word, 8);
    }
    close(fd);
    rig_destroy(&m->r);
}
END_TEST

/* A page size that would need too much memory is answered with the one that was chosen, and the log has it. */
START_TEST(log_chooses_a_page_size)
{
    static const log_start tiny = {.control = {.page_size = 1}};
    mover *m = &the_mover;
    uint8_t byte = 1;
    uint64_t words[1 << 10];
    vfu_wire_feature_log_control got;
    mover_open(m, true);
    int fd = memfd("dirty", 1 << 30, F_SEAL_SHRINK);
    ck_assert_int_eq(ask_map(&m->r, 0, 1 << 30, RW, fd, 0), 0);
    ck_assert_int_eq(start_log(&m->r, &tiny), 0);
    ck_assert_int_eq(vfu_feature_log_control(&m->r.reply, &got), 0);
    uint64_t page = got.page_size;
    ck_assert_uint_gt(page, 1);
    ck_assert_uint_lt(page, 4096);
    ck_assert_uint_eq(page & (page - 1), 0);
    ck_assert_int_eq(vfu_iommu_write(vfu_dev_reader(m->r.dev), 0x20001, &byte, 1), 0);
    ck_assert_int_eq(report(&m->r, 0x20000, 65536, 1, words, COUNT(words)), 0);
    for (uint64_t i = 0; i < 65536; i++)
        ck_assert_uint_eq(words[i / 64] >> i % 64 & 1, i < page);
    close(fd);
    rig_destroy(&m->r);
}
END_TEST

/* ---- the dirty log against a model ------------------------------------------------------------------------------------- */

/* Windows at which it writes: files, memory that only messages reach between them, a hole, read-only memory, and the top. */
enum { WINDOW = 1 << 19, MESSAGES_AT = 1 };
static const uint64_t window_at[] = {0x100000, 0x100000 + WINDOW, 0x100000 + 2 * WINDOW, UINT64_MAX - WINDOW + 1};
static const uint64_t read_only_at = 0x400000;

typedef struct model {
    uint64_t page;
    bool *dirty[COUNT(window_at)]; /* WINDOW / page each */
    log_start start;
} model;

static bool is_logged(const model *x, uint64_t iova)
{
    for (uint32_t i = 0; i < x->start.control.num_ranges; i++)
        if (iova >= x->start.ranges[i].iova && iova - x->start.ranges[i].iova < x->start.ranges[i].length)
            return true;
    return !x->start.control.num_ranges;
}

/* Calls `each` for the pages of the model that [iova, iova + len) has bytes of. */
static void for_pages(model *x, uint64_t iova, uint64_t len,
                      void (*each)(model *x, bool *dirty, uint64_t page_iova, void *arg), void *arg)
{
    for (unsigned w = 0; w < COUNT(window_at); w++) {
        for (uint64_t p = 0; p < WINDOW / x->page; p++) {
            uint64_t at = window_at[w] + p * x->page;
            if (at + (x->page - 1) >= iova && at <= iova + (len - 1))
                each(x, &x->dirty[w][p], at, arg);
        }
    }
}

static void mark(model *x, bool *dirty, uint64_t at, void *arg)
{
    (void)arg;
    if (is_logged(x, at))
        *dirty = true;
}

static void model_write(model *x, uint64_t iova, uint64_t len)
{
    if (len)
        for_pages(x, iova, len, mark, NULL);
}

typedef struct expected {
    uint64_t iova, last, page_size, *words;
} expected;

static void fetch(model *x, bool *dirty, uint64_t at, void *arg)
{
    expected *e = arg;
    uint64_t first = at > e->iova ? at : e->iova, last = at + (x->page - 1) < e->last ? at + (x->page - 1) : e->last;
    if (!*dirty)
        return;
    for (uint64_t k = (first - e->iova) / e->page_size; k <= (last - e->iova) / e->page_size; k++)
        e->words[k / 64] |= UINT64_C(1) << k % 64;
    if (at >= e->iova && at + (x->page - 1) <= e->last)
        *dirty = false; /* "A noted page that is only partly inside the range is reported and kept." */
}

/* A transfer by message, which the test's client takes or refuses. */
static int transfer_result;
static void transfer_done(vfu_dma *dma, int result)
{
    (void)dma;
    transfer_result = result;
}

static void answer_writes(rig *r, bool refuse, uint64_t *taken)
{
    while (rig_receive(r) == 1) {
        vfu_msg reply;
        size_t len;
        ck_assert_uint_eq(r->reply.cmd, VFU_CMD_DMA_WRITE);
        vfu_msg_init_reply(&reply, &r->reply, refuse ? EFAULT : 0);
        reply.u.dma.address = r->reply.u.dma.address;
        reply.u.dma.count = r->reply.u.dma.count;
        reply.u.dma.ack_len = 16;
        *taken += refuse ? 0 : reply.u.dma.count;
        const uint8_t *bytes = encoded(&reply, &len);
        rig_send(r, bytes, len, NULL, 0);
    }
}

/* The connection's layout is the specification's: a reply that can be nothing else. */
static void prove_layout(rig *r, uint64_t iova)
{
    uint8_t buf[8];
    vfu_dma dma = {.iova = iova, .buf = buf, .len = 8, .done = transfer_done};
    vfu_msg reply;
    size_t len;
    ck_assert_int_eq(vfu_dev_dma(r->dev, &dma), 1);
    ck_assert_int_eq(rig_receive(r), 1);
    vfu_msg_init_reply(&reply, &r->reply, 0);
    reply.u.dma.address = iova;
    reply.u.dma.count = reply.u.dma.data_len = 8;
    reply.u.dma.data = (const uint8_t *)"DMA data";
    const uint8_t *bytes = encoded(&reply, &len);
    transfer_result = 1;
    rig_send(r, bytes, len, NULL, 0);
    ck_assert_int_eq(transfer_result, 0);
}

/* A write by vfu_dev_dma to a range of windows that may need messages. */
static void write_by_dma(mover *m, model *x, chance *c)
{
    static uint8_t data[2 * WINDOW];
    uint64_t iova = window_at[0] + below(c, 3 * WINDOW - 1), left = window_at[2] + WINDOW - iova;
    uint64_t len = 1 + draw(c) % (left < 3000 || below(c, 4) ? left < 3000 ? left : 3000 : left < WINDOW ? left : WINDOW);
    uint64_t messages = window_at[MESSAGES_AT], behind = messages + WINDOW, taken = 0;
    bool refuse = below(c, 5) == 0;
    if (refuse && iova < behind && len > behind - iova)
        len = behind - iova; /* so that nothing stands behind what is refused */
    vfu_dma dma = {.iova = iova, .buf = data, .len = (size_t)len, .to_client = true, .done = transfer_done};
    transfer_result = vfu_dev_dma(m->r.dev, &dma);
    bool sends = transfer_result == 1;
    answer_writes(&m->r, refuse, &taken);
    ck_assert_int_eq(transfer_result, sends && refuse ? -EIO : 0);
    if (sends && refuse)
        len = iova < messages ? messages - iova : 0; /* what lies in a file in front of the messages was written */
    else
        ck_assert_uint_eq(taken > 0, sends);
    model_write(x, iova, len);
}

static void write_here(mover *m, model *x, chance *c)
{
    static uint8_t data[8192];
    vfu_iommu_reader *reader = vfu_dev_reader(m->r.dev);
    static const unsigned files[] = {0, 2, 3};
    uint64_t base = window_at[files[below(c, 3)]];
    uint64_t inside = below(c, WINDOW - 8192), len = 1 + below(c, below(c, 2) ? 64 : 8192), iova = base + inside;
    uint64_t source = window_at[0] + below(c, WINDOW - 8192);
    switch (below(c, 6)) {
    case 0: ck_assert_int_eq(vfu_iommu_fill(reader, iova, len, data, 4), 0); break;
    case 1: ck_assert_int_eq(vfu_iommu_copy(reader, iova, source, len), 0); break;
    case 2:
        iova &= ~UINT64_C(7);
        len = 8;
        ck_assert_int_eq(vfu_iommu_store(reader, iova, 8, VFU_IOMMU_RELEASE, 7), 0);
        break;
    case 3: /* refused writes and reads are no writes */
        ck_assert_int_eq(vfu_iommu_write(reader, read_only_at, data, (size_t)len), -EACCES);
        ck_assert_int_eq(vfu_iommu_read(reader, iova, data, (size_t)len), 0);
        len = 0;
        break;
    default: ck_assert_int_eq(vfu_iommu_write(reader, iova, data, (size_t)len), 0); break;
    }
    model_write(x, iova, len);
}

static void compare_report(mover *m, model *x, chance *c, bool everything)
{
    enum { WORDS = 4096 };
    static uint64_t want[WORDS], got[WORDS];
    unsigned w = below(c, COUNT(window_at));
    uint64_t iova = window_at[w] + (below(c, 2) ? below(c, WINDOW / 4096) * 4096 : below(c, WINDOW));
    uint64_t left = window_at[w] + (WINDOW - 1) - iova + 1, length = 1 + draw(c) % left;
    uint64_t page_size = UINT64_C(1) << (5 + below(c, 16));
    if (everything) {
        iova = window_at[w = everything ? (unsigned)page_size % COUNT(window_at) : w];
        length = WINDOW;
        page_size = 4096;
    }
    size_t words = (size_t)((length - 1) / page_size / 64 + 1);
    if (words > WORDS)
        return;
    expected e = {.iova = iova, .last = iova + (length - 1), .page_size = page_size, .words = want};
    memset(want, 0, words * 8);
    for_pages(x, iova, length, fetch, &e);
    ck_assert_int_eq(report(&m->r, iova, length, page_size, got, words), 0);
    for (size_t i = 0; i < words; i++)
        ck_assert_msg(got[i] == want[i], "range 0x%llx + 0x%llx by 0x%llx, log page 0x%llx: word %zu is 0x%llx, not 0x%llx",
                      (unsigned long long)iova, (unsigned long long)length, (unsigned long long)page_size,
                      (unsigned long long)x->page, i, (unsigned long long)got[i], (unsigned long long)want[i]);
}

START_TEST(log_like_the_model)
{
    static const uint64_t pages[] = {64, 512, 4096, 65536};
    mover *m = &the_mover;
    chance c = seeded((uint64_t)_i + 100);
    model x = {.page = pages[(unsigned)_i % COUNT(pages)]};
    mover_open(m, true);
    int fd = memfd("dirty", 3 * WINDOW, F_SEAL_SHRINK), unsealed = memfd("dirty", WINDOW, 0);
    for (unsigned w = 0; w < COUNT(window_at); w++) {
        x.dirty[w] = calloc(WINDOW / x.page, sizeof(bool));
        ck_assert_ptr_nonnull(x.dirty[w]);
        ck_assert_int_eq(ask_map(&m->r, window_at[w], WINDOW, RW,
                                 w == MESSAGES_AT ? -1
                                 : w == 2         ? unsealed
                                                  : fd,
                                 w == 3 ? WINDOW : 0),
                         0);
    }
    ck_assert_int_eq(ask_map(&m->r, read_only_at, WINDOW, VFU_DMA_READABLE, fd, 2 * WINDOW), 0);
    prove_layout(&m->r, window_at[MESSAGES_AT]);
    x.start.control.page_size = x.page;
    if ((unsigned)_i % 8 >= 4) /* ranges, of whole pages */
        x.start = (log_start){
            .control = {.page_size = x.page, .num_ranges = 3},
            .ranges = {{window_at[0] + 65536, WINDOW}, {window_at[2], 65536}, {window_at[3] + WINDOW / 2, WINDOW / 2}}};
    ck_assert_int_eq(start_log(&m->r, &x.start), 0);
    for (unsigned i = 0; i < 400; i++) {
        switch (below(&c, 8)) {
        case 0: write_by_dma(m, &x, &c); break;
        case 1: compare_report(m, &x, &c, below(&c, 4) == 0); break;
        default: write_here(m, &x, &c); break;
        }
    }
    for (unsigned i = 0; i < 8; i++)
        compare_report(m, &x, &c, true);
    for (unsigned w = 0; w < COUNT(window_at); w++)
        free(x.dirty[w]);
    close(fd);
    close(unsealed);
    rig_destroy(&m->r);
}
END_TEST

/* What the client took of a transfer by message is dirty when its reply has come, and no sooner. */
START_TEST(log_of_a_message_under_way)
{
    static const log_start all = {.control = {.page_size = 4096}};
    mover *m = &the_mover;
    uint8_t data[2 * PAGE];
    uint64_t word, taken = 0;
    memset(data, 7, sizeof(data));
    mover_open(m, true);
    ck_assert_int_eq(ask_map(&m->r, 0x100000, 65536, RW, -1, 0), 0);
    prove_layout(&m->r, 0x100000);
    ck_assert_int_eq(start_log(&m->r, &all), 0);
    vfu_dma dma = {.iova = 0x101800, .buf = data, .len = sizeof(data), .to_client = true, .done = transfer_done};
    ck_assert_int_eq(vfu_dev_dma(m->r.dev, &dma), 1);
    ck_assert_int_eq(rig_receive(&m->r), 1); /* the message: read before the report, whose reply comes behind it */
    vfu_msg message = m->r.reply, reply;
    ck_assert_uint_eq(message.cmd, VFU_CMD_DMA_WRITE);
    ck_assert_int_eq(report(&m->r, 0x100000, 65536, 4096, &word, 1), 0);
    ck_assert_uint_eq(word, 0);
    vfu_msg_init_reply(&reply, &message, 0); /* QEMU's: without a payload */
    size_t len;
    const uint8_t *bytes = encoded(&reply, &len);
    rig_send(&m->r, bytes, len, NULL, 0);
    ck_assert_int_eq(transfer_result, 0);
    ck_assert_int_eq(report(&m->r, 0x100000, 65536, 4096, &word, 1), 0);
    ck_assert_uint_eq(word, 0xe);
    answer_writes(&m->r, false, &taken);
    rig_destroy(&m->r);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("device: features");
    TCase *what = tcase_create("what a feature takes");
    tcase_add_test(what, features);
    tcase_add_test(what, features_without_pre_copy);
    tcase_add_test(what, features_without_migration);
    suite_add_tcase(suite, what);
    TCase *machine = tcase_create("state machine");
    tcase_add_loop_test(machine, every_transition, 0, 2);
    tcase_add_loop_test(machine, every_failure, 0, 3);
    tcase_add_test(machine, reset_ends_every_state);
    tcase_add_test(machine, the_next_client_finds_it_running);
    tcase_add_test(machine, work_rests_while_stopped);
    suite_add_tcase(suite, machine);
    TCase *data = tcase_create("migration data");
    tcase_add_test(data, data_in_each_state);
    tcase_add_test(data, data_is_a_stream);
    tcase_add_test(data, data_is_restored);
    suite_add_tcase(suite, data);
    TCase *log = tcase_create("dirty log");
    tcase_add_test(log, log_start_and_stop);
    tcase_add_test(log, log_ends_with_the_client);
    tcase_add_test(log, log_reports_of_every_size);
    tcase_add_test(log, log_chooses_a_page_size);
    tcase_add_loop_test(log, log_like_the_model, 0, 24);
    tcase_add_test(log, log_of_a_message_under_way);
    suite_add_tcase(suite, log);
    return run_suite(suite);
}
