/* SPDX-License-Identifier: MIT */
/*
 * The program that check-qemu runs inside a guest: it finds the DMA engine or the serial port on the guest's PCI bus, drives it
 * and checks every byte.
 *
 *     guest plain            no IOMMU in the guest: identity, capabilities, registers, device RAM, DMA by physical address, reset
 *     guest vfio             the guest has an IOMMU: the device is taken through VFIO (vfio-pci, type1v2) as a user-space driver
 *                            would do it
 *     guest vfio-messages    the same where the engine's DMA travels as messages
 *     guest serial           the serial port, through the kernel's own driver
 *     guest stamp SEED SIZE  run by the host: the bytes of stamp() to standard output
 *
 * What it says goes to standard output, a serial line whose other end is run.sh:
 *
 *     ok TEXT, FAIL TEXT      a check
 *     # TEXT                  for the reader
 *     BOOT                    the first line; the host answers `all`, or `busy`: map memory and have the engine copy without end
 *     BUSY                    that is done; when the host answers, the guest restarts without tidying up
 *     PHASE NAME              then, what the engine's table of mappings should be at this moment:
 *     EXPECT FIRST LAST PROT  a range that is mapped, and nothing else is
 *     COVER FIRST LAST PROT   a range that is mapped, whatever else is
 *     WAIT                    the host compares, and answers with a line on standard input
 *     SAY TEXT                the host sends the line TEXT to the serial port
 *     HEAR TEXT               the host expects the line TEXT from the serial port
 *     FEED SEED SIZE          the host sends the bytes of stamp() to the serial port
 *     TAKE SEED SIZE          the host expects the bytes of stamp() from the serial port
 *     TAKEN                   the host says whether they came, and answers with a line
 *     GUEST PASS N            the end: N checks held, or GUEST FAIL
 *
 * Exit status: 0 after GUEST PASS, 1 after GUEST FAIL.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include <linux/serial.h>
#include <linux/vfio.h>

#include "guest.h"

enum {
    PAGE = 4096,
    MIB = 1 << 20,
    BAR0_SIZE = 0x1000,
    BAR2_SIZE = 0x10000,
    BAR4_SIZE = 0x1000,
    VECTORS = 4
};

/* BAR0 of the engine */
enum {
    R_MAGIC = 0x00,
    R_VERSION = 0x04,
    R_SRC = 0x08,
    R_DST = 0x10,
    R_LEN = 0x18,
    R_PATTERN = 0x20,
    R_REPEAT = 0x28,
    R_NOTIFY = 0x2C,
    R_COMMAND = 0x30,
    R_STATUS = 0x34,
    R_ERROR = 0x38,
    R_FAULT = 0x40,
    R_RESULT = 0x48,
    R_COMPLETED = 0x50
};

enum { CMD_COPY = 1, CMD_FILL, CMD_SUM, CMD_TO_RAM, CMD_FROM_RAM };
enum { ST_IDLE, ST_BUSY, ST_DONE, ST_FAILED };

#define MAGIC 0x31414D44u

/* PCI configuration space */
enum {
    PCI_COMMAND_REG = 0x04,
    PCI_STATUS_REG = 0x06,
    PCI_PIN_REG = 0x3D,
    COMMAND_MEMORY = 0x2,
    COMMAND_MASTER = 0x4,
    STATUS_INTX = 0x8,
    CAP_PM = 0x01,
    CAP_VENDOR = 0x09,
    CAP_EXPRESS = 0x10,
    CAP_MSIX = 0x11
};

/* ---- Talking with the host ------------------------------------------------------------------------------------------------ */

static void phase_begin(const char *name) {
    printf("PHASE %s\n", name);
}

static void phase_wait(void) {
    ask("WAIT");
}

/* ---- Memory --------------------------------------------------------------------------------------------------------------- */

/* Shared, so that a child's mappings of it are the very same pages. */
static uint8_t *pages(size_t size, int flags) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE | flags, -1, 0);

    need(memory != MAP_FAILED, "memory");
    need(mlock(memory, size) == 0, "locked memory");
    return memory;
}

/* Bytes that differ from page to page and from place to place, so that data in the wrong place is noticed. */
static void stamp(uint8_t *memory, size_t size, uint32_t seed) {
    uint32_t state = seed * 2654435761u + 1;

    for (size_t i = 0; i < size; i++) {
        state = state * 1664525u + 1013904223u;
        memory[i] = (uint8_t)(state >> 24);
    }
}

static bool stamped(const uint8_t *memory, size_t size, uint32_t seed) {
    uint32_t state = seed * 2654435761u + 1;

    for (size_t i = 0; i < size; i++) {
        state = state * 1664525u + 1013904223u;
        if (memory[i] != (uint8_t)(state >> 24))
            return false;
    }
    return true;
}

static uint64_t sum(const uint8_t *memory, size_t size) {
    uint64_t total = 0;

    for (size_t i = 0; i < size; i++)
        total += memory[i];
    return total;
}

static void fill(uint8_t *memory, size_t size, uint64_t pattern) {
    for (size_t i = 0; i < size; i++)
        memory[i] = (uint8_t)(pattern >> (8 * (i % 8)));
}

/* ---- Finding the device --------------------------------------------------------------------------------------------------- */

static char device_name[64];    /* 0000:01:00.0 */
static char device_path[128];   /* its directory in sysfs */

static void find_device(unsigned id) {
    const char *root = "/sys/bus/pci/devices";
    DIR *directory = opendir(root);
    struct dirent *entry;
    unsigned found = 0;

    need(directory != NULL, root);
    while ((entry = readdir(directory)) != NULL) {
        char path[128];

        if (entry->d_name[0] == '.' || strlen(entry->d_name) >= sizeof device_name)
            continue;
        snprintf(path, sizeof path, "%s/%.*s", root, (int)sizeof device_name, entry->d_name);
        if (sysfs_number(path, "vendor") != 0x1234 || sysfs_number(path, "device") != id)
            continue;
        snprintf(device_name, sizeof device_name, "%s", entry->d_name);
        snprintf(device_path, sizeof device_path, "%s", path);
        found++;
    }
    closedir(directory);
    if (!check(found == 1, "one device 1234:%04x on the PCI bus, at %s", id, found > 0 ? device_name : "no place"))
        finish();
}

/* ---- Registers ------------------------------------------------------------------------------------------------------------ */

/* BAR0 as this process has it mapped at present. */
static volatile uint8_t *registers;

static uint32_t get32(unsigned offset) {
    return *(volatile uint32_t *)(registers + offset);
}

static uint64_t get64(unsigned offset) {
    return *(volatile uint64_t *)(registers + offset);
}

static void set32(unsigned offset, uint32_t value) {
    *(volatile uint32_t *)(registers + offset) = value;
}

static void set64(unsigned offset, uint64_t value) {
    *(volatile uint64_t *)(registers + offset) = value;
}

static void start(uint32_t command, uint64_t source, uint64_t destination, uint64_t length) {
    set64(R_SRC, source);
    set64(R_DST, destination);
    set64(R_LEN, length);
    set32(R_COMMAND, command);
}

/* STATUS once the engine is no longer busy. A device that stays busy or has left its bus ends the run. */
static uint32_t settle(void) {
    uint64_t end = milliseconds() + 20000;
    uint32_t status;

    do {
        status = get32(R_STATUS);
    } while (status == ST_BUSY && milliseconds() < end);
    if (status > ST_FAILED || status == ST_BUSY) {
        check(false, "the engine %s, STATUS 0x%x", status == ST_BUSY ? "is still busy after 20 s" : "is gone", status);
        finish();
    }
    return status;
}

static uint32_t run(uint32_t command, uint64_t source, uint64_t destination, uint64_t length) {
    start(command, source, destination, length);
    return settle();
}

static bool done(const char *what) {
    uint32_t status = get32(R_STATUS);
    uint32_t error = get32(R_ERROR);
    uint64_t fault = get64(R_FAULT);

    if (status == ST_DONE && error == 0 && fault == 0)
        return true;
    say("%s: STATUS %u ERROR %u FAULT 0x%llx", what, status, error, (unsigned long long)fault);
    return false;
}

static bool refused(uint32_t error, uint64_t fault) {
    uint32_t is_status = get32(R_STATUS);
    uint32_t is_error = get32(R_ERROR);
    uint64_t is_fault = get64(R_FAULT);

    if (is_status == ST_FAILED && is_error == error && is_fault == fault)
        return true;
    say("STATUS %u ERROR %u FAULT 0x%llx instead of %u, %u, 0x%llx", is_status, is_error, (unsigned long long)is_fault,
        ST_FAILED, error, (unsigned long long)fault);
    return false;
}

