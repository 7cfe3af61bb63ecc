/* SPDX-License-Identifier: MIT */
/*
 * dma_engine - a PCI device that copies, fills and sums its client's memory
 *
 *     cc -std=c11 -O2 -I. examples/dma_engine.c -o dma_engine -pthread
 *     ./dma_engine --socket-path=/tmp/engine.sock
 *
 * It shows a whole device: registers, device RAM that the client maps, DMA through the IOMMU, DMA by message, INTx and MSI-X.
 *
 * A command travels through this file from top to bottom: a write to COMMAND starts it (registers), `work` does it, one
 * repetition at a time, after that write was answered (work), `finish` tells the driver. Memory that is mapped here is
 * reached through the IOMMU at once; memory that only messages reach is moved in chunks, and `chunk_done` goes on when a
 * reply has come.
 */
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include "program.h"

enum { RAM_SIZE = 64 << 10, LEN_MAX = 16 << 20, CHUNK = 128 << 10, PAGE = 4096 };
enum { BAR_REGISTERS = 0, BAR_RAM = 2, BAR_MSIX = 4 };
enum { MAGIC = 0x31414D44, VERSION = 1 };
enum command { COPY = 1, FILL = 2, SUM = 3, TO_RAM = 4, FROM_RAM = 5 };
enum status { IDLE = 0, BUSY = 1, DONE = 2, FAILED = 3 };

/* The registers, in the layout that the client sees. */
typedef struct registers {
    uint32_t magic;     /* 0x00 */
    uint32_t version;   /* 0x04 */
    uint64_t src;       /* 0x08 IOVA, or an offset in device RAM */
    uint64_t dst;       /* 0x10 likewise */
    uint64_t len;       /* 0x18 bytes */
    uint64_t pattern;   /* 0x20 what FILL repeats */
    uint32_t repeat;    /* 0x28 how often, 0 counts as 1 */
    uint32_t notify;    /* 0x2c 0: no interrupt; 1 + v: vector v */
    uint32_t command;   /* 0x30 write-only */
    uint32_t status;    /* 0x34 */
    uint32_t error;     /* 0x38 errno of the first failure */
    uint32_t reserved;  /* 0x3c */
    uint64_t fault;     /* 0x40 first IOVA that could not be accessed */
    uint64_t result;    /* 0x48 of SUM */
    uint64_t completed; /* 0x50 repetitions done */
} registers;

typedef struct engine {
    vfu_dev *dev;
    registers regs;
    uint8_t *ram;
    uint32_t rounds_left; /* repetitions of the command at hand */

    /* a repetition that needs messages: bytes [done, done + chunk) are under way */
    vfu_dma dma;
    uint8_t *buffer; /* CHUNK bytes */
    uint64_t done, chunk, sum;
    bool writing; /* the chunk was read and is being written */

    /* migration */
    bool intx;            /* the line's level */
    uint64_t stop_ticket; /* the client waits for the repetition at hand to end; 0: it doesn't */
    bool stop_and_save;   /* and wants to read the state then */
    uint8_t *stream;      /* STREAM_MAX bytes: what is saved or restored */
    size_t stream_len, stream_read;
    uint8_t *copied; /* RAM_SIZE bytes: device RAM as it was saved while the device ran */
} engine;

/* ---- finishing ---------------------------------------------------------------------------------------------------------- */

static void set_intx(engine *e, bool level)
{
    e->intx = level;
    vfu_dev_set_intx(e->dev, level);
}

static void save_rest(engine *e, bool after_pre_copy);

/* The device has come to rest between two repetitions: that is what a client that stops it waits for. */
static void rested(engine *e)
{
    uint64_t ticket = e->stop_ticket;
    e->stop_ticket = 0;
    if (!ticket)
        return;
    if (e->stop_and_save)
        save_rest(e, true);
    vfu_dev_complete(e->dev, ticket, 0, NULL, 0);
}

static void notify(engine *e)
{
    if (!e->regs.notify)
        return;
    if (vfu_pci_msix_enabled(vfu_dev_pci(e->dev)))
        vfu_dev_raise(e->dev, VFU_PCI_IRQ_MSIX, e->regs.notify - 1);
    else
        set_intx(e, true);
}

