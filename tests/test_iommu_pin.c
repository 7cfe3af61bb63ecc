/* SPDX-License-Identifier: MIT */
/*
 * Section "pin" of vfu_iommu.h: segments for work in place, and how an unmap waits for them: for those of its own range only,
 * with a request to let go, until a deadline that is reported. Callbacks that are under way hold their mapping in the same
 * way.
 *
 * No test depends on how fast this machine is: what must be true "meanwhile" is tested while a thread is known to wait.
 */
#define _GNU_SOURCE
#include "vfu_iommu.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RW   (VFU_IOMMU_READ | VFU_IOMMU_WRITE)
#define BASE UINT64_C(0x100000)
enum { PAGE = 4096, PAGES = 8 };

static vfu_iommu *table;
static vfu_iommu_reader *reader;
static char memory[PAGES][PAGE];

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void wait_for(atomic_int *flag)
{
    for (uint64_t end = now_ms() + 30000; !atomic_load(flag); nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL))
        ck_assert_msg(now_ms() < end, "waited for half a minute");
}

static uint64_t page(unsigned n) { return BASE + n * PAGE; }

static uint64_t pins_now(void)
{
    vfu_iommu_stats stats;
    vfu_iommu_get_stats(table, &stats);
    return stats.pins;
}

/* ---- memory behind callbacks, and a guard that is never needed -------------------------------------------------------- */

static atomic_int io_entered, io_may_return, io_asked;
static uint64_t io_asked_iova, io_asked_size;

static int io_read(void *ctx, uint64_t iova, void *dst, size_t len)
{
    (void)ctx, (void)iova;
    memset(dst, 'i', len);
    atomic_store(&io_entered, 1);
    wait_for(&io_may_return);
    return 0;
}

static void io_let_go(void *ctx, uint64_t iova, uint64_t size)
{
    (void)ctx;
    io_asked_iova = iova;
    io_asked_size = size;
    atomic_fetch_add(&io_asked, 1);
}

static const vfu_iommu_io io = {.read = io_read, .let_go = io_let_go};

static int guard(void *ctx, void (*body)(void *arg), void *arg, const void **bad)
{
    (void)ctx, (void)bad;
    body(arg);
    return 0;
}

/* ---- fixture ---------------------------------------------------------------------------------------------------------- */

static vfu_iommu_stuck stuck_last;
static atomic_int stuck_calls, stuck_fails_at; /* 0: never */
static vfu_iommu_pin *stuck_drops;

static int on_stuck(void *ctx, const vfu_iommu_stuck *stuck)
{
    ck_assert_ptr_eq(ctx, memory);
    stuck_last = *stuck;
    int calls = atomic_fetch_add(&stuck_calls, 1) + 1;
    if (stuck_drops)
        vfu_iommu_pin_drop(table, stuck_drops); /* it is called without a lock */
    return calls == atomic_load(&stuck_fails_at) ? -ETIMEDOUT : 0;
}

/* One letter for each page, each of which is a mapping: h host, r and w host with one permission, i callbacks, g guarded,
 * . hole */
static void make_table(const char *layout, uint32_t deadline_ms, bool with_stuck)
{
    vfu_iommu_desc desc = {
        .pin_deadline_ms = deadline_ms, .stuck = with_stuck ? on_stuck : NULL, .ctx = memory, .guard = guard, .max_readers = 4};
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &reader), 0);
    atomic_store(&stuck_calls, 0);
    atomic_store(&stuck_fails_at, 0);
    stuck_drops = NULL;
    for (unsigned i = 0; layout[i]; i++) {
        char c = layout[i];
        vfu_iommu_mapping m = {.iova = page(i),
                               .size = PAGE,
                               .prot = c == 'r'   ? VFU_IOMMU_READ
                                       : c == 'w' ? VFU_IOMMU_WRITE
                                                  : RW};
        m.host = c == 'i' ? NULL : memory[i];
        m.io = c == 'i' ? &io : NULL;
        m.flags = c == 'g' ? VFU_IOMMU_GUARDED : 0;
        if (c != '.')
            ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    }
}

static void end_table(void)
{
    ck_assert_int_eq(vfu_iommu_check(table), 0);
    ck_assert_uint_eq(pins_now(), 0);
    vfu_iommu_reader_close(reader);
    vfu_iommu_destroy(table);
}

