/* SPDX-License-Identifier: MIT */
/*
 * record - records a vfio-user session as C, for the firmware to replay
 *
 *     cc -std=c11 -O2 -I. examples/firmware/record.c -o record -pthread
 *     ./record >session.h
 *
 * The client is vfu_client, which keeps the memory and answers the device's DMA_READ and DMA_WRITE from its own IOMMU. The device
 * is played here with the codec, so that it can ask for what no good device asks for, and writes down each message that passes.
 * What the client has to say to each access stands in a table: status 0 only if it said so.
 */
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include <sys/syscall.h>

enum { PAGE = 4096, PAGES = 8, DATA_MAX = 2 * PAGE, ROOM = DATA_MAX + 64 };
enum { RW = VFU_IOMMU_READ | VFU_IOMMU_WRITE, READ = VFU_CMD_DMA_READ, WRITE = VFU_CMD_DMA_WRITE };

/* The memory, as the device sees it. */
#define RW_AT UINT64_C(0x100000)            /* pages 0 and 1 */
#define NEXT_AT UINT64_C(0x102000)          /* behind them pages 4 and 5, later 2 and 3 */
#define RO_AT UINT64_C(0x800000)            /* page 0 once more, to be read only */
#define WO_AT UINT64_C(0x900000)            /* page 6, to be written only */
#define TOP_AT UINT64_C(0xfffffffffffff000) /* page 7, below 2^64 */
#define NOWHERE_AT UINT64_C(0x40000000)

/* What the device does when the client rings: each step has its accesses, with the errno and the first address that fails. */
static const struct access {
    uint32_t step;
    uint16_t cmd;
    uint64_t iova;
    uint32_t len;
    uint32_t error;
    uint64_t fault;
} accesses[] = {
    {1, WRITE, RW_AT, DATA_MAX, 0, 0},
    {1, READ, RO_AT, PAGE, 0, 0}, /* the same bytes at another address */
    {1, WRITE, RW_AT + 5, 1, 0, 0},
    {1, READ, RW_AT + 3, 6, 0, 0},
    {1, WRITE, NEXT_AT - 100, 300, 0, 0}, /* over two mappings */
    {1, READ, NEXT_AT - 3000, 5000, 0, 0},
    {1, WRITE, WO_AT + 7, 9, 0, 0},
    {1, WRITE, TOP_AT + PAGE - 4, 4, 0, 0}, /* up to the last address */
    {1, READ, TOP_AT + PAGE - 8, 8, 0, 0},
    {1, READ, NOWHERE_AT, 16, ENOENT, NOWHERE_AT},
    {1, READ, RW_AT - 1, 2, ENOENT, RW_AT - 1},
    {1, WRITE, NEXT_AT + 2 * PAGE - 16, 17, ENOENT, NEXT_AT + 2 * PAGE},
    {1, WRITE, RO_AT + 16, 32, EACCES, RO_AT + 16},
    {1, READ, WO_AT, 1, EACCES, WO_AT},
    {1, READ, TOP_AT + PAGE - 4, 8, EINVAL, TOP_AT + PAGE - 4}, /* wraps past 2^64 */
    {1, WRITE, TOP_AT + PAGE - 4, 8, EINVAL, TOP_AT + PAGE - 4},
    {1, READ, RW_AT, DATA_MAX, 0, 0}, /* what was refused has changed nothing */
    {1, READ, NEXT_AT, DATA_MAX, 0, 0},

    {2, READ, NEXT_AT, 1, ENOENT, NEXT_AT}, /* revoked */
    {2, WRITE, NEXT_AT + PAGE, 64, ENOENT, NEXT_AT + PAGE},
    {2, WRITE, NEXT_AT - 1, 2, ENOENT, NEXT_AT}, /* runs into it: not even the first byte is written */
    {2, READ, RW_AT, DATA_MAX, 0, 0},

    {3, READ, NEXT_AT, 16, 0, 0}, /* mapped again, to other memory */
    {3, WRITE, NEXT_AT - 1, 2, 0, 0},
    {3, READ, NEXT_AT - 2, 4, 0, 0},

    {4, READ, RW_AT, 1, ENOENT, RW_AT}, /* everything is unmapped */
    {4, WRITE, TOP_AT, PAGE, ENOENT, TOP_AT},
};
enum { ACCESSES = sizeof(accesses) / sizeof(accesses[0]) };

