/* SPDX-License-Identifier: MIT */
/*
 * Proofs of the framing of the transport: one receive and one take, from any state that a connection can be in (is_valid). Each
 * leaves such a state, and the bytes of the stream in order, so that holds for a stream of any length that arrives in any
 * pieces.
 *
 * The buffer is smaller than a real one (vfu_conn_create adds 64 KiB to the largest message), so every receive moves what is
 * left to the front. No descriptors travel.
 */
#include "proof.h"

#define VFU_IMPLEMENTATION
#define VFU_STATIC
#include "vfu.h"

#ifndef LARGEST
#define LARGEST 18 /* bytes of the largest message that the connection accepts */
#endif
#ifndef CAPACITY
#define CAPACITY 34 /* bytes of the buffer: two small messages and a part of the next */
#endif

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

/* What is at offset `at` of the buffer: the size of a whole message; 0: a part of one; UINT32_MAX: no message begins like
 * this. */
static uint32_t size_at(size_t at)
{
    uint32_t size;
    if (conn.rx_end - at < VFU_HDR_SIZE)
        return 0;
    memcpy(&size, buffer + at + 4, sizeof size);
    return size < VFU_HDR_SIZE || size > LARGEST ? UINT32_MAX : size <= conn.rx_end - at ? size : 0;
}

/* Whole messages from rx_start to rx_scanned, and behind that a part of one, or what breaks the stream and is known to. */
static bool is_valid(void)
{
    if (conn.rx_start > conn.rx_scanned || conn.rx_scanned > conn.rx_end || conn.rx_end > conn.capacity)
        return false;
    size_t at = conn.rx_start;
    for (size_t i = 0; i < CAPACITY / VFU_HDR_SIZE; i++)
        if (at < conn.rx_scanned) {
            uint32_t size = size_at(at);
            if (size == 0 || size == UINT32_MAX)
                return false;
            at += size;
        }
    return at == conn.rx_scanned && size_at(at) == (conn.rx_broken ? UINT32_MAX : 0);
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
    int got = vfu_conn_next(&conn, &frame);
    PROVE(is_valid());
    if (got == 1) {
        PROVE(size >= VFU_HDR_SIZE && size <= LARGEST && size <= had);
        PROVE(frame.bytes == buffer + start && frame.len == size && frame.fd_count == 0);
        PROVE(conn.rx_end - conn.rx_start == had - size && (conn.rx_start == start + size || conn.rx_start == conn.rx_end));
    } else {
        PROVE(conn.rx_start == start && conn.rx_end - start == had);
        PROVE(got == (had < VFU_HDR_SIZE || (size >= VFU_HDR_SIZE && size <= LARGEST) ? 0 : -EBADMSG));
        PROVE(got != 0 || had < VFU_HDR_SIZE || size > had);
    }
}
