/* SPDX-License-Identifier: MIT */
/*
 * The whole of vfu_iommu.h against a model that is too simple to be wrong: an array with one entry for each page of a small
 * window of addresses, and a second copy of the memory. Random operations run on both, and after each one the result, the
 * fault, the counters, the bytes and the tree's invariants are compared.
 *
 * 100,000 operations for each seed and granule; more, and another seed, by the environment:
 *     VFU_MODEL_OPS=10000000 VFU_MODEL_SEED=7 build/tests/test_iommu_model
 */
#define _GNU_SOURCE
#include "vfu_iommu.h"

#include <check.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    PAGES = 512,   /* of the window, each as large as the granule */
    BANKS = 2,     /* each page has as many places in memory where a mapping may put it */
    MAPPINGS = 96, /* max_mappings */
    PINS = 4,
    SEGMENTS = 6, /* a pin that needs more is refused */
    CELLS = 8192, /* the most pages of the dirty log that the window has, and those that stick out of it */
    PHASES = 4
};

enum kind { HOST, IO, GUARDED };

/* What the model knows of a page. */
struct page {
    bool live;
    uint8_t prot, kind, bank;
    uint16_t first, count; /* the mapping that it belongs to, in pages */
};

struct pin {
    vfu_iommu_pin pin;
    bool held, agrees;
    uint64_t iova, len;
    uint32_t prot;
};

static uint64_t unit, base, window; /* bytes of a page, first address, bytes of all pages */
static struct page page[PAGES];
static char *real, *shadow; /* [BANKS][PAGES][unit]: what the table moves bytes in, and the model's */
static vfu_iommu_stats expected;
static struct pin pins[PINS];
static vfu_iommu *table;
static vfu_iommu_reader *reader, *readers[2]; /* the one in use; a plain and a local one */
static bool thrifty;                          /* long run: looks at the whole less often */

/* The dirty log: by pages of its own size, what has to be reported and what may be. */
static struct {
    bool runs;
    unsigned shift;
    size_t count;
    vfu_iommu_range range[3];
    bool must[CELLS + 2], may[CELLS + 2];
} dirty;

/* ---- luck and failure ------------------------------------------------------------------------------------------------- */

static uint64_t seed, luck;
static unsigned long op_number;
static bool trace;

static uint64_t random64(void)
{
    luck ^= luck >> 12;
    luck ^= luck << 25;
    luck ^= luck >> 27;
    return luck * UINT64_C(0x2545F4914F6CDD1D);
}

static uint64_t below(uint64_t n) { return (random64() >> 16) % n; }
static bool one_in(uint64_t n) { return below(n) == 0; }

__attribute__((format(printf, 1, 2))) static void op_is(const char *format, ...)
{
    va_list list;
    if (!trace)
        return;
    fprintf(stderr, "%lu: ", op_number);
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
}

#define must_be(condition, ...) \
    do { \
        if (!(condition)) { \
            char why[200]; \
            snprintf(why, sizeof(why), __VA_ARGS__); \
            ck_abort_msg("seed %llu, granule %llu, base 0x%llx, operation %lu: %s: %s (VFU_MODEL_TRACE=1 shows them)", \
                         (unsigned long long)seed, (unsigned long long)unit, (unsigned long long)base, op_number, #condition, \
                         why); \
        } \
    } while (0)

typedef unsigned long long ull;

/* ---- the model -------------------------------------------------------------------------------------------------------- */

static bool is_range(uint64_t iova, uint64_t len) { return len && len - 1 <= UINT64_MAX - iova; }

/* The page that has the address, or NULL; addresses below the window wrap to far above it. */
static struct page *page_of(uint64_t iova) { return iova - base < window ? &page[(iova - base) / unit] : NULL; }

static struct page *live_page_of(uint64_t iova)
{
    struct page *p = page_of(iova);
    return p && p->live ? p : NULL;
}

static uint64_t start_of(const struct page *p) { return base + p->first * unit; }
static uint64_t last_of(const struct page *p) { return start_of(p) + (p->count * unit - 1); }

/* Where an address of a live page is in `real` or `shadow`. */
static char *place_of(char *memory, uint64_t iova) { return memory + live_page_of(iova)->bank * window + (iova - base); }

