/* SPDX-License-Identifier: MIT */
/*
 * What the tests of transport, device and client share: counting descriptors, an allocator that fails on demand, the raw end of a
 * connection (struct peer), and a device with everything that a device can have (struct rig), polled in the test's own thread.
 *
 * Include it first.
 */
#ifndef VFU_TESTS_UTIL_H
#define VFU_TESTS_UTIL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "vfu.h"

#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

enum { PAGE = 4096, PATIENCE_MS = 20000 /* how long a test waits for another thread before it fails */ };

/* For tables of bytes that were written down in this order. */
static inline bool is_little_endian(void) { return *(const uint8_t *)&(const uint16_t){1} == 1; }

/* Runs this under that emulator, as portable.sh tells? What it can't do is listed there. */
static inline bool emulated_by(const char *name)
{
    const char *emulator = getenv("VFU_EMULATED");
    return emulator && !strcmp(emulator, name);
}

/* The test fails unless expr is 0 or more. */
#define must(expr) ck_assert_int_ge((expr), 0)

/* ---- descriptors -------------------------------------------------------------------------------------------------------------- */

/* How many descriptors this process has open. */
static inline unsigned fds_open(void)
{
    unsigned count = 0;
    DIR *dir = opendir("/proc/self/fd");
    ck_assert_ptr_nonnull(dir);
    while (readdir(dir))
        count++;
    closedir(dir);
    return count - 3; /* ".", "..", and the directory itself */
}

/* How many lines of the process's memory map have `name` in them. */
static inline unsigned vmas_of(const char *name)
{
    char line[512];
    unsigned count = 0;
    FILE *maps = fopen("/proc/self/maps", "re");
    ck_assert_ptr_nonnull(maps);
    while (fgets(line, sizeof(line), maps))
        count += strstr(line, name) != NULL;
    fclose(maps);
    return count;
}

static inline ino_t ino_of(int fd)
{
    struct stat st;
    must(fstat(fd, &st));
    return st.st_ino;
}

static inline bool is_cloexec(int fd) { return fcntl(fd, F_GETFD) & FD_CLOEXEC; }

/* A memory file. seals: F_SEAL_*, 0: none. */
static inline int memfd(const char *name, size_t size, unsigned seals)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    must(fd);
    must(ftruncate(fd, (off_t)size));
    if (seals)
        must(fcntl(fd, F_ADD_SEALS, seals));
    return fd;
}

static inline int null_fd(void)
{
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    must(fd);
    return fd;
}

static inline void close_fds(int *fds, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

static inline void make_pair(int pair[2]) { must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)); }

/* A socket that listens at an address that the kernel chose, and the address. */
static inline int listener(struct sockaddr_un *address, socklen_t *len)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    must(fd);
    memset(address, 0, sizeof(*address));
    address->sun_family = AF_UNIX;
    must(bind(fd, (struct sockaddr *)address, sizeof(sa_family_t)));
    *len = sizeof(*address);
    must(getsockname(fd, (struct sockaddr *)address, len));
    must(listen(fd, 64));
    return fd;
}

static inline int connect_to(const struct sockaddr_un *address, socklen_t len)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    must(fd);
    must(connect(fd, (const struct sockaddr *)address, len));
    return fd;
}

/* Sends bytes with descriptors in one sendmsg() that doesn't block; returns how many bytes went, or a negative errno. */
static inline int64_t send_some(int sock, const void *bytes, size_t len, const int *fds, unsigned fd_count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * VFU_FDS_RECEIVABLE)];
    } control;
    struct iovec iov = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fds && fd_count) {
        memset(&control, 0, sizeof(control));
        msg.msg_control = control.bytes;
        msg.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * fd_count);
    }
    ssize_t n = sendmsg(sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    return n < 0 ? -errno : n;
}

static inline void send_all(int sock, const void *bytes, size_t len, const int *fds, unsigned fd_count)
{
    ck_assert_int_eq(send_some(sock, bytes, len, fds, fd_count), (int64_t)len);
}

/* ---- memory -------------------------------------------------------------------------------------------------------------------- */

