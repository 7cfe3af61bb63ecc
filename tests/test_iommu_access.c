/* SPDX-License-Identifier: MIT */
/*
 * Section "access" of vfu_iommu.h: what is allowed happens to exactly the right bytes, everything else to none, and the fault
 * says where. Every small layout of mappings is tried with every range; then copies that overlap, patterns, words, callbacks
 * and memory that has disappeared. All of it with both kinds of reader.
 */
#define _GNU_SOURCE
#include "vfu_iommu.h"

#include <check.h>
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RW     (VFU_IOMMU_READ | VFU_IOMMU_WRITE)
#define TOP(n) ((uint64_t)0 - (n)) /* n bytes below 2^64 */

static vfu_iommu *table;
static vfu_iommu_reader *reader, *readers[2]; /* the one in use; a plain and a local one */
static int reader_kind;

static void use_plain_reader(void) { reader_kind = 0; }
static void use_local_reader(void) { reader_kind = 1; }

static void open_readers(void)
{
    ck_assert_int_eq(vfu_iommu_reader_open(table, &readers[0]), 0);
    ck_assert_int_eq(vfu_iommu_reader_open_local(table, &readers[1]), 0);
    reader = readers[reader_kind];
}

/* ---- callbacks and guard ---------------------------------------------------------------------------------------------- */

/* Memory behind callbacks is at ctx, for the mapping that begins at io_base. */
static uint64_t io_base;
static int io_error;          /* what the callbacks return, from the io_countdown-th call on */
static unsigned io_countdown; /* 0: never fail */
static unsigned io_calls;
static size_t io_len; /* of the last call */

static int io_result(size_t len)
{
    io_calls++;
    io_len = len;
    ck_assert_uint_gt(len, 0);
    return io_countdown && --io_countdown == 0 ? io_error : 0;
}

static int io_read(void *ctx, uint64_t iova, void *dst, size_t len)
{
    int err = io_result(len);
    if (!err)
        memcpy(dst, (char *)ctx + (iova - io_base), len);
    return err;
}

static int io_write(void *ctx, uint64_t iova, const void *src, size_t len)
{
    int err = io_result(len);
    if (!err)
        memcpy((char *)ctx + (iova - io_base), src, len);
    return err;
}

static const vfu_iommu_io io = {.read = io_read, .write = io_write};
static const vfu_iommu_io io_read_only = {.read = io_read};
static const vfu_iommu_io io_write_only = {.write = io_write};

/* A guard as a program would write it: the SIGBUS of a truncated file ends the body. */
static sigjmp_buf guard_jump;
static volatile sig_atomic_t guard_active;
static const void *volatile guard_bad;
static unsigned guard_calls;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
    (void)context;
    if (!guard_active)
        _exit(128 + sig);
    guard_bad = info->si_addr;
    siglongjmp(guard_jump, 1);
}

static int guard(void *ctx, void (*body)(void *arg), void *arg, const void **bad)
{
    (void)ctx;
    guard_calls++;
    if (sigsetjmp(guard_jump, 1)) {
        guard_active = 0;
        *bad = guard_bad;
        return -EFAULT;
    }
    guard_active = 1;
    body(arg);
    guard_active = 0;
    return 0;
}

/* ---- fixture ---------------------------------------------------------------------------------------------------------- */

static void make_table(void)
{
    vfu_iommu_desc desc = {.guard = guard, .max_mappings = 1000, .max_readers = 2};
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    open_readers();
    io_countdown = 0;
    io_calls = guard_calls = 0;
}

static void end_table(void)
{
    ck_assert_int_eq(vfu_iommu_check(table), 0);
    vfu_iommu_reader_close(readers[0]);
    vfu_iommu_reader_close(readers[1]);
    vfu_iommu_destroy(table);
}

/* kind: 'h' host, 'i' callbacks, 'g' guarded. */
static void map_kind(char kind, uint64_t iova, uint64_t size, uint32_t prot, void *at)
{
    vfu_iommu_mapping m = {.iova = iova, .size = size, .prot = prot};
    if (kind == 'i') {
        m.io = &io;
        m.io_ctx = (char *)at - (iova - io_base);
    } else {
        m.host = at;
        m.flags = kind == 'g' ? VFU_IOMMU_GUARDED : 0;
    }
    ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
}

static uint64_t faults_counted(void)
{
    vfu_iommu_stats stats;
    vfu_iommu_get_stats(table, &stats);
    return stats.faults;
}

/* The access that gave `result` failed with `error` at `iova`, and was counted and logged once. */
static uint64_t faults_before;
#define failed_at(result, wanted, wanted_iova, wanted_prot) \
    do { \
        faults_before = faults_counted(); \
        ck_assert_int_eq(result, wanted); \
        const vfu_iommu_fault *f_ = vfu_iommu_last_fault(reader); \
        vfu_iommu_fault newest_; \
        ck_assert_int_eq(f_->error, wanted); \
        ck_assert_uint_eq(f_->iova, (wanted_iova)); \
        ck_assert_uint_eq(f_->prot, wanted_prot); \
        ck_assert_uint_eq(faults_counted(), faults_before + 1); \
        ck_assert_uint_eq(vfu_iommu_get_faults(table, &newest_, 1), 1); \
        ck_assert_uint_eq(newest_.iova, (wanted_iova)); \
        ck_assert_int_eq(newest_.error, wanted); \
    } while (0)

/* ---- every layout of four mappings, every range ----------------------------------------------------------------------- */

enum { CELL = 4, CELLS = 4, SPAN = CELL * CELLS, STRIDE = 8 };

static const char alphabet[] = ".rwbig"; /* hole; read, write, both; both by callbacks; both, guarded */
static char layout[CELLS];
static char cells[CELLS][STRIDE], untouched[CELLS][STRIDE], other[SPAN];
static uint64_t at_base, other_base;

static uint32_t prot_of(char c) { return c == '.' ? 0 : c == 'r' ? VFU_IOMMU_READ : c == 'w' ? VFU_IOMMU_WRITE : RW; }

static void reset_memory(void)
{
    for (int c = 0; c < CELLS; c++)
        for (int i = 0; i < STRIDE; i++)
            cells[c][i] = untouched[c][i] = (char)(16 * c + i + 1);
    for (int i = 0; i < SPAN; i++)
        other[i] = (char)(0x80 + i);
}

/* What a plain loop over the bytes says about an access. */
static int wanted_result(unsigned offset, unsigned len, uint32_t prot, uint64_t *at)
{
    for (unsigned i = offset; i < offset + len; i++) {
        char c = i < SPAN ? layout[i / CELL] : '.';
        *at = at_base + i;
        if (c == '.')
            return -ENOENT;
        if ((prot_of(c) & prot) != prot)
            return -EACCES;
    }
    return 0;
}

