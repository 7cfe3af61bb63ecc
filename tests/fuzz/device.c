/* SPDX-License-Identifier: MIT */
/*
 * A client that does what the input says, against one of the example devices from its start to its end: messages of all kinds
 * with descriptors of all kinds, any bytes, replies to the device's own requests, and departures. Afterwards no descriptor and
 * no byte of memory is left, and a bystander, a device in the same thread with a client of its own, is as it was.
 */
#include "tests/util.h"

#include "tests/fuzz/fuzz.h"

int fuzz_create(vfu_dev **out, const vfu_dev_desc *desc);
int fuzz_play(vfu_dev *dev);
int example_main(int argc, char **argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { FILE_PAGES = 16, KINDS = 8, OPERATIONS = 200 };

static rig bystander;
static input in;
static int kinds[KINDS], bystander_event;
static struct sockaddr_un address;
static socklen_t address_len;
static peer client;

static void open_bystander(void)
{
    vfu_dev_desc desc = rig_desc(&bystander);
    rig_create(&bystander, &desc);
    rig_connect(&bystander);
    greet(&bystander);
    bystander_event = event();
    ck_assert_int_eq(ask_irqs(&bystander, 0x24, VFU_PCI_IRQ_MSIX, 0, 1, NULL, &bystander_event, 1), 0);
    ck_assert_int_eq(ask_map(&bystander, 0, PAGE, RW, bystander.ram, 0), 0);
}

static void check_bystander(void)
{
    check_healthy(&bystander);
    ck_assert(mappings(bystander.dev) == 1);
    ck_assert(signals(bystander_event) == 0 && vfu_dev_raise(bystander.dev, VFU_PCI_IRQ_MSIX, 0) == 0);
    ck_assert(signals(bystander_event) == 1);
}

static void open_kinds(void)
{
    int pair[2];
    make_pair(pair);
    kinds[0] = memfd("fuzz-sealed", FILE_PAGES * PAGE, F_SEAL_SHRINK);
    kinds[1] = memfd("fuzz-open", FILE_PAGES * PAGE, 0);
    kinds[2] = event();
    kinds[3] = eventfd(0, EFD_CLOEXEC);
    kinds[4] = null_fd();
    kinds[5] = pair[0];
    kinds[6] = open("/", O_PATH | O_CLOEXEC);
    kinds[7] = pair[1];
}

/* ---- what the client sends --------------------------------------------------------------------------------------------- */

static void send_kinds(const void *bytes, size_t len, unsigned fd_count)
{
    int fds[20];
    for (unsigned i = 0; i < fd_count; i++)
        fds[i] = kinds[take(&in) % KINDS];
    if (client.sock >= 0 && len)
        send_some(client.sock, bytes, len, fds, fd_count);
}

/* A number that is rarely good, and often at an end of something. */
static uint64_t number(void)
{
    uint8_t how = take(&in);
    uint64_t n = take(&in);
    switch (how % 8) {
    case 0: return n;
    case 1: return n * PAGE;
    case 2: return n << 8 | take(&in);
    case 3: return UINT64_MAX - n;
    case 4: return UINT64_MAX - n * PAGE;
    case 5: return UINT64_C(1) << n % 64;
    case 6: return n * PAGE + take(&in) % 16;
    default: return take_wide(&in);
    }
}

/* Adds a little-endian field. */
static void field(uint8_t *to, size_t *len, uint64_t value, size_t width)
{
    memcpy(to + *len, &value, width);
    *len += width;
}

/* A message with a payload of the right form. */
static void send_message(void)
{
    static const uint8_t commands[] = {2, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 10, 10, 13, 15, 16, 16, 17, 18, 1};
    uint8_t bytes[16 + 512], cmd = commands[take(&in) % sizeof(commands)], flags = take(&in);
    unsigned fd_count = 0;
    size_t len = 16, extra = 0;
    switch (cmd) {
    case VFU_CMD_DMA_MAP:
        field(bytes, &len, 32, 4);
        field(bytes, &len, flags & 4 ? 3 : flags & 3, 4);
        field(bytes, &len, take(&in) % FILE_PAGES * (uint64_t)PAGE, 8);
        field(bytes, &len, flags & 8 ? number() : take(&in) % 32 * (uint64_t)PAGE, 8);
        field(bytes, &len, flags & 16 ? number() : (take(&in) % 8 + 1) * (uint64_t)PAGE, 8);
        fd_count = flags >> 5 & 1;
        break;
    case VFU_CMD_DMA_UNMAP:
        field(bytes, &len, 24, 4);
        field(bytes, &len, flags >> 6, 4);
        field(bytes, &len, flags & 1 ? number() : 0, 8);
        field(bytes, &len, flags & 2 ? number() : (uint64_t)PAGE * 32, 8);
        break;
    case VFU_CMD_DEVICE_SET_IRQS:
        field(bytes, &len, 20, 4);
        field(bytes, &len, flags & 1 ? 0x24 : take(&in), 4);
        field(bytes, &len, take(&in) % 6, 4);
        field(bytes, &len, flags >> 1 & 3, 4);
        extra = take(&in) % 5;
        field(bytes, &len, extra, 4);
        fd_count = flags & 8 ? (unsigned)extra : flags >> 4 & 1;
        break;
    case VFU_CMD_REGION_READ:
    case VFU_CMD_REGION_WRITE:
        field(bytes, &len, flags & 1 ? number() : take(&in), 8);
        field(bytes, &len, flags & 2 ? take(&in) % 10 : 0, 4);
        extra = flags & 4 ? 8 : flags & 8 ? take(&in) : 4;
        field(bytes, &len, extra, 4);
        extra = cmd == VFU_CMD_REGION_WRITE ? extra : 0;
        break;
    case VFU_CMD_REGION_WRITE_MULTI:
        field(bytes, &len, flags & 3, 8);
        for (unsigned i = 0; i < (flags & 3); i++) {
            field(bytes, &len, take(&in), 8);
            field(bytes, &len, take(&in) % 10, 4);
            field(bytes, &len, take(&in) % 9, 4);
            field(bytes, &len, number(), 8);
        }
        break;
    case VFU_CMD_DEVICE_FEATURE:
        field(bytes, &len, flags & 128 ? number() : 4096, 4);
        field(bytes, &len, (flags & 15) | (uint64_t)(flags >> 4 & 7) << 16, 4);
        extra = take(&in) % 48;
        break;
    case VFU_CMD_MIG_DATA_READ:
    case VFU_CMD_MIG_DATA_WRITE:
        field(bytes, &len, flags & 1 ? number() : 4096, 4);
        extra = take(&in);
        field(bytes, &len, extra, 4);
        extra = cmd == VFU_CMD_MIG_DATA_WRITE ? extra : 0;
        break;
    case VFU_CMD_DEVICE_RESET: break;
    default:
        field(bytes, &len, flags & 1 ? number() : 256, 4);
        field(bytes, &len, flags & 2 ? take(&in) : 0, 4);
        field(bytes, &len, take(&in), 4);
        extra = cmd == VFU_CMD_DEVICE_GET_REGION_INFO ? 20 : 4;
        break;
    }
    for (; extra; extra--)
        bytes[len++] = take(&in);
    vfu_wire_header header = {.id = 1, .cmd = cmd, .size = (uint32_t)len, .flags = flags == 0x5a ? VFU_HDR_NO_REPLY : 0};
    memcpy(bytes, &header, 16);
    send_kinds(bytes, len, fd_count);
}

/* A message of any payload; with whole, the size in its header is right. */
static void send_bytes(bool whole)
{
    uint8_t bytes[16 + 256];
    size_t len = take(&in);
    for (size_t i = 0; i < 16 + len; i++)
        bytes[i] = take(&in);
    uint32_t size = (uint32_t)(16 + len);
    if (whole)
        memcpy(bytes + 4, &size, 4);
    send_kinds(bytes, 16 + len, take(&in) % 18);
}

static void send_hello(void)
{
    static const char *const hellos[] = {
        "", "{\"capabilities\":{\"max_msg_fds\":16,\"write_multiple\":true,\"twin_socket\":{\"supported\":true}}}",
        "{\"capabilities\":{\"max_msg_fds\":1,\"max_data_xfer_size\":64}}"};
    const char *json = hellos[take(&in) % COUNT(hellos)];
    uint8_t bytes[160] = {0};
    size_t len = strlen(json) ? strlen(json) + 1 : 0;
    vfu_wire_header header = {.cmd = VFU_CMD_VERSION, .size = (uint32_t)(20 + len)};
    memcpy(bytes, &header, 16);
    memcpy(bytes + 20, json, len);
    send_kinds(bytes, 20 + len, 0);
}

/* Reads what the device says, and answers its requests: as they should be, or with what the input has. */
static void hear(bool well)
{
    for (unsigned i = 0; i < 40 && client.sock >= 0 && peer_receive(&client) == 1; i++) {
        static uint8_t bytes[32 + (128 << 10)];
        vfu_wire_header header = header_of(client.bytes);
        vfu_wire_dma_access access = {0, 0};
        if (header.flags & VFU_HDR_REPLY || (header.cmd != VFU_CMD_DMA_READ && header.cmd != VFU_CMD_DMA_WRITE))
            continue;
        memcpy(&access, client.bytes + 16, 16);
        header.flags = VFU_HDR_REPLY;
        header.size = 32 + (header.cmd == VFU_CMD_DMA_READ ? (uint32_t)access.count : 0);
        ck_assert(header.size <= sizeof(bytes));
        memset(bytes, 0, header.size);
        for (uint32_t at = 32; at < header.size && in.left; at++)
            bytes[at] = take(&in);
        uint8_t how = well ? 0 : take(&in);
        access.count -= how & 1;
        access.address += how >> 1 & 1;
        header.error = how >> 2 & 1;
        header.flags |= how >> 3 & 1 ? VFU_HDR_ERROR : 0;
        header.size -= how >> 4 & 1 ? 4 : how >> 5 & 1 ? 16 : 0;
        header.id = (uint16_t)(header.id ^ (how >> 6));
        memcpy(bytes, &header, 16);
        memcpy(bytes + 16, &access, 16);
        send_some(client.sock, bytes, header.size, NULL, 0);
    }
}

static void leave(vfu_dev *dev)
{
    peer_close(&client);
    client.sock = -1;
    settle(dev);
    ck_assert(mappings(dev) == 0);
}

int fuzz_play(vfu_dev *dev)
{
    client = (peer){.sock = connect_to(&address, address_len)};
    if (!(take(&in) & 1))
        send_hello();
    for (unsigned i = 0; in.left && i < OPERATIONS; i++) {
        switch (take(&in) % 16) {
        case 0: send_bytes(true); break;
        case 1: send_bytes(false); break;
        case 2: must(ftruncate(kinds[1], take(&in) % (FILE_PAGES + 1) * PAGE)); break;
        case 3:
            leave(dev);
            client = (peer){.sock = connect_to(&address, address_len)};
            send_hello();
            break;
        case 4: vfu_dev_poll(dev); break;
        case 5: must(eventfd_write(kinds[2], 1)); break;
        case 6: hear(false); break;
        case 7:
            settle(dev);
            hear(true);
            settle(dev);
            break;
        default: send_message(); break;
        }
    }
    settle(dev);
    leave(dev);
    return -ENOTCONN;
}

/* Small tables, so that a life is short, and some policy. */
int fuzz_create(vfu_dev **out, const vfu_dev_desc *given)
{
    vfu_dev_desc desc = *given;
    uint8_t policy = take(&in);
    desc.max_dma_maps = 64;
    desc.max_data_xfer_size = 1 << 16;
    desc.logger = (vfu_logger){.write = ignore_log, .level = VFU_LEVEL_TRACE};
    desc.twin_socket = policy & 1;
    desc.policy.map_exactly = policy & 2;
    desc.policy.complete_accesses = policy & 4;
    desc.policy.msix_masks = policy & 8;
    desc.policy.exact_unmap = policy & 16;
    return vfu_dev_create(out, &desc);
}

#ifndef FUZZ_ARGUMENTS
#define FUZZ_ARGUMENTS
#endif

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static char option[32];
    static const char *const words[] = {"example", option, FUZZ_ARGUMENTS};
    char *argv[COUNT(words) + 1] = {NULL};
    if (!bystander.dev)
        open_bystander();
    in = (input){data, size};
    state before = look();
    open_kinds();
    snprintf(option, sizeof(option), "--fd=%d", listener(&address, &address_len));
    memcpy(argv, words, sizeof(words));
    optind = 0; /* getopt_long begins anew */
    ck_assert(example_main((int)COUNT(words), argv) == 0);
    close_fds(kinds, KINDS);
    check_bystander();
    compare(before);
    return 0;
}
