/* SPDX-License-Identifier: MIT */
/*
 * Section "dirty log" of vfu_iommu.h: which pages were written, by whatever way, in whatever page size one asks. That no page
 * is lost while threads write is tested in test_iommu_threads.c, and all of it at random in test_iommu_model.c.
 */
#define _GNU_SOURCE
#include "vfu_iommu.h"

#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define RW   (VFU_IOMMU_READ | VFU_IOMMU_WRITE)
#define BASE UINT64_C(0x100000)
enum { PAGE = 4096, PAGES = 16 };

static vfu_iommu *table;
static vfu_iommu_reader *reader;
static char memory[PAGES][PAGE];

/* ---- an allocator that counts, checks sizes, and fails when it is told to --------------------------------------------- */

static struct {
    size_t bytes, most;      /* out now; the most since `most` was set to 0 */
    unsigned calls, fail_at; /* fails that call, from 1 on; 0: never */
} heap;

typedef union heap_head {
    size_t size;
    max_align_t align;
} heap_head;

static void *heap_alloc(void *ctx, size_t size)
{
    ck_assert_ptr_eq(ctx, &heap);
    if (++heap.calls == heap.fail_at)
        return NULL;
    heap_head *head = malloc(sizeof(*head) + size);
    ck_assert_ptr_nonnull(head);
    head->size = size;
    memset(head + 1, 0xa5, size); /* nobody may count on zeros */
    heap.bytes += size;
    heap.most = heap.bytes > heap.most ? heap.bytes : heap.most;
    return head + 1;
}

static void heap_release(void *ctx, void *block, size_t size)
{
    heap_head *head = (heap_head *)block - 1;
    ck_assert_ptr_eq(ctx, &heap);
    ck_assert_uint_eq(head->size, size);
    heap.bytes -= size;
    free(head);
}

/* ---- fixture ---------------------------------------------------------------------------------------------------------- */

static int io_read(void *ctx, uint64_t iova, void *dst, size_t len)
{
    (void)ctx, (void)iova;
    memset(dst, 'i', len);
    return 0;
}

static int io_write(void *ctx, uint64_t iova, const void *src, size_t len)
{
    (void)ctx, (void)iova, (void)src, (void)len;
    return 0;
}

static const vfu_iommu_io io = {.read = io_read, .write = io_write};

static int guard(void *ctx, void (*body)(void *arg), void *arg, const void **bad)
{
    (void)ctx, (void)bad;
    body(arg);
    return 0;
}

static uint64_t page(unsigned n) { return BASE + (uint64_t)n * PAGE; }

static void make_table(uint64_t dirty_limit)
{
    vfu_iommu_desc desc = {.dirty_limit = dirty_limit, .guard = guard, .max_readers = 1, .max_mappings = 1000};
    desc.alloc = (vfu_alloc){.ctx = &heap, .alloc = heap_alloc, .release = heap_release};
    memset(&heap, 0, sizeof(heap));
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &reader), 0);
}

static void end_table(void)
{
    ck_assert_int_eq(vfu_iommu_check(table), 0);
    vfu_iommu_reader_close(reader);
    vfu_iommu_destroy(table);
    ck_assert_uint_eq(heap.bytes, 0);
}

static int map_host(uint64_t iova, uint64_t size, void *host)
{
    vfu_iommu_mapping m = {.iova = iova, .size = size, .prot = RW, .host = host};
    return vfu_iommu_map(table, &m);
}

static int map_io(uint64_t iova, uint64_t size)
{
    vfu_iommu_mapping m = {.iova = iova, .size = size, .prot = RW, .io = &io};
    return vfu_iommu_map(table, &m);
}

/* One mapping for each page: host, callbacks and guarded by turns. */
static void map_pages(void)
{
    for (unsigned i = 0; i < PAGES; i++) {
        vfu_iommu_mapping m = {.iova = page(i), .size = PAGE, .prot = RW};
        m.io = i % 3 == 1 ? &io : NULL;
        m.host = m.io ? NULL : memory[i];
        m.flags = i % 3 == 2 ? VFU_IOMMU_GUARDED : 0;
        ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    }
}

static uint64_t dirty_size(void)
{
    vfu_iommu_stats stats;
    vfu_iommu_get_stats(table, &stats);
    return stats.dirty_size;
}

/* What the pages of the fixture report, as a drawing: x is dirty. */
static const char *drawing(void)
{
    static char text[PAGES + 1];
    uint64_t bitmap = UINT64_MAX;
    ck_assert_int_eq(vfu_iommu_dirty_report(table, BASE, PAGES * PAGE, PAGE, &bitmap, 1), 0);
    for (unsigned i = 0; i < 64; i++) {
        if (i < PAGES)
            text[i] = bitmap >> i & 1 ? 'x' : '.';
        else
            ck_assert_msg(!(bitmap >> i & 1), "a bit beyond the range");
    }
    return text;
}
#define CLEAN "................"