/* A pin, and what its holder says when it is asked. */
typedef struct holder {
    vfu_iommu_pin pin;
    vfu_iommu_segment segment[PAGES];
    bool agrees;
    atomic_int asked;
    uint64_t asked_iova, asked_size;
} holder;

static bool let_go(vfu_iommu_pin *pin, uint64_t iova, uint64_t size)
{
    holder *h = pin->user;
    h->asked_iova = iova;
    h->asked_size = size;
    atomic_fetch_add(&h->asked, 1);
    return h->agrees;
}

static int take(holder *h, bool agrees, uint64_t iova, uint64_t len, uint32_t prot)
{
    h->pin.let_go = let_go;
    h->pin.user = h;
    h->agrees = agrees;
    atomic_store(&h->asked, 0);
    return vfu_iommu_pin_take(reader, &h->pin, iova, len, prot, h->segment, PAGES);
}

/* An unmap in a thread of its own. */
typedef struct unmapper {
    pthread_t thread;
    uint64_t iova, size;
    int result;
    atomic_int done;
} unmapper;

static void *unmap_body(void *arg)
{
    unmapper *u = arg;
    u->result = vfu_iommu_unmap(table, u->iova, u->size);
    atomic_store(&u->done, 1);
    return NULL;
}

static void unmap_in_thread(unmapper *u, uint64_t iova, uint64_t size)
{
    *u = (unmapper){.iova = iova, .size = size};
    ck_assert_int_eq(pthread_create(&u->thread, NULL, unmap_body, u), 0);
}

static int result_of(unmapper *u)
{
    pthread_join(u->thread, NULL);
    return u->result;
}

/* ---- taking ----------------------------------------------------------------------------------------------------------- */

static const struct take_case {
    const char *name, *layout;
    uint64_t offset, len;
    uint32_t prot;
    unsigned max;
    int result;
    uint64_t at; /* of the fault */
} take_cases[] = {
    {"one byte", "h", 17, 1, RW, 1, 1, 0},
    {"a whole mapping", "h", 0, PAGE, RW, 1, 1, 0},
    {"over a border", "hh", PAGE - 1, 2, RW, 2, 2, 0},
    {"over four, from the middle to the middle", "hhhh", 100, 3 * PAGE, VFU_IOMMU_READ, 4, 4, 0},
    {"to read what is only readable", "hr", 0, 2 * PAGE, VFU_IOMMU_READ, 4, 2, 0},
    {"to write what is only writable", "hw", 0, 2 * PAGE, VFU_IOMMU_WRITE, 4, 2, 0},
    {"no bytes", "h", 8, 0, RW, 4, -EINVAL, 8},
    {"that wraps", "h", 8, UINT64_MAX, RW, 4, -EINVAL, 8},
    {"no permission", "h", 8, 8, 0, 4, -EINVAL, 8},
    {"of nothing", ".", 8, 8, RW, 4, -ENOENT, 8},
    {"into a hole", "hh.", PAGE, 2 * PAGE, RW, 4, -ENOENT, 2 * PAGE},
    {"over a hole", "h.h", 0, 3 * PAGE, RW, 4, -ENOENT, PAGE},
    {"to write what is only readable", "hhr", 8, 2 * PAGE, VFU_IOMMU_WRITE, 4, -EACCES, 2 * PAGE},
    {"to read what is only writable", "w", 8, 8, RW, 4, -EACCES, 8},
    {"of callbacks", "i", 8, 8, RW, 4, -ENOTSUP, 8},
    {"into callbacks", "hhi", 8, 3 * PAGE - 8, RW, 4, -ENOTSUP, 2 * PAGE},
    {"of guarded memory", "hg", 8, 2 * PAGE - 8, RW, 4, -ENOTSUP, PAGE},
    {"too many segments", "hhhh", 8, 3 * PAGE, RW, 3, -E2BIG, 3 * PAGE},
    {"no segments", "hhhh", 8, 8, RW, 0, -E2BIG, 8},
};

