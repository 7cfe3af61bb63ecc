/* SPDX-License-Identifier: MIT */
/*
 * ==== device ==== what known clients say, and the replies that they need
 *
 * Transcripts of QEMU 11.1, QEMU 10's layout of DMA messages, Cloud Hypervisor, SPDK's client and libvfio-user's sample
 * client, as tables:
 * a row is one message, and each reply has to be the row's, byte for byte. The socket keeps packets apart, so that a reply
 * has to come,
 * with its descriptors, in one sendmsg(), which is what Cloud Hypervisor and QEMU expect.
 *
 * A payload is written as numbers `bytes:hex` in little-endian order, `text` in single quotes with its NUL, 0*n (zeros), ?*n
 * (anything),
 * m*n@hex (n bytes of the client's memory at that address).
 */
#include "util.h"

/* Who speaks: the client; the device, with a reply; the device, with a command, whose number is its own; the client,
 * answering the oldest such command; nobody: something happens. */
typedef enum who { C, D, ASKS, ANSWERS, HAPPENS } who;

typedef struct stage stage;

typedef struct row {
    who who;
    uint16_t id, cmd;
    uint32_t flags; /* of a command; error of a reply */
    const char *payload;
    const char *fds; /* m: guest memory, e: an eventfd; from the device r: device RAM */
    void (*act)(stage *s);
} row;

enum { VERSION = 1, MAP, UNMAP, INFO, REGION, IO_FDS, IRQ, SET_IRQS, READ, WRITE, DMA_READ, DMA_WRITE, RESET, MULTI = 15 };
enum { MEMORY = 1 << 20, EVENTS = 16, POSTED = VFU_HDR_NO_REPLY };

#define JSON(...) "'" #__VA_ARGS__ "'"
#define OUR_JSON "'{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"max_dma_maps\":65535,\"pgsizes\":4096"

struct stage {
    rig r;
    int sock, memory;
    int events[EVENTS];
    unsigned event; /* the next one that is sent */
    uint16_t asked[64];
    unsigned asked_count, answered;
    vfu_dma dma;
    int result; /* of it; 1: under way */
    uint8_t buf[8192];
    const char *name;
    unsigned row;
};

static stage the_stage;

/* Bytes that are never 0. */
static uint8_t memory_byte(uint64_t iova) { return (uint8_t)(iova % 251 + 1); }

/* ---- payloads ---------------------------------------------------------------------------------------------------------- */

typedef struct text {
    uint8_t bytes[8192];
    bool any[8192]; /* this byte may be anything */
    size_t len;
} text;

static void add(text *t, uint8_t byte, bool any)
{
    ck_assert_uint_lt(t->len, sizeof(t->bytes));
    t->bytes[t->len] = byte;
    t->any[t->len++] = any;
}

static void translate(text *t, const char *at)
{
    t->len = 0;
    while (*at) {
        char *end;
        if (*at == ' ') {
            at++;
        } else if (*at == '\'') {
            for (at++; *at != '\''; at++)
                add(t, (uint8_t)*at, false);
            add(t, 0, false);
            at++;
        } else if (at[1] == '*') {
            char kind = *at;
            unsigned long n = strtoul(at + 2, &end, 0);
            uint64_t iova = kind == 'm' ? strtoull(end + 1, &end, 16) : 0;
            for (unsigned long i = 0; i < n; i++)
                add(t, kind == 'm' ? memory_byte(iova + i) : 0, kind == '?');
            at = end;
        } else {
            unsigned long width = strtoul(at, &end, 10);
            ck_assert(*end == ':' && width <= 8);
            uint64_t value = strtoull(end + 1, &end, 16);
            for (unsigned long i = 0; i < width; i++)
                add(t, (uint8_t)(value >> 8 * i), false);
            at = end;
        }
    }
}

/* ---- playing ----------------------------------------------------------------------------------------------------------- */

static void send_row(stage *s, const row *x)
{
    static text payload;
    static uint8_t bytes[16 + sizeof(payload.bytes)];
    int fds[EVENTS];
    unsigned count = 0;
    translate(&payload, x->payload);
    vfu_wire_header header = {.id = x->id, .cmd = x->cmd, .size = (uint32_t)(16 + payload.len), .flags = x->flags};
    if (x->who == ANSWERS) {
        ck_assert_uint_lt(s->answered, s->asked_count);
        header.id = s->asked[s->answered++];
        header.flags = x->flags ? VFU_HDR_REPLY | VFU_HDR_ERROR : VFU_HDR_REPLY;
        header.error = x->flags;
    }
    memcpy(bytes, &header, sizeof(header));
    memcpy(bytes + 16, payload.bytes, payload.len);
    for (const char *fd = x->fds ? x->fds : ""; *fd; fd++)
        fds[count++] = *fd == 'm' ? s->memory : s->events[s->event++ % EVENTS];
    ck_assert_int_eq(send_some(s->sock, bytes, header.size, fds, count), header.size);
}