#define CHECK(condition) \
    do { \
        if (!(condition)) \
            ck_abort_msg("layout %.4s at 0x%llx, %s of %u bytes at %u: %s", layout, (unsigned long long)at_base, what, len, \
                         offset, #condition); \
    } while (0)

enum { READ, WRITE, FILL, COPY_FROM, COPY_TO, PROBE_READ, PROBE_WRITE, PROBE_BOTH, HOWS };
static const char *const how_name[HOWS] = {"read", "write", "fill", "copy from", "copy to", "probe r", "probe w", "probe rw"};
static const uint32_t how_prot[HOWS] = {1, 2, 2, 1, 2, 1, 2, 3};

static void try_range(int how, unsigned offset, unsigned len)
{
    const char *what = how_name[how];
    char buffer[SPAN + 2], pattern[2] = {'x', 'y'};
    uint64_t at, iova = at_base + offset;
    int err = 0, wanted = wanted_result(offset, len, how_prot[how], &at);
    memset(buffer, '-', sizeof(buffer));
    reader = readers[(offset + len + (unsigned)how) & 1];
    switch (how) {
    case READ: err = vfu_iommu_read(reader, iova, buffer + 1, len); break;
    case WRITE: err = vfu_iommu_write(reader, iova, other, len); break;
    case FILL: err = vfu_iommu_fill(reader, iova, len, pattern, 2); break;
    case COPY_FROM: err = vfu_iommu_copy(reader, other_base, iova, len); break;
    case COPY_TO: err = vfu_iommu_copy(reader, iova, other_base, len); break;
    default: err = vfu_iommu_probe(reader, iova, len, how_prot[how]); break;
    }
    CHECK(err == wanted);
    if (wanted) {
        const vfu_iommu_fault *fault = vfu_iommu_last_fault(reader);
        CHECK(fault->iova == at && fault->error == wanted && fault->prot == how_prot[how]);
    }
    bool moved = !wanted && how <= COPY_TO;
    for (unsigned i = 0; i < SPAN; i++) {
        bool in = moved && i >= offset && i < offset + len;
        char *cell = &cells[i / CELL][i % CELL], was = untouched[i / CELL][i % CELL];
        char now = in && how == FILL                        ? pattern[(i - offset) & 1]
                   : in && (how == WRITE || how == COPY_TO) ? (char)(0x80 + i - offset)
                                                            : was;
        CHECK(*cell == now);
        *cell = was;
        bool read = moved && i < len && (how == READ || how == COPY_FROM);
        char source = read ? untouched[(offset + i) / CELL][(offset + i) % CELL] : 0;
        CHECK(buffer[1 + i] == (read && how == READ ? source : '-'));
        CHECK(other[i] == (read && how == COPY_FROM ? source : (char)(0x80 + i)));
        other[i] = (char)(0x80 + i);
    }
    CHECK(buffer[0] == '-' && buffer[SPAN + 1] == '-');
    for (unsigned c = 0; c < CELLS; c++) /* what lies beside the mapped bytes */
        CHECK(!memcmp(cells[c] + CELL, untouched[c] + CELL, STRIDE - CELL));
}

/* _i: the first letter of the layout, twice: somewhere, and at the very top of the addresses. */
START_TEST(every_layout)
{
    bool top = _i >= (int)sizeof(alphabet) - 1;
    at_base = top ? TOP(SPAN) : 0xffc;
    other_base = 0x10000;
    reset_memory();
    make_table();
    map_kind('h', other_base, SPAN, RW, other);
    layout[0] = alphabet[_i % (int)(sizeof(alphabet) - 1)];
    for (unsigned n = 0; n < 6 * 6 * 6; n++) {
        layout[1] = alphabet[n % 6];
        layout[2] = alphabet[n / 6 % 6];
        layout[3] = alphabet[n / 36];
        io_base = at_base;
        for (unsigned c = 0; c < CELLS; c++) {
            uint64_t iova = at_base + c * CELL;
            if (layout[c] == 'i') {
                vfu_iommu_mapping m = {
                    .iova = iova, .size = CELL, .prot = RW, .io = &io, .io_ctx = (char *)cells + c * (STRIDE - CELL)};
                ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
            } else if (layout[c] != '.') {
                map_kind(layout[c] == 'g' ? 'g' : 'h', iova, CELL, prot_of(layout[c]), cells[c]);
            }
        }
        for (unsigned offset = 0; offset < SPAN; offset++)
            for (unsigned len = 0; len <= SPAN - offset + !top && len <= SPAN; len++) /* also one byte too many */
                for (int how = 0; how < HOWS; how++)
                    try_range(how, offset, len);
        ck_assert_int_ge(vfu_iommu_unmap(table, at_base, SPAN), 0);
    }
    end_table();
}
END_TEST

/* ---- borders ---------------------------------------------------------------------------------------------------------- */

START_TEST(empty_ranges_do_nothing)
{
    static const uint64_t anywhere[] = {0, 0x1234, UINT64_MAX};
    char byte = 'b';
    make_table();
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(vfu_iommu_read(reader, anywhere[i], &byte, 0), 0);
        ck_assert_int_eq(vfu_iommu_write(reader, anywhere[i], &byte, 0), 0);
        ck_assert_int_eq(vfu_iommu_fill(reader, anywhere[i], 0, &byte, 1), 0);
        ck_assert_int_eq(vfu_iommu_copy(reader, anywhere[i], anywhere[2 - i], 0), 0);
        ck_assert_int_eq(vfu_iommu_probe(reader, anywhere[i], 0, RW), 0);
    }
    ck_assert_int_eq(vfu_iommu_last_fault(reader)->error, 0);
    ck_assert_uint_eq(faults_counted(), 0);
    end_table();
}
END_TEST

