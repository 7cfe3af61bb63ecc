/* SPDX-License-Identifier: MIT */
/*
 * The program that check-qemu and bench-nvme run inside a guest that has an NVMe disk: the kernel's own driver must have bound
 * it, and everything goes through that driver and its block device.
 *
 * The disk's first 64 MiB hold a file system. What lies behind is written in sectors that each say which sector they are and how
 * often it was written (stamp_sector), so that a sector that is lost, old, torn or in the wrong place is noticed.
 *
 * The lines that it says are those of guest.c, and these:
 *
 *     BOOT                    the host answers `all N S` or `busy N`, N is the last round that was flushed (0: none yet), S are
 *                             the seconds that the mixed I/O lasts; or `bench S`
 *     FLUSHED N               round N has been written and flushed: from now on no crash may lose it
 *     BUSY                    such rounds go on until the host answers, or kills the device or QEMU
 *     RESULT NAME NUMBER      bench: commands per second, or bytes per second for a NAME in -bytes
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <linux/aio_abi.h>
#include <linux/fs.h>

#include "guest.h"

enum {
    SECTOR = 512,
    KIB = 1024,
    MIB = 1 << 20,
    WORKERS = 2,        /* one for each processor, hence for each queue */
    DEPTH = 64,         /* the most commands that a worker has in flight */
    SMALL_ARENA = 4 * MIB,
    LARGE_ARENA = DEPTH * MIB
};

/* The disk's areas, in bytes: the file system, the rounds of busy(), and one of AREA for each worker */
#define FILES_SIZE ((uint64_t)64 * MIB)
#define KEPT_FIRST FILES_SIZE
#define KEPT_SIZE  ((uint64_t)4 * MIB)
#define AREA_FIRST (KEPT_FIRST + KEPT_SIZE)
#define AREA       ((uint64_t)72 * MIB)
#define DISK_SIZE  (AREA_FIRST + WORKERS * AREA)

/* What the generation of a sector may be beside the number of its write */
#define ZEROED  0u
#define ANY     UINT32_MAX

static const char disk_path[] = "/dev/nvme0n1";
static const char queue_path[] = "/sys/block/nvme0n1/queue";
static const char controller_path[] = "/sys/class/nvme/nvme0";
static int disk = -1;
static uint32_t block_size;

/* ---- Stamps --------------------------------------------------------------------------------------------------------------- */

enum { STAMP_WORDS = SECTOR / 8 };

static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static uint64_t random_below(uint64_t *state, uint64_t limit) {
    *state += 0x9E3779B97F4A7C15u;
    return mix(*state) % limit;
}

/* The sector's number, its generation, and words that follow from both. A buffer may lie at any address. */
static void stamp_sector(uint8_t *at, uint64_t number, uint32_t generation) {
    uint64_t words[STAMP_WORDS] = {number, generation}, word = mix(number << 32 ^ generation);

    for (size_t i = 2; i < STAMP_WORDS; i++)
        words[i] = word += 0x9E3779B97F4A7C15u;
    memcpy(at, words, sizeof words);
}

static bool sector_is(const uint8_t *at, uint64_t number, uint32_t generation) {
    uint8_t want[SECTOR] = {0};

    if (generation == ANY)
        return true;
    if (generation != ZEROED)
        stamp_sector(want, number, generation);
    return memcmp(at, want, sizeof want) == 0;
}

static void describe(char *text, size_t size, const uint8_t *at, uint64_t number, uint32_t generation) {
    uint64_t words[STAMP_WORDS];

    memcpy(words, at, sizeof words);
    snprintf(text, size, "sector %llu is not of generation %u: it says sector %llu, generation %llu, and is %s",
             (unsigned long long)number, generation, (unsigned long long)words[0], (unsigned long long)words[1],
             words[1] < ANY && sector_is(at, words[0], (uint32_t)words[1]) ? "whole" : "torn");
}

/* ---- Commands in flight --------------------------------------------------------------------------------------------------- */

struct slot {
    struct iocb command;
    uint8_t *buffer;
    uint64_t sector;
    uint32_t count;         /* of sectors, 0 for a flush */
    bool used;
};

/* A thread on a processor of its own, with an area of the disk of its own. */
struct worker {
    pthread_t thread;
    unsigned cpu;
    uint64_t first;         /* sector */
    uint64_t sectors;
    uint32_t *generation;   /* of each sector */
    uint32_t last_generation;
    uint64_t random;
    uint8_t *small;         /* SMALL_ARENA in pages of 4 KiB */
    uint8_t *large;         /* LARGE_ARENA in pages as large as the kernel has them */
    struct slot slots[DEPTH];
    uint64_t done;          /* commands */
    uint64_t bytes;
    char error[256];        /* the first thing that went wrong, or "" */
    uint64_t until;         /* for mixed I/O, in milliseconds() */
    /* The job at hand */
    uint32_t size;
    unsigned depth;
    unsigned written;       /* percentage of writes */
    uint64_t commands;
    bool skewed;            /* buffers begin in the middle of a page, and pages are not contiguous */
};

