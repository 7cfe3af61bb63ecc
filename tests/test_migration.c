/* SPDX-License-Identifier: MIT */
/*
 * ==== device ==== live migration
 *
 * Two engines in processes of their own, and a client that moves a guest from one to the other: memory page by page by the
 * dirty log,
 * the device by its stream, while a command runs and the client writes to device RAM that it has mapped. Afterwards
 * registers, RAM,
 * memory and the command's effect are the same as if nothing had happened. Then streams that are damaged in every way.
 */
#include "caller.h"

/* Registers, commands and states: DMA_ENGINE's contract. */
enum {
    SRC = 0x08,
    DST = 0x10,
    LEN = 0x18,
    PATTERN = 0x20,
    REPEAT = 0x28,
    NOTIFY = 0x2c,
    COMMAND = 0x30,
    STATUS = 0x34,
    ERRNO = 0x38
};
enum { FAULT = 0x40, RESULT = 0x48, COMPLETED = 0x50, REGISTERS = 0x58 };
enum { NONE = 0, COPY = 1, FILL = 2, SUM = 3, TO_RAM = 4, FROM_RAM = 5 };
enum { IDLE = 0, BUSY = 1, DONE = 2, FAILED = 3 };
enum { RAM_BAR = 2, RAM_SIZE = 65536, MAPPED_AT = 4096, MEMORY = 1 << 20, PAGES = MEMORY / PAGE };

static const char hello[] = "{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576}}";

/* ---- an engine and its guest ------------------------------------------------------------------------------------------- */

typedef struct side {
    child engine;
    caller c;
    int memory_fd;
    uint8_t *memory; /* the guest's, MEMORY bytes at IOVA 0 */
    uint8_t *ram;    /* device RAM from MAPPED_AT on, mapped */
    int vector;      /* eventfd of MSI-X vector 1 */
} side;

/* IOVA 0: with the file, or so that only messages reach it. */
static void map_memory(side *s, bool by_message)
{
    vfu_msg m = map_of(0, MEMORY);
    ck_assert_int_eq(call_with(&s->c, &m, &s->memory_fd, !by_message), 0);
}

static void map_ram(side *s)
{
    vfu_msg m = command(VFU_CMD_DEVICE_GET_REGION_INFO);
    m.u.region_info.argsz = 4096;
    m.u.region_info.index = RAM_BAR;
    ck_assert_int_eq(call(&s->c, &m), 0);
    ck_assert_uint_eq(s->c.p.fd_count, 1);
    s->ram = mmap(NULL, RAM_SIZE - MAPPED_AT, PROT_READ | PROT_WRITE, MAP_SHARED, s->c.p.fds[0],
                  (off_t)(s->c.reply.u.region_info.offset + MAPPED_AT));
    ck_assert_ptr_ne(s->ram, MAP_FAILED);
}

/* MSI-X on, vector 1 assigned. */
static void enable_vector(side *s)
{
    uint8_t at, enable[2] = {0, 0x80};
    get(&s->c, VFU_PCI_REGION_CONFIG, 0x34, &at, 1);
    for (uint8_t head[2]; at; at = head[1]) {
        get(&s->c, VFU_PCI_REGION_CONFIG, at, head, 2);
        if (head[0] == 0x11)
            put(&s->c, VFU_PCI_REGION_CONFIG, at + 2u, enable, 2);
    }
    s->vector = event();
    ck_assert_int_eq(assign(&s->c, VFU_PCI_IRQ_MSIX, 1, 1, &s->vector), 0);
}

static void connect_side(side *s, const struct sockaddr_un *address, socklen_t len)
{
    s->c.p.sock = connect_to(address, len);
    say_hello(&s->c, hello);
    map_ram(s);
    enable_vector(s);
}

static void open_side(side *s)
{
    struct sockaddr_un address;
    socklen_t len;
    memset(s, 0, sizeof(*s));
    s->memory_fd = memfd("guest", MEMORY, F_SEAL_SHRINK);
    s->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, s->memory_fd, 0);
    ck_assert_ptr_ne(s->memory, MAP_FAILED);
    s->c.memory = s->memory;
    s->c.size = MEMORY;
    start_engine(&s->engine, &address, &len);
    connect_side(s, &address, len);
}

static void close_side(side *s)
{
    peer_close(&s->c.p);
    stop_engine(&s->engine);
    munmap(s->memory, MEMORY);
    munmap(s->ram, RAM_SIZE - MAPPED_AT);
    close(s->memory_fd);
    close(s->vector);
}

static uint64_t reg(side *s, uint32_t offset)
{
    uint64_t value = 0;
    bool wide = (offset >= SRC && offset < REPEAT) || offset >= FAULT;
    get(&s->c, 0, offset, &value, wide ? 8 : 4);
    return value;
}