/* A range that would go on at 0 is refused as such, whatever is mapped at both ends. */
START_TEST(wrapping_ranges)
{
    char memory[64] = "unchanged", buffer[64];
    make_table();
    map_kind('h', TOP(32), 32, RW, memory);
    map_kind('h', 0, 32, RW, memory + 32);
    failed_at(vfu_iommu_read(reader, UINT64_MAX, buffer, 2), -EINVAL, UINT64_MAX, VFU_IOMMU_READ);
    failed_at(vfu_iommu_write(reader, TOP(32), buffer, 33), -EINVAL, TOP(32), VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_fill(reader, TOP(1), 2, buffer, 1), -EINVAL, TOP(1), VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_fill(reader, 1, UINT64_MAX, "", 1), -ENOENT, 32, VFU_IOMMU_WRITE); /* ends at 2^64: no wrap */
    failed_at(vfu_iommu_fill(reader, 2, UINT64_MAX, "", 1), -EINVAL, 2, VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_probe(reader, 1, UINT64_MAX, VFU_IOMMU_READ), -ENOENT, 32, VFU_IOMMU_READ);
    failed_at(vfu_iommu_probe(reader, 3, UINT64_MAX - 1, RW), -EINVAL, 3, RW);
    failed_at(vfu_iommu_copy(reader, TOP(8), 0, 9), -EINVAL, TOP(8), VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_copy(reader, 0, TOP(8), 9), -EINVAL, TOP(8), VFU_IOMMU_READ);
    failed_at(vfu_iommu_copy(reader, TOP(4), TOP(8), 9), -EINVAL, TOP(8), VFU_IOMMU_READ);
    ck_assert_str_eq(memory, "unchanged");
    ck_assert_int_eq(vfu_iommu_write(reader, TOP(32), "the last 32 bytes of all of them", 32), 0);
    ck_assert_int_eq(vfu_iommu_read(reader, TOP(4), buffer, 4), 0);
    ck_assert(!memcmp(buffer, "them", 4));
    end_table();
}
END_TEST

/* The source of a copy is checked before its destination. */
START_TEST(copy_names_the_side_that_failed)
{
    char memory[32];
    make_table();
    map_kind('h', 0x1000, 16, VFU_IOMMU_READ, memory);
    map_kind('h', 0x2000, 16, VFU_IOMMU_WRITE, memory + 16);
    failed_at(vfu_iommu_copy(reader, 0x9000, 0x8000, 4), -ENOENT, 0x8000, VFU_IOMMU_READ);
    failed_at(vfu_iommu_copy(reader, 0x9000, 0x2000, 4), -EACCES, 0x2000, VFU_IOMMU_READ);
    failed_at(vfu_iommu_copy(reader, 0x9000, 0x1000, 4), -ENOENT, 0x9000, VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_copy(reader, 0x1000, 0x1000, 4), -EACCES, 0x1000, VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_copy(reader, 0x2000, 0x1008, 9), -ENOENT, 0x1010, VFU_IOMMU_READ);
    failed_at(vfu_iommu_copy(reader, 0x200c, 0x1000, 5), -ENOENT, 0x2010, VFU_IOMMU_WRITE);
    ck_assert_int_eq(vfu_iommu_copy(reader, 0x2000, 0x1000, 16), 0);
    end_table();
}
END_TEST

/* A translation that was used often is gone with its mapping; what comes in its place is used at once. */
START_TEST(remapped_addresses)
{
    char first[4096] = "first", second[4096] = "second", buffer[8];
    make_table();
    for (int i = 0; i < 100; i++) {
        map_kind('h', 0x5000, 4096, RW, first);
        ck_assert_int_eq(vfu_iommu_read(reader, 0x5000, buffer, 8), 0);
        ck_assert_str_eq(buffer, "first");
        ck_assert_int_eq(vfu_iommu_unmap(table, 0x5000, 4096), 1);
        failed_at(vfu_iommu_read(reader, 0x5000, buffer, 1), -ENOENT, 0x5000, VFU_IOMMU_READ);
        map_kind('h', 0x5000, 4096, VFU_IOMMU_READ, second);
        ck_assert_int_eq(vfu_iommu_read(reader, 0x5000, buffer, 8), 0);
        ck_assert_str_eq(buffer, "second");
        failed_at(vfu_iommu_write(reader, 0x5fff, buffer, 1), -EACCES, 0x5fff, VFU_IOMMU_WRITE);
        ck_assert_int_eq(vfu_iommu_unmap(table, 0x5000, 4096), 1);
        map_kind('h', 0x4800, 4096, RW, second); /* the node is used again, for other addresses */
        failed_at(vfu_iommu_read(reader, 0x5800, buffer, 1), -ENOENT, 0x5800, VFU_IOMMU_READ);
        ck_assert_int_eq(vfu_iommu_read(reader, 0x57ff, buffer, 1), 0);
        ck_assert_int_eq(vfu_iommu_unmap_all(table), 1);
    }
    end_table();
}
END_TEST

/* ---- copies that overlap ---------------------------------------------------------------------------------------------- */

/* Sizes of neighbouring mappings, to be repeated, and of which kind they are. The memory behind them is not in order. */
static const struct mosaic {
    const char *name, *kinds;
    unsigned sizes[4];
} mosaics[] = {
    {"one mapping", "h", {0}},
    {"pages", "h", {4096, 4096, 4096, 4096}},
    {"odd sizes", "h", {1, 70001, 513, 9999}},
    {"all kinds", "hig", {4096, 5000, 66000, 777}},
    {"callbacks", "i", {65536, 4097, 65537, 3}},
    {"guarded", "g", {8192, 100000, 1, 65535}},
};
enum { MOSAICS = sizeof(mosaics) / sizeof(mosaics[0]), MOSAIC = 310000 };

static char *mosaic_memory, *mosaic_model;
static struct {
    size_t at, size, place;
} tile[1000];
static unsigned tiles;

/* Maps MOSAIC bytes at iova; the tiles lie in memory with the last one first. */
static void map_mosaic(const struct mosaic *m, uint64_t iova)
{
    size_t at = 0, place = MOSAIC, kinds = strlen(m->kinds);
    for (tiles = 0; at < MOSAIC; tiles++) {
        size_t size = m->sizes[tiles % 4];
        if (!size || size > MOSAIC - at)
            size = MOSAIC - at;
        place -= size;
        io_base = iova + at; /* each mapping has its own context */
        vfu_iommu_mapping map = {.iova = iova + at, .size = size, .prot = RW};
        char kind = m->kinds[tiles % kinds];
        if (kind == 'i') {
            map.io = &io;
            map.io_ctx = (void *)((uintptr_t)mosaic_memory + place - at);
            io_base = iova;
        } else {
            map.host = mosaic_memory + place;
            map.flags = kind == 'g' ? VFU_IOMMU_GUARDED : 0;
        }
        ck_assert_int_eq(vfu_iommu_map(table, &map), 0);
        tile[tiles].at = at;
        tile[tiles].size = size;
        tile[tiles].place = place;
        at += size;
    }
    io_base = iova;
}

static void mosaic_fill(void)
{
    uint32_t luck = 12345;
    for (unsigned i = 0; i < MOSAIC; i++) {
        luck = luck * 1664525u + 1013904223u;
        mosaic_model[i] = (char)(luck >> 24);
    }
    for (unsigned t = 0; t < tiles; t++)
        memcpy(mosaic_memory + tile[t].place, mosaic_model + tile[t].at, tile[t].size);
}