static vfu_client *client;
static uint8_t *memory; /* PAGES pages */
static int memory_fd;

static void need(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "record: %s\n", what);
    exit(1);
}

/* ---- the device's end --------------------------------------------------------------------------------------------------- */

static int device_socket;
static vfu_iommu *device_table; /* so that it refuses what a device has to refuse */
static uint8_t in[ROOM], out[ROOM];

static void write_down(const uint8_t *bytes, uint32_t size, const vfu_msg *m)
{
    char line[120];
    vfu_msg_render(m, line, sizeof(line));
    printf("    /* %s */", line);
    for (uint32_t i = 0; i < size; i++)
        printf("%s0x%02x,", i % 16 ? " " : "\n    ", bytes[i]);
    printf("\n");
}

static void send_msg(const vfu_msg *m)
{
    int size = vfu_msg_encode(m, out, sizeof(out));
    need(size > 0 && send(device_socket, out, (size_t)size, 0) == size, "the device can't send");
    write_down(out, (uint32_t)size, m);
}

/* False: the client has gone. */
static bool receive_msg(vfu_msg *m)
{
    uint32_t size;
    if (recv(device_socket, in, VFU_HDR_SIZE, MSG_WAITALL) != VFU_HDR_SIZE)
        return false;
    need(vfu_msg_size(in, VFU_HDR_SIZE, ROOM, &size) == 0, "a message is too large");
    uint32_t rest = size - VFU_HDR_SIZE;
    need(!rest || recv(device_socket, in + VFU_HDR_SIZE, rest, MSG_WAITALL) == (ssize_t)rest, "a message ends early");
    need(vfu_msg_decode_dma(in, size, VFU_DMA_LAYOUT_SPEC, m) == 0, "a message is wrong");
    write_down(in, size, m);
    return true;
}

static void do_access(const struct access *a)
{
    static uint8_t data[DATA_MAX];
    static uint32_t byte = 1;
    vfu_msg command, reply;
    vfu_iommu_fault fault = {0};
    vfu_msg_init(&command, (uint16_t)(0x8000 + (a - accesses)), a->cmd);
    command.u.dma.address = a->iova;
    command.u.dma.count = a->len;
    if (a->cmd == WRITE) {
        for (uint32_t i = 0; i < a->len; i++, byte = byte * 1103515245 + 12345)
            data[i] = (uint8_t)(byte >> 16);
        command.u.dma.data = data;
        command.u.dma.data_len = a->len;
    }
    send_msg(&command);
    need(receive_msg(&reply) && reply.id == command.id && reply.error == a->error, "the client's answer isn't what it has to be");
    if (a->error)
        vfu_iommu_get_faults(vfu_client_iommu(client), &fault, 1);
    need(fault.iova == a->fault && fault.error == -(int)a->error, "the client has found another fault");
}

/* Does what the client asks: 0, or the negative errno for it. */
static int serve(const vfu_msg *m, vfu_msg *reply)
{
    static const char json[] = "{\"capabilities\":{\"max_data_xfer_size\":8192,\"pgsizes\":4096}}";
    vfu_iommu_mapping mapping = {0};
    uint32_t step;
    int removed;
    switch (m->cmd) {
    case VFU_CMD_VERSION:
        reply->u.version.json = json;
        reply->u.version.json_len = sizeof(json) - 1;
        return 0;
    case VFU_CMD_DMA_MAP:
        mapping.iova = m->u.dma_map.address;
        mapping.size = m->u.dma_map.size;
        mapping.prot = m->u.dma_map.flags; /* the same bits */
        mapping.host = memory + m->u.dma_map.offset;
        return vfu_iommu_map(device_table, &mapping);
    case VFU_CMD_DMA_UNMAP:
        reply->u.dma_unmap = m->u.dma_unmap;
        if (m->u.dma_unmap.flags & VFU_DMA_UNMAP_ALL)
            removed = vfu_iommu_unmap_all(device_table);
        else
            removed = vfu_iommu_unmap(device_table, m->u.dma_unmap.address, m->u.dma_unmap.size);
        return removed < 0 ? removed : 0;
    case VFU_CMD_REGION_WRITE:
        reply->u.region.offset = m->u.region.offset;
        reply->u.region.region = m->u.region.region;
        reply->u.region.count = m->u.region.count;
        memcpy(&step, m->u.region.data, sizeof(step));
        for (int i = 0; i < ACCESSES; i++)
            if (accesses[i].step == step)
                do_access(&accesses[i]);
        return 0;
    default: return -ENOSYS;
    }
}