/* Counts what is allocated, and fails the allocation number fail_at (0: none). */
typedef struct heap {
    unsigned long count, fail_at;
    size_t live; /* bytes */
} heap;

static inline void *heap_alloc(void *ctx, size_t size)
{
    heap *h = ctx;
    if (++h->count == h->fail_at)
        return NULL;
    h->live += size;
    return malloc(size);
}

static inline void heap_release(void *ctx, void *memory, size_t size)
{
    heap *h = ctx;
    ck_assert_uint_ge(h->live, size);
    h->live -= size;
    free(memory);
}

static inline vfu_alloc heap_of(heap *h) { return (vfu_alloc){h, heap_alloc, heap_release}; }

/* ---- chance --------------------------------------------------------------------------------------------------------------------- */

typedef struct chance {
    uint64_t state; /* not 0 */
} chance;

static inline uint64_t draw(chance *c)
{
    c->state ^= c->state << 13;
    c->state ^= c->state >> 7;
    c->state ^= c->state << 17;
    return c->state * UINT64_C(0x2545f4914f6cdd1d) >> 8;
}

/* A number below limit. */
static inline uint32_t below(chance *c, uint32_t limit) { return (uint32_t)(draw(c) % limit); }

static inline chance seeded(uint64_t seed) { return (chance){seed * UINT64_C(0x9e3779b97f4a7c15) | 1}; }

/* ---- the raw end of a connection --------------------------------------------------------------------------------------------------- */

/* Receives messages without any of the code under test. No read crosses the end of a message, so descriptors that come are its own. */
typedef struct peer {
    int sock;
    uint8_t *bytes; /* the message */
    size_t room, have;
    bool complete; /* the last call gave a message */
    int fds[VFU_FDS_RECEIVABLE];
    unsigned fd_count;
} peer;

static inline void peer_close_fds(peer *p)
{
    close_fds(p->fds, p->fd_count);
    p->fd_count = 0;
}

static inline void peer_close(peer *p)
{
    peer_close_fds(p);
    if (p->sock >= 0)
        close(p->sock);
    p->sock = -1;
    free(p->bytes);
    p->bytes = NULL;
    p->room = p->have = 0;
    p->complete = false;
}

static inline vfu_wire_header header_of(const void *bytes)
{
    vfu_wire_header header;
    memcpy(&header, bytes, sizeof(header));
    return header;
}

/* One recvmsg() that doesn't block. Returns bytes, 0 at the end, or a negative errno. */
static inline int64_t peer_read(peer *p, size_t len)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * VFU_FDS_RECEIVABLE)];
    } control;
    if (p->room < p->have + len) {
        p->room = p->have + len;
        p->bytes = realloc(p->bytes, p->room);
        ck_assert_ptr_nonnull(p->bytes);
    }
    struct iovec iov = {.iov_base = p->bytes + p->have, .iov_len = len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t n = recvmsg(p->sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
        return -errno;
    ck_assert_int_eq(msg.msg_flags & MSG_CTRUNC, 0);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
        unsigned count = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        ck_assert_uint_le(p->fd_count + count, VFU_FDS_RECEIVABLE);
        memcpy(p->fds + p->fd_count, CMSG_DATA(c), count * sizeof(int));
        p->fd_count += count;
    }
    p->have += (size_t)n;
    return n;
}

/* The next message, to p->bytes and p->fds, which are dropped by the next call. 1; 0: none is complete; -EPIPE: the other end is closed. */
static inline int peer_receive(peer *p)
{
    if (p->complete) {
        p->complete = false;
        p->have = 0;
        peer_close_fds(p);
    }
    for (;;) {
        size_t size = p->have < 16 ? 16 : header_of(p->bytes).size;
        ck_assert_uint_ge(size, 16);
        ck_assert_uint_lt(size, 20u << 20);
        if (p->have == size) {
            p->complete = true;
            return 1;
        }
        int64_t n = peer_read(p, size - p->have);
        if (n == -EAGAIN)
            return 0;
        if (n <= 0)
            return -EPIPE;
    }
}