/* True when every register has the value that it has after a reset. */
static bool pristine(void) {
    static const unsigned wide[] = {R_SRC, R_DST, R_LEN, R_PATTERN, R_FAULT, R_RESULT, R_COMPLETED};
    static const unsigned narrow[] = {R_REPEAT, R_NOTIFY, R_COMMAND, R_STATUS, R_ERROR};
    bool zero = true;

    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        zero = zero && get64(wide[i]) == 0;
    for (size_t i = 0; i < sizeof narrow / sizeof *narrow; i++)
        zero = zero && get32(narrow[i]) == 0;
    return zero && get32(R_MAGIC) == MAGIC && get32(R_VERSION) == 1;
}

static void check_registers(void) {
    static const struct {
        unsigned offset;
        unsigned size;
        const char *name;
    } writable[] = {
        {R_SRC, 8, "SRC"}, {R_DST, 8, "DST"}, {R_LEN, 8, "LEN"}, {R_PATTERN, 8, "PATTERN"},
        {R_REPEAT, 4, "REPEAT"}, {R_NOTIFY, 4, "NOTIFY"},
    };
    static const unsigned constant[] = {R_MAGIC, R_VERSION, R_STATUS, R_ERROR, R_FAULT, R_RESULT, R_COMPLETED};
    bool held = true;

    check(get32(R_MAGIC) == MAGIC, "MAGIC is 0x%08x", get32(R_MAGIC));
    check(get32(R_VERSION) == 1, "VERSION is %u", get32(R_VERSION));
    check(get64(R_MAGIC) == (1ull << 32 | MAGIC), "MAGIC and VERSION in one 8-byte access");
    for (size_t i = 0; i < sizeof writable / sizeof *writable; i++) {
        if (writable[i].size == 8) {
            set64(writable[i].offset, 0x1122334455667788u);
            held = held && get64(writable[i].offset) == 0x1122334455667788u && get32(writable[i].offset + 4) == 0x11223344;
            set64(writable[i].offset, 0);
        } else {
            set32(writable[i].offset, 0x55667788);
            held = held && get32(writable[i].offset) == 0x55667788;
            set32(writable[i].offset, 0);
        }
        if (!held) {
            say("first wrong: %s", writable[i].name);
            break;
        }
    }
    check(held, "SRC, DST, LEN, PATTERN, REPEAT and NOTIFY keep what is written");
    set64(R_REPEAT, 0x0000000700000005u);
    check(get32(R_REPEAT) == 5 && get32(R_NOTIFY) == 7, "one 8-byte write reaches REPEAT and NOTIFY");
    set64(R_REPEAT, 0);
    for (size_t i = 0; i < sizeof constant / sizeof *constant; i++)
        set32(constant[i], 0xFFFFFFFF);
    check(pristine(), "read-only registers ignore writes");
    registers[R_SRC] = 0xFF;
    *(volatile uint16_t *)(registers + R_SRC + 2) = 0xFFFF;
    check(get64(R_SRC) == 0 && registers[R_MAGIC] == 0 && *(volatile uint16_t *)(registers + R_MAGIC) == 0,
          "1- and 2-byte accesses read as zero and write nothing");
}

/* Has the engine copy without end, tells the host, and restarts if it lets us. */
static _Noreturn void busy(uint64_t source, uint64_t destination, uint64_t length) {
    uint64_t end = milliseconds() + 20000;

    set32(R_REPEAT, 0xFFFFFFFF);
    start(CMD_COPY, source, destination, length);
    while (get64(R_COMPLETED) < 3 && milliseconds() < end)
        continue;
    if (!check(get32(R_STATUS) == ST_BUSY && get64(R_COMPLETED) >= 3, "COPY without end is under way"))
        finish();
    ask("BUSY");
    restart();
}

/* ---- Identity, BARs and capabilities -------------------------------------------------------------------------------------- */

static int config_open(void) {
    char path[256];
    int fd;

    snprintf(path, sizeof path, "%s/config", device_path);
    fd = open(path, O_RDWR | O_CLOEXEC);
    need(fd >= 0, path);
    return fd;
}

static void check_identity(const uint8_t *config) {
    check(sysfs_number(device_path, "subsystem_vendor") == 0x1234 && sysfs_number(device_path, "subsystem_device") == 0x0001,
          "subsystem 1234:0001");
    check(sysfs_number(device_path, "class") == 0x088000, "class 0x%06lx", sysfs_number(device_path, "class"));
    check(sysfs_number(device_path, "revision") == 0x01, "revision %lu", sysfs_number(device_path, "revision"));
    check(config[PCI_PIN_REG] == 1, "interrupt pin INT%c", config[PCI_PIN_REG] + 'A' - 1);
}

/* Start addresses of the BARs as the guest's firmware and kernel placed them. */
static uint64_t bar_start[6];

static void check_bars(const uint8_t *config) {
    static const struct {
        uint64_t size;
        unsigned type;      /* the low four bits of the BAR, prefetchable left out */
    } expected[6] = {[0] = {BAR0_SIZE, 0x0}, [2] = {BAR2_SIZE, 0x4}, [4] = {BAR4_SIZE, 0x0}};
    char path[256];
    FILE *file;

    snprintf(path, sizeof path, "%s/resource", device_path);
    file = fopen(path, "r");
    need(file != NULL, path);
    for (unsigned i = 0; i < 6; i++) {
        unsigned long long start_, last, flags;
        uint64_t size;

        need(fscanf(file, "%llx %llx %llx", &start_, &last, &flags) == 3, path);
        size = last != 0 ? last - start_ + 1 : 0;
        bar_start[i] = start_;
        if (expected[i].size == 0) {
            check(size == 0, "BAR%u is absent", i);
            continue;
        }
        check(size == expected[i].size && (config[0x10 + 4 * i] & 0x7u) == expected[i].type,
              "BAR%u: memory at 0x%llx, %s, %llu bytes", i, start_, (config[0x10 + 4 * i] & 0x4u) != 0 ? "64-bit" : "32-bit",
              (unsigned long long)size);
    }
    fclose(file);
}

static uint32_t word(const uint8_t *config, unsigned offset, unsigned bytes) {
    uint32_t value = 0;

    for (unsigned i = 0; i < bytes; i++)
        value |= (uint32_t)config[offset + i] << (8 * i);
    return value;
}

static void check_capability(const uint8_t *config, unsigned at) {
    uint32_t table, pba, device;

    switch (config[at]) {
    case CAP_PM:
        check((word(config, at + 2, 2) & 7) >= 2 && (word(config, at + 4, 2) & 3) == 0,
              "Capabilities: [%02x] Power Management version %u, D%u", at, word(config, at + 2, 2) & 7,
              word(config, at + 4, 2) & 3);
        break;
    case CAP_MSIX:
        table = word(config, at + 4, 4);
        pba = word(config, at + 8, 4);
        check((word(config, at + 2, 2) & 0x7FF) + 1 == VECTORS && (word(config, at + 2, 2) & 0xC000) == 0 &&
              table == (4 | 0x000) && pba == (4 | 0x800),
              "Capabilities: [%02x] MSI-X: Enable- Count=%u Masked-, table BAR%u+%03x, PBA BAR%u+%03x", at,
              (word(config, at + 2, 2) & 0x7FF) + 1, table & 7, table & ~7u, pba & 7, pba & ~7u);
        break;
    case CAP_EXPRESS:
        device = word(config, at + 4, 4);
        check((word(config, at + 2, 2) >> 4 & 15) == 0 && (device & 1u << 28) != 0,
              "Capabilities: [%02x] Express (v%u) Endpoint, FLReset%c", at, word(config, at + 2, 2) & 15,
              (device & 1u << 28) != 0 ? '+' : '-');
        break;
    case CAP_VENDOR:
        check(config[at + 2] >= 3 && at + config[at + 2] <= 256,
              "Capabilities: [%02x] Vendor Specific Information: Len=%02x", at, config[at + 2]);
        break;
    default:
        check(false, "Capabilities: [%02x] unexpected capability %02x", at, config[at]);
    }
}

static void check_capabilities(const uint8_t *config, size_t size) {
    static const uint8_t wanted[] = {CAP_PM, CAP_MSIX, CAP_EXPRESS, CAP_VENDOR};
    unsigned count[256] = {0};
    unsigned steps = 0;
    bool once = true;

    check((config[PCI_STATUS_REG] & 0x10) != 0, "the status register announces a capability list");
    for (unsigned at = config[0x34]; at != 0 && steps < 48; at = config[at + 1], steps++) {
        if (!check(at >= 0x40 && at % 4 == 0, "capability pointer %02x is aligned and beyond the header", at))
            return;
        count[config[at]]++;
        check_capability(config, at);
    }
    for (size_t i = 0; i < sizeof wanted; i++)
        once = once && count[wanted[i]] == 1;
    check(once && steps == sizeof wanted, "the list is power management, MSI-X, PCI Express and vendor-specific, once each");
    check(size == 4096 && word(config, 0x100, 4) == 0, "%zu bytes of configuration space, the extended part empty", size);
}

/* ---- Device RAM and reset ------------------------------------------------------------------------------------------------- */

