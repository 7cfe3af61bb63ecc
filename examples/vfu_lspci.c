/* SPDX-License-Identifier: MIT */
/*
 * vfu_lspci - prints a vfio-user device as `lspci -vvv` prints a real one
 *
 *     cc -std=c11 -O2 -I. examples/vfu_lspci.c -o vfu_lspci -pthread
 *     ./vfu_lspci --socket-path=/tmp/engine.sock
 *
 * The configuration space is decoded by lspci itself where that is installed, else plainly by this program. Behind it comes what
 * lspci can't know: sizes of regions, areas that can be mapped, interrupts, and what the server said about itself in VERSION.
 * Nothing is written to the device. Status 0 when everything could be asked, 1 when not, 2 for wrong arguments.
 */
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include <getopt.h>

enum {
    CONFIG_MAX = 4096,
    LISTED_MAX = 256, /* regions and interrupts that are asked for, whatever number the server says */
    AREAS_MAX = 64,   /* areas of one region that are printed */
    CAP_PM = 0x01,
    CAP_MSI = 0x05,
    CAP_VENDOR = 0x09,
    CAP_EXPRESS = 0x10,
    CAP_MSIX = 0x11
};

typedef struct device {
    vfu_client *client;
    vfu_wire_device_info info;
    uint8_t config[CONFIG_MAX];
    uint32_t config_size; /* bytes; 0: there is none */
    unsigned failures;
} device;

typedef struct flag {
    uint32_t bit;
    const char *name;
} flag;

#define END_OF_FLAGS \
    { \
        0, NULL \
    }

/* ---- printing ----------------------------------------------------------------------------------------------------------- */

static uint32_t word(const device *d, uint32_t at)
{
    return at + 2 <= CONFIG_MAX ? d->config[at] | (uint32_t)d->config[at + 1] << 8 : 0;
}

static uint32_t dword(const device *d, uint32_t at) { return word(d, at) | word(d, at + 2) << 16; }

/* All of them with + or -, as lspci does. */
static void print_signs(const flag *flags, uint32_t value)
{
    for (; flags->name; flags++)
        printf(" %s%c", flags->name, value & flags->bit ? '+' : '-');
    printf("\n");
}

/* Those that are set, and what has no name as a number. */
static void print_set(const flag *flags, uint32_t value)
{
    for (; flags->name; flags++) {
        if (value & flags->bit)
            printf(" %s", flags->name);
        value &= ~flags->bit;
    }
    if (value)
        printf(" 0x%x", value);
}

static const char *size_text(uint64_t size)
{
    static const char units[] = " KMGTPE";
    static char text[40];
    unsigned unit = 0;
    while (unit < 6 && size && size % 1024 == 0) {
        size /= 1024;
        unit++;
    }
    snprintf(text, sizeof(text), unit ? "%llu %ciB" : "%llu bytes", (unsigned long long)size, units[unit]);
    return text;
}

static void print_hex(FILE *out, const device *d)
{
    for (uint32_t at = 0; at < d->config_size; at += 16) {
        fprintf(out, "%02x:", at);
        for (uint32_t i = at; i < at + 16 && i < d->config_size; i++)
            fprintf(out, " %02x", d->config[i]);
        fprintf(out, "\n");
    }
}

/* A request that failed. */
static void complain(device *d, const char *what, uint32_t index, int err)
{
    fflush(stdout);
    fprintf(stderr, "vfu_lspci: %s %u: %s (%s)\n", what, index, vfu_errno_name(err), strerror(-err));
    d->failures++;
}

/* ---- the configuration space, without lspci ----------------------------------------------------------------------------- */

static const char *capability_name(uint8_t id)
{
    static const char *const names[] = {
        "Null",
        "Power Management",
        "AGP",
        "Vital Product Data",
        "Slot ID",
        "MSI",
        "CompactPCI hot swap",
        "PCI-X",
        "HyperTransport",
        "Vendor Specific Information",
        "Debug port",
        "CompactPCI resource control",
        "Hot-plug",
        "Subsystem",
        "AGP 8x",
        "Secure device",
        "Express",
        "MSI-X",
        "SATA",
        "PCI Advanced Features",
        "Enhanced Allocation",
        "Flattening Portal Bridge",
    };
    return id < sizeof(names) / sizeof(names[0]) ? names[id] : "unknown";
}