static void set(side *s, uint32_t offset, uint64_t value)
{
    put(&s->c, 0, offset, &value, offset >= SRC && offset < REPEAT ? 8 : 4);
}

static void wait_until_idle(side *s)
{
    unsigned tries = 0;
    while (reg(s, STATUS) == BUSY)
        ck_assert_uint_lt(++tries, 5000000);
}

/* ---- features ---------------------------------------------------------------------------------------------------------- */

static int ask_feature(side *s, uint32_t flags, const void *data, uint32_t data_len)
{
    vfu_msg m = command(VFU_CMD_DEVICE_FEATURE);
    m.u.feature.flags = flags;
    m.u.feature.argsz = flags & VFU_FEATURE_GET ? 65536 : 8 + data_len;
    m.u.feature.data = data;
    m.u.feature.data_len = data_len;
    return call(&s->c, &m);
}

static int go_to(side *s, uint32_t state)
{
    vfu_wire_feature_mig_state wire = {.state = state};
    return ask_feature(s, VFU_FEATURE_SET | VFU_FEATURE_MIG_STATE, &wire, sizeof(wire));
}

static void start_log(side *s)
{
    vfu_wire_feature_log_control control = {.page_size = PAGE};
    ck_assert_int_eq(ask_feature(s, VFU_FEATURE_SET | VFU_FEATURE_LOGGING_START, &control, sizeof(control)), 0);
}

/* Fetches the bitmap of all memory. */
static void fetch_dirty(side *s, uint64_t bitmap[PAGES / 64])
{
    vfu_wire_feature_log_report report = {.length = MEMORY, .page_size = PAGE};
    const uint8_t *bytes;
    uint32_t len;
    ck_assert_int_eq(ask_feature(s, VFU_FEATURE_GET | VFU_FEATURE_LOGGING_REPORT, &report, sizeof(report)), 0);
    ck_assert_int_eq(vfu_feature_log_report(&s->c.reply, &report, &bytes, &len), 0);
    ck_assert_uint_eq(len, PAGES / 8);
    memcpy(bitmap, bytes, len);
}

static bool is_dirty(const uint64_t *bitmap, unsigned page) { return bitmap[page / 64] >> page % 64 & 1; }

/* ---- the stream -------------------------------------------------------------------------------------------------------- */

enum { STREAM = 1 << 20 };
typedef struct stream {
    uint8_t bytes[STREAM];
    size_t len;
} stream;

/* Reads a piece. False: there is no more for now. */
static bool read_piece(side *s, stream *x, uint32_t size)
{
    vfu_msg m = command(VFU_CMD_MIG_DATA_READ);
    m.u.mig_data.argsz = 8 + size;
    m.u.mig_data.size = size;
    ck_assert_uint_le(size, STREAM - x->len);
    ck_assert_int_eq(call(&s->c, &m), 0);
    ck_assert_uint_le(s->c.reply.u.mig_data.size, size);
    if (s->c.reply.u.mig_data.size)
        memcpy(x->bytes + x->len, s->c.reply.u.mig_data.data, s->c.reply.u.mig_data.size);
    x->len += s->c.reply.u.mig_data.size;
    return s->c.reply.u.mig_data.size == size;
}

/* Writes bytes in pieces; the result of the last one. */
static int write_stream(side *s, const uint8_t *bytes, size_t len, size_t piece)
{
    int err = 0;
    for (size_t at = 0, part; at < len && !err; at += part) {
        vfu_msg m = command(VFU_CMD_MIG_DATA_WRITE);
        part = len - at < piece ? len - at : piece;
        m.u.mig_data.size = m.u.mig_data.data_len = (uint32_t)part;
        m.u.mig_data.argsz = 8 + (uint32_t)part;
        m.u.mig_data.data = bytes + at;
        err = call(&s->c, &m);
    }
    return err;
}

/* ---- a whole migration ------------------------------------------------------------------------------------------------- */

typedef struct plan {
    const char *name;
    uint32_t command;
    uint64_t src, dst, len;
    bool by_message, pre_copy;
    uint32_t repeat; /* at first; more if it doesn't last */
} plan;

