/* SPDX-License-Identifier: MIT */
/*
 * ==== transport ====
 *
 * A connection over a scripted I/O seam: cut at every byte, failing at every byte, descriptors at every byte; and over real sockets:
 * bursts of messages with descriptors anywhere, full sockets, descriptors that don't fit the process. Each test counts the
 * descriptors of the process at its start and end.
 */
#include "util.h"

/* ---- messages -------------------------------------------------------------------------------------------------------------------- */

/* A message of `size` bytes: header, then bytes that depend on the id and their place. The transport looks at the size alone. */
static void put_message(uint8_t *out, uint16_t id, uint32_t size)
{
    vfu_wire_header header = {.id = id, .cmd = VFU_CMD_DEVICE_RESET, .size = size};
    memcpy(out, &header, sizeof(header));
    for (uint32_t i = 16; i < size; i++)
        out[i] = (uint8_t)(i * 7 + id);
}

static bool is_message(const uint8_t *bytes, uint16_t id, uint32_t size)
{
    static uint8_t expected[1 << 21];
    ck_assert_uint_le(size, sizeof(expected));
    put_message(expected, id, size);
    return memcmp(bytes, expected, size) == 0;
}

static unsigned fds_at_start;
static void note_fds(void) { fds_at_start = fds_open(); }
static void check_fds(void) { ck_assert_uint_eq(fds_open(), fds_at_start); }

static vfu_conn *conn_on(int fd)
{
    vfu_conn *conn;
    ck_assert_int_eq(vfu_conn_create(&conn, &(vfu_conn_desc){.fd = fd}), 0);
    return conn;
}

/* ---- the scripted seam, receiving ------------------------------------------------------------------------------------------------- */

enum { SCRIPT_MAX = 4096 };

/* What comes: bytes up to each stop in turn, with EAGAIN before each piece, and after the last one the end. */
typedef struct script {
    const uint8_t *bytes;
    size_t at, stops[SCRIPT_MAX];
    unsigned stop_count, next;
    unsigned fds_at[SCRIPT_MAX]; /* descriptors that come with the piece that ends at that stop */
    bool ready;
    int end; /* 0: end of file, or a negative errno */
    unsigned end_fds;
    ino_t first_ino; /* of the descriptor given last */
} script;

static void add_stop(script *s, size_t at, unsigned fds)
{
    if (at == (s->stop_count ? s->stops[s->stop_count - 1] : 0))
        return;
    ck_assert_uint_lt(s->stop_count, SCRIPT_MAX);
    s->stops[s->stop_count] = at;
    s->fds_at[s->stop_count++] = fds;
}

static void give_fds(int *fds, unsigned *count, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        fds[(*count)++] = null_fd();
}

static int64_t script_receive(void *ctx, void *buf, size_t len, int *fds, unsigned *fd_count)
{
    script *s = ctx;
    *fd_count = 0;
    s->ready = !s->ready;
    if (s->ready)
        return -EAGAIN;
    if (s->next == s->stop_count) {
        give_fds(fds, fd_count, s->end_fds);
        return s->end;
    }
    size_t n = s->stops[s->next] - s->at;
    ck_assert_uint_ge(len, n);
    memcpy(buf, s->bytes + s->at, n);
    give_fds(fds, fd_count, s->fds_at[s->next]);
    s->at += n;
    s->next++;
    return (int64_t)n;
}

static int64_t never_send(void *ctx, const vfu_slice *slices, unsigned count, const int *fds, unsigned fd_count)
{
    (void)ctx, (void)slices, (void)count, (void)fds, (void)fd_count;
    return -EAGAIN;
}

static vfu_conn *conn_of_script(script *s, uint32_t max_msg, uint32_t max_fds)
{
    vfu_io io = {s, script_receive, never_send};
    vfu_conn *conn;
    ck_assert_int_eq(vfu_conn_create(&conn, &(vfu_conn_desc){.fd = -1, .io = &io, .max_msg = max_msg, .max_fds = max_fds}), 0);
    ck_assert_int_eq(vfu_conn_fd(conn), -1);
    return conn;
}

/* The stream that is cut: its messages' sizes. 276 bytes. */
static const uint32_t sizes[] = {16, 17, 40, 16, 100, 20, 67};
enum { MESSAGES = sizeof(sizes) / sizeof(sizes[0]), STREAM = 276 };
static uint8_t stream[STREAM];

static void make_stream(void)
{
    size_t at = 0;
    for (uint16_t i = 0; i < MESSAGES; i++) {
        put_message(stream + at, i, sizes[i]);
        at += sizes[i];
    }
    ck_assert_uint_eq(at, STREAM);
}

static size_t message_end(unsigned i)
{
    size_t end = 0;
    for (unsigned k = 0; k <= i; k++)
        end += sizes[k];
    return end;
}

/* The message that byte `at` belongs to. */
static unsigned message_of(size_t at)
{
    unsigned i = 0;
    while (message_end(i) <= at)
        i++;
    return i;
}

/* Receives the script to its end. fds_of[i] is how many descriptors message i must come with. Returns what ended it; *taken: messages. */
static int play(script *s, const unsigned *fds_of, unsigned *taken)
{
    vfu_conn *conn = conn_of_script(s, 0, 0);
    vfu_frame frame = {0};
    int err;
    *taken = 0;
    for (;;) {
        err = vfu_conn_receive(conn);
        if (err == -EAGAIN)
            continue;
        if (err < 0)
            break;
        while (vfu_conn_next(conn, &frame) == 1) {
            unsigned i = (*taken)++;
            ck_assert_uint_lt(i, MESSAGES);
            ck_assert_uint_le(message_end(i), s->at);
            ck_assert_uint_eq(frame.len, sizes[i]);
            ck_assert(is_message(frame.bytes, (uint16_t)i, sizes[i]));
            ck_assert_uint_eq(frame.fd_count, fds_of ? fds_of[i] : 0);
            ck_assert_uint_eq(frame.fds_refused, 0);
        }
        /* whatever is complete was given */
        ck_assert(*taken == MESSAGES || message_end(*taken) > s->at);
    }
    ck_assert_int_eq(vfu_conn_next(conn, &frame), 0);
    vfu_conn_destroy(conn);
    return err;
}