static const char *extended_name(uint16_t id)
{
    static const char *const names[] = {
        [0x01] = "Advanced Error Reporting",
        [0x02] = "Virtual Channel",
        [0x03] = "Device Serial Number",
        [0x04] = "Power Budgeting",
        [0x05] = "Root Complex Link Declaration",
        [0x06] = "Root Complex Internal Link",
        [0x07] = "Root Complex Event Collector",
        [0x08] = "Multi-Function Virtual Channel",
        [0x09] = "Virtual Channel",
        [0x0a] = "Root Complex Register Block",
        [0x0b] = "Vendor Specific Information",
        [0x0d] = "Access Control Services",
        [0x0e] = "Alternative Routing-ID Interpretation",
        [0x0f] = "Address Translation Service",
        [0x10] = "Single Root I/O Virtualization",
        [0x11] = "Multi-Root I/O Virtualization",
        [0x12] = "Multicast",
        [0x13] = "Page Request Interface",
        [0x15] = "Resizable BAR",
        [0x16] = "Dynamic Power Allocation",
        [0x17] = "TPH Requester",
        [0x18] = "Latency Tolerance Reporting",
        [0x19] = "Secondary PCI Express",
        [0x1b] = "Process Address Space ID",
        [0x1d] = "Downstream Port Containment",
        [0x1e] = "L1 PM Substates",
        [0x1f] = "Precision Time Measurement",
        [0x23] = "Designated Vendor-Specific",
        [0x25] = "Data Link Feature",
        [0x26] = "Physical Layer 16.0 GT/s",
        [0x27] = "Lane Margining at the Receiver",
        [0x2a] = "Physical Layer 32.0 GT/s",
        [0x2e] = "Data Object Exchange",
    };
    return id < sizeof(names) / sizeof(names[0]) && names[id] ? names[id] : "unknown";
}

static void print_capability(const device *d, uint8_t at)
{
    static const char *const express_types[] = {"Endpoint",        "Legacy Endpoint",    "type 2",
                                                "type 3",          "Root Port",          "Upstream Port",
                                                "Downstream Port", "PCIe to PCI bridge", "PCI to PCIe bridge"};
    uint8_t id = d->config[at];
    uint32_t control = word(d, at + 2u);
    printf("\tCapabilities: [%02x] %s", at, capability_name(id));
    switch (id) {
    case CAP_PM:
        printf(" version %u\n\t\tStatus: D%u NoSoftRst%c PME-Enable%c\n", control & 7, word(d, at + 4u) & 3,
               word(d, at + 4u) & 8 ? '+' : '-', word(d, at + 4u) & 0x100 ? '+' : '-');
        break;
    case CAP_MSI:
        printf(": Enable%c Count=%u/%u Maskable%c 64bit%c\n", control & 1 ? '+' : '-', 1u << (control >> 4 & 7),
               1u << (control >> 1 & 7), control & 0x100 ? '+' : '-', control & 0x80 ? '+' : '-');
        break;
    case CAP_VENDOR: printf(": Len=%02x\n", d->config[at + 2u]); break;
    case CAP_EXPRESS:
        printf(" (v%u) %s\n\t\tDevCap: FLReset%c\n", control & 15,
               (control >> 4 & 15) < 9 ? express_types[control >> 4 & 15] : "type unknown",
               dword(d, at + 4u) & 0x10000000 ? '+' : '-');
        break;
    case CAP_MSIX:
        printf(": Enable%c Count=%u Masked%c\n", control & 0x8000 ? '+' : '-', (control & 0x7ff) + 1,
               control & 0x4000 ? '+' : '-');
        printf("\t\tVector table: BAR=%u offset=%08x\n\t\tPBA: BAR=%u offset=%08x\n", dword(d, at + 4u) & 7,
               dword(d, at + 4u) & ~7u, dword(d, at + 8u) & 7, dword(d, at + 8u) & ~7u);
        break;
    default: printf(id < 0x16 ? "\n" : " (0x%02x)\n", id);
    }
}