/* ---- what is noted ---------------------------------------------------------------------------------------------------- */

static uint64_t word;
static char bytes[PAGES * PAGE];
static vfu_iommu_pin pin;
static vfu_iommu_segment segment[PAGES];

enum way { READ, WRITE, FILL, COPY, PROBE, LOAD, STORE, MARK, PIN_READ, PIN_WRITE };

static const struct way_case {
    const char *name;
    enum way way;
    uint64_t offset, len;
    const char *dirty;
} way_cases[] = {
    {"read", READ, 0, 16 * PAGE, CLEAN},
    {"probe for writing", PROBE, 0, 16 * PAGE, CLEAN},
    {"load", LOAD, 3 * PAGE, 8, CLEAN},
    {"write of a byte", WRITE, 3 * PAGE + 17, 1, "...x............"},
    {"write of the last byte of a page", WRITE, 4 * PAGE - 1, 1, "...x............"},
    {"write of the first byte of a page", WRITE, 4 * PAGE, 1, "....x..........."},
    {"write over a border", WRITE, 4 * PAGE - 1, 2, "...xx..........."},
    {"write of all", WRITE, 0, 16 * PAGE, "xxxxxxxxxxxxxxxx"},
    {"write by callbacks", WRITE, 4 * PAGE + 8, 8, "....x..........."},
    {"write through the guard", WRITE, 5 * PAGE + 8, 8, ".....x.........."},
    {"fill over borders", FILL, 2 * PAGE - 1, 2 * PAGE + 2, ".xxxx..........."},
    {"fill of one page", FILL, 9 * PAGE, PAGE, ".........x......"},
    {"copy to host memory", COPY, 9 * PAGE + 100, 200, ".........x......"},
    {"copy over borders", COPY, 9 * PAGE + 100, 2 * PAGE, ".........xxx...."},
    {"copy to callbacks", COPY, 10 * PAGE, 5, "..........x....."},
    {"copy to guarded memory", COPY, 11 * PAGE, 5, "...........x...."},
    {"store to host memory", STORE, 3 * PAGE + 8, 8, "...x............"},
    {"store to callbacks", STORE, 4 * PAGE + 8, 4, "....x..........."},
    {"store to guarded memory", STORE, 5 * PAGE + 8, 2, ".....x.........."},
    {"mark", MARK, 5 * PAGE - 1, 2, "....xx.........."},
    {"pin to read", PIN_READ, 6 * PAGE + 8, 8, CLEAN},
    {"pin to write", PIN_WRITE, 6 * PAGE + 8, 8, "......x........."},
    {"empty write", WRITE, 3 * PAGE, 0, CLEAN},
    {"empty fill", FILL, 3 * PAGE, 0, CLEAN},
    {"empty copy", COPY, 3 * PAGE, 0, CLEAN},
    {"empty mark", MARK, 3 * PAGE, 0, CLEAN},
};

enum { WAY_CASES = sizeof(way_cases) / sizeof(way_cases[0]) };

static int do_way(enum way way, uint64_t iova, uint64_t len)
{
    switch (way) {
    case READ: return vfu_iommu_read(reader, iova, bytes, len);
    case WRITE: return vfu_iommu_write(reader, iova, bytes, len);
    case FILL: return vfu_iommu_fill(reader, iova, len, "pattern", 4);
    case COPY: return vfu_iommu_copy(reader, iova, page(0) + 50, len);
    case PROBE: return vfu_iommu_probe(reader, iova, len, RW);
    case LOAD: return vfu_iommu_load(reader, iova, (unsigned)len, VFU_IOMMU_ACQUIRE, &word);
    case STORE: return vfu_iommu_store(reader, iova, (unsigned)len, VFU_IOMMU_RELEASE, 1);
    case MARK: vfu_iommu_dirty_mark(table, iova, len); return 0;
    default: {
        int count = vfu_iommu_pin_take(reader, &pin, iova, len, way == PIN_READ ? VFU_IOMMU_READ : RW, segment, PAGES);
        vfu_iommu_pin_drop(table, &pin);
        return count < 0 ? count : 0;
    }
    }
}

/* _i: the case, with a plain reader and then all of them with a local one. */
START_TEST(every_way_to_write)
{
    const struct way_case *c = &way_cases[_i % WAY_CASES];
    make_table(0);
    map_pages();
    if (_i >= WAY_CASES) {
        vfu_iommu_reader_close(reader);
        ck_assert_int_eq(vfu_iommu_reader_open_local(table, &reader), 0);
    }
    ck_assert_int_eq(do_way(c->way, BASE + c->offset, c->len), 0); /* before the log starts */
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), 0);
    ck_assert_str_eq(drawing(), CLEAN);
    ck_assert_msg(!do_way(c->way, BASE + c->offset, c->len), "%s", c->name);
    const char *got = drawing();
    ck_assert_msg(!strcmp(got, c->dirty), "%s: %s", c->name, got);
    ck_assert_str_eq(drawing(), CLEAN); /* a report clears */
    ck_assert_int_eq(vfu_iommu_dirty_stop(table), 0);
    end_table();
}
END_TEST

