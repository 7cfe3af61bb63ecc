/* SPDX-License-Identifier: MIT */
/*
 * ==== codec ====
 *
 * One table of messages, written down as bytes field by field from the specification's tables and not from the structs of vfu.h.
 * Each is decoded, rendered, encoded again, cut at every length and extended. Further tables hold what must be refused, the two
 * layouts of DMA data, and mistakes of callers. Random damage at the end. Every message lies at the end of a heap block of its
 * size, so a sanitizer sees a read beyond it.
 */
#include "vfu.h"

#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define ROOM 1024u /* for every message here */

#define CMD VFU_HDR_COMMAND
#define REPLY VFU_HDR_REPLY
#define ERR (VFU_HDR_REPLY | VFU_HDR_ERROR)

static size_t put(uint8_t *out, size_t at, uint64_t value, unsigned width)
{
    uint8_t one = (uint8_t)value;
    uint16_t two = (uint16_t)value;
    uint32_t four = (uint32_t)value;

    ck_assert_uint_le(at + width, ROOM);
    memcpy(out + at, width == 1 ? (void *)&one : width == 2 ? (void *)&two : width == 4 ? (void *)&four : (void *)&value, width);
    return at + width;
}

/*
 * Bytes from a description, tokens with one space between:
 *     4:0x10    a number of that width in bytes, 1, 2, 4 or 8
 *     x:00ff    bytes in hexadecimal
 *     'text'    text without spaces, no NUL
 */
static size_t bytes_of(const char *description, uint8_t *out)
{
    size_t n = 0;

    for (const char *p = description; *p != '\0'; p += *p == ' ') {
        if (*p == '\'') {
            for (p++; *p != '\''; p++) {
                n = put(out, n, (uint8_t)*p, 1);
            }
            p++;
        } else if (*p == 'x') {
            for (p += 2; *p != ' ' && *p != '\0'; p += 2) {
                const char pair[3] = {p[0], p[1], '\0'};
                n = put(out, n, strtoul(pair, NULL, 16), 1);
            }
        } else {
            char *end;
            unsigned width = (unsigned)(*p - '0');
            ck_assert_int_eq(p[1], ':');
            n = put(out, n, strtoull(p + 2, &end, 0), width);
            p = end;
        }
    }
    return n;
}

/* A whole message, id 0x12 */
static size_t message(uint8_t *out, uint16_t cmd, uint32_t flags, uint32_t error, const char *payload)
{
    size_t size = 16 + bytes_of(payload, out + 16);

    put(out, 0, 0x12, 2);
    put(out, 2, cmd, 2);
    put(out, 4, size, 4);
    put(out, 8, flags, 4);
    put(out, 12, error, 4);
    return size;
}

/* Decodes a copy of exactly len bytes. The copy must outlive the message: *block is for free(). */
static int decode(const uint8_t *bytes, size_t len, vfu_dma_layout layout, vfu_msg *m, uint8_t **block)
{
    *block = malloc(len != 0 ? len : 1);
    ck_assert_ptr_nonnull(*block);
    memcpy(*block, bytes, len);
    memset(m, 0xa5, sizeof *m);
    return vfu_msg_decode_dma(*block, len, layout, m);
}

/* On failure nothing of the payload may be left for a caller to use. */
static bool union_is_zero(const vfu_msg *m)
{
    static const vfu_msg zero;
    return memcmp(&m->u, &zero.u, sizeof m->u) == 0;
}

typedef struct sample {
    uint16_t cmd;
    uint32_t flags;
    const char *payload;
    const char *text;    /* as rendered, without the arrow and the id */
    const char *shorter; /* payload lengths below the full one that are accepted, too, if the size field says so: "0,24-39" */
    char longer;         /* accepted with more bytes: y, n, 2 for an even number of them, 4 for that many */
    bool ignored;        /* has bytes that don't come back from the encoder */
    uint32_t error;
} sample;

#define CAPS_JSON "{\"capabilities\":{\"max_msg_fds\":8}}"
#define TYPE_CAP(next) "2:2 2:1 4:" next " 4:0x10de 4:7"
#define SPARSE_CAP "2:1 2:1 4:0 4:2 4:0 8:0 8:0x1000 8:0x2000 8:0x1000"
#define SUB_0 "8:0x10 8:4 4:0 4:0 4:1 4:0 8:0xabcd"
#define SUB_1 "8:0x20 8:8 4:1 4:1 4:2 4:0 8:0x1234"