static void print_capabilities(const device *d)
{
    bool seen[256] = {false};
    if (!(word(d, 0x06) & 0x10))
        return;
    for (uint8_t at = d->config[0x34] & 0xfc; at; at = d->config[at + 1u] & 0xfc) {
        if (at < 0x40 || seen[at]) {
            printf("\tCapabilities: [%02x] the list is broken: %s\n", at,
                   seen[at] ? "it is a ring" : "it points into the header");
            return;
        }
        seen[at] = true;
        print_capability(d, at);
    }
}

static void print_extended(const device *d)
{
    bool seen[CONFIG_MAX / 4] = {false};
    for (uint32_t at = 0x100; at >= 0x100 && at + 4 <= d->config_size && !seen[at / 4]; at = dword(d, at) >> 20 & 0xffc) {
        uint32_t header = dword(d, at);
        if (!header || header == UINT32_MAX)
            return;
        seen[at / 4] = true;
        printf("\tCapabilities: [%03x v%u] %s", at, header >> 16 & 15, extended_name((uint16_t)header));
        if ((header & 0xffff) == 3)
            printf(" %08x-%08x", dword(d, at + 8), dword(d, at + 4));
        printf("\n");
    }
}

static const char *bar_kind(uint32_t bar)
{
    if (bar & 1)
        return "";
    return (bar & 6) == 4 ? (bar & 8 ? " (64-bit, prefetchable)" : " (64-bit, non-prefetchable)")
                          : (bar & 8 ? " (32-bit, prefetchable)" : " (32-bit, non-prefetchable)");
}

static void print_plainly(const device *d)
{
    static const flag control[] = {{0x01, "I/O"},     {0x02, "Mem"},      {0x04, "BusMaster"}, {0x08, "SpecCycle"},
                                   {0x10, "MemWINV"}, {0x20, "VGASnoop"}, {0x40, "ParErr"},    {0x80, "Stepping"},
                                   {0x100, "SERR"},   {0x200, "FastB2B"}, {0x400, "DisINTx"},  END_OF_FLAGS};
    static const flag status[] = {{0x10, "Cap"},      {0x20, "66MHz"},     {0x80, "FastB2B"},   {0x100, "ParErr"},
                                  {0x800, ">TAbort"}, {0x1000, "<TAbort"}, {0x2000, "<MAbort"}, {0x4000, ">SERR"},
                                  {0x8000, "<PERR"},  {0x08, "INTx"},      END_OF_FLAGS};
    printf("00:00.0 Class %04x: Device %04x:%04x (rev %02x) (prog-if %02x)\n", word(d, 0x0a), word(d, 0x00), word(d, 0x02),
           d->config[0x08], d->config[0x09]);
    if (d->config[0x0e] & 0x7f)
        printf("\tHeader type %02x: only its first 64 bytes mean the same as an endpoint's\n", d->config[0x0e] & 0x7f);
    else
        printf("\tSubsystem: %04x:%04x\n", word(d, 0x2c), word(d, 0x2e));
    printf("\tControl:");
    print_signs(control, word(d, 0x04));
    printf("\tStatus:");
    print_signs(status, word(d, 0x06));
    if (d->config[0x3d])
        printf("\tInterrupt: pin %c routed to IRQ %u\n", 'A' + (d->config[0x3d] - 1) % 4, d->config[0x3c]);
    for (uint32_t i = 0; !(d->config[0x0e] & 0x7f) && i < 6; i++) {
        uint32_t bar = dword(d, 0x10 + 4 * i);
        bool wide = (bar & 7) == 4 && i < 5;
        uint64_t address = bar & (bar & 1 ? ~3u : ~15u);
        vfu_client_region region;
        int err = vfu_client_region_info(d->client, i, &region);
        if (!err && region.fd >= 0)
            close(region.fd);
        if (wide)
            address |= (uint64_t)dword(d, 0x14 + 4 * i) << 32;
        if (!err && region.size)
            printf("\tRegion %u: %s at %08llx%s [size=%s]\n", i, bar & 1 ? "I/O ports" : "Memory", (unsigned long long)address,
                   bar_kind(bar), size_text(region.size));
        i += wide;
    }
    print_capabilities(d);
    print_extended(d);
    printf("\n");
}

/* ---- the configuration space, with lspci -------------------------------------------------------------------------------- */