START_TEST(take_table)
{
    const struct take_case *c = &take_cases[_i];
    holder h = {.agrees = false};
    make_table(c->layout, 20, false);
    h.pin.let_go = NULL;
    int got = vfu_iommu_pin_take(reader, &h.pin, BASE + c->offset, c->len, c->prot, h.segment, c->max);
    ck_assert_msg(got == c->result, "pin %s: %d", c->name, got);
    if (got < 0) { /* nothing stays behind */
        ck_assert_uint_eq(vfu_iommu_last_fault(reader)->iova, BASE + c->at);
        ck_assert_int_eq(vfu_iommu_last_fault(reader)->error, c->result);
        ck_assert_uint_eq(vfu_iommu_last_fault(reader)->prot, c->prot);
        ck_assert_uint_eq(pins_now(), 0);
        vfu_iommu_pin_drop(table, &h.pin); /* harmless */
        ck_assert_int_ge(vfu_iommu_unmap_all(table), 0);
        end_table();
        return;
    }
    uint64_t at = c->offset;
    for (int i = 0; i < got; i++) {
        uint64_t len = c->offset + c->len - at < PAGE - at % PAGE ? c->offset + c->len - at : PAGE - at % PAGE;
        ck_assert_uint_eq(h.segment[i].iova, BASE + at);
        ck_assert_ptr_eq(h.segment[i].host, memory[at / PAGE] + at % PAGE);
        ck_assert_uint_eq(h.segment[i].len, len);
        at += len;
    }
    ck_assert_uint_eq(at, c->offset + c->len);
    ck_assert_uint_eq(pins_now(), 1);
    ck_assert_int_eq(vfu_iommu_unmap_all(table), -EBUSY);
    vfu_iommu_pin_drop(table, &h.pin);
    vfu_iommu_pin_drop(table, &h.pin);
    ck_assert_uint_eq(pins_now(), 0);
    ck_assert_int_eq(vfu_iommu_unmap_all(table), (int)strlen(c->layout));
    end_table();
}
END_TEST

START_TEST(the_last_bytes_of_all)
{
    holder h = {.agrees = false};
    make_table("", 20, false);
    vfu_iommu_mapping m = {.iova = (uint64_t)0 - PAGE, .size = PAGE, .prot = RW, .host = memory[0]};
    ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    ck_assert_int_eq(take(&h, false, (uint64_t)0 - 16, 16, RW), 1);
    ck_assert_ptr_eq(h.segment[0].host, memory[0] + PAGE - 16);
    ck_assert_uint_eq(h.segment[0].len, 16);
    ck_assert_int_eq(vfu_iommu_unmap(table, m.iova, m.size), -EBUSY);
    vfu_iommu_pin_drop(table, &h.pin);
    ck_assert_int_eq(vfu_iommu_unmap(table, m.iova, m.size), 1);
    end_table();
}
END_TEST

START_TEST(a_pin_outlives_its_reader)
{
    holder h = {.agrees = false};
    make_table("hh", 20, false);
    ck_assert_int_eq(take(&h, false, page(0), 10, RW), 1);
    vfu_iommu_reader_close(reader);
    ck_assert_int_eq(vfu_iommu_unmap(table, page(0), PAGE), -EBUSY);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &reader), 0);
    vfu_iommu_pin_drop(table, &h.pin);
    ck_assert_int_eq(vfu_iommu_unmap(table, page(0), PAGE), 1);
    end_table();
}
END_TEST

/* ---- waiting ---------------------------------------------------------------------------------------------------------- */

/* Without `stuck` the deadline ends the unmap, and everything is as it was: also the mappings that nobody holds. */
START_TEST(deadline_restores_the_table)
{
    holder h = {.agrees = false};
    char text[8] = "";
    make_table("hhhh", 40, false);
    for (int i = 0; i < 2; i++) { /* and it can be tried again, and the holder is asked again */
        if (!i)
            ck_assert_int_eq(take(&h, false, page(1), 2 * PAGE, RW), 2);
        uint64_t start = now_ms();
        ck_assert_int_eq(vfu_iommu_unmap(table, page(0), 4 * PAGE), -EBUSY);
        ck_assert_uint_ge(now_ms() - start, 39);
        ck_assert_int_eq(atomic_load(&h.asked), i + 1);
        for (unsigned p = 0; p < 4; p++) {
            ck_assert_int_eq(vfu_iommu_write(reader, page(p) + 1, "back", 5), 0);
            ck_assert_int_eq(vfu_iommu_read(reader, page(p) + 1, text, 5), 0);
            ck_assert_str_eq(text, "back");
        }
        ck_assert_int_eq(vfu_iommu_check(table), 0);
    }
    vfu_iommu_pin_drop(table, &h.pin);
    ck_assert_int_eq(vfu_iommu_unmap(table, page(0), 4 * PAGE), 4);
    end_table();
}
END_TEST