static const plan plans[] = {
    {"fill", FILL, 0, 0x10123, 30000, false, true, 2000},
    {"fill, stopped first", FILL, 0, 0x10123, 30000, false, false, 2000},
    {"copy", COPY, 0x40001, 0x20010, 50000, false, true, 2000},
    {"sum", SUM, 0x40001, 0, 20000, false, true, 1000},
    {"from RAM", FROM_RAM, 0x2100, 0x30000, 4096, false, true, 2000},
    {"to RAM", TO_RAM, 0x40000, 0x6080, 5000, false, true, 2000},
    {"fill by message", FILL, 0, 0x10123, 300000, true, true, 1000},
    {"copy by message", COPY, 0x40001, 0x90010, 200000, true, true, 1000},
    {"copy by message, stopped first", COPY, 0x40001, 0x90010, 200000, true, false, 1000},
    {"sum by message", SUM, 0x40001, 0, 200000, true, true, 1000},
    {"from RAM by message", FROM_RAM, 0x2100, 0x30000, 10000, true, true, 1000},
    {"to RAM by message", TO_RAM, 0x40000, 0x6080, 5000, true, true, 1000},
    {"nothing", NONE, 0x40000, 0x6080, 5000, false, true, 7},
    {"a failure", COPY, 0xff000, 0x6080, 0x2000, false, true, 3},
};

/* Bytes that are never 0, so that no reply to a DMA message is ambiguous. */
static void fill_memory(side *s)
{
    for (unsigned i = 0; i < MEMORY; i++)
        s->memory[i] = (uint8_t)(i % 251 + 1);
    for (unsigned i = 0; i < RAM_SIZE - MAPPED_AT; i++)
        s->ram[i] = (uint8_t)(i % 241 + 3);
    uint8_t trapped[MAPPED_AT];
    for (unsigned i = 0; i < MAPPED_AT; i++)
        trapped[i] = (uint8_t)(i % 239 + 5);
    put(&s->c, RAM_BAR, 0, trapped, sizeof(trapped));
}

static void start_command(side *s, const plan *p, uint32_t repeat)
{
    set(s, SRC, p->src);
    set(s, DST, p->dst);
    set(s, LEN, p->len);
    set(s, PATTERN, 0x8877665544332211);
    set(s, REPEAT, repeat);
    set(s, NOTIFY, 2);
    if (p->command)
        set(s, COMMAND, p->command);
}

/* The part of device RAM that the command uses is not written by the client, nor is the memory. */
static bool is_in_use(const plan *p, uint64_t ram_offset)
{
    uint64_t at = p->command == FROM_RAM ? p->src : p->command == TO_RAM ? p->dst : RAM_SIZE;
    return ram_offset >= at && ram_offset - at < p->len;
}

/* The client's own writes: to device RAM, mapped and by message, and to a page of memory that no command uses. */
static void scribble(side *s, const plan *p, chance *c)
{
    for (unsigned i = 0; i < 20; i++) {
        uint32_t at = below(c, RAM_SIZE);
        uint8_t byte = (uint8_t)draw(c);
        if (is_in_use(p, at))
            continue;
        if (at >= MAPPED_AT)
            s->ram[at - MAPPED_AT] = byte;
        else if (i < 3)
            put(&s->c, RAM_BAR, at, &byte, 1);
    }
    memset(s->memory + MEMORY - PAGE, (int)below(c, 250) + 1, PAGE);
}

/* Copies pages that the log reports, and the one that the client writes itself. Returns how many were reported. */
static unsigned copy_dirty(side *from, side *to)
{
    uint64_t bitmap[PAGES / 64];
    unsigned count = 0;
    fetch_dirty(from, bitmap);
    for (unsigned page = 0; page < PAGES; page++) {
        if (is_dirty(bitmap, page))
            memcpy(to->memory + page * PAGE, from->memory + page * PAGE, PAGE);
        count += is_dirty(bitmap, page);
    }
    memcpy(to->memory + MEMORY - PAGE, from->memory + MEMORY - PAGE, PAGE);
    return count;
}

/* Both have the same registers and the same RAM. Reading STATUS has an effect only with INTx, which isn't used. */
static void compare_sides(side *a, side *b, const char *name)
{
    static uint8_t left[RAM_SIZE], right[RAM_SIZE];
    for (uint32_t at = 0; at < REGISTERS; at += 4) {
        uint32_t x, y;
        get(&a->c, 0, at, &x, 4);
        get(&b->c, 0, at, &y, 4);
        ck_assert_msg(x == y, "%s: register 0x%02x is 0x%x, not 0x%x", name, at, y, x);
    }
    get(&a->c, RAM_BAR, 0, left, RAM_SIZE);
    get(&b->c, RAM_BAR, 0, right, RAM_SIZE);
    for (unsigned i = 0; i < RAM_SIZE; i++)
        if (left[i] != right[i])
            ck_abort_msg("%s: RAM at 0x%x is 0x%02x, not 0x%02x", name, i, right[i], left[i]);
}

static uint64_t sum_of(const uint8_t *bytes, uint64_t len)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < len; i++)
        sum += bytes[i];
    return sum;
}