static const sample samples[] = {
    {VFU_CMD_VERSION, CMD, "2:0 2:1 '" CAPS_JSON "' 1:0", "VERSION 0.1 " CAPS_JSON, "4-38", 'n', false, 0},
    {VFU_CMD_VERSION, REPLY, "2:0 2:0 '" CAPS_JSON "' 1:0", "VERSION 0.0 " CAPS_JSON, "4-38", 'n', false, 0},
    {VFU_CMD_VERSION, CMD, "2:0 2:0", "VERSION 0.0", "", 'y', false, 0},
    {VFU_CMD_VERSION, CMD, "2:3 2:4 '{}'", "VERSION 3.4 {}", "4-5", 'y', true, 0}, /* no NUL */
    {VFU_CMD_VERSION, CMD, "2:0 2:0 '{}' 8:0", "VERSION 0.0 {}", "4-13", 'n', true, 0}, /* many */
    {VFU_CMD_VERSION, CMD, "2:0 2:0 1:0", "VERSION 0.0", "4", 'n', true, 0},
    {VFU_CMD_VERSION, CMD, "2:0 2:0 x:1b5b316dff", "VERSION 0.0 ?[1m?", "4-8", 'y', true, 0}, /* nothing for a terminal */

    {VFU_CMD_DMA_MAP, CMD, "4:32 4:3 8:0x4000 8:0x1000 8:0x2000",
     "DMA_MAP iova 0x1000 size 0x2000 rw offset 0x4000", "", 'n', false, 0},
    {VFU_CMD_DMA_MAP, CMD | VFU_HDR_NO_REPLY, "4:32 4:1 8:0 8:0xfffffffffffff000 8:0x1000",
     "DMA_MAP iova 0xfffffffffffff000 size 0x1000 r offset 0x0 no-reply", "", 'n', false, 0},
    {VFU_CMD_DMA_MAP, CMD, "4:0 4:6 8:0 8:0 8:0", "DMA_MAP iova 0x0 size 0x0 w offset 0x0 flags 0x6", "", 'n', false, 0},
    {VFU_CMD_DMA_MAP, CMD, "4:0 4:0 8:0 8:0 8:0", "DMA_MAP iova 0x0 size 0x0 none offset 0x0", "", 'n', false, 0},
    {VFU_CMD_DMA_MAP, REPLY, "", "DMA_MAP", "", 'y', false, 0},
    {VFU_CMD_DMA_MAP, REPLY, "4:32 4:3 8:0x4000 8:0x1000 8:0x2000", "DMA_MAP", "0-31", 'y', true, 0},

    {VFU_CMD_DMA_UNMAP, CMD, "4:24 4:0 8:0x1000 8:0x2000", "DMA_UNMAP iova 0x1000 size 0x2000", "", 'n', false, 0},
    {VFU_CMD_DMA_UNMAP, CMD, "4:24 4:2 8:0 8:0", "DMA_UNMAP iova 0x0 size 0x0 all", "", 'n', false, 0},
    {VFU_CMD_DMA_UNMAP, CMD, "4:48 4:1 8:0x1000 8:0x2000 8:4096 8:8",
     "DMA_UNMAP iova 0x1000 size 0x2000 dirty-bitmap", "", 'y', false, 0},
    {VFU_CMD_DMA_UNMAP, REPLY, "4:24 4:0 8:0x1000 8:0x2000", "DMA_UNMAP iova 0x1000 size 0x2000", "", 'n', false, 0},
    {VFU_CMD_DMA_UNMAP, REPLY, "4:48 4:0x11 8:0x1000 8:0x2000 8:4096 8:8 8:3",
     "DMA_UNMAP iova 0x1000 size 0x2000 dirty-bitmap|0x10", "24,40-47", 'y', false, 0},

    {VFU_CMD_DEVICE_GET_INFO, CMD, "4:16 4:0 4:0 4:0", "DEVICE_GET_INFO argsz 16", "", 'y', false, 0},
    {VFU_CMD_DEVICE_GET_INFO, REPLY, "4:16 4:3 4:9 4:5",
     "DEVICE_GET_INFO reset|pci regions 9 irqs 5 argsz 16", "", 'y', false, 0},
    {VFU_CMD_DEVICE_GET_INFO, REPLY, "4:20 4:0 4:8 4:0 4:0",
     "DEVICE_GET_INFO - regions 8 irqs 0 argsz 20", "16-19", 'y', true, 0},

    {VFU_CMD_DEVICE_GET_REGION_INFO, CMD, "4:32 4:0 4:7 4:0 8:0 8:0",
     "DEVICE_GET_REGION_INFO CONFIG argsz 32", "", 'y', false, 0},
    {VFU_CMD_DEVICE_GET_REGION_INFO, CMD, "4:4096 4:0 4:6 4:0 8:0 8:0 8:0xdead", "DEVICE_GET_REGION_INFO ROM argsz 4096", "32-39",
     'y', true, 0},
    {VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:32 4:3 4:0 4:0 8:0x1000 8:0",
     "DEVICE_GET_REGION_INFO BAR0 size 0x1000 read|write offset 0x0 argsz 32", "", 'y', false, 0},
    {VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:96 4:15 4:9 4:32 8:0x4000 8:0x8000 " TYPE_CAP("48") " " SPARSE_CAP,
     "DEVICE_GET_REGION_INFO region 9 size 0x4000 read|write|mmap|caps offset 0x8000 argsz 96 type 0x10de subtype 0x7 sparse 2 "
     "[0x0 + 0x1000] [0x2000 + 0x1000]", "32-95", 'y', false, 0}, /* shorter than its argsz, it is a reply that was cut */
    {VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:32 4:15 4:1 4:32 8:0x4000 8:0 " TYPE_CAP("48") " " SPARSE_CAP,
     "DEVICE_GET_REGION_INFO BAR1 size 0x4000 read|write|mmap|caps offset 0x0 argsz 32 type 0x10de subtype 0x7 sparse 2 "
     "[0x0 + 0x1000] [0x2000 + 0x1000]", "", 'y', false, 0}, /* this one isn't */
    {VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:96 4:7 4:2 4:0 8:0x4000 8:0",
     "DEVICE_GET_REGION_INFO BAR2 size 0x4000 read|write|mmap offset 0x0 argsz 96", "", 'y', false, 0}, /* cut for QEMU */
    {VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:96 4:9 4:2 4:0 8:0x4000 8:0",
     "DEVICE_GET_REGION_INFO BAR2 size 0x4000 read|caps offset 0x0 argsz 96", "", 'y', false, 0}, /* cut by others */
    {VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:48 4:8 4:8 4:36 8:0 8:0 4:0 2:77 2:9 4:0 4:5",
     "DEVICE_GET_REGION_INFO VGA size 0x0 caps offset 0x0 argsz 48 cap 77", "32-47", 'y', false, 0}, /* unknown, unaligned */

    {VFU_CMD_DEVICE_GET_REGION_IO_FDS, CMD, "4:96 4:0 4:0 4:0",
     "DEVICE_GET_REGION_IO_FDS BAR0 count 0 argsz 96", "", 'y', false, 0},
    {VFU_CMD_DEVICE_GET_REGION_IO_FDS, REPLY, "4:96 4:0 4:0 4:2 " SUB_0 " " SUB_1,
     "DEVICE_GET_REGION_IO_FDS BAR0 count 2 argsz 96 [0x10 + 0x4 fd 0 type 0] [0x20 + 0x8 fd 1 type 1]", "16", '2', false, 0},
    {VFU_CMD_DEVICE_GET_REGION_IO_FDS, REPLY, "4:112 4:0 4:0 4:2 " SUB_0 " 8:0 " SUB_1 " 8:0",
     "DEVICE_GET_REGION_IO_FDS BAR0 count 2 argsz 112 [0x10 + 0x4 fd 0 type 0] [0x20 + 0x8 fd 1 type 1]",
     "16,96,98,100,102,104,106,108,110", '2', false, 0}, /* larger entries of a later version */
    {VFU_CMD_DEVICE_GET_REGION_IO_FDS, REPLY, "4:16 4:0 4:3 4:0",
     "DEVICE_GET_REGION_IO_FDS BAR3 count 0 argsz 16", "", 'y', false, 0},
    {VFU_CMD_DEVICE_GET_REGION_IO_FDS, REPLY, "4:96 4:0 4:0 4:2",
     "DEVICE_GET_REGION_IO_FDS BAR0 count 2 argsz 96", "", 'n', false, 0},

    {VFU_CMD_DEVICE_GET_IRQ_INFO, CMD, "4:16 4:0 4:2 4:0", "DEVICE_GET_IRQ_INFO MSIX argsz 16", "", 'y', false, 0},
    {VFU_CMD_DEVICE_GET_IRQ_INFO, REPLY, "4:16 4:9 4:2 4:32",
     "DEVICE_GET_IRQ_INFO MSIX count 32 eventfd|noresize argsz 16", "", 'y', false, 0},

    {VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x21 4:0 4:0 4:0",
     "DEVICE_SET_IRQS INTX start 0 count 0 none|trigger", "", 'y', false, 0},
    {VFU_CMD_DEVICE_SET_IRQS, CMD, "4:23 4:0x12 4:1 4:4 4:3 x:010001",
     "DEVICE_SET_IRQS MSI start 4 count 3 bool|unmask = 01 00 01", "", 'y', false, 0},
    {VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x24 4:2 4:4294967290 4:5",
     "DEVICE_SET_IRQS MSIX start 4294967290 count 5 eventfd|trigger", "", 'y', false, 0},
    {VFU_CMD_DEVICE_SET_IRQS, CMD, "4:28 4:0x24 4:6 4:0 4:2 4:-1 4:-1", "DEVICE_SET_IRQS irq 6 start 0 count 2 eventfd|trigger",
     "20-27", 'y', true, 0}, /* descriptors in the data, as for the kernel */
    {VFU_CMD_DEVICE_SET_IRQS, REPLY, "", "DEVICE_SET_IRQS", "", 'y', false, 0},

    {VFU_CMD_REGION_READ, CMD, "8:0x14 4:0 4:4", "REGION_READ BAR0 + 0x14 count 4", "", 'n', false, 0},
    {VFU_CMD_REGION_READ, REPLY, "8:0x14 4:0 4:4 4:0x12345678",
     "REGION_READ BAR0 + 0x14 count 4 = 0x12345678", "", 'n', false, 0},
    {VFU_CMD_REGION_READ, REPLY, "8:0 4:7 4:0", "REGION_READ CONFIG + 0x0 count 0", "", 'n', false, 0},
    {VFU_CMD_REGION_READ, REPLY, "8:0 4:7 4:18 x:000102030405060708090a0b0c0d0e0f1011",
     "REGION_READ CONFIG + 0x0 count 18 = 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f ...", "", 'n', false, 0},
    {VFU_CMD_REGION_WRITE, CMD | VFU_HDR_NO_REPLY, "8:0x1000 4:2 4:8 8:0xfedcba9876543210",
     "REGION_WRITE BAR2 + 0x1000 count 8 = 0xfedcba9876543210 no-reply", "", 'n', false, 0},
    {VFU_CMD_REGION_WRITE, CMD, "8:1 4:5 4:1 1:255", "REGION_WRITE BAR5 + 0x1 count 1 = 0xff", "", 'n', false, 0},
    {VFU_CMD_REGION_WRITE, REPLY, "8:0x1000 4:2 4:8", "REGION_WRITE BAR2 + 0x1000 count 8", "", 'n', false, 0},

    {VFU_CMD_DMA_READ, CMD, "8:0x100000 8:8", "DMA_READ iova 0x100000 count 8", "", 'n', false, 0},
    {VFU_CMD_DMA_READ, CMD, "8:0 8:0x100000000", "DMA_READ iova 0x0 count 4294967296", "", 'n', false, 0},
    {VFU_CMD_DMA_READ, REPLY, "8:0x100000 8:8 8:0x1122334455667788",
     "DMA_READ iova 0x100000 count 8 = 0x1122334455667788", "", 'n', false, 0},
    {VFU_CMD_DMA_READ, REPLY, "8:0x100000 8:0", "DMA_READ iova 0x100000 count 0", "", 'n', false, 0},
    {VFU_CMD_DMA_WRITE, CMD, "8:0x100000 8:2 2:0xbeef", "DMA_WRITE iova 0x100000 count 2 = 0xbeef", "", 'n', false, 0},
    {VFU_CMD_DMA_WRITE, REPLY, "8:0x100000 8:2", "DMA_WRITE iova 0x100000 count 2", "0,12", 'n', false, 0},
    {VFU_CMD_DMA_WRITE, REPLY, "8:0x100000 4:2", "DMA_WRITE iova 0x100000 count 2", "0", '4', false, 0},
    {VFU_CMD_DMA_WRITE, REPLY, "", "DMA_WRITE", "", 'n', false, 0},

    {VFU_CMD_DEVICE_RESET, CMD, "", "DEVICE_RESET", "", 'n', false, 0},
    {VFU_CMD_DEVICE_RESET, REPLY, "", "DEVICE_RESET", "", 'y', false, 0},

    {VFU_CMD_REGION_WRITE_MULTI, CMD, "8:2 8:0x10 4:0 4:4 4:0x55 4:0 8:0x18 4:1 4:8 8:0x66",
     "REGION_WRITE_MULTI count 2 [ BAR0 + 0x10 count 4 = 0x55 ] [ BAR1 + 0x18 count 8 = 0x66 ]", "", 'n', false, 0},
    {VFU_CMD_REGION_WRITE_MULTI, CMD, "8:0", "REGION_WRITE_MULTI count 0", "", 'n', false, 0},
    {VFU_CMD_REGION_WRITE_MULTI, REPLY, "8:2", "REGION_WRITE_MULTI count 2", "", 'n', false, 0},

    {VFU_CMD_DEVICE_FEATURE, CMD, "4:16 4:0x10001", "DEVICE_FEATURE MIGRATION get argsz 16", "", 'y', false, 0},
    {VFU_CMD_DEVICE_FEATURE, REPLY, "4:16 4:0x10001 8:5",
     "DEVICE_FEATURE MIGRATION get argsz 16 stop-copy|pre-copy", "8-15", 'y', false, 0},
    {VFU_CMD_DEVICE_FEATURE, CMD, "4:16 4:0x20002 4:4 4:0",
     "DEVICE_FEATURE MIG_STATE set argsz 16 RESUMING", "8-15", 'y', false, 0},
    {VFU_CMD_DEVICE_FEATURE, REPLY, "4:16 4:0x10002 4:9 4:0",
     "DEVICE_FEATURE MIG_STATE get argsz 16 state 9", "8-15", 'y', false, 0},
    {VFU_CMD_DEVICE_FEATURE, CMD, "4:56 4:0x20006 8:4096 4:2 4:0 8:0x1000 8:0x2000 8:0x8000 8:0x1000",
     "DEVICE_FEATURE LOGGING_START set argsz 56 page 0x1000 ranges 2 [0x1000 + 0x2000] [0x8000 + 0x1000]", "8-55", 'y', false, 0},
    {VFU_CMD_DEVICE_FEATURE, CMD, "4:8 4:0x20007", "DEVICE_FEATURE LOGGING_STOP set argsz 8", "", 'y', false, 0},
    {VFU_CMD_DEVICE_FEATURE, CMD, "4:40 4:0x10008 8:0x1000 8:0x2000 8:4096",
     "DEVICE_FEATURE LOGGING_REPORT get argsz 40 iova 0x1000 length 0x2000 page 0x1000", "8-31", 'y', false, 0},
    {VFU_CMD_DEVICE_FEATURE, REPLY, "4:40 4:0x10008 8:0x1000 8:0x2000 8:4096 8:3",
     "DEVICE_FEATURE LOGGING_REPORT get argsz 40 iova 0x1000 length 0x2000 page 0x1000 = 0x3", "8-39", 'y', false, 0},
    {VFU_CMD_DEVICE_FEATURE, CMD, "4:8 4:0x70003", "DEVICE_FEATURE feature 3 get|set|probe argsz 8", "", 'y', false, 0},

    {VFU_CMD_MIG_DATA_READ, CMD, "4:1032 4:1024", "MIG_DATA_READ size 1024 argsz 1032", "", 'n', false, 0},
    {VFU_CMD_MIG_DATA_READ, REPLY, "4:11 4:3 x:aabbcc", "MIG_DATA_READ size 3 argsz 11 = aa bb cc", "", 'n', false, 0},
    {VFU_CMD_MIG_DATA_WRITE, CMD, "4:12 4:4 4:0xcafe", "MIG_DATA_WRITE size 4 argsz 12 = 0xcafe", "", 'n', false, 0},
    {VFU_CMD_MIG_DATA_WRITE, REPLY, "", "MIG_DATA_WRITE", "", 'y', false, 0},

    {VFU_CMD_DMA_MAP, ERR, "", "DMA_MAP error EEXIST", "", 'y', false, EEXIST},
    {VFU_CMD_REGION_READ, ERR, "", "REGION_READ error 0", "", 'y', false, 0},
    {VFU_CMD_VERSION, ERR, "", "VERSION error 4294967295", "", 'y', false, UINT32_MAX},
    {VFU_CMD_DEVICE_FEATURE, ERR, "8:1", "DEVICE_FEATURE error ENOTTY", "0-7", 'y', true, ENOTTY},
    /* bits that mean nothing here: reserved ones, ERROR in a command, NO_REPLY in a reply, error in both */
    {VFU_CMD_DEVICE_RESET, 0xffffffe0u, "", "DEVICE_RESET", "", 'n', false, EIO},
    {VFU_CMD_DEVICE_RESET, 0x51u, "", "DEVICE_RESET", "", 'y', false, EIO},
};

