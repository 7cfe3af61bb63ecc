/* SPDX-License-Identifier: MIT */
/*
 * What a guest with a strict IOMMU waits for at each I/O: the round trips of one DMA_MAP, with a descriptor, and one DMA_UNMAP,
 * to a device that serves them with vfu.h, beside the floor, a process that answers messages of the same sizes, with the same
 * descriptor, and does nothing else. What the device takes beyond the floor is our own share.
 *
 *     bench_round_trip SOCKET      where a vfio-user device listens, any one
 *
 * Part of `make bench-nvme`. All of them share one processor: to wake another one takes longer than everything that is measured
 * here, and each time something else. Both sides take turns within each round; each figure is the median of ROUNDS rounds, with the least
 * and the greatest. Differences and shares are taken within each round first.
 */
#define _GNU_SOURCE
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include "figures.h"

#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum {
    ROUNDS = 9,
    PAIRS = 4000,  /* a DMA_MAP and a DMA_UNMAP each */
    MAPPINGS = 64, /* that stay, as a guest's other buffers do */
    PAGE = 4096,
    HEADER = 16,
    MAP_SIZE = HEADER + 32,
    UNMAP_SIZE = HEADER + 24
};
#define FILE_SIZE ((size_t)64 << 20)
#define FIRST     UINT64_C(0x10000000)

static void fail(const char *what)
{
    fprintf(stderr, "bench_round_trip: %s\n", what);
    exit(1);
}

/* ---- messages --------------------------------------------------------------------------------------------------------- */

static void send_message(int sock, const void *bytes, size_t len, int fd)
{
    union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec piece = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = len};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};

    if (fd >= 0) {
        memset(&control, 0, sizeof(control));
        message.msg_control = &control;
        message.msg_controllen = sizeof(control);
        control.head.cmsg_level = SOL_SOCKET;
        control.head.cmsg_type = SCM_RIGHTS;
        control.head.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&control.head), &fd, sizeof(fd));
    }
    if (sendmsg(sock, &message, MSG_NOSIGNAL) != (ssize_t)len) {
        fail("a message could not be sent");
    }
}

/* The size of what arrived, 0 when the peer is gone. *fd is the descriptor that came along, or -1. */
static size_t receive_message(int sock, void *bytes, size_t cap, int *fd)
{
    union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec piece = {.iov_base = bytes, .iov_len = cap};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    ssize_t len = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
    const struct cmsghdr *head = CMSG_FIRSTHDR(&message);

    *fd = -1;
    if (len > 0 && head && head->cmsg_type == SCM_RIGHTS) {
        memcpy(fd, CMSG_DATA(head), sizeof(*fd));
    }
    return len > 0 ? (size_t)len : 0;
}

/* One request and its reply. */
static void call(int sock, const void *request, size_t len, int fd, size_t reply_len)
{
    uint8_t reply[256];
    vfu_msg answer;
    int none;

    send_message(sock, request, len, fd);
    if (receive_message(sock, reply, sizeof(reply), &none) != reply_len) {
        fail("no reply, or one of another size");
    }
    if (vfu_msg_decode(reply, reply_len, &answer) != 0 || vfu_msg_is_error(&answer)) {
        fail("the device refused a request");
    }
}

static void encode(uint16_t cmd, uint64_t address, uint64_t offset, uint8_t *out, size_t size)
{
    vfu_msg request;

    vfu_msg_init(&request, 1, cmd);
    if (cmd == VFU_CMD_DMA_MAP) {
        request.u.dma_map.argsz = MAP_SIZE - HEADER;
        request.u.dma_map.flags = VFU_DMA_READABLE | VFU_DMA_WRITEABLE;
        request.u.dma_map.offset = offset;
        request.u.dma_map.address = address;
        request.u.dma_map.size = PAGE;
    } else {
        request.u.dma_unmap.argsz = UNMAP_SIZE - HEADER;
        request.u.dma_unmap.address = address;
        request.u.dma_unmap.size = PAGE;
    }
    if (vfu_msg_encode(&request, out, size) != (int)size) {
        fail("a request could not be encoded");
    }
}

/* ---- the two that answer ---------------------------------------------------------------------------------------------- */