/* The same, but waits: for peers whose other end lives in another thread. 1 or -EPIPE. */
static inline int peer_wait(peer *p)
{
    for (;;) {
        int got = peer_receive(p);
        struct pollfd ready = {.fd = p->sock, .events = POLLIN};
        if (got)
            return got;
        ck_assert_int_eq(poll(&ready, 1, PATIENCE_MS), 1);
    }
}

/* Sends it all, and waits where the socket is full. False: the other end is closed. */
static inline bool peer_send_wait(peer *p, const void *bytes, size_t len, const int *fds, unsigned fd_count)
{
    for (size_t done = 0; done < len;) {
        int64_t n = send_some(p->sock, (const uint8_t *)bytes + done, len - done, fds, done ? 0 : fd_count);
        struct pollfd ready = {.fd = p->sock, .events = POLLOUT};
        if (n == -EAGAIN)
            ck_assert_int_eq(poll(&ready, 1, PATIENCE_MS), 1);
        else if (n < 0)
            return false;
        else
            done += (size_t)n;
    }
    return true;
}

/* ---- a device with everything ------------------------------------------------------------------------------------------------------- */

enum {
    RIG_BAR0 = 4096,
    RIG_BAR1 = 64,    /* I/O */
    RIG_BAR2 = 65536, /* 64-bit; all but the first page can be mapped */
    RIG_BAR4 = 4096,  /* MSI-X table at 0, PBA at 0x800 */
    RIG_BAR5 = 8192,  /* all of it can be mapped */
    RIG_ROM = 2048,
    RIG_VECTORS = 4,
    RIG_PBA = 0x800,
    RIG_STORAGE = 65536
};

typedef struct rig {
    vfu_dev *dev;
    int ram; /* file behind BARs 2 (at 0) and 5 (at RIG_BAR2) */
    peer client;
    uint16_t id;   /* of the last request */
    vfu_msg reply; /* the last; its views point into client.bytes */

    /* what the callbacks do and have seen */
    uint8_t storage[VFU_PCI_NUM_REGIONS][RIG_STORAGE];
    int refuse; /* what region callbacks return */
    unsigned reads, writes, resets, configs, connects, disconnects, maps, unmaps, works;
    uint32_t last_region;
    uint64_t last_offset;
    size_t last_len;
    vfu_reset_kind last_reset;
    unsigned last_changed;
    void (*on_write)(struct rig *r); /* called at each region write */
    void (*on_work)(struct rig *r);
    void *test; /* the test's own */
} rig;

static inline int rig_read(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    rig *r = ctx;
    r->reads++;
    r->last_region = region;
    r->last_offset = offset;
    r->last_len = len;
    memcpy(buf, &r->storage[region][offset], len);
    return r->refuse;
}

static inline int rig_write(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    rig *r = ctx;
    r->writes++;
    r->last_region = region;
    r->last_offset = offset;
    r->last_len = len;
    if (!r->refuse)
        memcpy(&r->storage[region][offset], buf, len);
    if (r->on_write)
        r->on_write(r);
    return r->refuse;
}

static inline void rig_reset(void *ctx, vfu_reset_kind kind)
{
    rig *r = ctx;
    r->resets++;
    r->last_reset = kind;
}

static inline void rig_config(void *ctx, unsigned changed)
{
    rig *r = ctx;
    r->configs++;
    r->last_changed = changed;
}

static inline bool rig_work(void *ctx)
{
    rig *r = ctx;
    r->works++;
    if (r->on_work)
        r->on_work(r);
    return false;
}

static inline void rig_connected(void *ctx) { ((rig *)ctx)->connects++; }
static inline void rig_disconnected(void *ctx) { ((rig *)ctx)->disconnects++; }

static inline void rig_mapped(void *ctx, const vfu_iommu_mapping *mapping)
{
    (void)mapping;
    ((rig *)ctx)->maps++;
}

static inline void rig_unmapped(void *ctx, const vfu_iommu_mapping *mapping)
{
    (void)mapping;
    ((rig *)ctx)->unmaps++;
}

static inline void ignore_log(void *ctx, vfu_level level, const char *line) { (void)ctx, (void)level, (void)line; }