/* Pieces of every size */
START_TEST(pieces_of_n)
{
    static script s;
    unsigned taken;
    note_fds();
    make_stream();
    s = (script){.bytes = stream};
    for (size_t at = (size_t)_i; at < STREAM; at += (size_t)_i)
        add_stop(&s, at, 0);
    add_stop(&s, STREAM, 0);
    ck_assert_int_eq(play(&s, NULL, &taken), -EPIPE);
    ck_assert_uint_eq(taken, MESSAGES);
    check_fds();
}
END_TEST

/* Every split in two, and in three around each message's borders; descriptors with the first piece belong to the message of its last byte. */
START_TEST(descriptors_at_every_byte)
{
    static script s;
    unsigned taken;
    note_fds();
    make_stream();
    for (size_t cut = 1; cut <= STREAM; cut++) {
        unsigned fds_of[MESSAGES] = {0}, owner = message_of(cut - 1);
        s = (script){.bytes = stream};
        add_stop(&s, cut, 3);
        add_stop(&s, STREAM, 0);
        fds_of[owner] = 3;
        ck_assert_int_eq(play(&s, fds_of, &taken), -EPIPE);
        ck_assert_uint_eq(taken, MESSAGES);
    }
    check_fds();
}
END_TEST

/* Descriptors come in two lots, with any two bytes: one lot each, or both for the same message. */
START_TEST(descriptors_in_two_lots)
{
    static script s;
    unsigned taken;
    note_fds();
    make_stream();
    for (size_t first = 1; first < STREAM; first += 5)
        for (size_t second = first + 1; second <= STREAM; second += 3) {
            unsigned fds_of[MESSAGES] = {0};
            s = (script){.bytes = stream};
            add_stop(&s, first, 2);
            add_stop(&s, second, 1);
            add_stop(&s, STREAM, 0);
            fds_of[message_of(first - 1)] += 2;
            fds_of[message_of(second - 1)] += 1;
            ck_assert_int_eq(play(&s, fds_of, &taken), -EPIPE);
            ck_assert_uint_eq(taken, MESSAGES);
        }
    check_fds();
}
END_TEST

/* The end, or an error, after every byte: what is complete was given, and descriptors of the rest are closed, also those that come
 * with the end itself. */
static const int ends[] = {0, -ECONNRESET, -EIO, -EBADMSG, -ENOTCONN};

START_TEST(end_at_every_byte)
{
    static script s;
    unsigned taken;
    note_fds();
    make_stream();
    for (size_t cut = 0; cut <= STREAM; cut++) {
        unsigned complete = cut == STREAM ? MESSAGES : message_of(cut), fds_of[MESSAGES] = {0};
        s = (script){.bytes = stream, .end = ends[_i], .end_fds = 2};
        add_stop(&s, cut, 2);
        if (cut)
            fds_of[message_of(cut - 1)] = 2;
        ck_assert_int_eq(play(&s, fds_of, &taken), ends[_i] ? ends[_i] : -EPIPE);
        ck_assert_uint_eq(taken, complete);
    }
    check_fds();
}
END_TEST

/* The size field, around each limit, arriving at once and by the byte */
static const struct size_case {
    uint32_t max, size;
    int result; /* of vfu_conn_next once the header is there; 1: a message */
} size_cases[] = {
    {0, 0, -EBADMSG}, {0, 1, -EBADMSG}, {0, 2, -EBADMSG}, {0, 3, -EBADMSG}, {0, 4, -EBADMSG}, {0, 5, -EBADMSG}, {0, 6, -EBADMSG},
    {0, 7, -EBADMSG}, {0, 8, -EBADMSG}, {0, 9, -EBADMSG}, {0, 10, -EBADMSG}, {0, 11, -EBADMSG}, {0, 12, -EBADMSG}, {0, 13, -EBADMSG},
    {0, 14, -EBADMSG}, {0, 15, -EBADMSG}, {0, 16, 1}, {0, 17, 1}, {0, VFU_MSG_MAX_DEFAULT, 1}, {0, VFU_MSG_MAX_DEFAULT + 1, -EBADMSG},
    {0, 0x7fffffff, -EBADMSG}, {0, 0x80000000, -EBADMSG}, {0, 0xffffffff, -EBADMSG}, {0, 0xfffffff0, -EBADMSG},
    {16, 16, 1}, {16, 17, -EBADMSG}, {17, 17, 1}, {17, 18, -EBADMSG}, {4096, 4096, 1}, {4096, 4097, -EBADMSG},
};

START_TEST(size_field)
{
    const struct size_case *c = &size_cases[_i];
    static uint8_t bytes[VFU_MSG_MAX_DEFAULT + 16];
    static script s;
    note_fds();
    for (unsigned by_byte = 0; by_byte < 2; by_byte++) {
        uint32_t len = c->result == 1 ? c->size : 16;
        vfu_frame frame = {0};
        int err;
        put_message(bytes, 5, len);
        memcpy(bytes + 4, &c->size, 4);
        s = (script){.bytes = bytes};
        for (size_t at = 1; by_byte && at < 40 && at < len; at++)
            add_stop(&s, at, 0);
        for (size_t at = 60000; at < len; at += 60000)
            add_stop(&s, at, 0);
        add_stop(&s, len, 1);
        vfu_conn *conn = conn_of_script(&s, c->max, 0);
        do {
            err = vfu_conn_receive(conn);
            ck_assert(err > 0 || err == -EAGAIN);
            if (s.next < s.stop_count && s.at < 16)
                ck_assert_int_eq(vfu_conn_next(conn, &frame), 0);
        } while (s.next < s.stop_count);
        ck_assert_int_eq(vfu_conn_next(conn, &frame), c->result);
        if (c->result == 1) {
            ck_assert_uint_eq(frame.len, c->size);
            ck_assert(is_message(frame.bytes, 5, c->size));
            ck_assert_uint_eq(frame.fd_count, 1);
            ck_assert_int_eq(vfu_conn_next(conn, &frame), 0);
        } else { /* for good */
            ck_assert_int_eq(vfu_conn_next(conn, &frame), c->result);
        }
        vfu_conn_destroy(conn);
    }
    check_fds();
}
END_TEST