/* Hands a dump to lspci, whose output is ours. False: it isn't there, or can't make anything of it. */
static bool print_by_lspci(const device *d)
{
    if (system("command -v lspci >/dev/null 2>&1") != 0)
        return false;
    fflush(stdout);
    FILE *lspci = popen("lspci -nn -vvv -F /dev/stdin 2>/dev/null", "w");
    if (!lspci)
        return false;
    fprintf(lspci, "00:00.0 vfio-user\n"); /* a slot is needed; the rest of the line isn't read */
    print_hex(lspci, d);
    fprintf(lspci, "\n");
    return pclose(lspci) == 0;
}

/* Reads all of it, in pieces of 4 bytes where a server doesn't take it in one. */
static int read_config(device *d)
{
    vfu_client_region region;
    int err = vfu_client_region_info(d->client, VFU_PCI_REGION_CONFIG, &region);
    if (err)
        return err;
    if (region.fd >= 0)
        close(region.fd);
    if (region.size < 64)
        return -ENODEV;
    d->config_size = region.size < CONFIG_MAX ? (uint32_t)region.size & ~3u : CONFIG_MAX;
    err = vfu_client_region_read(d->client, VFU_PCI_REGION_CONFIG, 0, d->config, d->config_size);
    for (uint32_t at = 0; err && vfu_client_fd(d->client) >= 0 && at < d->config_size; at += 4) {
        int one = vfu_client_region_read(d->client, VFU_PCI_REGION_CONFIG, at, d->config + at, 4);
        if (one && at < 64)
            return one;
        if (one)
            d->config_size = at; /* what follows isn't there */
    }
    return vfu_client_fd(d->client) >= 0 ? 0 : err;
}

/* ---- what lspci can't know ---------------------------------------------------------------------------------------------- */

static const char *region_name(const device *d, uint32_t index)
{
    static const char *const names[] = {"BAR0", "BAR1", "BAR2", "BAR3", "BAR4", "BAR5", "ROM", "CONFIG", "VGA"};
    return index < 9 && d->info.flags & VFU_DEVICE_INFO_PCI ? names[index] : "own";
}

/* What stands behind the size of a region: areas and type. The reply is borrowed. */
static void print_region_caps(const vfu_msg *reply)
{
    vfu_region_cap cap = {0};
    vfu_wire_sparse_area area;
    vfu_wire_cap_type type;
    uint32_t count;
    bool whole = (reply->u.region_info.flags & VFU_REGION_INFO_MMAP) != 0;
    while (vfu_msg_next_cap(reply, &cap)) {
        if (vfu_region_cap_areas(&cap, &count) == 0) {
            whole = false;
            for (uint32_t i = 0; i < count && i < AREAS_MAX && vfu_region_cap_area(&cap, i, &area) == 0; i++)
                printf("\t\tmappable: [0x%llx, 0x%llx), in the file at 0x%llx\n", (unsigned long long)area.offset,
                       (unsigned long long)(area.offset + area.size),
                       (unsigned long long)(reply->u.region_info.offset + area.offset));
            if (count > AREAS_MAX)
                printf("\t\tand %u more areas\n", count - AREAS_MAX);
        } else if (vfu_region_cap_type(&cap, &type) == 0) {
            printf("\t\ttype 0x%x, subtype 0x%x\n", type.type, type.subtype);
        } else {
            printf("\t\tcapability %u, version %u, %u bytes\n", cap.id, cap.version, cap.data_len);
        }
    }
    if (whole)
        printf("\t\tmappable: all of it, in the file at 0x%llx\n", (unsigned long long)reply->u.region_info.offset);
}

/* The general form of vfu_client_region_info: it has the types and any number of areas, too. */
static int ask_region(device *d, uint32_t index, vfu_msg *reply)
{
    uint32_t argsz = sizeof(vfu_wire_region_info);
    for (unsigned tries = 0;; tries++) { /* the second time with the size that the first reply announced */
        vfu_msg request;
        int fd;
        vfu_msg_init(&request, 0, VFU_CMD_DEVICE_GET_REGION_INFO);
        request.u.region_info.argsz = argsz;
        request.u.region_info.index = index;
        int err = vfu_client_call(d->client, &request, NULL, 0, reply, &fd, 1);
        if (fd >= 0)
            close(fd);
        if (err || tries || reply->u.region_info.argsz <= argsz)
            return err;
        argsz = reply->u.region_info.argsz < 65536 ? reply->u.region_info.argsz : 65536;
    }
}