static void hear_row(stage *s, const row *x)
{
    static text payload;
    peer p = {.sock = s->sock};
    settle(s->r.dev);
    int64_t n = peer_read(&p, 1 << 18); /* one packet */
    ck_assert_msg(n >= 16, "%s, row %u: nothing comes", s->name, s->row);
    vfu_wire_header header = header_of(p.bytes);
    translate(&payload, x->payload);
    ck_assert_msg((uint64_t)n == header.size, "%s, row %u: a packet is no message", s->name, s->row);
    ck_assert_msg(header.cmd == x->cmd, "%s, row %u: command %u", s->name, s->row, header.cmd);
    ck_assert_msg(header.error == (x->who == D ? x->flags : 0), "%s, row %u: error %u", s->name, s->row, header.error);
    if (x->who == ASKS) {
        ck_assert_uint_eq(header.flags, 0);
        s->asked[s->asked_count++] = header.id;
    } else {
        ck_assert_uint_eq(header.id, x->id);
        ck_assert_uint_eq(header.flags, x->flags ? VFU_HDR_REPLY | VFU_HDR_ERROR : VFU_HDR_REPLY);
    }
    ck_assert_msg(header.size - 16 == payload.len, "%s, row %u: %u bytes, not %zu", s->name, s->row, header.size - 16,
                  payload.len);
    for (size_t i = 0; i < payload.len; i++)
        ck_assert_msg(payload.any[i] || p.bytes[16 + i] == payload.bytes[i], "%s, row %u: byte %zu is 0x%02x, not 0x%02x",
                      s->name, s->row, i, p.bytes[16 + i], payload.bytes[i]);
    ck_assert_uint_eq(p.fd_count, x->fds ? strlen(x->fds) : 0);
    if (p.fd_count)
        ck_assert_uint_eq(ino_of(p.fds[0]), ino_of(s->r.ram));
    p.sock = -1;
    peer_close(&p);
}