/* Good messages before an impossible size are given, descriptors behind it are closed. */
START_TEST(size_breaks_in_the_middle)
{
    static uint8_t bytes[STREAM + 16 + 100];
    static script s;
    vfu_frame frame = {0};
    unsigned taken = 0;
    int got;
    note_fds();
    make_stream();
    memcpy(bytes, stream, STREAM);
    memset(bytes + STREAM, 0, 116);
    s = (script){.bytes = bytes};
    add_stop(&s, STREAM + 16, 2);
    add_stop(&s, STREAM + 116, 2);
    vfu_conn *conn = conn_of_script(&s, 0, 0);
    while (s.next < s.stop_count)
        vfu_conn_receive(conn);
    while ((got = vfu_conn_next(conn, &frame)) == 1) {
        ck_assert_uint_eq(frame.fd_count, 0);
        taken++;
    }
    ck_assert_int_eq(got, -EBADMSG);
    ck_assert_uint_eq(taken, MESSAGES);
    vfu_conn_destroy(conn);
    check_fds();
}
END_TEST

/* Too many: the first max_fds are kept in order, the rest is closed and counted. */
static const struct many_case {
    uint32_t max_fds;
    unsigned lots[3]; /* descriptors with the 8th, the 16th and the last byte of a message of 32 */
    unsigned kept, refused;
} many_cases[] = {
    {0, {0, 0, 16}, 16, 0}, {0, {0, 0, 17}, 16, 1},  {0, {0, 0, 253}, 16, 237}, {0, {10, 10, 0}, 16, 4}, {0, {16, 16, 16}, 16, 32},
    {0, {253, 253, 253}, 16, 743}, {1, {0, 0, 1}, 1, 0}, {1, {0, 0, 2}, 1, 1}, {1, {1, 1, 1}, 1, 2}, {2, {0, 3, 0}, 2, 1},
    {16, {1, 0, 15}, 16, 0}, {15, {1, 0, 15}, 15, 1},
};

START_TEST(too_many_descriptors)
{
    const struct many_case *c = &many_cases[_i];
    static script s;
    uint8_t bytes[48];
    vfu_frame frame = {0};
    note_fds();
    put_message(bytes, 1, 32);
    put_message(bytes + 32, 2, 16);
    s = (script){.bytes = bytes};
    add_stop(&s, 8, c->lots[0]);
    add_stop(&s, 16, c->lots[1]);
    add_stop(&s, 32, c->lots[2]);
    add_stop(&s, 48, 0);
    vfu_conn *conn = conn_of_script(&s, 0, c->max_fds);
    while (s.next < s.stop_count)
        vfu_conn_receive(conn);
    ck_assert_int_eq(vfu_conn_next(conn, &frame), 1);
    ck_assert_uint_eq(frame.fd_count, c->kept);
    ck_assert_uint_eq(frame.fds_refused, c->refused);
    ck_assert_uint_eq(fds_open(), fds_at_start + c->kept);
    ck_assert_int_eq(vfu_conn_next(conn, &frame), 1);
    ck_assert_uint_eq(frame.fd_count, 0);
    ck_assert_uint_eq(frame.fds_refused, 0);
    check_fds();
    vfu_conn_destroy(conn);
    check_fds();
}
END_TEST

/* ---- real sockets, receiving --------------------------------------------------------------------------------------------------------- */

typedef enum how {
    WHOLE,          /* one sendmsg */
    FDS_WITH_HEAD,  /* header with the descriptors, body */
    FDS_WITH_BODY,  /* header, body with the descriptors */
    FDS_WITH_LAST,  /* all but the last byte, the last byte with the descriptors */
    HOWS
} how;

static void send_message(int sock, how way, uint16_t id, uint32_t size, const int *fds, unsigned count)
{
    uint8_t bytes[256];
    put_message(bytes, id, size);
    size_t head = way == WHOLE ? size : way == FDS_WITH_LAST ? size - 1 : 16;
    bool first = way == WHOLE || way == FDS_WITH_HEAD;
    send_all(sock, bytes, head, fds, first ? count : 0);
    if (head < size)
        send_all(sock, bytes + head, size - head, fds, first ? 0 : count);
}

/* Receives what is there. lazy: everything before the first message is taken, as far as the connection has room. */
static unsigned receive_burst(vfu_conn *conn, bool lazy, vfu_frame *frame, void (*on_message)(vfu_frame *, unsigned))
{
    unsigned taken = 0;
    int err;
    do {
        do
            err = vfu_conn_receive(conn);
        while (lazy && err > 0);
        while (vfu_conn_next(conn, frame) == 1)
            on_message(frame, taken++);
    } while (err > 0 || err == -ENOBUFS);
    ck_assert_int_eq(err, -EAGAIN);
    return taken;
}

enum { BURST = 24 };
static unsigned burst_fds[BURST];
static ino_t burst_inos[BURST][4];

static void check_burst_message(vfu_frame *frame, unsigned i)
{
    ck_assert_uint_lt(i, BURST);
    ck_assert_uint_eq(frame->len, 17 + i);
    ck_assert(is_message(frame->bytes, (uint16_t)i, 17 + i));
    ck_assert_msg(frame->fd_count == burst_fds[i], "message %u has %u descriptors instead of %u", i, frame->fd_count, burst_fds[i]);
    for (unsigned k = 0; k < burst_fds[i]; k++) {
        ck_assert_uint_eq(ino_of(frame->fds[k]), burst_inos[i][k]);
        ck_assert(is_cloexec(frame->fds[k]));
    }
}