/* A write that was refused moved nothing, and so made nothing dirty. */
START_TEST(refused_writes)
{
    make_table(0);
    map_pages();
    ck_assert_int_eq(vfu_iommu_unmap(table, page(5), PAGE), 1);
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, page(3), bytes, 3 * PAGE), -ENOENT);
    ck_assert_int_eq(vfu_iommu_fill(reader, page(3), 3 * PAGE, "x", 1), -ENOENT);
    ck_assert_int_eq(vfu_iommu_copy(reader, page(3), page(6), 3 * PAGE), -ENOENT);
    ck_assert_int_eq(vfu_iommu_copy(reader, page(6), page(3), 3 * PAGE), -ENOENT);
    ck_assert_int_eq(vfu_iommu_store(reader, page(3) + 1, 4, 0, 1), -EINVAL);
    ck_assert_int_eq(vfu_iommu_pin_take(reader, &pin, page(3), 3 * PAGE, RW, segment, PAGES), -ENOTSUP);
    ck_assert_str_eq(drawing(), CLEAN);
    end_table(); /* the log ends with the table */
}
END_TEST

/* While a pin for writing is held its pages are dirty in every report, and once more when it was dropped. */
START_TEST(pins_stay_dirty)
{
    make_table(0);
    for (unsigned i = 0; i < PAGES; i++)
        ck_assert_int_eq(map_host(page(i), PAGE, memory[i]), 0);
    ck_assert_int_eq(vfu_iommu_pin_take(reader, &pin, page(3) + 10, 2 * PAGE, VFU_IOMMU_WRITE, segment, PAGES), 3);
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), 0); /* a pin from before counts as well */
    for (int i = 0; i < 3; i++)
        ck_assert_str_eq(drawing(), "...xxx..........");
    vfu_iommu_pin_drop(table, &pin);
    ck_assert_str_eq(drawing(), "...xxx..........");
    ck_assert_str_eq(drawing(), CLEAN);
    end_table();
}
END_TEST

static bool let_go(vfu_iommu_pin *asked, uint64_t iova, uint64_t size)
{
    (void)asked, (void)iova, (void)size;
    return true;
}

/* What was written stays noted when its mapping goes, also when a pin goes with it; what is mapped anew is noted as well. */
START_TEST(mappings_come_and_go)
{
    make_table(0);
    map_pages();
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, page(2) + 5, bytes, PAGE), 0);
    pin.let_go = let_go;
    ck_assert_int_eq(vfu_iommu_pin_take(reader, &pin, page(6), PAGE, RW, segment, PAGES), 1);
    ck_assert_int_eq(vfu_iommu_unmap_all(table), PAGES);
    ck_assert_str_eq(drawing(), "..xx..x.........");
    ck_assert_str_eq(drawing(), CLEAN);
    ck_assert_int_eq(map_host(page(8), 4 * PAGE, bytes), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, page(9), "x", 1), 0);
    ck_assert_int_eq(vfu_iommu_unmap(table, page(8), 4 * PAGE), 1);
    ck_assert_int_eq(map_io(page(8), 2 * PAGE), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, page(8), "x", 1), 0);
    ck_assert_str_eq(drawing(), "........xx......");
    ck_assert_int_eq(vfu_iommu_dirty_stop(table), 0);
    end_table();
}
END_TEST

/* What one log has noted, the next doesn't know. */
START_TEST(stop_forgets)
{
    make_table(0);
    map_pages();
    ck_assert_int_eq(vfu_iommu_dirty_stop(table), -EINVAL);
    vfu_iommu_dirty_mark(table, BASE, PAGE); /* nothing happens */
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(vfu_iommu_dirty_start(table, (uint64_t)PAGE >> i, NULL, 0), 0);
        ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), -EBUSY);
        ck_assert_uint_gt(dirty_size(), 0);
        ck_assert_str_eq(drawing(), CLEAN);
        ck_assert_int_eq(vfu_iommu_write(reader, page(3), bytes, PAGE), 0);
        ck_assert_int_eq(vfu_iommu_dirty_stop(table), 0);
        ck_assert_uint_eq(dirty_size(), 0);
        ck_assert_int_eq(vfu_iommu_dirty_stop(table), -EINVAL);
    }
    end_table();
}
END_TEST

