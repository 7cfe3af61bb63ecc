/* SPDX-License-Identifier: MIT */
/*
 * ==== device, client ==== under siege
 *
 * Peers that are silent after any byte, that flood, that pass descriptors of every kind in any number, that truncate what they
 * share, and that come and die by the thousand. Descriptors and memory stay as they were, whoever waits beside them is served,
 * and so is the next.
 *
 * With VFU_SIEGE set in the environment everything is done as often as it is meant to be (`make check-hostile`), else a tenth
 * of it.
 */
#include "caller.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <time.h>

static unsigned fds_at_start;
static void note_fds(void) { fds_at_start = fds_open(); }
static void check_fds(void) { ck_assert_uint_eq(fds_open(), fds_at_start); }

static unsigned times(unsigned whole) { return getenv("VFU_SIEGE") ? whole : whole / 10; }

static rig victim, bystander;

/* A victim that listens, and a bystander in the same thread, with a client that has memory and an interrupt there. */
typedef struct scene {
    struct sockaddr_un address;
    socklen_t len;
    heap heap;
    int event, file;
    unsigned fds;     /* while the victim has no client */
    size_t memory;    /* likewise, bytes of the victim */
    unsigned healthy; /* checks of the bystander */
} scene;

static void open_scene(scene *s, uint32_t greeting_ms)
{
    memset(s, 0, sizeof(*s));
    vfu_dev_desc desc = rig_desc(&victim), other = rig_desc(&bystander);
    desc.alloc = heap_of(&s->heap);
    desc.greeting_ms = greeting_ms;
    rig_create(&victim, &desc);
    ck_assert_int_eq(vfu_dev_attach(victim.dev, listener(&s->address, &s->len)), 0);
    rig_create(&bystander, &other);
    rig_connect(&bystander);
    greet(&bystander);
    s->event = event();
    s->file = memfd("bystander", PAGE, F_SEAL_SHRINK);
    ck_assert_int_eq(ask_irqs(&bystander, 0x24, VFU_PCI_IRQ_MSIX, 0, 1, NULL, &s->event, 1), 0);
    ck_assert_int_eq(ask_map(&bystander, 0, PAGE, RW, s->file, 0), 0);
    s->fds = fds_open();
    s->memory = s->heap.live;
}

static void come_in(scene *s) { victim.client.sock = connect_to(&s->address, s->len); }

static void check_bystander(scene *s)
{
    uint32_t value = 0, magic = 0x1234567 + s->healthy++;
    check_healthy(&bystander);
    ck_assert_int_eq(pwrite(s->file, &magic, 4, 64), 4);
    ck_assert_int_eq(vfu_iommu_read(vfu_dev_reader(bystander.dev), 64, &value, 4), 0);
    ck_assert_uint_eq(value, magic);
    ck_assert_int_eq(vfu_dev_raise(bystander.dev, VFU_PCI_IRQ_MSIX, 0), 0);
    ck_assert_uint_eq(signals(s->event), 1);
}

/* The victim has nothing left of its last client, and serves the next. */
static void check_victim(scene *s)
{
    ck_assert_uint_eq(fds_open(), s->fds);
    ck_assert_uint_eq(s->heap.live, s->memory);
    ck_assert_uint_eq(mappings(victim.dev), 0);
    come_in(s);
    greet(&victim);
    check_healthy(&victim);
    rig_leave(&victim);
}

static void close_scene(scene *s)
{
    check_bystander(s);
    check_victim(s);
    rig_destroy(&victim);
    rig_destroy(&bystander);
    ck_assert_uint_eq(s->heap.live, 0);
    close(s->event);
    close(s->file);
}

/* ---- silence ----------------------------------------------------------------------------------------------------------- */

/* A client that says nothing more after any byte: before VERSION is complete it is dropped in time; later it may be silent for
 * ever, and costs nobody else anything. */