static struct worker workers[WORKERS];
static atomic_bool stop_workers;

static bool overlaps(const struct worker *w, uint64_t sector, uint32_t count) {
    for (unsigned i = 0; i < w->depth; i++) {
        const struct slot *s = &w->slots[i];

        if (s->used && sector < s->sector + s->count && s->sector < sector + count)
            return true;
    }
    return false;
}

/* A place where nothing is in flight; false if there seems to be none. */
static bool find_place(struct worker *w, uint32_t count, uint64_t *sector) {
    uint64_t align = (uint64_t)count * w->depth * 4 > w->sectors ? count : block_size / SECTOR;

    for (unsigned tries = 0; tries < 100; tries++) {
        *sector = w->first + random_below(&w->random, (w->sectors - count) / align + 1) * align;
        if (!overlaps(w, *sector, count))
            return true;
    }
    return false;
}

/* Fills in a command; its buffer holds the stamps if it writes. */
static bool prepare(struct worker *w, struct slot *s) {
    bool writes = random_below(&w->random, 100) < w->written;

    memset(&s->command, 0, sizeof s->command);
    s->command.aio_fildes = (uint32_t)disk;
    s->command.aio_data = (uint64_t)(s - w->slots);
    s->count = w->size / SECTOR;
    if (w->written > 0 && random_below(&w->random, 64) == 0) {
        s->command.aio_lio_opcode = IOCB_CMD_FDSYNC;
        s->count = 0;
    } else if (!find_place(w, s->count, &s->sector)) {
        return false;
    } else {
        s->command.aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
        s->command.aio_buf = (uint64_t)(uintptr_t)s->buffer;
        s->command.aio_nbytes = w->size;
        s->command.aio_offset = (int64_t)(s->sector * SECTOR);
        if (writes) {
            w->last_generation++;
            for (uint32_t i = 0; i < s->count; i++) {
                stamp_sector(s->buffer + (size_t)i * SECTOR, s->sector + i, w->last_generation);
                w->generation[s->sector + i - w->first] = w->last_generation;
            }
        } else {
            /* What a read leaves as it was must not look right. */
            for (uint32_t i = 0; i < s->count; i++)
                memset(s->buffer + (size_t)i * SECTOR, 0xA5, 16);
        }
    }
    s->used = true;
    return true;
}

static void conclude(struct worker *w, struct slot *s, int64_t result) {
    bool reads = s->command.aio_lio_opcode == IOCB_CMD_PREAD;

    s->used = false;
    w->done++;
    w->bytes += (uint64_t)s->count * SECTOR;
    if (w->error[0] != '\0')
        return;
    if (result != (int64_t)s->count * SECTOR) {
        snprintf(w->error, sizeof w->error, "a %s of %u bytes at sector %llu ended with %lld", s->count == 0 ? "flush"
                 : reads ? "read" : "write", s->count * SECTOR, (unsigned long long)s->sector, (long long)result);
        return;
    }
    for (uint32_t i = 0; reads && i < s->count; i++) {
        uint32_t generation = w->generation[s->sector + i - w->first];

        if (!sector_is(s->buffer + (size_t)i * SECTOR, s->sector + i, generation)) {
            describe(w->error, sizeof w->error, s->buffer + (size_t)i * SECTOR, s->sector + i, generation);
            return;
        }
    }
}

/* Keeps `depth` commands in flight until `commands` are done or an error was seen, and waits for the last of them. */
static void run_job(struct worker *w) {
    aio_context_t context = 0;
    uint64_t begun = 0;
    unsigned in_flight = 0;
    bool skewed = w->skewed && (uint64_t)(w->size + 4096) * w->depth <= SMALL_ARENA;
    size_t step = skewed ? w->size + 4096 : w->size;

    if (syscall(SYS_io_setup, w->depth, &context) != 0) {
        snprintf(w->error, sizeof w->error, "io_setup: %s", strerror(errno));
        return;
    }
    for (unsigned i = 0; i < w->depth; i++) {
        w->slots[i].used = false;
        w->slots[i].buffer = (skewed ? w->small + 516 : w->large) + i * step;
    }
    for (;;) {
        struct iocb *list[DEPTH];
        struct io_event events[DEPTH];
        long fresh = 0, got;

        for (unsigned i = 0; i < w->depth && begun < w->commands && w->error[0] == '\0'; i++) {
            if (w->slots[i].used || !prepare(w, &w->slots[i]))
                continue;
            list[fresh++] = &w->slots[i].command;
            begun++;
        }
        if (fresh > 0 && (got = syscall(SYS_io_submit, context, fresh, list)) != fresh) {
            snprintf(w->error, sizeof w->error, "io_submit took %ld of %ld commands: %s", got, fresh, strerror(errno));
            fresh = got > 0 ? got : 0;
        }
        in_flight += (unsigned)fresh;
        if (in_flight == 0)
            break;
        got = syscall(SYS_io_getevents, context, 1, (long)w->depth, events, NULL);
        for (long i = 0; i < got; i++)
            conclude(w, &w->slots[events[i].data], events[i].res);
        in_flight -= got > 0 ? (unsigned)got : 0;
    }
    syscall(SYS_io_destroy, context);
}