START_TEST(arguments)
{
    static const uint64_t wrong_pages[] = {0, 3, 4097, UINT64_MAX};
    uint64_t bitmap[2] = {77, 78};
    make_table(0);
    map_pages();
    unsigned calls = heap.calls;
    for (unsigned i = 0; i < 4; i++)
        ck_assert_int_eq(vfu_iommu_dirty_start(table, wrong_pages[i], NULL, 0), -EINVAL);
    vfu_iommu_range wrong[3] = {{BASE, PAGE}, {BASE, 0}, {BASE, PAGE}};
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, wrong, 3), -EINVAL);
    wrong[1] = (vfu_iommu_range){UINT64_MAX, 2};
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, wrong, 3), -EINVAL);
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, wrong, SIZE_MAX), -EINVAL);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, BASE, PAGE, PAGE, bitmap, 1), -EINVAL); /* doesn't run */
    ck_assert_uint_eq(heap.calls, calls);

    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, BASE, bytes, 16 * PAGE), 0);
    for (unsigned i = 0; i < 4; i++)
        ck_assert_int_eq(vfu_iommu_dirty_report(table, BASE, PAGE, wrong_pages[i], bitmap, 2), -EINVAL);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, BASE, 0, PAGE, bitmap, 2), -EINVAL);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, UINT64_MAX, 2, PAGE, bitmap, 2), -EINVAL);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, BASE, 64 * PAGE + 1, PAGE, bitmap, 1), -EINVAL); /* 65 pages */
    ck_assert_int_eq(vfu_iommu_dirty_report(table, BASE, PAGE, 1, bitmap, 2), -EINVAL);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, 0, UINT64_MAX, UINT64_C(1) << 57, bitmap, 1), -EINVAL); /* 128 pages */
    ck_assert(bitmap[0] == 77 && bitmap[1] == 78);
    ck_assert_str_eq(drawing(), "xxxxxxxxxxxxxxxx"); /* none of them has cleared anything */
    end_table();
}
END_TEST

/* ---- page sizes ------------------------------------------------------------------------------------------------------- */

static const unsigned log_shift[] = {0, 3, 6, 12, 13, 16, 20, 40, 63}, report_shift[] = {0, 2, 6, 11, 12, 14, 21, 41, 63};

/* A page of the log is noted as a whole; the report shows it in its own pages, counted from where the report starts. */
static void try_page_sizes(unsigned ls, unsigned rs)
{
    static uint64_t bitmap[PAGES * PAGE / 64 + 2];
    static const struct {
        uint64_t offset, len;
    } writes[] = {{0, 1}, {100, 1}, {5000, 9000}, {16 * PAGE - 1, 1}, {3 * PAGE, PAGE}, {0, 16 * PAGE}};
    make_table(0);
    map_pages();
    ck_assert_int_eq(vfu_iommu_dirty_start(table, UINT64_C(1) << ls, NULL, 0), 0);
    for (unsigned w = 0; w < sizeof(writes) / sizeof(writes[0]); w++) {
        uint64_t first = BASE + writes[w].offset, last = first + writes[w].len - 1, mask = (UINT64_C(1) << ls) - 1;
        ck_assert_int_eq(vfu_iommu_write(reader, first, bytes, writes[w].len), 0);
        first &= ~mask;
        last |= mask;
        if (first < BASE) /* what lies outside of the report */
            first = BASE;
        if (last > page(PAGES) - 1)
            last = page(PAGES) - 1;
        size_t words = (size_t)(((uint64_t)PAGES * PAGE - 1) >> rs) / 64 + 1;
        memset(bitmap, 0x5a, sizeof(bitmap));
        ck_assert_int_eq(vfu_iommu_dirty_report(table, BASE, PAGES * PAGE, UINT64_C(1) << rs, bitmap, words), 0);
        for (uint64_t k = 0; k < words * 64; k++) {
            bool dirty = bitmap[k / 64] >> k % 64 & 1, wanted = k >= (first - BASE) >> rs && k <= (last - BASE) >> rs;
            if (dirty != wanted)
                ck_abort_msg("log 2^%u, report 2^%u, write %u: bit %llu is %d", ls, rs, w, (unsigned long long)k, dirty);
        }
        ck_assert_uint_eq(bitmap[words], UINT64_C(0x5a5a5a5a5a5a5a5a));
        if (mask < PAGE) { /* each page is inside of the report, and so it is clear now */
            ck_assert_int_eq(vfu_iommu_dirty_report(table, BASE, PAGES * PAGE, UINT64_C(1) << rs, bitmap, words), 0);
            for (size_t k = 0; k < words; k++)
                ck_assert_uint_eq(bitmap[k], 0);
        } else {
            ck_assert_int_eq(vfu_iommu_dirty_stop(table), 0);
            ck_assert_int_eq(vfu_iommu_dirty_start(table, UINT64_C(1) << ls, NULL, 0), 0);
        }
    }
    end_table();
}

START_TEST(page_sizes)
{
    for (int i = 0; i < 9; i++)
        try_page_sizes(log_shift[_i], report_shift[i]);
}
END_TEST