static void play(const char *name, const row *rows, unsigned count, vfu_policy policy)
{
    stage *s = &the_stage;
    int pair[2];
    unsigned fds = fds_open();
    memset(s, 0, sizeof(*s));
    vfu_dev_desc desc = rig_desc(&s->r);
    desc.policy = policy;
    rig_create(&s->r, &desc);
    must(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
    ck_assert_int_eq(vfu_dev_attach(s->r.dev, pair[0]), 0);
    s->name = name;
    s->sock = pair[1];
    s->memory = memfd("guest", MEMORY, 0);
    for (unsigned i = 0; i < EVENTS; i++)
        s->events[i] = event();
    for (s->row = 0; s->row < count; s->row++) {
        const row *x = &rows[s->row];
        if (x->who == HAPPENS)
            x->act(s);
        else if (x->who == C || x->who == ANSWERS)
            send_row(s, x);
        else
            hear_row(s, x);
    }
    settle(s->r.dev);
    peer p = {.sock = s->sock};
    ck_assert_msg(peer_read(&p, 1 << 16) == -EAGAIN, "%s: more comes", name);
    free(p.bytes);
    close(s->sock);
    close(s->memory);
    close_fds(s->events, EVENTS);
    settle(s->r.dev);
    ck_assert_uint_eq(s->r.disconnects, 1);
    ck_assert_uint_eq(mappings(s->r.dev), 0);
    rig_destroy(&s->r);
    ck_assert_uint_eq(fds_open(), fds);
}

/* ---- what happens ------------------------------------------------------------------------------------------------------ */

static void done(vfu_dma *dma, int result) { ((stage *)dma->user)->result = result; }

static void start(stage *s, uint64_t iova, size_t len, bool to_client)
{
    s->dma = (vfu_dma){.iova = iova, .buf = s->buf, .len = len, .to_client = to_client, .done = done, .user = s};
    for (size_t i = 0; i < len; i++)
        s->buf[i] = to_client ? memory_byte(iova + i) : 0;
    settle(s->r.dev);
    s->result = 1;
    s->result = vfu_dev_dma(s->r.dev, &s->dma);
    ck_assert_int_eq(s->result, 1);
}

static void read_16(stage *s) { start(s, 0x80010, 16, false); }
static void write_16(stage *s) { start(s, 0x80010, 16, true); }
static void write_4096(stage *s) { start(s, 0x1000, 4096, true); }
static void read_4096(stage *s) { start(s, 0x1000, 4096, false); }

static void is_done(stage *s)
{
    settle(s->r.dev);
    ck_assert_int_eq(s->result, 0);
    for (size_t i = 0; i < s->dma.len; i++)
        ck_assert_uint_eq(s->buf[i], memory_byte(s->dma.iova + i));
}

static void is_refused(stage *s)
{
    settle(s->r.dev);
    ck_assert_int_eq(s->result, -EIO);
}

static void two_maps(stage *s)
{
    settle(s->r.dev);
    ck_assert_uint_eq(mappings(s->r.dev), 2);
}

static void no_maps(stage *s)
{
    settle(s->r.dev);
    ck_assert_uint_eq(mappings(s->r.dev), 0);
}

/* Interrupts: INTx goes up, and the end of it comes by the third eventfd that was sent. */
static void raise_intx(stage *s)
{
    settle(s->r.dev);
    vfu_dev_set_intx(s->r.dev, true);
    ck_assert_uint_eq(signals(s->events[0]), 1);
    uint64_t one = 1;
    ck_assert_int_eq(write(s->events[2], &one, 8), 8);
    settle(s->r.dev);
    ck_assert_uint_eq(signals(s->events[0]), 1); /* still up */
    vfu_dev_set_intx(s->r.dev, false);
}

static void raise_vectors(stage *s)
{
    settle(s->r.dev);
    for (uint32_t v = 0; v < RIG_VECTORS; v++)
        ck_assert_int_eq(vfu_dev_raise(s->r.dev, VFU_PCI_IRQ_MSIX, v), v == 1 || v == 2 ? -ENOENT : 0);
}

static void wrote(stage *s)
{
    settle(s->r.dev);
    ck_assert_uint_eq(s->r.storage[0][8], 0x11);
    ck_assert_uint_eq(s->r.storage[0][16], 0x22);
    ck_assert_uint_eq(s->r.storage[0][24], 0x33);
    ck_assert_uint_eq(s->r.writes, 3);
}

static void was_reset(stage *s)
{
    settle(s->r.dev);
    ck_assert_uint_eq(s->r.resets, 1);
}

static void was_reset_by_function(stage *s)
{
    settle(s->r.dev);
    ck_assert_uint_eq(s->r.resets, 2);
    ck_assert_int_eq(s->r.last_reset, VFU_RESET_BY_FUNCTION);
}

static void fail_accesses(stage *s) { s->r.refuse = -EIO; }

/* A guest's IOMMU is switched on: everything below 2^bits but the interrupt window is unmapped as powers of two, all
 * pipelined. */
static void unmap_aperture(stage *s, unsigned bits, unsigned expected)
{
    const uint64_t window = 0xfee00000, window_end = 0xfef00000, last = bits == 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1;
    char payload[64];
    unsigned count = 0;
    for (uint64_t at = 0;;) {
        uint64_t end = at < window ? window - 1 : last, size = at ? at & ~(at - 1) : UINT64_C(1) << 63;
        while (size - 1 > end - at)
            size >>= 1;
        snprintf(payload, sizeof(payload), "4:18 4:0 8:%llx 8:%llx", (unsigned long long)at, (unsigned long long)size);
        send_row(s, &(row){C, (uint16_t)(0x100 + count++), UNMAP, 0, payload, NULL, NULL});
        if (at + (size - 1) == last)
            break;
        at = at + size == window ? window_end : at + size;
    }
    ck_assert_uint_eq(count, expected);
    for (unsigned i = 0; i < count; i++)
        hear_row(s, &(row){D, (uint16_t)(0x100 + i), UNMAP, 0, "4:18 4:0 ?*16", NULL, NULL});
    no_maps(s);
}

static void unmap_48(stage *s) { unmap_aperture(s, 48, 28); }
static void unmap_64(stage *s) { unmap_aperture(s, 64, 28 + 16); }

/* ---- QEMU 11.1 --------------------------------------------------------------------------------------------------------- */

#define QEMU_HELLO                                                                                                          \
    {C, 0, VERSION, 0,                                                                                                      \
     "2:0 2:0 " JSON({"capabilities": {"max_msg_fds": 16, "write_multiple": true, "max_data_xfer_size": 1048576,            \
                      "max_dma_maps": 65535, "pgsizes": 4096, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}}}), \
     NULL, NULL},                                                                                                           \
    {D, 0, VERSION, 0, "2:0 2:0 " OUR_JSON ",\"write_multiple\":true}}'", NULL, NULL}

