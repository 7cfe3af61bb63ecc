/* SPDX-License-Identifier: MIT */
/*
 * What a client is tested against: a device of ours that runs in a thread (struct served); and a server that is a script without a
 * thread: its replies are in the socket before the client asks, since the client's ids count from 0. And counting descriptors
 * around each test (note_fds, check_fds).
 *
 * Include it first.
 */
#ifndef VFU_TESTS_CLIENT_H
#define VFU_TESTS_CLIENT_H

#include "util.h"

#include <pthread.h>

static unsigned fds_at_start;
static inline void note_fds(void) { fds_at_start = fds_open(); }
static inline void check_fds(void) { ck_assert_uint_eq(fds_open(), fds_at_start); }

/* ---- a device in a thread --------------------------------------------------------------------------------------------- */

typedef struct served {
    vfu_dev *dev; /* borrowed */
    pthread_t thread;
    struct sockaddr_un address;
    socklen_t len;
} served;

static inline void *serve_run(void *arg)
{
    ck_assert_int_eq(vfu_dev_run(arg), 0);
    return NULL;
}

static inline void serve(served *s, vfu_dev *dev)
{
    s->dev = dev;
    ck_assert_int_eq(vfu_dev_attach(dev, listener(&s->address, &s->len)), 0);
    ck_assert_int_eq(pthread_create(&s->thread, NULL, serve_run, dev), 0);
}

static inline vfu_client *served_client(const served *s, const vfu_client_desc *desc)
{
    vfu_client *client;
    ck_assert_int_eq(vfu_client_attach(&client, connect_to(&s->address, s->len), desc), 0);
    return client;
}

static inline void serve_end(served *s)
{
    vfu_dev_stop(s->dev);
    pthread_join(s->thread, NULL);
}

/* ---- a device that does as it is told ---------------------------------------------------------------------------------- */

static rig R;
static served device;

/* What the device does with a write, by its offset in BAR 0. */
enum {
    RAISE_AT = 0x10,    /* raises the MSI-X vector that is written */
    TRANSFER_AT = 0x40, /* {iova, len, to_client}: transfers, then raises vector 3 */
    RESULT_AT = 0x60
};

static uint8_t device_buffer[1 << 20];
static vfu_dma transfer;

static inline void transfer_done(vfu_dma *dma, int result)
{
    (void)dma;
    memcpy(&R.storage[0][RESULT_AT], &result, sizeof(result));
    vfu_dev_raise(R.dev, VFU_PCI_IRQ_MSIX, 3);
}

static inline void on_work(rig *r)
{
    uint64_t words[3];
    memcpy(words, &r->storage[0][TRANSFER_AT], sizeof(words));
    transfer = (vfu_dma){.iova = words[0], .buf = device_buffer, .len = words[1], .to_client = words[2], .done = transfer_done};
    int result = vfu_dev_dma(r->dev, &transfer);
    if (result != 1)
        transfer_done(&transfer, result);
}

static inline void on_write(rig *r)
{
    if (r->last_region == 0 && r->last_offset == RAISE_AT)
        vfu_dev_raise(r->dev, VFU_PCI_IRQ_MSIX, r->storage[0][RAISE_AT]);
    if (r->last_region == 0 && r->last_offset == TRANSFER_AT)
        vfu_dev_want_work(r->dev);
}

static inline vfu_dev_desc device_desc(void)
{
    vfu_dev_desc desc = rig_desc(&R);
    R.on_write = on_write;
    R.on_work = on_work;
    return desc;
}

static inline vfu_client *device_start(const vfu_dev_desc *desc, const vfu_client_desc *client)
{
    rig_create(&R, desc);
    serve(&device, R.dev);
    return served_client(&device, client);
}

static inline vfu_client *device_open(const vfu_client_desc *client)
{
    vfu_dev_desc desc = device_desc();
    return device_start(&desc, client);
}

static inline void device_end(void)
{
    serve_end(&device);
    rig_destroy(&R);
}

static inline void device_close(vfu_client *client)
{
    vfu_client_destroy(client);
    device_end();
}

static inline uint32_t get32(vfu_client *client, uint32_t region, uint64_t offset)
{
    uint32_t value;
    ck_assert_int_eq(vfu_client_region_read(client, region, offset, &value, sizeof(value)), 0);
    return value;
}