static void print_regions(device *d)
{
    static const flag flags[] = {{VFU_REGION_INFO_READ, "read"},
                                 {VFU_REGION_INFO_WRITE, "write"},
                                 {VFU_REGION_INFO_MMAP, "mmap"},
                                 END_OF_FLAGS};
    printf("Regions: %u\n", d->info.num_regions);
    for (uint32_t i = 0; i < d->info.num_regions && i < LISTED_MAX; i++) {
        vfu_msg reply;
        int err = ask_region(d, i, &reply);
        if (err) {
            complain(d, "region", i, err);
            if (vfu_client_fd(d->client) < 0)
                return;
            continue;
        }
        if (!reply.u.region_info.size)
            continue;
        printf("\t%u %s: %s,", i, region_name(d, i), size_text(reply.u.region_info.size));
        if (i < 6 && d->config_size) /* lspci leaves a BAR without an address away */
            printf(" %s%s,", dword(d, 0x10 + 4 * i) & 1 ? "I/O ports" : "memory", bar_kind(dword(d, 0x10 + 4 * i)));
        print_set(flags, reply.u.region_info.flags & ~VFU_REGION_INFO_CAPS);
        printf("\n");
        print_region_caps(&reply);
    }
}

static void print_interrupts(device *d)
{
    static const char *const names[] = {"INTx", "MSI", "MSI-X", "ERR", "REQ"};
    static const flag flags[] = {{VFU_IRQ_INFO_EVENTFD, "eventfd"},
                                 {VFU_IRQ_INFO_MASKABLE, "maskable"},
                                 {VFU_IRQ_INFO_AUTOMASKED, "automasked"},
                                 {VFU_IRQ_INFO_NORESIZE, "noresize"},
                                 END_OF_FLAGS};
    printf("Interrupts: %u\n", d->info.num_irqs);
    for (uint32_t i = 0; i < d->info.num_irqs && i < LISTED_MAX; i++) {
        vfu_wire_irq_info irq;
        int err = vfu_client_irq_info(d->client, i, &irq);
        if (err) {
            complain(d, "interrupt", i, err);
            if (vfu_client_fd(d->client) < 0)
                return;
            continue;
        }
        if (!irq.count)
            continue;
        printf("\t%u %s: %u,", i, i < 5 && d->info.flags & VFU_DEVICE_INFO_PCI ? names[i] : "own", irq.count);
        print_set(flags, irq.flags);
        printf("\n");
    }
}

static void print_number(const vfu_caps *caps, uint32_t bit, const char *name, uint64_t value, bool hex)
{
    const char *said = caps->present & bit ? "" : " (not said: the default)";
    if (hex)
        printf("\t%s: 0x%llx%s\n", name, (unsigned long long)value, said);
    else
        printf("\t%s: %llu%s\n", name, (unsigned long long)value, said);
}

static void print_negotiated(const device *d)
{
    const vfu_caps *caps = vfu_client_caps(d->client);
    printf("Server's capabilities:\n");
    print_number(caps, VFU_CAPS_MAX_MSG_FDS, "max_msg_fds", caps->max_msg_fds, false);
    print_number(caps, VFU_CAPS_MAX_DATA_XFER_SIZE, "max_data_xfer_size", caps->max_data_xfer_size, false);
    print_number(caps, VFU_CAPS_MAX_DMA_MAPS, "max_dma_maps", caps->max_dma_maps, false);
    print_number(caps, VFU_CAPS_PGSIZES, "pgsizes", caps->pgsizes, true);
    printf("\twrite_multiple: %s\n", caps->write_multiple ? "yes" : "no");
    printf("\ttwin_socket: %s\n", caps->twin_socket ? "yes" : "no");
    if (caps->migration)
        print_number(caps, VFU_CAPS_MIGRATION, "migration.pgsize", caps->migration_pgsize, true);
}

