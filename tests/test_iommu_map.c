/* SPDX-License-Identifier: MIT */
/*
 * Section "map" of vfu_iommu.h: map and unmap have the semantics of VFIO's type1v2, wherever in the 2^64 addresses.
 *
 * A table is drawn as a string of 16 pages: "aa.b" is a mapping of two pages, a hole, and a mapping of one. The letter is
 * kept in the mapping's `user`, so what is drawn is what the table gives back.
 */
#define _GNU_SOURCE
#include "vfu_iommu.h"

#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { PAGES = 16, NODES = 3000 };

/* Where the drawn pages lie: page size (the granule as well) and first address. The last ones end at 2^64. */
static const struct place {
    uint64_t page, base;
} places[] = {
    {1, 0},
    {1, 1},
    {1, UINT64_MAX - 15},
    {16, 0xfffffff0},
    {4096, 0},
    {4096, 0x7ffff000},
    {4096, (uint64_t)0 - 16 * 4096},
    {UINT64_C(1) << 20, UINT64_C(1) << 40},
    {UINT64_C(1) << 59, UINT64_C(1) << 63},
};
enum { PLACES = sizeof(places) / sizeof(places[0]) };

static vfu_iommu *table;
static const struct place *place;
static char removed[64]; /* letters, in the order in which `removed` was called */
static char memory[1];

static void note_removed(void *ctx, const vfu_iommu_mapping *m)
{
    ck_assert_ptr_eq(ctx, memory);
    size_t len = strlen(removed);
    ck_assert_uint_lt(len, sizeof(removed) - 1);
    removed[len] = *(const char *)m->user;
    removed[len + 1] = 0;
}

/* Never called: mappings need not have memory that exists to be mapped and unmapped. */
static int io_fail(void *ctx, uint64_t iova, void *dst, size_t len)
{
    (void)ctx, (void)iova, (void)dst, (void)len;
    return -EIO;
}
static const vfu_iommu_io io = {.read = io_fail};

static void make_table(uint64_t granule)
{
    vfu_iommu_desc desc = {.granule = granule, .removed = note_removed, .ctx = memory, .max_mappings = NODES, .max_readers = 1};
    removed[0] = 0;
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
}

static uint64_t address(size_t page) { return place->base + page * place->page; }

static int map_letter(const char *letter, size_t first, size_t count)
{
    vfu_iommu_mapping m = {.iova = address(first), .size = count * place->page, .prot = VFU_IOMMU_READ, .io = &io};
    m.user = (void *)(uintptr_t)letter;
    return vfu_iommu_map(table, &m);
}

/* Maps each stretch of the same letter; returns the last result. */
static int map_drawing(const char *drawing)
{
    int err = 0;
    for (size_t i = 0, n; i < PAGES; i += n) {
        for (n = 1; i + n < PAGES && drawing[i + n] == drawing[i]; n++) {
        }
        if (drawing[i] != '.')
            err = map_letter(&drawing[i], i, n);
    }
    return err;
}

/* The stretch of pages that is not a hole. */
static void extent(const char *drawing, size_t *first, size_t *count)
{
    *first = strspn(drawing, ".");
    *count = strcspn(drawing + *first, ".");
}

static const char *draw(void)
{
    static char drawing[PAGES + 1];
    vfu_iommu_mapping m;
    memset(drawing, '.', PAGES);
    ck_assert_int_eq(vfu_iommu_check(table), 0);
    for (uint64_t at = 0; vfu_iommu_next(table, at, &m); at = m.iova + m.size) {
        for (uint64_t i = 0; i < m.size / place->page; i++)
            drawing[(m.iova - place->base) / place->page + i] = *(const char *)m.user;
        if (m.iova + m.size == 0)
            break;
    }
    return drawing;
}