static void check_ram(volatile uint8_t *ram) {
    uint8_t copy[BAR2_SIZE / 4];
    bool held = true;

    ram[0x10] = 0xA5;
    *(volatile uint16_t *)(ram + 0x12) = 0xBEEF;
    *(volatile uint32_t *)(ram + 0x14) = 0xCAFEF00D;
    *(volatile uint64_t *)(ram + 0x18) = 0x0123456789ABCDEFu;
    check(ram[0x10] == 0xA5 && *(volatile uint16_t *)(ram + 0x12) == 0xBEEF &&
          *(volatile uint32_t *)(ram + 0x14) == 0xCAFEF00D && ram[0x15] == 0xF0 &&
          *(volatile uint64_t *)(ram + 0x18) == 0x0123456789ABCDEFu,
          "BAR2: the trapped page takes 1-, 2-, 4- and 8-byte accesses");
    stamp(copy, sizeof copy, 1);
    for (size_t i = 0; i < sizeof copy; i++)
        ram[0x1000 + i] = copy[i];
    for (size_t i = 0; i < sizeof copy; i++)
        held = held && ram[0x1000 + i] == copy[i];
    check(held, "BAR2: %zu bytes from 0x1000 on, a byte at a time", sizeof copy);
    *(volatile uint64_t *)(ram + BAR2_SIZE - 8) = 0x1122334455667788u;
    check(*(volatile uint64_t *)(ram + BAR2_SIZE - 8) == 0x1122334455667788u, "BAR2: the last eight bytes");
    *(volatile uint32_t *)(ram + 0xFFC) = 0x5A5A5A5A;
    *(volatile uint32_t *)(ram + 0x1000) = 0xA5A5A5A5;
    check(*(volatile uint32_t *)(ram + 0xFFC) == 0x5A5A5A5A && *(volatile uint32_t *)(ram + 0x1000) == 0xA5A5A5A5,
          "BAR2: either side of the border between the trapped and the mapped part");
}

static bool ram_clear(volatile uint8_t *ram) {
    uint64_t any = 0;

    for (size_t i = 0; i < BAR2_SIZE; i += 8)
        any |= *(volatile uint64_t *)(ram + i);
    return any == 0;
}

/* ---- Guest without an IOMMU ----------------------------------------------------------------------------------------------- */

static volatile uint8_t *map_resource(const char *name, size_t size) {
    char path[256];
    void *memory;
    int fd;

    snprintf(path, sizeof path, "%s/%s", device_path, name);
    fd = open(path, O_RDWR | O_SYNC | O_CLOEXEC);
    need(fd >= 0, path);
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    need(memory != MAP_FAILED, path);
    close(fd);
    return memory;
}

static uint64_t physical(const void *memory) {
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    need(fd >= 0, "/proc/self/pagemap");
    need(pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)memory / PAGE * sizeof entry)) == sizeof entry, "a pagemap entry");
    close(fd);
    need((entry >> 63) != 0 && (entry & ((1ull << 55) - 1)) != 0, "a page that is present");
    return (entry & ((1ull << 55) - 1)) * PAGE + (uintptr_t)memory % PAGE;
}

/* The processor's view of the page that ends at 4 GiB. */
static uint64_t firmware_sum(void) {
    int fd = open("/dev/mem", O_RDONLY | O_CLOEXEC);
    const uint8_t *memory;
    uint64_t total;

    need(fd >= 0, "/dev/mem");
    memory = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0xFFFFF000);
    need(memory != MAP_FAILED, "the firmware");
    total = sum(memory, PAGE);
    munmap((void *)(uintptr_t)memory, PAGE);
    close(fd);
    return total;
}

/* With no IOMMU in the guest, device addresses are the guest's physical addresses. */
static void check_physical_dma(volatile uint8_t *ram) {
    uint8_t *a = pages(PAGE, 0), *b = pages(PAGE, 0);
    uint64_t at_a = physical(a), at_b = physical(b);
    bool held = true;

    say("two locked pages at 0x%llx and 0x%llx", (unsigned long long)at_a, (unsigned long long)at_b);
    stamp(a, PAGE, 2);
    stamp(b, PAGE, 3);
    run(CMD_COPY, at_a, at_b, PAGE);
    check(done("COPY") && memcmp(a, b, PAGE) == 0 && stamped(a, PAGE, 2), "COPY of a page by physical address");
    run(CMD_SUM, at_a, 0, PAGE);
    check(done("SUM") && get64(R_RESULT) == sum(a, PAGE), "SUM of a page is %llu", (unsigned long long)sum(a, PAGE));
    set64(R_PATTERN, 0x0807060504030201u);
    run(CMD_FILL, 0, at_b + 3, 1000);
    fill(a + 3, 1000, 0x0807060504030201u);
    check(done("FILL") && memcmp(a, b, PAGE) == 0, "FILL of 1000 bytes at an odd address, and not one beside them");
    run(CMD_TO_RAM, at_a, 0x800, PAGE);
    for (size_t i = 0; i < PAGE; i++)
        held = held && ram[0x800 + i] == a[i];
    check(done("TO_RAM") && held, "TO_RAM: the page is in BAR2, half in the trapped and half in the mapped part");
    run(CMD_FROM_RAM, 0x900, at_b, 256);
    check(done("FROM_RAM") && memcmp(b, a + 0x100, 256) == 0, "FROM_RAM: and back");
    check(get64(R_COMPLETED) == 5, "COMPLETED is %llu", (unsigned long long)get64(R_COMPLETED));

    /* 0x40000000 is above the 512 MiB of RAM and below the PCI hole; q35 keeps its firmware up to the end of the 4 GiB. */
    run(CMD_FILL, 0, 0x40000000, 64);
    check(refused(ENOENT, 0x40000000), "FILL where the machine has nothing: ENOENT, FAULT 0x40000000");
    stamp(b, PAGE, 4);
    run(CMD_COPY, 0x40000000, at_b, 64);
    check(refused(ENOENT, 0x40000000) && stamped(b, PAGE, 4), "COPY from there: ENOENT, nothing moved");
    run(CMD_FILL, 0, 0xFFFFF000, 16);
    check(refused(EACCES, 0xFFFFF000), "FILL over the firmware, which is mapped read-only: EACCES, FAULT 0xfffff000");
    run(CMD_SUM, 0xFFFFF000, 0, PAGE);
    check(done("SUM") && get64(R_RESULT) == firmware_sum(), "SUM of the firmware's last page, which only messages can reach");
}

/* Every piece of what the kernel calls System RAM has to be mapped. */
static void cover_system_ram(void) {
    FILE *file = fopen("/proc/iomem", "r");
    unsigned count = 0;
    char line[256];

    need(file != NULL, "/proc/iomem");
    phase_begin("ram");
    while (fgets(line, sizeof line, file) != NULL) {
        unsigned long long first, last;

        if (line[0] == ' ' || strstr(line, ": System RAM") == NULL || sscanf(line, "%llx-%llx", &first, &last) != 2)
            continue;
        /* QEMU maps whole pages only. */
        first = (first + PAGE - 1) & ~(PAGE - 1ull);
        last = ((last + 1) & ~(PAGE - 1ull)) - 1;
        printf("COVER 0x%016llx 0x%016llx rw\n", first, last);
        count++;
    }
    fclose(file);
    phase_wait();
    check(count >= 2, "the kernel knows %u ranges of RAM", count);
}

static _Noreturn void plain_busy(void) {
    uint16_t command = COMMAND_MEMORY | COMMAND_MASTER;
    uint8_t *a = pages(PAGE, 0), *b = pages(PAGE, 0);
    int fd = config_open();

    need(pwrite(fd, &command, sizeof command, PCI_COMMAND_REG) == sizeof command, "the command register");
    registers = map_resource("resource0", BAR0_SIZE);
    check(pristine(), "every register has its initial value");
    cover_system_ram();
    busy(physical(a), physical(b), PAGE);
}

static void plain(void) {
    uint8_t config[4096] = {0};
    volatile uint8_t *ram, *table;
    uint16_t command = COMMAND_MEMORY | COMMAND_MASTER;
    int fd = config_open();
    ssize_t size = pread(fd, config, sizeof config, 0);
    bool zero = true;

    need(size >= 256, "configuration space");
    check_identity(config);
    check_bars(config);
    check_capabilities(config, (size_t)size);
    need(pwrite(fd, &command, sizeof command, PCI_COMMAND_REG) == sizeof command, "the command register");
    command = 0;
    need(pread(fd, &command, sizeof command, PCI_COMMAND_REG) == sizeof command, "the command register");
    check((command & 6) == (COMMAND_MEMORY | COMMAND_MASTER), "memory space and bus mastering are switched on");

    registers = map_resource("resource0", BAR0_SIZE);
    ram = map_resource("resource2", BAR2_SIZE);
    table = map_resource("resource4", BAR4_SIZE);
    check(pristine(), "every register has its initial value");
    check_registers();
    check(ram_clear(ram), "device RAM is zero at first");
    check_ram(ram);
    for (size_t i = 0x800; i < BAR4_SIZE; i += 8)
        zero = zero && *(volatile uint64_t *)(table + i) == 0;
    check(zero, "BAR4: the PBA and the rest beyond the table read zero");
    check_physical_dma(ram);
    cover_system_ram();

    set64(R_SRC, 0x1234);
    check(sysfs_write(device_path, "reset_method", "flr") && sysfs_write(device_path, "reset", "1"), "function-level reset");
    check(pristine(), "after it every register has its initial value again");
    check(ram_clear(ram), "and device RAM is zero");
    check_physical_dma(ram);
    close(fd);
}