static const row qemu_11[] = {
    QEMU_HELLO,
    /* memory: pipelined, the device's own BAR without a descriptor; then pieces that split and join */
    {C, 1, MAP, 0, "4:20 4:3 8:0 8:0 8:80000", "m", NULL},
    {C, 2, MAP, 0, "4:20 4:1 8:80000 8:c0000 8:20000", "m", NULL},
    {C, 3, MAP, 0, "4:20 4:3 8:0 8:fea00000 8:f000", NULL, NULL},
    {C, 4, MAP, 0, "4:20 4:1 8:0 8:fffffffffffff000 8:1000", NULL, NULL},
    {D, 1, MAP, 0, "", NULL, NULL},
    {D, 2, MAP, 0, "", NULL, NULL},
    {D, 3, MAP, 0, "", NULL, NULL},
    {D, 4, MAP, 0, "", NULL, NULL},
    {C, 5, UNMAP, 0, "4:18 4:0 8:0 8:80000", NULL, NULL},
    {C, 6, UNMAP, 0, "4:18 4:0 8:c0000 8:20000", NULL, NULL},
    {C, 7, MAP, 0, "4:20 4:3 8:0 8:0 8:a0000", "m", NULL},
    {D, 5, UNMAP, 0, "4:18 4:0 8:0 8:80000", NULL, NULL},
    {D, 6, UNMAP, 0, "4:18 4:0 8:c0000 8:20000", NULL, NULL},
    {D, 7, MAP, 0, "", NULL, NULL},
    {C, 8, INFO, 0, "4:10 4:0 4:0 4:0", NULL, NULL},
    {D, 8, INFO, 0, "4:10 4:3 4:9 4:5", NULL, NULL},
    /* regions: argsz 32 first; a cut reply has no CAPS and no descriptor */
    {C, 9, REGION, 0, "4:20 4:0 4:0 4:0 8:0 8:0", NULL, NULL},
    {D, 9, REGION, 0, "4:20 4:3 4:0 4:0 8:1000 8:0", NULL, NULL},
    {C, 10, REGION, 0, "4:20 4:0 4:2 4:0 8:0 8:0", NULL, NULL},
    {D, 10, REGION, 0, "4:40 4:7 4:2 4:0 8:10000 8:0", NULL, NULL},
    {C, 11, REGION, 0, "4:40 4:0 4:2 4:0 8:0 8:0", NULL, NULL},
    {D, 11, REGION, 0, "4:40 4:f 4:2 4:20 8:10000 8:0 2:1 2:1 4:0 4:1 4:0 8:1000 8:f000", "r", NULL},
    {C, 12, REGION, 0, "4:20 4:0 4:3 4:0 8:0 8:0", NULL, NULL},
    {D, 12, REGION, 0, "4:20 4:0 4:3 4:0 8:0 8:0", NULL, NULL},
    {C, 13, REGION, 0, "4:20 4:0 4:7 4:0 8:0 8:0", NULL, NULL},
    {D, 13, REGION, 0, "4:20 4:3 4:7 4:0 8:1000 8:0", NULL, NULL},
    {C, 14, IRQ, 0, "4:10 4:0 4:3 4:0", NULL, NULL},
    {D, 14, IRQ, 0, "4:10 4:1 4:3 4:1", NULL, NULL},
    {C, 15, IRQ, 0, "4:10 4:0 4:2 4:0", NULL, NULL},
    {D, 15, IRQ, 0, "4:10 4:1 4:2 4:4", NULL, NULL},
    {C, 16, SET_IRQS, 0, "4:14 4:24 4:0 4:0 4:1", "e", NULL},
    {D, 16, SET_IRQS, 0, "", NULL, NULL},
    {C, 17, SET_IRQS, 0, "4:14 4:24 4:3 4:0 4:1", "e", NULL},
    {D, 17, SET_IRQS, 0, "", NULL, NULL},
    {C, 18, RESET, 0, "", NULL, NULL},
    {D, 18, RESET, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, was_reset},
    /* configuration space in one read, BAR sizes by ones */
    {C, 19, READ, 0, "8:0 4:7 4:1000", NULL, NULL},
    {D, 19, READ, 0, "8:0 4:7 4:1000 2:1234 2:d3a1 ?*4092", NULL, NULL},
    {C, 20, WRITE, 0, "8:10 4:7 4:4 4:ffffffff", NULL, NULL},
    {D, 20, WRITE, 0, "8:10 4:7 4:4", NULL, NULL},
    {C, 21, READ, 0, "8:10 4:7 4:4", NULL, NULL},
    {D, 21, READ, 0, "8:10 4:7 4:4 4:fffff000", NULL, NULL},
    /* the end of an interrupt by eventfd */
    {C, 22, SET_IRQS, 0, "4:14 4:14 4:0 4:0 4:1", "e", NULL},
    {D, 22, SET_IRQS, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, raise_intx},
    /* MSI-X in chunks of what is valid; [1, 3) is de-assigned */
    {C, 23, SET_IRQS, 0, "4:14 4:24 4:2 4:0 4:4", "eeee", NULL},
    {D, 23, SET_IRQS, 0, "", NULL, NULL},
    {C, 24, SET_IRQS, 0, "4:14 4:24 4:2 4:1 4:2", NULL, NULL},
    {D, 24, SET_IRQS, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, raise_vectors},
    /* posted writes, bad ones as well, are never answered */
    {C, 25, WRITE, POSTED, "8:8 4:0 4:1 1:11", NULL, NULL},
    {C, 26, MULTI, POSTED, "8:2 8:10 4:0 4:1 8:22 8:18 4:0 4:1 8:33", NULL, NULL},
    {C, 27, WRITE, POSTED, "8:8 4:3 4:1 1:11", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, wrote},
    /* a function-level reset: bus mastering off, then bit 15 of the device control */
    {C, 28, WRITE, 0, "8:4 4:7 4:2 2:0", NULL, NULL},
    {D, 28, WRITE, 0, "8:4 4:7 4:2", NULL, NULL},
    {C, 29, WRITE, 0, "8:5c 4:7 4:2 2:8000", NULL, NULL},
    {D, 29, WRITE, 0, "8:5c 4:7 4:2", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, was_reset_by_function},
    /* QEMU leaves without unmapping */
};

