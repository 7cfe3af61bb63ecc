/* SPDX-License-Identifier: MIT */
/*
 * dma_client - drives the DMA engine and checks every byte that it moves
 *
 *     cc -std=c11 -O2 -I. examples/dma_client.c -o dma_client -pthread
 *     ./dma_client --socket-path=/tmp/engine.sock
 *
 * It shows a client: it connects, looks at the device, shares memory, runs commands through the device's registers, takes an
 * interrupt, and takes memory away again. Status 0 only if all of it went as it should.
 */
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include <getopt.h>
#include <sys/syscall.h>

enum { PAGE = 4096, MEMORY = 1 << 20, BUSY = 1, DONE = 2, FAILED = 3 };
enum { COPY = 1, FILL = 2, SUM = 3, TO_RAM = 4, FROM_RAM = 5 };
enum {
    REG_MAGIC = 0x00,
    REG_SRC = 0x08,
    REG_DST = 0x10,
    REG_LEN = 0x18,
    REG_PATTERN = 0x20,
    REG_REPEAT = 0x28,
    REG_NOTIFY = 0x2c
};
enum { REG_COMMAND = 0x30, REG_STATUS = 0x34, REG_ERROR = 0x38, REG_FAULT = 0x40, REG_RESULT = 0x48, REG_COMPLETED = 0x50 };

/* The client's memory, as the device sees it. The file has pages 0 to 255; these are in no other place. */
#define RW_AT      UINT64_C(0x100000)           /* 64 pages, file pages 0 to 63, readable and writable */
#define NEXT_AT    UINT64_C(0x140000)           /* 64 more behind them, from another place in the file: pages 128 to 191 */
#define RO_AT      UINT64_C(0x800000)           /* 16 pages, 200 to 215, readable */
#define TOP_AT     UINT64_C(0xfffffffffffff000) /* the last page of the address space: page 220 */
#define NOWHERE_AT UINT64_C(0x40000000)

typedef struct session {
    vfu_client *client;
    uint8_t *memory, *before; /* MEMORY bytes: the file, and what was in it before a command */
    int fd;
    int failures;
    unsigned checks;
} session;

/* ---- telling ------------------------------------------------------------------------------------------------------------ */

static void title(const char *text) { printf("\n%s\n", text); }

static void report(session *s, bool good, const char *format, ...) __attribute__((format(printf, 3, 4)));

static void report(session *s, bool good, const char *format, ...)
{
    va_list arguments;
    s->checks++;
    s->failures += !good;
    printf("  %s  ", good ? "ok  " : "FAIL");
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
}

/* Ends the program when something doesn't work that everything else needs. */
static void need(int err, const char *what)
{
    if (err >= 0)
        return;
    fprintf(stderr, "dma_client: %s: %s\n", what, strerror(-err));
    exit(1);
}

/* ---- registers ---------------------------------------------------------------------------------------------------------- */

static uint64_t get(session *s, uint64_t offset, size_t width)
{
    uint32_t value32 = 0;
    uint64_t value64 = 0;
    need(vfu_client_region_read(s->client, VFU_PCI_REGION_BAR0, offset, width == 4 ? (void *)&value32 : (void *)&value64, width),
         "reading a register");
    return width == 4 ? value32 : value64;
}

static void set32(session *s, uint64_t offset, uint32_t value)
{
    need(vfu_client_region_write(s->client, VFU_PCI_REGION_BAR0, offset, &value, 4), "writing a register");
}

static void set64(session *s, uint64_t offset, uint64_t value)
{
    need(vfu_client_region_write(s->client, VFU_PCI_REGION_BAR0, offset, &value, 8), "writing a register");
}

/* Runs a command to its end and returns its errno. The device's DMA messages, if it sends any, are served while its status
 * is read. */
static int run(session *s, uint32_t command, uint64_t dst, uint64_t src, uint64_t len)
{
    set64(s, REG_SRC, src);
    set64(s, REG_DST, dst);
    set64(s, REG_LEN, len);
    set32(s, REG_COMMAND, command);
    while (get(s, REG_STATUS, 4) == BUSY) {
    }
    return (int)get(s, REG_ERROR, 4);
}