START_TEST(silent_clients)
{
    scene s;
    size_t hello_len, write_len;
    uint8_t bytes[256];
    vfu_msg hello = command(VFU_CMD_VERSION), access = access_of(VFU_CMD_REGION_WRITE, 0, 8, "12345678", 8);
    hello.u.version.json = "{\"capabilities\":{\"max_msg_fds\":8}}";
    hello.u.version.json_len = (uint32_t)strlen(hello.u.version.json);
    open_scene(&s, 2);
    memcpy(bytes, encoded(&hello, &hello_len), 128);
    memcpy(bytes + hello_len, encoded(&access, &write_len), 64);
    for (size_t cut = 0; cut < hello_len + write_len; cut++) {
        come_in(&s);
        if (cut)
            rig_send(&victim, bytes, cut, NULL, 0);
        settle(victim.dev);
        check_bystander(&s);
        if (cut < hello_len) {
            ck_assert_int_ge(vfu_dev_timeout(victim.dev), 0);
            poll(NULL, 0, vfu_dev_timeout(victim.dev));
            while (vfu_dev_timeout(victim.dev) > 0)
                poll(NULL, 0, 1);
            check_closed(&victim);
        } else {
            ck_assert_int_eq(vfu_dev_timeout(victim.dev), -1);
            ck_assert_int_eq(rig_receive(&victim), 1);
            check_silent(&victim);
        }
        rig_leave(&victim);
        check_victim(&s);
    }
    close_scene(&s);
}
END_TEST

/* A server that says nothing more after any byte of its replies: each call ends in time, and nothing stays. */
START_TEST(silent_servers)
{
    uint8_t bytes[20 + 32];
    vfu_wire_header hello = {0, VFU_CMD_VERSION, 20, VFU_HDR_REPLY, 0}, info = {1, VFU_CMD_DEVICE_GET_INFO, 32, VFU_HDR_REPLY, 0};
    vfu_wire_device_info payload = {16, 3, 9, 5};
    memset(bytes, 0, sizeof(bytes));
    memcpy(bytes, &hello, 16);
    memcpy(bytes + 20, &info, 16);
    memcpy(bytes + 36, &payload, 16);
    for (size_t cut = 0; cut <= sizeof(bytes); cut++) {
        heap h = {0};
        int pair[2];
        vfu_client *client;
        vfu_client_desc desc = {.timeout_ms = 5, .alloc = heap_of(&h), .logger = {.write = ignore_log}};
        make_pair(pair);
        if (cut)
            send_all(pair[1], bytes, cut, NULL, 0);
        int err = vfu_client_attach(&client, pair[0], &desc);
        ck_assert_int_eq(err, cut < 20 ? -ETIMEDOUT : 0);
        if (!err) {
            ck_assert_int_eq(vfu_client_info(client, &payload), cut < sizeof(bytes) ? -ETIMEDOUT : 0);
            ck_assert_int_eq(vfu_client_reset(client), cut < sizeof(bytes) ? -EPIPE : -ETIMEDOUT);
            vfu_client_destroy(client);
        }
        ck_assert_uint_eq(h.live, 0);
        close(pair[1]);
        ck_assert_uint_eq(fds_open(), fds_at_start);
    }
}
END_TEST

/* ---- floods ------------------------------------------------------------------------------------------------------------ */

/* Sends copies of a message, never reading, until the socket is full; lets both devices work a little, and so on. */
static void flood(scene *s, const void *bytes, size_t len, const int *fds, unsigned fd_count, unsigned rounds)
{
    size_t memory = 0;
    unsigned refused = 0;
    for (unsigned round = 0; round < rounds && refused < 3; round++) {
        int64_t n = 0;
        for (unsigned i = 0; i < 1000 && n >= 0; i++)
            n = send_some(victim.client.sock, bytes, len, fds, fd_count);
        ck_assert(n >= 0 || n == -EAGAIN || n == -EPIPE || n == -ETOOMANYREFS || n == -ECONNRESET);
        ck_assert_int_eq(vfu_dev_poll(victim.dev), 0);
        check_bystander(s);
        memory = memory ? memory : s->heap.live;
        ck_assert_uint_le(s->heap.live, memory); /* it doesn't grow */
        ck_assert_uint_le(fds_open(), s->fds + 1 + 64 * VFU_FDS_MAX);
        refused += n == -EPIPE || n == -ECONNRESET;
    }
}