/* The command's effect, on the side where it has ended. */
static void check_effect(side *s, const plan *p)
{
    static uint8_t ram[RAM_SIZE];
    get(&s->c, RAM_BAR, 0, ram, RAM_SIZE);
    for (uint64_t i = 0; i < p->len; i++) {
        bool good = true;
        switch (p->command) {
        case COPY: good = s->memory[p->dst + i] == s->memory[p->src + i]; break;
        case FILL: good = s->memory[p->dst + i] == 0x11 * (i % 8 + 1); break;
        case TO_RAM: good = ram[p->dst + i] == s->memory[p->src + i]; break;
        case FROM_RAM: good = s->memory[p->dst + i] == ram[p->src + i]; break;
        default: break;
        }
        if (!good)
            ck_abort_msg("%s: byte %llu is wrong", p->name, (unsigned long long)i);
    }
    if (p->command == SUM)
        ck_assert_uint_eq(reg(s, RESULT), sum_of(s->memory + p->src, p->len));
}

/* One migration. False: the command had ended before, and has to be a longer one. */
static bool migrate(const plan *p, uint32_t repeat)
{
    static stream x;
    side a, b;
    chance c = seeded(repeat);
    open_side(&a);
    open_side(&b);
    x.len = 0;
    fill_memory(&a);
    map_memory(&a, p->by_message);
    start_log(&a);
    memcpy(b.memory, a.memory, MEMORY); /* the first pass; from here on the log counts */
    bool fails = p->src + p->len > MEMORY, runs = p->command && !fails;
    start_command(&a, p, repeat);
    if (fails)
        wait_until_idle(&a);

    if (p->pre_copy) {
        ck_assert_int_eq(go_to(&a, VFU_MIG_STATE_PRE_COPY), 0);
        do {
            scribble(&a, p, &c);
            copy_dirty(&a, &b);
        } while (read_piece(&a, &x, 9999));
        scribble(&a, p, &c);
    }
    ck_assert_int_eq(go_to(&a, VFU_MIG_STATE_STOP_COPY), 0);
    bool still_runs = reg(&a, STATUS) == BUSY;
    while (read_piece(&a, &x, 30011)) {
    }
    copy_dirty(&a, &b);
    ck_assert_mem_eq(a.memory, b.memory, MEMORY); /* no page was lost */
    uint64_t completed = reg(&a, COMPLETED);

    map_memory(&b, p->by_message);
    ck_assert_int_eq(go_to(&b, VFU_MIG_STATE_RESUMING), 0);
    ck_assert_int_eq(write_stream(&b, x.bytes, x.len, 7777), 0);
    ck_assert_int_eq(go_to(&b, VFU_MIG_STATE_STOP), 0);
    compare_sides(&a, &b, p->name);
    ck_assert_mem_eq(a.memory, b.memory, MEMORY); /* neither changes anything while it is stopped */
    ck_assert_uint_eq(reg(&b, COMPLETED), completed);
    ck_assert_uint_eq(copy_dirty(&a, &b), 0);
    ck_assert_uint_eq(signals(b.vector), 0);
    ck_assert_uint_eq(signals(a.vector), fails || (runs && !still_runs));

    ck_assert_int_eq(go_to(&b, VFU_MIG_STATE_RUNNING), 0);
    wait_until_idle(&b);
    if (runs) {
        ck_assert_uint_eq(reg(&b, STATUS), DONE);
        ck_assert_uint_eq(reg(&b, COMPLETED), repeat);
        ck_assert_uint_eq(signals(b.vector), still_runs);
        check_effect(&b, p);
    } else {
        ck_assert_uint_eq(reg(&b, STATUS), fails ? FAILED : IDLE);
        ck_assert_uint_eq(reg(&b, ERRNO), fails ? ENOENT : 0);
        ck_assert_uint_eq(reg(&b, FAULT), fails ? MEMORY : 0);
        ck_assert_uint_eq(reg(&b, REPEAT), repeat);
    }
    ck_assert_uint_eq(reg(&a, COMPLETED), completed); /* the source has rested all the time */
    close_side(&a);
    close_side(&b);
    return still_runs || !runs;
}

START_TEST(live_migration)
{
    const plan *p = &plans[_i];
    uint32_t repeat = p->repeat;
    while (!migrate(p, repeat)) {
        repeat *= 4;
        ck_assert_uint_lt(repeat, 100000000);
    }
}
END_TEST