/* A burst of messages with descriptors on some of them, sent in every way before anything is received */
static const char *const bursts[] = {
    "0", "1", "4", "100", "010", "001", "110", "011", "101", "111", "213", "0000000100000000", "1000000000000001", "11111111",
    "111111111", "1111111111111111", "010101010101010101010101", "444444444444444444444444", "000000000000000000000001",
};

START_TEST(burst)
{
    const char *pattern = bursts[_i / (2 * HOWS)];
    how way = (how)(_i / 2 % HOWS);
    bool lazy = _i % 2;
    unsigned count = (unsigned)strlen(pattern);
    vfu_frame frame = {0};
    int pair[2];
    note_fds();
    make_pair(pair);
    vfu_conn *conn = conn_on(pair[0]);
    for (unsigned i = 0; i < count; i++) {
        int fds[4];
        burst_fds[i] = (unsigned)(pattern[i] - '0');
        for (unsigned k = 0; k < burst_fds[i]; k++) {
            fds[k] = memfd("burst", 0, 0);
            burst_inos[i][k] = ino_of(fds[k]);
        }
        send_message(pair[1], way, (uint16_t)i, 17 + i, fds, burst_fds[i]);
        close_fds(fds, burst_fds[i]);
    }
    ck_assert_uint_eq(receive_burst(conn, lazy, &frame, check_burst_message), count);
    ck_assert_int_eq(vfu_conn_next(conn, &frame), 0);
    close(pair[1]);
    ck_assert_int_eq(vfu_conn_receive(conn), -EPIPE);
    vfu_conn_destroy(conn);
    check_fds();
}
END_TEST

/* One message per write, as fast as they come, many more than the buffer holds: with room for all and none taken until it is full. */
START_TEST(buffer_full)
{
    static uint8_t bytes[5000];
    vfu_frame frame = {0};
    vfu_conn *conn;
    uint16_t sent = 0, taken = 0;
    int pair[2], err;
    note_fds();
    make_pair(pair);
    ck_assert_int_eq(vfu_conn_create(&conn, &(vfu_conn_desc){.fd = pair[0], .max_msg = 5000}), 0);
    while (taken < 2000) {
        for (put_message(bytes, sent, 17 + sent % 4000u); sent < 2000; put_message(bytes, sent, 17 + sent % 4000u)) {
            int64_t n = send_some(pair[1], bytes, 17 + sent % 4000u, NULL, 0);
            if (n < 0)
                break;
            ck_assert_int_eq(n, 17 + sent % 4000);
            sent++;
        }
        while ((err = vfu_conn_receive(conn)) > 0) {
        }
        ck_assert(err == -EAGAIN || err == -ENOBUFS);
        /* -ENOBUFS promises that there is a message */
        unsigned before = taken;
        for (; vfu_conn_next(conn, &frame) == 1; taken++)
            ck_assert(frame.len == 17 + taken % 4000u && is_message(frame.bytes, taken, frame.len));
        ck_assert(err == -EAGAIN || taken > before);
    }
    vfu_conn_destroy(conn);
    close(pair[1]);
    check_fds();
}
END_TEST

/* Descriptors of messages that nobody takes, and of those that are not even complete, are closed with the connection. */
START_TEST(nobody_takes_descriptors)
{
    int pair[2], fd = null_fd(), fds[3] = {fd, fd, fd};
    uint8_t bytes[64];
    vfu_frame frame = {0};
    note_fds();
    for (unsigned taken = 0; taken <= 3; taken++) {
        make_pair(pair);
        vfu_conn *conn = conn_on(pair[0]);
        for (unsigned i = 0; i < 3; i++)
            send_message(pair[1], WHOLE, (uint16_t)i, 16, fds, i + 1);
        put_message(bytes, 4, 64);
        send_all(pair[1], bytes, 30, fds, 3);
        while (vfu_conn_receive(conn) > 0) {
        }
        for (unsigned i = 0; i < taken; i++) {
            ck_assert_int_eq(vfu_conn_next(conn, &frame), 1);
            ck_assert_uint_eq(frame.fd_count, i + 1);
        }
        vfu_conn_destroy(conn);
        /* those of the last frame are its holder's */
        for (unsigned i = 0; i < frame.fd_count; i++)
            ck_assert_int_eq(close(frame.fds[i]), 0);
        frame.fd_count = 0;
        close(pair[1]);
        check_fds();
    }
    close(fd);
}
END_TEST

/* A descriptor that was taken stays open, the others are closed by the next call. */
START_TEST(take_descriptors)
{
    int pair[2], fds[3] = {memfd("a", 0, 0), memfd("b", 0, 0), memfd("c", 0, 0)};
    vfu_frame frame = {0};
    note_fds();
    make_pair(pair);
    vfu_conn *conn = conn_on(pair[0]);
    send_message(pair[1], WHOLE, 1, 16, fds, 3);
    ck_assert_int_eq(vfu_conn_receive(conn), 16);
    ck_assert_int_eq(vfu_conn_next(conn, &frame), 1);
    int mine = frame.fds[1];
    frame.fds[1] = -1;
    ck_assert_int_eq(vfu_conn_next(conn, &frame), 0);
    ck_assert_uint_eq(frame.fd_count, 0);
    ck_assert_uint_eq(ino_of(mine), ino_of(fds[1]));
    ck_assert_uint_eq(fds_open(), fds_at_start + 3);
    close(mine);
    vfu_conn_destroy(conn);
    close(pair[1]);
    check_fds();
}
END_TEST