static uint64_t min64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t max64(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* What an access must answer, and where its fault is. */
static int model_probe(uint64_t iova, uint64_t len, uint32_t prot, uint64_t *at)
{
    *at = iova;
    if (!len)
        return 0;
    if (!is_range(iova, len))
        return -EINVAL;
    for (uint64_t last = iova + (len - 1);; *at = last_of(page_of(*at)) + 1) {
        struct page *p = live_page_of(*at);
        if (!p)
            return -ENOENT;
        if ((p->prot & prot) != prot)
            return -EACCES;
        if (last_of(p) >= last)
            return 0;
    }
}

/* Copies between a buffer and the model's memory, page by page. */
static void model_move(char *memory, uint64_t iova, char *buffer, uint64_t len, bool to_buffer)
{
    for (uint64_t done = 0, n; done < len; done += n) {
        uint64_t at = iova + done;
        n = min64(len - done, unit - (at - base) % unit);
        memcpy(to_buffer ? buffer + done : place_of(memory, at), to_buffer ? place_of(memory, at) : buffer + done, (size_t)n);
    }
}

static uint64_t log_cell(uint64_t iova) { return (iova >> dirty.shift) - (base >> dirty.shift); }
static uint64_t cell_first(uint64_t cell) { return ((base >> dirty.shift) + cell) << dirty.shift; }
static uint64_t cell_last(uint64_t cell) { return cell_first(cell) | ((UINT64_C(1) << dirty.shift) - 1); }
static uint64_t cell_count(void) { return log_cell(base + (window - 1)) + 1; }

/* The part of [first, last] that is in logged range i. */
static bool logged_part(size_t i, uint64_t *first, uint64_t *last)
{
    if (!dirty.count)
        return true;
    *first = max64(*first, dirty.range[i].iova);
    *last = min64(*last, dirty.range[i].iova + (dirty.range[i].size - 1));
    return *first <= *last;
}

static size_t logged_ranges(void) { return dirty.count ? dirty.count : 1; }

static bool is_logged(uint64_t first, uint64_t last)
{
    for (size_t i = 0; i < logged_ranges(); i++) {
        uint64_t f = first, l = last;
        if (logged_part(i, &f, &l))
            return true;
    }
    return false;
}

/* `surely`: through a mapping. A mark of addresses that have none need not be kept. */
static void model_dirty(uint64_t iova, uint64_t len, bool surely)
{
    if (!dirty.runs || !len)
        return;
    uint64_t last = iova + (len - 1);
    for (uint64_t cell = log_cell(iova); cell <= log_cell(last); cell++) {
        dirty.may[cell] = true;
        if (surely && is_logged(max64(iova, cell_first(cell)), min64(last, cell_last(cell))))
            dirty.must[cell] = true;
    }
}

static void model_wrote(uint64_t iova, const char *bytes, uint64_t len)
{
    char *copy = (char *)(uintptr_t)bytes;
    model_move(shadow, iova, copy, len, false);
    model_dirty(iova, len, true);
}

/* ---- the table's callbacks -------------------------------------------------------------------------------------------- */

/* What a callback is asked to move lies inside the one mapping that it belongs to. */
static char *io_place(void *ctx, uint64_t iova, size_t len)
{
    struct page *p = live_page_of(iova);
    must_be(p && p->kind == IO && len && last_of(p) - iova >= len - 1, "callback at 0x%llx + %zu", (ull)iova, len);
    must_be(ctx == real + p->bank * window, "callback's context");
    return place_of(real, iova);
}

static int io_read(void *ctx, uint64_t iova, void *dst, size_t len)
{
    memcpy(dst, io_place(ctx, iova, len), len);
    return 0;
}

static int io_write(void *ctx, uint64_t iova, const void *src, size_t len)
{
    memcpy(io_place(ctx, iova, len), src, len);
    return 0;
}

static const vfu_iommu_io io = {.read = io_read, .write = io_write};

static int guard(void *ctx, void (*body)(void *arg), void *arg, const void **bad)
{
    (void)ctx, (void)bad;
    body(arg);
    return 0;
}

static void forget_pin(struct pin *p)
{
    p->held = false;
    expected.pins--;
    if (p->prot & VFU_IOMMU_WRITE)
        model_dirty(p->iova, p->len, true);
}

static bool let_go(vfu_iommu_pin *pin, uint64_t iova, uint64_t size)
{
    struct pin *p = pin->user;
    must_be(p->held && p->iova <= iova + (size - 1) && p->iova + (p->len - 1) >= iova, "asked a pin elsewhere to let go");
    if (p->agrees)
        forget_pin(p);
    return p->agrees;
}

static uint64_t removed_bytes;
static unsigned removed_count;
static void removed(void *ctx, const vfu_iommu_mapping *m)
{
    (void)ctx;
    removed_count++;
    removed_bytes += m->size;
}

/* ---- comparisons ------------------------------------------------------------------------------------------------------ */

static void same_result(int got, int wanted, uint64_t at, uint32_t prot)
{
    must_be(got == wanted, "%d instead of %d", got, wanted);
    if (wanted >= 0)
        return;
    const vfu_iommu_fault *fault = vfu_iommu_last_fault(reader);
    vfu_iommu_fault newest;
    must_be(fault->error == wanted && fault->iova == at && fault->prot == prot, "fault %d at 0x%llx for %u, not at 0x%llx for %u",
            fault->error, (ull)fault->iova, fault->prot, (ull)at, prot);
    must_be(vfu_iommu_get_faults(table, &newest, 1) == 1 && newest.iova == at && newest.error == wanted, "fault log");
    expected.faults++;
}

/* The bytes of the range, as far as it is mapped, and now and then all of them. */
static void same_memory(uint64_t iova, uint64_t len)
{
    if (unit * PAGES <= 8192 || op_number % 1024 == 0) {
        must_be(!memcmp(real, shadow, (size_t)(BANKS * window)), "memory differs");
        return;
    }
    uint64_t first = max64(iova, base), last = min64(iova + (len ? len - 1 : 0), base + (window - 1));
    for (uint64_t at = first - (first - base) % unit; at <= last && at >= base; at += unit) {
        struct page *p = live_page_of(at);
        must_be(!p || !memcmp(place_of(real, at), place_of(shadow, at), (size_t)unit), "memory differs at 0x%llx", (ull)at);
        if (last - at < unit)
            break;
    }
}

static void same_stats(void)
{
    vfu_iommu_stats got;
    vfu_iommu_get_stats(table, &got);
    must_be(got.mappings == expected.mappings && got.bytes == expected.bytes && got.maps == expected.maps &&
                got.unmaps == expected.unmaps && got.faults == expected.faults && got.pins == expected.pins,
            "mappings %llu/%llu bytes %llu/%llu maps %llu/%llu unmaps %llu/%llu faults %llu/%llu pins %llu/%llu",
            (ull)got.mappings, (ull)expected.mappings, (ull)got.bytes, (ull)expected.bytes, (ull)got.maps, (ull)expected.maps,
            (ull)got.unmaps, (ull)expected.unmaps, (ull)got.faults, (ull)expected.faults, (ull)got.pins, (ull)expected.pins);
    must_be(!got.dirty_size == !dirty.runs, "dirty_size %llu", (ull)got.dirty_size);
}

/* ---- choices ---------------------------------------------------------------------------------------------------------- */

static uint64_t some_pages(void) { return one_in(8) ? 1 + below(64) : 1 + below(6); }

/* An address of the window, mostly of a live page, sometimes near the window's edges and a bit outside. */
static uint64_t some_address(void)
{
    if (one_in(40))
        return base - unit + below(2 * unit);
    if (one_in(40))
        return base + window - unit + below(2 * unit);
    uint64_t offset = below(window);
    for (int tries = 0; tries < 4 && !page[offset / unit].live; tries++)
        offset = below(window);
    return base + offset;
}

/* A start of a mapping or an address, so that ranges end at borders as often as they don't. */
static uint64_t some_border(void)
{
    uint64_t iova = some_address();
    struct page *p = live_page_of(iova);
    return p && one_in(3) ? start_of(p) : iova;
}

static uint64_t some_length(void)
{
    switch (below(8)) {
    case 0: return below(3);
    case 1: return 1 + below(unit * 24);
    case 2: return unit * (1 + below(3));
    case 3: return 1 + below(unit * 3);
    default: return 1 + below(min64(unit * 3, 64));
    }
}

static char bytes[PAGES * 4096];
static void some_bytes(uint64_t len)
{
    for (uint64_t i = 0; i < len; i += 8) {
        uint64_t r = random64();
        memcpy(bytes + i, &r, (size_t)min64(8, len - i));
    }
}

static uint32_t some_prot(void) { return one_in(2) ? VFU_IOMMU_READ | VFU_IOMMU_WRITE : 1 + (uint32_t)below(3); }

/* ---- operations ------------------------------------------------------------------------------------------------------- */

static void do_map(void)
{
    uint64_t first = below(PAGES), count = min64(some_pages(), PAGES - first);
    uint8_t bank = (uint8_t)below(BANKS), kind = (uint8_t)(one_in(5) ? IO : one_in(6) ? GUARDED : HOST);
    uint32_t prot = some_prot();
    vfu_iommu_mapping m = {.iova = base + first * unit, .size = count * unit, .prot = prot};
    if (kind == IO) {
        m.io = &io;
        m.io_ctx = real + bank * window;
    } else {
        m.host = real + bank * window + first * unit;
        m.flags = kind == GUARDED ? VFU_IOMMU_GUARDED : 0;
    }
    m.user = &page[first];
    int wanted = 0;
    for (uint64_t i = first; i < first + count; i++)
        wanted = page[i].live ? -EEXIST : wanted;
    if (!wanted && expected.mappings == MAPPINGS)
        wanted = -ENOSPC;
    if (one_in(50) && unit > 1) {
        m.size -= 1 + below(unit - 1);
        wanted = -EINVAL;
    } else if (m.iova && one_in(50)) {
        m.size = (UINT64_MAX - unit + 1) - m.iova + 2 * unit; /* ends one page after 2^64 */
        wanted = -EINVAL;
    }
    op_is("map %llu + %llu prot %u kind %u", (ull)first, (ull)count, prot, kind);
    int got = vfu_iommu_map(table, &m);
    must_be(got == wanted, "map %llu + %llu: %d instead of %d", (ull)first, (ull)count, got, wanted);
    if (got)
        return;
    for (uint64_t i = first; i < first + count; i++)
        page[i] = (struct page){true, (uint8_t)prot, kind, bank, (uint16_t)first, (uint16_t)count};
    expected.mappings++;
    expected.maps++;
    expected.bytes += m.size;
}

/* 1 when a pin that does not agree to let go keeps a mapping of the range. */
static bool is_pinned(uint64_t first, uint64_t last)
{
    for (int i = 0; i < PINS; i++)
        if (pins[i].held && !pins[i].agrees && pins[i].iova <= last && pins[i].iova + (pins[i].len - 1) >= first)
            return true;
    return false;
}

static void do_unmap(bool all)
{
    uint64_t first = base + below(PAGES) * unit, size = min64(some_pages() * unit, base + (window - 1) - first + 1), last;
    struct page *p = live_page_of(first);
    if (p && !one_in(6)) { /* exactly this mapping, or with its neighbours */
        first = start_of(p);
        size = p->count * unit;
        for (struct page *next; one_in(2) && first + (size - 1) < base + (window - 1) && (next = live_page_of(first + size));)
            size += next->count * unit;
    }
    last = first + (size - 1);
    if (all) {
        first = 0;
        last = UINT64_MAX;
    }
    int wanted = 0;
    uint64_t gone = 0;
    for (unsigned i = 0; i < PAGES; i++) {
        struct page *q = &page[i];
        uint64_t at = base + i * unit;
        if (!q->live || at < first || at > last)
            continue;
        if (start_of(q) < first || last_of(q) > last)
            wanted = -EINVAL;
        if (wanted >= 0 && q->first == i) {
            wanted++;
            gone += q->count * unit;
        }
    }
    if (wanted > 0 && is_pinned(first, last))
        wanted = -EBUSY;
    op_is("unmap 0x%llx..0x%llx", (ull)first, (ull)last);
    removed_count = 0;
    removed_bytes = 0;
    int got = all ? vfu_iommu_unmap_all(table) : vfu_iommu_unmap(table, first, size);
    must_be(got == wanted, "unmap 0x%llx..0x%llx: %d instead of %d", (ull)first, (ull)last, got, wanted);
    if (got < 0)
        gone = 0;
    must_be(removed_count == (got > 0 ? (unsigned)got : 0) && removed_bytes == gone, "removed %u mappings, %llu bytes",
            removed_count, (ull)removed_bytes);
    if (got <= 0)
        return;
    for (unsigned i = 0; i < PAGES; i++)
        if (base + i * unit >= first && base + i * unit <= last)
            page[i].live = false;
    expected.mappings -= (uint64_t)got;
    expected.unmaps += (uint64_t)got;
    expected.bytes -= gone;
}

static void do_probe(void)
{
    uint64_t iova = some_border(), len = one_in(20) ? random64() : some_length(), at;
    uint32_t prot = some_prot();
    int wanted = model_probe(iova, len, prot, &at);
    op_is("probe 0x%llx + 0x%llx prot %u", (ull)iova, (ull)len, prot);
    same_result(vfu_iommu_probe(reader, iova, len, prot), wanted, at, prot);
}

static void do_read(void)
{
    static char got[sizeof(bytes) + 16];
    uint64_t iova = some_border(), len = some_length(), at;
    int wanted = model_probe(iova, len, VFU_IOMMU_READ, &at);
    memset(got, 0x5a, (size_t)len + 16);
    memset(bytes, 0x5a, (size_t)len);
    if (!wanted)
        model_move(shadow, iova, bytes, len, true);
    op_is("read 0x%llx + %llu", (ull)iova, (ull)len);
    same_result(vfu_iommu_read(reader, iova, got, (size_t)len), wanted, at, VFU_IOMMU_READ);
    must_be(!memcmp(got, bytes, (size_t)len), "wrong bytes were read");
    for (int i = 0; i < 16; i++)
        must_be(got[len + (unsigned)i] == 0x5a, "wrote past the end of the buffer");
}

static void do_write(void)
{
    uint64_t iova = some_border(), len = some_length(), at;
    int wanted = model_probe(iova, len, VFU_IOMMU_WRITE, &at);
    some_bytes(len);
    op_is("write 0x%llx + %llu", (ull)iova, (ull)len);
    same_result(vfu_iommu_write(reader, iova, bytes, (size_t)len), wanted, at, VFU_IOMMU_WRITE);
    if (!wanted)
        model_wrote(iova, bytes, len);
    same_memory(iova, len);
}

static void do_fill(void)
{
    uint64_t iova = some_border(), len = some_length(), at, pattern = random64();
    unsigned width = 1u << below(4);
    int wanted = model_probe(iova, len, VFU_IOMMU_WRITE, &at);
    for (uint64_t i = 0; i < len; i++)
        bytes[i] = ((char *)&pattern)[i % width];
    op_is("fill 0x%llx + %llu with %u", (ull)iova, (ull)len, width);
    same_result(vfu_iommu_fill(reader, iova, len, &pattern, width), wanted, at, VFU_IOMMU_WRITE);
    if (!wanted)
        model_wrote(iova, bytes, len);
    same_memory(iova, len);
}

static void do_copy(void)
{
    uint64_t src = some_border(), dst = one_in(2) ? some_border() : src + below(2 * unit) - unit, len = some_length(), at;
    uint32_t prot = VFU_IOMMU_READ;
    int wanted = 0;
    if (len && (!is_range(src, len) || !is_range(dst, len))) {
        wanted = -EINVAL;
        at = is_range(src, len) ? dst : src;
        prot = is_range(src, len) ? VFU_IOMMU_WRITE : VFU_IOMMU_READ;
    } else {
        wanted = model_probe(src, len, VFU_IOMMU_READ, &at);
        if (!wanted)
            wanted = model_probe(dst, len, prot = VFU_IOMMU_WRITE, &at);
    }
    if (!wanted)
        model_move(shadow, src, bytes, len, true);
    op_is("copy 0x%llx <- 0x%llx + %llu", (ull)dst, (ull)src, (ull)len);
    same_result(vfu_iommu_copy(reader, dst, src, len), wanted, at, prot);
    if (!wanted)
        model_wrote(dst, bytes, len);
    same_memory(dst, len);
}

static void do_word(bool store)
{
    unsigned width = one_in(40) ? (unsigned)below(18) : 1u << below(4);
    uint64_t iova = some_border(), value = random64(), got = 0, at;
    if (!one_in(10) && width)
        iova &= ~(uint64_t)(width - 1);
    uint32_t prot = store ? VFU_IOMMU_WRITE : VFU_IOMMU_READ;
    struct page *p = live_page_of(iova);
    int wanted = model_probe(iova, width, prot, &at);
    if ((width != 1 && width != 2 && width != 4 && width != 8) || (iova & (width - 1))) {
        wanted = -EINVAL;
        at = iova;
    } else if (!wanted && last_of(p) - iova < width - 1) {
        wanted = -ENOTSUP;
        at = iova;
    } else if (!wanted && p->kind != IO && (uintptr_t)place_of(real, iova) & (width - 1)) {
        wanted = -EINVAL;
        at = iova;
    }
    int order = one_in(2) ? VFU_IOMMU_RELAXED : store ? VFU_IOMMU_RELEASE : VFU_IOMMU_ACQUIRE;
    op_is("%s 0x%llx width %u", store ? "store" : "load", (ull)iova, width);
    if (store) {
        same_result(vfu_iommu_store(reader, iova, width, order, value), wanted, at, prot);
    } else {
        same_result(vfu_iommu_load(reader, iova, width, order, &got), wanted, at, prot);
    }
    if (wanted) {
        must_be(!got, "a load that failed gave a value");
        return;
    }
    uint8_t u8;
    uint16_t u16;
    uint32_t u32;
    uint64_t u64;
    void *word = width == 1 ? (void *)&u8 : width == 2 ? (void *)&u16 : width == 4 ? (void *)&u32 : &u64;
    if (store) {
        u8 = (uint8_t)value;
        u16 = (uint16_t)value;
        u32 = (uint32_t)value;
        u64 = value;
        model_wrote(iova, word, width);
        same_memory(iova, width);
    } else {
        model_move(shadow, iova, word, width, true);
        must_be(got == (width == 1 ? u8 : width == 2 ? u16 : width == 4 ? u32 : u64), "loaded a wrong value");
    }
}

static void do_next(void)
{
    uint64_t iova = one_in(4) ? random64() : some_address();
    struct page *found = NULL;
    for (unsigned i = 0; i < PAGES && !found; i++)
        if (page[i].live && last_of(&page[i]) >= iova)
            found = &page[i];
    vfu_iommu_mapping m;
    op_is("next 0x%llx", (ull)iova);
    must_be(vfu_iommu_next(table, iova, &m) == (found != NULL), "next 0x%llx", (ull)iova);
    if (found)
        must_be(m.iova == start_of(found) && m.size == found->count * unit && m.prot == found->prot &&
                    m.user == &page[found->first] && !m.io == (found->kind != IO) &&
                    m.flags == (found->kind == GUARDED ? VFU_IOMMU_GUARDED : 0),
                "next 0x%llx gave another mapping", (ull)iova);
}

static void do_pin(void)
{
    struct pin *p = &pins[below(PINS)];
    vfu_iommu_segment segment[SEGMENTS];
    if (p->held) {
        op_is("drop pin");
        vfu_iommu_pin_drop(table, &p->pin);
        vfu_iommu_pin_drop(table, &p->pin); /* once more does nothing */
        forget_pin(p);
        return;
    }
    p->iova = some_border();
    p->len = some_length();
    p->prot = some_prot();
    p->agrees = !one_in(16); /* one that doesn't makes unmaps wait for the deadline */
    p->pin = (vfu_iommu_pin){.let_go = let_go, .user = p};
    int wanted = is_range(p->iova, p->len) ? 0 : -EINVAL;
    uint64_t at = p->iova, last = p->iova + (p->len - 1);
    while (wanted >= 0) {
        struct page *q = live_page_of(at);
        if (!q || (q->prot & p->prot) != p->prot || q->kind != HOST || wanted == SEGMENTS) {
            wanted = !q ? -ENOENT : (q->prot & p->prot) != p->prot ? -EACCES : q->kind != HOST ? -ENOTSUP : -E2BIG;
            break;
        }
        wanted++;
        if (last_of(q) >= last)
            break;
        at = last_of(q) + 1;
    }
    op_is("pin 0x%llx + %llu prot %u", (ull)p->iova, (ull)p->len, p->prot);
    int got = vfu_iommu_pin_take(reader, &p->pin, p->iova, p->len, p->prot, segment, SEGMENTS);
    same_result(got, wanted, at, p->prot);
    if (got < 0)
        return;
    p->held = true;
    expected.pins++;
    at = p->iova;
    for (int i = 0; i < got; i++) {
        uint64_t len = min64(last_of(live_page_of(at)), last) - at + 1;
        must_be(segment[i].iova == at && segment[i].host == place_of(real, at) && segment[i].len == len, "segment %d", i);
        if (p->prot & VFU_IOMMU_WRITE) { /* in place, around the table */
            *(char *)segment[i].host = *place_of(shadow, at) = (char)random64();
        }
        at += len;
    }
}

static void do_dirty_start(void)
{
    vfu_iommu_range range[3];
    unsigned finest = unit == 4096 ? 8 : 0, shift = finest + (unsigned)below(9);
    size_t count = one_in(2) ? 0 : 1 + below(3);
    for (size_t i = 0; i < count; i++) {
        range[i].iova = base + below(window);
        range[i].size = 1 + below(one_in(2) ? window : 4 * unit);
        if (!is_range(range[i].iova, range[i].size))
            range[i].size = UINT64_MAX - range[i].iova + 1;
    }
    op_is("dirty start %u", shift);
    int got = vfu_iommu_dirty_start(table, UINT64_C(1) << shift, range, count);
    must_be(got == (dirty.runs ? -EBUSY : 0), "dirty start: %d", got);
    if (got)
        return;
    memset(&dirty, 0, sizeof(dirty));
    dirty.runs = true;
    dirty.shift = shift;
    dirty.count = count;
    memcpy(dirty.range, range, count * sizeof(range[0]));
}

static void do_dirty_stop(void)
{
    op_is("dirty stop");
    must_be(vfu_iommu_dirty_stop(table) == (dirty.runs ? 0 : -EINVAL), "dirty stop");
    dirty.runs = false;
}

static void do_dirty_mark(void)
{
    uint64_t iova = base + below(window), len = min64(some_length(), base + (window - 1) - iova + 1), at;
    op_is("dirty mark 0x%llx + %llu", (ull)iova, (ull)len);
    vfu_iommu_dirty_mark(table, iova, len);
    if (!len)
        return;
    model_dirty(iova, len, false);
    for (at = iova; at - iova < len; at++) /* surely where it is mapped */
        if (live_page_of(at))
            model_dirty(at, 1, true);
}

/* Sets the bits of the report for cell's bytes that are logged and in [first, last]. */
static void report_bits(uint64_t *bits, uint64_t cell, uint64_t first, uint64_t last, unsigned shift)
{
    for (size_t i = 0; i < logged_ranges(); i++) {
        uint64_t f = max64(first, cell_first(cell)), l = min64(last, cell_last(cell));
        if (f > l || !logged_part(i, &f, &l))
            continue;
        for (uint64_t k = (f - first) >> shift; k <= (l - first) >> shift; k++)
            bits[k / 64] |= UINT64_C(1) << k % 64;
    }
}

static bool all_logged_inside(uint64_t cell, uint64_t first, uint64_t last)
{
    for (size_t i = 0; i < logged_ranges(); i++) {
        uint64_t f = cell_first(cell), l = cell_last(cell);
        if (logged_part(i, &f, &l) && (f < first || l > last))
            return false;
    }
    return true;
}

static void do_dirty_report(void)
{
    enum { WORDS = 2 * CELLS * 8 / 64 };
    static uint64_t got[WORDS + 1], must[WORDS], may[WORDS];
    uint64_t first = base, size = window, last;
    if (one_in(2)) {
        first = base + below(window);
        size = min64(some_length() + 1, base + (window - 1) - first + 1);
    }
    last = first + (size - 1);
    unsigned shift = (unsigned)below(one_in(10) ? 64 : 14);
    if (((size - 1) >> shift) / 64 >= WORDS)
        shift = 12;
    uint64_t words = ((size - 1) >> shift) / 64 + 1;
    memset(got, 0xa5, sizeof(got));
    op_is("dirty report 0x%llx + %llu by %u", (ull)first, (ull)size, shift);
    int wanted = dirty.runs ? 0 : -EINVAL,
        result = vfu_iommu_dirty_report(table, first, size, UINT64_C(1) << shift, got, (size_t)words);
    must_be(result == wanted, "report: %d", result);
    must_be(got[wanted ? 0 : words] == UINT64_C(0xa5a5a5a5a5a5a5a5), "report wrote more words than it needs");
    if (wanted)
        return;
    memset(must, 0, sizeof(must));
    memset(may, 0, sizeof(may));
    bool held[CELLS + 2] = {false};
    for (int i = 0; i < PINS; i++) /* pages of pins for writing are dirty and stay so */
        if (pins[i].held && pins[i].prot & VFU_IOMMU_WRITE)
            for (uint64_t c = log_cell(pins[i].iova); c <= log_cell(pins[i].iova + (pins[i].len - 1)); c++)
                held[c] = true;
    for (uint64_t c = 0; c < cell_count(); c++) {
        if (dirty.must[c] || held[c])
            report_bits(must, c, first, last, shift);
        if (dirty.may[c] || held[c])
            report_bits(may, c, first, last, shift);
        if (cell_first(c) >= first && cell_last(c) <= last)
            dirty.must[c] = dirty.may[c] = false;
        else if (cell_first(c) <= last && cell_last(c) >= first && all_logged_inside(c, first, last))
            dirty.must[c] = false; /* what sticks out isn't logged: it may be kept or not */
    }
    for (uint64_t w = 0; w < words; w++) {
        must_be(!(must[w] & ~got[w]), "word %llu of the report lacks %llx", (ull)w, (ull)(must[w] & ~got[w]));
        must_be(!(got[w] & ~may[w]), "word %llu of the report has %llx too many", (ull)w, (ull)(got[w] & ~may[w]));
    }
}

static void do_operation(void)
{
    uint64_t dice = below(1000);
    if (dice < 130)
        do_map();
    else if (dice < 219)
        do_unmap(false);
    else if (dice < 220)
        do_unmap(true);
    else if (dice < 320)
        do_read();
    else if (dice < 450)
        do_write();
    else if (dice < 530)
        do_copy();
    else if (dice < 600)
        do_fill();
    else if (dice < 680)
        do_probe();
    else if (dice < 790)
        do_word(dice & 1);
    else if (dice < 870)
        do_next();
    else if (dice < 920)
        do_pin();
    else if (dice < 930)
        do_dirty_start();
    else if (dice < 933)
        do_dirty_stop();
    else if (dice < 950)
        do_dirty_mark();
    else
        do_dirty_report();
}

static void run_phase(unsigned long operations)
{
    vfu_iommu_desc desc = {.max_mappings = MAPPINGS, .max_readers = 2, .cache_entries = 16, .granule = unit};
    desc.pin_deadline_ms = 1;
    desc.removed = removed;
    desc.guard = guard;
    window = PAGES * unit;
    if (one_in(2)) {
        desc.buffer_size = vfu_iommu_footprint(&desc);
        desc.buffer = malloc(desc.buffer_size);
    }
    real = aligned_alloc(64, (size_t)(BANKS * window));
    shadow = malloc((size_t)(BANKS * window));
    ck_assert(real && shadow);
    for (uint64_t i = 0; i < BANKS * window; i++)
        real[i] = shadow[i] = (char)random64();
    memset(page, 0, sizeof(page));
    memset(pins, 0, sizeof(pins));
    memset(&expected, 0, sizeof(expected));
    dirty.runs = false;
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &readers[0]), 0);
    ck_assert_int_eq(vfu_iommu_reader_open_local(table, &readers[1]), 0);
    for (unsigned long i = 0; i < operations; i++, op_number++) {
        reader = readers[below(2)];
        do_operation();
        if (!thrifty || i % 16 == 0) {
            must_be(!vfu_iommu_check(table), "the invariants of the tree");
            same_stats();
        }
    }
    for (int i = 0; i < PINS; i++)
        vfu_iommu_pin_drop(table, &pins[i].pin);
    must_be(!memcmp(real, shadow, (size_t)(BANKS * window)), "memory differs at the end");
    vfu_iommu_reader_close(readers[0]);
    vfu_iommu_reader_close(readers[1]);
    vfu_iommu_destroy(table);
    free(desc.buffer);
    free(real);
    free(shadow);
}