static bool mosaic_is_same(void)
{
    for (unsigned t = 0; t < tiles; t++)
        if (memcmp(mosaic_memory + tile[t].place, mosaic_model + tile[t].at, tile[t].size))
            return false;
    return true;
}

static void begin_mosaic(const struct mosaic *m, uint64_t iova)
{
    make_table();
    mosaic_memory = malloc(MOSAIC);
    mosaic_model = malloc(MOSAIC);
    map_mosaic(m, iova);
    mosaic_fill();
}

static void end_mosaic(void)
{
    end_table();
    free(mosaic_memory);
    free(mosaic_model);
}

START_TEST(copy_is_memmove)
{
    static const unsigned distance[] = {0, 1, 7, 512, 4095, 4096, 65535, 65536, 65537, 99999};
    static const unsigned length[] = {1, 100, 4096, 65536, 65537, 131073, 200000};
    const struct mosaic *m = &mosaics[_i];
    uint64_t iova = _i & 1 ? TOP(MOSAIC) : 0x12345;
    begin_mosaic(m, iova);
    for (unsigned d = 0; d < sizeof(distance) / sizeof(distance[0]); d++) {
        for (unsigned l = 0; l < sizeof(length) / sizeof(length[0]); l++) {
            for (unsigned down = 0; down < 2; down++) {
                unsigned low = 13, src = down ? low + distance[d] : low, dst = down ? low : low + distance[d];
                ck_assert_msg(!vfu_iommu_copy(reader, iova + dst, iova + src, length[l]), "%s: copy", m->name);
                memmove(mosaic_model + dst, mosaic_model + src, length[l]);
                ck_assert_msg(mosaic_is_same(), "%s: %u bytes from %u to %u", m->name, length[l], src, dst);
            }
        }
    }
    ck_assert_int_eq(vfu_iommu_copy(reader, iova, iova + 1, MOSAIC - 1), 0); /* all of it, to both ends */
    ck_assert_int_eq(vfu_iommu_copy(reader, iova + 1, iova, MOSAIC - 1), 0);
    memmove(mosaic_model, mosaic_model + 1, MOSAIC - 1);
    memmove(mosaic_model + 1, mosaic_model, MOSAIC - 1);
    ck_assert(mosaic_is_same());
    end_mosaic();
}
END_TEST

/* Whole ranges over many mappings, longer than a piece. */
START_TEST(read_and_write_long_ranges)
{
    static char buffer[MOSAIC];
    uint64_t iova = _i & 1 ? TOP(MOSAIC) : 0x12345;
    begin_mosaic(&mosaics[_i], iova);
    ck_assert_int_eq(vfu_iommu_read(reader, iova, buffer, MOSAIC), 0);
    ck_assert(!memcmp(buffer, mosaic_model, MOSAIC));
    for (unsigned i = 0; i < MOSAIC; i++)
        mosaic_model[i] = buffer[i] = (char)~buffer[i];
    ck_assert_int_eq(vfu_iommu_write(reader, iova, buffer, MOSAIC), 0);
    ck_assert(mosaic_is_same());
    end_mosaic();
}
END_TEST