/* The process has no room for the descriptors: the connection is over, and what did come is closed. */
START_TEST(no_room_for_descriptors)
{
    int pair[2], fillers[64], fds[8];
    vfu_frame frame = {0};
    struct rlimit limit;
    if (getenv("LD_PRELOAD") && strstr(getenv("LD_PRELOAD"), "valgrind"))
        return; /* it keeps descriptors of its own and has other limits */
    make_pair(pair);
    vfu_conn *conn = conn_on(pair[0]);
    for (unsigned i = 0; i < 8; i++)
        fds[i] = null_fd();
    send_message(pair[1], WHOLE, 1, 16, fds, 8);
    /* fill up to a limit with room for _i more */
    unsigned count = 0;
    int top;
    do
        top = fillers[count++] = null_fd();
    while (count < 16);
    must(getrlimit(RLIMIT_NOFILE, &limit));
    limit.rlim_cur = (rlim_t)top + 1;
    must(setrlimit(RLIMIT_NOFILE, &limit));
    for (int fd; (fd = dup(fillers[0])) >= 0;) {
        ck_assert_uint_lt(count, COUNT(fillers));
        fillers[count++] = fd;
    }
    for (int i = 0; i < _i; i++)
        close(fillers[--count]);
    ck_assert_int_eq(vfu_conn_receive(conn), -EBADMSG);
    ck_assert_int_eq(vfu_conn_next(conn, &frame), 0);
    for (int i = 0; i < _i; i++) /* nothing of it is left open */
        ck_assert_int_ge(fillers[count++] = dup(fillers[0]), 0);
    ck_assert_int_lt(dup(fillers[0]), 0);
    vfu_conn_destroy(conn);
}
END_TEST

/* ---- sending --------------------------------------------------------------------------------------------------------------------------- */

/* Records what is sent, as a socket that takes `step` bytes at a time, with EAGAIN after each. */
typedef struct sink {
    uint8_t bytes[1 << 18];
    size_t len, step;
    bool blocked, busy; /* blocked: takes nothing at all */
    int error;          /* what send returns instead */
    struct {
        size_t from, to; /* bytes of that send */
        unsigned count;
        ino_t first;
    } lots[64];
    unsigned lot_count;
} sink;

static int64_t sink_send(void *ctx, const vfu_slice *slices, unsigned count, const int *fds, unsigned fd_count)
{
    sink *s = ctx;
    size_t taken = 0;
    if (s->error)
        return s->error;
    if (s->blocked)
        return -EAGAIN;
    s->busy = !s->busy;
    if (!s->busy)
        return -EAGAIN;
    size_t from = s->len;
    for (unsigned i = 0; i < count; i++)
        for (size_t k = 0; k < slices[i].len && taken < s->step; k++, taken++)
            s->bytes[s->len++] = ((const uint8_t *)slices[i].data)[k];
    ck_assert_uint_gt(taken, 0);
    if (fd_count) {
        s->lots[s->lot_count].from = from;
        s->lots[s->lot_count].to = s->len;
        s->lots[s->lot_count].count = fd_count;
        s->lots[s->lot_count++].first = ino_of(fds[0]);
    }
    return (int64_t)taken;
}

static int64_t never_receive(void *ctx, void *buf, size_t len, int *fds, unsigned *fd_count)
{
    (void)ctx, (void)buf, (void)len, (void)fds;
    *fd_count = 0;
    return -EAGAIN;
}

static vfu_conn *conn_of_sink(sink *s, uint32_t max_msg)
{
    vfu_io io = {s, never_receive, sink_send};
    vfu_conn *conn;
    ck_assert_int_eq(vfu_conn_create(&conn, &(vfu_conn_desc){.fd = -1, .io = &io, .max_msg = max_msg}), 0);
    return conn;
}

static int send_sized(vfu_conn *conn, uint16_t id, uint32_t size, const int *fds, unsigned fd_count)
{
    static uint8_t bytes[1 << 21];
    put_message(bytes, id, size);
    uint32_t head = size < 20 ? size : 20;
    int err = vfu_conn_send(conn, bytes, head, size > head ? bytes + head : NULL, size - head, fds, fd_count);
    memset(bytes, 0xee, size); /* copied or sent, but not kept */
    return err;
}

/* A sink that takes 1, 2, ... bytes at a time: the stream is right, and each message's descriptors go with its first byte and with no
 * byte of another message. */
START_TEST(partial_sends)
{
    static sink s;
    size_t starts[16], at = 0;
    ino_t inos[16] = {0};
    unsigned fds_of[16] = {0}, lot = 0;
    note_fds();
    memset(&s, 0, sizeof(s));
    s.step = (size_t)_i;
    vfu_conn *conn = conn_of_sink(&s, 0);
    for (uint16_t i = 0; i < 14; i++) {
        int fds[3] = {-1, -1, -1};
        uint32_t size = 16 + i * 11u % 60u;
        starts[i] = at;
        at += size;
        fds_of[i] = i == 0 || i == 3 || i == 4 || i == 8 || i == 13 ? i % 3 + 1u : 0;
        for (unsigned k = 0; k < fds_of[i]; k++)
            fds[k] = memfd("sent", 0, 0);
        inos[i] = fds_of[i] ? ino_of(fds[0]) : 0;
        ck_assert_int_eq(send_sized(conn, i, size, fds, fds_of[i]), 0);
        close_fds(fds, fds_of[i]);
        if (i % 4 == 3)
            vfu_conn_flush(conn);
    }
    starts[14] = at;
    while (vfu_conn_is_waiting(conn)) {
        int err = vfu_conn_flush(conn);
        ck_assert(err == -EAGAIN || (err == 0 && !vfu_conn_is_waiting(conn)));
    }
    ck_assert_int_eq(vfu_conn_flush(conn), 0);
    ck_assert_uint_eq(s.len, at);
    for (uint16_t i = 0; i < 14; i++) {
        ck_assert(is_message(s.bytes + starts[i], i, (uint32_t)(starts[i + 1] - starts[i])));
        if (!fds_of[i])
            continue;
        ck_assert_uint_lt(lot, s.lot_count);
        ck_assert_uint_eq(s.lots[lot].from, starts[i]);
        ck_assert_uint_le(s.lots[lot].to, starts[i + 1]);
        ck_assert_uint_eq(s.lots[lot].count, fds_of[i]);
        ck_assert_uint_eq(s.lots[lot].first, inos[i]);
        lot++;
    }
    ck_assert_uint_eq(lot, s.lot_count);
    check_fds();
    vfu_conn_destroy(conn);
    check_fds();
}
END_TEST