/* ---- Guest with an IOMMU: VFIO -------------------------------------------------------------------------------------------- */

static int container = -1;
static int group = -1;
static int device = -1;
static uint64_t config_offset;
static uint64_t ram_offset;
static uint64_t aperture_last;      /* last IOVA that the guest's IOMMU can map */

/* What this process has mapped in the open container, which the engine's table has to equal. */
enum { MAPPINGS = 128 };

static struct mapping {
    uint64_t iova;
    size_t size;
    uint8_t *memory;
    bool writable;
} mappings[MAPPINGS];
static size_t mapping_count;

/*
 * What the host may find in the engine's table: with a VFIO container open, what that container maps and nothing else; with none
 * open, nothing, since the kernel has moved the device to its default domain, in which no driver maps anything. The interrupt
 * window (0xfee00000) is an interrupt to the IOMMU and never a mapping. How a range is cut into mappings is the affair of the
 * guest's kernel and of QEMU (seen: a 2 MiB page as one mapping, scattered pages one by one), so ranges that touch are joined
 * before they are compared. There is no write-only mapping here: QEMU's client sets the read bit on every map.
 */
static void phase(const char *name) {
    phase_begin(name);
    for (size_t i = 0; i < mapping_count; i++)
        printf("EXPECT 0x%016llx 0x%016llx %s\n", (unsigned long long)mappings[i].iova,
               (unsigned long long)(mappings[i].iova + (mappings[i].size - 1)), mappings[i].writable ? "rw" : "r-");
    phase_wait();
}

static void map(uint64_t iova, uint8_t *memory, size_t size, bool writable) {
    struct vfio_iommu_type1_dma_map request = {
        .argsz = sizeof request,
        .flags = VFIO_DMA_MAP_FLAG_READ | (writable ? (uint32_t)VFIO_DMA_MAP_FLAG_WRITE : 0),
        .vaddr = (uintptr_t)memory,
        .iova = iova,
        .size = size,
    };

    need(ioctl(container, VFIO_IOMMU_MAP_DMA, &request) == 0, "VFIO_IOMMU_MAP_DMA");
    need(mapping_count < MAPPINGS, "room in the list of mappings");
    mappings[mapping_count++] = (struct mapping){iova, size, memory, writable};
}

static void unmap(uint64_t iova, size_t size) {
    struct vfio_iommu_type1_dma_unmap request = {.argsz = sizeof request, .iova = iova, .size = size};
    size_t kept = 0;

    need(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &request) == 0 && request.size == size, "VFIO_IOMMU_UNMAP_DMA");
    for (size_t i = 0; i < mapping_count; i++) {
        if (mappings[i].iova < iova || mappings[i].iova > iova + (size - 1))
            mappings[kept++] = mappings[i];
    }
    mapping_count = kept;
}

static uint16_t config16(unsigned offset) {
    uint16_t value = 0;

    need(pread(device, &value, sizeof value, (off_t)(config_offset + offset)) == sizeof value, "configuration space");
    return value;
}

static void enable_device(void) {
    uint16_t command = (uint16_t)(config16(PCI_COMMAND_REG) | COMMAND_MEMORY | COMMAND_MASTER);

    need(pwrite(device, &command, sizeof command, (off_t)(config_offset + PCI_COMMAND_REG)) == sizeof command,
         "the command register");
}

static struct vfio_region_info region(uint32_t index) {
    struct vfio_region_info info = {.argsz = sizeof info, .index = index};

    need(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info) == 0, "VFIO_DEVICE_GET_REGION_INFO");
    return info;
}

static void read_aperture(void) {
    /* Aligned for the structures inside; far larger than the list of ranges of any IOMMU here. */
    static uint64_t buffer[512];
    struct vfio_iommu_type1_info *info = (void *)buffer;
    const uint8_t *bytes = (const void *)buffer;

    info->argsz = sizeof buffer;
    need(ioctl(container, VFIO_IOMMU_GET_INFO, info) == 0, "VFIO_IOMMU_GET_INFO");
    need((info->flags & VFIO_IOMMU_INFO_CAPS) != 0, "capabilities of the IOMMU");
    for (uint32_t at = info->cap_offset; at != 0;) {
        const struct vfio_info_cap_header *header = (const void *)(bytes + at);

        if (header->id == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) {
            const struct vfio_iommu_type1_info_cap_iova_range *ranges = (const void *)header;

            aperture_last = ranges->iova_ranges[ranges->nr_iovas - 1].end;
        }
        at = header->next;
    }
    need(aperture_last != 0, "the IOVA ranges of the IOMMU");
}

static void bind_driver(void) {
    char path[256], text[64] = "";
    ssize_t length;

    need(sysfs_write(device_path, "driver_override", "vfio-pci") && sysfs_write("/sys/bus/pci", "drivers_probe", device_name),
         "binding to vfio-pci");
    snprintf(path, sizeof path, "%s/driver", device_path);
    length = readlink(path, text, sizeof text - 1);
    if (!check(length > 0 && strstr(text, "/vfio-pci") != NULL, "vfio-pci has taken %s", device_name))
        finish();
}

static void vfio_open(void) {
    struct vfio_group_status status = {.argsz = sizeof status};
    char path[256], link[128] = "";
    const char *number;
    void *memory;

    snprintf(path, sizeof path, "%s/iommu_group", device_path);
    need(readlink(path, link, sizeof link - 1) > 0, "an IOMMU group");
    number = strrchr(link, '/');
    need(number != NULL, "an IOMMU group");
    snprintf(path, sizeof path, "/dev/vfio%s", number);

    container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
    need(container >= 0, "/dev/vfio/vfio");
    need(ioctl(container, VFIO_GET_API_VERSION) == VFIO_API_VERSION, "VFIO_GET_API_VERSION");
    need(ioctl(container, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU) == 1, "type1v2");
    group = open(path, O_RDWR | O_CLOEXEC);
    need(group >= 0, path);
    need(ioctl(group, VFIO_GROUP_GET_STATUS, &status) == 0 && (status.flags & VFIO_GROUP_FLAGS_VIABLE) != 0, "a viable group");
    need(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) == 0, "VFIO_GROUP_SET_CONTAINER");
    need(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) == 0, "VFIO_SET_IOMMU");
    device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, device_name);
    need(device >= 0, "VFIO_GROUP_GET_DEVICE_FD");
    config_offset = region(VFIO_PCI_CONFIG_REGION_INDEX).offset;
    ram_offset = region(VFIO_PCI_BAR2_REGION_INDEX).offset;
    enable_device();
    memory = mmap(NULL, BAR0_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, device,
                  (off_t)region(VFIO_PCI_BAR0_REGION_INDEX).offset);
    need(memory != MAP_FAILED, "BAR0");
    registers = memory;
    mapping_count = 0;
}

/* Leaves every mapping to the kernel's clean-up. */
static void vfio_close(void) {
    munmap((void *)(uintptr_t)registers, BAR0_SIZE);
    registers = NULL;
    close(device);
    close(group);
    close(container);
    mapping_count = 0;
}

/* ---- Where things are mapped ---------------------------------------------------------------------------------------------- */

/*
 * WINDOW   64 pages that are neighbours for the device but not in memory, each with a mapping of its own
 * HUGE     one 2 MiB page of the guest at a multiple of 2 MiB, so that the guest's IOMMU may use a large page
 * SINGLE   eight pages with holes between them; behind the first lies a read-only page
 * ZERO     IOVA 0
 * top      the last page of the IOMMU's aperture
 */
enum { WINDOW_PAGES = 64, SINGLES = 8, HUGE_SIZE = 2 * MIB, LARGE_SIZE = 16 * MIB };
#define WINDOW 0x10000000ull
#define HUGE 0x40000000ull
#define SINGLE(i) (0x80000000ull + (uint64_t)(i) * 0x100000)
#define READ_ONLY (SINGLE(0) + PAGE)
#define NOWHERE 0xC0000000ull
#define LARGE 0x100000000ull

static uint8_t *window_memory, *huge_memory, *single_memory, *read_only_memory, *zero_memory, *top_memory, *spare_memory;

/* Neighbours for the device are 27 pages apart in memory; 27 is odd, so each of the 64 is met once. */
static uint8_t *window_page(size_t i) {
    return window_memory + i * 27 % WINDOW_PAGES * PAGE;
}

static void window_save(uint8_t *image) {
    for (size_t i = 0; i < WINDOW_PAGES; i++)
        memcpy(image + i * PAGE, window_page(i), PAGE);
}