/* Guests with an IOMMU: large unmaps that cover many mappings or none, pages one by one, all at once. */
static const row qemu_11_iommu[] = {
    QEMU_HELLO,
    {C, 1, MAP, 0, "4:20 4:3 8:0 8:0 8:80000", "m", NULL},
    {C, 2, MAP, 0, "4:20 4:3 8:80000 8:100000000 8:80000", "m", NULL},
    {D, 1, MAP, 0, "", NULL, NULL},
    {D, 2, MAP, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, two_maps},
    {HAPPENS, 0, 0, 0, "", NULL, unmap_48},
    {C, 3, UNMAP, 0, "4:18 4:0 8:fef00000 8:ffffffff01100000", NULL, NULL},
    {D, 3, UNMAP, 0, "4:18 4:0 8:fef00000 8:ffffffff01100000", NULL, NULL},
    {C, 4, MAP, 0, "4:20 4:3 8:1000 8:fffff000 8:1000", "m", NULL},
    {C, 5, MAP, 0, "4:20 4:1 8:2000 8:ffffe000 8:1000", "m", NULL},
    {D, 4, MAP, 0, "", NULL, NULL},
    {D, 5, MAP, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, two_maps},
    {C, 6, UNMAP, 0, "4:18 4:0 8:fffff000 8:1000", NULL, NULL},
    {D, 6, UNMAP, 0, "4:18 4:0 8:fffff000 8:1000", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, unmap_64},
    {C, 7, UNMAP, 0, "4:18 4:2 8:0 8:0", NULL, NULL}, /* virtio-iommu: all, of an empty table */
    {D, 7, UNMAP, 0, "4:18 4:2 8:0 8:0", NULL, NULL},
};

/* DMA by message, by the book; a DMA_WRITE is answered with a header alone. While bus mastering is off QEMU says ENODEV. */
static const row qemu_11_dma[] = {
    QEMU_HELLO,
    {C, 1, MAP, 0, "4:20 4:3 8:0 8:80000 8:10000", NULL, NULL},
    {D, 1, MAP, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, read_16},
    {ASKS, 0, DMA_READ, 0, "8:80010 8:10", NULL, NULL},
    {C, 2, INFO, 0, "4:10 4:0 4:0 4:0", NULL, NULL}, /* crosses it */
    {D, 2, INFO, 0, "4:10 4:3 4:9 4:5", NULL, NULL},
    {ANSWERS, 0, DMA_READ, 0, "8:80010 8:10 m*16@80010", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, is_done},
    {HAPPENS, 0, 0, 0, "", NULL, write_16},
    {ASKS, 0, DMA_WRITE, 0, "8:80010 8:10 m*16@80010", NULL, NULL},
    {ANSWERS, 0, DMA_WRITE, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, is_done},
    {HAPPENS, 0, 0, 0, "", NULL, read_16},
    {ASKS, 0, DMA_READ, 0, "8:80010 8:10", NULL, NULL},
    {ANSWERS, 0, DMA_READ, ENODEV, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, is_refused},
};

