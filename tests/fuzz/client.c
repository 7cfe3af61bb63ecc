/* SPDX-License-Identifier: MIT */
/*
 * A server that says what the input says, and a client that calls it. All of it, with its end, is in the socket before the client
 * begins, so each call ends with what it got. Afterwards nothing is left, and memory beside the client's is as it was.
 */
#define VFU_IMPLEMENTATION
#include "tests/util.h"

#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { CALLS = 12, REPLY_MAX = 400 };
static const uint8_t commands[CALLS] = {VFU_CMD_DEVICE_GET_INFO,     VFU_CMD_DEVICE_GET_REGION_INFO,
                                        VFU_CMD_DEVICE_GET_IRQ_INFO, VFU_CMD_DMA_MAP,
                                        VFU_CMD_REGION_READ,         VFU_CMD_REGION_WRITE,
                                        VFU_CMD_DEVICE_SET_IRQS,     VFU_CMD_DMA_UNMAP,
                                        VFU_CMD_DEVICE_RESET,        VFU_CMD_DEVICE_GET_REGION_IO_FDS,
                                        VFU_CMD_DEVICE_FEATURE,      VFU_CMD_MIG_DATA_READ};
static input in;
static uint8_t memory[2 * PAGE];

typedef struct reply {
    uint8_t bytes[REPLY_MAX];
    uint32_t len;
} reply;

static void add(reply *r, const void *bytes, uint32_t len)
{
    memcpy(r->bytes + r->len, bytes, len);
    r->len += len;
}

/* What a good server would say, with some of its bytes changed, or missing. */
static void say(int sock, uint16_t id, uint16_t cmd, uint32_t flags)
{
    static const char hello[] = "\0\0\0\0{\"capabilities\":{\"max_msg_fds\":2,\"max_data_xfer_size\":64}}";
    vfu_wire_device_info info = {16, 3, 9, 5};
    vfu_wire_region_info region = {.argsz = 88, .flags = 15, .index = 2, .cap_offset = 32, .size = 65536};
    vfu_wire_cap_type type = {{VFU_REGION_CAP_TYPE, 1, 48}, 1, 2};
    vfu_wire_cap_sparse_mmap sparse = {{VFU_REGION_CAP_SPARSE_MMAP, 1, 0}, 1, 0};
    vfu_wire_sparse_area area = {PAGE, PAGE};
    vfu_wire_irq_info irq = {16, 1, 2, 4};
    vfu_wire_dma_unmap unmap = {24, 0, 0, PAGE};
    vfu_wire_region_access access = {0, 0, 16};
    vfu_wire_region_io_fds io_fds = {56, 0, 0, 1};
    vfu_wire_sub_region sub = {.size = 4};
    vfu_wire_feature feature = {16, VFU_FEATURE_GET | VFU_FEATURE_MIG_STATE};
    vfu_wire_mig_data data = {40, 32};
    vfu_wire_dma_access dma = {take(&in) * UINT64_C(64), take(&in)};
    reply r = {.len = 16};
    int fds[3], fd_count = 0;
    switch (cmd) {
    case VFU_CMD_VERSION: add(&r, hello, sizeof(hello)); break;
    case VFU_CMD_DEVICE_GET_INFO: add(&r, &info, sizeof(info)); break;
    case VFU_CMD_DEVICE_GET_REGION_INFO:
        add(&r, &region, sizeof(region));
        add(&r, &type, sizeof(type));
        add(&r, &sparse, sizeof(sparse));
        add(&r, &area, sizeof(area));
        fd_count = 1;
        break;
    case VFU_CMD_DEVICE_GET_IRQ_INFO: add(&r, &irq, sizeof(irq)); break;
    case VFU_CMD_DMA_UNMAP: add(&r, &unmap, sizeof(unmap)); break;
    case VFU_CMD_REGION_READ:
        add(&r, &access, sizeof(access));
        add(&r, memory, 16);
        break;
    case VFU_CMD_REGION_WRITE: add(&r, &access, sizeof(access)); break;
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS:
        add(&r, &io_fds, sizeof(io_fds));
        add(&r, &sub, sizeof(sub));
        fd_count = 1;
        break;
    case VFU_CMD_DEVICE_FEATURE:
        add(&r, &feature, sizeof(feature));
        add(&r, memory, 8);
        break;
    case VFU_CMD_MIG_DATA_READ:
        add(&r, &data, sizeof(data));
        add(&r, memory, 32);
        break;
    case VFU_CMD_DMA_READ: add(&r, &dma, sizeof(dma)); break;
    case VFU_CMD_DMA_WRITE:
        add(&r, &dma, sizeof(dma));
        add(&r, memory, (uint32_t)dma.count);
        break;
    default: break;
    }
    vfu_wire_header header = {.id = id, .cmd = cmd, .size = r.len, .flags = flags};
    memcpy(r.bytes, &header, 16);
    for (uint8_t changes = take(&in) % 4; changes; changes--)
        r.bytes[take(&in) % r.len] = take(&in);
    uint8_t how = take(&in);
    if (how & 1)
        r.len -= take(&in) % r.len;
    if (how & 2)
        fd_count = how >> 6;
    if (how & 4)
        memcpy(r.bytes + 4, &r.len, 4);
    for (int i = 0; i < fd_count; i++)
        fds[i] = STDERR_FILENO;
    if (r.len)
        send_some(sock, r.bytes, r.len, fds, (unsigned)fd_count);
}