static const struct map_case {
    const char *name, *before, *added;
    int result;
} map_cases[] = {
    {"into an empty table", "................", "....nnnn........", 0},
    {"all of it", "................", "nnnnnnnnnnnnnnnn", 0},
    {"the first page", "................", "n...............", 0},
    {"the last page", "................", "...............n", 0},
    {"right after another", "..aa............", "....nn..........", 0},
    {"right before another", "....aa..........", "..nn............", 0},
    {"the gap between two", "..aa..bb........", "....nn..........", 0},
    {"far from others", "aa............bb", ".......n........", 0},
    {"the same range again", "....aaaa........", "....nnnn........", -EEXIST},
    {"inside another", "....aaaa........", ".....nn.........", -EEXIST},
    {"the first page of another", "....aaaa........", "....n...........", -EEXIST},
    {"the last page of another", "....aaaa........", ".......n........", -EEXIST},
    {"around another", "....aaaa........", "...nnnnnn.......", -EEXIST},
    {"over the start of another", "....aaaa........", "..nnn...........", -EEXIST},
    {"over the end of another", "....aaaa........", ".......nnn......", -EEXIST},
    {"over two and the gap between them", "..aa..bb........", "...nnnn.........", -EEXIST},
    {"over many", "a.b.c.d.e.f.g.h.", ".nnnnnnnnnnnnnn.", -EEXIST},
    {"all over a single page", ".......a........", "nnnnnnnnnnnnnnnn", -EEXIST},
    {"all over the last page", "...............a", "nnnnnnnnnnnnnnnn", -EEXIST},
    {"over the last byte's mapping", "..............aa", "...............n", -EEXIST},
};
enum { MAP_CASES = sizeof(map_cases) / sizeof(map_cases[0]) };

static void try_map(const struct map_case *c)
{
    char after[PAGES + 1];
    make_table(place->page);
    map_drawing(c->before);
    strcpy(after, c->before);
    for (size_t i = 0; i < PAGES && !c->result; i++)
        after[i] = c->added[i] != '.' ? c->added[i] : after[i];
    ck_assert_msg(map_drawing(c->added) == c->result, "map %s at 0x%llx", c->name, (unsigned long long)place->base);
    ck_assert_msg(!strcmp(draw(), after), "map %s at 0x%llx: %s", c->name, (unsigned long long)place->base, draw());
    vfu_iommu_destroy(table);
}

START_TEST(map_cases_everywhere)
{
    place = &places[_i];
    for (int i = 0; i < MAP_CASES; i++)
        try_map(&map_cases[i]);
}
END_TEST

static const struct unmap_case {
    const char *name, *before, *range, *after, *removed;
    int result;
} unmap_cases[] = {
    {"of an empty table", "................", "....uuuu........", "................", "", 0},
    {"of a hole", "aaaa....bbbb....", "....uuuu........", "aaaa....bbbb....", "", 0},
    {"of part of a hole", "aaaa....bbbb....", ".....uu.........", "aaaa....bbbb....", "", 0},
    {"of exactly one", "....aaaa........", "....uuuu........", "................", "a", 1},
    {"of one page", ".......a........", ".......u........", "................", "a", 1},
    {"around one", "....aaaa........", "..uuuuuuuuu.....", "................", "a", 1},
    {"of everything", "a.bb.ccc.ddddeee", "uuuuuuuuuuuuuuuu", "................", "abcde", 5},
    {"of several with gaps", "a.bb.ccc.ddddeee", "..uuuuuuuuuuu...", "a............eee", "bcd", 3},
    {"of the middle of three neighbours", "..aaabbbccc.....", ".....uuu........", "..aaa...ccc.....", "b", 1},
    {"of the first two of three neighbours", "..aaabbbccc.....", "..uuuuuu........", "........ccc.....", "ab", 2},
    {"of the last page of all", "..............ab", "...............u", "..............a.", "b", 1},
    {"of the first page of all", "ab..............", "u...............", ".b..............", "a", 1},
    {"that would cut off the start", "....aaaa........", "....uu..........", "....aaaa........", "", -EINVAL},
    {"that would cut off the end", "....aaaa........", "......uu........", "....aaaa........", "", -EINVAL},
    {"that would cut a hole", "....aaaa........", ".....uu.........", "....aaaa........", "", -EINVAL},
    {"that begins before and ends inside", "....aaaa........", "..uuuu..........", "....aaaa........", "", -EINVAL},
    {"that begins inside and ends after", "....aaaa........", "......uuuuuu....", "....aaaa........", "", -EINVAL},
    {"that covers one and cuts the next", "..aa..bbbb......", "..uuuuuu........", "..aa..bbbb......", "", -EINVAL},
    {"that cuts one and covers the next", "..aaaa..bb......", "....uuuuuu......", "..aaaa..bb......", "", -EINVAL},
    {"that cuts one at both ends", "aaabbbccc.......", ".uuuuuuu........", "aaabbbccc.......", "", -EINVAL},
    {"that cuts only the last of many", "a.b.c.d.e.f.gg..", "uuuuuuuuuuuuu...", "a.b.c.d.e.f.gg..", "", -EINVAL},
    {"that cuts the one that ends last", "...........aaaaa", "............uuuu", "...........aaaaa", "", -EINVAL},
};
enum { UNMAP_CASES = sizeof(unmap_cases) / sizeof(unmap_cases[0]) };