/* A pattern goes on over the borders of mappings and pieces, and starts anew at the range's first byte. */
START_TEST(fill_patterns)
{
    static const unsigned start[] = {0, 1, 2, 3, 5, 511, 4090, 70000};
    static const unsigned length[] = {1, 2, 7, 511, 512, 513, 5000, 65536, 65541, 150001};
    uint64_t iova = _i & 1 ? TOP(MOSAIC) : 0x12345;
    begin_mosaic(&mosaics[_i], iova);
    for (unsigned n = 0; n < 8 * 10 * 4; n++) {
        unsigned at = start[n % 8], len = length[n / 8 % 10], width = 1u << n / 80;
        unsigned char pattern[8];
        for (unsigned i = 0; i < 8; i++)
            pattern[i] = (unsigned char)(n * 8 + i + 1);
        ck_assert_int_eq(vfu_iommu_fill(reader, iova + at, len, pattern, width), 0);
        for (unsigned i = 0; i < len; i++)
            mosaic_model[at + i] = (char)pattern[i % width];
        ck_assert_msg(mosaic_is_same(), "%s: %u bytes of pattern %u at %u", mosaics[_i].name, len, width, at);
    }
    static const size_t wrong[] = {0, 3, 5, 6, 7, 9, 16, SIZE_MAX};
    for (unsigned i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
        failed_at(vfu_iommu_fill(reader, iova, 16, "0123456789abcdef", wrong[i]), -EINVAL, iova, VFU_IOMMU_WRITE);
    ck_assert(mosaic_is_same());
    end_mosaic();
}
END_TEST

/* ---- words ------------------------------------------------------------------------------------------------------------ */

static const struct word_case {
    const char *name;
    uint64_t iova;
    unsigned width;
    int load, store; /* results */
    int64_t at;      /* of the fault, from iova */
} word_cases[] = {
    /* 0x1000: 32 bytes both, then 16 read, 16 write, 16 both; 0x2000: host memory at an odd address; */
    /* 0x3000: callbacks, 64 bytes; 0x4000: guarded; 0x5000: 4 bytes both, 4 bytes read, hole */
    {"a byte", 0x1003, 1, 0, 0, 0},
    {"two bytes", 0x1006, 2, 0, 0, 0},
    {"four bytes", 0x1004, 4, 0, 0, 0},
    {"eight bytes", 0x1008, 8, 0, 0, 0},
    {"the last eight bytes", 0x1018, 8, 0, 0, 0},
    {"no bytes", 0x1000, 0, -EINVAL, -EINVAL, 0},
    {"three bytes", 0x1000, 3, -EINVAL, -EINVAL, 0},
    {"sixteen bytes", 0x1000, 16, -EINVAL, -EINVAL, 0},
    {"very many", 0x1000, 1u << 31, -EINVAL, -EINVAL, 0},
    {"two at an odd address", 0x1001, 2, -EINVAL, -EINVAL, 0},
    {"four at half of four", 0x1002, 4, -EINVAL, -EINVAL, 0},
    {"eight at half of eight", 0x1004, 8, -EINVAL, -EINVAL, 0},
    {"alignment counts before the mapping", 0x9001, 2, -EINVAL, -EINVAL, 0},
    {"only readable", 0x1020, 4, 0, -EACCES, 0},
    {"only writable", 0x1030, 4, -EACCES, 0, 0},
    {"nothing there", 0x9000, 4, -ENOENT, -ENOENT, 0},
    {"one byte at an odd place in memory", 0x2001, 1, 0, 0, 0},
    {"two bytes at an odd place in memory", 0x2002, 2, -EINVAL, -EINVAL, 0},
    {"eight bytes at an odd place in memory", 0x2008, 8, -EINVAL, -EINVAL, 0},
    {"a byte by callbacks", 0x3001, 1, 0, 0, 0},
    {"two bytes by callbacks", 0x3002, 2, 0, 0, 0},
    {"four bytes by callbacks", 0x3004, 4, 0, 0, 0},
    {"eight bytes by callbacks", 0x3008, 8, 0, 0, 0},
    {"guarded byte", 0x4005, 1, 0, 0, 0},
    {"guarded eight bytes", 0x4008, 8, 0, 0, 0},
    {"over two mappings", 0x5000, 8, -ENOTSUP, -EACCES, 0},
    {"over a mapping and a hole", 0x5008, 8, -ENOENT, -ENOENT, 4},
    {"over two mappings by callbacks", 0x6000, 4, -ENOTSUP, -ENOTSUP, 0},
    {"over three mappings", 0x7000, 8, -ENOTSUP, -ENOTSUP, 0},
    {"the last byte of all", UINT64_MAX, 1, 0, 0, 0},
    {"the last eight of all", TOP(8), 8, 0, 0, 0},
};

static _Alignas(64) unsigned char words[512];

static void map_words(void)
{
    make_table();
    map_kind('h', 0x1000, 32, RW, words);
    map_kind('h', 0x1020, 16, VFU_IOMMU_READ, words + 32);
    map_kind('h', 0x1030, 16, VFU_IOMMU_WRITE, words + 48);
    map_kind('h', 0x2000, 16, RW, words + 65);
    io_base = 0;
    map_kind('i', 0x3000, 64, RW, words + 128);
    map_kind('g', 0x4000, 64, RW, words + 192);
    map_kind('h', 0x5000, 4, RW, words + 256);
    map_kind('h', 0x5004, 4, VFU_IOMMU_READ, words + 260);
    map_kind('h', 0x5008, 4, RW, words + 264);
    map_kind('i', 0x6000, 2, RW, words + 272);
    map_kind('h', 0x6002, 2, RW, words + 274);
    map_kind('h', 0x7000, 4, RW, words + 280);
    map_kind('h', 0x7004, 2, RW, words + 284);
    map_kind('h', 0x7006, 2, RW, words + 286);
    map_kind('h', TOP(16), 16, RW, words + 320);
}

/* Where the table's memory has the address; io_base is 0. */
static unsigned char *word_at(uint64_t iova)
{
    vfu_iommu_mapping m;
    ck_assert_int_eq(vfu_iommu_next(table, iova, &m), 1);
    return m.io ? (unsigned char *)m.io_ctx + iova : (unsigned char *)m.host + (iova - m.iova);
}

static void try_word(const struct word_case *c)
{
    const uint64_t poison = UINT64_C(0xfedcba9876543210), value = UINT64_C(0x8877665544332211);
    /* how far a word's bytes are above the lowest of a number that begins with them */
    const unsigned high = *(const unsigned char *)&(const uint16_t){1} ? 0 : 64 - 8 * c->width;
    unsigned char before[sizeof(words)];
    map_words();
    for (unsigned i = 0; i < sizeof(words); i++)
        words[i] = before[i] = (unsigned char)(i * 7 + 3);
    for (int order = 0; order < 2; order++) {
        uint64_t got = poison, from_memory = 0;
        io_calls = 0;
        if (c->load) {
            failed_at(vfu_iommu_load(reader, c->iova, c->width, order ? VFU_IOMMU_ACQUIRE : 0, &got), c->load,
                      c->iova + (c->load == -ENOENT ? (uint64_t)c->at : 0), VFU_IOMMU_READ);
            ck_assert_uint_eq(got, poison);
        } else {
            ck_assert_msg(!vfu_iommu_load(reader, c->iova, c->width, order ? VFU_IOMMU_ACQUIRE : 0, &got), "%s", c->name);
            memcpy(&from_memory, word_at(c->iova), c->width);
            from_memory >>= high;
            ck_assert_msg(got == from_memory, "%s: loaded 0x%llx", c->name, (unsigned long long)got);
        }
        if (c->store) {
            uint64_t at = c->store == -EACCES && !c->load ? 0 : (uint64_t)c->at;
            if (c->iova == 0x5000)
                at = 4; /* the second mapping forbids it */
            failed_at(vfu_iommu_store(reader, c->iova, c->width, order ? VFU_IOMMU_RELEASE : 0, value), c->store, c->iova + at,
                      VFU_IOMMU_WRITE);
        } else {
            ck_assert_msg(!vfu_iommu_store(reader, c->iova, c->width, order ? VFU_IOMMU_RELEASE : 0, value), "%s", c->name);
            const uint64_t stored = value << high;
            memcpy(before + (word_at(c->iova) - words), &stored, c->width);
        }
        ck_assert_msg(!memcmp(words, before, sizeof(words)), "%s: memory", c->name);
        if ((c->iova & ~(uint64_t)0xff) == 0x3000) { /* one call each, of the whole word */
            ck_assert_uint_eq(io_calls, 2);
            ck_assert_uint_eq(io_len, c->width);
        }
    }
    end_table();
}

START_TEST(word_table)
{
    for (size_t i = 0; i < sizeof(word_cases) / sizeof(word_cases[0]); i++)
        try_word(&word_cases[i]);
}
END_TEST

START_TEST(word_orders)
{
    uint64_t value = 1;
    map_words();
    static const int wrong_for_load[] = {VFU_IOMMU_RELEASE, 3, -1}, wrong_for_store[] = {VFU_IOMMU_ACQUIRE, 3, -1};
    for (int i = 0; i < 3; i++) {
        failed_at(vfu_iommu_load(reader, 0x1000, 4, wrong_for_load[i], &value), -EINVAL, 0x1000, VFU_IOMMU_READ);
        failed_at(vfu_iommu_store(reader, 0x1000, 4, wrong_for_store[i], 2), -EINVAL, 0x1000, VFU_IOMMU_WRITE);
    }
    ck_assert_uint_eq(value, 1);
    end_table();
}
END_TEST

/* ---- callbacks -------------------------------------------------------------------------------------------------------- */

/* host 0x1000..0x1fff, callbacks 0x2000..0x2fff and 0x3000..0x3fff, host 0x4000..0x4fff */
static char page_memory[4][4096];

static void map_four_pages(void)
{
    make_table();
    io_base = 0x1000;
    for (unsigned i = 0; i < 4; i++) {
        memset(page_memory[i], (int)('a' + i), 4096);
        vfu_iommu_mapping m = {.iova = 0x1000 + i * 0x1000, .size = 0x1000, .prot = RW};
        if (i == 1 || i == 2) {
            m.io = &io;
            m.io_ctx = page_memory;
        } else {
            m.host = page_memory[i];
        }
        ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    }
}

/* A callback's error is the access's, and its address is where that callback was to begin. */
START_TEST(callback_error_of_a_read)
{
    static char buffer[0x4000];
    map_four_pages();
    io_error = -EIO;
    io_countdown = 2;
    failed_at(vfu_iommu_read(reader, 0x1800, buffer, 0x3000), -EIO, 0x3000, VFU_IOMMU_READ);
    ck_assert(buffer[0] == 'a' && buffer[0x7ff] == 'a' && buffer[0x800] == 'b' && buffer[0x17ff] == 'b' && !buffer[0x1800]);
    end_table();
}
END_TEST

START_TEST(callback_error_of_a_write)
{
    static char buffer[0x4000];
    memset(buffer, 'x', sizeof(buffer));
    map_four_pages();
    io_error = -ENODEV;
    io_countdown = 1;
    failed_at(vfu_iommu_write(reader, 0x1800, buffer, 0x3000), -ENODEV, 0x2000, VFU_IOMMU_WRITE);
    ck_assert(page_memory[0][0x7ff] == 'a' && page_memory[0][0x800] == 'x' && page_memory[1][0] == 'b' &&
              page_memory[3][0] == 'd');
    io_countdown = 1;
    failed_at(vfu_iommu_fill(reader, 0x2800, 16, "yz", 2), -ENODEV, 0x2800, VFU_IOMMU_WRITE);
    io_countdown = 1;
    failed_at(vfu_iommu_store(reader, 0x2808, 8, VFU_IOMMU_RELEASE, 1), -ENODEV, 0x2808, VFU_IOMMU_WRITE);
    uint64_t value = 77;
    io_countdown = 1;
    failed_at(vfu_iommu_load(reader, 0x2808, 8, VFU_IOMMU_ACQUIRE, &value), -ENODEV, 0x2808, VFU_IOMMU_READ);
    ck_assert_uint_eq(value, 77);
    end_table();
}
END_TEST

START_TEST(callback_error_of_a_copy)
{
    map_four_pages();
    io_error = -EIO;
    io_countdown = 1;
    failed_at(vfu_iommu_copy(reader, 0x1000, 0x2010, 100), -EIO, 0x2010, VFU_IOMMU_READ);
    io_countdown = 1;
    failed_at(vfu_iommu_copy(reader, 0x2020, 0x1000, 100), -EIO, 0x2020, VFU_IOMMU_WRITE);
    io_countdown = 2; /* between two mappings with callbacks: the read works, the write fails */
    failed_at(vfu_iommu_copy(reader, 0x3000, 0x2000, 100), -EIO, 0x3000, VFU_IOMMU_WRITE);
    end_table();
}
END_TEST

START_TEST(callbacks_that_are_missing)
{
    char memory[16] = "memory", buffer[4] = "...";
    make_table();
    io_base = 0x1000;
    vfu_iommu_mapping m = {.iova = 0x1000, .size = 16, .prot = RW, .io = &io_read_only, .io_ctx = memory};
    ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    m.iova = 0x1010;
    m.io = &io_write_only;
    ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    ck_assert_int_eq(vfu_iommu_read(reader, 0x1000, buffer, 3), 0);
    ck_assert_str_eq(buffer, "mem");
    failed_at(vfu_iommu_write(reader, 0x1001, buffer, 3), -ENOTSUP, 0x1001, VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_read(reader, 0x1010, buffer, 3), -ENOTSUP, 0x1010, VFU_IOMMU_READ);
    ck_assert_str_eq(memory, "memory");
    end_table();
}
END_TEST

/* Callbacks run without a lock of the table: they may use it, other than to unmap what they are called for. */
static int io_busy_read(void *ctx, uint64_t iova, void *dst, size_t len)
{
    vfu_iommu_mapping m = {.iova = 0x9000, .size = 16, .prot = RW, .host = ctx};
    (void)iova;
    memset(dst, 'c', len);
    ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    ck_assert_int_eq(vfu_iommu_next(table, 0x8000, &m), 1);
    ck_assert_int_eq(vfu_iommu_unmap(table, 0x9000, 16), 1);
    return vfu_iommu_check(table);
}

START_TEST(callbacks_may_use_the_table)
{
    static const vfu_iommu_io busy = {.read = io_busy_read};
    char memory[16], buffer[4];
    make_table();
    vfu_iommu_mapping m = {.iova = 0x1000, .size = 16, .prot = VFU_IOMMU_READ, .io = &busy, .io_ctx = memory};
    ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    ck_assert_int_eq(vfu_iommu_read(reader, 0x1004, buffer, 4), 0);
    ck_assert(!memcmp(buffer, "cccc", 4));
    end_table();
}
END_TEST

/* What a callback changes behind itself is seen: an access that was checked before is refused from there on. */
static struct {
    uint64_t iova;
    uint32_t prot;
} change;

static int io_changing_read(void *ctx, uint64_t iova, void *dst, size_t len)
{
    vfu_iommu_mapping m = {.iova = change.iova, .size = 0x1000, .prot = change.prot, .host = page_memory[3]};
    (void)ctx, (void)iova;
    memset(dst, 'c', len);
    if (!change.iova)
        return 0;
    change.iova = 0;
    ck_assert_int_eq(vfu_iommu_unmap(table, m.iova, m.size), 1);
    return m.prot ? vfu_iommu_map(table, &m) : 0;
}

static int copy_or_read(bool copy)
{
    static char buffer[0x2000];
    return copy ? vfu_iommu_copy(reader, 0x8000, 0x1000, 0x2000) : vfu_iommu_read(reader, 0x1000, buffer, 0x2000);
}

START_TEST(callbacks_may_change_what_follows)
{
    static const vfu_iommu_io changing = {.read = io_changing_read};
    static const struct {
        bool copy;
        uint64_t changed;
        uint32_t to;
        int err;
        uint32_t prot;
    } cases[] = {
        {false, 0x2000, 0, -ENOENT, VFU_IOMMU_READ},
        {false, 0x2000, VFU_IOMMU_WRITE, -EACCES, VFU_IOMMU_READ},
        {false, 0x2000, VFU_IOMMU_READ, 0, 0},
        {true, 0x2000, 0, -ENOENT, VFU_IOMMU_READ},
        {true, 0x2000, VFU_IOMMU_WRITE, -EACCES, VFU_IOMMU_READ},
        {true, 0x9000, 0, -ENOENT, VFU_IOMMU_WRITE},
        {true, 0x9000, VFU_IOMMU_READ, -EACCES, VFU_IOMMU_WRITE},
        {true, 0x9000, RW, 0, 0},
    };
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        make_table();
        vfu_iommu_mapping m = {.iova = 0x1000, .size = 0x1000, .prot = VFU_IOMMU_READ, .io = &changing};
        ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
        map_kind('h', 0x2000, 0x1000, RW, page_memory[0]);
        map_kind('h', 0x8000, 0x1000, RW, page_memory[1]);
        map_kind('h', 0x9000, 0x1000, RW, page_memory[2]);
        change.iova = cases[i].changed;
        change.prot = cases[i].to;
        if (!cases[i].err)
            ck_assert_int_eq(copy_or_read(cases[i].copy), 0);
        else
            failed_at(copy_or_read(cases[i].copy), cases[i].err, cases[i].changed, cases[i].prot);
        end_table();
    }
}
END_TEST