static void do_call(vfu_client *client, unsigned n)
{
    vfu_wire_device_info info;
    vfu_wire_irq_info irq;
    vfu_client_region region;
    uint8_t data[200];
    int fds[2] = {STDERR_FILENO, STDERR_FILENO}, received[4];
    vfu_msg request = command(commands[n]), r;
    char line[600];
    switch (n) {
    case 0: vfu_client_info(client, &info); break;
    case 1:
        if (vfu_client_region_info(client, 2, &region) == 0) {
            for (unsigned i = 0; i < region.area_count; i++)
                ck_assert(region.areas[i].size <= region.size && region.areas[i].offset <= region.size - region.areas[i].size);
        } else {
            ck_assert(region.fd == -1);
        }
        if (region.fd >= 0)
            close(region.fd);
        break;
    case 2: vfu_client_irq_info(client, 2, &irq); break;
    case 3: vfu_client_dma_map(client, 0, PAGE, VFU_IOMMU_READ | VFU_IOMMU_WRITE, memory, -1, 0); break;
    case 4: vfu_client_region_read(client, 0, 0, data, 16); break;
    case 5: vfu_client_region_write(client, 0, 0, data, 16); break;
    case 6: vfu_client_irq_assign(client, 2, 0, 2, fds); break;
    case 7: vfu_client_dma_unmap(client, 0, PAGE); break;
    case 8: vfu_client_reset(client); break;
    default:
        if (n == 9)
            request.u.region_io_fds.argsz = 256;
        if (n == 10)
            request.u.feature.flags = VFU_FEATURE_GET | VFU_FEATURE_MIG_STATE;
        if (vfu_client_call(client, &request, NULL, 0, &r, received, 4) == 0)
            vfu_msg_render(&r, line, sizeof(line));
        close_fds(received, 4);
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t calls[16], count;
    int pair[2];
    vfu_client *client;
    vfu_client_desc desc = {.timeout_ms = PATIENCE_MS,
                            .max_data_xfer_size = PAGE,
                            .max_dma_maps = 8,
                            .logger = {.write = ignore_log, .level = VFU_LEVEL_TRACE}};
    in = (input){data, size};
    state before = look();
    memset(memory, 0x66, sizeof(memory));
    make_pair(pair);
    count = take(&in) % 16;
    say(pair[1], 0, VFU_CMD_VERSION, VFU_HDR_REPLY);
    uint16_t id = 1;
    for (unsigned i = 0; i < count; i++) {
        calls[i] = take(&in) % CALLS;
        for (uint8_t requests = take(&in) % 3; requests; requests--)
            say(pair[1], take(&in), take(&in) & 1 ? VFU_CMD_DMA_READ : VFU_CMD_DMA_WRITE, take(&in) & 15 ? 0 : VFU_HDR_NO_REPLY);
        for (unsigned replies = calls[i] == 1 ? 2 : 1; replies;
             replies--) /* for a region with capabilities the client asks twice */
            say(pair[1], id++, commands[calls[i]], VFU_HDR_REPLY);
    }
    must(shutdown(pair[1], SHUT_WR));
    if (vfu_client_attach(&client, pair[0], &desc) == 0) {
        for (unsigned i = 0; i < count; i++)
            do_call(client, calls[i]);
        vfu_client_serve(client, -1, 0);
        vfu_client_destroy(client);
    }
    close(pair[1]);
    for (unsigned i = PAGE; i < sizeof(memory); i++) /* nobody was given that */
        ck_assert(memory[i] == 0x66);
    compare(before);
    return 0;
}