/* A migration that is given up: the command goes on where it was, and is done as often as it should be. */
START_TEST(given_up)
{
    static const vfu_mig_state ways[][3] = {
        {VFU_MIG_STATE_PRE_COPY, VFU_MIG_STATE_RUNNING, VFU_MIG_STATE_RUNNING},
        {VFU_MIG_STATE_PRE_COPY, VFU_MIG_STATE_STOP_COPY, VFU_MIG_STATE_RUNNING},
        {VFU_MIG_STATE_STOP_COPY, VFU_MIG_STATE_STOP, VFU_MIG_STATE_RUNNING},
        {VFU_MIG_STATE_STOP, VFU_MIG_STATE_STOP, VFU_MIG_STATE_RUNNING},
        {VFU_MIG_STATE_PRE_COPY, VFU_MIG_STATE_STOP, VFU_MIG_STATE_PRE_COPY},
    };
    static stream x;
    for (unsigned message = 0; message < 2; message++) {
        for (unsigned i = 0; i < COUNT(ways); i++) {
            plan p = {.command = FILL, .dst = 0x10123, .len = 20000};
            side s;
            open_side(&s);
            fill_memory(&s);
            map_memory(&s, message);
            start_command(&s, &p, 500);
            x.len = 0;
            for (unsigned k = 0; k < 3; k++) {
                ck_assert_int_eq(go_to(&s, ways[i][k]), 0);
                if (ways[i][k] == VFU_MIG_STATE_PRE_COPY || ways[i][k] == VFU_MIG_STATE_STOP_COPY)
                    read_piece(&s, &x, 1000 * (k + 1)); /* a part of it */
            }
            wait_until_idle(&s);
            ck_assert_uint_eq(reg(&s, STATUS), DONE);
            ck_assert_uint_eq(reg(&s, COMPLETED), 500);
            ck_assert_uint_eq(signals(s.vector), 1);
            check_effect(&s, &p);
            close_side(&s);
        }
    }
}
END_TEST

/* ---- DMA by message under way ------------------------------------------------------------------------------------------ */

/* Takes DMA messages until one is held. */
static void hold_one(side *s)
{
    s->c.hold = true;
    while (!s->c.held_count)
        ck_assert(!take_message(&s->c, &s->c.p));
}

/* Is anything there to read within the time that a round trip takes? The engine handles nothing behind a request that waits,
 * so there is no round trip to wait for: a second process of the same kind measures it. */
static bool is_silent(side *s, side *clock)
{
    struct pollfd ready = {.fd = s->c.p.sock, .events = POLLIN};
    for (unsigned i = 0; i < 20; i++)
        sync_up(&clock->c);
    return poll(&ready, 1, 0) == 0;
}

/* The stop is answered when the repetition at hand has ended, whose messages go on meanwhile; then there are no more. */
START_TEST(stop_waits_for_messages)
{
    static const plan copy = {.command = COPY, .src = 0x40001, .dst = 0x90010, .len = 200000};
    static const vfu_mig_state wanted[] = {VFU_MIG_STATE_STOP, VFU_MIG_STATE_STOP_COPY};
    side a, b;
    static stream x;
    for (unsigned i = 0; i < COUNT(wanted); i++) {
        open_side(&a);
        open_side(&b);
        fill_memory(&a);
        map_memory(&a, true);
        start_command(&a, &copy, 3);
        hold_one(&a);
        vfu_wire_feature_mig_state wire = {.state = wanted[i]};
        vfu_msg stop = command(VFU_CMD_DEVICE_FEATURE), info = command(VFU_CMD_DEVICE_GET_INFO);
        stop.u.feature.flags = VFU_FEATURE_SET | VFU_FEATURE_MIG_STATE;
        stop.u.feature.argsz = 16;
        stop.u.feature.data = (const uint8_t *)&wire;
        stop.u.feature.data_len = sizeof(wire);
        info.u.device_info.argsz = 16;
        uint16_t stop_id = post(&a.c, &stop, NULL, 0), info_id = post(&a.c, &info, NULL, 0);
        ck_assert(is_silent(&a, &b));
        a.c.hold = false;
        for (unsigned k = 0; k < a.c.held_count; k++)
            answer_dma(&a.c, &a.c.held[k], 0);
        a.c.held_count = 0;
        ck_assert_int_eq(await(&a.c, stop_id), 0); /* and the messages of the rest in front of it */
        ck_assert_int_eq(await(&a.c, info_id), 0);
        unsigned messages = a.c.messages;
        ck_assert_uint_eq(reg(&a, COMPLETED), 1);
        ck_assert_uint_eq(reg(&a, STATUS), BUSY);
        ck_assert(is_silent(&a, &b));
        ck_assert_uint_eq(a.c.messages, messages);

        ck_assert_int_eq(go_to(&a, VFU_MIG_STATE_STOP_COPY), 0);
        for (x.len = 0; read_piece(&a, &x, 65536);) {
        }
        memcpy(b.memory, a.memory, MEMORY);
        map_memory(&b, true);
        ck_assert_int_eq(go_to(&b, VFU_MIG_STATE_RESUMING), 0);
        ck_assert_int_eq(write_stream(&b, x.bytes, x.len, 65536), 0);
        ck_assert_int_eq(go_to(&b, VFU_MIG_STATE_STOP), 0);
        compare_sides(&a, &b, "stopped in a repetition");
        ck_assert_int_eq(go_to(&b, VFU_MIG_STATE_RUNNING), 0);
        wait_until_idle(&b);
        ck_assert_uint_eq(reg(&b, COMPLETED), 3);
        check_effect(&b, &copy);
        close_side(&a);
        close_side(&b);
    }
}
END_TEST

