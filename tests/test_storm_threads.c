/* SPDX-License-Identifier: MIT */
/*
 * ==== device ==== everything at once
 *
 * Threads that translate, raise interrupts and complete requests, all the time, while a client maps, unmaps, assigns
 * interrupts, asks, leaves in the midst of it, and comes again. Meant for ThreadSanitizer, and for helgrind.
 */
#include "util.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum {
    SEALED_AT = 0x100000,
    OPEN_AT = 0x200000,
    MESSAGE_AT = 0x300000,
    WINDOW = 16 * PAGE,
    TRANSLATORS = 2,
    VECTORS = 4,
    BAR = 4096
};
enum { PART = WINDOW / TRANSLATORS };
enum { LATE = 8 /* reads from here on are answered later */ };

static vfu_dev *dev;
static atomic_bool ending;
static _Atomic uint64_t ticket, wanted; /* of the request that waits; its length */
static atomic_uint completed, void_tickets, reached, missed, raised;

static int read_late(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    (void)ctx, (void)region;
    memset(buf, 0x42, len);
    if (offset < LATE)
        return 0;
    atomic_store(&wanted, len);
    atomic_store(&ticket, vfu_dev_ticket(dev));
    return VFU_PENDING;
}

static int write_ignored(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    (void)ctx, (void)region, (void)offset, (void)buf, (void)len;
    return 0;
}

static void *serve(void *arg)
{
    (void)arg;
    vfu_dev_run(dev);
    return NULL;
}

static void *complete(void *arg)
{
    static const uint8_t data[BAR] = {0x42};
    (void)arg;
    while (!atomic_load(&ending)) {
        uint64_t mine = atomic_exchange(&ticket, 0);
        if (!mine)
            sched_yield();
        else if (vfu_dev_complete(dev, mine, 0, data, (size_t)atomic_load(&wanted)) == 0)
            atomic_fetch_add(&completed, 1);
        else
            atomic_fetch_add(&void_tickets, 1); /* that client has gone */
    }
    return NULL;
}

static void *raise_all(void *arg)
{
    (void)arg;
    for (uint32_t i = 0; !atomic_load(&ending); i++) {
        if (vfu_dev_raise(dev, VFU_PCI_IRQ_MSIX, i % VECTORS) == 0)
            atomic_fetch_add(&raised, 1);
        if (i % 16 == 0)
            sched_yield();
    }
    return NULL;
}

static void *translate(void *arg)
{
    static const uint64_t places[] = {SEALED_AT, OPEN_AT, MESSAGE_AT};
    uint8_t buf[2 * PAGE];
    chance c = seeded((uint64_t)(uintptr_t)arg);
    vfu_iommu_reader *reader;
    if (vfu_iommu_reader_open(vfu_dev_iommu(dev), &reader))
        abort();
    memset(buf, 0x42, sizeof(buf));
    while (!atomic_load(&ending)) {
        /* Each has a part of its own: what two of them do to the same bytes is a device's own affair. */
        uint32_t len = below(&c, sizeof(buf)), how = below(&c, 4), mine = ((uint32_t)(uintptr_t)arg - 1) * PART;
        uint64_t at = places[below(&c, COUNT(places))] + mine + below(&c, PART - len);
        uint64_t other = places[below(&c, COUNT(places))] + mine + below(&c, PART - len);
        int err = how == 0   ? vfu_iommu_read(reader, at, buf, len)
                  : how == 1 ? vfu_iommu_write(reader, at, buf, len)
                  : how == 2 ? vfu_iommu_copy(reader, at, other, len)
                             : vfu_iommu_fill(reader, at, len, "\x42", 1);
        if (err != 0 && err != -ENOENT && err != -ENOTCONN && err != -EIO && err != -ECANCELED)
            abort();
        atomic_fetch_add(err ? &missed : &reached, 1);
        if (err)
            sched_yield();
    }
    vfu_iommu_reader_close(reader);
    return NULL;
}