/* ---- QEMU 10: data at byte 28 ------------------------------------------------------------------------------------------ */

static const row qemu_10_read_first[] = {
    QEMU_HELLO,
    {C, 1, MAP, 0, "4:20 4:3 8:0 8:80000 8:10000", NULL, NULL},
    {D, 1, MAP, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, read_16},
    {ASKS, 0, DMA_READ, 0, "8:80010 8:10", NULL, NULL},
    {ANSWERS, 0, DMA_READ, 0, "8:80010 4:10 m*16@80010 4:0", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, is_done}, /* not shifted */
    {HAPPENS, 0, 0, 0, "", NULL, write_16},
    {ASKS, 0, DMA_WRITE, 0, "8:80010 4:10 m*16@80010", NULL, NULL},
    {ANSWERS, 0, DMA_WRITE, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, is_done},
};

/* A write by the book lands four bytes too late; a look at what is there then shows it, and it is written again. */
static const row qemu_10_write_first[] = {
    QEMU_HELLO,
    {C, 1, MAP, 0, "4:20 4:3 8:0 8:80000 8:10000", NULL, NULL},
    {D, 1, MAP, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, write_16},
    {ASKS, 0, DMA_WRITE, 0, "8:80010 8:10 m*16@80010", NULL, NULL},
    {ANSWERS, 0, DMA_WRITE, 0, "", NULL, NULL},
    {ASKS, 0, DMA_READ, 0, "8:80014 8:4", NULL, NULL},
    {ANSWERS, 0, DMA_READ, 0, "8:80014 4:4 m*4@80010 4:0", NULL, NULL},
    {ASKS, 0, DMA_WRITE, 0, "8:80010 4:10 m*16@80010", NULL, NULL},
    {ANSWERS, 0, DMA_WRITE, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, is_done},
};

/* ---- Cloud Hypervisor, with complete_accesses -------------------------------------------------------------------------- */