static unsigned log_lines;
static void count_log(void *ctx, vfu_level level, const char *line)
{
    (void)ctx, (void)level, (void)line;
    log_lines++;
}

/* Each kind of message, over and over. */
START_TEST(floods)
{
    static const struct {
        const char *name;
        vfu_wire_header header;
        unsigned payload; /* bytes of 0xff */
        unsigned fds;
    } kinds[] = {
        {"requests", {0, VFU_CMD_DEVICE_GET_INFO, 0, 0, 0}, 16, 0},
        {"requests without replies", {0, VFU_CMD_DEVICE_GET_INFO, 0, VFU_HDR_NO_REPLY, 0}, 16, 0},
        {"refused requests", {0, VFU_CMD_DMA_MAP, 0, 0, 0}, 32, 0},
        {"refused requests without replies", {0, VFU_CMD_DMA_MAP, 0, VFU_HDR_NO_REPLY, 0}, 32, 0},
        {"unknown commands", {0, 99, 0, VFU_HDR_NO_REPLY, 0}, 100, 0},
        {"replies to nothing", {0, VFU_CMD_DMA_READ, 0, VFU_HDR_REPLY, 0}, 48, 0},
        {"error replies to nothing", {0, VFU_CMD_DMA_WRITE, 0, VFU_HDR_REPLY | VFU_HDR_ERROR, 5}, 0, 0},
        {"resets", {0, VFU_CMD_DEVICE_RESET, 0, VFU_HDR_NO_REPLY, 0}, 0, 0},
        {"descriptors", {0, VFU_CMD_DMA_MAP, 0, VFU_HDR_NO_REPLY, 0}, 32, 16},
        {"too many descriptors", {0, VFU_CMD_DEVICE_SET_IRQS, 0, VFU_HDR_NO_REPLY, 0}, 20, 253},
        {"large messages", {0, VFU_CMD_REGION_WRITE, 0, VFU_HDR_NO_REPLY, 0}, 65536, 0},
        {"no message", {0, 0, 8, 0, 0}, 0, 0},
    };
    static uint8_t bytes[16 + 65536];
    int file = memfd("flood", PAGE, 0), fds[VFU_FDS_RECEIVABLE];
    scene s;
    open_scene(&s, 0);
    for (unsigned i = 0; i < VFU_FDS_RECEIVABLE; i++)
        fds[i] = file;
    s.fds = fds_open();
    for (unsigned i = 0; i < COUNT(kinds); i++) {
        vfu_wire_header header = kinds[i].header;
        size_t len = 16 + kinds[i].payload;
        header.size = header.size ? header.size : (uint32_t)len;
        memset(bytes, 0xff, sizeof(bytes));
        memcpy(bytes, &header, 16);
        come_in(&s);
        greet(&victim);
        flood(&s, bytes, len, fds, kinds[i].fds, times(200));
        rig_leave(&victim);
        ck_assert_msg(fds_open() == s.fds, "%s: %u descriptors instead of %u", kinds[i].name, fds_open(), s.fds);
        check_victim(&s);
    }
    close_scene(&s);
    close(file);
}
END_TEST

/* What one client can make a device write to its log has an end. */
START_TEST(flood_of_the_log)
{
    vfu_dev_desc desc = rig_desc(&victim);
    desc.logger = (vfu_logger){.write = count_log};
    rig_create(&victim, &desc);
    rig_connect(&victim);
    greet(&victim);
    log_lines = 0;
    for (unsigned i = 0; i < 1000; i++)
        ck_assert_int_eq(ask_map(&victim, 1, 1, RW, -1, 0), -EINVAL);
    ck_assert_uint_ge(log_lines, 100);
    ck_assert_uint_le(log_lines, 101);
    rig_destroy(&victim);
}
END_TEST