/* Migration, and descriptors that take writes of regions: last, because the oldest servers don't know the questions. */
static void print_extras(device *d)
{
    static const flag modes[] = {{VFU_MIG_STOP_COPY, "stop-copy"},
                                 {VFU_MIG_P2P, "p2p"},
                                 {VFU_MIG_PRE_COPY, "pre-copy"},
                                 END_OF_FLAGS};
    uint64_t flags;
    printf("Migration:");
    if (vfu_client_mig_flags(d->client, &flags) == 0)
        print_set(modes, (uint32_t)flags);
    else
        printf(" no");
    printf("\n");
    for (uint32_t i = 0; i < d->info.num_regions && i < LISTED_MAX && vfu_client_fd(d->client) >= 0; i++) {
        static const char *const types[] = {"ioeventfd", "ioregionfd", "ioeventfd with shared memory"};
        vfu_client_io_fd io[AREAS_MAX];
        int fds[VFU_FDS_MAX];
        int count = vfu_client_io_fds(d->client, i, io, AREAS_MAX, fds);
        for (unsigned k = 0; k < VFU_FDS_MAX; k++)
            if (fds[k] >= 0)
                close(fds[k]);
        for (int k = 0; k < count && k < AREAS_MAX; k++)
            printf("%s of region %u: offset 0x%llx, %llu bytes\n", io[k].type < 3 ? types[io[k].type] : "descriptor", i,
                   (unsigned long long)io[k].offset, (unsigned long long)io[k].size);
    }
}

/* ------------------------------------------------------------------------------------------------------------------------- */

static int usage(const char *path, FILE *out)
{
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    fprintf(out,
            "usage: %s --socket-path=PATH [-x] [--plain]\n"
            "Prints a vfio-user device as lspci -vvv does, then its regions, interrupts and\n"
            "capabilities.\n"
            "  --socket-path=PATH  the device's UNIX socket\n"
            "  -x                  print the bytes of the configuration space, too\n"
            "  --plain             don't ask lspci to decode it\n"
            "  --help              print this\n"
            "Status: 0, 1 when the device doesn't answer, 2 for wrong arguments.\n"
            "example: %s --socket-path=/tmp/engine.sock\n",
            name, name);
    return out == stdout ? 0 : 2;
}

static void print_device(device *d, bool plain, bool hex)
{
    static const flag flags[] = {{VFU_DEVICE_INFO_RESET, "reset"}, {VFU_DEVICE_INFO_PCI, "PCI"}, END_OF_FLAGS};
    if (d->info.flags & VFU_DEVICE_INFO_PCI) {
        int err = read_config(d);
        if (err)
            complain(d, "configuration space, region", VFU_PCI_REGION_CONFIG, err);
        else if (plain || !print_by_lspci(d))
            print_plainly(d);
        if (!err && hex) {
            print_hex(stdout, d);
            printf("\n");
        }
    }
    printf("Device:");
    print_set(flags, d->info.flags);
    printf("\n");
    print_regions(d);
    if (vfu_client_fd(d->client) >= 0)
        print_interrupts(d);
    print_negotiated(d);
    if (vfu_client_fd(d->client) >= 0)
        print_extras(d);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"socket-path", required_argument, NULL, 's'},
        {"plain", no_argument, NULL, 'p'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    static device d;
    const char *path = NULL;
    bool hex = false, plain = false;
    int option;
    while ((option = getopt_long(argc, argv, "x", options, NULL)) != -1) {
        switch (option) {
        case 's': path = optarg; break;
        case 'x': hex = true; break;
        case 'p': plain = true; break;
        case 'h': return usage(argv[0], stdout);
        default: return usage(argv[0], stderr);
        }
    }
    if (optind != argc || !path)
        return usage(argv[0], stderr);
    signal(SIGPIPE, SIG_IGN); /* an lspci that ends early is no reason to end */
    int err = vfu_client_connect(&d.client, path, NULL);
    if (!err)
        err = vfu_client_info(d.client, &d.info);
    if (err)
        fprintf(stderr, "vfu_lspci: %s: %s (%s)\n", path, vfu_errno_name(err), strerror(-err));
    else
        print_device(&d, plain, hex);
    vfu_client_destroy(d.client);
    return err || d.failures || fflush(stdout) ? 1 : 0;
}