/* ---- memory ------------------------------------------------------------------------------------------------------------- */

static void map(session *s, uint64_t iova, unsigned page, unsigned pages, uint32_t prot)
{
    need(vfu_client_dma_map(s->client, iova, (uint64_t)pages * PAGE, prot, s->memory + (size_t)page * PAGE, s->fd,
                            (uint64_t)page * PAGE),
         "DMA_MAP");
}

/* Where an address of RW_AT or NEXT_AT is in the file. */
static size_t at(uint64_t iova) { return (size_t)(iova < NEXT_AT ? iova - RW_AT : iova - NEXT_AT + 128 * PAGE); }

static void scramble(session *s)
{
    static uint64_t x = 88172645463325252u;
    for (size_t i = 0; i < MEMORY; i += 8) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        memcpy(s->memory + i, &x, 8);
    }
    memcpy(s->before, s->memory, MEMORY);
}

/* Is every byte of the file as `before` says? */
static bool untouched(session *s) { return memcmp(s->before, s->memory, MEMORY) == 0; }

/* ---- what it looks like ------------------------------------------------------------------------------------------------- */

static void look(session *s)
{
    static const char *const names[] = {"BAR0", "BAR1", "BAR2", "BAR3", "BAR4", "BAR5", "ROM", "configuration", "VGA"};
    static const char *const irqs[] = {"INTx", "MSI", "MSI-X", "ERR", "REQ"};
    vfu_wire_device_info info;
    uint8_t config[64];
    title("The device");
    need(vfu_client_info(s->client, &info), "GET_INFO");
    need(vfu_client_region_read(s->client, VFU_PCI_REGION_CONFIG, 0, config, sizeof(config)), "reading the configuration space");
    printf("  %02x%02x:%02x%02x, class %02x%02x%02x, revision %u\n", config[1], config[0], config[3], config[2], config[11],
           config[10], config[9], config[8]);
    for (uint32_t i = 0; i < info.num_regions && i < 9; i++) {
        vfu_client_region region;
        need(vfu_client_region_info(s->client, i, &region), "GET_REGION_INFO");
        if (region.size)
            printf("  %-14s %6llu bytes%s\n", names[i], (unsigned long long)region.size,
                   region.fd >= 0 ? ", a part can be mapped" : "");
        if (region.fd >= 0)
            close(region.fd);
    }
    for (uint32_t i = 0; i < info.num_irqs && i < 5; i++) {
        vfu_wire_irq_info irq;
        need(vfu_client_irq_info(s->client, i, &irq), "GET_IRQ_INFO");
        if (irq.count)
            printf("  %-14s %6u interrupt%s\n", irqs[i], irq.count, irq.count > 1 ? "s" : "");
    }
    report(s, config[0] == 0x34 && config[1] == 0x12 && config[2] == 0xa1 && config[3] == 0xd3,
           "vendor and device are the engine's");
    report(s, get(s, REG_MAGIC, 4) == 0x31414D44, "MAGIC reads DMA1");
}

/* Device RAM, by message and through the mapping, is the same memory. */
static void look_at_ram(session *s)
{
    vfu_client_region region;
    char text[16] = {0};
    need(vfu_client_region_info(s->client, VFU_PCI_REGION_BAR2, &region), "GET_REGION_INFO");
    report(s, region.fd >= 0 && region.area_count == 1, "device RAM can be mapped from 0x%llx on",
           (unsigned long long)region.areas[0].offset);
    if (region.fd < 0)
        return;
    char *ram = mmap(NULL, (size_t)region.areas[0].size, PROT_READ | PROT_WRITE, MAP_SHARED, region.fd,
                     (off_t)(region.offset + region.areas[0].offset));
    need(ram == MAP_FAILED ? -errno : 0, "mapping device RAM");
    strcpy(ram, "by store");
    need(vfu_client_region_read(s->client, VFU_PCI_REGION_BAR2, region.areas[0].offset, text, 9), "reading device RAM");
    report(s, strcmp(text, "by store") == 0, "what a store wrote, a message reads");
    munmap(ram, (size_t)region.areas[0].size);
    close(region.fd);
}