static bool window_is(const uint8_t *image) {
    for (size_t i = 0; i < WINDOW_PAGES; i++) {
        if (memcmp(image + i * PAGE, window_page(i), PAGE) != 0)
            return false;
    }
    return true;
}

static uint64_t top(void) {
    return aperture_last - (PAGE - 1);
}

static void allocate(void) {
    window_memory = pages(WINDOW_PAGES * PAGE, 0);
    huge_memory = pages(HUGE_SIZE, MAP_HUGETLB);
    single_memory = pages(SINGLES * PAGE, 0);
    read_only_memory = pages(PAGE, 0);
    zero_memory = pages(PAGE, 0);
    top_memory = pages(PAGE, 0);
    spare_memory = pages(PAGE, 0);
}

/* The list of all that is to be mapped, in the order of mapping; returns its length. */
static size_t plan(struct mapping *list) {
    size_t n = 0;

    for (size_t i = 0; i < WINDOW_PAGES; i++)
        list[n++] = (struct mapping){WINDOW + i * PAGE, PAGE, window_page(i), true};
    list[n++] = (struct mapping){HUGE, HUGE_SIZE, huge_memory, true};
    for (size_t i = 0; i < SINGLES; i++)
        list[n++] = (struct mapping){SINGLE(i), PAGE, single_memory + i * PAGE, true};
    list[n++] = (struct mapping){READ_ONLY, PAGE, read_only_memory, false};
    list[n++] = (struct mapping){0, PAGE, zero_memory, true};
    list[n++] = (struct mapping){top(), PAGE, top_memory, true};
    return n;
}

static void map_all(void) {
    struct mapping list[MAPPINGS];
    size_t count = plan(list);

    for (size_t i = 0; i < count; i++)
        map(list[i].iova, list[i].memory, list[i].size, list[i].writable);
}

static void stamp_list(const struct mapping *list, size_t count) {
    for (size_t i = 0; i < count; i++)
        stamp(list[i].memory, list[i].size, (uint32_t)i + 100);
}

static void stamp_all(void) {
    stamp_list(mappings, mapping_count);
}

/* ---- The checks behind VFIO ----------------------------------------------------------------------------------------------- */

static uint8_t image[WINDOW_PAGES * PAGE];

static void check_commands(void) {
    const uint64_t pattern = 0xF1E2D3C4B5A69788u;
    uint64_t completed;
    uint8_t expected[PAGE], ram[PAGE];

    stamp_all();
    completed = get64(R_COMPLETED);
    set64(R_PATTERN, pattern);
    window_save(image);
    fill(image + 5, 62 * PAGE, pattern);
    run(CMD_FILL, 0, WINDOW + 5, 62 * PAGE);
    check(done("FILL") && window_is(image), "FILL over 63 mappings from an odd address, and not one byte beside it");

    memcpy(image + 1000, huge_memory + 4321, 50 * PAGE);
    run(CMD_COPY, HUGE + 4321, WINDOW + 1000, 50 * PAGE);
    check(done("COPY") && window_is(image), "COPY out of the 2 MiB page over 51 mappings");

    run(CMD_COPY, WINDOW + 77, HUGE + MIB - 33, 60 * PAGE);
    check(done("COPY") && memcmp(huge_memory + MIB - 33, image + 77, 60 * PAGE) == 0 && window_is(image),
          "COPY over 61 mappings into the 2 MiB page");

    run(CMD_SUM, WINDOW + 1, 0, sizeof image - 2);
    check(done("SUM") && get64(R_RESULT) == sum(image + 1, sizeof image - 2), "SUM over 64 mappings is %llu",
          (unsigned long long)get64(R_RESULT));

    memcpy(expected, single_memory, PAGE);
    memmove(expected + 300, expected + 100, 2000);
    run(CMD_COPY, SINGLE(0) + 100, SINGLE(0) + 300, 2000);
    check(done("COPY") && memcmp(single_memory, expected, PAGE) == 0, "COPY onto itself, upwards");
    memmove(expected + 50, expected + 350, 3000);
    run(CMD_COPY, SINGLE(0) + 350, SINGLE(0) + 50, 3000);
    check(done("COPY") && memcmp(single_memory, expected, PAGE) == 0, "COPY onto itself, downwards");

    run(CMD_TO_RAM, WINDOW + 2 * PAGE - 1000, 0x700, PAGE);
    need(pread(device, ram, sizeof ram, (off_t)(ram_offset + 0x700)) == sizeof ram, "device RAM");
    check(done("TO_RAM") && memcmp(ram, image + 2 * PAGE - 1000, PAGE) == 0, "TO_RAM from two mappings");
    memcpy(expected, ram, PAGE);
    memcpy(image + 9 * PAGE - 10, ram, PAGE);
    run(CMD_FROM_RAM, 0x700, WINDOW + 9 * PAGE - 10, PAGE);
    check(done("FROM_RAM") && window_is(image), "FROM_RAM to two mappings");

    image[4 * PAGE - 1] = zero_memory[7];
    run(CMD_COPY, 7, WINDOW + 4 * PAGE - 1, 1);
    check(done("COPY") && window_is(image), "COPY of one byte from IOVA 7");
    run(CMD_COPY, READ_ONLY, top(), PAGE);
    check(done("COPY") && memcmp(top_memory, read_only_memory, PAGE) == 0,
          "COPY from a read-only page to the last page of the aperture, 0x%llx", (unsigned long long)top());
    check(get64(R_COMPLETED) == completed + 10, "COMPLETED has counted ten commands");
    set32(R_REPEAT, 25);
    run(CMD_SUM, HUGE, 0, HUGE_SIZE);
    set32(R_REPEAT, 0);
    check(done("SUM") && get64(R_COMPLETED) == completed + 35 && get64(R_RESULT) == sum(huge_memory, HUGE_SIZE),
          "SUM of 2 MiB, 25 times");
}

/* The greatest length, as 4096 mappings of the guest's IOMMU and perhaps fewer large ones. */
static void check_large(void) {
    uint8_t *memory = pages(LARGE_SIZE, 0);
    const uint64_t pattern = 0x8877665544332211u;

    map(LARGE, memory, LARGE_SIZE, true);
    stamp(memory, LARGE_SIZE, 5);
    phase("large");
    run(CMD_SUM, LARGE, 0, LARGE_SIZE);
    check(done("SUM") && get64(R_RESULT) == sum(memory, LARGE_SIZE), "SUM of 16 MiB above 4 GiB");
    set64(R_PATTERN, pattern);
    run(CMD_FILL, 0, LARGE, LARGE_SIZE);
    check(done("FILL") && memory[0] == 0x11 && memory[LARGE_SIZE - 1] == 0x88 &&
          sum(memory, LARGE_SIZE) == 0x264ull * (LARGE_SIZE / 8), "FILL of 16 MiB");
    run(CMD_SUM, LARGE, 0, LARGE_SIZE + 1);
    check(refused(EINVAL, 0), "one byte more is EINVAL");
    unmap(LARGE, LARGE_SIZE);
    phase("large-unmapped");
    munmap(memory, LARGE_SIZE);
}

static void check_refusals(void) {
    uint64_t completed, writable_sum, read_only_sum;

    stamp_all();
    writable_sum = sum(single_memory, PAGE);
    read_only_sum = sum(read_only_memory, PAGE);
    completed = get64(R_COMPLETED);
    window_save(image);
    run(CMD_FILL, 0, NOWHERE, 64);
    check(refused(ENOENT, NOWHERE), "FILL where nothing was ever mapped: ENOENT, FAULT 0x%llx", NOWHERE);
    run(CMD_SUM, NOWHERE + 123, 0, 1);
    check(refused(ENOENT, NOWHERE + 123), "SUM of one byte there: ENOENT");
    run(CMD_COPY, NOWHERE, WINDOW, PAGE);
    check(refused(ENOENT, NOWHERE) && window_is(image), "COPY from there: ENOENT, nothing moved");
    run(CMD_COPY, WINDOW, NOWHERE, PAGE);
    check(refused(ENOENT, NOWHERE), "COPY to there: ENOENT");
    run(CMD_COPY, WINDOW + PAGE, NOWHERE, WINDOW_PAGES * PAGE);
    check(refused(ENOENT, WINDOW + WINDOW_PAGES * PAGE), "COPY with both sides at fault: FAULT is the source's, at its end");
    run(CMD_FROM_RAM, 0, NOWHERE, PAGE);
    check(refused(ENOENT, NOWHERE), "FROM_RAM to there: ENOENT");

    run(CMD_FILL, 0, WINDOW, (WINDOW_PAGES + 1) * PAGE);
    check(refused(ENOENT, WINDOW + WINDOW_PAGES * PAGE) && window_is(image),
          "FILL that runs over the end of the 64 mappings: ENOENT, FAULT is the end, nothing moved");
    run(CMD_SUM, WINDOW - 1, 0, 2);
    check(refused(ENOENT, WINDOW - 1), "SUM that begins one byte before them: ENOENT, FAULT is that byte");

    run(CMD_FILL, 0, READ_ONLY, 8);
    check(refused(EACCES, READ_ONLY), "FILL of a read-only page: EACCES, FAULT 0x%llx", READ_ONLY);
    run(CMD_FILL, 0, SINGLE(0), 2 * PAGE);
    check(refused(EACCES, READ_ONLY), "FILL that runs from a writable into a read-only page: EACCES");
    run(CMD_COPY, WINDOW, READ_ONLY - 1, 2);
    check(refused(EACCES, READ_ONLY), "COPY that touches it with its last byte: EACCES");
    check(sum(single_memory, PAGE) == writable_sum && sum(read_only_memory, PAGE) == read_only_sum,
          "both pages are as they were");
    run(CMD_SUM, SINGLE(0), 0, 2 * PAGE);
    check(done("SUM") && get64(R_RESULT) == writable_sum + read_only_sum, "reading both is fine");

    run(CMD_SUM, 0, 0, 0);
    check(refused(EINVAL, 0), "LEN 0 is EINVAL");
    run(CMD_SUM, UINT64_MAX - 10, 0, 100);
    check(refused(EINVAL, 0), "a range that wraps past 2^64 is EINVAL");
    run(99, WINDOW, WINDOW, 1);
    check(refused(EINVAL, 0), "an unknown command is EINVAL");
    run(CMD_TO_RAM, WINDOW, BAR2_SIZE - 1, 2);
    check(refused(EINVAL, 0), "a device RAM offset out of range is EINVAL");
    check(get64(R_COMPLETED) == completed + 1, "COMPLETED has counted none of the failures");
    check(window_is(image), "the 64 pages are as they were");
}