/* `stuck` learns which mapping is held and since when, as often as the deadline passes, until it says no. */
START_TEST(stuck_is_told_and_decides)
{
    holder h = {.agrees = false}, other = {.agrees = false};
    make_table("hhhh", 25, true);
    ck_assert_int_eq(take(&h, false, page(2) + 5, 20, VFU_IOMMU_READ), 1);
    ck_assert_int_eq(take(&other, false, page(2) + 9, 20, VFU_IOMMU_READ), 1);
    nanosleep(&(struct timespec){.tv_nsec = 30000000}, NULL);
    atomic_store(&stuck_fails_at, 3);
    uint64_t start = now_ms();
    ck_assert_int_eq(vfu_iommu_unmap(table, page(1), 3 * PAGE), -ETIMEDOUT);
    ck_assert_uint_ge(now_ms() - start, 74);
    ck_assert_int_eq(atomic_load(&stuck_calls), 3);
    ck_assert_uint_eq(stuck_last.mapping.iova, page(2));
    ck_assert_uint_eq(stuck_last.mapping.size, PAGE);
    ck_assert_ptr_eq(stuck_last.mapping.host, memory[2]);
    ck_assert_uint_eq(stuck_last.pins, 2);
    ck_assert_uint_ge(stuck_last.waited_ms, 74);
    ck_assert_uint_ge(stuck_last.held_ms, stuck_last.waited_ms + 29);
    ck_assert_int_eq(atomic_load(&h.asked), 1); /* once, however long it takes */
    ck_assert_int_eq(vfu_iommu_probe(reader, page(1), 3 * PAGE, RW), 0);
    vfu_iommu_pin_drop(table, &h.pin);
    vfu_iommu_pin_drop(table, &other.pin);
    end_table();
}
END_TEST

START_TEST(stuck_may_drop_the_pin)
{
    holder h = {.agrees = false};
    make_table("hh", 10, true);
    ck_assert_int_eq(take(&h, false, page(0), PAGE, RW), 1);
    stuck_drops = &h.pin;
    ck_assert_int_eq(vfu_iommu_unmap(table, page(0), 2 * PAGE), 2);
    ck_assert_int_eq(atomic_load(&stuck_calls), 1);
    end_table();
}
END_TEST

/* A holder that agrees costs nothing: no deadline, no report, and the pin is its holder's again. */
START_TEST(let_go_that_agrees)
{
    holder h = {.agrees = true}, second = {.agrees = true};
    make_table("hhhh", 600000, true);
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(take(&h, true, page(0) + 7, 2 * PAGE, RW), 3);
        ck_assert_int_eq(take(&second, true, page(2), 2 * PAGE, RW), 2);
        ck_assert_uint_eq(pins_now(), 2);
        ck_assert_int_eq(vfu_iommu_unmap(table, page(1), PAGE), 1);
        ck_assert_int_eq(atomic_load(&h.asked), 1);
        ck_assert_uint_le(h.asked_iova, page(1)); /* at least what is needed of it */
        ck_assert_uint_ge(h.asked_iova + h.asked_size, page(2));
        ck_assert_int_eq(atomic_load(&second.asked), 0); /* not in this range */
        ck_assert_uint_eq(pins_now(), 1);
        ck_assert_int_eq(vfu_iommu_unmap_all(table), 3);
        ck_assert_int_eq(atomic_load(&second.asked), 1);
        ck_assert_uint_eq(pins_now(), 0);
        ck_assert_int_eq(atomic_load(&stuck_calls), 0);
        for (unsigned p = 0; p < 4; p++) {
            vfu_iommu_mapping m = {.iova = page(p), .size = PAGE, .prot = RW, .host = memory[p]};
            ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
        }
    }
    end_table();
}
END_TEST

/* Of two holders one agrees and the other needs a moment. */
START_TEST(let_go_that_takes_a_moment)
{
    holder quick = {.agrees = true}, slow = {.agrees = false};
    unmapper u;
    make_table("hh", 600000, true);
    ck_assert_int_eq(take(&quick, true, page(0), 2 * PAGE, RW), 2);
    ck_assert_int_eq(take(&slow, false, page(1), PAGE, RW), 1);
    unmap_in_thread(&u, page(0), 2 * PAGE);
    wait_for(&slow.asked);
    ck_assert_int_eq(atomic_load(&quick.asked), 1);
    ck_assert_int_eq(atomic_load(&u.done), 0);
    memcpy(slow.segment[0].host, "still mine", 10);
    vfu_iommu_pin_drop(table, &slow.pin);
    ck_assert_int_eq(result_of(&u), 2);
    ck_assert_int_eq(atomic_load(&slow.asked), 1);
    end_table();
}
END_TEST