/* The descriptor of the device with everything, for rig_create. Its share structs live in static memory. */
static inline vfu_dev_desc rig_desc(rig *r)
{
    static vfu_wire_sparse_area area = {.offset = PAGE, .size = RIG_BAR2 - PAGE};
    static vfu_region_share shares[2];
    static const vfu_pci_vendor_cap vendor = {.data = "vfu dma", .len = 7};
    memset(r, 0, sizeof(*r));
    r->client.sock = -1;
    r->ram = memfd("rig-ram", RIG_BAR2 + RIG_BAR5, F_SEAL_SHRINK);
    shares[0] = (vfu_region_share){.fd = r->ram, .areas = &area, .area_count = 1};
    shares[1] = (vfu_region_share){.fd = r->ram, .offset = RIG_BAR2};
    return (vfu_dev_desc){
        .pci =
            {
                .vendor = 0x1234,
                .device = 0xd3a1,
                .subsystem_vendor = 0x1234,
                .subsystem = 0x0001,
                .class_code = 0x088000,
                .revision = 1,
                .interrupt_pin = 1,
                .bar = {{.size = RIG_BAR0}, {.size = RIG_BAR1, .kind = VFU_BAR_IO}, {.size = RIG_BAR2, .kind = VFU_BAR_MEM64}, {0},
                        {.size = RIG_BAR4}, {.size = RIG_BAR5}},
                .rom_size = RIG_ROM,
                .pm = true,
                .express = true,
                .flr = true,
                .msix = {.vectors = RIG_VECTORS, .table_bar = 4, .pba_bar = 4, .table_offset = 0, .pba_offset = RIG_PBA},
                .vendor_caps = &vendor,
                .vendor_cap_count = 1,
            },
        .share = {[2] = &shares[0], [5] = &shares[1]},
        .ctx = r,
        .callbacks =
            {
                .region_read = rig_read,
                .region_write = rig_write,
                .reset = rig_reset,
                .config_written = rig_config,
                .connected = rig_connected,
                .disconnected = rig_disconnected,
                .work = rig_work,
                .dma_mapped = rig_mapped,
                .dma_unmapped = rig_unmapped,
            },
        .logger = {.write = ignore_log},
    };
}

static inline void rig_create(rig *r, const vfu_dev_desc *desc) { ck_assert_int_eq(vfu_dev_create(&r->dev, desc), 0); }

/* Connects the raw client by a socketpair. */
static inline void rig_connect(rig *r)
{
    int pair[2];
    make_pair(pair);
    r->client.sock = pair[1];
    ck_assert_int_eq(vfu_dev_attach(r->dev, pair[0]), 0);
}

/* Polls the device until it has nothing more to do; returns the last result. What the other end has sent is there at once. */
static inline int settle(vfu_dev *dev)
{
    int err = 0;
    for (;;) {
        vfu_pollfd wanted[VFU_DEV_FDS];
        struct pollfd fds[VFU_DEV_FDS];
        unsigned count = vfu_dev_fds(dev, wanted);
        for (unsigned i = 0; i < count; i++)
            fds[i] = (struct pollfd){.fd = wanted[i].fd, .events = wanted[i].events};
        if (poll(fds, count, 0) <= 0 && vfu_dev_timeout(dev) != 0)
            return err;
        err = vfu_dev_poll(dev);
        if (err)
            return err;
    }
}

/* Sends a message in as many pieces as the socket needs, polling the device in between. */
static inline void rig_send(rig *r, const void *bytes, size_t len, const int *fds, unsigned fd_count)
{
    for (size_t done = 0; done < len;) {
        int64_t n = send_some(r->client.sock, (const uint8_t *)bytes + done, len - done, fds, done ? 0 : fd_count);
        if (n == -EAGAIN)
            settle(r->dev);
        else if (n < 0)
            return; /* the device has closed, which the test sees when it receives */
        else
            done += (size_t)n;
    }
    settle(r->dev);
}