static void finish(engine *e, int error, uint64_t fault)
{
    e->rounds_left = 0;
    e->regs.error = (uint32_t)-error;
    e->regs.fault = error == -EINVAL ? 0 : fault;
    e->regs.status = error ? FAILED : DONE;
    notify(e);
    rested(e);
}

/* One repetition is done. */
static void round_done(engine *e)
{
    e->regs.completed++;
    if (--e->rounds_left) {
        vfu_dev_want_work(e->dev);
        rested(e);
    } else {
        finish(e, 0, 0);
    }
}

/* ---- by message, chunk by chunk ----------------------------------------------------------------------------------------- */

static void next_chunk(engine *e);

/* The address of the chunk on one side. */
static uint64_t chunk_at(const engine *e, uint64_t start)
{
    bool backwards = e->regs.command == COPY && e->regs.dst > e->regs.src && e->regs.dst - e->regs.src < e->regs.len;
    return backwards ? start + (e->regs.len - e->done - e->chunk) : start + e->done; /* as memmove */
}

static void chunk_done(engine *e, int result)
{
    if (result) {
        finish(e, result, e->dma.fault);
        return;
    }
    if (e->regs.command == SUM)
        for (uint64_t i = 0; i < e->chunk; i++)
            e->sum += e->buffer[i];
    if (e->regs.command == TO_RAM)
        memcpy(e->ram + e->regs.dst + e->done, e->buffer, (size_t)e->chunk);
    bool written = e->writing || e->regs.command == SUM || e->regs.command == TO_RAM;
    e->writing = !written;
    e->done += written ? e->chunk : 0;
    next_chunk(e);
}

static void dma_done(vfu_dma *dma, int result) { chunk_done(dma->user, result); }

/* Moves the chunk in one direction. */
static void move_chunk(engine *e)
{
    e->dma = (vfu_dma){
        .iova = chunk_at(e, e->writing ? e->regs.dst : e->regs.src),
        .buf = e->buffer,
        .len = (size_t)e->chunk,
        .to_client = e->writing,
        .done = dma_done,
        .user = e,
    };
    int result = vfu_dev_dma(e->dev, &e->dma);
    if (result <= 0)
        chunk_done(e, result);
}

static void next_chunk(engine *e)
{
    if (e->done == e->regs.len) {
        if (e->regs.command == SUM)
            e->regs.result = e->sum;
        round_done(e);
        return;
    }
    if (!e->writing)
        e->chunk = e->regs.len - e->done < CHUNK ? e->regs.len - e->done : CHUNK;
    if (e->regs.command == FILL || e->regs.command == FROM_RAM) { /* the source is here */
        e->writing = true;
        for (size_t i = 0; e->regs.command == FILL && i < e->chunk; i++) /* CHUNK is a multiple of the pattern's length */
            e->buffer[i] = ((uint8_t *)&e->regs.pattern)[i % 8];
        if (e->regs.command == FROM_RAM)
            memcpy(e->buffer, e->ram + e->regs.src + e->done, (size_t)e->chunk);
    }
    move_chunk(e);
}

/* ---- work --------------------------------------------------------------------------------------------------------------- */

static bool reads_memory(uint32_t command) { return command == COPY || command == SUM || command == TO_RAM; }
static bool writes_memory(uint32_t command) { return command == COPY || command == FILL || command == FROM_RAM; }

static bool in_ram(uint64_t offset, uint64_t len) { return len <= RAM_SIZE && offset <= RAM_SIZE - len; }

/* Is it a command that could be done at all? */
static bool is_valid(const registers *r)
{
    return r->command >= COPY && r->command <= FROM_RAM && r->len && r->len <= LEN_MAX &&
           (!reads_memory(r->command) || r->len - 1 <= UINT64_MAX - r->src) &&
           (!writes_memory(r->command) || r->len - 1 <= UINT64_MAX - r->dst) &&
           (r->command != TO_RAM || in_ram(r->dst, r->len)) && (r->command != FROM_RAM || in_ram(r->src, r->len));
}