/* A sink that takes nothing: messages are queued until there is no room, and exactly those that were accepted come out, in order. */
START_TEST(queue_full)
{
    static const uint32_t lengths[] = {16, 100, 4096};
    uint32_t size = lengths[_i];
    static sink s;
    unsigned accepted = 0, refused = 0;
    int fd = null_fd();
    note_fds();
    memset(&s, 0, sizeof(s));
    s.step = sizeof(s.bytes);
    s.blocked = true;
    vfu_conn *conn = conn_of_sink(&s, 4096);
    ck_assert(!vfu_conn_is_waiting(conn));
    for (;; accepted++) {
        int err = send_sized(conn, (uint16_t)accepted, size, NULL, 0);
        if (err == -EAGAIN)
            break;
        ck_assert_int_eq(err, 0);
        ck_assert(vfu_conn_is_waiting(conn));
    }
    ck_assert_uint_ge(accepted, 1);
    for (; refused < 5; refused++)
        ck_assert_int_eq(send_sized(conn, 0xffff, size, &fd, 1), -EAGAIN);
    check_fds();
    s.blocked = false;
    s.busy = false;
    ck_assert_int_eq(vfu_conn_flush(conn), 0);
    ck_assert_uint_eq(s.len, (size_t)accepted * size);
    for (unsigned i = 0; i < accepted; i++)
        ck_assert(is_message(s.bytes + (size_t)i * size, (uint16_t)i, size));
    ck_assert_uint_eq(s.lot_count, 0);
    vfu_conn_destroy(conn);
    close(fd);
}
END_TEST

/* Descriptors of many queued messages: accepted ones go out with theirs, refused ones leave nothing behind; those that wait are closed. */
START_TEST(queue_of_descriptors)
{
    static sink s;
    unsigned accepted = 0;
    int fds[2] = {memfd("x", 0, 0), null_fd()};
    note_fds();
    for (unsigned flushed = 0; flushed < 2; flushed++) {
        memset(&s, 0, sizeof(s));
        s.step = sizeof(s.bytes);
        s.blocked = true;
        vfu_conn *conn = conn_of_sink(&s, 0);
        for (accepted = 0; accepted < 40; accepted++) {
            int err = send_sized(conn, (uint16_t)accepted, 24, fds, 2);
            ck_assert_uint_eq(fds_open(), fds_at_start + 2 * (accepted + !err));
            if (err) {
                ck_assert_int_eq(err, -EAGAIN);
                break;
            }
        }
        ck_assert_uint_ge(accepted, 1);
        if (flushed) {
            s.blocked = s.busy = false;
            while (vfu_conn_flush(conn) == -EAGAIN) {
            }
            ck_assert_uint_eq(s.lot_count, accepted);
            ck_assert_uint_eq(s.len, accepted * 24);
            for (unsigned i = 0; i < accepted; i++) {
                ck_assert_uint_eq(s.lots[i].from, i * 24);
                ck_assert_uint_eq(s.lots[i].count, 2);
                ck_assert_uint_eq(s.lots[i].first, ino_of(fds[0]));
            }
            check_fds();
        }
        vfu_conn_destroy(conn);
        check_fds();
    }
    close_fds(fds, 2);
}
END_TEST

/* What can't be sent at all, and what send says */
START_TEST(send_refusals)
{
    static sink s;
    static uint8_t big[4 << 20];
    int fds[17];
    for (unsigned i = 0; i < 17; i++)
        fds[i] = null_fd();
    note_fds();
    memset(&s, 0, sizeof(s));
    s.step = sizeof(s.bytes);
    vfu_conn *conn = conn_of_sink(&s, 4096);
    ck_assert_int_eq(vfu_conn_send(conn, big, 16, big, sizeof(big) - 16, NULL, 0), -EMSGSIZE);
    ck_assert_int_eq(vfu_conn_send(conn, big, 16, NULL, 0, fds, 17), -EMSGSIZE);
    ck_assert_uint_eq(s.len, 0);
    ck_assert(!vfu_conn_is_waiting(conn));
    ck_assert_int_eq(send_sized(conn, 1, 4096, fds, 16), 0);
    ck_assert_uint_eq(s.len, 4096);
    s.error = -EPIPE;
    ck_assert_int_eq(send_sized(conn, 2, 16, fds, 1), -EPIPE);
    s.error = 0;
    s.blocked = true;
    ck_assert_int_eq(send_sized(conn, 3, 16, fds, 1), 0);
    ck_assert_int_eq(vfu_conn_flush(conn), -EAGAIN);
    s.error = -ECONNRESET;
    ck_assert_int_eq(vfu_conn_flush(conn), -ECONNRESET);
    vfu_conn_destroy(conn);
    check_fds();
    close_fds(fds, 17);
}
END_TEST

/* A message of the largest size can be queued whole, whatever the socket took of it. */
START_TEST(largest_message_is_queued)
{
    static sink s;
    for (size_t first = 0; first <= 4096; first += 512) {
        memset(&s, 0, sizeof(s));
        s.step = first ? first : 1;
        s.blocked = !first;
        vfu_conn *conn = conn_of_sink(&s, 4096);
        ck_assert_int_eq(send_sized(conn, 9, 4096, NULL, 0), 0);
        s.blocked = false;
        s.step = 4096;
        while (vfu_conn_flush(conn) == -EAGAIN) {
        }
        ck_assert_uint_eq(s.len, 4096);
        ck_assert(is_message(s.bytes, 9, 4096));
        vfu_conn_destroy(conn);
    }
}
END_TEST

/* The peer has gone: an error and no signal. */
START_TEST(peer_has_gone)
{
    int pair[2];
    vfu_frame frame = {0};
    note_fds();
    make_pair(pair);
    vfu_conn *conn = conn_on(pair[0]);
    send_message(pair[1], WHOLE, 1, 16, NULL, 0);
    close(pair[1]);
    ck_assert_int_eq(send_sized(conn, 1, 16, NULL, 0), -EPIPE);
    ck_assert_int_eq(vfu_conn_receive(conn), 16); /* what it has sent before still comes */
    ck_assert_int_eq(vfu_conn_next(conn, &frame), 1);
    ck_assert_int_eq(vfu_conn_receive(conn), -EPIPE);
    vfu_conn_destroy(conn);
    check_fds();
}
END_TEST

