/* SPDX-License-Identifier: MIT */
/*
 * Proofs of the framing step of the transport: one receive and one take, from any state that a connection can be in. They keep that
 * state valid and the stream in order, so this holds for a stream that arrives in any pieces, down to single bytes.
 *
 * The buffer is smaller than a real one (vfu_conn_create adds 64 KiB to the largest message), so every receive moves what is left to
 * the front. No descriptors travel.
 */
#include "proof.h"

#define VFU_IMPLEMENTATION
#define VFU_STATIC
#include "vfu.h"

enum {
    LARGEST = 18, /* bytes of the largest message that the connection accepts */
    CAPACITY = 20 /* of the buffer */
};

static uint8_t buffer[CAPACITY], arriving[CAPACITY];
static vfu_conn conn;
static size_t received;

/* Some bytes, at least one. */
static int64_t receive(void *ctx, void *buf, size_t len, int *fds, unsigned *fd_count)
{
    (void)ctx;
    (void)fds;
    PROVE(len > 0 && len <= CAPACITY);
    received = up_to(CAPACITY);
    ASSUME(received > 0 && received <= len);
    PROVE((uint8_t *)buf >= buffer && (uint8_t *)buf + len == buffer + CAPACITY);
    for (size_t i = 0; i < received; i++)
        ((uint8_t *)buf)[i] = arriving[i];
    *fd_count = 0;
    return (int64_t)received;
}

static bool is_valid(void)
{
    return conn.rx_start <= conn.rx_scanned && conn.rx_scanned <= conn.rx_end && conn.rx_end <= conn.capacity;
}

static void any_connection(void)
{
    uint8_t any[CAPACITY], more[CAPACITY];
    for (size_t i = 0; i < CAPACITY; i++) {
        buffer[i] = any[i];
        arriving[i] = more[i];
    }
    conn.fd = -1;
    conn.max_msg = LARGEST;
    conn.max_fds = 1;
    conn.capacity = CAPACITY;
    conn.rx = buffer;
    conn.io.receive = receive;
    conn.rx_start = up_to(CAPACITY);
    conn.rx_scanned = up_to(CAPACITY);
    conn.rx_end = up_to(CAPACITY);
    conn.rx_broken = nondet_bool();
    ASSUME(is_valid());
}

/* What was there stays, what arrives comes behind it. */
void receive_step(void)
{
    any_connection();
    const size_t start = conn.rx_start, had = conn.rx_end - conn.rx_start, any = up_to(CAPACITY - 1);
    const uint8_t before = start + any < CAPACITY ? buffer[start + any] : 0;
    int n = vfu_conn_receive(&conn);
    PROVE(is_valid());
    if (n < 0) {
        PROVE(n == -ENOBUFS && had == CAPACITY);
        return;
    }
    PROVE((size_t)n == received && conn.rx_end - conn.rx_start == had + received);
    if (any < had)
        PROVE(buffer[conn.rx_start + any] == before);
    else if (any < had + received)
        PROVE(buffer[conn.rx_start + any] == arriving[any - had]);
}

/* The message at the start, if it is complete, and nothing else. */
void take_step(void)
{
    vfu_frame frame = {0};
    any_connection();
    const size_t start = conn.rx_start, had = conn.rx_end - conn.rx_start;
    uint32_t size = 0;
    if (had >= VFU_HDR_SIZE)
        memcpy(&size, buffer + start + 4, sizeof size);
    /* vfux_conn_scan has stopped at or behind the end of the first message, if that is complete. */
    ASSUME(size < VFU_HDR_SIZE || size > LARGEST || size > had || conn.rx_scanned - start >= size);
    int got = vfu_conn_next(&conn, &frame);
    PROVE(is_valid());
    if (got == 1) {
        PROVE(size >= VFU_HDR_SIZE && size <= LARGEST && size <= had);
        PROVE(frame.bytes == buffer + start && frame.len == size && frame.fd_count == 0);
        PROVE(conn.rx_end - conn.rx_start == had - size);
    } else {
        PROVE(conn.rx_start == start && conn.rx_end - start == had);
        PROVE(got == (had < VFU_HDR_SIZE || (size >= VFU_HDR_SIZE && size <= LARGEST) ? 0 : -EBADMSG));
        PROVE(got != 0 || had < VFU_HDR_SIZE || size > had);
    }
}