/* ---- descriptors ------------------------------------------------------------------------------------------------------- */

/* 253 descriptors with any command, and with a reply: refused, and all of them closed. */
START_TEST(many_descriptors)
{
    int file = memfd("many", PAGE, 0), fds[VFU_FDS_RECEIVABLE], pair[2];
    uint8_t payload[64] = {0}, bytes[128];
    vfu_client *client;
    scene s;
    open_scene(&s, 0);
    for (unsigned i = 0; i < VFU_FDS_RECEIVABLE; i++)
        fds[i] = file;
    s.fds = fds_open();
    come_in(&s);
    greet(&victim);
    unsigned open = fds_open();
    for (uint16_t cmd = 2; cmd < 20; cmd++) {
        for (uint32_t len = 0; len <= 64; len += 4) {
            vfu_wire_header header = {.id = 7, .cmd = cmd, .size = 16 + len};
            memcpy(bytes, &header, 16);
            memcpy(bytes + 16, payload, len);
            send_all(victim.client.sock, bytes, 16 + len, fds, VFU_FDS_RECEIVABLE);
            settle(victim.dev);
            ck_assert_int_eq(peer_receive(&victim.client), 1);
            header = header_of(victim.client.bytes);
            ck_assert_uint_eq(header.flags, VFU_HDR_REPLY | VFU_HDR_ERROR);
            ck_assert_uint_eq(fds_open(), open);
        }
    }
    check_healthy(&victim);
    rig_leave(&victim);
    s.fds = fds_open();
    close_scene(&s);

    open = fds_open();
    vfu_wire_header hello = {0, VFU_CMD_VERSION, 20, VFU_HDR_REPLY, 0}, reset = {1, VFU_CMD_DEVICE_RESET, 16, VFU_HDR_REPLY, 0};
    make_pair(pair);
    memset(bytes, 0, sizeof(bytes));
    memcpy(bytes, &hello, 16);
    send_all(pair[1], bytes, 20, fds, VFU_FDS_RECEIVABLE);
    send_all(pair[1], &reset, 16, fds, VFU_FDS_RECEIVABLE);
    ck_assert_int_eq(vfu_client_attach(&client, pair[0], NULL), 0);
    ck_assert_int_eq(vfu_client_reset(client), 0);
    vfu_client_destroy(client);
    close(pair[1]);
    ck_assert_uint_eq(fds_open(), open);
    close(file);
}
END_TEST

enum { KINDS = 22 };
static struct {
    const char *name;
    int fd;
    bool maps, signals;
} kinds[KINDS];

static void add_kind(unsigned i, const char *name, int fd, bool maps, bool can_signal)
{
    kinds[i].name = name;
    kinds[i].fd = fd;
    kinds[i].maps = maps;
    kinds[i].signals = can_signal;
}

static int reopen(int fd, int flags)
{
    char path[32];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return open(path, flags | O_CLOEXEC);
}

/* Every kind of descriptor that is to be had, as memory and as an interrupt: only files are mapped, only eventfds are
 * signalled. */