/* One client, up to a random moment. */
static void visit(chance *c, const struct sockaddr_un *address, socklen_t len, uint8_t *memory, int sealed, int shrinkable,
                  const int *events)
{
    vfu_client *client;
    vfu_client_desc desc = {.timeout_ms = PATIENCE_MS,
                            .max_data_xfer_size = 65536,
                            .max_dma_maps = 16,
                            .logger = {.write = ignore_log}};
    uint8_t bytes[64];
    unsigned last = below(c, 12);
    ck_assert_int_eq(vfu_client_attach(&client, connect_to(address, len), &desc), 0);
    ck_assert_int_eq(vfu_client_dma_map(client, SEALED_AT, WINDOW, 3, memory, sealed, 0), 0);
    ck_assert_int_eq(vfu_client_dma_map(client, OPEN_AT, WINDOW, 3, memory, shrinkable, 0), 0);
    ck_assert_int_eq(vfu_client_dma_map(client, MESSAGE_AT, WINDOW, 3, memory, -1, 0), 0);
    ck_assert_int_eq(vfu_client_irq_assign(client, VFU_PCI_IRQ_MSIX, 0, VECTORS, events), 0);
    for (unsigned i = 0; i < last; i++) {
        ck_assert_int_eq(vfu_client_region_read(client, 0, below(c, 2) ? LATE : 0, bytes, sizeof(bytes)), 0);
        ck_assert_uint_eq(bytes[0], 0x42);
        ck_assert_int_eq(vfu_client_dma_unmap(client, MESSAGE_AT, WINDOW), 1);
        ck_assert_int_eq(vfu_client_irq_assign(client, VFU_PCI_IRQ_MSIX, i % VECTORS, 1, NULL), 0);
        ck_assert_int_eq(vfu_client_dma_map(client, MESSAGE_AT, WINDOW, 3, memory, -1, 0), 0);
        ck_assert_int_eq(vfu_client_irq_assign(client, VFU_PCI_IRQ_MSIX, i % VECTORS, 1, events + i % VECTORS), 0);
        if (i % 4 == 0)
            ck_assert_int_eq(vfu_client_reset(client), 0);
    }
    if (below(c, 2)) { /* leaves while its request waits for its answer */
        uint8_t request[32];
        vfu_wire_header header = {.id = 9, .cmd = VFU_CMD_REGION_READ, .size = sizeof(request)};
        vfu_wire_region_access access = {.offset = LATE, .count = 16};
        memcpy(request, &header, 16);
        memcpy(request + 16, &access, 16);
        send_some(vfu_client_fd(client), request, sizeof(request), NULL, 0);
    }
    vfu_client_destroy(client);
}

START_TEST(everything_at_once)
{
    struct sockaddr_un address;
    socklen_t len;
    pthread_t threads[TRANSLATORS + 3];
    static uint8_t memory[WINDOW];
    int sealed = memfd("storm", WINDOW, F_SEAL_SHRINK), shrinkable = memfd("storm", WINDOW, 0), events[VECTORS];
    unsigned open = 0, visits = getenv("VFU_STORM") ? (unsigned)atoi(getenv("VFU_STORM")) : 100, count = 0;
    chance c = seeded(9);
    vfu_dev_desc desc = {
        .pci = {.vendor = 1,
                .bar = {{.size = BAR}, {0}, {.size = 4096}},
                .msix = {.vectors = VECTORS, .table_bar = 2, .pba_bar = 2, .pba_offset = 0x800}},
        .callbacks = {.region_read = read_late, .region_write = write_ignored},
        .max_data_xfer_size = 65536,
        .max_dma_maps = 16,
        .logger = {.write = ignore_log},
    };
    for (unsigned i = 0; i < VECTORS; i++)
        events[i] = event();
    open = fds_open();
    ck_assert_int_eq(vfu_dev_create(&dev, &desc), 0);
    ck_assert_int_eq(vfu_dev_attach(dev, listener(&address, &len)), 0);
    ck_assert_int_eq(pthread_create(&threads[count++], NULL, serve, NULL), 0);
    ck_assert_int_eq(pthread_create(&threads[count++], NULL, complete, NULL), 0);
    ck_assert_int_eq(pthread_create(&threads[count++], NULL, raise_all, NULL), 0);
    for (uintptr_t i = 1; i <= TRANSLATORS; i++)
        ck_assert_int_eq(pthread_create(&threads[count++], NULL, translate, (void *)i), 0);
    for (unsigned i = 0; i < visits; i++)
        visit(&c, &address, len, memory, sealed, shrinkable, events);
    atomic_store(&ending, true);
    for (unsigned i = 1; i < count; i++)
        ck_assert_int_eq(pthread_join(threads[i], NULL), 0);
    vfu_dev_stop(dev);
    ck_assert_int_eq(pthread_join(threads[0], NULL), 0);
    ck_assert_uint_gt(atomic_load(&completed), 0);
    ck_assert_uint_gt(atomic_load(&raised), 0);
    ck_assert_uint_gt(atomic_load(&reached), 0);
    ck_assert_uint_gt(atomic_load(&missed), 0);
    vfu_dev_destroy(dev);
    ck_assert_uint_eq(fds_open(), open);
    close_fds(events, VECTORS);
    close(sealed);
    close(shrinkable);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("storm");
    TCase *tc = tcase_create("storm");
    tcase_add_test(tc, everything_at_once);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