static void try_unmap(const struct unmap_case *c)
{
    size_t first, count;
    make_table(place->page);
    map_drawing(c->before);
    extent(c->range, &first, &count);
    ck_assert_msg(vfu_iommu_unmap(table, address(first), count * place->page) == c->result, "unmap %s at 0x%llx", c->name,
                  (unsigned long long)place->base);
    ck_assert_msg(!strcmp(draw(), c->after), "unmap %s at 0x%llx: %s", c->name, (unsigned long long)place->base, draw());
    ck_assert_str_eq(removed, c->removed);

    char rest[PAGES + 1] = ""; /* UNMAP ALL takes what was left, each letter once */
    for (const char *p = c->after; *p; p++)
        if (*p != '.' && !strchr(rest, *p))
            strncat(rest, p, 1);
    removed[0] = 0;
    ck_assert_int_eq(vfu_iommu_unmap_all(table), (int)strlen(rest));
    ck_assert_str_eq(removed, rest);
    ck_assert_str_eq(draw(), "................");
    ck_assert_int_eq(vfu_iommu_unmap_all(table), 0);
    vfu_iommu_destroy(table);
}

START_TEST(unmap_cases_everywhere)
{
    place = &places[_i];
    for (int i = 0; i < UNMAP_CASES; i++)
        try_unmap(&unmap_cases[i]);
}
END_TEST

/* What is left is given back when the table ends. */
START_TEST(destroy_gives_back)
{
    place = &places[0];
    make_table(1);
    map_drawing("aab.ccc...dddd.e");
    vfu_iommu_destroy(table);
    ck_assert_str_eq(removed, "abcde");
}
END_TEST

#define TOP  ((uint64_t)0)
#define HALF (UINT64_C(1) << 63)
#define H    memory
static const struct map_args {
    const char *name;
    uint64_t granule;
    vfu_iommu_mapping m;
    int result;
} map_args[] = {
    {"no bytes", 1, {.iova = 5, .size = 0, .prot = 1, .io = &io}, -EINVAL},
    {"no bytes at the top", 1, {.iova = UINT64_MAX, .size = 0, .prot = 1, .io = &io}, -EINVAL},
    {"wraps by one byte", 1, {.iova = UINT64_MAX, .size = 2, .prot = 1, .io = &io}, -EINVAL},
    {"wraps by a page", 4096, {.iova = TOP - 4096, .size = 8192, .prot = 1, .io = &io}, -EINVAL},
    {"wraps far", 1, {.iova = 2, .size = UINT64_MAX, .prot = 1, .io = &io}, -EINVAL},
    {"unaligned address", 4096, {.iova = 4095, .size = 4096, .prot = 1, .io = &io}, -EINVAL},
    {"unaligned size", 4096, {.iova = 4096, .size = 4097, .prot = 1, .io = &io}, -EINVAL},
    {"granule of two, odd size", 2, {.iova = 4096, .size = 1, .prot = 1, .io = &io}, -EINVAL},
    {"no permission", 1, {.size = 16, .prot = 0, .io = &io}, -EINVAL},
    {"unknown permission", 1, {.size = 16, .prot = 5, .io = &io}, -EINVAL},
    {"a permission above a byte", 1, {.size = 16, .prot = 0x101, .io = &io}, -EINVAL},
    {"unknown flag", 1, {.size = 16, .prot = 1, .flags = 2, .host = H}, -EINVAL},
    {"a flag above a byte", 1, {.size = 16, .prot = 1, .flags = 0x100, .host = H}, -EINVAL},
    {"neither host nor io", 1, {.size = 16, .prot = 1}, -EINVAL},
    {"both host and io", 1, {.size = 16, .prot = 1, .host = H, .io = &io}, -EINVAL},
    {"guarded without a guard", 1, {.size = 16, .prot = 1, .flags = VFU_IOMMU_GUARDED, .host = H}, -EINVAL},
    {"guarded io", 1, {.size = 16, .prot = 1, .flags = VFU_IOMMU_GUARDED, .io = &io}, -EINVAL},
    {"host pointer wraps", 1, {.size = UINT64_MAX - 4096, .prot = 1, .host = H}, -EINVAL},
    {"one byte", 1, {.iova = 7, .size = 1, .prot = 1, .host = H}, 0},
    {"the last byte", 1, {.iova = UINT64_MAX, .size = 1, .prot = 1, .host = H}, 0},
    {"all but the last byte", 1, {.iova = 0, .size = UINT64_MAX, .prot = 3, .io = &io}, 0},
    {"all but the first byte", 1, {.iova = 1, .size = UINT64_MAX, .prot = 2, .io = &io}, 0},
    {"the last page", 4096, {.iova = TOP - 4096, .size = 4096, .prot = 3, .io = &io}, 0},
    {"the upper half, granule 2^63", HALF, {.iova = HALF, .size = HALF, .prot = 3, .io = &io}, 0},
};