/* The next message from the device, decoded into r->reply. 1; 0: there is none; -EPIPE: the device has closed. */
static inline int rig_receive(rig *r)
{
    int got;
    settle(r->dev);
    while ((got = peer_receive(&r->client)) == 0) {
        size_t before = r->client.have;
        settle(r->dev);
        got = peer_receive(&r->client);
        if (got || r->client.have == before)
            break;
    }
    if (got == 1)
        ck_assert_int_eq(vfu_msg_decode(r->client.bytes, r->client.have, &r->reply), 0);
    return got;
}

/* The bytes of a message, in a buffer of the thread's. */
static inline const uint8_t *encoded(const vfu_msg *msg, size_t *len)
{
    static _Thread_local uint8_t bytes[(1 << 20) + 2 * PAGE];
    int n = vfu_msg_encode(msg, bytes, sizeof(bytes));
    must(n);
    *len = (size_t)n;
    return bytes;
}

/* Checks that the message just received is the whole reply to `request`: 0, or the negative errno of an error reply. */
static inline int check_reply(rig *r, const vfu_msg *request)
{
    vfu_wire_header header = header_of(r->client.bytes);
    ck_assert_uint_eq(header.id, request->id);
    ck_assert_uint_eq(header.cmd, request->cmd);
    ck_assert_uint_eq(header.size, r->client.have);
    if (header.flags == VFU_HDR_REPLY) {
        ck_assert_uint_eq(header.error, 0);
        return 0;
    }
    ck_assert_uint_eq(header.flags, VFU_HDR_REPLY | VFU_HDR_ERROR);
    ck_assert_uint_eq(header.size, 16);
    ck_assert_uint_eq(r->client.fd_count, 0);
    ck_assert_uint_gt(header.error, 0);
    ck_assert_uint_lt(header.error, 4096);
    return -(int)header.error;
}

/* Sends a request with descriptors (borrowed) and receives its reply: 0, or the negative errno of an error reply. */
static inline int ask_with(rig *r, vfu_msg *request, const int *fds, unsigned fd_count)
{
    size_t len;
    request->id = ++r->id;
    const uint8_t *bytes = encoded(request, &len);
    rig_send(r, bytes, len, fds, fd_count);
    ck_assert_int_eq(rig_receive(r), 1);
    return check_reply(r, request);
}

static inline int ask(rig *r, vfu_msg *request) { return ask_with(r, request, NULL, 0); }

static inline vfu_msg command(uint16_t cmd)
{
    vfu_msg msg;
    vfu_msg_init(&msg, 0, cmd);
    return msg;
}

static inline int ask_version(rig *r, const char *json)
{
    vfu_msg m = command(VFU_CMD_VERSION);
    m.u.version.json = json;
    m.u.version.json_len = json ? (uint32_t)strlen(json) : 0;
    return ask(r, &m);
}

static inline void greet(rig *r) { ck_assert_int_eq(ask_version(r, NULL), 0); }

/* fd -1: without a descriptor */
static inline int ask_map(rig *r, uint64_t iova, uint64_t size, uint32_t flags, int fd, uint64_t offset)
{
    vfu_msg m = command(VFU_CMD_DMA_MAP);
    m.u.dma_map.argsz = 32;
    m.u.dma_map.flags = flags;
    m.u.dma_map.offset = offset;
    m.u.dma_map.address = iova;
    m.u.dma_map.size = size;
    return ask_with(r, &m, &fd, fd >= 0);
}

#define RW (VFU_DMA_READABLE | VFU_DMA_WRITEABLE)

static inline int ask_unmap(rig *r, uint64_t iova, uint64_t size, uint32_t flags)
{
    vfu_msg m = command(VFU_CMD_DMA_UNMAP);
    m.u.dma_unmap.argsz = 24;
    m.u.dma_unmap.flags = flags;
    m.u.dma_unmap.address = iova;
    m.u.dma_unmap.size = size;
    return ask(r, &m);
}

static inline int ask_read(rig *r, uint32_t region, uint64_t offset, void *buf, uint32_t count)
{
    vfu_msg m = command(VFU_CMD_REGION_READ);
    m.u.region.region = region;
    m.u.region.offset = offset;
    m.u.region.count = count;
    int err = ask(r, &m);
    if (err)
        return err;
    ck_assert_uint_eq(r->reply.u.region.region, region);
    ck_assert_uint_eq(r->reply.u.region.offset, offset);
    ck_assert_uint_eq(r->reply.u.region.count, count);
    ck_assert_uint_eq(r->client.have, 32 + count);
    if (count)
        memcpy(buf, r->reply.u.region.data, count);
    return 0;
}