START_TEST(wrong_kinds)
{
    int pair[2], pipes[2], err;
    struct epoll_event none = {.events = EPOLLIN};
    sigset_t signal_set;
    scene s;
    open_scene(&s, 0);
    come_in(&s);
    greet(&victim);
    make_pair(pair);
    must(pipe2(pipes, O_CLOEXEC | O_NONBLOCK));
    sigemptyset(&signal_set);
    add_kind(0, "memory", memfd("kind", PAGE, 0), true, false);
    add_kind(1, "sealed memory", memfd("kind", PAGE, F_SEAL_SHRINK), true, false);
    add_kind(2, "memory sealed against writes", memfd("kind", PAGE, F_SEAL_WRITE), false, false);
    add_kind(3, "memory to read", reopen(kinds[0].fd, O_RDONLY), false, false);
    add_kind(4, "memory to write", reopen(kinds[0].fd, O_WRONLY), false, false);
    add_kind(5, "empty memory", memfd("kind", 0, 0), false, false);
    add_kind(6, "eventfd", event(), false, true);
    add_kind(7, "semaphore", eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE), false, true);
    add_kind(8, "blocking eventfd", eventfd(0, EFD_CLOEXEC), false, true);
    add_kind(9, "pipe to read", pipes[0], false, false);
    add_kind(10, "pipe to write", pipes[1], false, false);
    add_kind(11, "socket", pair[0], false, false);
    add_kind(12, "the client's end of the connection", victim.client.sock, false, false);
    add_kind(13, "epoll", epoll_create1(EPOLL_CLOEXEC), false, false);
    add_kind(14, "timer", timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK), false, false);
    add_kind(15, "signals", signalfd(-1, &signal_set, SFD_CLOEXEC | SFD_NONBLOCK), false, false);
    add_kind(16, "inotify", inotify_init1(IN_CLOEXEC | IN_NONBLOCK), false, false);
    add_kind(17, "/dev/null", open("/dev/null", O_RDWR | O_CLOEXEC), false, false);
    add_kind(18, "/dev/zero", open("/dev/zero", O_RDWR | O_CLOEXEC), false, false);
    add_kind(19, "directory", open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC), false, false);
    add_kind(20, "path", open("/", O_PATH | O_CLOEXEC), false, false);
    add_kind(21, "/proc file", open("/proc/self/status", O_RDONLY | O_CLOEXEC), false, false);
    must(epoll_ctl(kinds[13].fd, EPOLL_CTL_ADD, kinds[6].fd, &none));
    for (unsigned i = 0; i < KINDS; i++) {
        must(kinds[i].fd);
        err = ask_map(&victim, 0x10000, PAGE, RW, kinds[i].fd, 0);
        ck_assert_msg((err == 0) == kinds[i].maps, "%s as memory: %d", kinds[i].name, err);
        if (err == 0)
            ck_assert_int_eq(ask_unmap(&victim, 0x10000, PAGE, 0), 0);
        err = ask_irqs(&victim, 0x24, VFU_PCI_IRQ_MSIX, 0, 1, NULL, &kinds[i].fd, 1);
        ck_assert_msg((err == 0) == kinds[i].signals, "%s as an interrupt: %d", kinds[i].name, err);
        if (err == 0)
            ck_assert_int_eq(vfu_dev_raise(victim.dev, VFU_PCI_IRQ_MSIX, 0), 0);
        err = ask_irqs(&victim, VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_UNMASK, 0, 0, 1, NULL, &kinds[i].fd, 1);
        ck_assert_msg((err == 0) == kinds[i].signals, "%s to unmask: %d", kinds[i].name, err);
        check_bystander(&s);
        check_healthy(&victim);
    }
    for (unsigned i = 0; i < KINDS; i++)
        if (kinds[i].fd != victim.client.sock)
            close(kinds[i].fd);
    close(pair[1]);
    rig_leave(&victim);
    close_scene(&s);
}
END_TEST

/* ---- truncation -------------------------------------------------------------------------------------------------------- */

enum { SHARED = 64 * PAGE };
static atomic_bool truncating;

static void *truncate_all_the_time(void *arg)
{
    chance c = seeded(3);
    while (atomic_load(&truncating))
        if (ftruncate(*(int *)arg, below(&c, 4) ? SHARED : below(&c, SHARED)) < 0)
            abort();
    return NULL;
}

/* A file that becomes shorter and longer at any moment, while it is mapped, read and written: every access ends well or with
 * -EFAULT. */