START_TEST(map_arguments)
{
    const struct map_args *c = &map_args[_i];
    vfu_iommu_mapping m = c->m, got;
    vfu_iommu_stats stats;
    m.user = (void *)(uintptr_t) "x";
    m.io_ctx = m.io ? &m : NULL;
    make_table(c->granule);
    ck_assert_msg(vfu_iommu_map(table, &m) == c->result, "%s", c->name);
    vfu_iommu_get_stats(table, &stats);
    ck_assert_uint_eq(stats.mappings, !c->result);
    ck_assert_uint_eq(stats.maps, !c->result);
    ck_assert_uint_eq(stats.bytes, c->result ? 0 : m.size);
    ck_assert_int_eq(vfu_iommu_next(table, 0, &got), !c->result);
    if (!c->result) { /* every field comes back as it was given */
        ck_assert_uint_eq(got.iova, m.iova);
        ck_assert_uint_eq(got.size, m.size);
        ck_assert_uint_eq(got.prot, m.prot);
        ck_assert_uint_eq(got.flags, m.flags);
        ck_assert_ptr_eq(got.host, m.host);
        ck_assert_ptr_eq(got.io, m.io);
        ck_assert_ptr_eq(got.io_ctx, m.io_ctx);
        ck_assert_ptr_eq(got.user, m.user);
        ck_assert_int_eq(vfu_iommu_map(table, &m), -EEXIST);
        ck_assert_int_eq(vfu_iommu_unmap(table, m.iova, m.size), 1);
        ck_assert_str_eq(removed, "x");
    }
    ck_assert_int_eq(vfu_iommu_check(table), 0);
    vfu_iommu_destroy(table);
}
END_TEST

static const struct unmap_args {
    const char *name;
    uint64_t granule, iova, size;
    int result;
} unmap_args[] = {
    {"no bytes", 1, 0, 0, -EINVAL},
    {"no bytes at the top", 1, UINT64_MAX, 0, -EINVAL},
    {"wraps by one byte", 1, UINT64_MAX, 2, -EINVAL},
    {"wraps far", 1, 2, UINT64_MAX, -EINVAL},
    {"unaligned address", 4096, 1, 4096, -EINVAL},
    {"unaligned size", 4096, 0, 4095, -EINVAL},
    {"all but the last byte is unaligned", 4096, 0, UINT64_MAX, -EINVAL},
    {"all but the last byte", 1, 0, UINT64_MAX, 1},
    {"all but the first byte", 1, 1, UINT64_MAX, 1},
    {"the upper half", 4096, UINT64_C(1) << 63, UINT64_C(1) << 63, 1},
    {"the last page", 4096, TOP - 4096, 4096, 0},
};

START_TEST(unmap_arguments)
{
    const struct unmap_args *c = &unmap_args[_i];
    vfu_iommu_mapping m = {.iova = UINT64_C(1) << 63, .size = 4096, .prot = 1, .io = &io, .user = (void *)(uintptr_t) "x"};
    make_table(c->granule);
    ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    ck_assert_msg(vfu_iommu_unmap(table, c->iova, c->size) == c->result, "%s", c->name);
    ck_assert_int_eq(vfu_iommu_next(table, 0, &m), c->result != 1);
    vfu_iommu_destroy(table);
}
END_TEST

/* max_mappings counts what is mapped now: what is unmapped makes room, for ever. */
START_TEST(limit_of_mappings)
{
    vfu_iommu_desc desc = {.max_mappings = 3};
    place = &places[0];
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    ck_assert_int_eq(map_drawing("a.b.c..........."), 0);
    for (int i = 0; i < 1000; i++) {
        ck_assert_int_eq(map_letter("n", 6, 2), -ENOSPC);
        ck_assert_int_eq(map_letter("n", 4, 2), -EEXIST);
        ck_assert_int_eq(vfu_iommu_unmap(table, 2, 1), 1);
        ck_assert_int_eq(map_letter("b", 2, 1), 0);
    }
    ck_assert_str_eq(draw(), "a.b.c...........");
    ck_assert_int_eq(vfu_iommu_unmap_all(table), 3);
    ck_assert_int_eq(map_drawing("..xx..yy..zz...."), 0);
    ck_assert_str_eq(draw(), "..xx..yy..zz....");
    vfu_iommu_destroy(table);
}
END_TEST