static unsigned long from_environment(const char *name, unsigned long otherwise)
{
    const char *text = getenv(name);
    return text ? strtoul(text, NULL, 10) : otherwise;
}

START_TEST(against_the_model)
{
    static const uint64_t granules[] = {1, 16, 4096};
    unsigned long operations = from_environment("VFU_MODEL_OPS", 100000);
    seed = from_environment("VFU_MODEL_SEED", (unsigned long)(_i / 3) + 1);
    luck = (seed + 1) * UINT64_C(0x9E3779B97F4A7C15);
    unit = granules[_i % 3];
    thrifty = operations > 100000;
    trace = getenv("VFU_MODEL_TRACE") != NULL;
    /* at zero, across 2^32, at an odd place, and at the very top */
    const uint64_t bases[PHASES] = {0, (UINT64_C(1) << 32) - 100 * unit, UINT64_C(0x123456789000) + 3 * unit, 0 - PAGES * unit};
    for (int phase = 0; phase < PHASES; phase++) {
        base = bases[phase];
        run_phase(operations / PHASES);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("iommu model");
    TCase *tc = tcase_create("model");
    tcase_set_timeout(tc, getenv("VFU_MODEL_OPS") ? 3600 : 120);
    tcase_add_loop_test(tc, against_the_model, 0, getenv("VFU_MODEL_SEED") ? 3 : 9);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