static const row cloud_hypervisor[] = {
    {C, 0, VERSION, 0, "2:0 2:0 "
     JSON({"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}), NULL, NULL},
    {D, 0, VERSION, 0, "2:0 2:0 " OUR_JSON "}}'", NULL, NULL},
    {C, 1, INFO, 0, "4:20 4:0 4:0 4:0", NULL, NULL},
    {D, 1, INFO, 0, "4:10 4:3 4:9 4:5", NULL, NULL},
    /* the same number twice; the descriptor comes with the reply */
    {C, 2, REGION, 0, "4:20 4:0 4:2 4:0 8:0 8:0", NULL, NULL},
    {D, 2, REGION, 0, "4:40 4:7 4:2 4:0 8:10000 8:0", NULL, NULL},
    {C, 2, REGION, 0, "4:40 4:0 4:2 4:0 8:0 8:0", NULL, NULL},
    {D, 2, REGION, 0, "4:40 4:f 4:2 4:20 8:10000 8:0 2:1 2:1 4:0 4:1 4:0 8:1000 8:f000", "r", NULL},
    {C, 3, IRQ, 0, "4:10 4:0 4:2 4:0", NULL, NULL},
    {D, 3, IRQ, 0, "4:10 4:1 4:2 4:4", NULL, NULL},
    {C, 4, RESET, 0, "", NULL, NULL}, /* though it is advertised */
    {D, 4, RESET, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, was_reset},
    {C, 5, MAP, 0, "4:20 4:3 8:0 8:0 8:80000", "m", NULL},
    {D, 5, MAP, 0, "", NULL, NULL},
    {C, 6, WRITE, 0, "8:10 4:7 4:4 4:ffffffff", NULL, NULL}, /* BARs are sized and left so */
    {D, 6, WRITE, 0, "8:10 4:7 4:4", NULL, NULL},
    {C, 7, READ, 0, "8:10 4:7 4:4", NULL, NULL},
    {D, 7, READ, 0, "8:10 4:7 4:4 4:fffff000", NULL, NULL},
    {C, 8, SET_IRQS, 0, "4:14 4:24 4:2 4:0 4:4", "eeee", NULL},
    {D, 8, SET_IRQS, 0, "", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, fail_accesses},
    {C, 9, READ, 0, "8:0 4:0 4:4", NULL, NULL}, /* never an error */
    {D, 9, READ, 0, "8:0 4:0 4:4 4:ffffffff", NULL, NULL},
    {C, 10, WRITE, 0, "8:0 4:0 4:4 4:1", NULL, NULL},
    {D, 10, WRITE, 0, "8:0 4:0 4:4", NULL, NULL},
    {C, 11, READ, 0, "8:1000 4:0 4:8", NULL, NULL},
    {D, 11, READ, 0, "8:1000 4:0 4:8 8:ffffffffffffffff", NULL, NULL},
    {C, 12, UNMAP, 0, "4:18 4:0 8:0 8:80000", NULL, NULL}, /* 40 bytes, also when nothing was there */
    {D, 12, UNMAP, 0, "4:18 4:0 8:0 8:80000", NULL, NULL},
    {C, 13, UNMAP, 0, "4:18 4:0 8:0 8:80000", NULL, NULL},
    {D, 13, UNMAP, 0, "4:18 4:0 8:0 8:80000", NULL, NULL},
};

/* ---- SPDK -------------------------------------------------------------------------------------------------------------- */

static const row spdk[] = {
    {C, 0, VERSION, 0, "2:0 2:0", NULL, NULL}, /* no JSON */
    {D, 0, VERSION, 0, "2:0 2:0 " OUR_JSON "}}'", NULL, NULL},
    {C, 0, INFO, 0, "4:10 4:0 4:0 4:0", NULL, NULL}, /* every number is 0 */
    {D, 0, INFO, 0, "4:10 4:3 4:9 4:5", NULL, NULL},
    {C, 0, REGION, 0, "4:fe0 4:0 4:2 4:0 8:0 8:0 0*4032", NULL, NULL}, /* a request as long as the reply may be */
    {D, 0, REGION, 0, "4:40 4:f 4:2 4:20 8:10000 8:0 2:1 2:1 4:0 4:1 4:0 8:1000 8:f000", "r", NULL},
    {C, 0, MAP, 0, "4:20 4:3 8:0 8:80000 8:80000", "m", NULL},
    {D, 0, MAP, 0, "", NULL, NULL},
    {C, 0, READ, 0, "8:0 4:7 4:4", NULL, NULL},
    {D, 0, READ, 0, "8:0 4:7 4:4 2:1234 2:d3a1", NULL, NULL},
    {C, 0, UNMAP, 0, "4:18 4:0 8:80000 8:80000", "m", NULL}, /* with a descriptor, for nothing */
    {D, 0, UNMAP, 0, "4:18 4:0 8:80000 8:80000", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, no_maps},
};

/* ---- libvfio-user's sample client, with no_mmap so that there is DMA by message ---------------------------------------- */

static const row libvfio_user[] = {
    {C, 0xda55, VERSION, 0, "2:0 2:0 "
     JSON({"capabilities":{"max_msg_fds":32,"max_data_xfer_size":1024,"migration":{"pgsize":4096}}}), NULL, NULL},
    {D, 0xda55, VERSION, 0, "2:0 2:0 " OUR_JSON "}}'", NULL, NULL},
    {C, 0xf00f, READ, 0, "8:0 4:deadbeef 4:4", NULL, NULL}, /* a trial: it wants EINVAL */
    {D, 0xf00f, READ, EINVAL, "", NULL, NULL},
    {C, 0xb10c, INFO, 0, "4:10 4:0 4:0 4:0", NULL, NULL},
    {D, 0xb10c, INFO, 0, "4:10 4:3 4:9 4:5", NULL, NULL}, /* exactly 9 regions */
    {C, 0xabcd, REGION, 0, "4:20 4:0 4:2 4:0 8:0 8:0", NULL, NULL},
    {D, 0xabcd, REGION, 0, "4:40 4:7 4:2 4:0 8:10000 8:0", NULL, NULL},
    {C, 0xabcd, REGION, 0, "4:40 4:0 4:2 4:0 8:0 8:0 0*32", NULL, NULL},
    {D, 0xabcd, REGION, 0, "4:40 4:f 4:2 4:20 8:10000 8:0 2:1 2:1 4:0 4:1 4:0 8:1000 8:f000", "r", NULL},
    {C, 1, RESET, 0, "", NULL, NULL},
    {D, 1, RESET, 0, "", NULL, NULL},
    {C, 0x1234, MAP, 0, "4:20 4:3 8:0 8:0 8:1000", "m", NULL},
    {D, 0x1234, MAP, 0, "", NULL, NULL},
    {C, 0x1235, MAP, 0, "4:20 4:3 8:1000 8:1000 8:1000", "m", NULL},
    {D, 0x1235, MAP, 0, "", NULL, NULL},
    {C, 0x1bad, IRQ, 0, "4:10 4:0 4:0 4:0", NULL, NULL},
    {D, 0x1bad, IRQ, 0, "4:10 4:7 4:0 4:1", NULL, NULL},
    {C, 0x1bae, SET_IRQS, 0, "4:14 4:24 4:0 4:0 4:1", "e", NULL},
    {D, 0x1bae, SET_IRQS, 0, "", NULL, NULL},
    /* in messages of 1024 bytes */
    {HAPPENS, 0, 0, 0, "", NULL, read_4096},
    {ASKS, 0, DMA_READ, 0, "8:1000 8:400", NULL, NULL},
    {ASKS, 0, DMA_READ, 0, "8:1400 8:400", NULL, NULL},
    {ASKS, 0, DMA_READ, 0, "8:1800 8:400", NULL, NULL},
    {ASKS, 0, DMA_READ, 0, "8:1c00 8:400", NULL, NULL},
    {ANSWERS, 0, DMA_READ, 0, "8:1000 8:400 m*1024@1000", NULL, NULL},
    {ANSWERS, 0, DMA_READ, 0, "8:1400 8:400 m*1024@1400", NULL, NULL},
    {ANSWERS, 0, DMA_READ, 0, "8:1800 8:400 m*1024@1800", NULL, NULL},
    {ANSWERS, 0, DMA_READ, 0, "8:1c00 8:400 m*1024@1c00", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, is_done},
    {HAPPENS, 0, 0, 0, "", NULL, write_4096},
    {ASKS, 0, DMA_WRITE, 0, "8:1000 8:400 m*1024@1000", NULL, NULL},
    {ASKS, 0, DMA_WRITE, 0, "8:1400 8:400 m*1024@1400", NULL, NULL},
    {ASKS, 0, DMA_WRITE, 0, "8:1800 8:400 m*1024@1800", NULL, NULL},
    {ASKS, 0, DMA_WRITE, 0, "8:1c00 8:400 m*1024@1c00", NULL, NULL},
    {ANSWERS, 0, DMA_WRITE, 0, "8:1000 8:400", NULL, NULL},
    {ANSWERS, 0, DMA_WRITE, 0, "8:1400 8:400", NULL, NULL},
    {ANSWERS, 0, DMA_WRITE, 0, "8:1800 8:400", NULL, NULL},
    {ANSWERS, 0, DMA_WRITE, 0, "8:1c00 8:400", NULL, NULL},
    {HAPPENS, 0, 0, 0, "", NULL, is_done},
    {C, 7, UNMAP, 0, "4:18 4:0 8:0 8:1000", NULL, NULL},
    {D, 7, UNMAP, 0, "4:18 4:0 8:0 8:1000", NULL, NULL},
    {C, 8, UNMAP, 0, "4:18 4:2 8:0 8:0", NULL, NULL},
    {D, 8, UNMAP, 0, "4:18 4:2 8:0 8:0", NULL, NULL},
};

static const struct {
    const char *name;
    const row *rows;
    unsigned count;
    vfu_policy policy;
} transcripts[] = {
    {"QEMU 11.1", qemu_11, COUNT(qemu_11), {0}},
    {"QEMU 11.1, guest IOMMU", qemu_11_iommu, COUNT(qemu_11_iommu), {0}},
    {"QEMU 11.1, DMA by message", qemu_11_dma, COUNT(qemu_11_dma), {0}},
    {"QEMU 10, read first", qemu_10_read_first, COUNT(qemu_10_read_first), {0}},
    {"QEMU 10, write first", qemu_10_write_first, COUNT(qemu_10_write_first), {0}},
    {"Cloud Hypervisor", cloud_hypervisor, COUNT(cloud_hypervisor), {.complete_accesses = true}},
    {"SPDK", spdk, COUNT(spdk), {0}},
    {"libvfio-user", libvfio_user, COUNT(libvfio_user), {.no_mmap = true}},
};

START_TEST(transcript) { play(transcripts[_i].name, transcripts[_i].rows, transcripts[_i].count, transcripts[_i].policy); }
END_TEST

int main(void)
{
    Suite *suite = suite_create("device: known clients");
    TCase *tests = tcase_create("transcripts");
    tcase_add_loop_test(tests, transcript, 0, (int)COUNT(transcripts));
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