static void stay_on(unsigned cpu) {
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void *job_thread(void *argument) {
    struct worker *w = argument;

    stay_on(w->cpu);
    run_job(w);
    return NULL;
}

/* Jobs of any kind, one after the other. */
static void *mixed_thread(void *argument) {
    static const unsigned depths[] = {1, 2, 5, 16, 33, 64};
    struct worker *w = argument;

    stay_on(w->cpu);
    while (!atomic_load(&stop_workers) && milliseconds() < w->until && w->error[0] == '\0') {
        unsigned doublings = (unsigned)random_below(&w->random, 12);

        w->size = (uint32_t)SECTOR << doublings;
        if (w->size < block_size)
            w->size = block_size;
        /* Sizes between the powers of two as well. */
        if (w->size < MIB)
            w->size += (uint32_t)random_below(&w->random, w->size / block_size) * block_size;
        w->depth = depths[random_below(&w->random, sizeof depths / sizeof *depths)];
        w->written = 20 + (unsigned)random_below(&w->random, 60);
        w->commands = 8 + random_below(&w->random, 16 * MIB / w->size < 256 ? 16 * MIB / w->size : 256);
        w->skewed = random_below(&w->random, 2) == 0;
        run_job(w);
    }
    return NULL;
}

static uint8_t *arena(size_t size, int advice) {
    uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    need(memory != MAP_FAILED, "memory");
    madvise(memory, size, advice);
    memset(memory, 0xA5, size);
    return memory;
}

static void hire_workers(void) {
    for (unsigned i = 0; i < WORKERS; i++) {
        struct worker *w = &workers[i];

        w->cpu = i;
        w->first = (AREA_FIRST + i * AREA) / SECTOR;
        w->sectors = AREA / SECTOR;
        w->random = i + 1;
        w->generation = calloc(w->sectors, sizeof *w->generation);
        need(w->generation != NULL, "memory");
        for (uint64_t k = 0; k < w->sectors; k++)
            w->generation[k] = ANY;
        w->small = arena(SMALL_ARENA, MADV_NOHUGEPAGE);
        w->large = arena(LARGE_ARENA, MADV_HUGEPAGE);
    }
}

static void start_workers(void *(*function)(void *)) {
    for (unsigned i = 0; i < WORKERS; i++) {
        workers[i].done = 0;
        workers[i].bytes = 0;
        workers[i].error[0] = '\0';
        need(pthread_create(&workers[i].thread, NULL, function, &workers[i]) == 0, "a thread");
    }
}

/* Waits for them. Returns how many commands they have done; says and returns 0 if one went wrong. */
static uint64_t join_workers(uint64_t *bytes) {
    uint64_t done = 0;
    bool held = true;

    *bytes = 0;
    for (unsigned i = 0; i < WORKERS; i++) {
        pthread_join(workers[i].thread, NULL);
        done += workers[i].done;
        *bytes += workers[i].bytes;
        if (workers[i].error[0] != '\0') {
            say("processor %u: %s", i, workers[i].error);
            held = false;
        }
    }
    return held ? done : 0;
}

/* Every sector of the workers' areas, in reads of 256 KiB. */
static void check_areas(const char *when) {
    uint8_t *buffer = workers[0].large;
    uint64_t wrong = 0, known = 0;
    char first[256] = "";

    for (unsigned k = 0; k < WORKERS; k++) {
        const struct worker *w = &workers[k];

        for (uint64_t at = 0; at < w->sectors; at += 256 * KIB / SECTOR) {
            memset(buffer, 0xA5, 256 * KIB);
            if (pread(disk, buffer, 256 * KIB, (off_t)((w->first + at) * SECTOR)) != 256 * KIB && first[0] == '\0')
                snprintf(first, sizeof first, "read at sector %llu: %s", (unsigned long long)(w->first + at), strerror(errno));
            for (uint64_t i = 0; i < 256 * KIB / SECTOR; i++) {
                known += w->generation[at + i] != ANY;
                if (sector_is(buffer + i * SECTOR, w->first + at + i, w->generation[at + i]))
                    continue;
                if (wrong++ == 0 && first[0] == '\0')
                    describe(first, sizeof first, buffer + i * SECTOR, w->first + at + i, w->generation[at + i]);
            }
        }
    }
    check(wrong == 0 && first[0] == '\0' && known > 0, "%s: %llu sectors hold what was written last (%llu don't)", when,
          (unsigned long long)known, (unsigned long long)wrong);
    if (first[0] != '\0')
        say("%s", first);
}

/* ---- Rounds that survive -------------------------------------------------------------------------------------------------- */

enum { ROUND_PIECE = 16 * KIB, ROUND_DEPTH = 16 };

/* Writes the generation `round` to each sector of the area that is kept, piece by piece in any order, and flushes. */
static bool write_round(uint32_t round) {
    static uint8_t *buffer;
    uint32_t pieces = KEPT_SIZE / ROUND_PIECE, in_flight = 0;
    struct iocb commands[ROUND_DEPTH], *list[1];
    struct io_event event;
    aio_context_t context = 0;
    bool held;

    if (buffer == NULL)
        buffer = arena(ROUND_DEPTH * ROUND_PIECE, MADV_NOHUGEPAGE);
    held = syscall(SYS_io_setup, ROUND_DEPTH, &context) == 0;
    for (uint32_t i = 0; held && i < pieces + ROUND_DEPTH; i++) {
        uint32_t slot = i % ROUND_DEPTH;
        /* An odd factor visits each piece of a power of two once. */
        uint64_t first = (KEPT_FIRST + (uint64_t)((i * 37 + round) % pieces) * ROUND_PIECE) / SECTOR;

        if (in_flight == ROUND_DEPTH || (i >= pieces && in_flight > 0)) {
            held = syscall(SYS_io_getevents, context, 1, 1, &event, NULL) == 1 && event.res == ROUND_PIECE;
            slot = (uint32_t)event.data;
            in_flight--;
        }
        if (!held || i >= pieces)
            continue;
        for (uint32_t k = 0; k < ROUND_PIECE / SECTOR; k++)
            stamp_sector(buffer + slot * ROUND_PIECE + k * SECTOR, first + k, round);
        commands[slot] = (struct iocb){
            .aio_data = slot, .aio_fildes = (uint32_t)disk, .aio_lio_opcode = IOCB_CMD_PWRITE, .aio_nbytes = ROUND_PIECE,
            .aio_buf = (uint64_t)(uintptr_t)(buffer + slot * ROUND_PIECE), .aio_offset = (int64_t)(first * SECTOR)
        };
        list[0] = &commands[slot];
        held = syscall(SYS_io_submit, context, 1, list) == 1;
        in_flight++;
    }
    syscall(SYS_io_destroy, context);
    return held && fdatasync(disk) == 0;
}

/* Rounds that go on and on when everything stops: nothing that was flushed may be lost, nothing may be torn. */
static _Noreturn void busy(uint32_t flushed) {
    int ready[2];
    char c = 0;
    pid_t child;

    need(pipe(ready) == 0, "a pipe");
    fflush(stdout);
    child = fork();
    need(child >= 0, "a child process");
    if (child == 0) {
        for (uint32_t round = flushed + 1; write_round(round); round++) {
            printf("FLUSHED %u\n", round);
            fflush(stdout);
            if (round == flushed + 3 && write(ready[1], "r", 1) != 1)
                break;
        }
        _exit(1);
    }
    close(ready[1]);
    if (!check(read(ready[0], &c, 1) == 1, "three rounds are written and flushed, the next is under way"))
        finish();
    ask("BUSY");
    restart();
}

static void check_kept(uint32_t flushed) {
    uint8_t *buffer = arena(256 * KIB, MADV_NOHUGEPAGE);
    unsigned exact = 0, newer = 0, wrong = 0;
    char first[256] = "";

    for (uint64_t at = KEPT_FIRST; at < KEPT_FIRST + KEPT_SIZE; at += 256 * KIB) {
        need(pread(disk, buffer, 256 * KIB, (off_t)at) == 256 * KIB, "reading what was flushed");
        for (uint64_t i = 0; i < 256 * KIB / SECTOR; i++) {
            uint64_t number = at / SECTOR + i;
            uint8_t *sector = buffer + i * SECTOR;

            if (sector_is(sector, number, flushed))
                exact++;
            else if (sector_is(sector, number, flushed + 1))
                newer++;
            else if (wrong++ == 0)
                describe(first, sizeof first, sector, number, flushed);
        }
    }
    /* The round after the one that the host has heard of may be complete as well. */
    check(wrong == 0, "of round %u, which was flushed, %u sectors are as written, %u of the next round, %u wrong", flushed, exact,
          newer, wrong);
    if (wrong > 0)
        say("%s", first);
    munmap(buffer, 256 * KIB);
}

/* ---- The driver ----------------------------------------------------------------------------------------------------------- */

static char device_path[192];   /* of the PCI device */

static unsigned entries(const char *path) {
    DIR *directory = opendir(path);
    struct dirent *entry;
    unsigned count = 0;

    if (directory == NULL)
        return 0;
    while ((entry = readdir(directory)) != NULL)
        count += entry->d_name[0] != '.';
    closedir(directory);
    return count;
}

/* The interrupts that queue `queue` has raised. */
static unsigned long interrupts(unsigned queue) {
    FILE *file = fopen("/proc/interrupts", "r");
    char line[512], name[32];
    unsigned long total = 0;

    need(file != NULL, "/proc/interrupts");
    snprintf(name, sizeof name, "nvme0q%u\n", queue);
    while (fgets(line, sizeof line, file) != NULL) {
        char *at = strchr(line, ':'), *end;

        if (at == NULL || strstr(line, name) == NULL)
            continue;
        for (at++;; at = end) {
            unsigned long count = strtoul(at, &end, 10);

            if (end == at)
                break;
            total += count;
        }
    }
    fclose(file);
    return total;
}

static void open_disk(void) {
    uint64_t end = milliseconds() + 15000;
    int logical = 0;
    off_t size;

    while ((disk = open(disk_path, O_RDWR | O_DIRECT | O_CLOEXEC)) < 0 && milliseconds() < end)
        pause_ms(20);
    need(disk >= 0, disk_path);
    size = lseek(disk, 0, SEEK_END);
    need(ioctl(disk, BLKSSZGET, &logical) == 0, "the disk's block size");
    block_size = (uint32_t)logical;
    if (!check(size >= (off_t)DISK_SIZE && (block_size == 512 || block_size == 4096), "%s has %lld bytes in blocks of %u",
               disk_path, (long long)size, block_size))
        finish();
    /* A command each, as the checks have them. */
    sysfs_write(queue_path, "nomerges", "2");
}

static void identify(void) {
    char link[256] = "", path[256], model[64] = "", serial[64] = "", firmware[64] = "", cache[32] = "", state[32] = "";
    unsigned queues = entries("/sys/block/nvme0n1/mq");
    unsigned long largest;

    snprintf(path, sizeof path, "%s/device", controller_path);
    need(realpath(path, device_path) != NULL, path);
    snprintf(path, sizeof path, "%s/driver", device_path);
    need(readlink(path, link, sizeof link - 1) > 0, path);
    check(strstr(link, "/drivers/nvme") != NULL, "the driver `nvme` has bound %s", strrchr(device_path, '/') + 1);
    check(sysfs_number(device_path, "class") == 0x010802, "class 0x%06lx", sysfs_number(device_path, "class"));
    sysfs_read(controller_path, "model", model, sizeof model);
    sysfs_read(controller_path, "serial", serial, sizeof serial);
    sysfs_read(controller_path, "firmware_rev", firmware, sizeof firmware);
    sysfs_read(controller_path, "state", state, sizeof state);
    sysfs_read(queue_path, "write_cache", cache, sizeof cache);
    check(strcmp(state, "live") == 0 && model[0] != '\0', "controller \"%s\", serial \"%s\", firmware \"%s\" is %s", model,
          serial, firmware, state);
    check(queues == WORKERS, "%u queue pairs for I/O", queues);
    check(strcmp(cache, "write back") == 0, "the write cache is reported: %s", cache);
    largest = sysfs_number(queue_path, "max_hw_sectors_kb");
    check(largest >= 128, "one command moves up to %lu KiB", largest);
    snprintf(path, sizeof path, "%lu", largest < 1024 ? largest : 1024);
    check(sysfs_write(queue_path, "max_sectors_kb", path), "the kernel is told to use up to %s KiB", path);
}

static bool live_within(unsigned ms) {
    uint64_t end = milliseconds() + ms;
    char state[32] = "";

    do {
        if (sysfs_read(controller_path, "state", state, sizeof state) && strcmp(state, "live") == 0)
            return true;
        pause_ms(10);
    } while (milliseconds() < end);
    say("the controller is %s", state);
    return false;
}

/* Shutdown and a fresh start by the driver. */
static void check_rebind(void) {
    const char *name = strrchr(device_path, '/') + 1;

    close(disk);
    check(sysfs_write("/sys/bus/pci/drivers/nvme", "unbind", name) && access(disk_path, F_OK) != 0, "the driver is unbound");
    check(sysfs_write("/sys/bus/pci/drivers/nvme", "bind", name), "and bound again");
    open_disk();
    check(live_within(5000), "the controller is live again");
}

/* ---- A file system -------------------------------------------------------------------------------------------------------- */

enum { FILES = 512, FILE_LARGEST = 512 * KIB };
static const char mount_point[] = "/disk";

static int run(const char *const *arguments) {
    int status = -1;
    pid_t child;

    fflush(stdout);
    child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_RDWR);

        dup2(null, STDOUT_FILENO);
        execv(arguments[0], (char *const *)(uintptr_t)arguments);
        _exit(127);
    }
    need(child > 0 && waitpid(child, &status, 0) == child, "a child process");
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static size_t file_size(unsigned number) {
    return 1 + mix(number) % FILE_LARGEST;
}