static inline int put32(vfu_client *client, uint32_t region, uint64_t offset, uint32_t value)
{
    return vfu_client_region_write(client, region, offset, &value, sizeof(value));
}

/* Has the device transfer, and serves it. */
static inline int device_dma(vfu_client *client, int wake, uint64_t iova, uint64_t len, bool to_client)
{
    uint64_t words[3] = {iova, len, to_client};
    ck_assert_int_eq(vfu_client_region_write(client, 0, TRANSFER_AT, words, sizeof(words)), 0);
    ck_assert_int_eq(vfu_client_serve(client, wake, PATIENCE_MS), 1);
    ck_assert_uint_eq(signals(wake), 1);
    return (int)get32(client, 0, RESULT_AT);
}

/* ---- a scripted server ------------------------------------------------------------------------------------------------ */

static peer server;
static uint16_t script_id; /* of the client's next request */
static heap client_heap;

/* Puts a message into the client's socket. */
static inline void say_as(uint16_t id, uint16_t cmd, uint32_t flags, uint32_t error, uint32_t size, const void *payload,
                          uint32_t len, const int *fds, unsigned fd_count)
{
    static uint8_t bytes[65536];
    vfu_wire_header header = {.id = id, .cmd = cmd, .size = size, .flags = flags, .error = error};
    memcpy(bytes, &header, sizeof(header));
    if (len)
        memcpy(bytes + 16, payload, len);
    send_all(server.sock, bytes, 16 + len, fds, fd_count);
}

static inline void reply(uint16_t cmd, const void *payload, uint32_t len)
{
    say_as(script_id++, cmd, VFU_HDR_REPLY, 0, 16 + len, payload, len, NULL, 0);
}

/* The next message of the client, which must be there. */
static inline vfu_msg heard(void)
{
    vfu_msg msg;
    ck_assert_int_eq(peer_receive(&server), 1);
    ck_assert_int_eq(vfu_msg_decode(server.bytes, server.have, &msg), 0);
    return msg;
}

static inline int script_start(void)
{
    int pair[2];
    make_pair(pair);
    server = (peer){.sock = pair[0]};
    script_id = 0;
    client_heap = (heap){0};
    return pair[1];
}

static inline vfu_client_desc script_desc(uint32_t timeout_ms)
{
    return (vfu_client_desc){.timeout_ms = timeout_ms ? timeout_ms : PATIENCE_MS,
                             .alloc = heap_of(&client_heap),
                             .logger = {.write = ignore_log}};
}

/* A client that a good server has greeted with this JSON. */
static inline vfu_client *script_open_with(const char *json, uint32_t timeout_ms)
{
    uint8_t version[512] = {0};
    vfu_client *client;
    vfu_client_desc desc = script_desc(timeout_ms);
    int sock = script_start();
    memcpy(version + 4, json, strlen(json) + 1);
    reply(VFU_CMD_VERSION, version, (uint32_t)(4 + (*json ? strlen(json) + 1 : 0)));
    ck_assert_int_eq(vfu_client_attach(&client, sock, &desc), 0);
    vfu_msg hello = heard();
    ck_assert_uint_eq(hello.cmd, VFU_CMD_VERSION);
    ck_assert_uint_eq(hello.u.version.major, 0);
    ck_assert_uint_eq(hello.u.version.minor, 0);
    return client;
}

static inline vfu_client *script_open(void) { return script_open_with("{\"capabilities\":{\"max_msg_fds\":3}}", 0); }

static inline void script_close(vfu_client *client)
{
    vfu_client_destroy(client);
    peer_close(&server);
    ck_assert_uint_eq(client_heap.live, 0);
}

/* The connection is as good as before. */
static inline void check_usable(vfu_client *client)
{
    vfu_wire_device_info info, good = {.argsz = 16, .flags = VFU_DEVICE_INFO_PCI, .num_regions = 9, .num_irqs = 5};
    reply(VFU_CMD_DEVICE_GET_INFO, &good, sizeof(good));
    ck_assert_int_eq(vfu_client_info(client, &info), 0);
    ck_assert_mem_eq(&info, &good, sizeof(good));
}

#endif /* VFU_TESTS_CLIENT_H */