static bool takes_more(char longer, size_t more)
{
    return longer == 'y' || (longer == '2' && more % 2 == 0) || (longer == '4' && more == 4);
}

static size_t sample_bytes(const sample *s, uint8_t *out)
{
    return message(out, s->cmd, s->flags, s->error, s->payload);
}

/* Is n in a list such as "0,24-39"? */
static bool listed(const char *list, size_t n)
{
    while (*list != '\0') {
        char *end;
        size_t low = strtoul(list, &end, 10);
        size_t high = low;
        if (*end == '-') {
            high = strtoul(end + 1, &end, 10);
        }
        if (n >= low && n <= high) {
            return true;
        }
        list = end + (*end == ',');
    }
    return false;
}

static void render(const vfu_msg *m, char *out)
{
    int n = vfu_msg_render(m, out, ROOM);

    ck_assert_int_gt(n, 0);
    ck_assert_uint_lt((size_t)n, ROOM);
    ck_assert_uint_eq(strlen(out), (size_t)n);
}

/* What a decoded message encodes to decodes to the same message, and encodes to the same bytes. Returns their number. */
static size_t again(const vfu_msg *m, uint8_t *out)
{
    vfu_msg second;
    uint8_t *block;
    uint8_t bytes[ROOM];
    char first_text[ROOM];
    char second_text[ROOM];
    bool legacy = (m->cmd == VFU_CMD_DMA_READ || m->cmd == VFU_CMD_DMA_WRITE) && !vfu_msg_is_error(m) && m->u.dma.legacy;
    int n = vfu_msg_encode(m, out, ROOM);

    ck_assert_int_ge(n, 16);
    ck_assert_int_eq(decode(out, (size_t)n, legacy ? VFU_DMA_LAYOUT_QEMU10 : VFU_DMA_LAYOUT_SPEC, &second, &block), 0);
    ck_assert_int_eq(vfu_msg_encode(&second, bytes, sizeof bytes), n);
    ck_assert_mem_eq(bytes, out, (size_t)n);
    render(m, first_text);
    render(&second, second_text);
    ck_assert_str_eq(first_text, second_text);
    free(block);
    return (size_t)n;
}

START_TEST(test_codec_samples)
{
    unsigned seen[2][32] = {{0}};

    for (size_t i = 0; i < COUNT(samples); i++) {
        const sample *s = &samples[i];
        uint8_t bytes[ROOM];
        uint8_t encoded[ROOM];
        char text[ROOM];
        char expected[ROOM];
        uint8_t *block;
        vfu_msg m;
        size_t n = sample_bytes(s, bytes);
        bool reply = (s->flags & 0xf) == 1;
        int rc = decode(bytes, n, VFU_DMA_LAYOUT_AUTO, &m, &block);

        ck_assert_msg(rc == 0, "%d: %s", rc, s->text);
        ck_assert_uint_eq(m.id, 0x12);
        ck_assert_uint_eq(m.cmd, s->cmd);
        ck_assert_uint_eq(m.flags, s->flags);
        ck_assert_uint_eq(m.error, s->error);
        ck_assert(vfu_msg_is_reply(&m) == reply);
        ck_assert(vfu_msg_is_error(&m) == (reply && (s->flags & VFU_HDR_ERROR) != 0));
        ck_assert(vfu_msg_wants_reply(&m) == (!reply && (s->flags & VFU_HDR_NO_REPLY) == 0));
        render(&m, text);
        snprintf(expected, sizeof expected, "%s 0x0012 %s", reply ? "<-" : "->", s->text);
        ck_assert_str_eq(text, expected);
        if (s->ignored) {
            again(&m, encoded);
        } else {
            ck_assert_uint_eq(again(&m, encoded), n);
            ck_assert_mem_eq(encoded, bytes, n);
        }
        free(block);
        seen[reply][s->cmd]++;
    }
    for (uint16_t cmd = 1; cmd <= 18; cmd++) { /* the table is complete */
        ck_assert((seen[0][cmd] != 0) == (strcmp(vfu_cmd_name(cmd), "?") != 0));
        ck_assert((seen[1][cmd] != 0) == (seen[0][cmd] != 0));
    }
}
END_TEST

/* Every beginning of every message, with a size field that is honest about it and with one that isn't */
START_TEST(test_codec_shorter)
{
    for (size_t i = 0; i < COUNT(samples); i++) {
        const sample *s = &samples[i];
        uint8_t bytes[ROOM];
        uint8_t encoded[ROOM];
        size_t whole = sample_bytes(s, bytes);

        for (size_t n = 0; n < whole; n++) {
            uint8_t cut[ROOM];
            uint8_t *block;
            vfu_msg m;
            int rc;

            memcpy(cut, bytes, whole);
            ck_assert_int_eq(decode(cut, n, VFU_DMA_LAYOUT_AUTO, &m, &block), -EBADMSG);
            ck_assert(union_is_zero(&m));
            ck_assert_uint_eq(m.id, n < 16 ? 0 : 0x12);
            free(block);
            if (n < 16) {
                continue;
            }
            put(cut, 4, n, 4);
            rc = decode(cut, n, VFU_DMA_LAYOUT_AUTO, &m, &block);
            ck_assert_msg(rc == (listed(s->shorter, n - 16) ? 0 : -EINVAL), "%d with %zu bytes: %s", rc, n - 16, s->text);
            ck_assert_uint_eq(m.cmd, s->cmd);
            if (rc == 0) {
                again(&m, encoded);
            } else {
                ck_assert(union_is_zero(&m));
            }
            free(block);
        }
    }
}
END_TEST

START_TEST(test_codec_longer)
{
    for (size_t i = 0; i < COUNT(samples); i++) {
        const sample *s = &samples[i];
        uint8_t bytes[ROOM];
        uint8_t encoded[ROOM];
        size_t whole = sample_bytes(s, bytes);

        for (size_t more = 1; more <= 9; more++) {
            uint8_t *block;
            vfu_msg m;
            int rc;

            memset(bytes + whole, 0xff, more);
            ck_assert_int_eq(decode(bytes, whole + more, VFU_DMA_LAYOUT_AUTO, &m, &block), -EBADMSG); /* size isn't len */
            free(block);
            put(bytes, 4, whole + more, 4);
            rc = decode(bytes, whole + more, VFU_DMA_LAYOUT_AUTO, &m, &block);
            ck_assert_msg(rc == (takes_more(s->longer, more) ? 0 : -EINVAL), "%d with %zu more: %s", rc, more, s->text);
            if (rc == 0) {
                again(&m, encoded);
            } else {
                ck_assert(union_is_zero(&m));
            }
            free(block);
            put(bytes, 4, whole, 4);
        }
    }
}
END_TEST