START_TEST(truncated_at_any_moment)
{
    static uint8_t buf[SHARED];
    int file = memfd("truncated", SHARED, 0);
    chance c = seeded(4);
    pthread_t thread;
    unsigned good = 0, faults = 0, refused = 0;
    scene s;
    open_scene(&s, 0);
    s.fds = fds_open();
    come_in(&s);
    greet(&victim);
    atomic_store(&truncating, true);
    ck_assert_int_eq(pthread_create(&thread, NULL, truncate_all_the_time, &file), 0);
    for (unsigned round = 0; round < times(20000); round++) {
        if (ask_map(&victim, 0, SHARED, RW, file, 0)) {
            refused++; /* too short at that moment */
            continue;
        }
        for (unsigned i = 0; i < 8; i++) {
            uint32_t at = below(&c, SHARED), len = below(&c, SHARED - at) + 1;
            vfu_dma dma = {.iova = at, .buf = buf, .len = len, .to_client = below(&c, 2)};
            uint64_t word;
            int err = vfu_dev_dma(victim.dev, &dma);
            ck_assert_msg(err == 0 || (err == -EFAULT && dma.fault >= at && dma.fault < at + len), "%d", err);
            good += err == 0;
            faults += err == -EFAULT;
            err = vfu_iommu_load(vfu_dev_reader(victim.dev), at & ~7u, 8, VFU_IOMMU_RELAXED, &word);
            ck_assert(err == 0 || err == -EFAULT);
        }
        ck_assert_int_eq(ask_unmap(&victim, 0, SHARED, 0), 0);
    }
    atomic_store(&truncating, false);
    ck_assert_int_eq(pthread_join(thread, NULL), 0);
    ck_assert_uint_gt(good, 0);
    ck_assert_uint_gt(faults + refused, 0);
    rig_leave(&victim);
    close_scene(&s);
    close(file);
}
END_TEST

/* ---- connects and aborts ----------------------------------------------------------------------------------------------- */

/* 10,000 clients that break off somewhere: within a message, with descriptors under way, with replies unread, with several
 * waiting. */