static void check_unmap(void) {
    uint8_t *page = single_memory + 3 * PAGE;

    unmap(SINGLE(3), PAGE);
    phase("unmapped");
    stamp(page, PAGE, 6);
    stamp(spare_memory, PAGE, 7);
    run(CMD_FILL, 0, SINGLE(3), PAGE);
    check(refused(ENOENT, SINGLE(3)) && stamped(page, PAGE, 6), "FILL of a page just unmapped: ENOENT, not a byte changed");
    run(CMD_SUM, SINGLE(3), 0, PAGE);
    check(refused(ENOENT, SINGLE(3)), "SUM of it: ENOENT");

    map(SINGLE(3), spare_memory, PAGE, true);
    phase("remapped");
    set64(R_PATTERN, 0);
    run(CMD_FILL, 0, SINGLE(3), PAGE);
    check(done("FILL") && sum(spare_memory, PAGE) == 0 && stamped(page, PAGE, 6),
          "another page at the same IOVA: FILL reaches the new page and not the old one");

    /* One hole in a range that was whole a moment ago. */
    window_save(image);
    unmap(WINDOW + 31 * PAGE, PAGE);
    run(CMD_FILL, 0, WINDOW, WINDOW_PAGES * PAGE);
    check(refused(ENOENT, WINDOW + 31 * PAGE) && window_is(image), "FILL over a range with a hole: ENOENT, FAULT is the hole");
    map(WINDOW + 31 * PAGE, window_page(31), PAGE, true);
    set64(R_PATTERN, 0x7777777777777777u);
    memset(image, 0x77, sizeof image);
    run(CMD_FILL, 0, WINDOW, WINDOW_PAGES * PAGE);
    check(done("FILL") && window_is(image), "FILL with the hole closed");
}

/* The moment the guest's unmap has returned nothing moves any more, however busy the engine is. */
static void check_unmap_while_busy(void) {
    uint64_t completed;

    set32(R_REPEAT, 0xFFFFFFFF);
    completed = get64(R_COMPLETED);
    start(CMD_COPY, SINGLE(1), SINGLE(2), PAGE);
    for (uint64_t end = milliseconds() + 5000; get64(R_COMPLETED) < completed + 10 && milliseconds() < end;)
        continue;
    check(get32(R_STATUS) == ST_BUSY && get64(R_COMPLETED) >= completed + 10, "COPY without end is under way");
    set64(R_SRC, 0);
    set32(R_COMMAND, CMD_SUM);
    check(get64(R_SRC) == SINGLE(1) && get32(R_STATUS) == ST_BUSY, "writes and a second command are ignored meanwhile");
    unmap(SINGLE(2), PAGE);
    stamp(single_memory + 2 * PAGE, PAGE, 8);
    settle();
    check(refused(ENOENT, SINGLE(2)), "unmapping its destination ends it: ENOENT");
    pause_ms(20);
    check(stamped(single_memory + 2 * PAGE, PAGE, 8), "and nothing was written once the unmap had returned");
    set32(R_REPEAT, 0);
    map(SINGLE(2), single_memory + 2 * PAGE, PAGE, true);
    phase("unmapped-while-busy");
}

static void check_reset(void) {
    uint8_t zeroes[PAGE] = {0}, ram[PAGE];

    set32(R_REPEAT, 0xFFFFFFFF);
    start(CMD_COPY, SINGLE(1), SINGLE(4), PAGE);
    check(get32(R_STATUS) == ST_BUSY, "COPY without end is under way");
    check(ioctl(device, VFIO_DEVICE_RESET) == 0, "VFIO_DEVICE_RESET");
    stamp(single_memory + 4 * PAGE, PAGE, 9);
    enable_device();
    check(pristine(), "reset stops the work and clears every register");
    need(pread(device, ram, sizeof ram, (off_t)ram_offset) == sizeof ram, "device RAM");
    check(memcmp(ram, zeroes, PAGE) == 0, "and device RAM");
    pause_ms(20);
    check(stamped(single_memory + 4 * PAGE, PAGE, 9), "nothing was written after it");
    phase("reset");
    run(CMD_COPY, SINGLE(1), SINGLE(4), PAGE);
    check(done("COPY") && memcmp(single_memory + PAGE, single_memory + 4 * PAGE, PAGE) == 0, "the mappings can still be used");
}

/* ---- Interrupts ----------------------------------------------------------------------------------------------------------- */

static bool set_irqs(uint32_t index, uint32_t flags, uint32_t first, uint32_t count, const int *eventfds) {
    uint64_t buffer[(sizeof(struct vfio_irq_set) + VECTORS * sizeof(int) + 7) / 8] = {0};
    struct vfio_irq_set *set = (void *)buffer;
    size_t data = eventfds != NULL ? count * sizeof(int) : 0;

    set->argsz = (uint32_t)(sizeof *set + data);
    set->flags = flags;
    set->index = index;
    set->start = first;
    set->count = count;
    if (eventfds != NULL)
        memcpy((uint8_t *)buffer + offsetof(struct vfio_irq_set, data), eventfds, data);
    return ioctl(device, VFIO_DEVICE_SET_IRQS, set) == 0;
}

/* How often the eventfd was signalled, waiting up to `ms` for the first time. */
static uint64_t signals(int fd, int ms) {
    struct pollfd item = {.fd = fd, .events = POLLIN};
    uint64_t count = 0;

    if (poll(&item, 1, ms) != 1 || read(fd, &count, sizeof count) != sizeof count)
        return 0;
    return count;
}

enum { SOON_MS = 5000, NEVER_MS = 50 };

static void check_msix(void) {
    const uint32_t eventfds = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    const uint32_t off = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    struct vfio_irq_info info = {.argsz = sizeof info, .index = VFIO_PCI_MSIX_IRQ_INDEX};
    int fds[VECTORS], none = -1;
    bool others = false;

    need(ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &info) == 0, "VFIO_DEVICE_GET_IRQ_INFO");
    check(info.count == VECTORS, "MSI-X has %u vectors", info.count);
    for (size_t i = 0; i < VECTORS; i++)
        fds[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (!check(set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, eventfds, 0, VECTORS, fds), "an eventfd on each of them"))
        return;
    for (unsigned i = 0; i < VECTORS; i++) {
        set32(R_NOTIFY, 1 + i);
        start(CMD_FILL, 0, SINGLE(5), 64);
        check(signals(fds[i], SOON_MS) == 1 && settle() == ST_DONE, "MSI-X vector %u, once", i);
        for (unsigned k = 0; k < VECTORS; k++)
            others = others || signals(fds[k], 0) != 0;
    }
    check(!others, "no vector but the one asked for");
    set32(R_NOTIFY, 2);
    start(CMD_FILL, 0, NOWHERE, 64);
    check(signals(fds[1], SOON_MS) == 1 && refused(ENOENT, NOWHERE), "a command that fails interrupts as well");
    set32(R_NOTIFY, 0);
    run(CMD_FILL, 0, SINGLE(5), 64);
    set32(R_NOTIFY, 1 + VECTORS);
    run(CMD_FILL, 0, SINGLE(5), 64);
    check(signals(fds[0], NEVER_MS) + signals(fds[1], 0) + signals(fds[2], 0) + signals(fds[3], 0) == 0,
          "NOTIFY 0 and a vector that isn't there are silent");
    check(set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, eventfds, 2, 1, &none), "vector 2 is taken away");
    set32(R_NOTIFY, 3);
    run(CMD_FILL, 0, SINGLE(5), 64);
    set32(R_NOTIFY, 4);
    start(CMD_FILL, 0, SINGLE(5), 64);
    check(signals(fds[3], SOON_MS) == 1 && signals(fds[2], NEVER_MS) == 0, "vector 2 is silent, vector 3 isn't");
    settle();
    set32(R_NOTIFY, 0);
    check(set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, off, 0, 0, NULL), "MSI-X is switched off");
    for (size_t i = 0; i < VECTORS; i++)
        close(fds[i]);
}