static void file_fill(uint8_t *bytes, unsigned number) {
    for (size_t i = 0; i < FILE_LARGEST / SECTOR; i++)
        stamp_sector(bytes + i * SECTOR, i, number + 1);
}

/* Writes the files from `first` on that are not there until the disk is full; `sizes` tells how much each one got. */
static unsigned fill_files(uint8_t *bytes, size_t *sizes) {
    char path[64];
    unsigned made = 0;

    for (unsigned i = 0; i < FILES; i++) {
        ssize_t put = 0;
        size_t at = 0;
        int fd;

        if (sizes[i] > 0)
            continue;
        snprintf(path, sizeof path, "%s/%u", mount_point, i);
        fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        if (fd < 0)
            break;
        file_fill(bytes, i);
        while (at < file_size(i) && (put = write(fd, bytes + at, file_size(i) - at)) > 0)
            at += (size_t)put;
        sizes[i] = at;
        made++;
        if (fsync(fd) != 0)
            check(false, "fsync: %s", strerror(errno));
        close(fd);
        if (put < 0)
            break;
    }
    return made;
}

static void mount_disk(void) {
    need(mount(disk_path, mount_point, "ext4", MS_NOATIME, "discard,errors=continue") == 0, "mounting the file system");
}

/* The pages that were written are gone after this: what is read next comes from the disk. */
static void remount(void) {
    need(umount(mount_point) == 0, "unmounting the file system");
    need(ioctl(disk, BLKFLSBUF, 0) == 0, "BLKFLSBUF");
    mount_disk();
}