static void *device(void *unused)
{
    vfu_msg command, reply;
    while (receive_msg(&command)) {
        vfu_msg_init_reply(&reply, &command, 0);
        int err = serve(&command, &reply);
        if (err)
            vfu_msg_init_reply(&reply, &command, err);
        send_msg(&reply);
    }
    return unused;
}

/* ---- the client's end --------------------------------------------------------------------------------------------------- */

static void map(uint64_t iova, unsigned page, unsigned pages, uint32_t prot)
{
    uint64_t offset = (uint64_t)page * PAGE, size = (uint64_t)pages * PAGE;
    need(vfu_client_dma_map(client, iova, size, prot, memory + offset, memory_fd, offset) == 0, "DMA_MAP");
}

static void ring(uint32_t step)
{
    need(vfu_client_region_write(client, VFU_PCI_REGION_BAR0, 0, &step, sizeof(step)) == 0, "ringing");
}

static void play(void)
{
    vfu_msg request, reply;
    map(RW_AT, 0, 2, RW);
    map(NEXT_AT, 4, 2, RW);
    map(RO_AT, 0, 1, VFU_IOMMU_READ);
    map(WO_AT, 6, 1, VFU_IOMMU_WRITE);
    map(TOP_AT, 7, 1, RW);
    ring(1);

    /* vfu_client doesn't even ask for what can't be, so this goes out by hand. */
    vfu_msg_init(&request, 0, VFU_CMD_DMA_MAP);
    request.u.dma_map.argsz = sizeof(vfu_wire_dma_map);
    request.u.dma_map.flags = VFU_DMA_READABLE;
    request.u.dma_map.address = RW_AT + PAGE;
    request.u.dma_map.size = PAGE;
    need(vfu_client_call(client, &request, NULL, 0, &reply, NULL, 0) == -EEXIST, "a mapping over another one");

    need(vfu_client_dma_unmap(client, RW_AT, PAGE) == -EINVAL, "an unmap that splits a mapping");
    need(vfu_client_dma_unmap(client, NOWHERE_AT, PAGE) == 0, "an unmap of nothing");
    need(vfu_client_dma_unmap(client, NEXT_AT, 2 * PAGE) == 1, "DMA_UNMAP");
    ring(2);
    map(NEXT_AT, 2, 2, RW);
    ring(3);

    vfu_msg_init(&request, 0, VFU_CMD_DMA_UNMAP);
    request.u.dma_unmap.argsz = sizeof(vfu_wire_dma_unmap);
    request.u.dma_unmap.flags = VFU_DMA_UNMAP_ALL;
    need(vfu_client_call(client, &request, NULL, 0, &reply, NULL, 0) == 0, "an unmap of everything");
    need(vfu_iommu_unmap_all(vfu_client_iommu(client)) == 5, "an unmap of everything in its own table");
    ring(4);
}

int main(void)
{
    int ends[2];
    pthread_t thread;
    memory_fd = (int)syscall(SYS_memfd_create, "record", 1u); /* MFD_CLOEXEC */
    need(memory_fd >= 0 && ftruncate(memory_fd, PAGES * PAGE) == 0, "no memory");
    memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    need(memory != MAP_FAILED && vfu_iommu_create(&device_table, NULL) == 0, "no memory");
    need(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "no sockets");
    device_socket = ends[1];

    printf("/* Made by record.c. Client and device in turn, as on the socket: -> is a command, <- a reply. */\n");
    printf("static const unsigned char session[] = {\n");
    need(pthread_create(&thread, NULL, device, NULL) == 0, "no thread");
    need(vfu_client_attach(&client, ends[0], NULL) == 0, "VERSION");
    play();
    vfu_client_destroy(client);
    pthread_join(thread, NULL);
    printf("};\n\n/* Where each DMA that was refused has failed, in turn. */\n");
    printf("static const unsigned long long session_faults[] = {\n");
    for (int i = 0; i < ACCESSES; i++)
        if (accesses[i].error)
            printf("    0x%llx,\n", (unsigned long long)accesses[i].fault);
    printf("};\n");

    vfu_iommu_destroy(device_table);
    close(device_socket);
    munmap(memory, PAGES * PAGE);
    close(memory_fd);
    return fflush(stdout) ? 1 : 0;
}