/* A page of which a report shows only a part is kept for the report that shows the rest. */
START_TEST(pages_partly_in_a_report)
{
    uint64_t bitmap;
    make_table(0);
    map_pages();
    ck_assert_int_eq(vfu_iommu_dirty_start(table, 4 * PAGE, NULL, 0), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, page(5), bytes, 1), 0); /* notes pages 4 to 7 */
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(vfu_iommu_dirty_report(table, page(0), 6 * PAGE, PAGE, &bitmap, 1), 0);
        ck_assert_uint_eq(bitmap, 0x30);
        ck_assert_int_eq(vfu_iommu_dirty_report(table, page(6), PAGE, PAGE, &bitmap, 1), 0);
        ck_assert_uint_eq(bitmap, 1);
    }
    ck_assert_int_eq(vfu_iommu_dirty_report(table, page(8), 8 * PAGE, PAGE, &bitmap, 1), 0);
    ck_assert_uint_eq(bitmap, 0);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, page(4), 4 * PAGE, PAGE, &bitmap, 1), 0);
    ck_assert_uint_eq(bitmap, 0xf);
    ck_assert_str_eq(drawing(), CLEAN);
    end_table();
}
END_TEST

/* Bits are counted from where the report starts, which need not be the start of a page. */
START_TEST(reports_from_anywhere)
{
    uint64_t bitmap[2];
    make_table(0);
    map_pages();
    ck_assert_int_eq(vfu_iommu_dirty_start(table, 256, NULL, 0), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, page(1) + 300, bytes, 1), 0); /* notes bytes 256 to 511 of the page */
    ck_assert_int_eq(vfu_iommu_dirty_report(table, page(1) + 100, 1000, 128, bitmap, 1), 0);
    ck_assert_uint_eq(bitmap[0], 0xe); /* 156 to 411 from there, by 128 */
    ck_assert_int_eq(vfu_iommu_write(reader, page(1) + 300, bytes, 1), 0);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, 0, UINT64_MAX, UINT64_C(1) << 58, bitmap, 1), 0); /* everything, coarsely */
    ck_assert_uint_eq(bitmap[0], 1);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, 0, UINT64_MAX, UINT64_C(1) << 58, bitmap, 1), 0);
    ck_assert_uint_eq(bitmap[0], 0);
    end_table();
}
END_TEST

/* ---- ranges ----------------------------------------------------------------------------------------------------------- */

#define P(n) (BASE + (uint64_t)(n)*PAGE)
static const struct range_case {
    const char *name;
    size_t count;
    vfu_iommu_range ranges[5];
    const char *dirty; /* after everything was written */
} range_cases[] = {
    {"all", 0, {{0, 0}}, "xxxxxxxxxxxxxxxx"},
    {"one", 1, {{P(3), 2 * PAGE}}, "...xx..........."},
    {"with a hole", 2, {{P(3), 2 * PAGE}, {P(8), PAGE}}, "...xx...x......."},
    {"unsorted", 4, {{P(8), PAGE}, {P(12), PAGE}, {P(1), PAGE}, {P(3), PAGE}}, ".x.x....x...x..."},
    {"overlapping", 3, {{P(3), 4 * PAGE}, {P(5), 4 * PAGE}, {P(4), PAGE}}, "...xxxxxx......."},
    {"neighbours", 3, {{P(4), PAGE}, {P(3), PAGE}, {P(5), PAGE}}, "...xxx.........."},
    {"the same twice", 2, {{P(4), PAGE}, {P(4), PAGE}}, "....x..........."},
    {"one inside another, and one after it", 3, {{P(2), 8 * PAGE}, {P(3), PAGE}, {P(11), PAGE}}, "..xxxxxxxx.x...."},
    {"up to 2^64", 2, {{P(12), (uint64_t)0 - P(12)}, {P(1), PAGE}}, ".x..........xxxx"},
    {"two up to 2^64", 3, {{P(14), (uint64_t)0 - P(14)}, {P(12), (uint64_t)0 - P(12)}, {P(13), PAGE}}, "............xxxx"},
    {"all addresses, as two halves", 2, {{UINT64_C(1) << 63, UINT64_C(1) << 63}, {0, UINT64_C(1) << 63}}, "xxxxxxxxxxxxxxxx"},
    {"elsewhere", 1, {{P(1000), PAGE}}, CLEAN},
};