/* The floor: the reply to a DMA_MAP is a header, to a DMA_UNMAP what it said. */
static int start_floor(void)
{
    int pair[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
        fail("no socket");
    }
    switch (fork()) {
    case -1: fail("no process"); break;
    case 0: {
        uint8_t bytes[256];
        size_t len;
        int fd;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(pair[0]);
        while ((len = receive_message(pair[1], bytes, sizeof(bytes), &fd)) != 0) {
            static const vfu_wire_header reply_to_map = {.id = 1, .cmd = VFU_CMD_DMA_MAP, .size = HEADER, .flags = VFU_HDR_REPLY};
            vfu_wire_header head;

            if (len == MAP_SIZE) {
                close(fd);
                send_message(pair[1], &reply_to_map, sizeof(reply_to_map), -1);
                continue;
            }
            memcpy(&head, bytes, sizeof(head));
            head.flags = VFU_HDR_REPLY;
            memcpy(bytes, &head, sizeof(head));
            send_message(pair[1], bytes, len, -1);
        }
        _exit(0);
    }
    default: break;
    }
    close(pair[1]);
    return pair[0];
}

/* A process's first thread, which in our examples is the one that serves the socket; 0 is this one. */
static void stay_on_one_processor(pid_t pid)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(0, &set);
    sched_setaffinity(pid, sizeof(set), &set);
}

static int connect_device(const char *path)
{
    struct ucred peer = {0};
    socklen_t peer_size = sizeof(peer);
    static const char json[] = "{\"capabilities\":{\"max_msg_fds\":8}}";
    uint8_t bytes[1024];
    vfu_msg version;
    int sock = vfu_sock_connect(path), size, none;

    if (sock < 0 || fcntl(sock, F_SETFL, 0) != 0) {
        fail("nobody listens at the socket");
    }
    if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &peer_size) == 0 && peer.pid > 0) {
        stay_on_one_processor(peer.pid);
    }
    vfu_msg_init(&version, 1, VFU_CMD_VERSION);
    version.u.version.json = json;
    version.u.version.json_len = sizeof(json) - 1;
    size = vfu_msg_encode(&version, bytes, sizeof(bytes));
    if (size < 0) {
        fail("VERSION could not be encoded");
    }
    send_message(sock, bytes, (size_t)size, -1);
    if (receive_message(sock, bytes, sizeof(bytes), &none) < HEADER) {
        fail("no reply to VERSION");
    }
    return sock;
}

/* ---- measuring -------------------------------------------------------------------------------------------------------- */

/* Microseconds for a DMA_MAP and its DMA_UNMAP, at an IOVA and an offset that change as a guest's do. */
static double measure(int sock, int file)
{
    uint8_t map[MAP_SIZE], unmap[UNMAP_SIZE];
    double begin = now_ns();

    for (uint32_t i = 0; i < PAIRS; i++) {
        uint64_t place = MAPPINGS + i * 2654435761u % 8192;

        encode(VFU_CMD_DMA_MAP, FIRST + place * PAGE, place * PAGE, map, sizeof(map));
        encode(VFU_CMD_DMA_UNMAP, FIRST + place * PAGE, 0, unmap, sizeof(unmap));
        call(sock, map, sizeof(map), file, HEADER);
        call(sock, unmap, sizeof(unmap), -1, sizeof(unmap));
    }
    return (now_ns() - begin) / 1e3 / PAIRS;
}

static void print(const char *name, figure *f, const char *unit)
{
    settle(f, ROUNDS);
    printf("  %-20s %6.1f %s  (%.1f to %.1f)\n", name, f->median, unit, f->least, f->greatest);
}

int main(int argc, char **argv)
{
    figure floor_us, device_us, own_us, share;
    int file, floor_sock, device;

    if (argc != 2) {
        fprintf(stderr, "usage: bench_round_trip SOCKET\n");
        return 2;
    }
    file = memfd_create("guest", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, FILE_SIZE) != 0) {
        fail("no memory");
    }
    stay_on_one_processor(0);
    device = connect_device(argv[1]);
    floor_sock = start_floor();
    for (uint64_t i = 0; i < MAPPINGS; i++) {
        uint8_t map[MAP_SIZE];

        encode(VFU_CMD_DMA_MAP, FIRST + i * PAGE, i * PAGE, map, sizeof(map));
        call(device, map, sizeof(map), file, HEADER);
    }
    measure(floor_sock, file);
    measure(device, file);
    for (int i = 0; i < ROUNDS; i++) {
        if (i % 2) {
            device_us.round[i] = measure(device, file);
            floor_us.round[i] = measure(floor_sock, file);
        } else {
            floor_us.round[i] = measure(floor_sock, file);
            device_us.round[i] = measure(device, file);
        }
        own_us.round[i] = device_us.round[i] - floor_us.round[i];
        share.round[i] = 100 * own_us.round[i] / device_us.round[i];
    }
    printf("DMA_MAP with a descriptor and DMA_UNMAP, two round trips:\n");
    print("by the device", &device_us, "us");
    print("by the bare socket", &floor_us, "us");
    print("our own share", &own_us, "us");
    print("our own share", &share, "% ");
    close(floor_sock);
    close(device);
    return 0;
}