START_TEST(connects_and_aborts)
{
    uint8_t bytes[1024];
    size_t len = 0, part;
    int file = memfd("aborts", 16 * PAGE, F_SEAL_SHRINK);
    chance c = seeded(5);
    scene s;
    vfu_msg parts[] = {command(VFU_CMD_VERSION),
                       map_of(0, PAGE),
                       map_of(0x10000, PAGE),
                       command(VFU_CMD_DEVICE_GET_INFO),
                       access_of(VFU_CMD_REGION_WRITE, 0, 0, "1234567", 8),
                       access_of(VFU_CMD_REGION_READ, 2, 0, NULL, 128)};
    open_scene(&s, 0);
    s.fds = fds_open();
    parts[3].u.device_info.argsz = 16;
    for (unsigned i = 0; i < COUNT(parts); i++, len += part) {
        const uint8_t *message = encoded(&parts[i], &part);
        memcpy(bytes + len, message, part);
    }
    for (unsigned i = 0; i < times(10000); i++) {
        int others[3];
        unsigned waiting = below(&c, 8) ? 0 : 3;
        come_in(&s);
        for (unsigned k = 0; k < waiting; k++)
            others[k] = connect_to(&s.address, s.len);
        size_t cut = below(&c, (uint32_t)len + 1), first = cut < 20 ? cut : 20 + below(&c, (uint32_t)cut - 19);
        if (first)
            send_all(victim.client.sock, bytes, first, &file, below(&c, 2));
        if (below(&c, 2))
            settle(victim.dev);
        if (cut > first)
            send_some(victim.client.sock, bytes + first, cut - first, &file, below(&c, 2));
        if (below(&c, 2))
            vfu_dev_poll(victim.dev);
        if (below(&c, 4) == 0) {
            struct linger reset = {1, 0};
            setsockopt(victim.client.sock, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
        }
        peer_close(&victim.client);
        close_fds(others, waiting);
        settle(victim.dev);
        ck_assert_msg(fds_open() == s.fds && s.heap.live == s.memory, "client %u: %u descriptors, %zu bytes", i, fds_open(),
                      s.heap.live);
        if (i % 100 == 0)
            check_bystander(&s);
    }
    ck_assert_uint_eq(victim.maps, victim.unmaps);
    ck_assert_uint_gt(victim.maps, 0);
    ck_assert_uint_eq(vmas_of("aborts"), 0);
    close_scene(&s);
    close(file);
}
END_TEST

/* ---- kill -9 ----------------------------------------------------------------------------------------------------------- */

enum { MEMORY = 1 << 20, BY_MESSAGE_AT = 1 << 24 };

/* Everything that a client does, once. 0, or the error of the connection. */
static int busy_session(vfu_client *client, uint8_t *memory, int file, const int *events)
{
    int err = vfu_client_dma_map(client, 0, MEMORY, 3, memory, file, 0);
    if (!err)
        err = vfu_client_dma_map(client, BY_MESSAGE_AT, MEMORY, 3, memory, -1, 0);
    if (!err)
        err = vfu_client_irq_assign(client, VFU_PCI_IRQ_MSIX, 0, 2, events);
    if (!err)
        err = set_engine(client, 0x2c /* NOTIFY */, 1, 4);
    if (!err)
        err = copy_by_engine(client, MEMORY / 2, 0, 65536);
    if (!err)
        err = copy_by_engine(client, BY_MESSAGE_AT + MEMORY / 2, BY_MESSAGE_AT, 65536);
    if (!err)
        err = vfu_client_dma_unmap(client, BY_MESSAGE_AT, MEMORY);
    if (!err)
        err = vfu_client_reset(client);
    if (err >= 0)
        err = vfu_client_dma_unmap(client, 0, MEMORY);
    return err < 0 ? err : 0;
}

static uint8_t *shared(int file)
{
    uint8_t *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    ck_assert_ptr_ne(memory, MAP_FAILED);
    return memory;
}

static unsigned fds_of(pid_t pid)
{
    char path[32];
    unsigned count = 0;
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    DIR *dir = opendir(path);
    ck_assert_ptr_nonnull(dir);
    while (readdir(dir))
        count++;
    closedir(dir);
    return count - 2;
}

/* KiB by which the engine may grow. AddressSanitizer keeps 256 MiB of what is freed, and an eighth more to know about it. */
#ifdef __SANITIZE_ADDRESS__
enum { GROWTH = 4096 + 288 * 1024 };
#else
enum { GROWTH = 4096 };
#endif

/* KiB of memory that is the process's own */
static unsigned long memory_of(pid_t pid)
{
    char path[32], line[128];
    unsigned long value = 0;
    snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "re");
    ck_assert_ptr_nonnull(file);
    while (fgets(line, sizeof(line), file) && sscanf(line, "RssAnon: %lu", &value) != 1) {
    }
    fclose(file);
    return value;
}

static void wait_us(uint32_t us) { nanosleep(&(struct timespec){.tv_nsec = (long)us * 1000}, NULL); }

static void finish_child(pid_t pid, int how)
{
    int status;
    must(kill(pid, how));
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == how, "it ended by itself, with status %#x", (unsigned)status);
}

static int connect_engine(vfu_client **client, const struct sockaddr_un *address, socklen_t len)
{
    vfu_client_desc desc = {.timeout_ms = PATIENCE_MS, .max_dma_maps = 64, .logger = {.write = ignore_log}};
    return vfu_client_attach(client, connect_to(address, len), &desc);
}