/* ---- while an unmap waits --------------------------------------------------------------------------------------------- */

/* Its own range is closed to everything new; all others go on as if nothing were. */
START_TEST(other_ranges_are_not_delayed)
{
    holder h = {.agrees = false}, late = {.agrees = false}, elsewhere = {.agrees = false};
    unmapper u;
    char text[8];
    vfu_iommu_mapping m = {.iova = page(7), .size = PAGE, .prot = RW, .host = memory[7]};
    vfu_iommu_stats stats;
    make_table("hhhhh..", 600000, true);
    ck_assert_int_eq(take(&h, false, page(1) + 5, 20, RW), 1);
    unmap_in_thread(&u, page(1), 2 * PAGE);
    wait_for(&h.asked);

    ck_assert_int_eq(vfu_iommu_read(reader, page(1), text, 1), -ENOENT);
    ck_assert_int_eq(vfu_iommu_write(reader, page(2), "x", 1), -ENOENT); /* nobody holds this one, but it goes as well */
    ck_assert_int_eq(vfu_iommu_probe(reader, page(0), 2 * PAGE, RW), -ENOENT);
    ck_assert_uint_eq(vfu_iommu_last_fault(reader)->iova, page(1));
    ck_assert_int_eq(take(&late, false, page(1) + 5, 20, RW), -ENOENT);
    ck_assert_int_eq(take(&late, false, page(0), 2 * PAGE, RW), -ENOENT);
    m.iova = page(1);
    ck_assert_int_eq(vfu_iommu_map(table, &m), -EEXIST);

    for (int i = 0; i < 100; i++) {
        m.iova = page(7);
        ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
        ck_assert_int_eq(vfu_iommu_write(reader, page(3), "hello", 6), 0);
        ck_assert_int_eq(vfu_iommu_copy(reader, page(7), page(3), 6), 0);
        ck_assert_int_eq(take(&elsewhere, false, page(3), 2 * PAGE, RW), 2);
        vfu_iommu_pin_drop(table, &elsewhere.pin);
        ck_assert_int_eq(vfu_iommu_unmap(table, page(7), PAGE), 1);
        ck_assert_int_eq(vfu_iommu_unmap(table, page(1) + 1, PAGE), -EINVAL); /* would split */
        ck_assert_int_eq(vfu_iommu_check(table), 0);
    }
    vfu_iommu_get_stats(table, &stats);
    ck_assert_uint_eq(stats.mappings, 5); /* still counted */
    memcpy(h.segment[0].host, "this is mine until I drop it", 20);
    ck_assert_int_eq(atomic_load(&u.done), 0);
    vfu_iommu_pin_drop(table, &h.pin);
    ck_assert_int_eq(result_of(&u), 2);
    ck_assert_int_eq(atomic_load(&stuck_calls), 0);
    m.iova = page(1);
    ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    end_table();
}
END_TEST

/* A second unmap of the same mappings waits for the first, and finds nothing. */
START_TEST(second_unmap_of_the_same_range)
{
    holder h = {.agrees = false};
    unmapper first, second, larger;
    make_table("hhhh", 600000, true);
    ck_assert_int_eq(take(&h, false, page(1), PAGE, RW), 1);
    unmap_in_thread(&first, page(1), PAGE);
    wait_for(&h.asked);
    unmap_in_thread(&second, page(1), PAGE);
    unmap_in_thread(&larger, page(0), 4 * PAGE);
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    ck_assert_int_eq(atomic_load(&first.done) + atomic_load(&second.done) + atomic_load(&larger.done), 0);
    vfu_iommu_pin_drop(table, &h.pin);
    ck_assert_int_eq(result_of(&first), 1);
    ck_assert_int_eq(result_of(&second), 0);
    ck_assert_int_eq(result_of(&larger), 3);
    end_table();
}
END_TEST