/* A client that stops it, doesn't answer and leaves: the engine serves the next one. */
START_TEST(leave_while_it_stops)
{
    static const plan copy = {.command = COPY, .src = 0x40001, .dst = 0x90010, .len = 200000};
    side s, clock;
    struct sockaddr_un address;
    socklen_t len;
    memset(&s, 0, sizeof(s));
    s.memory_fd = memfd("guest", MEMORY, F_SEAL_SHRINK);
    s.memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, s.memory_fd, 0);
    start_engine(&s.engine, &address, &len);
    open_side(&clock);
    for (unsigned i = 0; i < 3; i++) {
        s.c = (caller){.memory = s.memory, .size = MEMORY};
        connect_side(&s, &address, len);
        fill_memory(&s);
        map_memory(&s, true);
        start_command(&s, &copy, 3);
        hold_one(&s);
        vfu_wire_feature_mig_state wire = {.state = i == 1 ? VFU_MIG_STATE_RESUMING : VFU_MIG_STATE_STOP_COPY};
        vfu_msg stop = command(VFU_CMD_DEVICE_FEATURE);
        stop.u.feature.flags = VFU_FEATURE_SET | VFU_FEATURE_MIG_STATE;
        stop.u.feature.argsz = 16;
        stop.u.feature.data = (const uint8_t *)&wire;
        stop.u.feature.data_len = sizeof(wire);
        post(&s.c, &stop, NULL, 0);
        ck_assert(is_silent(&s, &clock));
        peer_close(&s.c.p);
        munmap(s.ram, RAM_SIZE - MAPPED_AT);
        close(s.vector);
    }
    s.c = (caller){.memory = s.memory, .size = MEMORY};
    connect_side(&s, &address, len);
    map_memory(&s, true);
    ck_assert_uint_eq(reg(&s, STATUS), IDLE);
    start_command(&s, &copy, 2);
    wait_until_idle(&s);
    ck_assert_uint_eq(reg(&s, COMPLETED), 2);
    check_effect(&s, &copy);
    close_side(&s);
    close_side(&clock);
}
END_TEST

/* ---- damaged streams --------------------------------------------------------------------------------------------------- */

/* A good stream of a side in the middle of a command. */
static void make_stream(stream *x)
{
    plan p = {.command = COPY, .src = 0x40001, .dst = 0x90010, .len = 5000};
    side s;
    open_side(&s);
    fill_memory(&s);
    map_memory(&s, true);
    start_command(&s, &p, 10);
    hold_one(&s);
    s.c.hold = false;
    for (unsigned k = 0; k < s.c.held_count; k++)
        answer_dma(&s.c, &s.c.held[k], 0);
    ck_assert_int_eq(go_to(&s, VFU_MIG_STATE_PRE_COPY), 0);
    for (x->len = 0; read_piece(&s, x, 65536);) {
    }
    s.ram[100]++; /* so that a page comes twice */
    ck_assert_int_eq(go_to(&s, VFU_MIG_STATE_STOP_COPY), 0);
    while (read_piece(&s, x, 65536)) {
    }
    ck_assert_uint_lt(reg(&s, COMPLETED), 10);
    close_side(&s);
}

/* It is refused, nothing of it counts, and after a reset the engine is as new. */
static void check_refused(side *s, const uint8_t *bytes, size_t len, const char *how, size_t where)
{
    vfu_wire_feature_mig_state state;
    ck_assert_int_eq(go_to(s, VFU_MIG_STATE_RESUMING), 0);
    int err = write_stream(s, bytes, len, 1 << 20);
    if (!err)
        err = go_to(s, VFU_MIG_STATE_RUNNING);
    ck_assert_msg(err < 0, "%s at %zu: taken", how, where);
    ck_assert_int_eq(ask_feature(s, VFU_FEATURE_GET | VFU_FEATURE_MIG_STATE, NULL, 0), 0);
    ck_assert_int_eq(vfu_feature_mig_state(&s->c.reply, &state), 0);
    ck_assert(state.state == VFU_MIG_STATE_RESUMING || state.state == VFU_MIG_STATE_ERROR);
    ck_assert_uint_eq(reg(s, STATUS), IDLE);
    ck_assert_uint_eq(reg(s, COMPLETED), 0);
    ck_assert_uint_eq(reg(s, LEN), 0);
    ck_assert_uint_eq(s->ram[0], 0);
    vfu_msg reset = command(VFU_CMD_DEVICE_RESET);
    ck_assert_int_eq(call(&s->c, &reset), 0);
}