/* Does any byte of the range, all of which is mapped, need messages? */
static bool needs_messages(engine *e, uint64_t iova, uint64_t len)
{
    vfu_iommu_mapping mapping;
    for (uint64_t last = iova + (len - 1); vfu_iommu_next(vfu_dev_iommu(e->dev), iova, &mapping);
         iova = mapping.iova + mapping.size) {
        if (mapping.io)
            return true;
        if (mapping.iova + (mapping.size - 1) >= last)
            return false;
    }
    return false;
}

static int sum(engine *e)
{
    vfu_iommu_reader *reader = vfu_dev_reader(e->dev);
    uint64_t total = 0;
    int err = 0;
    for (uint64_t done = 0, part; done < e->regs.len && !err; done += part) {
        part = e->regs.len - done < CHUNK ? e->regs.len - done : CHUNK;
        err = vfu_iommu_read(reader, e->regs.src + done, e->buffer, (size_t)part);
        for (uint64_t i = 0; i < part && !err; i++)
            total += e->buffer[i];
    }
    if (!err)
        e->regs.result = total;
    return err;
}

/* One repetition, all of it in memory that is mapped here. */
static int do_round(engine *e)
{
    vfu_iommu_reader *reader = vfu_dev_reader(e->dev);
    const registers *r = &e->regs;
    switch (r->command) {
    case COPY: return vfu_iommu_copy(reader, r->dst, r->src, r->len);
    case FILL: return vfu_iommu_fill(reader, r->dst, r->len, &r->pattern, sizeof(r->pattern));
    case SUM: return sum(e);
    case TO_RAM: return vfu_iommu_read(reader, r->src, e->ram + r->dst, (size_t)r->len);
    default: return vfu_iommu_write(reader, r->dst, e->ram + r->src, (size_t)r->len);
    }
}

/* The source, then the destination, against the table as it is now. */
static int check(engine *e)
{
    vfu_iommu_reader *reader = vfu_dev_reader(e->dev);
    int err = 0;
    if (reads_memory(e->regs.command))
        err = vfu_iommu_probe(reader, e->regs.src, e->regs.len, VFU_IOMMU_READ);
    if (!err && writes_memory(e->regs.command))
        err = vfu_iommu_probe(reader, e->regs.dst, e->regs.len, VFU_IOMMU_WRITE);
    return err;
}

/* Callback: starts the next repetition. */
static bool work(void *ctx)
{
    engine *e = ctx;
    if (e->regs.status != BUSY || e->dma.active || e->stop_ticket)
        return false;
    int err = is_valid(&e->regs) ? check(e) : -EINVAL;
    if (err) {
        finish(e, err, vfu_iommu_last_fault(vfu_dev_reader(e->dev))->iova);
        return false;
    }
    if ((reads_memory(e->regs.command) && needs_messages(e, e->regs.src, e->regs.len)) ||
        (writes_memory(e->regs.command) && needs_messages(e, e->regs.dst, e->regs.len))) {
        e->done = e->sum = 0;
        e->writing = false;
        next_chunk(e);
        return false;
    }
    err = do_round(e);
    if (err)
        finish(e, err, vfu_iommu_last_fault(vfu_dev_reader(e->dev))->iova);
    else
        round_done(e);
    return false;
}

/* ---- registers ---------------------------------------------------------------------------------------------------------- */

static void start(engine *e, uint32_t command)
{
    set_intx(e, false);
    e->regs.command = command;
    e->regs.error = 0;
    e->regs.fault = 0;
    e->regs.status = BUSY;
    e->rounds_left = e->regs.repeat ? e->regs.repeat : 1;
    vfu_dev_want_work(e->dev);
}

/* Writes one 4-byte register. */
static void write_register(engine *e, uint32_t offset, const uint8_t *value)
{
    bool writable = offset >= offsetof(registers, src) && offset < offsetof(registers, command);
    if (e->regs.status == BUSY)
        return;
    if (writable) {
        memcpy((uint8_t *)&e->regs + offset, value, 4);
    } else if (offset == offsetof(registers, command)) {
        uint32_t command;
        memcpy(&command, value, 4);
        start(e, command);
    }
}