/* The first place where a file of `size` bytes differs; what lies there, and what lies there when it is read once more. */
static void say_difference(int fd, uint8_t *want, uint8_t *got, size_t size, ssize_t read_size, unsigned number) {
    char first[256], second[256];
    size_t at = 0;

    say("file %u: %zd of %zu bytes", number, read_size, size);
    while (at + SECTOR <= size && memcmp(want + at, got + at, SECTOR) == 0)
        at += SECTOR;
    if (read_size < 0 || at + SECTOR > size)
        return;
    describe(first, sizeof first, got + at, at / SECTOR, number + 1);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    if (pread(fd, got + at, SECTOR, (off_t)at) != SECTOR)
        return;
    describe(second, sizeof second, got + at, at / SECTOR, number + 1);
    say("file %u: %s; read once more: %s", number, first, second);
}

static void compare_files(uint8_t *bytes, uint8_t *space, const size_t *sizes, const char *when) {
    unsigned right = 0, wrong = 0;
    uint64_t total = 0;
    char path[64];

    for (unsigned i = 0; i < FILES; i++) {
        ssize_t got;
        int fd;

        if (sizes[i] == 0)
            continue;
        snprintf(path, sizeof path, "%s/%u", mount_point, i);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        file_fill(bytes, i);
        got = fd < 0 ? -1 : read(fd, space, FILE_LARGEST);
        if (got == (ssize_t)sizes[i] && memcmp(bytes, space, sizes[i]) == 0)
            right++;
        else if (wrong++ == 0)
            say_difference(fd, bytes, space, sizes[i], got, i);
        total += sizes[i];
        close(fd);
    }
    check(wrong == 0 && right > 0, "%s: %u files of %llu KiB, every byte right (%u files differ)", when, right,
          (unsigned long long)(total / KIB), wrong);
}