/* When `removed` runs, nothing reaches the mapping any more, and its addresses are free for another one. */
static vfu_iommu_reader *removed_reader;
static void map_again(void *ctx, const vfu_iommu_mapping *m)
{
    char byte;
    vfu_iommu_mapping again = *m;
    (void)ctx;
    if (!removed_reader)
        return;
    ck_assert_int_eq(vfu_iommu_read(removed_reader, m->iova, &byte, 1), -ENOENT);
    again.user = (void *)(uintptr_t) "n";
    ck_assert_int_eq(vfu_iommu_map(table, &again), 0);
    ck_assert_int_eq(vfu_iommu_probe(removed_reader, m->iova, 1, VFU_IOMMU_READ), 0);
}

START_TEST(map_inside_removed)
{
    vfu_iommu_desc desc = {.removed = map_again};
    place = &places[0];
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &removed_reader), 0);
    map_drawing("aa.b..ccc.......");
    ck_assert_int_eq(vfu_iommu_unmap(table, 0, 6), 2);
    ck_assert_str_eq(draw(), "nn.n..ccc.......");
    removed_reader = NULL; /* destroy gives back the rest */
    vfu_iommu_destroy(table);
}
END_TEST

/* The tree stays balanced and complete, in whatever order thousands come and go. */
static uint32_t shuffle_state;
static uint32_t shuffle_next(void)
{
    shuffle_state = shuffle_state * 1664525u + 1013904223u;
    return shuffle_state >> 8;
}

static void fill_order(uint32_t *order, int kind)
{
    for (uint32_t i = 0; i < NODES; i++)
        order[i] = kind == 1 ? NODES - 1 - i : kind == 2 ? i / 2 + (i & 1) * (NODES / 2) : i;
    for (uint32_t i = NODES - 1; kind == 3 && i; i--) {
        uint32_t j = shuffle_next() % (i + 1), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
}

START_TEST(thousands)
{
    static uint32_t in[NODES], out[NODES];
    shuffle_state = (uint32_t)_i;
    fill_order(in, _i % 4);
    fill_order(out, _i / 4);
    vfu_iommu_desc desc = {.max_mappings = NODES, .granule = 16};
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    vfu_iommu_mapping m = {.size = 16, .prot = 1, .io = &io};
    for (uint32_t i = 0; i < NODES; i++) {
        m.iova = UINT64_C(0x1000) + in[i] * 32;
        if (vfu_iommu_map(table, &m) || (i % 64 == 0 && vfu_iommu_check(table)))
            ck_abort_msg("map %u", i);
    }
    ck_assert_int_eq(vfu_iommu_map(table, &m), -EEXIST);
    for (uint32_t i = 0; i < NODES; i++) {
        if (!vfu_iommu_next(table, i * 32 + 0x1000, &m) || m.iova != i * 32 + 0x1000)
            ck_abort_msg("next %u", i);
    }
    for (uint32_t i = 0; i < NODES; i++) {
        if (vfu_iommu_unmap(table, UINT64_C(0x1000) + out[i] * 32, 16) != 1 || (i % 64 == 0 && vfu_iommu_check(table)))
            ck_abort_msg("unmap %u", i);
    }
    ck_assert_int_eq(vfu_iommu_next(table, 0, &m), 0);
    ck_assert_int_eq(vfu_iommu_check(table), 0);
    vfu_iommu_destroy(table);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("iommu map");
    TCase *tc = tcase_create("map");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, map_cases_everywhere, 0, PLACES);
    tcase_add_loop_test(tc, unmap_cases_everywhere, 0, PLACES);
    tcase_add_loop_test(tc, map_arguments, 0, sizeof(map_args) / sizeof(map_args[0]));
    tcase_add_loop_test(tc, unmap_arguments, 0, sizeof(unmap_args) / sizeof(unmap_args[0]));
    tcase_add_test(tc, destroy_gives_back);
    tcase_add_test(tc, limit_of_mappings);
    tcase_add_test(tc, map_inside_removed);
    tcase_add_loop_test(tc, thousands, 0, 16);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