/* Reads one 4-byte register. */
static void read_register(engine *e, uint32_t offset, uint8_t *value)
{
    if (offset == offsetof(registers, command) || offset >= sizeof(registers))
        memset(value, 0, 4);
    else
        memcpy(value, (uint8_t *)&e->regs + offset, 4);
    if (offset == offsetof(registers, status) && e->regs.status != BUSY)
        set_intx(e, false);
}

static bool is_register_access(uint64_t offset, size_t len) { return (len == 4 || len == 8) && offset % len == 0; }

static int region_read(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    engine *e = ctx;
    memset(buf, 0, len);
    if (region == BAR_RAM)
        memcpy(buf, e->ram + offset, len);
    else if (region == BAR_REGISTERS && is_register_access(offset, len))
        for (size_t at = 0; at < len; at += 4)
            read_register(e, (uint32_t)(offset + at), (uint8_t *)buf + at);
    return 0;
}

static int region_write(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    engine *e = ctx;
    if (region == BAR_RAM)
        memcpy(e->ram + offset, buf, len);
    else if (region == BAR_REGISTERS && is_register_access(offset, len))
        for (size_t at = 0; at < len; at += 4)
            write_register(e, (uint32_t)(offset + at), (const uint8_t *)buf + at);
    return 0;
}

/* ---- reset -------------------------------------------------------------------------------------------------------------- */

static void stop(engine *e)
{
    vfu_dev_dma_cancel(e->dev, &e->dma);
    e->rounds_left = 0;
    e->dma = (vfu_dma){0};
    e->stop_ticket = 0;
    e->stream_len = e->stream_read = 0;
    e->intx = false;
    e->regs = (registers){.magic = MAGIC, .version = VERSION};
}

static void reset(void *ctx, vfu_reset_kind kind)
{
    engine *e = ctx;
    (void)kind;
    stop(e);
    memset(e->ram, 0, RAM_SIZE);
}

static void disconnected(void *ctx) { stop(ctx); }

/* Does [first, last] have a part of the len > 0 bytes at iova? Then *fault is its first address. */
static bool overlaps(uint64_t first, uint64_t last, uint64_t iova, uint64_t len, uint64_t *fault)
{
    *fault = first > iova ? first : iova;
    return first <= iova + (len - 1) && last >= iova;
}

/* The client takes memory away: a transfer by message that has a part in it ends, whichever end is being moved. */
static void dma_unmapped(void *ctx, const vfu_iommu_mapping *mapping)
{
    engine *e = ctx;
    const registers *r = &e->regs;
    uint64_t last = mapping->iova + (mapping->size - 1), fault;
    if (!e->dma.active)
        return;
    if ((reads_memory(r->command) && overlaps(mapping->iova, last, r->src, r->len, &fault)) ||
        (writes_memory(r->command) && overlaps(mapping->iova, last, r->dst, r->len, &fault))) {
        vfu_dev_dma_cancel(e->dev, &e->dma);
        finish(e, -ENOENT, fault);
    }
}

/* ---- migration ------------------------------------------------------------------------------------------------------------
 *
 * The stream is records: pages of device RAM, some of them twice, and at its end the registers. While the device still runs
 * all pages are saved; when it has stopped, those that have changed since. */

enum { RECORD_PAGE = 0x45474150, RECORD_REGISTERS = 0x53474552, FORMAT = 1 };
enum { PAGES = RAM_SIZE / PAGE, STREAM_MAX = 2 * PAGES * (PAGE + 8) + 4096 };

typedef struct saved_registers {
    uint32_t record, rounds_left;
    registers regs;
    uint32_t intx, format; /* FORMAT */
    uint64_t sum;          /* of all bytes before it */
} saved_registers;

/* FNV-1a: finds what was damaged on its way, not what somebody made up. */
static uint64_t checksum(const uint8_t *bytes, size_t len)
{
    uint64_t sum = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < len; i++)
        sum = (sum ^ bytes[i]) * UINT64_C(0x100000001b3);
    return sum;
}

static void save(engine *e, const void *data, size_t len)
{
    memcpy(e->stream + e->stream_len, data, len); /* STREAM_MAX is enough for every page twice */
    e->stream_len += len;
}