/* When the first one gives up, the second has its turn. */
START_TEST(second_unmap_after_the_first_failed)
{
    holder h = {.agrees = false};
    unmapper first, second;
    make_table("hh", 50, true);
    atomic_store(&stuck_fails_at, 1);
    ck_assert_int_eq(take(&h, false, page(1), PAGE, RW), 1);
    unmap_in_thread(&first, page(0), 2 * PAGE);
    wait_for(&h.asked);
    unmap_in_thread(&second, page(1), PAGE);
    ck_assert_int_eq(result_of(&first), -ETIMEDOUT);
    ck_assert_int_eq(atomic_load(&second.done), 0); /* its own deadline doesn't end it: stuck said no only once */
    vfu_iommu_pin_drop(table, &h.pin);
    ck_assert_int_eq(result_of(&second), 1);
    ck_assert_int_eq(vfu_iommu_probe(reader, page(0), PAGE, RW), 0);
    end_table();
}
END_TEST

/* A callback under way holds its mapping, is asked to return, and is reported like a pin. */
static void *read_through_callback(void *arg)
{
    vfu_iommu_reader *own;
    char bytes[16];
    ck_assert_int_eq(vfu_iommu_reader_open(table, &own), 0);
    *(int *)arg = vfu_iommu_read(own, page(1) + 4, bytes, 16);
    vfu_iommu_reader_close(own);
    return NULL;
}

START_TEST(callback_under_way)
{
    pthread_t thread;
    unmapper u;
    int result = 1;
    make_table("hih", 20, true);
    atomic_store(&io_entered, 0);
    atomic_store(&io_may_return, 0);
    atomic_store(&io_asked, 0);
    ck_assert_int_eq(pthread_create(&thread, NULL, read_through_callback, &result), 0);
    wait_for(&io_entered);
    ck_assert_int_eq(vfu_iommu_unmap(table, page(0), PAGE), 1); /* another range */
    unmap_in_thread(&u, page(1), 2 * PAGE);
    wait_for(&stuck_calls);
    ck_assert_int_eq(atomic_load(&u.done), 0);
    ck_assert_int_eq(atomic_load(&io_asked), 1);
    ck_assert_uint_eq(io_asked_iova, page(1));
    ck_assert_uint_eq(io_asked_size, PAGE);
    atomic_store(&io_may_return, 1);
    ck_assert_int_eq(result_of(&u), 2);
    pthread_join(thread, NULL);
    ck_assert_int_eq(result, 0); /* it had begun before, and was let finish */
    ck_assert_uint_eq(stuck_last.mapping.iova, page(1));
    ck_assert_ptr_eq(stuck_last.mapping.io, &io);
    ck_assert_uint_eq(stuck_last.pins, 1);
    ck_assert_uint_ge(stuck_last.waited_ms, 19);
    ck_assert_uint_eq(stuck_last.held_ms, 0);
    end_table();
}
END_TEST

START_TEST(callback_beyond_the_deadline)
{
    pthread_t thread;
    int result = 1;
    make_table("hih", 20, false);
    atomic_store(&io_entered, 0);
    atomic_store(&io_may_return, 0);
    ck_assert_int_eq(pthread_create(&thread, NULL, read_through_callback, &result), 0);
    wait_for(&io_entered);
    ck_assert_int_eq(vfu_iommu_unmap_all(table), -EBUSY);
    ck_assert_int_eq(vfu_iommu_probe(reader, page(0), 3 * PAGE, RW), 0);
    atomic_store(&io_may_return, 1);
    pthread_join(thread, NULL);
    ck_assert_int_eq(result, 0);
    ck_assert_int_eq(vfu_iommu_unmap_all(table), 3);
    end_table();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("iommu pin");
    TCase *tc = tcase_create("pin");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, take_table, 0, sizeof(take_cases) / sizeof(take_cases[0]));
    tcase_add_test(tc, the_last_bytes_of_all);
    tcase_add_test(tc, a_pin_outlives_its_reader);
    tcase_add_test(tc, deadline_restores_the_table);
    tcase_add_test(tc, stuck_is_told_and_decides);
    tcase_add_test(tc, stuck_may_drop_the_pin);
    tcase_add_test(tc, let_go_that_agrees);
    tcase_add_test(tc, let_go_that_takes_a_moment);
    tcase_add_test(tc, other_ranges_are_not_delayed);
    tcase_add_test(tc, second_unmap_of_the_same_range);
    tcase_add_test(tc, second_unmap_after_the_first_failed);
    tcase_add_test(tc, callback_under_way);
    tcase_add_test(tc, callback_beyond_the_deadline);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