/* ---- both ends ---------------------------------------------------------------------------------------------------------------------------- */

/* Random messages with random descriptors from one connection to another through a socket of little room, sent, flushed, received and
 * taken in random order. */
START_TEST(both_ends)
{
    enum { TOTAL = 300 };
    chance c = seeded((uint64_t)_i + 1);
    unsigned fds_of[TOTAL];
    uint32_t size_of[TOTAL];
    ino_t inos[TOTAL];
    unsigned sent = 0, taken = 0;
    vfu_frame frame = {0};
    int pair[2], room = 4608;
    note_fds();
    make_pair(pair);
    must(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)));
    vfu_conn *from = conn_on(pair[0]), *to = conn_on(pair[1]);
    while (taken < TOTAL) {
        switch (below(&c, 4)) {
        case 0:
            if (sent < TOTAL) {
                int fds[16];
                unsigned n = below(&c, 3) ? 0 : below(&c, 17);
                uint32_t size = 16 + (below(&c, 20) ? below(&c, 200) : below(&c, 100000));
                for (unsigned i = 0; i < n; i++)
                    fds[i] = memfd("both", 0, 0);
                int err = send_sized(from, (uint16_t)sent, size, fds, n);
                ck_assert(err == 0 || err == -EAGAIN);
                fds_of[sent] = n;
                size_of[sent] = size;
                inos[sent] = n ? ino_of(fds[n - 1]) : 0;
                sent += !err;
                close_fds(fds, n);
            }
            break;
        case 1: {
            int err = vfu_conn_flush(from);
            ck_assert(err == 0 || err == -EAGAIN);
            break;
        }
        case 2: {
            int err = vfu_conn_receive(to);
            ck_assert(err > 0 || err == -EAGAIN || err == -ENOBUFS);
            break;
        }
        default: {
            int got = vfu_conn_next(to, &frame);
            ck_assert_int_ge(got, 0);
            if (!got)
                break;
            ck_assert_uint_lt(taken, sent);
            ck_assert_uint_eq(frame.len, size_of[taken]);
            ck_assert(is_message(frame.bytes, (uint16_t)taken, frame.len));
            ck_assert_msg(frame.fd_count == fds_of[taken], "message %u has %u descriptors instead of %u", taken, frame.fd_count,
                          fds_of[taken]);
            if (frame.fd_count)
                ck_assert_uint_eq(ino_of(frame.fds[frame.fd_count - 1]), inos[taken]);
            taken++;
        }
        }
    }
    ck_assert_int_eq(vfu_conn_next(to, &frame), 0);
    vfu_conn_destroy(from);
    vfu_conn_destroy(to);
    check_fds();
}
END_TEST

/* ---- life cycle ------------------------------------------------------------------------------------------------------------------------------ */

START_TEST(create_takes_the_socket)
{
    static const struct {
        uint32_t max_msg, max_fds;
        int result;
    } cases[] = {{0, 0, 0}, {16, 1, 0}, {15, 0, -EINVAL}, {1, 0, -EINVAL}, {0, 17, -EINVAL}, {0xffffffff, 0, -EINVAL}};
    note_fds();
    for (size_t i = 0; i < COUNT(cases); i++) {
        int pair[2];
        vfu_conn *conn = (vfu_conn *)(uintptr_t)1;
        must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
        int err = vfu_conn_create(&conn, &(vfu_conn_desc){.fd = pair[0], .max_msg = cases[i].max_msg, .max_fds = cases[i].max_fds});
        ck_assert_int_eq(err, cases[i].result);
        if (err) {
            ck_assert_ptr_null(conn);
            ck_assert_int_eq(fcntl(pair[0], F_GETFD), -1); /* taken also on failure */
        } else {
            ck_assert_int_eq(vfu_conn_fd(conn), pair[0]);
            ck_assert(is_cloexec(pair[0]));
            ck_assert(fcntl(pair[0], F_GETFL) & O_NONBLOCK);
            ck_assert_int_eq(vfu_conn_receive(conn), -EAGAIN);
        }
        vfu_conn_destroy(conn);
        close(pair[1]);
        check_fds();
    }
    vfu_conn_destroy(NULL);
    vfu_conn *conn;
    ck_assert_int_lt(vfu_conn_create(&conn, &(vfu_conn_desc){.fd = -1}), 0);
    ck_assert_ptr_null(conn);
}
END_TEST

/* Each allocation fails once. */
START_TEST(create_without_memory)
{
    int pair[2], err = -ENOMEM;
    note_fds();
    for (unsigned long n = 1; err; n++) {
        heap h = {.fail_at = n};
        vfu_conn *conn;
        ck_assert_uint_lt(n, 100);
        make_pair(pair);
        err = vfu_conn_create(&conn, &(vfu_conn_desc){.fd = pair[0], .alloc = heap_of(&h)});
        ck_assert(err == 0 || err == -ENOMEM);
        vfu_conn_destroy(conn);
        ck_assert_uint_eq(h.live, 0);
        close(pair[1]);
        check_fds();
    }
}
END_TEST

/* ---- sockets ------------------------------------------------------------------------------------------------------------------------------------ */

static char folder[64], path[96];