static void check_intx(void) {
    const uint32_t off = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    const uint32_t unmask = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);

    if (!check(set_irqs(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, 0, 1, &fd),
               "an eventfd on INTx"))
        return;
    settle();
    set32(R_NOTIFY, 1);
    start(CMD_FILL, 0, SINGLE(5), 64);
    check(signals(fd, SOON_MS) == 1, "INTx");
    check((config16(PCI_STATUS_REG) & STATUS_INTX) != 0, "the status register shows it");
    check(signals(fd, NEVER_MS) == 0, "masked until the driver unmasks it");
    check(set_irqs(VFIO_PCI_INTX_IRQ_INDEX, unmask, 0, 1, NULL) && signals(fd, SOON_MS) == 1,
          "unmasked while the level is up: INTx again");
    check(get32(R_STATUS) == ST_DONE && (config16(PCI_STATUS_REG) & STATUS_INTX) == 0, "reading STATUS takes the level down");
    check(set_irqs(VFIO_PCI_INTX_IRQ_INDEX, unmask, 0, 1, NULL) && signals(fd, NEVER_MS) == 0, "unmasked then: silence");
    start(CMD_FILL, 0, SINGLE(5), 64);
    check(signals(fd, SOON_MS) == 1 && settle() == ST_DONE, "the next command: INTx once more");
    set32(R_NOTIFY, 0);
    check(set_irqs(VFIO_PCI_INTX_IRQ_INDEX, off, 0, 0, NULL), "INTx is switched off");
    close(fd);
}

/* ---- Leaving without unmapping -------------------------------------------------------------------------------------------- */

/* DMA to every page of a list of mappings that are gone. */
static void check_gone(const struct mapping *list, size_t count, const char *after) {
    unsigned tried = 0, read_back = 0, written = 0, changed = 0;

    for (size_t i = 0; i < count; i++) {
        for (size_t at = 0; at < list[i].size; at += PAGE) {
            uint64_t iova = list[i].iova + at;

            tried++;
            if (run(CMD_FILL, 0, iova, PAGE) != ST_FAILED || get32(R_ERROR) != ENOENT || get64(R_FAULT) != iova)
                written++;
            if (run(CMD_SUM, iova, 0, PAGE) != ST_FAILED || get32(R_ERROR) != ENOENT || get64(R_FAULT) != iova)
                read_back++;
        }
    }
    for (size_t i = 0; i < count; i++)
        changed += !stamped(list[i].memory, list[i].size, (uint32_t)i + 100);
    check(written == 0, "%s: FILL of each of %u pages failed with ENOENT (%u did not)", after, tried, written);
    check(read_back == 0, "%s: SUM of each of %u pages failed with ENOENT (%u did not)", after, tried, read_back);
    check(changed == 0, "%s: not a byte changed in %zu former mappings (%u differ)", after, count, changed);
}

/* So that the refusals above aren't owed to a device that does nothing at all. */
static void check_alive(void) {
    map(SINGLE(0), spare_memory, PAGE, true);
    set64(R_PATTERN, 0x3131313131313131u);
    run(CMD_FILL, 0, SINGLE(0), PAGE);
    check(done("FILL") && sum(spare_memory, PAGE) == 0x31u * PAGE, "a page mapped now is reached");
    phase("one-page");
    unmap(SINGLE(0), PAGE);
}

static void check_close(void) {
    struct mapping old[MAPPINGS];
    size_t count = mapping_count;

    stamp_all();
    memcpy(old, mappings, sizeof old);
    vfio_close();
    phase("closed");
    vfio_open();
    phase("reopened");
    set64(R_PATTERN, 0x6666666666666666u);
    check_gone(old, count, "closed without unmapping");
    check_alive();
    vfio_close();
}

/* The same with a driver that is killed while its device is busy. */
static void check_killed(void) {
    struct mapping old[MAPPINGS];
    size_t count = plan(old);
    int ready[2], status = 0;
    char c = 0;
    pid_t child;

    need(pipe(ready) == 0, "a pipe");
    fflush(stdout);
    child = fork();
    need(child >= 0, "a child process");
    if (child == 0) {
        vfio_open();
        map_all();
        set32(R_REPEAT, 0xFFFFFFFF);
        start(CMD_COPY, HUGE, HUGE + MIB, MIB);
        if (write(ready[1], get32(R_STATUS) == ST_BUSY ? "b" : "-", 1) == 1)
            for (;;)
                pause();
        _exit(1);
    }
    need(read(ready[0], &c, 1) == 1, "word from the child process");
    kill(child, SIGKILL);
    need(waitpid(child, &status, 0) == child, "the child process");
    check(c == 'b' && WIFSIGNALED(status), "a driver is killed while its device copies");
    phase("killed");
    stamp_list(old, count);
    vfio_open();
    phase("reopened-again");
    set64(R_PATTERN, 0x5555555555555555u);
    check_gone(old, count, "killed");
    vfio_close();
    close(ready[0]);
    close(ready[1]);
}

static _Noreturn void vfio_busy(void) {
    bind_driver();
    phase("bound");
    allocate();
    vfio_open();
    read_aperture();
    check(pristine(), "every register has its initial value");
    map_all();
    phase("mapped");
    busy(HUGE, HUGE + MIB, MIB);
}

static void vfio(bool messages) {
    bind_driver();
    phase("bound");
    allocate();
    vfio_open();
    read_aperture();
    say("the guest's IOMMU maps up to 0x%llx", (unsigned long long)aperture_last);
    phase("opened");
    check(pristine(), "MAGIC 0x%08x, VERSION %u, every register has its initial value", get32(R_MAGIC), get32(R_VERSION));
    check_registers();
    map_all();
    phase("mapped");
    check_commands();
    check_large();
    check_refusals();
    check_unmap();
    /*
     * With DMA by message the guest's IOMMU is asked about each access, and refuses those between its page table's change and the
     * engine's notice of it: that is reported to the guest as a DMA fault, rightly.
     */
    if (!messages)
        check_unmap_while_busy();
    check_msix();
    check_intx();
    check_reset();
    phase("before-close");
    check_close();
    check_killed();
    phase("end");
}

/* ---- The serial port ------------------------------------------------------------------------------------------------------ */

/* LOOP is the kernel's TIOCM_LOOP, whose header can't be had beside termios.h. */
enum { GREETING_MS = 10000, LOOP = 0x8000 };

static char port_name[64];          /* /dev/ttyS4 */
static int port = -1;

/* True when the stock driver has the device; then the port's name is known. */
static bool port_bound(void) {
    const char *root = "/sys/class/tty";
    DIR *directory = opendir(root);
    struct dirent *entry;
    char path[256], link[256], part[80];
    ssize_t length;

    need(directory != NULL, root);
    port_name[0] = '\0';
    snprintf(part, sizeof part, "/%s/", device_name);
    while ((entry = readdir(directory)) != NULL) {
        snprintf(path, sizeof path, "%s/%.60s", root, entry->d_name);
        length = readlink(path, link, sizeof link - 1);
        if (length <= 0)
            continue;
        link[length] = '\0';
        if (strstr(link, part) != NULL)
            snprintf(port_name, sizeof port_name, "/dev/%.50s", entry->d_name);
    }
    closedir(directory);
    snprintf(path, sizeof path, "%s/driver", device_path);
    length = readlink(path, link, sizeof link - 1);
    link[length > 0 ? length : 0] = '\0';
    return strstr(link, "/drivers/serial") != NULL && port_name[0] != '\0';
}

static void port_set(speed_t speed, tcflag_t bits) {
    struct termios tty;

    need(tcgetattr(port, &tty) == 0, port_name);
    cfmakeraw(&tty);
    tty.c_cflag = (tty.c_cflag & ~(tcflag_t)(CSIZE | CRTSCTS | PARENB | CSTOPB)) | bits | CLOCAL | CREAD;
    cfsetspeed(&tty, speed);
    need(tcsetattr(port, TCSADRAIN, &tty) == 0, port_name);
}