/* ---- memory that disappears ------------------------------------------------------------------------------------------- */

enum { GONE_PAGES = 4, THERE = 2 };
static char *file_memory;
static uint64_t file_iova;

/* A file of four pages of which two were cut off after it was mapped; a page of plain memory before and after it. */
static void map_truncated_file(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
    long page = sysconf(_SC_PAGESIZE);
    int fd = memfd_create("test", MFD_CLOEXEC);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, GONE_PAGES * page), 0);
    file_memory = mmap(NULL, (size_t)(GONE_PAGES * page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(file_memory, MAP_FAILED);
    memset(file_memory, 'f', (size_t)(GONE_PAGES * page));
    ck_assert_int_eq(ftruncate(fd, THERE * page), 0);
    close(fd);
    ck_assert_int_eq(sigaction(SIGBUS, &action, NULL), 0);
    make_table();
    file_iova = 0x100000;
    map_kind('g', file_iova, (uint64_t)(GONE_PAGES * page), RW, file_memory);
    map_kind('h', file_iova - 4096, 4096, RW, page_memory[0]);
    map_kind('h', file_iova + (uint64_t)(GONE_PAGES * page), 4096, RW, page_memory[1]);
    memset(page_memory, 'p', sizeof(page_memory));
}

START_TEST(truncated_file)
{
    static char buffer[6 * 4096];
    map_truncated_file();
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), cut = file_iova + THERE * page, end = file_iova + GONE_PAGES * page, value;

    ck_assert_int_eq(vfu_iommu_read(reader, file_iova - 100, buffer, 100 + THERE * page), 0); /* what is there is there */
    ck_assert(buffer[99] == 'p' && buffer[100] == 'f' && buffer[99 + THERE * page] == 'f');
    ck_assert_int_eq(vfu_iommu_write(reader, file_iova, "file", 4), 0);
    ck_assert(!memcmp(file_memory, "file", 4));

    failed_at(vfu_iommu_read(reader, cut, buffer, 1), -EFAULT, cut, VFU_IOMMU_READ);
    failed_at(vfu_iommu_read(reader, end - 1, buffer, 1), -EFAULT, end - 1, VFU_IOMMU_READ);
    failed_at(vfu_iommu_read(reader, file_iova + 10, buffer, 3 * page), -EFAULT, cut, VFU_IOMMU_READ);
    failed_at(vfu_iommu_read(reader, file_iova - 4096, buffer, 4096 + GONE_PAGES * page + 4096), -EFAULT, cut, VFU_IOMMU_READ);
    failed_at(vfu_iommu_write(reader, cut + 8, "x", 1), -EFAULT, cut + 8, VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_write(reader, cut - 1, buffer, 4096), -EFAULT, cut, VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_fill(reader, cut, 1, "x", 1), -EFAULT, cut, VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_fill(reader, cut - 4096, 3 * 4096, "xy", 2), -EFAULT, cut, VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_copy(reader, file_iova - 4096, cut + 16, 8), -EFAULT, cut + 16, VFU_IOMMU_READ);
    failed_at(vfu_iommu_copy(reader, cut + 16, file_iova - 4096, 8), -EFAULT, cut + 16, VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_copy(reader, file_iova, cut, 8), -EFAULT, cut, VFU_IOMMU_READ);
    failed_at(vfu_iommu_copy(reader, cut, file_iova, 8), -EFAULT, cut, VFU_IOMMU_WRITE);
    failed_at(vfu_iommu_load(reader, cut + 8, 8, VFU_IOMMU_ACQUIRE, &value), -EFAULT, cut + 8, VFU_IOMMU_READ);
    failed_at(vfu_iommu_store(reader, cut + 8, 4, VFU_IOMMU_RELEASE, 1), -EFAULT, cut + 8, VFU_IOMMU_WRITE);

    for (uint64_t len = 1; len < 2 * page; len = len * 5 / 4 + 1) { /* however the C library moves so many bytes */
        failed_at(vfu_iommu_read(reader, cut - len / 2, buffer, len), -EFAULT, cut, VFU_IOMMU_READ);
        failed_at(vfu_iommu_write(reader, cut - len / 2, buffer, len), -EFAULT, cut, VFU_IOMMU_WRITE);
        failed_at(vfu_iommu_read(reader, cut + 1, buffer, len), -EFAULT, cut + 1, VFU_IOMMU_READ);
        failed_at(vfu_iommu_copy(reader, cut - len / 2, file_iova, len), -EFAULT, cut, VFU_IOMMU_WRITE);
    }

    /* The table is none the worse for it, and the mapping can be removed: no hazard stayed behind. */
    ck_assert_int_eq(vfu_iommu_read(reader, cut - 4, buffer, 4), 0);
    ck_assert_int_eq(vfu_iommu_load(reader, file_iova + 8, 8, VFU_IOMMU_ACQUIRE, &value), 0);
    ck_assert_int_eq(vfu_iommu_unmap_all(table), 3);
    end_table();
}
END_TEST