START_TEST(range_table)
{
    const struct range_case *c = &range_cases[_i];
    vfu_iommu_range ranges[5];
    make_table(0);
    map_pages();
    memcpy(ranges, c->ranges, sizeof(ranges));
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, ranges, c->count), 0);
    memset(ranges, 0xff, sizeof(ranges)); /* they were copied */
    ck_assert_int_eq(vfu_iommu_write(reader, BASE, bytes, PAGES * PAGE), 0);
    vfu_iommu_dirty_mark(table, 0, UINT64_C(1) << 40);
    const char *got = drawing();
    ck_assert_msg(!strcmp(got, c->dirty), "%s: %s", c->name, got);
    ck_assert_str_eq(drawing(), CLEAN);
    ck_assert_int_eq(vfu_iommu_unmap_all(table), PAGES); /* and the same for mappings that come later */
    map_pages();
    ck_assert_int_eq(vfu_iommu_fill(reader, BASE, PAGES * PAGE, "x", 1), 0);
    ck_assert_str_eq(drawing(), c->dirty);
    ck_assert_int_eq(vfu_iommu_dirty_stop(table), 0);
    end_table();
}
END_TEST

/* Ranges of a few bytes: the pages that they touch are noted, and of those only the bytes inside are reported. */
START_TEST(ranges_of_bytes)
{
    vfu_iommu_range ranges[2] = {{P(3) + 100, 8}, {P(3) + 4000, 200}};
    uint64_t bitmap[2 * PAGE / 64];
    make_table(0);
    map_pages();
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, ranges, 2), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, P(3), bytes, 2 * PAGE), 0);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, P(3), 2 * PAGE, 1, bitmap, 2 * PAGE / 64), 0);
    for (unsigned k = 0; k < 2 * PAGE; k++) {
        bool wanted = (k >= 100 && k < 108) || (k >= 4000 && k < 4200);
        if ((bitmap[k / 64] >> k % 64 & 1) != wanted)
            ck_abort_msg("byte %u", k);
    }
    end_table();
}
END_TEST

/* The top of the addresses, and one mapping of nearly all of them. */
START_TEST(up_to_the_last_byte)
{
    uint64_t bitmap;
    make_table(0);
    ck_assert_int_eq(map_host((uint64_t)0 - 4 * PAGE, 4 * PAGE, bytes), 0);
    for (unsigned shift = 0; shift < 64; shift += 3) {
        ck_assert_int_eq(vfu_iommu_dirty_start(table, UINT64_C(1) << shift, NULL, 0), 0);
        ck_assert_int_eq(vfu_iommu_write(reader, UINT64_MAX, "x", 1), 0);
        ck_assert_int_eq(vfu_iommu_dirty_report(table, (uint64_t)0 - 2 * PAGE, 2 * PAGE, PAGE, &bitmap, 1), 0);
        ck_assert_uint_eq(bitmap, shift > 12 ? 3 : 2);
        ck_assert_int_eq(vfu_iommu_dirty_stop(table), 0);
    }
    ck_assert_int_eq(vfu_iommu_unmap_all(table), 1);
    ck_assert_int_eq(map_io(1, UINT64_MAX), 0);
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), -ENOSPC);
    ck_assert_int_eq(vfu_iommu_dirty_start(table, UINT64_C(1) << 58, NULL, 0), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, UINT64_MAX, "x", 1), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, UINT64_C(5) << 58, "x", 1), 0);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, 0, UINT64_MAX, UINT64_C(1) << 58, &bitmap, 1), 0);
    ck_assert_uint_eq(bitmap, UINT64_C(1) << 63 | 1 << 5);
    end_table();
}
END_TEST

/* ---- memory ----------------------------------------------------------------------------------------------------------- */

/* Each mapping of these is far from the others, so that each needs memory of its own in the log. */
static uint64_t far(unsigned n) { return UINT64_C(0x100000000) * (n + 1); }

/* A log that has no room for all that is mapped doesn't start, and leaves nothing behind. */
START_TEST(limit_at_start)
{
    make_table(8192);
    size_t before = heap.bytes;
    for (unsigned i = 0; i < 200; i++)
        ck_assert_int_eq(map_host(far(i), PAGE, memory[0]), 0);
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), -ENOSPC);
    ck_assert_uint_eq(dirty_size(), 0);
    ck_assert_uint_eq(heap.bytes, before);
    vfu_iommu_range few = {far(3), far(10) - far(3)};
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, &few, 1), 0); /* what isn't logged takes nothing */
    ck_assert_uint_le(dirty_size(), 8192);
    ck_assert_uint_eq(dirty_size(), heap.bytes - before);
    end_table();
}
END_TEST