static void check_files(void) {
    const char *const mke2fs[] = {"/bin/busybox", "mke2fs", "-F", "-b", "4096", disk_path, "65536", NULL};
    uint8_t *bytes = arena(FILE_LARGEST, MADV_NORMAL), *space = arena(FILE_LARGEST, MADV_NORMAL);
    size_t sizes[FILES] = {0};
    unsigned made, freed = 0;
    char path[64];

    if (!check(run(mke2fs) == 0, "a file system is made"))
        return;
    /* Linux may otherwise write what mke2fs left in the cache after the file system has written the same block (6.12, 4 KiB). */
    need(fsync(disk) == 0 && ioctl(disk, BLKFLSBUF, 0) == 0, "BLKFLSBUF");
    mkdir(mount_point, 0700);
    mount_disk();
    made = fill_files(bytes, sizes);
    check(made > 100 && made < FILES, "it is mounted, and full with %u files", made);
    remount();
    compare_files(bytes, space, sizes, "mounted again");
    for (unsigned i = 0; i < FILES; i += 2) {
        snprintf(path, sizeof path, "%s/%u", mount_point, i);
        freed += sizes[i] > 0 && unlink(path) == 0;
        sizes[i] = 0;
    }
    sync();
    check(freed > 50, "every other file is removed, which deallocates its blocks");
    made = fill_files(bytes, sizes);
    check(made > 10, "and full again with %u more files", made);
    remount();
    compare_files(bytes, space, sizes, "mounted once more");
    check(umount(mount_point) == 0, "unmounted");
    munmap(bytes, FILE_LARGEST);
    munmap(space, FILE_LARGEST);
}