/* What the guard says about the address is put right: memory goes away by pages, and a copy may touch its last byte first. */
static struct {
    const char *bad, *gone; /* what the guard says; the first byte that is gone */
    unsigned calls;
} fake;
static _Alignas(4096) char guarded_memory[2][4 * 4096];

/* Nothing really disappears: a body that reads one byte is one that looks for the first page that is gone. */
static int fake_guard(void *ctx, void (*body)(void *arg), void *arg, const void **bad)
{
    ck_assert_ptr_eq(ctx, &fake);
    (void)body;
    *bad = fake.bad;
    if (!fake.calls++)
        return -EFAULT;
    return (const char *)arg < fake.gone ? 0 : -EFAULT;
}

static const struct guard_case {
    const char *name;
    uint64_t offset, len; /* of the access */
    int64_t bad, gone;    /* what the guard says, -1: nothing; the first byte that is gone */
    uint64_t at;          /* the fault */
} guard_cases[] = {
    {"the first byte", 0, 100, 0, 0, 0},
    {"a byte of the page where the access begins", 0x100, 64, 0x123, 0, 0x100},
    {"the second page", 0xff0, 64, 0x1000, 0x1000, 0x1000},
    {"the end of the second page, touched first", 0xff0, 64, 0x1020, 0x1000, 0x1000},
    {"the last page, but the second is gone as well", 0x10, 0x3000, 0x300f, 0x1000, 0x1000},
    {"the last page alone", 0x10, 0x3000, 0x300f, 0x3000, 0x3000},
    {"not said, from the first byte on", 0x10, 0x3000, -1, 0, 0x10},
    {"not said, from the third page on", 0x10, 0x3000, -1, 0x2000, 0x2000},
};