/* Maps until the limit is reached. What is clean and not mapped any more makes room; what is dirty stays. */
START_TEST(limit_while_it_runs)
{
    enum { LIMIT = 16384 };
    uint64_t bitmap;
    unsigned count = 0;
    make_table(LIMIT);
    size_t before = heap.bytes;
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), 0);
    int err = 0;
    while (!err) {
        err = map_host(far(count), PAGE, memory[0]);
        count += !err;
        ck_assert_uint_le(dirty_size(), LIMIT);
        ck_assert_uint_eq(dirty_size(), heap.bytes - before);
        ck_assert_int_eq(vfu_iommu_check(table), 0);
    }
    ck_assert_int_eq(err, -ENOSPC);
    ck_assert_uint_gt(count, 50);
    ck_assert_int_eq(vfu_iommu_probe(reader, far(count), 1, RW), -ENOENT); /* it wasn't mapped */
    ck_assert_int_eq(vfu_iommu_write(reader, far(0), "x", 1), 0);
    ck_assert_int_eq(vfu_iommu_write(reader, far(1), "x", 1), 0);
    ck_assert_int_eq(vfu_iommu_unmap(table, far(0), PAGE), 1);
    ck_assert_int_eq(vfu_iommu_unmap(table, far(2), PAGE), 1);
    ck_assert_int_eq(map_host(far(count), PAGE, memory[0]), 0); /* in the place of 2, since 0 is dirty */
    ck_assert_int_eq(map_host(far(count + 1), PAGE, memory[0]), -ENOSPC);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, far(0), PAGE, PAGE, &bitmap, 1), 0);
    ck_assert_uint_eq(bitmap, 1);
    ck_assert_int_eq(map_host(far(count + 1), PAGE, memory[0]), 0); /* in the place of 0, which is reported now */
    for (unsigned i = 0; i < count + 2; i++) {                      /* all that is mapped is still noted */
        bool mapped = i != 0 && i != 2;
        ck_assert_int_eq(vfu_iommu_dirty_report(table, far(i), PAGE, PAGE, &bitmap, 1), 0);
        ck_assert_uint_eq(bitmap, i == 1);
        ck_assert_int_eq(vfu_iommu_write(reader, far(i), "x", 1), mapped ? 0 : -ENOENT);
        ck_assert_int_eq(vfu_iommu_dirty_report(table, far(i), PAGE, PAGE, &bitmap, 1), 0);
        ck_assert_uint_eq(bitmap, mapped);
    }
    ck_assert_int_eq(vfu_iommu_dirty_stop(table), 0);
    ck_assert_uint_eq(heap.bytes, before);
    end_table();
}
END_TEST

/* Wherever the limit is: it is kept, what doesn't fit isn't mapped, and all that is mapped is noted. */
START_TEST(every_limit)
{
    for (size_t limit = 4096; limit < 12288; limit += 56) {
        uint64_t bitmap;
        unsigned n = 0;
        make_table(limit);
        if (vfu_iommu_dirty_start(table, PAGE, NULL, 0) == 0) {
            for (; map_host(far(n), PAGE, memory[0]) == 0; n++)
                ck_assert_uint_le(dirty_size(), limit);
            for (unsigned i = 0; i <= n; i++) {
                ck_assert_int_eq(vfu_iommu_write(reader, far(i), "x", 1), i < n ? 0 : -ENOENT);
                ck_assert_int_eq(vfu_iommu_dirty_report(table, far(i), PAGE, PAGE, &bitmap, 1), 0);
                ck_assert_uint_eq(bitmap, i < n);
            }
        }
        end_table();
    }
}
END_TEST

/* A mapping that needs much of the log, at the moment when the limit is reached: none of it is lost again to make room. */
START_TEST(limit_in_the_midst_of_a_mapping)
{
    enum { LIMIT = 16384, LEAF = 512 * PAGE }; /* what one piece of the log covers */
    uint64_t bitmap, size = 0;
    make_table(LIMIT);
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), 0);
    unsigned n = 0;
    for (; map_host(far(n), PAGE, memory[0]) == 0; n++) { /* fill it to the limit, then make it all clean and unmapped */
    }
    ck_assert_int_eq(vfu_iommu_unmap_all(table), (int)n);
    for (unsigned leaves = 2; leaves <= n; leaves += leaves / 2) {
        size = (uint64_t)leaves * LEAF;
        ck_assert_int_eq(map_io(far(1000), size), 0);
        for (unsigned i = 0; i < leaves; i++) {
            uint64_t at = far(1000) + (uint64_t)i * LEAF + 5 * PAGE;
            ck_assert_int_eq(vfu_iommu_write(reader, at, "x", 1), 0);
            ck_assert_int_eq(vfu_iommu_dirty_report(table, at, PAGE, PAGE, &bitmap, 1), 0);
            ck_assert_msg(bitmap == 1, "page %u of a mapping over %u was lost", i, leaves);
        }
        ck_assert_int_eq(vfu_iommu_unmap_all(table), 1);
        for (unsigned i = 0; i < n; i++) /* to the limit again */
            if (map_host(far(i), PAGE, memory[0]))
                break;
        ck_assert_int_ge(vfu_iommu_unmap_all(table), 0);
    }
    ck_assert_int_eq(map_io(far(1000), UINT64_C(1) << 40), -ENOSPC);
    ck_assert_int_eq(vfu_iommu_next(table, 0, &(vfu_iommu_mapping){0}), 0);
    end_table();
}
END_TEST