/* ---- Stamped I/O ---------------------------------------------------------------------------------------------------------- */

static void set_job(uint32_t size, unsigned depth, unsigned written, uint64_t commands, bool skewed) {
    for (unsigned i = 0; i < WORKERS; i++) {
        struct worker *w = &workers[i];

        w->size = size;
        w->depth = depth;
        w->written = written;
        w->commands = commands;
        w->skewed = skewed;
    }
}

/* Every sector gets a stamp, so that there is something to read from now on. */
static void fill_areas(void) {
    for (unsigned k = 0; k < WORKERS; k++) {
        struct worker *w = &workers[k];
        bool held = true;

        w->last_generation = 1;
        for (uint64_t at = 0; held && at < w->sectors; at += MIB / SECTOR) {
            for (uint64_t i = 0; i < MIB / SECTOR; i++) {
                stamp_sector(w->large + i * SECTOR, w->first + at + i, 1);
                w->generation[at + i] = 1;
            }
            held = pwrite(disk, w->large, MIB, (off_t)((w->first + at) * SECTOR)) == MIB;
        }
        check(held, "%u MiB for processor %u are written in commands of 1 MiB", (unsigned)(AREA / MIB), k);
    }
}

static void check_jobs(void) {
    static const uint32_t sizes[] = {512, 4 * KIB, 12 * KIB, 64 * KIB, 256 * KIB, MIB};
    static const unsigned depths[] = {1, 8, 64};
    unsigned long before[WORKERS];
    unsigned number = 0;

    for (unsigned i = 0; i < WORKERS; i++)
        before[i] = interrupts(i + 1);
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        for (size_t d = 0; d < sizeof depths / sizeof *depths; d++) {
            uint32_t size = sizes[s] < block_size ? block_size : sizes[s];
            uint64_t commands = 16 * MIB / size, done, bytes, begin = milliseconds();

            commands = commands > 300 ? 300 : commands < 24 ? 24 : commands;
            if (commands < depths[d] + 24)
                commands = depths[d] + 24;
            set_job(size, depths[d], 50, commands, number++ % 2 == 1);
            start_workers(job_thread);
            done = join_workers(&bytes);
            check(done == WORKERS * commands, "%u bytes at depth %u: %llu reads and writes on two processors, %llu ms", size,
                  depths[d], (unsigned long long)done, (unsigned long long)(milliseconds() - begin));
        }
    }
    for (unsigned i = 0; i < WORKERS; i++)
        check(interrupts(i + 1) > before[i], "queue pair %u has raised %lu interrupts", i + 1, interrupts(i + 1) - before[i]);
}

/* Zeroes and deallocated blocks where it was told so, and nowhere else. */
static void check_zeroes(void) {
    struct worker *w = &workers[0];
    uint64_t zeroes[2] = {w->first * SECTOR + 3 * MIB + block_size, 5 * MIB};
    uint64_t gone[2] = {w->first * SECTOR + 20 * MIB - block_size, 9 * MIB};

    check(ioctl(disk, BLKZEROOUT, zeroes) == 0, "5 MiB are written with zeroes");
    check(ioctl(disk, BLKDISCARD, gone) == 0, "9 MiB are deallocated");
    for (uint64_t i = 0; i < zeroes[1] / SECTOR; i++)
        w->generation[zeroes[0] / SECTOR - w->first + i] = ZEROED;
    for (uint64_t i = 0; i < gone[1] / SECTOR; i++)
        w->generation[gone[0] / SECTOR - w->first + i] = ANY;
    check_areas("after zeroes and deallocation");
}

/* The controller is reset while commands of all kinds are in flight: the driver does again what was cut off. */
static void check_resets(void) {
    uint64_t done, bytes;
    unsigned held = 0;

    atomic_store(&stop_workers, false);
    for (unsigned i = 0; i < WORKERS; i++)
        workers[i].until = UINT64_MAX;
    start_workers(mixed_thread);
    for (unsigned i = 0; i < 4; i++) {
        pause_ms(200 + 37 * i);
        held += sysfs_write(controller_path, "reset_controller", "1") && live_within(10000);
    }
    check(held == 4, "the controller is reset in mid-flight, 4 times");
    held = 0;
    for (unsigned i = 0; i < 3; i++) {
        pause_ms(200 + 37 * i);
        held += sysfs_write(device_path, "reset_method", "flr") && sysfs_write(device_path, "reset", "1") && live_within(10000);
    }
    check(held == 3, "a function-level reset in mid-flight, 3 times");
    pause_ms(200);
    atomic_store(&stop_workers, true);
    done = join_workers(&bytes);
    check(done > 0, "meanwhile %llu commands and %llu MiB, none failed", (unsigned long long)done,
          (unsigned long long)(bytes / MIB));
    check_areas("after the resets");
}