static void save_page(engine *e, uint32_t page)
{
    uint32_t head[2] = {RECORD_PAGE, page};
    save(e, head, sizeof(head));
    memcpy(e->copied + page * PAGE, e->ram + page * PAGE, PAGE); /* the client may be writing to it */
    save(e, e->copied + page * PAGE, PAGE);
}

static void save_rest(engine *e, bool after_pre_copy)
{
    saved_registers last = {.record = RECORD_REGISTERS, .rounds_left = e->rounds_left, .regs = e->regs, .intx = e->intx};
    for (uint32_t page = 0; page < PAGES; page++)
        if (!after_pre_copy || memcmp(e->copied + page * PAGE, e->ram + page * PAGE, PAGE))
            save_page(e, page);
    last.format = FORMAT;
    save(e, &last, offsetof(saved_registers, sum));
    last.sum = checksum(e->stream, e->stream_len);
    save(e, &last.sum, sizeof(last.sum));
}

/* Takes what was written. Nothing of it counts before all of it was found good. */
static int restore(engine *e)
{
    saved_registers last;
    uint32_t head[2];
    size_t at = 0;
    memset(e->copied, 0, RAM_SIZE);
    while (e->stream_len - at >= sizeof(head) + PAGE) {
        memcpy(head, e->stream + at, sizeof(head));
        if (head[0] != RECORD_PAGE || head[1] >= PAGES)
            return -EINVAL;
        memcpy(e->copied + head[1] * PAGE, e->stream + at + sizeof(head), PAGE);
        at += sizeof(head) + PAGE;
    }
    if (e->stream_len - at != sizeof(last))
        return -EINVAL;
    memcpy(&last, e->stream + at, sizeof(last));
    if (last.record != RECORD_REGISTERS || last.format != FORMAT ||
        last.sum != checksum(e->stream, e->stream_len - sizeof(last.sum)))
        return -EINVAL;
    if (last.regs.magic != MAGIC || last.regs.version != VERSION || last.regs.status > FAILED ||
        (last.regs.status == BUSY) != (last.rounds_left > 0))
        return -EINVAL;
    memcpy(e->ram, e->copied, RAM_SIZE);
    e->regs = last.regs;
    e->rounds_left = last.rounds_left;
    set_intx(e, last.intx != 0);
    return 0;
}

static int change(void *ctx, vfu_mig_state from, vfu_mig_state to)
{
    engine *e = ctx;
    int err = from == VFU_MIG_STATE_RESUMING ? restore(e) : 0;
    bool stops = to == VFU_MIG_STATE_STOP_COPY || (to == VFU_MIG_STATE_STOP && from == VFU_MIG_STATE_RUNNING);
    if (err)
        return err;
    if (stops && e->dma.active) { /* a repetition by message is half done */
        e->stop_ticket = vfu_dev_ticket(e->dev);
        e->stop_and_save = to == VFU_MIG_STATE_STOP_COPY;
        return VFU_PENDING;
    }
    if (to == VFU_MIG_STATE_STOP_COPY)
        save_rest(e, from == VFU_MIG_STATE_PRE_COPY);
    else
        e->stream_len = e->stream_read = 0;
    for (uint32_t page = 0; to == VFU_MIG_STATE_PRE_COPY && page < PAGES; page++)
        save_page(e, page);
    if (to == VFU_MIG_STATE_RUNNING && e->regs.status == BUSY)
        vfu_dev_want_work(e->dev);
    return 0;
}

static int64_t migration_read(void *ctx, void *buf, size_t len)
{
    engine *e = ctx;
    size_t left = e->stream_len - e->stream_read, part = len < left ? len : left;
    memcpy(buf, e->stream + e->stream_read, part);
    e->stream_read += part;
    return (int64_t)part;
}

static int migration_write(void *ctx, const void *buf, size_t len)
{
    engine *e = ctx;
    if (len > STREAM_MAX - e->stream_len)
        return -ENOSPC;
    save(e, buf, len);
    return 0;
}

/* ---- the program -------------------------------------------------------------------------------------------------------- */