/* Every allocation of a log fails once: -ENOMEM, nothing is lost or left behind, and the next try succeeds. */
START_TEST(every_allocation_fails_once)
{
    enum { MAPPINGS = 150 };
    vfu_iommu_range ranges[2] = {{0, UINT64_C(1) << 63}, {UINT64_C(1) << 62, UINT64_C(1) << 63}};
    unsigned failures = 0;
    for (unsigned at = 1;; at++) { /* while it starts */
        make_table(0);
        for (unsigned i = 0; i < MAPPINGS; i++)
            ck_assert_int_eq(map_host(far(i), PAGE, memory[0]), 0);
        size_t before = heap.bytes;
        heap.calls = 0;
        heap.fail_at = at;
        int err = vfu_iommu_dirty_start(table, PAGE, ranges, 2);
        if (err) {
            failures++;
            ck_assert_int_eq(err, -ENOMEM);
            ck_assert_uint_eq(heap.bytes, before);
            ck_assert_uint_eq(dirty_size(), 0);
            ck_assert_int_eq(vfu_iommu_dirty_stop(table), -EINVAL);
            ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, ranges, 2), 0);
        }
        heap.fail_at = 0;
        end_table();
        if (!err)
            break;
    }
    ck_assert_uint_ge(failures, MAPPINGS);

    failures = 0;
    for (unsigned at = 1;; at++) { /* while mappings are added to one that runs */
        uint64_t bitmap;
        int failed = 0;
        make_table(0);
        ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, ranges, 2), 0);
        heap.calls = 0;
        heap.fail_at = at;
        for (unsigned i = 0; i < MAPPINGS; i++) {
            int err = map_host(far(i), PAGE, memory[0]);
            if (err) {
                failed++;
                ck_assert_int_eq(err, -ENOMEM);
                ck_assert_int_eq(vfu_iommu_probe(reader, far(i), 1, RW), -ENOENT);
                ck_assert_int_eq(vfu_iommu_check(table), 0);
                ck_assert_int_eq(map_host(far(i), PAGE, memory[0]), 0);
            }
            ck_assert_int_eq(vfu_iommu_write(reader, far(i), "x", 1), 0);
        }
        for (unsigned i = 0; i < MAPPINGS; i++) {
            ck_assert_int_eq(vfu_iommu_dirty_report(table, far(i), PAGE, PAGE, &bitmap, 1), 0);
            ck_assert_uint_eq(bitmap, 1);
        }
        heap.fail_at = 0;
        end_table();
        failures += (unsigned)failed;
        if (!failed)
            break;
    }
    ck_assert_uint_ge(failures, MAPPINGS);
}
END_TEST

/* A log over many mappings, with bits in all of them, and none in between. */
START_TEST(many_mappings)
{
    enum { MANY = 900 };
    static uint64_t bitmap[2 * MANY / 64 + 1];
    make_table(0);
    for (uint64_t i = 0; i < MANY; i++)
        ck_assert_int_eq(map_host(BASE + i * 2 * PAGE, PAGE, memory[0]), 0); /* every other page */
    ck_assert_int_eq(vfu_iommu_dirty_start(table, PAGE, NULL, 0), 0);
    for (uint64_t i = 0; i < MANY; i++)
        if (i % 7 != 3)
            ck_assert_int_eq(vfu_iommu_write(reader, BASE + i * 2 * PAGE + i, "x", 1), 0);
    ck_assert_int_eq(vfu_iommu_dirty_report(table, BASE, 2 * MANY * PAGE, PAGE, bitmap, 2 * MANY / 64 + 1), 0);
    for (uint64_t k = 0; k < 2 * MANY; k++)
        if ((bitmap[k / 64] >> k % 64 & 1) != (k % 2 == 0 && k / 2 % 7 != 3))
            ck_abort_msg("page %u", (unsigned)k);
    end_table();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("iommu dirty log");
    TCase *tc = tcase_create("dirty log");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, every_way_to_write, 0, 2 * WAY_CASES);
    tcase_add_test(tc, refused_writes);
    tcase_add_test(tc, pins_stay_dirty);
    tcase_add_test(tc, mappings_come_and_go);
    tcase_add_test(tc, stop_forgets);
    tcase_add_test(tc, arguments);
    tcase_add_loop_test(tc, page_sizes, 0, 9);
    tcase_add_test(tc, pages_partly_in_a_report);
    tcase_add_test(tc, reports_from_anywhere);
    tcase_add_loop_test(tc, range_table, 0, sizeof(range_cases) / sizeof(range_cases[0]));
    tcase_add_test(tc, ranges_of_bytes);
    tcase_add_test(tc, up_to_the_last_byte);
    tcase_add_test(tc, limit_at_start);
    tcase_add_test(tc, limit_while_it_runs);
    tcase_add_test(tc, every_limit);
    tcase_add_test(tc, limit_in_the_midst_of_a_mapping);
    tcase_add_test(tc, every_allocation_fails_once);
    tcase_add_test(tc, many_mappings);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