/* In the long run the controller is reset every half minute. */
static void check_mixed(unsigned seconds) {
    uint64_t begin = milliseconds(), next = begin + 30000, last = begin + (uint64_t)seconds * 1000, done, bytes;
    unsigned resets = 0;

    atomic_store(&stop_workers, false);
    for (unsigned i = 0; i < WORKERS; i++)
        workers[i].until = last;
    start_workers(mixed_thread);
    for (; milliseconds() < last; pause_ms(100)) {
        if (milliseconds() < next)
            continue;
        next += 30000;
        resets += sysfs_write(controller_path, "reset_controller", "1") && live_within(10000);
        say("%llu s of mixed I/O", (unsigned long long)(milliseconds() - begin) / 1000);
    }
    done = join_workers(&bytes);
    check(done > 0, "%u s of mixed I/O with %u resets: %llu commands, %llu MiB, every stamp right", seconds, resets,
          (unsigned long long)done, (unsigned long long)(bytes / MIB));
}

static void all(uint32_t flushed, unsigned seconds) {
    identify();
    if (flushed > 0)
        check_kept(flushed);
    check_files();
    hire_workers();
    fill_areas();
    check_jobs();
    check_zeroes();
    check_resets();
    check_mixed(seconds);
    check_rebind();
    check_areas("after a shutdown of the controller");
}

/* ---- Speed ---------------------------------------------------------------------------------------------------------------- */

static double microseconds(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

/* Commands per second at random places. */
static double measure(uint16_t opcode, uint32_t size, unsigned depth, unsigned seconds) {
    static uint8_t *buffers;
    aio_context_t context = 0;
    struct iocb commands[DEPTH], *list[DEPTH];
    struct io_event events[DEPTH];
    uint64_t state = size + depth, places = AREA / size, done = 0;
    double begin, end;
    long fresh = 0;

    if (buffers == NULL)
        buffers = arena(LARGE_ARENA / 16, MADV_NOHUGEPAGE);
    need(syscall(SYS_io_setup, depth, &context) == 0, "io_setup");
    for (unsigned i = 0; i < depth; i++) {
        commands[i] = (struct iocb){
            .aio_data = i, .aio_fildes = (uint32_t)disk, .aio_lio_opcode = opcode, .aio_nbytes = size,
            .aio_buf = (uint64_t)(uintptr_t)(buffers + (size_t)i * size)
        };
        list[fresh++] = &commands[i];
    }
    begin = microseconds();
    do {
        for (long i = 0; i < fresh; i++)
            list[i]->aio_offset = (int64_t)(AREA_FIRST + random_below(&state, places) * size);
        need(fresh == 0 || syscall(SYS_io_submit, context, fresh, list) == fresh, "io_submit");
        fresh = syscall(SYS_io_getevents, context, 1, (long)depth, events, NULL);
        need(fresh > 0, "io_getevents");
        for (long i = 0; i < fresh; i++) {
            need(events[i].res == (int64_t)size, "a command");
            list[i] = &commands[events[i].data];
        }
        done += (uint64_t)fresh;
        end = microseconds();
    } while (end - begin < seconds * 1e6);
    /* Waits for those in flight. */
    syscall(SYS_io_destroy, context);
    return (double)done * 1e6 / (end - begin);
}

static void bench(unsigned seconds) {
    static const struct {
        const char *name;
        uint16_t opcode;
        uint32_t size;
        unsigned depth;
    } list[] = {
        {"read-4k-1", IOCB_CMD_PREAD, 4 * KIB, 1},
        {"read-4k-32", IOCB_CMD_PREAD, 4 * KIB, 32},
        {"read-64k-32", IOCB_CMD_PREAD, 64 * KIB, 32},
        {"write-4k-1", IOCB_CMD_PWRITE, 4 * KIB, 1},
        {"write-4k-32", IOCB_CMD_PWRITE, 4 * KIB, 32},
        {"write-64k-32", IOCB_CMD_PWRITE, 64 * KIB, 32},
    };

    stay_on(0);
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        printf("RESULT %s %.0f\n", list[i].name, measure(list[i].opcode, list[i].size, list[i].depth, seconds));
    check(true, "measured");
}

int main(int argc, char **argv) {
    char word[16] = "";
    unsigned flushed = 0, seconds = 0;

    serial_setup();
    say("guest program, %s", argc == 2 ? argv[1] : "an NVMe disk");
    need(sscanf(ask("BOOT"), "%15s %u %u", word, &flushed, &seconds) >= 2, "the host's answer");
    open_disk();
    if (strcmp(word, "busy") == 0)
        busy(flushed);
    else if (strcmp(word, "bench") == 0)
        bench(flushed);
    else
        all(flushed, seconds);
    finish();
}