/* SIGUSR1: every mapping, for people and tests. */
static void print_table(vfu_iommu *iommu)
{
    vfu_iommu_mapping m;
    unsigned count = 0;
    fprintf(stderr, "table begin\n");
    for (uint64_t at = 0; vfu_iommu_next(iommu, at, &m);) {
        count++;
        fprintf(stderr, "map 0x%016llx 0x%016llx %c%c\n", (unsigned long long)m.iova, (unsigned long long)(m.iova + (m.size - 1)),
                m.prot & VFU_IOMMU_READ ? 'r' : '-', m.prot & VFU_IOMMU_WRITE ? 'w' : '-');
        at = m.iova + m.size;
        if (!at)
            break;
    }
    fprintf(stderr, "table end %u\n", count);
}

static int make_ram(engine *e)
{
    int fd = (int)syscall(SYS_memfd_create, "dma_engine", 3u); /* MFD_CLOEXEC | MFD_ALLOW_SEALING */
    if (fd < 0 || ftruncate(fd, RAM_SIZE) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        return -errno;
    e->ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    e->buffer = malloc(CHUNK);
    e->stream = malloc(STREAM_MAX);
    e->copied = malloc(RAM_SIZE);
    return e->ram == MAP_FAILED || !e->buffer || !e->stream || !e->copied ? -ENOMEM : fd;
}

int main(int argc, char **argv)
{
    bool no_mmap = false;
    const program_option own[] = {
        {"no-mmap", NULL, "never map the client's memory: all DMA by message; SIGUSR1 prints what is mapped", .flag = &no_mmap},
        {0},
    };
    program p = {.usage = "[--verbose] [--no-mmap] [--sandbox]"};
    if (!program_options(&p, own, argc, argv))
        return program_usage(&p);

    static engine e;
    int ram_fd = make_ram(&e);
    if (ram_fd < 0) {
        fprintf(stderr, "%s: no device RAM: %s\n", p.name, strerror(-ram_fd));
        return 1;
    }
    e.regs = (registers){.magic = MAGIC, .version = VERSION};
    vfu_wire_sparse_area area = {.offset = PAGE, .size = RAM_SIZE - PAGE};
    vfu_region_share share = {.fd = ram_fd, .areas = &area, .area_count = 1};
    vfu_pci_vendor_cap vendor = {.data = "vfu dma", .len = 7};
    vfu_dev_desc desc = {
        .pci =
            {
                .vendor = 0x1234,
                .device = 0xd3a1,
                .subsystem_vendor = 0x1234,
                .subsystem = 0x0001,
                .class_code = 0x088000,
                .revision = 1,
                .interrupt_pin = 1,
                .bar = {{.size = PAGE}, {0}, {.size = RAM_SIZE, .kind = VFU_BAR_MEM64}, {0}, {.size = PAGE}},
                .pm = true,
                .express = true,
                .flr = true,
                .msix = {.vectors = 4, .table_bar = BAR_MSIX, .pba_bar = BAR_MSIX, .table_offset = 0x000, .pba_offset = 0x800},
                .vendor_caps = &vendor,
                .vendor_cap_count = 1,
            },
        .share = {[BAR_RAM] = &share},
        .ctx = &e,
        .callbacks =
            {
                .region_read = region_read,
                .region_write = region_write,
                .reset = reset,
                .disconnected = disconnected,
                .dma_unmapped = dma_unmapped,
                .work = work,
            },
        .migration = {.pre_copy = true, .change = change, .read = migration_read, .write = migration_write},
        .policy = {.no_mmap = no_mmap},
        .logger = {.level = p.verbose ? VFU_LEVEL_TRACE : VFU_LEVEL_WARNING},
    };
    int err = vfu_dev_create(&e.dev, &desc);
    if (!err)
        err = program_open(&p, e.dev, SIGUSR1);
    if (!err && p.sandbox)
        err = sandbox_enter();
    while (!err && !program_ends) {
        if (atomic_exchange(&program_asked, false))
            print_table(vfu_dev_iommu(e.dev));
        err = vfu_dev_run(e.dev);
    }
    vfu_dev_destroy(e.dev);
    munmap(e.ram, RAM_SIZE);
    close(ram_fd);
    free(e.buffer);
    free(e.stream);
    free(e.copied);
    return program_end(&p, err);
}