START_TEST(damaged_streams)
{
    enum { LAST = 160 }; /* more than the record at the end has */
    static stream good;
    static uint8_t bad[STREAM];
    side s;
    chance c = seeded(3);
    make_stream(&good);
    ck_assert_uint_gt(good.len, RAM_SIZE + PAGE);
    ck_assert_uint_lt(good.len, STREAM / 4);
    open_side(&s);

    for (size_t cut = 0; cut < good.len; cut += cut < 64 || good.len - cut < LAST ? 1 + below(&c, 8) : 1 + below(&c, 3000))
        check_refused(&s, good.bytes, cut, "cut", cut);
    check_refused(&s, good.bytes, good.len - 1, "cut", good.len - 1);
    for (size_t at = 0; at < good.len; at += at < 32 || good.len - at < LAST ? 1 : 1 + below(&c, 1500)) {
        memcpy(bad, good.bytes, good.len);
        bad[at] ^= (uint8_t)(1u << below(&c, 8));
        check_refused(&s, bad, good.len, "flipped", at);
    }
    static const size_t more[] = {1, 7, 8, 104, 120, 4104, 4105, 65536, STREAM / 2};
    for (unsigned i = 0; i < COUNT(more); i++) { /* too long: by zeros, by its own beginning, by its end */
        memcpy(bad, good.bytes, good.len);
        memset(bad + good.len, 0, more[i]);
        check_refused(&s, bad, good.len + more[i], "longer by zeros", more[i]);
        for (size_t k = 0; k < more[i]; k++)
            bad[good.len + k] = good.bytes[k % good.len];
        check_refused(&s, bad, good.len + more[i], "longer by its beginning", more[i]);
        memcpy(bad, good.bytes, more[i] < good.len ? more[i] : good.len);
        size_t front = more[i] < good.len ? more[i] : good.len;
        memcpy(bad + front, good.bytes, good.len);
        check_refused(&s, bad, front + good.len, "begun twice", more[i]);
    }
    for (unsigned i = 0; i < 20; i++) { /* pieces that have changed places, and a piece that is missing */
        size_t a = below(&c, (uint32_t)good.len - 2000), b = below(&c, (uint32_t)good.len - 2000);
        if (memcmp(good.bytes + a, good.bytes + b, 1000) == 0)
            continue;
        memcpy(bad, good.bytes, good.len);
        memcpy(bad + a, good.bytes + b, 1000);
        check_refused(&s, bad, good.len, "a piece of elsewhere", a);
        memcpy(bad, good.bytes, a);
        memcpy(bad + a, good.bytes + a + 1000, good.len - a - 1000);
        check_refused(&s, bad, good.len - 1000, "a piece is missing", a);
    }

    /* after all that the good one is taken, and the command ends here */
    memset(s.memory, 7, MEMORY);
    map_memory(&s, true);
    ck_assert_int_eq(go_to(&s, VFU_MIG_STATE_RESUMING), 0);
    ck_assert_int_eq(write_stream(&s, good.bytes, good.len, 1000), 0);
    ck_assert_int_eq(go_to(&s, VFU_MIG_STATE_RUNNING), 0);
    wait_until_idle(&s);
    ck_assert_uint_eq(reg(&s, COMPLETED), 10);
    ck_assert_uint_eq(s.ram[100], (100 % 241 + 3) + 1);
    close_side(&s);
}
END_TEST

/* ---- dirty pages of the running engine --------------------------------------------------------------------------------- */

/* What a command writes: [iova, iova + len), len 0 for nothing. */
static void written_by(const plan *p, uint64_t *iova, uint64_t *len)
{
    bool writes = p->command == COPY || p->command == FILL || p->command == FROM_RAM;
    *iova = p->dst;
    *len = writes ? p->len : 0;
}

static void model_dirty(const plan *p, uint64_t bitmap[PAGES / 64])
{
    uint64_t iova, len;
    written_by(p, &iova, &len);
    for (uint64_t at = iova; at < iova + len; at++)
        bitmap[at / PAGE / 64] |= UINT64_C(1) << at / PAGE % 64;
}