static void port_open(void) {
    port = open(port_name, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    need(port >= 0, port_name);
    port_set(B115200, CS8);
}

static void port_lines(bool on, int lines) {
    need(ioctl(port, on ? TIOCMBIS : TIOCMBIC, &lines) == 0, "modem lines");
}

/*
 * Reads `in_size` bytes into `in` while it writes `out_size` bytes of `out`, until all have passed or `ms` have. Returns how many
 * were read; what is written has also left the port.
 */
static size_t exchange(const uint8_t *out, size_t out_size, uint8_t *in, size_t in_size, unsigned ms) {
    uint64_t end = milliseconds() + ms;
    size_t put = 0, got = 0;

    while ((put < out_size || got < in_size) && milliseconds() < end) {
        struct pollfd item = {.fd = port, .events = (short)((put < out_size ? POLLOUT : 0) | (got < in_size ? POLLIN : 0))};
        ssize_t n;

        if (poll(&item, 1, (int)(end - milliseconds())) != 1)
            break;
        if (got < in_size && (n = read(port, in + got, in_size - got)) > 0)
            got += (size_t)n;
        if (put < out_size && (n = write(port, out + put, out_size - put)) > 0)
            put += (size_t)n;
    }
    if (put == out_size)
        tcdrain(port);
    return got;
}

static void check_greeting(const char *hello, const char *answer) {
    char text[128] = "", line[128];
    size_t length = strlen(hello) + 1, got;

    printf("SAY %s\n", hello);
    fflush(stdout);
    got = exchange(NULL, 0, (uint8_t *)text, length, GREETING_MS);
    check(got == length && text[length - 1] == '\n' && memcmp(text, hello, length - 1) == 0, "the host says \"%s\"", hello);
    exchange((const uint8_t *)line, (size_t)snprintf(line, sizeof line, "%s\n", answer), NULL, 0, GREETING_MS);
    snprintf(text, sizeof text, "HEAR %s", answer);
    ask(text);
}

/* `size` bytes each way at once; a byte is ten bits on the line. */
static void check_both_ways(size_t size, unsigned baud, uint32_t seed) {
    struct serial_icounter_struct before = {0}, after = {0};
    uint8_t *out = malloc(size), *in = malloc(size);
    uint64_t begin, time, least = (uint64_t)size * 10 * 1000 / baud;
    size_t got;

    need(out != NULL && in != NULL, "memory");
    stamp(out, size, seed);
    need(ioctl(port, TIOCGICOUNT, &before) == 0, "TIOCGICOUNT");
    printf("TAKE %u %zu\nFEED %u %zu\n", seed, size, seed + 1, size);
    fflush(stdout);
    begin = milliseconds();
    got = exchange(out, size, in, size, (unsigned)least + 30000);
    time = milliseconds() - begin;
    check(got == size && stamped(in, size, seed + 1), "%zu of %zu bytes from the host, each the right one", got, size);
    ask("TAKEN");
    /* The host needs a moment for its side, so only the lower bound is sharp: 16 bytes may be in each FIFO. */
    check(time + 2 >= least - 32 * 10 * 1000 / baud, "%u baud: %llu ms on the line, %llu at least", baud,
          (unsigned long long)time, (unsigned long long)least);
    need(ioctl(port, TIOCGICOUNT, &after) == 0, "TIOCGICOUNT");
    check((size_t)(after.rx - before.rx) == size && (size_t)(after.tx - before.tx) == size && after.overrun == before.overrun &&
          after.buf_overrun == before.buf_overrun && after.frame == before.frame && after.parity == before.parity,
          "the driver counts %d in, %d out, no overrun", after.rx - before.rx, after.tx - before.tx);
    free(out);
    free(in);
}

static void check_modem_lines(void) {
    const int inputs = TIOCM_CTS | TIOCM_DSR | TIOCM_CAR | TIOCM_RI;
    const char hello[] = "RTS is on again\n";
    char text[sizeof hello] = "";
    int lines = 0;
    size_t early;

    need(ioctl(port, TIOCMGET, &lines) == 0, "TIOCMGET");
    check((lines & inputs) == (TIOCM_CTS | TIOCM_DSR | TIOCM_CAR), "CTS, DSR and DCD are on, RI is off");
    port_lines(false, TIOCM_RTS);
    printf("SAY %.*s\n", (int)sizeof hello - 2, hello);
    fflush(stdout);
    early = exchange(NULL, 0, (uint8_t *)text, sizeof text, 300);
    port_lines(true, TIOCM_RTS);
    exchange(NULL, 0, (uint8_t *)text, sizeof hello - 1, GREETING_MS);
    check(early == 0 && strcmp(text, hello) == 0, "the line is silent while RTS is off, and nothing is lost");
}

/* The host sees none of this; whatever leaks out spoils the next TAKE. */
static void check_loopback(void) {
    static const char text[] = "\xc8\xe1ll\xef, port";
    uint8_t in[sizeof text] = "";
    bool masked = true;
    int lines = 0;

    port_set(B115200, CS7);
    port_lines(true, LOOP);
    exchange((const uint8_t *)text, sizeof text, in, sizeof text, GREETING_MS);
    for (size_t i = 0; i < sizeof text; i++)
        masked = masked && in[i] == ((uint8_t)text[i] & 0x7F);
    check(masked, "loopback, words of 7 bits");
    port_set(B115200, CS8);
    exchange((const uint8_t *)text, sizeof text, in, sizeof text, GREETING_MS);
    check(memcmp(text, in, sizeof text) == 0, "loopback, words of 8 bits");
    port_lines(false, TIOCM_DTR);
    need(ioctl(port, TIOCMGET, &lines) == 0, "TIOCMGET");
    check((lines & (TIOCM_DSR | TIOCM_CTS)) == TIOCM_CTS, "loopback, DTR comes back as DSR and RTS as CTS");
    port_lines(true, TIOCM_DTR);
    port_lines(false, LOOP);
}

static void serial(void) {
    uint8_t config[256] = {0};
    char path[256];
    unsigned long long first = 0, last = 0, flags = 0;
    FILE *file;
    int fd = config_open();

    need(pread(fd, config, 64, 0) == 64, "configuration space");
    close(fd);
    check(sysfs_number(device_path, "subsystem_vendor") == 0x1234 && sysfs_number(device_path, "subsystem_device") == 0x0001,
          "subsystem 1234:0001");
    check(sysfs_number(device_path, "class") == 0x070002, "class 0x%06lx", sysfs_number(device_path, "class"));
    snprintf(path, sizeof path, "%s/resource", device_path);
    file = fopen(path, "r");
    need(file != NULL && fscanf(file, "%llx %llx %llx", &first, &last, &flags) == 3, path);
    fclose(file);
    check((config[0x10] & 3) == 1 && first != 0 && last - first == 7, "BAR0: 8 ports at 0x%llx", first);

    if (!check(port_bound(), "the driver `serial` has bound it, as %s", port_name))
        finish();
    snprintf(path, sizeof path, "/sys/class/tty/%s", port_name + strlen("/dev/"));
    check(sysfs_number(path, "type") == PORT_16550A, "the driver has found a 16550A (type %lu)", sysfs_number(path, "type"));
    port_open();
    check_greeting("Good morning, guest", "Good morning, host");
    check_modem_lines();
    check_loopback();
    check_both_ways(65536, 115200, 21);
    port_set(B9600, CS8);
    check_both_ways(960, 9600, 31);
    port_set(B57600, CS8);
    check_both_ways(4096, 57600, 41);
    close(port);

    check(sysfs_write("/sys/bus/pci/drivers/serial", "unbind", device_name) && !port_bound(), "the driver is unbound");
    check(sysfs_write("/sys/bus/pci/drivers/serial", "bind", device_name) && port_bound(), "and bound again, as %s", port_name);
    port_open();
    check_greeting("Welcome back", "Good to be here");
    check_both_ways(4096, 115200, 51);
    close(port);
}

static int write_stamp(uint32_t seed, size_t size) {
    uint8_t *memory = malloc(size);
    bool held;

    if (memory == NULL)
        return 1;
    stamp(memory, size, seed);
    held = fwrite(memory, 1, size, stdout) == size && fflush(stdout) == 0;
    free(memory);
    return held ? 0 : 1;
}

int main(int argc, char **argv) {
    static const char *const modes[] = {"plain", "vfio", "vfio-messages", "serial"};
    const char *mode = argc >= 2 ? argv[1] : "";
    bool known = false, linger;

    if (argc == 4 && strcmp(mode, "stamp") == 0)
        return write_stamp((uint32_t)strtoul(argv[2], NULL, 10), strtoul(argv[3], NULL, 10));
    serial_setup();
    say("guest program, mode %s", mode);
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        known = known || (argc == 2 && strcmp(mode, modes[i]) == 0);
    if (!known) {
        check(false, "usage: guest plain|vfio|vfio-messages|serial");
        finish();
    }
    linger = strcmp(ask("BOOT"), "busy") == 0;
    find_device(strcmp(mode, "serial") == 0 ? 0x1655 : 0xD3A1);
    if (strcmp(mode, "serial") == 0)
        serial();
    else if (strcmp(mode, "plain") == 0)
        linger ? plain_busy() : plain();
    else
        linger ? vfio_busy() : vfio(strcmp(mode, "vfio-messages") == 0);
    finish();
}