/* The client is killed at 1,000 random moments of its sessions; the engine serves the next, and keeps nothing. */
START_TEST(killed_clients)
{
    struct sockaddr_un address;
    socklen_t len;
    child engine;
    chance c = seeded(6);
    int file = memfd("killed-clients", MEMORY, F_SEAL_SHRINK), events[2] = {event(), event()};
    uint8_t *memory = shared(file);
    vfu_client *client;
    unsigned long kib = 0;
    unsigned fds = 0;
    start_engine(&engine, &address, &len);
    for (unsigned i = 0; i < times(1000); i++) {
        pid_t pid = fork();
        must(pid);
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
            vfu_client_desc desc = {.timeout_ms = PATIENCE_MS, .max_dma_maps = 64};
            if (connect(sock, (struct sockaddr *)&address, len) < 0 || vfu_client_attach(&client, sock, &desc))
                _exit(1);
            while (busy_session(client, memory, file, events) == 0) {
            }
            _exit(2);
        }
        wait_us(below(&c, 4000));
        finish_child(pid, SIGKILL);
        if (i % 10)
            continue;
        ck_assert_int_eq(connect_engine(&client, &address, len), 0);
        ck_assert_int_eq(busy_session(client, memory, file, events), 0);
        if (!fds) {
            fds = fds_of(engine.pid);
            kib = memory_of(engine.pid);
        }
        ck_assert_uint_eq(fds_of(engine.pid), fds);
        ck_assert_msg(memory_of(engine.pid) <= kib + GROWTH, "after %u clients the engine has %lu KiB instead of %lu", i,
                      memory_of(engine.pid), kib);
        vfu_client_destroy(client);
    }
    stop_engine(&engine);
    munmap(memory, MEMORY);
    close(file);
    close_fds(events, 2);
}
END_TEST

/* The engine is killed at 1,000 random moments of a session: the client is told at once, loses nothing, and finds the next
 * engine at the same place. */
START_TEST(killed_engines)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char option[128];
    chance c = seeded(7);
    int file = memfd("killed-engines", MEMORY, F_SEAL_SHRINK), events[2] = {event(), event()};
    uint8_t *memory = shared(file);
    vfu_client_desc desc = {.timeout_ms = PATIENCE_MS, .max_dma_maps = 64, .logger = {.write = ignore_log}};
    snprintf(address.sun_path, sizeof(address.sun_path), "/tmp/vfu-siege-%d.sock", (int)getpid());
    snprintf(option, sizeof(option), "--socket-path=%s", address.sun_path);
    for (unsigned i = 0; i < times(1000); i++) {
        vfu_client *client = NULL;
        int err;
        pid_t pid = fork(), killer;
        must(pid);
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            execl(example_path("dma_engine"), "dma_engine", option, (char *)NULL);
            _exit(127);
        }
        for (unsigned tries = 0; (err = vfu_client_connect(&client, address.sun_path, &desc)) == -ECONNREFUSED || err == -ENOENT;
             tries++) {
            ck_assert_uint_lt(tries, PATIENCE_MS);
            wait_us(1000);
        }
        ck_assert_int_eq(err, 0);
        uint32_t us = below(&c, 3000);
        must(killer = fork());
        if (killer == 0) {
            wait_us(us);
            kill(pid, SIGKILL);
            _exit(0);
        }
        while ((err = busy_session(client, memory, file, events)) == 0) {
        }
        ck_assert_msg(err == -EPIPE, "%d", err);
        ck_assert_int_eq(waitpid(killer, NULL, 0), killer);
        finish_child(pid, SIGKILL);
        vfu_client_destroy(client);
        ck_assert_uint_eq(fds_open(), fds_at_start + 3);
    }
    unlink(address.sun_path);
    munmap(memory, MEMORY);
    close(file);
    close_fds(events, 2);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("siege");
    TCase *tc = tcase_create("siege");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, silent_clients);
    tcase_add_test(tc, silent_servers);
    tcase_add_test(tc, floods);
    tcase_add_test(tc, flood_of_the_log);
    tcase_add_test(tc, many_descriptors);
    tcase_add_test(tc, wrong_kinds);
    tcase_add_test(tc, truncated_at_any_moment);
    tcase_add_test(tc, connects_and_aborts);
    tcase_add_test(tc, killed_clients);
    tcase_add_test(tc, killed_engines);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