/* ---- what it can do ----------------------------------------------------------------------------------------------------- */

static void try_copy(session *s, const char *what, uint64_t dst, uint64_t src, uint64_t len)
{
    scramble(s);
    int error = run(s, COPY, dst, src, len);
    uint8_t *source = malloc((size_t)len); /* all of the source first: as memmove */
    need(source ? 0 : -ENOMEM, "memory");
    for (uint64_t i = 0; i < len; i++)
        source[i] = s->before[at(src + i)];
    for (uint64_t i = 0; i < len; i++)
        s->before[at(dst + i)] = source[i];
    free(source);
    report(s, !error && untouched(s), "COPY  %7llu bytes, %s", (unsigned long long)len, what);
}

static void commands(session *s)
{
    title("Commands");
    try_copy(s, "within one mapping", RW_AT + 0x20000, RW_AT + 0x123, 5000);
    try_copy(s, "one byte", RW_AT + 7, RW_AT + 0x1ffff, 1);
    try_copy(s, "overlapping, upwards", RW_AT + 0x1003, RW_AT + 0x1000, 0x18000);
    try_copy(s, "overlapping, downwards", RW_AT + 0x1000, RW_AT + 0x1003, 0x18000);
    try_copy(s, "from two mappings into one", RW_AT + 0x10, NEXT_AT - 0x2345, 0x8000);
    try_copy(s, "across the border of both", NEXT_AT - 0x100, NEXT_AT - 0x20100, 0x20200);

    static const uint8_t pattern[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    uint64_t pattern64;
    memcpy(&pattern64, pattern, 8);
    scramble(s);
    set64(s, REG_PATTERN, pattern64);
    int error = run(s, FILL, NEXT_AT - 0x801, 0, 0x1002);
    for (uint64_t i = 0; i < 0x1002; i++)
        s->before[at(NEXT_AT - 0x801 + i)] = pattern[i % 8];
    report(s, !error && untouched(s), "FILL  %7u bytes, over two mappings", 0x1002);

    scramble(s);
    uint64_t sum = 0;
    for (uint64_t i = 0; i < 0x60000; i++)
        sum += s->memory[at(RW_AT + 0x10000 + i)];
    error = run(s, SUM, 0, RW_AT + 0x10000, 0x60000);
    report(s, !error && get(s, REG_RESULT, 8) == sum && untouched(s), "SUM   %7u bytes: %llu", 0x60000, (unsigned long long)sum);

    scramble(s);
    error = run(s, TO_RAM, 0x800, RW_AT + 0x3001, 0x9000);
    error = error ? error : run(s, FROM_RAM, NEXT_AT + 0x5, 0x800, 0x9000);
    memmove(s->before + at(NEXT_AT + 5), s->before + at(RW_AT + 0x3001), 0x9000);
    report(s, !error && untouched(s), "TO_RAM and FROM_RAM, %u bytes there and back", 0x9000);

    scramble(s);
    memcpy(s->memory + 220 * PAGE + PAGE - 4, "last", 4);
    memcpy(s->before + 220 * PAGE + PAGE - 4, "last", 4);
    error = run(s, COPY, RW_AT, TOP_AT + PAGE - 4, 4);
    memcpy(s->before, "last", 4);
    report(s, !error && untouched(s), "COPY of the last four bytes below 2^64");

    uint64_t completed = get(s, REG_COMPLETED, 8);
    set32(s, REG_REPEAT, 1000);
    error = run(s, COPY, RW_AT, RW_AT + PAGE, 64);
    set32(s, REG_REPEAT, 0);
    report(s, !error && get(s, REG_COMPLETED, 8) == completed + 1000, "a command repeated a thousand times");
}

/* ---- what it must not do ------------------------------------------------------------------------------------------------ */

static void try_refused(session *s, const char *what, uint32_t command, uint64_t dst, uint64_t src, uint64_t len, int error,
                        uint64_t fault)
{
    scramble(s);
    int got = run(s, command, dst, src, len);
    uint64_t where = get(s, REG_FAULT, 8);
    report(s, got == error && where == fault && get(s, REG_STATUS, 4) == FAILED && untouched(s), "%-46s %s at 0x%llx", what,
           vfu_errno_name(got), (unsigned long long)where);
}

static void refusals(session *s)
{
    title("Refusals: the errno, where, and not a byte changed");
    try_refused(s, "memory that was never mapped", COPY, RW_AT, NOWHERE_AT, 16, ENOENT, NOWHERE_AT);
    try_refused(s, "the byte behind the last mapping", FILL, NEXT_AT + 0x3fff0, 0, 17, ENOENT, NEXT_AT + 0x40000);
    try_refused(s, "the byte before the first mapping", SUM, 0, RW_AT - 1, 2, ENOENT, RW_AT - 1);
    try_refused(s, "writing to read-only memory", COPY, RO_AT + 0x10, RW_AT, 32, EACCES, RO_AT + 0x10);
    try_refused(s, "a range that wraps past 2^64", COPY, RW_AT, TOP_AT + PAGE - 4, 8, EINVAL, 0);
    try_refused(s, "no bytes", COPY, RW_AT, RW_AT, 0, EINVAL, 0);
    try_refused(s, "no such command", 77, RW_AT, RW_AT, 8, EINVAL, 0);
    scramble(s);
    int error = run(s, COPY, RW_AT, RO_AT + 3, 100);
    memcpy(s->before, s->before + 200 * PAGE + 3, 100);
    report(s, !error && untouched(s), "but reading read-only memory works");

    title("Revocation");
    need(vfu_client_dma_unmap(s->client, NEXT_AT, 64 * PAGE), "DMA_UNMAP");
    try_refused(s, "memory that was unmapped", COPY, RW_AT, NEXT_AT, 16, ENOENT, NEXT_AT);
    try_refused(s, "a range that runs into it", FILL, NEXT_AT - 1, 0, 2, ENOENT, NEXT_AT);
    int err = vfu_client_dma_unmap(s->client, RW_AT, PAGE);
    report(s, err == -EINVAL, "an unmap that would split a mapping is refused: %s", vfu_errno_name(err));
    err = vfu_client_dma_unmap(s->client, NOWHERE_AT, 1 << 20);
    report(s, err >= 0, "an unmap of nothing succeeds");
    map(s, NEXT_AT, 128, 64, VFU_IOMMU_READ | VFU_IOMMU_WRITE);
    try_copy(s, "after mapping it again", RW_AT, NEXT_AT + 1, 4096);
}

/* ---- interrupts --------------------------------------------------------------------------------------------------------- */

/* Finds a capability in the configuration space. */
static uint8_t find_capability(session *s, uint8_t id)
{
    uint8_t entry[2], where;
    need(vfu_client_region_read(s->client, VFU_PCI_REGION_CONFIG, 0x34, &where, 1), "reading the configuration space");
    for (unsigned steps = 0; where && steps < 48; steps++, where = entry[1]) {
        need(vfu_client_region_read(s->client, VFU_PCI_REGION_CONFIG, where, entry, 2), "reading the configuration space");
        if (entry[0] == id)
            return where;
    }
    return 0;
}

static bool signalled(session *s, int fd, int timeout_ms)
{
    uint64_t count;
    return vfu_client_serve(s->client, fd, timeout_ms) == 1 && read(fd, &count, sizeof(count)) == sizeof(count) && count == 1;
}

static void interrupts(session *s)
{
    int fds[4], intx = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    title("Interrupts");
    for (unsigned i = 0; i < 4; i++)
        fds[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    need(vfu_client_irq_assign(s->client, VFU_PCI_IRQ_INTX, 0, 1, &intx), "SET_IRQS");
    set32(s, REG_NOTIFY, 1);
    run(s, COPY, RW_AT, RW_AT + PAGE, 64);
    report(s, signalled(s, intx, 2000), "INTx: the eventfd is signalled");

    uint8_t msix = find_capability(s, 0x11);
    uint16_t enable = 0x8000 | 3;
    need(vfu_client_irq_assign(s->client, VFU_PCI_IRQ_MSIX, 0, 4, fds), "SET_IRQS");
    need(vfu_client_region_write(s->client, VFU_PCI_REGION_CONFIG, msix + 2u, &enable, 2), "enabling MSI-X");
    for (uint32_t vector = 0; vector < 4; vector++) {
        set32(s, REG_NOTIFY, 1 + vector);
        run(s, COPY, RW_AT, RW_AT + PAGE, 64);
        bool mine = signalled(s, fds[vector], 2000), others = false;
        for (unsigned i = 0; i < 4; i++)
            others = others || signalled(s, fds[i], 0);
        report(s, mine && !others, "MSI-X vector %u: its eventfd is signalled, and no other", vector);
    }
    set32(s, REG_NOTIFY, 1);
    run(s, COPY, RW_AT, NOWHERE_AT, 64);
    report(s, signalled(s, fds[0], 2000), "a command that fails interrupts as well");
    need(vfu_client_irq_assign(s->client, VFU_PCI_IRQ_MSIX, 0, 1, NULL), "SET_IRQS");
    run(s, COPY, RW_AT, RW_AT + PAGE, 64);
    report(s, !signalled(s, fds[0], 0), "a vector that was de-assigned stays silent");
    for (unsigned i = 0; i < 4; i++)
        close(fds[i]);
    close(intx);
}

static void reset(session *s)
{
    uint8_t ram[16] = {1};
    title("Reset");
    need(vfu_client_reset(s->client), "DEVICE_RESET");
    need(vfu_client_region_read(s->client, VFU_PCI_REGION_BAR2, 0x800, ram, sizeof(ram)), "reading device RAM");
    static const uint8_t zero[16];
    report(s, get(s, REG_LEN, 8) == 0 && get(s, REG_COMPLETED, 8) == 0 && !memcmp(ram, zero, 16),
           "registers and device RAM are zero");
    try_copy(s, "the mappings are still there", RW_AT + 0x20000, RW_AT, 4096);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"socket-path", required_argument, NULL, 's'}, {0}};
    static session s;
    const char *path = NULL;
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) == 's')
        path = optarg;
    if (option != -1 || optind != argc || !path) {
        fprintf(stderr, "usage: %s --socket-path=PATH\nexample: %s --socket-path=/tmp/engine.sock\n", argv[0], argv[0]);
        return 2;
    }
    s.fd = (int)syscall(SYS_memfd_create, "dma_client", 3u); /* MFD_CLOEXEC | MFD_ALLOW_SEALING */
    need(s.fd < 0 || ftruncate(s.fd, MEMORY) < 0 ? -errno : 0, "making shared memory");
    need(fcntl(s.fd, F_ADD_SEALS, F_SEAL_SHRINK) < 0 ? -errno : 0, "sealing it");
    s.memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, s.fd, 0);
    s.before = malloc(MEMORY);
    need(s.memory == MAP_FAILED || !s.before ? -ENOMEM : 0, "mapping it");
    need(vfu_client_connect(&s.client, path, NULL), path);

    look(&s);
    look_at_ram(&s);
    map(&s, RW_AT, 0, 64, VFU_IOMMU_READ | VFU_IOMMU_WRITE);
    map(&s, NEXT_AT, 128, 64, VFU_IOMMU_READ | VFU_IOMMU_WRITE);
    map(&s, RO_AT, 200, 16, VFU_IOMMU_READ);
    map(&s, TOP_AT, 220, 1, VFU_IOMMU_READ | VFU_IOMMU_WRITE);
    commands(&s);
    refusals(&s);
    interrupts(&s);
    reset(&s);

    printf("\n%u checks, %d failed\n", s.checks, s.failures);
    vfu_client_destroy(s.client);
    munmap(s.memory, MEMORY);
    close(s.fd);
    free(s.before);
    return s.failures ? 1 : 0;
}