static inline int ask_write(rig *r, uint32_t region, uint64_t offset, const void *buf, uint32_t count)
{
    vfu_msg m = command(VFU_CMD_REGION_WRITE);
    m.u.region.region = region;
    m.u.region.offset = offset;
    m.u.region.count = count;
    m.u.region.data = buf;
    m.u.region.data_len = count;
    int err = ask(r, &m);
    if (err)
        return err;
    ck_assert_uint_eq(r->client.have, 32);
    ck_assert_uint_eq(r->reply.u.region.region, region);
    ck_assert_uint_eq(r->reply.u.region.offset, offset);
    ck_assert_uint_eq(r->reply.u.region.count, count);
    return 0;
}

static inline int write_config(rig *r, uint32_t offset, uint32_t value, uint32_t width)
{
    uint8_t bytes[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};
    return ask_write(r, VFU_PCI_REGION_CONFIG, offset, bytes, width);
}

static inline uint32_t read_config(rig *r, uint32_t offset, uint32_t width)
{
    uint8_t bytes[4] = {0};
    ck_assert_int_eq(ask_read(r, VFU_PCI_REGION_CONFIG, offset, bytes, width), 0);
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

/* data: count bytes for DATA_BOOL, else NULL */
static inline int ask_irqs(rig *r, uint32_t flags, uint32_t index, uint32_t start, uint32_t count, const uint8_t *data, const int *fds,
                           unsigned fd_count)
{
    vfu_msg m = command(VFU_CMD_DEVICE_SET_IRQS);
    m.u.irq_set.argsz = 20;
    m.u.irq_set.flags = flags;
    m.u.irq_set.index = index;
    m.u.irq_set.start = start;
    m.u.irq_set.count = count;
    m.u.irq_set.data = data;
    m.u.irq_set.data_len = data ? count : 0;
    return ask_with(r, &m, fds, fd_count);
}

/* Is the device fit to serve? Asks it something with a known answer. */
static inline void check_healthy(rig *r)
{
    vfu_msg m = command(VFU_CMD_DEVICE_GET_INFO);
    m.u.device_info.argsz = 16;
    ck_assert_int_eq(ask(r, &m), 0);
    ck_assert_uint_eq(r->reply.u.device_info.num_regions, 9);
}

static inline void check_silent(rig *r) { ck_assert_int_eq(rig_receive(r), 0); }
static inline void check_closed(rig *r) { ck_assert_int_eq(rig_receive(r), -EPIPE); }

static inline uint64_t mappings(vfu_dev *dev)
{
    vfu_iommu_stats stats;
    vfu_iommu_get_stats(vfu_dev_iommu(dev), &stats);
    return stats.mappings;
}

/* The client leaves, and the device is polled until it has seen that. */
static inline void rig_leave(rig *r)
{
    peer_close(&r->client);
    settle(r->dev);
}

static inline void rig_destroy(rig *r)
{
    vfu_dev_destroy(r->dev);
    peer_close(&r->client);
    close(r->ram);
    r->dev = NULL;
}

/* A device with everything, connected and greeted. */
static inline void rig_open(rig *r)
{
    vfu_dev_desc desc = rig_desc(r);
    rig_create(r, &desc);
    rig_connect(r);
    greet(r);
}

/* How often an eventfd was signalled since the last time. */
static inline uint64_t signals(int fd)
{
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    uint64_t count = 0;
    if (poll(&ready, 1, 0) == 1)
        ck_assert_int_eq(read(fd, &count, sizeof(count)), sizeof(count));
    /* An emulator swaps the bytes of an eventfd's count, but for descriptors that were passed. Nobody counts to 2^56. */
    return count >> 56 ? count >> 56 : count;
}

static inline int event(void)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    must(fd);
    return fd;
}

static inline int run_suite(Suite *suite)
{
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

#endif /* VFU_TESTS_UTIL_H */