/* Random commands, one after the other: the log has what they wrote, to the page. */
START_TEST(dirty_pages_of_commands)
{
    side s;
    chance c = seeded((uint64_t)_i + 50);
    bool by_message = _i % 2;
    open_side(&s);
    fill_memory(&s);
    map_memory(&s, by_message);
    start_log(&s);
    for (unsigned round = 0; round < 60; round++) {
        uint64_t got[PAGES / 64], want[PAGES / 64] = {0};
        for (unsigned k = below(&c, 4); k < 4; k++) {
            plan p = {.command = 1 + below(&c, 5), .len = 1 + below(&c, below(&c, 2) ? 100 : 30000)};
            p.src = below(&c, p.command == FROM_RAM ? RAM_SIZE - (uint32_t)p.len : MEMORY - (uint32_t)p.len);
            p.dst = below(&c, p.command == TO_RAM ? RAM_SIZE - (uint32_t)p.len : MEMORY - (uint32_t)p.len);
            start_command(&s, &p, 1 + below(&c, 3));
            wait_until_idle(&s);
            ck_assert_uint_eq(reg(&s, STATUS), DONE);
            model_dirty(&p, want);
        }
        if (below(&c, 3) == 0) { /* one that fails has written nothing */
            plan p = {.command = FILL, .dst = MEMORY - PAGE, .len = PAGE + 1};
            start_command(&s, &p, 1);
            wait_until_idle(&s);
            ck_assert_uint_eq(reg(&s, STATUS), FAILED);
        }
        fetch_dirty(&s, got);
        ck_assert_mem_eq(got, want, sizeof(want));
    }
    close_side(&s);
}
END_TEST

/* While a command repeats: no report has a page that it doesn't write, and one that spans a whole repetition has all that it
 * does. */
START_TEST(dirty_pages_while_it_runs)
{
    static const plan running[] = {
        {.command = FILL, .dst = 0x10123, .len = 100000},
        {.command = COPY, .src = 0x60001, .dst = 0x20010, .len = 50000},
        {.command = FROM_RAM, .src = 0x10, .dst = 0x30ff0, .len = 20000},
        {.command = FILL, .dst = 0x10123, .len = 300000, .by_message = true},
        {.command = COPY, .src = 0x60001, .dst = 0x20010, .len = 50000, .by_message = true},
        {.command = TO_RAM, .src = 0x60001, .dst = 0x2010, .len = 50000, .by_message = true},
    };
    const plan *p = &running[_i];
    side s;
    uint64_t want[PAGES / 64] = {0};
    model_dirty(p, want);
    open_side(&s);
    fill_memory(&s);
    map_memory(&s, p->by_message);
    start_log(&s);
    start_command(&s, p, UINT32_MAX);
    for (unsigned round = 0; round < 60; round++) {
        uint64_t got[PAGES / 64], at_first = reg(&s, COMPLETED);
        fetch_dirty(&s, got);
        for (unsigned i = 0; i < PAGES / 64; i++)
            ck_assert_uint_eq(got[i] & ~want[i], 0);
        while (round % 4 == 0 && reg(&s, COMPLETED) < at_first + 3) {
        }
        if (round % 4)
            continue;
        fetch_dirty(&s, got);
        ck_assert_mem_eq(got, want, sizeof(want));
    }
    ck_assert_uint_eq(reg(&s, STATUS), BUSY);
    ck_assert_int_eq(go_to(&s, VFU_MIG_STATE_STOP), 0);
    uint64_t got[PAGES / 64];
    fetch_dirty(&s, got);
    for (unsigned i = 0; i < PAGES / 64; i++)
        ck_assert_uint_eq(got[i] & ~want[i], 0);
    fetch_dirty(&s, got); /* stopped: nothing more comes */
    for (unsigned i = 0; i < PAGES / 64; i++)
        ck_assert_uint_eq(got[i], 0);
    close_side(&s);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("live migration");
    TCase *whole = tcase_create("whole");
    tcase_add_loop_test(whole, live_migration, 0, (int)COUNT(plans));
    tcase_add_test(whole, given_up);
    suite_add_tcase(suite, whole);
    TCase *messages = tcase_create("messages under way");
    tcase_add_test(messages, stop_waits_for_messages);
    tcase_add_test(messages, leave_while_it_stops);
    suite_add_tcase(suite, messages);
    TCase *damaged = tcase_create("damaged streams");
    tcase_add_test(damaged, damaged_streams);
    suite_add_tcase(suite, damaged);
    TCase *dirty = tcase_create("dirty pages");
    tcase_add_loop_test(dirty, dirty_pages_of_commands, 0, 4);
    tcase_add_loop_test(dirty, dirty_pages_while_it_runs, 0, 6);
    suite_add_tcase(suite, dirty);
    return run_suite(suite);
}