static void try_guard(const struct guard_case *c)
{
    vfu_iommu_desc desc = {.guard = fake_guard, .ctx = &fake};
    static char buffer[0x4000];
    uint64_t at = 0x10000 + c->at, from = 0x10000 + c->offset;
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    open_readers();
    map_kind('g', 0x10000, 0x4000, RW, guarded_memory[0]);
    map_kind('h', 0x20000, 0x4000, RW, guarded_memory[1]);
    fake.bad = c->bad < 0 ? NULL : guarded_memory[0] + c->bad;
    fake.gone = guarded_memory[0] + c->gone;
    for (int how = 0; how < 4; how++) {
        int err = 0;
        fake.calls = 0;
        switch (how) {
        case 0: err = vfu_iommu_read(reader, from, buffer, c->len); break;
        case 1: err = vfu_iommu_write(reader, from, buffer, c->len); break;
        case 2: err = vfu_iommu_copy(reader, 0x20000, from, c->len); break;
        default: err = vfu_iommu_copy(reader, from, 0x20000, c->len); break;
        }
        const vfu_iommu_fault *fault = vfu_iommu_last_fault(reader);
        ck_assert_int_eq(err, -EFAULT);
        ck_assert_msg(fault->iova == at, "%s: fault of %d at 0x%llx", c->name, how, (unsigned long long)fault->iova);
        ck_assert_uint_gt(fake.calls, 0);
    }
    fake.calls = 0;
    ck_assert_int_eq(vfu_iommu_read(reader, 0x20000, buffer, 64), 0); /* plain memory needs no guard */
    ck_assert_uint_eq(fake.calls, 0);
    ck_assert_int_eq(vfu_iommu_unmap_all(table), 2);
    end_table();
}

START_TEST(guard_names_the_address)
{
    for (size_t i = 0; i < sizeof(guard_cases) / sizeof(guard_cases[0]); i++)
        try_guard(&guard_cases[i]);
}
END_TEST

START_TEST(guarded_words)
{
    vfu_iommu_desc desc = {.guard = fake_guard, .ctx = &fake};
    uint64_t value = 5;
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    open_readers();
    map_kind('g', 0x10000, 0x4000, RW, guarded_memory[0]);
    fake.bad = fake.gone = guarded_memory[0];
    fake.calls = 0;
    failed_at(vfu_iommu_load(reader, 0x10128, 8, 0, &value), -EFAULT, 0x10128, VFU_IOMMU_READ);
    failed_at(vfu_iommu_store(reader, 0x10128, 8, 0, 1), -EFAULT, 0x10128, VFU_IOMMU_WRITE);
    ck_assert_uint_eq(value, 5);
    end_table();
}
END_TEST

/* The fault log keeps the newest 64, the newest first. */
START_TEST(fault_log)
{
    vfu_iommu_fault log[70];
    char byte;
    make_table();
    ck_assert_uint_eq(vfu_iommu_get_faults(table, log, 70), 0);
    for (unsigned n = 1; n <= 200; n++) {
        ck_assert_int_eq(vfu_iommu_read(reader, n * 0x1000, &byte, 1), -ENOENT);
        unsigned kept = n < 64 ? n : 64;
        ck_assert_uint_eq(vfu_iommu_get_faults(table, log, 70), kept);
        for (unsigned i = 0; i < kept; i++)
            if (log[i].iova != (n - i) * 0x1000 || log[i].error != -ENOENT || log[i].prot != VFU_IOMMU_READ)
                ck_abort_msg("entry %u after %u faults", i, n);
        ck_assert_uint_eq(vfu_iommu_get_faults(table, log, 3), kept < 3 ? kept : 3);
        ck_assert_uint_eq(vfu_iommu_get_faults(table, log, 0), 0);
    }
    ck_assert_uint_eq(faults_counted(), 200);
    end_table();
}
END_TEST

static TCase *with_reader(const char *name, void (*use)(void))
{
    TCase *tc = tcase_create(name);
    tcase_set_timeout(tc, 60);
    tcase_add_checked_fixture(tc, use, NULL);
    tcase_add_test(tc, empty_ranges_do_nothing);
    tcase_add_test(tc, wrapping_ranges);
    tcase_add_test(tc, copy_names_the_side_that_failed);
    tcase_add_test(tc, remapped_addresses);
    tcase_add_loop_test(tc, copy_is_memmove, 0, MOSAICS);
    tcase_add_loop_test(tc, read_and_write_long_ranges, 0, MOSAICS);
    tcase_add_loop_test(tc, fill_patterns, 0, MOSAICS);
    tcase_add_test(tc, word_table);
    tcase_add_test(tc, word_orders);
    tcase_add_test(tc, callback_error_of_a_read);
    tcase_add_test(tc, callback_error_of_a_write);
    tcase_add_test(tc, callback_error_of_a_copy);
    tcase_add_test(tc, callbacks_that_are_missing);
    tcase_add_test(tc, callbacks_may_use_the_table);
    tcase_add_test(tc, callbacks_may_change_what_follows);
    tcase_add_test(tc, truncated_file);
    tcase_add_test(tc, guard_names_the_address);
    tcase_add_test(tc, guarded_words);
    tcase_add_test(tc, fault_log);
    return tc;
}

int main(void)
{
    Suite *suite = suite_create("iommu access");
    TCase *both = tcase_create("every layout");
    tcase_set_timeout(both, 120);
    tcase_add_loop_test(both, every_layout, 0, 2 * (int)(sizeof(alphabet) - 1));
    suite_add_tcase(suite, both);
    suite_add_tcase(suite, with_reader("plain reader", use_plain_reader));
    suite_add_tcase(suite, with_reader("local reader", use_local_reader));
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