static void make_folder(void)
{
    strcpy(folder, "/tmp/vfu-test-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(path, sizeof(path), "%s/socket", folder);
}

static void remove_folder(void)
{
    unlink(path);
    rmdir(folder);
}

START_TEST(listen_and_connect)
{
    note_fds();
    make_folder();
    ck_assert_int_eq(vfu_sock_connect(path), -ENOENT);
    int live = vfu_sock_listen(path);
    must(live);
    ck_assert(is_cloexec(live));
    ck_assert_int_eq(vfu_sock_accept(live), -EAGAIN);
    int client = vfu_sock_connect(path);
    must(client);
    ck_assert(is_cloexec(client));
    int server = vfu_sock_accept(live);
    must(server);
    ck_assert(is_cloexec(server));
    ck_assert(fcntl(server, F_GETFL) & O_NONBLOCK);
    ck_assert_int_eq(vfu_sock_accept(live), -EAGAIN);
    ck_assert_int_eq(send(client, "x", 1, 0), 1);
    char c;
    ck_assert_int_eq(recv(server, &c, 1, 0), 1);
    /* live: refused, and left as it is */
    ck_assert_int_eq(vfu_sock_listen(path), -EADDRINUSE);
    close(vfu_sock_connect(path));
    close(live);
    close(client);
    close(server);
    /* stale: replaced */
    ck_assert_int_eq(vfu_sock_connect(path), -ECONNREFUSED);
    live = vfu_sock_listen(path);
    must(live);
    client = vfu_sock_connect(path);
    must(client);
    close(live);
    close(client);
    remove_folder();
    check_fds();
}
END_TEST

/* A live server that has no room in its backlog: it is live, and asking doesn't take long. */
START_TEST(listen_beside_a_full_backlog)
{
    int waiting[256];
    unsigned count = 0;
    note_fds();
    make_folder();
    int live = vfu_sock_listen(path);
    must(live);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    for (;;) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
        ck_assert_uint_lt(count, COUNT(waiting));
        waiting[count++] = fd;
        if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
            break;
    }
    ck_assert_int_eq(errno, EAGAIN);
    ck_assert_int_eq(vfu_sock_listen(path), -EADDRINUSE);
    close_fds(waiting, count);
    close(live);
    remove_folder();
    check_fds();
}
END_TEST

/* What isn't a stale stream socket stays as it is. */
START_TEST(listen_on_other_files)
{
    struct stat before, after;
    int other = -1;
    note_fds();
    make_folder();
    char target[128];
    snprintf(target, sizeof(target), "%s/target", folder);
    switch (_i) {
    case 0: close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600)); break;
    case 1: must(mkdir(path, 0700)); break;
    case 2: must(mkfifo(path, 0600)); break;
    case 3: must(symlink("/dev/null", path)); break;
    case 4: must(symlink(target, path)); break; /* to nothing */
    default: {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        strcpy(address.sun_path, path);
        other = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        must(bind(other, (struct sockaddr *)&address, sizeof(address)));
    }
    }
    must(lstat(path, &before));
    ck_assert_int_eq(vfu_sock_listen(path), -EADDRINUSE);
    must(lstat(path, &after));
    ck_assert_uint_eq(before.st_ino, after.st_ino);
    ck_assert_uint_eq(before.st_mode, after.st_mode);
    close_fds(&other, 1);
    rmdir(path);
    remove_folder();
    check_fds();
}
END_TEST

START_TEST(impossible_paths)
{
    char name[200];
    note_fds();
    memset(name, 'x', sizeof(name));
    memcpy(name, "/tmp/", 5);
    name[sizeof(name) - 1] = 0;
    ck_assert_int_eq(vfu_sock_listen(name), -ENAMETOOLONG);
    ck_assert_int_eq(vfu_sock_connect(name), -ENAMETOOLONG);
    ck_assert_int_eq(vfu_sock_listen("/nowhere/at/all"), -ENOENT);
    ck_assert_int_lt(vfu_sock_listen(""), 0);
    ck_assert_int_lt(vfu_sock_connect(""), 0);
    ck_assert_int_lt(vfu_sock_accept(-1), 0);
    check_fds();
}
END_TEST

/* A server that is set up while a client of the old one is still connected: the file is stale all the same. */
START_TEST(stale_with_a_client)
{
    note_fds();
    make_folder();
    int live = vfu_sock_listen(path), client = vfu_sock_connect(path);
    must(client);
    int server = vfu_sock_accept(live);
    close(live);
    live = vfu_sock_listen(path);
    must(live);
    close(server);
    close(client);
    close(live);
    remove_folder();
    check_fds();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("transport");
    TCase *tc = tcase_create("receive");
    tcase_add_loop_test(tc, pieces_of_n, 1, STREAM + 1);
    tcase_add_test(tc, descriptors_at_every_byte);
    tcase_add_test(tc, descriptors_in_two_lots);
    tcase_add_loop_test(tc, end_at_every_byte, 0, COUNT(ends));
    tcase_add_loop_test(tc, size_field, 0, COUNT(size_cases));
    tcase_add_test(tc, size_breaks_in_the_middle);
    tcase_add_loop_test(tc, too_many_descriptors, 0, COUNT(many_cases));
    tcase_add_loop_test(tc, burst, 0, (int)COUNT(bursts) * HOWS * 2);
    tcase_add_test(tc, buffer_full);
    tcase_add_test(tc, nobody_takes_descriptors);
    tcase_add_test(tc, take_descriptors);
    tcase_add_loop_test(tc, no_room_for_descriptors, 0, 8);
    suite_add_tcase(suite, tc);
    tc = tcase_create("send");
    tcase_add_loop_test(tc, partial_sends, 1, 70);
    tcase_add_loop_test(tc, queue_full, 0, 3);
    tcase_add_test(tc, queue_of_descriptors);
    tcase_add_test(tc, send_refusals);
    tcase_add_test(tc, largest_message_is_queued);
    tcase_add_test(tc, peer_has_gone);
    tcase_add_loop_test(tc, both_ends, 0, 20);
    suite_add_tcase(suite, tc);
    tc = tcase_create("life cycle");
    tcase_add_test(tc, create_takes_the_socket);
    tcase_add_test(tc, create_without_memory);
    suite_add_tcase(suite, tc);
    tc = tcase_create("sockets");
    tcase_set_timeout(tc, 5);
    tcase_add_test(tc, listen_and_connect);
    tcase_add_test(tc, listen_beside_a_full_backlog);
    tcase_add_loop_test(tc, listen_on_other_files, 0, 6);
    tcase_add_test(tc, impossible_paths);
    tcase_add_test(tc, stale_with_a_client);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