/* Messages that must be refused; those that are only too short or too long are covered above. */
static const struct {
    int rc;
    uint16_t cmd;
    uint32_t flags;
    const char *payload;
} refused[] = {
    {-ENOSYS, 0, CMD, ""},
    {-ENOSYS, 14, CMD, "8:0"},
    {-ENOSYS, 19, CMD, ""},
    {-ENOSYS, 19, REPLY, ""},
    {-ENOSYS, 19, ERR, ""},
    {-ENOSYS, UINT16_MAX, CMD, "8:0"},
    {-EBADMSG, VFU_CMD_DEVICE_RESET, 2, ""},
    {-EBADMSG, VFU_CMD_DEVICE_RESET, 0xf, ""},
    {-EBADMSG, VFU_CMD_DEVICE_RESET, 0x23, ""},
    {-EBADMSG, 14, 2, ""},

    {-EINVAL, VFU_CMD_VERSION, CMD, "2:0 2:0 '{}' 1:0 'x'"},
    {-EINVAL, VFU_CMD_VERSION, CMD, "2:0 2:0 1:0 '{}' 1:0"},
    {-EINVAL, VFU_CMD_DMA_UNMAP, CMD, "4:48 4:1 8:0 8:0"},        /* a bitmap, but where? */
    {-EINVAL, VFU_CMD_DMA_UNMAP, CMD, "4:48 4:0 8:0 8:0 8:0 8:0"}, /* no bitmap, but what is this? */

    /* capability chains: before the chain, itself, back, overlapping, beyond, cut header, no room for what it says */
#define REGION(cap_offset) "4:64 4:8 4:0 4:" cap_offset " 8:0 8:0 "
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("1") "2:2 2:1 4:0 4:1 4:1 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("31") "2:2 2:1 4:0 4:1 4:1 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("57") "8:0 8:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("64") "8:0 8:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("65") "8:0 8:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("0xffffffff") "8:0 8:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:32 4:8 4:0 4:32 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:9 2:1 4:32 8:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:9 2:1 4:48 8:0 2:9 2:1 4:32 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:9 2:1 4:39 8:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:9 2:1 4:57 8:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:9 2:1 4:0xfffffff8 8:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:9 2:1 4:0xffffffff 8:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:9 2:1 4:1 8:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:1 2:1 4:0 4:2 4:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:1 2:1 4:0 4:0x10000001 4:0 8:0 8:0"}, /* wraps to 1 */
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:1 2:1 4:0 4:0xffffffff 4:0 8:0 8:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("32") "2:1 2:1 4:48 4:1 4:0 2:9 2:1 4:0 8:0"}, /* into the next */
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, REGION("52") "8:0 8:0 4:0 2:2 2:1 4:0 4:1"},
    /* a reply that says it is cut may end early, but not go round in circles */
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:4096 4:8 4:0 4:32 8:0 8:0 2:9 2:1 4:32"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:4096 4:8 4:0 4:8 8:0 8:0 2:9 2:1 4:0"},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:4096 4:8 4:0 4:31 8:0 8:0 2:9 2:1 4:0"},

    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_IO_FDS, REPLY, "4:16 4:0 4:0 4:1"}, /* neither there nor cut */
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_IO_FDS, REPLY, "4:96 4:0 4:0 4:3 " SUB_0 " " SUB_1},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_IO_FDS, REPLY, "4:96 4:0 4:0 4:0xffffffff " SUB_0 " " SUB_1},
    {-EINVAL, VFU_CMD_DEVICE_GET_REGION_IO_FDS, REPLY, "4:96 4:0 4:0 4:4 " SUB_0 " " SUB_1}, /* 20 bytes each */

    {-EINVAL, VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x00 4:0 4:0 4:0"},
    {-EINVAL, VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x01 4:0 4:0 4:0"},
    {-EINVAL, VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x20 4:0 4:0 4:0"},
    {-EINVAL, VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x23 4:0 4:0 4:0"},
    {-EINVAL, VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x31 4:0 4:0 4:0"},
    {-EINVAL, VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x61 4:0 4:0 4:0"},
    {-EINVAL, VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x80000021 4:0 4:0 4:0"},
    {-EINVAL, VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x21 4:0 4:0xffffffff 4:1"},
    {-EINVAL, VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x24 4:0 4:1 4:0xffffffff"},
    {-EINVAL, VFU_CMD_DEVICE_SET_IRQS, CMD, "4:20 4:0x22 4:0 4:0 4:0xffffffff 1:1"},

    {-EINVAL, VFU_CMD_REGION_WRITE, CMD, "8:0 4:0 4:4 4:0 4:0"},
    {-EINVAL, VFU_CMD_REGION_WRITE, CMD, "8:0 4:0 4:0xffffffff 4:0"},
    {-EINVAL, VFU_CMD_REGION_READ, REPLY, "8:0 4:0 4:0xfffffff0"},
    {-EINVAL, VFU_CMD_DMA_WRITE, CMD, "8:0 8:0x100000004 4:0"},
    {-EINVAL, VFU_CMD_DMA_WRITE, CMD, "8:0 8:0xfffffffffffffff0"},
    {-EINVAL, VFU_CMD_DMA_WRITE, REPLY, "8:0"},

    {-EINVAL, VFU_CMD_REGION_WRITE_MULTI, CMD, "8:1"},
    {-EINVAL, VFU_CMD_REGION_WRITE_MULTI, CMD, "8:2 8:0 4:0 4:4 8:0"},
    {-EINVAL, VFU_CMD_REGION_WRITE_MULTI, CMD, "8:0 8:0 4:0 4:4 8:0"},
    {-EINVAL, VFU_CMD_REGION_WRITE_MULTI, CMD, "8:0x0aaaaaaaaaaaaaac 8:0 4:0 4:4 8:0 8:0"}, /* times 24 it wraps to 32 */
    {-EINVAL, VFU_CMD_REGION_WRITE_MULTI, CMD, "8:0x100000001 8:0 4:0 4:4 8:0"},
    {-EINVAL, VFU_CMD_REGION_WRITE_MULTI, CMD, "8:1 8:0 4:0 4:9 8:0"},
    {-EINVAL, VFU_CMD_REGION_WRITE_MULTI, CMD, "8:2 8:0 4:0 4:8 8:0 8:0 4:0 4:0xffffffff 8:0"},

    {-EINVAL, VFU_CMD_DEVICE_FEATURE, CMD, "4:8 4:0x00001"},
    {-EINVAL, VFU_CMD_DEVICE_FEATURE, CMD, "4:8 4:0x30001"},
    {-EINVAL, VFU_CMD_DEVICE_FEATURE, CMD, "4:8 4:0x90001"},
    {-EINVAL, VFU_CMD_DEVICE_FEATURE, CMD, "4:8 4:0x80010001"},

    {-EINVAL, VFU_CMD_MIG_DATA_WRITE, CMD, "4:16 4:9 8:0"},
    {-EINVAL, VFU_CMD_MIG_DATA_WRITE, CMD, "4:16 4:0xfffffff8 8:0"},
    {-EINVAL, VFU_CMD_MIG_DATA_READ, REPLY, "4:16 4:7 8:0"},
    {-EINVAL, VFU_CMD_MIG_DATA_READ, CMD, "4:16 4:8 8:0"},
};

START_TEST(test_codec_refused)
{
    for (size_t i = 0; i < COUNT(refused); i++) {
        uint8_t bytes[ROOM];
        uint8_t *block;
        vfu_msg m;
        size_t n = message(bytes, refused[i].cmd, refused[i].flags, 7, refused[i].payload);
        int rc = decode(bytes, n, VFU_DMA_LAYOUT_AUTO, &m, &block);

        ck_assert_msg(rc == refused[i].rc, "%d, not %d: %u %s", rc, refused[i].rc, refused[i].cmd, refused[i].payload);
        ck_assert_uint_eq(m.id, 0x12);
        ck_assert_uint_eq(m.cmd, refused[i].cmd);
        ck_assert_uint_eq(m.flags, refused[i].flags);
        ck_assert_uint_eq(m.error, 7);
        ck_assert(union_is_zero(&m));
        free(block);
    }
}
END_TEST

/*
 * DMA data in the two layouts. For each message what comes of it if the layout is unknown, by the book, and QEMU 10's: the data,
 * or NULL where it must be refused. proven is for the unknown one.
 */
static const struct {
    uint16_t cmd;
    uint32_t flags;
    const char *payload;
    const char *unknown;
    const char *spec;
    const char *qemu10;
    bool proven;
} layouts[] = {
    /* by the book, with an end that no QEMU 10 sends */
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:8 x:0102030405060708", "0102030405060708", "0102030405060708", "0000000001020304", true},
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:1 x:07", "07", "07", "00", true},
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:5 x:0000000001", "0000000001", "0000000001", "0000000000", true},
    /* QEMU 10, with a beginning that shows in the count */
    {VFU_CMD_DMA_READ, REPLY, "8:1 4:8 x:0102030405060708 4:0", "0102030405060708", NULL, "0102030405060708", true},
    {VFU_CMD_DMA_READ, REPLY, "8:1 4:4 x:00000001 4:0", "00000001", NULL, "00000001", true},
    {VFU_CMD_DMA_READ, REPLY, "8:1 4:1 x:07 4:0", "07", NULL, "07", true},
    {VFU_CMD_DMA_READ, REPLY, "8:1 4:12 x:010000000000000000000000 4:0", "010000000000000000000000", NULL,
     "010000000000000000000000", true},
    /* both readings fit and differ: only a connection whose layout is known can have it */
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:8 x:0102030400000000", NULL, "0102030400000000", "0000000001020304", false},
    {VFU_CMD_DMA_READ, REPLY, "8:1 4:8 x:0000000005060708 4:0", NULL, "0506070800000000", "0000000005060708", false},
    /* both fit and are the same */
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:8 x:0000000000000000", "0000000000000000", "0000000000000000", "0000000000000000", false},
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:3 x:000000", "000000", "000000", "000000", false},
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:0", "", "", "", false},
    /* neither: wrong counts, an end that isn't 0 behind a high count */
    {VFU_CMD_DMA_READ, REPLY, "8:1 4:8 x:0102030405060708 4:1", NULL, NULL, "0102030405060708", false},
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:7 x:0102030405060708", NULL, NULL, NULL, false},
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:9 x:0102030405060708", NULL, NULL, NULL, false},
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:0xffffffffffffffff x:0102030405060708", NULL, NULL, NULL, false},
    {VFU_CMD_DMA_READ, REPLY, "8:1 4:0xfffffffc x:01020304", NULL, NULL, NULL, false},
    {VFU_CMD_DMA_READ, REPLY, "8:1 4:0", NULL, NULL, NULL, false},
    /* without its padding QEMU 10's layout looks like a book's reply that lost its end */
    {VFU_CMD_DMA_READ, REPLY, "8:1 4:8 x:0102030405060708", NULL, NULL, "0102030405060708", false},
    {VFU_CMD_DMA_READ, REPLY, "8:1 8:8 x:01020304", NULL, NULL, "0000000001020304", false},
    /* commands are by the book unless we know better, since we make them */
    {VFU_CMD_DMA_WRITE, CMD, "8:1 8:8 x:0102030405060708", "0102030405060708", "0102030405060708", "0000000001020304", false},
    {VFU_CMD_DMA_WRITE, CMD, "8:1 8:8 x:0000000000000000", "0000000000000000", "0000000000000000", "0000000000000000", false},
    {VFU_CMD_DMA_WRITE, CMD, "8:1 8:8 x:0102030400000000", "0102030400000000", "0102030400000000", "0000000001020304", false},
    {VFU_CMD_DMA_WRITE, CMD, "8:1 4:8 x:0102030405060708 4:0", NULL, NULL, "0102030405060708", false},
    {VFU_CMD_DMA_WRITE, CMD, "8:1 4:4 x:01020304", NULL, NULL, "01020304", false},
};

START_TEST(test_codec_dma_layouts)
{
    if (*(const uint8_t *)&(const uint16_t){1} == 0)
        return; /* the table is about two counts that begin at the same byte: little-endian */
    for (size_t i = 0; i < COUNT(layouts); i++) {
        const char *expected[3];
        uint8_t bytes[ROOM];
        uint8_t encoded[ROOM];
        size_t n = message(bytes, layouts[i].cmd, layouts[i].flags, 0, layouts[i].payload);

        expected[VFU_DMA_LAYOUT_AUTO] = layouts[i].unknown;
        expected[VFU_DMA_LAYOUT_SPEC] = layouts[i].spec;
        expected[VFU_DMA_LAYOUT_QEMU10] = layouts[i].qemu10;
        for (int layout = 0; layout < 3; layout++) {
            uint8_t data[ROOM];
            uint8_t *block;
            char description[ROOM];
            vfu_msg m;
            int rc = decode(bytes, n, (vfu_dma_layout)layout, &m, &block);

            ck_assert_msg(rc == (expected[layout] != NULL ? 0 : -EINVAL), "%d, layout %d: %s", rc, layout, layouts[i].payload);
            if (rc == 0) {
                snprintf(description, sizeof description, "x:%s", expected[layout]);
                ck_assert_uint_eq(m.u.dma.address, 1);
                ck_assert_uint_eq(m.u.dma.count, m.u.dma.data_len);
                ck_assert_uint_eq(m.u.dma.data_len, bytes_of(description, data));
                ck_assert_int_eq(memcmp(m.u.dma.data, data, m.u.dma.data_len), 0);
                ck_assert(m.u.dma.proven == (layout == VFU_DMA_LAYOUT_AUTO && layouts[i].proven));
                ck_assert(layout != VFU_DMA_LAYOUT_SPEC || !m.u.dma.legacy);
                ck_assert(layout != VFU_DMA_LAYOUT_QEMU10 || m.u.dma.legacy);
                again(&m, encoded);
            }
            free(block);
        }
    }
}
END_TEST

/* Whatever data QEMU 10 or a peer by the book sends, nobody gets other data out of it. */
START_TEST(test_codec_dma_never_shifted)
{
    static const uint8_t zeros[4];
    unsigned told = 0;
    unsigned refusals = 0;

    for (uint32_t count = 0; count <= 12; count++) {
        for (uint32_t pattern = 0; pattern < 1u << count; pattern++) {
            uint8_t data[12];
            for (uint32_t i = 0; i < count; i++) {
                data[i] = (pattern >> i & 1u) != 0 ? (uint8_t)(i + 1) : 0;
            }
            for (int legacy = 0; legacy < 2; legacy++) {
                vfu_msg m;
                vfu_msg out;
                uint8_t bytes[64];
                int n;

                vfu_msg_init(&m, 1, VFU_CMD_DMA_READ);
                m.flags = REPLY;
                m.u.dma.count = count;
                m.u.dma.data = data;
                m.u.dma.data_len = count;
                m.u.dma.legacy = legacy != 0;
                n = vfu_msg_encode(&m, bytes, sizeof bytes);
                ck_assert_int_eq(n, (int)(32 + count));
                if (vfu_msg_decode(bytes, (size_t)n, &out) == 0) {
                    ck_assert_uint_eq(out.u.dma.data_len, count);
                    ck_assert_int_eq(memcmp(out.u.dma.data, data, count), 0);
                    ck_assert(!out.u.dma.proven || out.u.dma.legacy == (legacy != 0));
                    told++;
                    ck_assert(out.u.dma.proven || count != 4 || memcmp(data, zeros, 4) == 0); /* a way to learn the layout */
                } else { /* only when the telling end is all zero, and never with 4 bytes or less */
                    ck_assert_uint_gt(count, 4);
                    ck_assert_int_eq(memcmp(legacy != 0 ? data : data + count - 4, zeros, 4), 0);
                    refusals++;
                }
            }
        }
    }
    ck_assert_uint_gt(told, refusals);
    /* In big-endian order the count of one layout never looks like that of the other. */
    ck_assert(refusals > 0 || *(const uint8_t *)&(const uint16_t){1} == 0);
}
END_TEST

START_TEST(test_codec_size)
{
    static const struct {
        size_t len;
        uint32_t field;
        uint32_t max;
        int rc;
    } cases[] = {
        {0, 16, 4096, -EAGAIN},   {1, 16, 4096, -EAGAIN},        {15, 16, 4096, -EAGAIN},  {15, 0, 4096, -EAGAIN},
        {16, 16, 4096, 0},        {16, 17, 4096, 0},             {16, 4096, 4096, 0},      {16, 4097, 4096, -EBADMSG},
        {16, 15, 4096, -EBADMSG}, {16, 0, 4096, -EBADMSG},       {16, 1, UINT32_MAX, -EBADMSG},
        {16, 16, 15, -EBADMSG},   {16, UINT32_MAX, UINT32_MAX, 0}, {20, 16, 4096, 0},
    };

    for (size_t i = 0; i < COUNT(cases); i++) {
        uint8_t bytes[32];
        uint8_t *block = malloc(cases[i].len != 0 ? cases[i].len : 1);
        uint32_t size = 12345;

        ck_assert_ptr_nonnull(block);
        memset(bytes, 0xff, sizeof bytes); /* nothing else in the header matters */
        put(bytes, 4, cases[i].field, 4);
        memcpy(block, bytes, cases[i].len);
        ck_assert_int_eq(vfu_msg_size(block, cases[i].len, cases[i].max, &size), cases[i].rc);
        ck_assert_uint_eq(size, cases[i].rc == 0 ? cases[i].field : 12345);
        free(block);
    }
}
END_TEST

/* Too little room is told, and not a byte is written beyond it; the head and the data are the message. */
START_TEST(test_codec_encode_room)
{
    for (size_t i = 0; i < COUNT(samples); i++) {
        uint8_t bytes[ROOM];
        uint8_t whole[ROOM];
        uint8_t head[ROOM];
        uint8_t *block;
        vfu_msg m;
        size_t n = sample_bytes(&samples[i], bytes);
        int size;
        int head_size;

        ck_assert_int_eq(decode(bytes, n, VFU_DMA_LAYOUT_AUTO, &m, &block), 0);
        size = vfu_msg_encode(&m, whole, sizeof whole);
        ck_assert_int_ge(size, 16);
        head_size = vfu_msg_encode_head(&m, head, sizeof head);
        ck_assert_int_ge(head_size, 16);
        ck_assert_int_le(head_size, size);
        ck_assert_mem_eq(head, whole, (size_t)head_size);
        if (m.cmd == VFU_CMD_VERSION) {
            ck_assert_int_eq(head_size, size);
        } else {
            ck_assert_int_le(head_size, VFU_MSG_HEAD_MAX);
        }
        for (size_t cap = 0; cap < (size_t)size; cap++) {
            uint8_t *small = malloc(cap != 0 ? cap : 1);
            ck_assert_ptr_nonnull(small);
            ck_assert_int_eq(vfu_msg_encode(&m, small, cap), -EMSGSIZE);
            ck_assert_int_eq(vfu_msg_encode_head(&m, small, cap), cap < (size_t)head_size ? -EMSGSIZE : head_size);
            free(small);
        }
        free(block);
    }
}
END_TEST

START_TEST(test_codec_encode_head)
{
    vfu_msg m;
    uint8_t head[VFU_MSG_HEAD_MAX];
    vfu_wire_header h;

    /* The data isn't needed, and may be larger than vfu_msg_encode could return. */
    vfu_msg_init(&m, 1, VFU_CMD_REGION_WRITE);
    m.u.region.count = m.u.region.data_len = 0x80000000u;
    ck_assert_int_eq(vfu_msg_encode_head(&m, head, sizeof head), 32);
    memcpy(&h, head, sizeof h);
    ck_assert_uint_eq(h.size, 32 + 0x80000000u);
    m.u.region.count = m.u.region.data_len = UINT32_MAX - 32;
    ck_assert_int_eq(vfu_msg_encode_head(&m, head, sizeof head), 32);
    m.u.region.count = m.u.region.data_len = UINT32_MAX - 31; /* 2^32 in all */
    ck_assert_int_eq(vfu_msg_encode_head(&m, head, sizeof head), -EMSGSIZE);
    m.u.region.data = head;
    ck_assert_int_eq(vfu_msg_encode(&m, head, sizeof head), -EMSGSIZE);

    /* QEMU 10's layout ends with the data here, which must reach to where the header by the book would end. */
    vfu_msg_init(&m, 1, VFU_CMD_DMA_WRITE);
    m.u.dma.legacy = true;
    m.u.dma.count = m.u.dma.data_len = 4;
    ck_assert_int_eq(vfu_msg_encode_head(&m, head, sizeof head), 28);
    memcpy(&h, head, sizeof h);
    ck_assert_uint_eq(h.size, 32);
    m.u.dma.count = m.u.dma.data_len = 3;
    ck_assert_int_eq(vfu_msg_encode_head(&m, head, sizeof head), -EINVAL);
}
END_TEST

/* What a caller can get wrong. Each case starts from a valid message. */
START_TEST(test_codec_encode_mistakes)
{
    static const uint8_t data[64] = {2, 0, 1, 0, 32, 0, 0, 0}; /* the start of a capability whose next is itself */
    uint8_t out[ROOM];
    vfu_msg m;

#define START(command, header_flags)                                                                                             \
    do {                                                                                                                         \
        vfu_msg_init(&m, 1, (command));                                                                                          \
        m.flags = (header_flags);                                                                                                \
    } while (0)
#define FINE() ck_assert_int_gt(vfu_msg_encode(&m, out, sizeof out), 0)
#define WRONG()                                                                                                                  \
    do {                                                                                                                         \
        ck_assert_int_eq(vfu_msg_encode(&m, out, sizeof out), -EINVAL);                                                          \
        ck_assert_int_eq(vfu_msg_encode_head(&m, out, sizeof out), -EINVAL);                                                     \
    } while (0)
#define WRONG_INSIDE() ck_assert_int_eq(vfu_msg_encode(&m, out, sizeof out), -EINVAL) /* the head alone doesn't show it */

    START(14, CMD);
    WRONG();
    START(VFU_CMD_DEVICE_RESET, 2);
    WRONG();
    m.flags = ERR;
    FINE();
    static const uint16_t unknown[] = {0, 14, 19, 99, 65535};
    for (size_t i = 0; i < sizeof(unknown) / sizeof(unknown[0]); i++) { /* only an error reply, which says so, can be of these */
        m.cmd = unknown[i];
        m.flags = ERR;
        FINE();
        m.flags = CMD;
        WRONG();
        m.flags = VFU_HDR_REPLY;
        WRONG();
    }

    START(VFU_CMD_VERSION, CMD);
    m.u.version.json_len = 2;
    WRONG();
    m.u.version.json = "{}";
    FINE();
    m.u.version.json_len = 3;
    WRONG();

    START(VFU_CMD_DMA_UNMAP, CMD);
    m.u.dma_unmap.data = data;
    FINE();
    m.u.dma_unmap.data_len = 16;
    WRONG();
    m.u.dma_unmap.flags = VFU_DMA_UNMAP_GET_DIRTY_BITMAP;
    FINE();
    m.u.dma_unmap.data_len = 15;
    WRONG();
    m.u.dma_unmap.data_len = 0;
    WRONG();
    m.flags = REPLY;
    FINE();

    START(VFU_CMD_DEVICE_GET_REGION_INFO, CMD);
    m.u.region_info.flags = VFU_REGION_INFO_CAPS;
    FINE();
    m.u.region_info.data_len = 8;
    WRONG();
    m.flags = REPLY;
    m.u.region_info.cap_offset = 32;
    WRONG_INSIDE(); /* no data */
    m.u.region_info.data = data;
    WRONG_INSIDE(); /* a circle */
    m.u.region_info.data = data + 8;
    FINE();
    m.u.region_info.cap_offset = 8;
    WRONG_INSIDE();
    m.u.region_info.cap_offset = 32;
    m.u.region_info.flags = 0;
    WRONG();
    m.u.region_info.flags = VFU_REGION_INFO_CAPS;
    m.u.region_info.data_len = UINT32_MAX;
    ck_assert_int_eq(vfu_msg_encode_head(&m, out, sizeof out), -EMSGSIZE);

    START(VFU_CMD_DEVICE_GET_REGION_IO_FDS, CMD);
    m.u.region_io_fds.data = data;
    m.u.region_io_fds.data_len = 40;
    m.u.region_io_fds.count = 1;
    WRONG();
    m.flags = REPLY;
    FINE();
    m.u.region_io_fds.data_len = 39;
    WRONG();
    m.u.region_io_fds.data_len = 0;
    WRONG();
    m.u.region_io_fds.argsz = 56;
    FINE();
    m.u.region_io_fds.count = 0;
    m.u.region_io_fds.data_len = 40;
    WRONG();

    START(VFU_CMD_DEVICE_SET_IRQS, CMD);
    m.u.irq_set.flags = VFU_IRQ_SET_DATA_BOOL | VFU_IRQ_SET_ACTION_MASK;
    m.u.irq_set.count = 2;
    m.u.irq_set.data = data;
    WRONG();
    m.u.irq_set.data_len = 2;
    FINE();
    m.u.irq_set.start = UINT32_MAX - 1;
    WRONG();
    m.u.irq_set.start = 0;
    m.u.irq_set.flags = VFU_IRQ_SET_DATA_NONE | VFU_IRQ_SET_ACTION_MASK;
    WRONG();
    m.u.irq_set.data_len = 0;
    FINE();
    m.u.irq_set.flags = VFU_IRQ_SET_DATA_NONE;
    WRONG();

    START(VFU_CMD_REGION_WRITE, CMD);
    m.u.region.count = 4;
    m.u.region.data = data;
    WRONG();
    m.u.region.data_len = 4;
    FINE();
    m.u.region.data = NULL;
    WRONG_INSIDE();
    m.u.region.data = data;
    m.flags = REPLY;
    WRONG();
    m.cmd = VFU_CMD_REGION_READ;
    FINE();
    m.flags = CMD;
    WRONG();

    START(VFU_CMD_DMA_WRITE, REPLY);
    m.u.dma.ack_len = 8;
    WRONG();
    m.u.dma.ack_len = 12;
    FINE();
    m.u.dma.count = UINT64_C(1) << 32;
    WRONG();
    m.u.dma.ack_len = 16;
    FINE();
    m.u.dma.legacy = true;
    WRONG();
    m.u.dma.legacy = false;
    m.u.dma.data_len = 4;
    WRONG();
    START(VFU_CMD_DMA_WRITE, CMD);
    m.u.dma.data = data;
    m.u.dma.data_len = 4;
    m.u.dma.count = (UINT64_C(1) << 32) + 4;
    WRONG();

    START(VFU_CMD_REGION_WRITE_MULTI, CMD);
    m.u.write_multi.count = 1;
    m.u.write_multi.data_len = 24;
    WRONG_INSIDE(); /* no data */
    m.u.write_multi.data = data + 8;
    FINE();
    m.u.write_multi.data = data;
    m.u.write_multi.count = 2;
    WRONG();
    m.u.write_multi.count = UINT64_C(0x0aaaaaaaaaaaaaab) + 1; /* 24 after wrapping, and 24 */
    WRONG();
    m.u.write_multi.count = 1;
    m.flags = REPLY;
    WRONG();

    START(VFU_CMD_DEVICE_FEATURE, CMD);
    WRONG();
    m.flags = REPLY;
    FINE();

    START(VFU_CMD_MIG_DATA_WRITE, CMD);
    m.u.mig_data.size = 4;
    WRONG();
    m.u.mig_data.data = data;
    m.u.mig_data.data_len = 4;
    FINE();
    m.cmd = VFU_CMD_MIG_DATA_READ;
    WRONG();
#undef START
#undef FINE
#undef WRONG
#undef WRONG_INSIDE
}
END_TEST

START_TEST(test_codec_init)
{
    vfu_msg command;
    vfu_msg reply;

    memset(&command, 0xff, sizeof command);
    vfu_msg_init(&command, 77, VFU_CMD_REGION_READ);
    ck_assert_uint_eq(command.id, 77);
    ck_assert_uint_eq(command.cmd, VFU_CMD_REGION_READ);
    ck_assert_uint_eq(command.flags, 0);
    ck_assert_uint_eq(command.error, 0);
    ck_assert(union_is_zero(&command));

    command.flags = VFU_HDR_NO_REPLY | 0x80;
    command.u.region.count = 4;
    memset(&reply, 0xff, sizeof reply);
    vfu_msg_init_reply(&reply, &command, 0);
    ck_assert_uint_eq(reply.id, 77);
    ck_assert_uint_eq(reply.cmd, VFU_CMD_REGION_READ);
    ck_assert_uint_eq(reply.flags, VFU_HDR_REPLY);
    ck_assert_uint_eq(reply.error, 0);
    ck_assert(union_is_zero(&reply));

    vfu_msg_init_reply(&reply, &command, -ENOSPC);
    ck_assert(vfu_msg_is_error(&reply));
    ck_assert_uint_eq(reply.error, ENOSPC);
    vfu_msg_init_reply(&command, &command, ENOSPC);
    ck_assert_int_eq(memcmp(&reply, &command, sizeof reply), 0);
    vfu_msg_init_reply(&reply, &command, INT_MIN);
    ck_assert_uint_eq(reply.error, 0x80000000u);
}
END_TEST

/* A decoded sample, for the accessors; free(*block) */
static void load(uint16_t cmd, uint32_t flags, const char *payload, vfu_msg *m, uint8_t **block)
{
    uint8_t bytes[ROOM];
    size_t n = message(bytes, cmd, flags, 0, payload);

    ck_assert_int_eq(decode(bytes, n, VFU_DMA_LAYOUT_AUTO, m, block), 0);
}

START_TEST(test_codec_write_multi)
{
    vfu_msg m;
    uint8_t *block;
    vfu_wire_write_one one;

    load(VFU_CMD_REGION_WRITE_MULTI, CMD, "8:2 8:0x10 4:3 4:4 x:0102030405060708 8:0x18 4:1 4:8 x:1112131415161718", &m, &block);
    ck_assert_int_eq(vfu_msg_write_one(&m, 0, &one), 0);
    ck_assert_uint_eq(one.offset, 0x10);
    ck_assert_uint_eq(one.region, 3);
    ck_assert_uint_eq(one.count, 4);
    ck_assert_int_eq(memcmp(one.data, "\1\2\3\4\5\6\7\10", 8), 0);
    ck_assert_int_eq(vfu_msg_write_one(&m, 1, &one), 0);
    ck_assert_uint_eq(one.offset, 0x18);
    ck_assert_uint_eq(one.count, 8);
    ck_assert_int_eq(vfu_msg_write_one(&m, 2, &one), -EINVAL);
    ck_assert_int_eq(vfu_msg_write_one(&m, UINT64_MAX, &one), -EINVAL);

    /* what changed behind the decoder's back is checked again */
    block[24 + 12] = 9;
    ck_assert_int_eq(vfu_msg_write_one(&m, 0, &one), -EINVAL);
    m.u.write_multi.count = 1000;
    ck_assert_int_eq(vfu_msg_write_one(&m, 1, &one), 0);
    ck_assert_int_eq(vfu_msg_write_one(&m, 2, &one), -EINVAL);
    m.u.write_multi.data = NULL;
    ck_assert_int_eq(vfu_msg_write_one(&m, 0, &one), -EINVAL);
    free(block);

    load(VFU_CMD_REGION_WRITE_MULTI, REPLY, "8:2", &m, &block);
    ck_assert_int_eq(vfu_msg_write_one(&m, 0, &one), -EINVAL);
    free(block);
    load(VFU_CMD_REGION_READ, CMD, "8:2 4:0 4:0", &m, &block);
    ck_assert_int_eq(vfu_msg_write_one(&m, 0, &one), -EINVAL);
    free(block);
}
END_TEST

START_TEST(test_codec_sub_regions)
{
    vfu_msg m;
    uint8_t *block;
    vfu_wire_sub_region sub;

    load(VFU_CMD_DEVICE_GET_REGION_IO_FDS, REPLY, "4:112 4:0 4:0 4:2 " SUB_0 " 8:0 " SUB_1 " 8:0", &m, &block);
    ck_assert_uint_eq(m.u.region_io_fds.stride, 48);
    ck_assert(!m.u.region_io_fds.truncated);
    ck_assert_int_eq(vfu_msg_sub_region(&m, 1, &sub), 0);
    ck_assert_uint_eq(sub.offset, 0x20);
    ck_assert_uint_eq(sub.size, 8);
    ck_assert_uint_eq(sub.fd_index, 1);
    ck_assert_uint_eq(sub.type, VFU_IO_FD_IOREGIONFD);
    ck_assert_uint_eq(sub.flags, 2);
    ck_assert_uint_eq(sub.data, 0x1234);
    ck_assert_int_eq(vfu_msg_sub_region(&m, 2, &sub), -EINVAL);
    m.u.region_io_fds.count = 3; /* 32 bytes each are too few */
    ck_assert_int_eq(vfu_msg_sub_region(&m, 0, &sub), -EINVAL);
    free(block);

    load(VFU_CMD_DEVICE_GET_REGION_IO_FDS, REPLY, "4:96 4:0 4:0 4:2", &m, &block);
    ck_assert_uint_eq(m.u.region_io_fds.stride, 0);
    ck_assert(m.u.region_io_fds.truncated);
    ck_assert_int_eq(vfu_msg_sub_region(&m, 0, &sub), -EINVAL);
    free(block);
    load(VFU_CMD_DEVICE_GET_REGION_IO_FDS, CMD, "4:96 4:0 4:0 4:2", &m, &block);
    ck_assert(!m.u.region_io_fds.truncated);
    ck_assert_int_eq(vfu_msg_sub_region(&m, 0, &sub), -EINVAL);
    free(block);
}
END_TEST

START_TEST(test_codec_region_caps)
{
    vfu_msg m;
    uint8_t *block;
    vfu_region_cap cap = {0};
    vfu_wire_sparse_area area;
    vfu_wire_cap_type type;
    uint32_t count = 99;

    load(VFU_CMD_DEVICE_GET_REGION_INFO, REPLY,
         "4:112 4:15 4:9 4:32 8:0x4000 8:0x8000 " TYPE_CAP("48") " 2:77 2:3 4:64 8:0x1122 " SPARSE_CAP, &m, &block);
    ck_assert(!m.u.region_info.truncated);
    ck_assert(vfu_msg_next_cap(&m, &cap));
    ck_assert_uint_eq(cap.id, VFU_REGION_CAP_TYPE);
    ck_assert_uint_eq(cap.data_len, 8);
    ck_assert_int_eq(vfu_region_cap_type(&cap, &type), 0);
    ck_assert_uint_eq(type.type, 0x10de);
    ck_assert_uint_eq(type.subtype, 7);
    ck_assert_uint_eq(type.header.version, 1);
    ck_assert_int_eq(vfu_region_cap_areas(&cap, &count), -EINVAL);
    ck_assert_int_eq(vfu_region_cap_area(&cap, 0, &area), -EINVAL);
    ck_assert(vfu_msg_next_cap(&m, &cap));
    ck_assert_uint_eq(cap.id, 77);
    ck_assert_uint_eq(cap.version, 3);
    ck_assert_uint_eq(cap.data_len, 8);
    ck_assert_int_eq(vfu_region_cap_type(&cap, &type), -EINVAL);
    ck_assert(vfu_msg_next_cap(&m, &cap));
    ck_assert_int_eq(vfu_region_cap_areas(&cap, &count), 0);
    ck_assert_uint_eq(count, 2);
    ck_assert_int_eq(vfu_region_cap_area(&cap, 1, &area), 0);
    ck_assert_uint_eq(area.offset, 0x2000);
    ck_assert_uint_eq(area.size, 0x1000);
    ck_assert_int_eq(vfu_region_cap_area(&cap, 2, &area), -EINVAL);
    ck_assert(!vfu_msg_next_cap(&m, &cap));
    ck_assert(!vfu_msg_next_cap(&m, &cap)); /* and stays there */
    memset(&cap, 0, sizeof cap);
    m.u.region_info.data = NULL;
    ck_assert(!vfu_msg_next_cap(&m, &cap));
    free(block);

    /* cut in the middle of the second one */
    load(VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:96 4:15 4:9 4:32 8:0x4000 8:0x8000 " TYPE_CAP("48") " 2:1 2:1 4:0 4:2 4:0 8:0",
         &m, &block);
    ck_assert(m.u.region_info.truncated);
    memset(&cap, 0, sizeof cap);
    ck_assert(vfu_msg_next_cap(&m, &cap));
    ck_assert(!vfu_msg_next_cap(&m, &cap));
    free(block);

    /* no capabilities: other messages, and bytes without the flag */
    load(VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, "4:48 4:7 4:9 4:32 8:0x4000 8:0x8000 " TYPE_CAP("0"), &m, &block);
    memset(&cap, 0, sizeof cap);
    ck_assert(!vfu_msg_next_cap(&m, &cap));
    ck_assert_uint_eq(m.u.region_info.data_len, 0);
    free(block);
    load(VFU_CMD_DEVICE_GET_REGION_INFO, CMD, "4:48 4:15 4:9 4:32 8:0x4000 8:0x8000 " TYPE_CAP("0"), &m, &block);
    memset(&cap, 0, sizeof cap);
    ck_assert(!vfu_msg_next_cap(&m, &cap));
    free(block);
    load(VFU_CMD_DEVICE_RESET, REPLY, "", &m, &block);
    memset(&cap, 0, sizeof cap);
    ck_assert(!vfu_msg_next_cap(&m, &cap));
    free(block);
}
END_TEST

START_TEST(test_codec_set_region_caps)
{
    static const vfu_wire_sparse_area areas[2] = {{0, 0x1000}, {0x2000, 0x1000}};
    static const vfu_wire_cap_type type = {{0, 0, 0}, 0x10de, 7};
    static const char expected[] = "4:96 4:15 4:9 4:32 8:0x4000 8:0x8000 " TYPE_CAP("48") " " SPARSE_CAP;
    uint8_t wanted[ROOM];
    uint8_t bytes[ROOM];
    uint8_t buf[64];
    vfu_msg m;
    size_t n = message(wanted, VFU_CMD_DEVICE_GET_REGION_INFO, REPLY, 0, expected);

    vfu_msg_init(&m, 0x12, VFU_CMD_DEVICE_GET_REGION_INFO);
    ck_assert_int_eq(vfu_msg_set_region_caps(&m, 96, &type, areas, 2, buf, sizeof buf), -EINVAL); /* a command */
    m.flags = REPLY;
    m.u.region_info.flags = VFU_REGION_INFO_READ | VFU_REGION_INFO_WRITE | VFU_REGION_INFO_MMAP;
    m.u.region_info.index = 9;
    m.u.region_info.size = 0x4000;
    m.u.region_info.offset = 0x8000;
    ck_assert_int_eq(vfu_msg_set_region_caps(&m, 31, &type, areas, 2, buf, sizeof buf), -EINVAL);
    ck_assert_int_eq(vfu_msg_set_region_caps(&m, 96, &type, areas, 2, buf, 63), -EMSGSIZE);
    ck_assert_int_eq(vfu_msg_set_region_caps(&m, 96, &type, areas, UINT32_MAX, buf, sizeof buf), -EMSGSIZE);
    ck_assert_int_eq(vfu_msg_set_region_caps(&m, 96, &type, areas, 2, buf, 64), 0);
    ck_assert_int_eq(vfu_msg_encode(&m, bytes, sizeof bytes), (int)n);
    ck_assert_mem_eq(bytes, wanted, n);
    ck_assert(!m.u.region_info.truncated);

    /* one byte too little at the other side: QEMU's 32 bytes, and again with the flag still set from before */
    ck_assert_int_eq(vfu_msg_set_region_caps(&m, 95, &type, areas, 2, buf, 64), 0);
    ck_assert(m.u.region_info.truncated);
    ck_assert_uint_eq(m.u.region_info.argsz, 96);
    ck_assert_uint_eq(m.u.region_info.cap_offset, 0);
    ck_assert_uint_eq(m.u.region_info.flags & VFU_REGION_INFO_CAPS, 0);
    ck_assert_int_eq(vfu_msg_encode(&m, bytes, sizeof bytes), 16 + 32);

    /* each alone, and none */
    ck_assert_int_eq(vfu_msg_set_region_caps(&m, 48, &type, NULL, 0, buf, 16), 0);
    ck_assert_uint_eq(m.u.region_info.argsz, 48);
    ck_assert_int_eq(vfu_msg_encode(&m, bytes, sizeof bytes), 16 + 48);
    ck_assert_int_eq(vfu_msg_set_region_caps(&m, 4096, NULL, areas, 1, buf, 32), 0);
    ck_assert_uint_eq(m.u.region_info.argsz, 64);
    ck_assert_int_eq(vfu_msg_encode(&m, bytes, sizeof bytes), 16 + 64);
    ck_assert_int_eq(vfu_msg_set_region_caps(&m, 32, NULL, NULL, 0, NULL, 0), 0);
    ck_assert_uint_eq(m.u.region_info.argsz, 32);
    ck_assert(!m.u.region_info.truncated);
    ck_assert_int_eq(vfu_msg_encode(&m, bytes, sizeof bytes), 16 + 32);
}
END_TEST

START_TEST(test_codec_features)
{
    static const uint8_t bits[8] = {3, 0, 0, 0, 0, 0, 0, 0x80};
    static const vfu_wire_feature_log_range in_ranges[2] = {{0x1000, 0x2000}, {0x8000, 0x1000}};
    const vfu_wire_feature_migration in_mig = {VFU_MIG_STOP_COPY | VFU_MIG_PRE_COPY};
    const vfu_wire_feature_mig_state in_state = {VFU_MIG_STATE_STOP_COPY, -1};
    const vfu_wire_feature_log_control in_control = {4096, 2, 0};
    const vfu_wire_feature_log_report in_report = {0x1000, 0x2000, 4096};
    vfu_wire_feature_migration mig;
    vfu_wire_feature_mig_state state;
    vfu_wire_feature_log_control control;
    vfu_wire_feature_log_range range;
    vfu_wire_feature_log_report report;
    const uint8_t *bitmap;
    uint32_t bitmap_len;
    uint8_t buf[64];
    vfu_msg m;

    vfu_msg_init(&m, 1, VFU_CMD_DEVICE_FEATURE);
    m.flags = REPLY;

    m.u.feature.flags = VFU_FEATURE_GET | VFU_FEATURE_MIGRATION;
    ck_assert_int_eq(vfu_feature_migration(&m, &mig), -EINVAL); /* no payload yet */
    ck_assert_int_eq(vfu_feature_set_migration(&m, &in_mig, buf, 7), -EMSGSIZE);
    ck_assert_int_eq(vfu_feature_set_migration(&m, &in_mig, buf, 8), 0);
    ck_assert_uint_eq(m.u.feature.argsz, 16);
    ck_assert_int_eq(vfu_feature_migration(&m, &mig), 0);
    ck_assert_uint_eq(mig.flags, 5);
    ck_assert_int_eq(vfu_feature_mig_state(&m, &state), -EINVAL); /* long enough, but another feature */
    m.u.feature.data_len = 7;
    ck_assert_int_eq(vfu_feature_migration(&m, &mig), -EINVAL);

    ck_assert_int_eq(vfu_feature_set_mig_state(&m, &in_state, buf, sizeof buf), -EINVAL);
    m.u.feature.flags = VFU_FEATURE_SET | VFU_FEATURE_MIG_STATE;
    ck_assert_int_eq(vfu_feature_set_mig_state(&m, &in_state, buf, sizeof buf), 0);
    ck_assert_int_eq(vfu_feature_mig_state(&m, &state), 0);
    ck_assert_uint_eq(state.state, VFU_MIG_STATE_STOP_COPY);
    ck_assert_int_eq(state.data_fd, -1);

    m.u.feature.flags = VFU_FEATURE_SET | VFU_FEATURE_LOGGING_START;
    ck_assert_int_eq(vfu_feature_set_log_control(&m, &in_control, in_ranges, buf, 47), -EMSGSIZE);
    ck_assert_int_eq(vfu_feature_set_log_control(&m, &in_control, in_ranges, buf, 48), 0);
    ck_assert_uint_eq(m.u.feature.argsz, 56);
    ck_assert_int_eq(vfu_feature_log_control(&m, &control), 0);
    ck_assert_uint_eq(control.page_size, 4096);
    ck_assert_uint_eq(control.num_ranges, 2);
    ck_assert_int_eq(vfu_feature_log_range(&m, 1, &range), 0);
    ck_assert_uint_eq(range.iova, 0x8000);
    ck_assert_uint_eq(range.length, 0x1000);
    ck_assert_int_eq(vfu_feature_log_range(&m, 2, &range), -EINVAL);
    m.u.feature.data_len = 47; /* the last range isn't all there */
    ck_assert_int_eq(vfu_feature_log_control(&m, &control), -EINVAL);
    ck_assert_int_eq(vfu_feature_log_range(&m, 0, &range), -EINVAL);
    m.u.feature.data_len = 48;
    put(buf, 8, 0x10000002, 4); /* wraps to 2 ranges */
    ck_assert_int_eq(vfu_feature_log_control(&m, &control), -EINVAL);
    control = in_control;
    control.num_ranges = UINT32_MAX;
    ck_assert_int_eq(vfu_feature_set_log_control(&m, &control, in_ranges, buf, sizeof buf), -EMSGSIZE);

    m.u.feature.flags = VFU_FEATURE_GET | VFU_FEATURE_LOGGING_REPORT;
    ck_assert_int_eq(vfu_feature_set_log_report(&m, &in_report, bits, sizeof bits, buf, 31), -EMSGSIZE);
    ck_assert_int_eq(vfu_feature_set_log_report(&m, &in_report, bits, UINT32_MAX, buf, SIZE_MAX), -EMSGSIZE);
    ck_assert_int_eq(vfu_feature_set_log_report(&m, &in_report, bits, sizeof bits, buf, 32), 0);
    ck_assert_int_eq(vfu_feature_log_report(&m, &report, &bitmap, &bitmap_len), 0);
    ck_assert_uint_eq(report.iova, 0x1000);
    ck_assert_uint_eq(report.length, 0x2000);
    ck_assert_uint_eq(report.page_size, 4096);
    ck_assert_uint_eq(bitmap_len, 8);
    ck_assert_mem_eq(bitmap, bits, 8);
    ck_assert_int_eq(vfu_feature_set_log_report(&m, &in_report, buf + 24, 8, buf, 32), 0); /* in its place already */
    ck_assert_mem_eq(buf + 24, bits, 8);

    m.flags = ERR; /* an error has no payload, whatever the union holds */
    ck_assert_int_eq(vfu_feature_log_report(&m, &report, &bitmap, &bitmap_len), -EINVAL);
    vfu_msg_init(&m, 1, VFU_CMD_DEVICE_RESET);
    ck_assert_int_eq(vfu_feature_set_migration(&m, &in_mig, buf, sizeof buf), -EINVAL);
}
END_TEST

/* Like snprintf: the whole length is returned, what fits is written and terminated, and nothing beyond. */
START_TEST(test_codec_render_room)
{
    for (size_t i = 0; i < COUNT(samples); i++) {
        uint8_t bytes[ROOM];
        char whole[ROOM];
        uint8_t *block;
        vfu_msg m;
        size_t size = sample_bytes(&samples[i], bytes);
        int n;

        ck_assert_int_eq(decode(bytes, size, VFU_DMA_LAYOUT_AUTO, &m, &block), 0);
        n = vfu_msg_render(&m, whole, sizeof whole);
        ck_assert_int_eq(vfu_msg_render(&m, NULL, 0), n);
        for (size_t cap = 1; cap <= (size_t)n + 1; cap++) {
            char *small = malloc(cap);
            ck_assert_ptr_nonnull(small);
            ck_assert_int_eq(vfu_msg_render(&m, small, cap), n);
            ck_assert_uint_eq(strlen(small), cap - 1);
            ck_assert_int_eq(memcmp(small, whole, cap - 1), 0);
            free(small);
        }
        free(block);
    }
}
END_TEST

/* Messages that no decoder made: unknown commands, views without data since that went another way, long arrays and texts */
START_TEST(test_codec_render_odd)
{
    static const char json[300] = {'{'};
    static const uint8_t many[5 * 24] = {0};
    char out[ROOM];
    vfu_msg m;

    vfu_msg_init(&m, 0xabcd, 99);
    render(&m, out);
    ck_assert_str_eq(out, "-> 0xabcd command 99");
    m.flags = ERR;
    m.error = ENOSYS;
    render(&m, out);
    ck_assert_str_eq(out, "<- 0xabcd command 99 error ENOSYS");

    vfu_msg_init(&m, 1, VFU_CMD_REGION_WRITE);
    m.u.region.count = m.u.region.data_len = 100;
    render(&m, out);
    ck_assert_str_eq(out, "-> 0x0001 REGION_WRITE BAR0 + 0x0 count 100");
    vfu_msg_init(&m, 1, VFU_CMD_REGION_WRITE_MULTI);
    m.u.write_multi.count = 5;
    m.u.write_multi.data_len = sizeof many;
    render(&m, out);
    ck_assert_str_eq(out, "-> 0x0001 REGION_WRITE_MULTI count 5 ...");
    m.u.write_multi.data = many;
    render(&m, out);
    ck_assert_ptr_nonnull(strstr(out, "count 0 ] ..."));
    vfu_msg_init(&m, 1, VFU_CMD_DEVICE_FEATURE);
    m.u.feature.flags = VFU_FEATURE_GET | VFU_FEATURE_LOGGING_REPORT;
    m.u.feature.data_len = 100;
    render(&m, out);
    ck_assert_str_eq(out, "-> 0x0001 DEVICE_FEATURE LOGGING_REPORT get argsz 0");
    vfu_msg_init(&m, 1, VFU_CMD_DEVICE_GET_REGION_INFO);
    m.flags = REPLY;
    m.u.region_info.flags = VFU_REGION_INFO_CAPS;
    m.u.region_info.cap_offset = 32;
    m.u.region_info.data_len = 100;
    render(&m, out);
    ck_assert_str_eq(out, "<- 0x0001 DEVICE_GET_REGION_INFO BAR0 size 0x0 caps offset 0x0 argsz 0");

    vfu_msg_init(&m, 1, VFU_CMD_VERSION);
    m.u.version.json = json;
    m.u.version.json_len = sizeof json;
    render(&m, out);
    ck_assert_uint_eq(strlen(out), strlen("-> 0x0001 VERSION 0.0 ") + 256 + strlen(" ..."));
}
END_TEST

/* xorshift64*: the same sequence everywhere */
static uint64_t random_state;

static uint32_t random_below(uint32_t n)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)((random_state * 0x2545f4914f6cdd1du) >> 33) % n;
}

static void damage(uint8_t *bytes, size_t *n)
{
    static const uint64_t edges[] = {0, 1, 7, 8, 9, 16, 24, 32, 40, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff, UINT64_MAX};

    for (uint32_t i = 1 + random_below(3); i > 0; i--) {
        size_t at = random_below((uint32_t)*n);
        unsigned width = 1u << random_below(4);
        switch (random_below(4)) {
        case 0:
            bytes[at] = (uint8_t)random_below(256);
            break;
        case 1:
            at &= ~(size_t)(width - 1);
            put(bytes, at, edges[random_below((uint32_t)COUNT(edges))], width);
            break;
        case 2:
            *n = 16 + random_below((uint32_t)*n - 15);
            put(bytes, 4, *n, 4);
            break;
        default:
            *n += random_below(32);
            put(bytes, 4, *n, 4);
            break;
        }
    }
    if (random_below(16) != 0) {
        put(bytes, 4, *n, 4); /* mostly well framed */
    }
}

/* Uses all that a decoded message offers, so that a sanitizer sees views that lead astray. */
static uint32_t use(const vfu_msg *m)
{
    vfu_region_cap cap = {0};
    vfu_wire_sparse_area area;
    vfu_wire_sub_region sub;
    vfu_wire_write_one one;
    vfu_wire_feature_log_range range;
    uint32_t sum = 0;
    uint32_t steps = 0;

    while (vfu_msg_next_cap(m, &cap)) {
        ck_assert_uint_lt(++steps, ROOM / 8);
        for (uint32_t i = 0; i < cap.data_len; i++) {
            sum += cap.data[i];
        }
        for (uint32_t i = 0; vfu_region_cap_area(&cap, i, &area) == 0; i++) {
            sum += (uint32_t)area.size;
        }
    }
    for (uint32_t i = 0; vfu_msg_sub_region(m, i, &sub) == 0; i++) {
        sum += (uint32_t)sub.size;
    }
    for (uint32_t i = 0; vfu_msg_write_one(m, i, &one) == 0; i++) {
        sum += one.count;
    }
    for (uint32_t i = 0; vfu_feature_log_range(m, i, &range) == 0; i++) {
        sum += (uint32_t)range.length;
    }
    return sum;
}

START_TEST(test_codec_damage)
{
    static uint8_t whole[COUNT(samples)][ROOM];
    size_t size[COUNT(samples)];
    unsigned decoded = 0;

    for (size_t i = 0; i < COUNT(samples); i++) {
        size[i] = sample_bytes(&samples[i], whole[i]);
    }

    random_state = 0x123456789abcdef1u + (uint64_t)_i;
    for (int round = 0; round < 50000; round++) {
        uint8_t bytes[ROOM];
        uint8_t encoded[ROOM];
        uint8_t *block;
        vfu_msg m;
        uint32_t which = random_below((uint32_t)COUNT(samples));
        size_t n = size[which];
        int rc;

        memcpy(bytes, whole[which], ROOM);
        damage(bytes, &n);
        rc = decode(bytes, n, (vfu_dma_layout)random_below(3), &m, &block);
        if (rc == 0) {
            decoded++;
            use(&m);
            again(&m, encoded);
        } else {
            char text[ROOM];
            ck_assert(rc == -EINVAL || rc == -EBADMSG || rc == -ENOSYS);
            ck_assert(union_is_zero(&m));
            vfu_msg_render(&m, text, sizeof text);
        }
        free(block);
    }
    ck_assert_uint_gt(decoded, 5000); /* or the test would say nothing */
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("codec");
    TCase *tc = tcase_create("codec");
    SRunner *runner;
    int failed;

    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, test_codec_samples);
    tcase_add_test(tc, test_codec_shorter);
    tcase_add_test(tc, test_codec_longer);
    tcase_add_test(tc, test_codec_refused);
    tcase_add_test(tc, test_codec_dma_layouts);
    tcase_add_test(tc, test_codec_dma_never_shifted);
    tcase_add_test(tc, test_codec_size);
    tcase_add_test(tc, test_codec_encode_room);
    tcase_add_test(tc, test_codec_encode_head);
    tcase_add_test(tc, test_codec_encode_mistakes);
    tcase_add_test(tc, test_codec_init);
    tcase_add_test(tc, test_codec_write_multi);
    tcase_add_test(tc, test_codec_sub_regions);
    tcase_add_test(tc, test_codec_region_caps);
    tcase_add_test(tc, test_codec_set_region_caps);
    tcase_add_test(tc, test_codec_features);
    tcase_add_test(tc, test_codec_render_room);
    tcase_add_test(tc, test_codec_render_odd);
    tcase_add_loop_test(tc, test_codec_damage, 0, 4); /* 4 seeds of 50,000 rounds */
    suite_add_tcase(suite, tc);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
