/* SPDX-License-Identifier: MIT */
/*
 * ==== the DMA engine ====
 *
 * The contract of examples/dma_engine, sentence by sentence, as somebody sees it who has only the program and its page. Each test
 * quotes the sentence that it checks. The machinery is in engine.h.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <ftw.h>
#include <netinet/in.h>

/* A client, and a second one where two are needed. */
static peer one, two;

#define P (&one)

/* Our memory, at this address of the device. */
enum { AT = 0x100000 };

/* Starts the engine, joins it, and maps `size` bytes read-write at AT. */
static memory with_memory(const char *option, size_t size, int with_fd)
{
    memory m = make_memory(size, SEALED);
    start(option);
    join(P);
    map(P, AT, size, READABLE | WRITEABLE, &m, 0, with_fd);
    return m;
}

static void end(memory *m)
{
    leave(P);
    stop();
    free_memory(m);
}

/* ---- command line ---------------------------------------------------------------------------------------------------------- */

/* "Wrong arguments print usage to standard error, status 2." "`dma_engine (--socket-path=PATH | --fd=N) [--verbose]
 * [--no-mmap]`" */
static const char *const usage_errors[][4] = {
    {NULL},
    {"--verbose", "--no-mmap"},
    {"--socket-path"},
    {"--fd"},
    {"--fd="},
    {"--fd=x"},
    {"--fd=3x"},
    {"--fd=-1"},
    {"--fd=99999999999999999999"},
    {"--fd=4294967299"},
    {"--socket-path=/nonexistent/a", "--fd=3"},
    {"--fd=3", "--socket-path=/nonexistent/a"},
    {"--socket-path=/nonexistent/a", "--bogus"},
    {"--socket-path=/nonexistent/a", "operand"},
    {"operand", "--socket-path=/nonexistent/a"},
    {"--socket-path=/nonexistent/a", "-v"},
    {"--socket-path=/nonexistent/a", "--verbose=1"},
    {"--socket-path=/nonexistent/a", "--no-mmap=1"},
    {"/nonexistent/a"},
};

START_TEST(test_engine_wrong_arguments)
{
    name_files(&engine);
    spawn(&engine, usage_errors[_i], -1, 0);
    int status = wait_end(&engine);
    SAME(status, 2);
    MUST(strstr(text_of(engine.err, 0), "usage"));
    MUST(strstr(text_of(engine.err, 0), "--socket-path="));
    SAME(size_of(engine.out), 0);
}
END_TEST

START_TEST(test_engine_helps)
{
    const char *const help[] = {"--help", NULL};
    name_files(&engine);
    spawn(&engine, help, -1, 0);
    int status = wait_end(&engine);
    SAME(status, 0);
    MUST(strstr(text_of(engine.out, 0), "--no-mmap"));
    SAME(size_of(engine.err), 0);
}
END_TEST

/* Arguments that are right, but can't be served: an error that is said, and no usage. */
START_TEST(test_engine_unusable_arguments)
{
    char where[200], fd[30];
    const char *const right[] = {where, NULL};
    name_files(&engine);
    for (unsigned i = 0; i < 5; i++) {
        int file = -1;
        switch (i) {
        case 0: snprintf(where, sizeof(where), "--socket-path=%s/absent/directory", scratch); break;
        case 1: snprintf(where, sizeof(where), "--socket-path=%s/%0120d", scratch, 0); break; /* longer than sun_path */
        case 2: /* a file that is no socket stays what it is */
            close(open(engine.path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
            snprintf(where, sizeof(where), "--socket-path=%s", engine.path);
            break;
        case 3: snprintf(where, sizeof(where), "--fd=777"); break;
        default:
            file = open("/dev/null", O_RDWR | O_CLOEXEC);
            snprintf(fd, sizeof(fd), "--fd=%d", file);
            snprintf(where, sizeof(where), "%s", fd);
        }
        spawn(&engine, right, file, 0);
        int status = wait_end(&engine);
        if (status <= 0 || status >= 126)
            FAIL("%s: status %d", where, status);
        MUST(size_of(engine.err) > 0);
        SAME(size_of(engine.out), 0);
        if (i == 2) {
            struct stat st;
            MUST(lstat(engine.path, &st) == 0 && S_ISREG(st.st_mode));
        }
        close(file);
    }
}
END_TEST

/* "A stale socket file left by a dead server is replaced" */
START_TEST(test_engine_stale_socket)
{
    char where[120];
    start(NULL);
    kill(engine.pid, SIGKILL);
    SAME(wait_end(&engine), 1000 + SIGKILL);
    MUST(is_there(engine.path));
    snprintf(where, sizeof(where), "--socket-path=%s", engine.path);
    spawn(&engine, (const char *const[]){where, NULL}, -1, 0);
    join(P);
    leave(P);
    stop();
}
END_TEST

/* "a live one is an error": and stays as it is, whether it serves a client or not. */
START_TEST(test_engine_live_socket)
{
    char where[120];
    program other;
    start(NULL);
    join(P);
    leave(P);
    snprintf(where, sizeof(where), "--socket-path=%s", engine.path);
    for (unsigned i = 0; i < 3; i++) {
        if (i == 1)
            join(P);
        name_files(&other);
        spawn(&other, (const char *const[]){where, NULL}, -1, 0);
        int status = wait_end(&other);
        MUST(status > 0 && status < 126 && size_of(other.err) > 0);
        MUST(is_there(engine.path) && is_running(&engine));
    }
    sync_up(P);
    leave(P);
    join(P);
    sync_up(P);
    leave(P);
    stop();
}
END_TEST

/* The same, where both start at once, with a stale file or none: one of them serves, the other ends with an error. */
START_TEST(test_engine_rivals)
{
    name_files(&engine);
    for (unsigned i = 0; i < 30; i++) {
        program rivals[2];
        char where[120];
        unsigned winner;
        snprintf(where, sizeof(where), "--socket-path=%s", engine.path);
        for (unsigned j = 0; j < 2; j++) {
            name_files(&rivals[j]);
            spawn(&rivals[j], (const char *const[]){where, NULL}, -1, 0);
        }
        int64_t until = now_ms() + PATIENCE;
        while (is_running(&rivals[0]) && is_running(&rivals[1])) {
            if (now_ms() > until)
                FAIL("both serve %s", engine.path);
            nap();
        }
        winner = is_running(&rivals[0]) ? 0 : 1;
        int status = wait_end(&rivals[!winner]);
        MUST(status > 0 && status < 126 && is_running(&rivals[winner]));
        engine.pid = rivals[winner].pid;
        join(P);
        leave(P);
        if (i % 2) {
            stop();
        } else {
            kill(engine.pid, SIGKILL);
            (void)wait_end(&engine);
        }
    }
}
END_TEST

/* The same, where the live one is somebody else's: one that accepts nobody until nobody more can wait, and one that speaks
 * datagrams. */
START_TEST(test_engine_live_socket_of_others)
{
    for (unsigned i = 0; i < 3; i++) {
        int type = i == 2 ? SOCK_DGRAM : SOCK_STREAM, waiting[8];
        char where[120];
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        name_files(&engine);
        snprintf(address.sun_path, sizeof(address.sun_path), "%s", engine.path);
        int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
        MUST(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
        MUST(type == SOCK_DGRAM || listen(fd, 1) == 0);
        struct stat before, after;
        for (unsigned j = 0; j < COUNT(waiting); j++)
            waiting[j] = i == 1 ? dial_now(engine.path) : -1;
        MUST(i != 1 || waiting[7] == -EAGAIN);
        MUST(lstat(engine.path, &before) == 0);
        snprintf(where, sizeof(where), "--socket-path=%s", engine.path);
        spawn(&engine, (const char *const[]){where, NULL}, -1, 0);
        int status = wait_end(&engine);
        MUST(status > 0 && status < 126);
        MUST(lstat(engine.path, &after) == 0 && after.st_ino == before.st_ino);
        for (unsigned j = 0; j < COUNT(waiting); j++)
            if (waiting[j] >= 0)
                close(waiting[j]);
        close(fd);
    }
}
END_TEST

/* "`--fd=N`: serve an already listening [...] socket." The socket file isn't one "it made", so it stays. */
START_TEST(test_engine_listening_descriptor)
{
    char option[30];
    name_files(&engine);
    int fd = listen_at(engine.path);
    MUST(fd >= 0);
    snprintf(option, sizeof(option), "--fd=%d", fd);
    spawn(&engine, (const char *const[]){option, NULL}, fd, 0);
    close(fd);
    for (unsigned i = 0; i < 3; i++) {
        join(P);
        SAME(reg(P, MAGIC), 0x31414D44);
        leave(P);
    }
    kill(engine.pid, SIGTERM);
    SAME(wait_end(&engine), 0);
    MUST(is_there(engine.path));
}
END_TEST

/* "[...] or already connected socket": there is no next client to wait for, so it ends with the first. */
START_TEST(test_engine_connected_descriptor)
{
    char option[30];
    for (unsigned i = 0; i < 2; i++) {
        int ends[2];
        memory m = make_memory(PAGE, SEALED);
        name_files(&engine);
        MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
        snprintf(option, sizeof(option), "--fd=%d", ends[1]);
        spawn(&engine, (const char *const[]){option, NULL}, ends[1], 0);
        close(ends[1]);
        fresh(P, ends[0]);
        SAME(await(P, greet(P, usual_capabilities), VERSION), 0);
        map(P, AT, PAGE, READABLE | WRITEABLE, &m, 0, WITH_FD);
        m.at[7] = 77;
        SAME(run(P, SUM, 0, AT, PAGE), 0);
        SAME(reg(P, RESULT), 77);
        if (i)
            kill(engine.pid, SIGTERM);
        else
            leave(P);
        SAME(wait_end(&engine), 0);
        if (i)
            await_close(P);
        free_memory(&m);
    }
}
END_TEST

/* A socket that can't carry descriptors: everything works, DMA goes by message. */
START_TEST(test_engine_tcp_descriptor)
{
    char option[30];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || fd < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0)
        return; /* no network here at all */
    MUST(listen(listener, 4) == 0 && getsockname(listener, (struct sockaddr *)&address, &len) == 0);
    memory m = make_memory(MIB, SEALED);
    name_files(&engine);
    snprintf(option, sizeof(option), "--fd=%d", listener);
    spawn(&engine, (const char *const[]){option, NULL}, listener, 0);
    close(listener);
    MUST(connect(fd, (struct sockaddr *)&address, len) == 0);
    fresh(P, fd);
    SAME(await(P, greet(P, usual_capabilities), VERSION), 0);
    map(P, AT, MIB, READABLE | WRITEABLE, &m, 0, WITHOUT_FD);
    scramble(m.at, MIB, 1);
    SAME(run(P, COPY, AT + 3, AT + MIB / 2, 200 * KIB), 0);
    MUST(memcmp(m.at + 3, m.at + MIB / 2, 200 * KIB) == 0);
    leave(P);
    kill(engine.pid, SIGTERM);
    SAME(wait_end(&engine), 0);
    free_memory(&m);
}
END_TEST

/* "It stays in the foreground. SIGTERM and SIGINT end it with status 0 and remove the socket file it made.": whatever it is
 * doing. */
START_TEST(test_engine_end_by_signal)
{
    enum { NOBODY, GREETING, CLIENT, WORKING, WAITING_FOR_DMA, PAUSED, STATES };
    int number = _i % 2 ? SIGINT : SIGTERM;
    unsigned state = (unsigned)_i / 2;
    memory m = make_memory(16 * MIB, SEALED);
    MUST(state < STATES);
    start(NULL);
    MUST(is_running(&engine));
    if (state == GREETING) {
        fresh(P, dial_when_ready(&engine));
        MUST(send_bytes(P->fd, "abc", 3, NULL, 0));
    } else if (state != NOBODY) {
        join(P);
    }
    if (state == WORKING || state == WAITING_FOR_DMA) {
        map(P, AT, m.size, READABLE | WRITEABLE, &m, 0, state == WORKING);
        P->hold = true;
        set(P, REPEAT, UINT32_MAX);
        operands(P, AT + m.size / 2, AT, m.size / 2);
        set(P, COMMAND, COPY);
        if (state == WAITING_FOR_DMA)
            (void)held(P);
        SAME(reg(P, STATUS), BUSY);
    }
    if (state == PAUSED) /* replies that nobody fetches */
        for (unsigned i = 0; i < 200; i++) {
            region_access access = {0, BAR2, 64 * KIB};
            header h = {.cmd = REGION_READ, .size = sizeof(h) + sizeof(access)};
            uint8_t bytes[sizeof(h) + sizeof(access)];
            memcpy(bytes, &h, sizeof(h));
            memcpy(bytes + sizeof(h), &access, sizeof(access));
            if (send(P->fd, bytes, sizeof(bytes), MSG_DONTWAIT | MSG_NOSIGNAL) != sizeof(bytes))
                break;
        }
    stop_with(number);
    if (state != NOBODY)
        leave(P);
    free_memory(&m);
}
END_TEST

enum { END_BY_SIGNAL = 12 };

/* The same, as soon as the socket file is there: who sees it may end the engine. */
START_TEST(test_engine_end_by_early_signal)
{
    for (unsigned i = 0; i < 40; i++) {
        char where[120];
        name_files(&engine);
        snprintf(where, sizeof(where), "--socket-path=%s", engine.path);
        spawn(&engine, (const char *const[]){where, NULL}, -1, 0);
        int64_t until = now_ms() + PATIENCE;
        while (!is_there(engine.path) && now_ms() < until) {
        }
        stop_with(i % 2 ? SIGINT : SIGTERM);
    }
}
END_TEST

/* "`--verbose`: print one line per request to standard error." And without it, a client that does nothing wrong causes none. */
START_TEST(test_engine_verbose)
{
    for (unsigned i = 0; i < 2; i++) {
        start(i ? "--verbose" : NULL);
        join(P);
        sync_up(P);
        off_t before = size_of(engine.err);
        uint8_t byte = 0;
        for (unsigned j = 0; j < 10; j++) {
            sync_up(P);
            write_region(P, BAR2, j, &byte, 1);
            (void)reg(P, STATUS);
        }
        (void)post_write(P, BAR2, 9, &byte, 1, NO_REPLY);
        region_info refused = {.argsz = sizeof(refused), .index = 99};
        MUST(call(P, GET_REGION_INFO, &refused, sizeof(refused)) != 0);
        sync_up(P);
        leave(P);
        stop(); /* all is printed now */
        const char *text = text_of(engine.err, before);
        unsigned lines = 0;
        for (const char *at = text; (at = strchr(at, '\n')); at++)
            lines++;
        if (i)
            MUST(lines == 33 || lines == 34); /* one of the refused request may be a warning, printed without --verbose too */
        else
            MUST(lines <= 1);
        SAME(size_of(engine.out), 0);
    }
}
END_TEST

/* The comment at print_table in the engine: "SIGUSR1: every mapping, for people and tests." Whatever it does besides isn't
 * disturbed. */
START_TEST(test_engine_table)
{
    char text[2000];
    memory m = make_memory(MIB, SEALED);
    start(NULL);
    SAME(ask_table(text, sizeof(text)), 0);
    ck_assert_str_eq(text, "table begin\ntable end 0\n");
    join(P);
    map(P, UINT64_MAX - 0xffff, 0x10000, READABLE, &m, 0, WITHOUT_FD);
    map(P, 0x5000, 0x2000, READABLE | WRITEABLE, &m, 0, WITH_FD);
    map(P, 0x7000, 0x1000, WRITEABLE, &m, PAGE, WITH_FD);
    SAME(ask_table(text, sizeof(text)), 3);
    ck_assert_str_eq(text, "table begin\n"
                           "map 0x0000000000005000 0x0000000000006fff rw\n"
                           "map 0x0000000000007000 0x0000000000007fff -w\n"
                           "map 0xffffffffffff0000 0xffffffffffffffff r-\n"
                           "table end 3\n");
    P->hold = true;
    operands(P, 0x5000, UINT64_MAX - 0xffff, 64);
    set(P, COMMAND, COPY);
    (void)held(P);
    SAME(ask_table(NULL, 0), 3);
    unmap(P, 0x7000, 0x1000);
    SAME(ask_table(NULL, 0), 2);
    release(P);
    SAME(finish(P), 0);
    leave(P);
    join(P); /* the first has been forgotten by now */
    SAME(ask_table(NULL, 0), 0);
    end(&m);
}
END_TEST

/* Many requests for the table end nothing either. */
START_TEST(test_engine_table_storm)
{
    start(NULL);
    join(P);
    for (int64_t until = now_ms() + 400; now_ms() < until;) {
        MUST(is_running(&engine));
        kill(engine.pid, SIGUSR1);
    }
    sync_up(P);
    SAME(ask_table(NULL, 0), 0);
    leave(P);
    stop();
}
END_TEST

/* ---- clients that come and go ---------------------------------------------------------------------------------------------- */

/* How many descriptors the engine has open when nobody is there: as many as after a client that has left nothing. */
static unsigned idle_fds(void)
{
    int64_t until = now_ms() + PATIENCE;
    join(P); /* now it has done what it does when it starts */
    unsigned served = open_fds(), fds;
    leave(P);
    while ((fds = open_fds()) >= served) {
        if (now_ms() > until)
            FAIL("%u descriptors are open after a client has left, %u were before", fds, served);
        nap();
    }
    for (unsigned same = 0; same < 20; same++) { /* it may close more than one, and is at rest when the number stays */
        nap();
        if (open_fds() != fds) {
            fds = open_fds();
            same = 0;
        }
    }
    return fds;
}

/* Waits until the engine has no more descriptors open than before, and nothing of ours mapped. */
static void await_idle(unsigned fds)
{
    int64_t until = now_ms() + PATIENCE;
    while (open_fds() != fds || mapped_files()) {
        if (now_ms() > until)
            FAIL("%u descriptors are open, not %u; %u mappings of our files", open_fds(), fds, mapped_files());
        nap();
    }
    SAME(ask_table(NULL, 0), 0);
}

/* "When a client leaves, it drops that client's mappings and interrupts and accepts the next." */
START_TEST(test_engine_client_leaves)
{
    memory m = make_memory(MIB, SEALED);
    int events[4];
    for (unsigned i = 0; i < 4; i++)
        events[i] = make_event();
    start(NULL);
    unsigned fds = idle_fds();
    for (unsigned round = 0; round < 3; round++) {
        join(P);
        map(P, AT, MIB, READABLE | WRITEABLE, &m, 0, WITH_FD);
        assign(P, MSIX, events, 4);
        assign(P, INTX, events, 1);
        enable_msix(P, true);
        set(P, NOTIFY, 2);
        SAME(run(P, FILL, AT, 0, 64), 0);
        SAME(signalled(events[1], PATIENCE), 1);
        leave(P);
        await_idle(fds);

        join(P); /* the next one has nothing of that */
        enable_msix(P, true);
        set(P, NOTIFY, 2);
        refuse(P, SUM, 0, AT, 1, ENOENT, AT);
        enable_msix(P, false);
        refuse(P, SUM, 0, AT, 1, ENOENT, AT);
        sync_up(P);
        for (unsigned i = 0; i < 4; i++)
            SAME(signalled(events[i], 0), 0);
        leave(P);
    }
    stop();
    for (unsigned i = 0; i < 4; i++)
        close(events[i]);
    free_memory(&m);
}
END_TEST

/* A client that dies at any point leaves no mapping, descriptor or interrupt behind, and the next is served: a session is cut
 * off after each of its bytes. */
START_TEST(test_engine_client_dies_anywhere)
{
    memory m = make_memory(MIB, SEALED);
    int events[4];
    for (unsigned i = 0; i < 4; i++)
        events[i] = make_event();
    map_request mapping = {.argsz = sizeof(mapping), .flags = 3, .address = AT, .size = MIB};
    irq_set irqs = {.argsz = sizeof(irqs), .flags = DATA_EVENTFD | ACTION_TRIGGER, .index = MSIX, .count = 4};
    struct {
        region_access access;
        uint64_t value[2];
    } operand = {{SRC, BAR0, 8}, {AT, 0}}, length = {{LEN, BAR0, 8}, {64, 0}}, command = {{COMMAND, BAR0, 4}, {SUM, 0}};
    uint8_t version[4 + sizeof(usual_capabilities)] = {0};
    memcpy(version + 4, usual_capabilities, sizeof(usual_capabilities));
    const struct {
        uint16_t cmd;
        const void *body;
        size_t len;
        const int *fds;
        unsigned fd_count;
    } session[] = {
        {VERSION, version, sizeof(version), NULL, 0},   {DMA_MAP, &mapping, sizeof(mapping), &m.fd, 1},
        {SET_IRQS, &irqs, sizeof(irqs), events, 4},     {REGION_WRITE, &operand, 24, NULL, 0},
        {REGION_WRITE, &length, 24, NULL, 0},           {REGION_WRITE, &command, 20, NULL, 0},
        {DMA_MAP, &mapping, sizeof(mapping), &m.fd, 1}, /* refused, with its descriptor */
    };
    start(NULL);
    unsigned fds = idle_fds();
    bool more = true;
    for (size_t cut = 1; more; cut++) {
        int fd = dial_when_ready(&engine);
        MUST(fd >= 0);
        size_t left = cut;
        for (size_t i = 0; i < COUNT(session) && left; i++) {
            uint8_t bytes[512];
            header h = {.id = (uint16_t)i, .cmd = session[i].cmd, .size = (uint32_t)(sizeof(h) + session[i].len)};
            memcpy(bytes, &h, sizeof(h));
            memcpy(bytes + sizeof(h), session[i].body, session[i].len);
            size_t part = h.size < left ? h.size : left;
            MUST(send_bytes(fd, bytes, part, session[i].fds, session[i].fd_count));
            left -= part;
        }
        more = !left;
        close(fd);
        if (cut % 50 == 0)
            await_idle(fds);
    }
    await_idle(fds);
    join(P);
    SAME(reg(P, STATUS), IDLE);
    leave(P);
    stop();
    for (unsigned i = 0; i < 4; i++)
        close(events[i]);
    free_memory(&m);
}
END_TEST

/* A client that breaks the stream is dropped, and the next is served. */
START_TEST(test_engine_client_breaks_the_stream)
{
    static const uint32_t sizes[] = {0, 15, 0x7fffffff, UINT32_MAX};
    start(NULL);
    unsigned fds = idle_fds();
    for (unsigned i = 0; i < COUNT(sizes) * 2; i++) {
        join(P);
        header h = {.cmd = i % 2 ? 999 : GET_INFO, .size = sizes[i / 2]};
        MUST(send_bytes(P->fd, &h, sizeof(h), NULL, 0));
        await_close(P);
    }
    await_idle(fds);
    join(P);
    leave(P);
    stop();
}
END_TEST

/* "While one client is served a second waits or is refused; it never disturbs the first." */
START_TEST(test_engine_second_client)
{
    memory m = with_memory(NULL, MIB, WITH_FD);
    int event = make_event(), others[40];
    uint8_t garbage[100];
    memset(garbage, 0xff, sizeof(garbage));
    assign(P, INTX, &event, 1);
    scramble(m.at, MIB, 3);
    for (unsigned round = 0; round < 2; round++) {
        /* some come and go, with and without a word */
        for (unsigned i = 0; i < COUNT(others); i++) {
            others[i] = dial_now(engine.path);
            if (others[i] >= 0 && i % 3)
                (void)!send(others[i], garbage, i % 3 == 1 ? 3 : sizeof(garbage), MSG_NOSIGNAL);
            if (others[i] >= 0 && i % 2) {
                close(others[i]);
                others[i] = -1;
            }
        }
        set(P, NOTIFY, 1);
        SAME(run(P, COPY, AT, AT + 512 * KIB, 1000), 0);
        MUST(memcmp(m.at, m.at + 512 * KIB, 1000) == 0);
        SAME(signalled(event, PATIENCE), 1);
        SAME(set_irqs(P, DATA_NONE | ACTION_UNMASK, INTX, 0, 1, NULL, 0), 0);
        SAME(ask_table(NULL, 0), 1);
        for (unsigned i = 0; i < COUNT(others); i++)
            if (others[i] >= 0)
                close(others[i]);
        SAME(run(P, COPY, AT + 4, AT + 600 * KIB, 1000), 0);
    }

    /* one that waits is served when the first has left; one that was refused may come again */
    int fd = dial_now(engine.path);
    fresh(&two, fd);
    bool waits = fd >= 0;
    uint16_t id = two.id;
    if (waits) {
        uint8_t body[4 + sizeof(usual_capabilities)] = {0};
        memcpy(body + 4, usual_capabilities, sizeof(usual_capabilities));
        two.id++;
        waits = send_message(fd, (header){.id = id, .cmd = VERSION}, body, sizeof(body), NULL, 0);
    }
    sync_up(P);
    SAME(run(P, SUM, 0, AT, MIB), 0);
    leave(P);
    if (waits && next_reply(&two, &two.reply)) {
        SAME(two.reply.h.id, id);
        SAME(two.reply.h.cmd, VERSION);
        SAME(two.reply.h.flags, REPLY);
    } else {
        if (fd >= 0)
            close(fd);
        join(&two);
    }
    SAME(reg(&two, STATUS), IDLE);
    SAME(ask_table(NULL, 0), 0);
    leave(&two);
    stop();
    close(event);
    free_memory(&m);
}
END_TEST

/* Sends a message in pieces, each of which arrives on its own. */
static void send_in_pieces(peer *p, header h, const void *body, uint32_t len, unsigned piece)
{
    uint8_t bytes[600];
    h.size = (uint32_t)sizeof(h) + len;
    MUST(h.size <= sizeof(bytes));
    memcpy(bytes, &h, sizeof(h));
    memcpy(bytes + sizeof(h), body, len);
    for (uint32_t at = 0; at < h.size; at += piece) {
        MUST(send_bytes(p->fd, bytes + at, h.size - at < piece ? h.size - at : piece, NULL, 0));
        nap();
    }
}

/* Messages that arrive in pieces are the same messages: requests, and replies to DMA. */
START_TEST(test_engine_pieces)
{
    static const unsigned pieces[] = {1, 5, 16, 17};
    uint8_t version[4 + sizeof(usual_capabilities)] = {0};
    memcpy(version + 4, usual_capabilities, sizeof(usual_capabilities));
    start("--no-mmap");
    for (unsigned i = 0; i < COUNT(pieces); i++) {
        struct {
            dma_access access;
            uint8_t data[64];
        } reply;
        fresh(P, dial_when_ready(&engine));
        MUST(P->fd >= 0);
        send_in_pieces(P, (header){.id = 5, .cmd = VERSION}, version, sizeof(version), pieces[i]);
        SAME(await(P, 5, VERSION), 0);
        map(P, AT, MIB, READABLE | WRITEABLE, NULL, 0, WITHOUT_FD);
        P->hold = true;
        operands(P, 0, AT + 5, sizeof(reply.data));
        set(P, COMMAND, TO_RAM);
        header h = {.id = held(P)->h.id, .cmd = DMA_READ, .flags = REPLY};
        reply.access = dma_of(P, held(P));
        SAME(reply.access.count, sizeof(reply.data));
        scramble(reply.data, sizeof(reply.data), i);
        send_in_pieces(P, h, &reply, sizeof(reply), pieces[i]);
        SAME(finish(P), 0);
        uint8_t ram[sizeof(reply.data)];
        read_region(P, BAR2, 0, ram, sizeof(ram));
        MUST(memcmp(ram, reply.data, sizeof(ram)) == 0);
        leave(P);
    }
    stop();
}
END_TEST

/* Descriptors that nobody asked for are refused or closed, and those that are no files or events do no harm. */
START_TEST(test_engine_odd_descriptors)
{
    enum { ODD = 9 };
    memory m = make_memory(MIB, SEALED);
    int pipes[2], sockets[2], many[FDS_MAX], odd[ODD];
    char path[64];
    MUST(pipe2(pipes, O_CLOEXEC) == 0 && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", m.fd);
    odd[0] = open("/dev/null", O_RDWR | O_CLOEXEC);
    odd[1] = open("/dev/zero", O_RDWR | O_CLOEXEC);
    odd[2] = open("/", O_RDONLY | O_CLOEXEC);
    odd[3] = open(path, O_WRONLY | O_CLOEXEC);
    odd[4] = open(path, O_RDONLY | O_CLOEXEC);
    odd[5] = make_event();
    odd[6] = pipes[0];
    odd[7] = pipes[1];
    odd[8] = sockets[0];
    start(NULL);
    unsigned idle = idle_fds();
    join(P);
    for (unsigned i = 0; i < FDS_MAX; i++)
        many[i] = m.fd;
    map(P, AT, MIB, READABLE | WRITEABLE, &m, 0, WITHOUT_FD);
    unsigned before = open_fds();
    for (unsigned n = 1; n <= FDS_MAX; n += 5) {
        info query = {.argsz = sizeof(query)};
        unmap_request undo = {.argsz = sizeof(undo), .address = UINT64_C(1) << 50, .size = PAGE}; /* nothing is there */
        region_access access = {STATUS, BAR0, 4};
        (void)call_with(P, GET_INFO, &query, sizeof(query), many, n);
        (void)call_with(P, DMA_UNMAP, &undo, sizeof(undo), many, n);
        (void)call_with(P, REGION_READ, &access, sizeof(access), many, n);
        (void)call_with(P, DEVICE_RESET, NULL, 0, many, n);
        (void)call_with(P, 99, NULL, 0, many, n);
        P->hold = true;
        operands(P, AT, AT, 64);
        set(P, COMMAND, FILL);
        MUST(send_message(P->fd, (header){.id = held(P)->h.id, .cmd = DMA_WRITE, .flags = REPLY}, NULL, 0, many, n));
        drop_held(P);
        release(P);
        (void)finish(P);
        SAME(open_fds(), before);
    }
    for (unsigned i = 0; i < ODD; i++) {
        map_request mapping = {32, i % 2 ? READABLE | WRITEABLE : READABLE, 0, 0x40000000, PAGE};
        MUST(odd[i] >= 0);
        if (call_with(P, DMA_MAP, &mapping, sizeof(mapping), &odd[i], 1) == 0) {
            P->hold = true; /* it may be taken for memory that messages reach */
            operands(P, 0x40000000, 0x40000000, 8);
            set(P, COMMAND, SUM);
            for (unsigned j = 0; j < 5 && reg(P, STATUS) == BUSY; j++)
                nap();
            P->queued = 0;
            P->hold = false;
            unmap(P, 0x40000000, PAGE);
            (void)finish(P);
        }
        if (set_irqs(P, DATA_EVENTFD | ACTION_TRIGGER, INTX, 0, 1, &odd[i], 1) == 0) {
            set(P, NOTIFY, 1);
            SAME(run(P, SUM, 0, AT, 8), 0);
        }
        (void)set_irqs(P, DATA_EVENTFD | ACTION_UNMASK, INTX, 0, 1, &odd[i], 1);
        (void)set_irqs(P, DATA_EVENTFD | ACTION_MASK, INTX, 0, 1, &odd[i], 1);
        sync_up(P);
    }
    leave(P);
    await_idle(idle);
    stop();
    for (unsigned i = 0; i < ODD; i++)
        close(odd[i]);
    close(sockets[1]);
    free_memory(&m);
}
END_TEST

/* An eventfd whose counter is at its end blocks who writes to it; the engine isn't one of them. */
START_TEST(test_engine_full_event)
{
    memory m = with_memory(NULL, MIB, WITH_FD);
    int events[2] = {eventfd(0, EFD_CLOEXEC), eventfd(0, EFD_CLOEXEC)};
    uint64_t full = UINT64_MAX - 1;
    for (unsigned i = 0; i < 2; i++)
        MUST(events[i] >= 0 && write(events[i], &full, 8) == 8);
    assign(P, INTX, &events[0], 1);
    assign(P, MSIX, &events[1], 1);
    for (unsigned i = 0; i < 2; i++) {
        set(P, NOTIFY, 1);
        SAME(run(P, SUM, 0, AT, 8), 0);
        sync_up(P);
        enable_msix(P, true);
    }
    close(events[0]);
    close(events[1]);
    end(&m);
}
END_TEST

/* Hundredths of a second of processor time that the engine has used. */
static unsigned long used_time(void)
{
    char path[64];
    unsigned long user = 0, kernel = 0;
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)engine.pid);
    const char *text = strrchr(text_of(path, 0), ')');
    MUST(text && sscanf(text, ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &kernel) == 2);
    return user + kernel;
}

/* Whatever the engine waits for, it sleeps meanwhile. */
START_TEST(test_engine_sleeps)
{
    enum { NOBODY, GREETING, CLIENT, DMA, DEAF, INTERRUPT, STATES };
    struct timespec quarter = {.tv_nsec = 250000000};
    memory m = make_memory(MIB, SEALED);
    start(NULL);
    for (unsigned state = 0; state < STATES; state++) {
        int events[2] = {make_event(), make_event()};
        if (state == GREETING) {
            fresh(P, dial_when_ready(&engine));
            MUST(P->fd >= 0 && send_bytes(P->fd, "abcdefgh", 8, NULL, 0));
        } else if (state != NOBODY) {
            join(P);
            map(P, AT, MIB, READABLE | WRITEABLE, &m, 0, WITHOUT_FD);
        }
        int second = state == NOBODY ? -1 : dial_now(engine.path); /* one that waits costs nothing either */
        if (state == DMA) {
            P->hold = true;
            operands(P, 0, AT, 300000);
            set(P, COMMAND, SUM);
            (void)held(P);
        }
        if (state == DEAF) /* it fetches no replies, and more wait for it than the socket takes */
            for (unsigned i = 0; i < 500; i++) {
                struct {
                    header h;
                    region_access access;
                } request = {{.cmd = REGION_READ, .size = sizeof(request)}, {0, BAR2, 64 * KIB}};
                if (send(P->fd, &request, sizeof(request), MSG_DONTWAIT | MSG_NOSIGNAL) != sizeof(request))
                    break;
            }
        if (state == INTERRUPT) {
            assign(P, INTX, events, 1);
            SAME(set_irqs(P, DATA_EVENTFD | ACTION_UNMASK, INTX, 0, 1, &events[1], 1), 0);
            set(P, NOTIFY, 1);
            set(P, COMMAND, 99);
            SAME(signalled(events[0], PATIENCE), 1);
        }
        unsigned long used = 5;
        for (unsigned i = 0; i < 20 && used > 4; i++) { /* on a loaded machine it may come to rest later */
            unsigned long before = used_time();
            nanosleep(&quarter, NULL);
            used = used_time() - before;
        }
        if (used > 4)
            FAIL("it has used %lu0 ms of 250 in state %u", used, state);
        for (unsigned i = 0; i < 2; i++)
            close(events[i]);
        if (second >= 0)
            close(second);
        if (state != NOBODY)
            leave(P);
    }
    join(P); /* and the next is served */
    end(&m);
}
END_TEST

/* Bad input: a message of any size and content never crashes, hangs or desynchronises the engine; errors are header-only
 * replies (receive() checks this); NO_REPLY is never answered. */
START_TEST(test_engine_any_message)
{
    static uint8_t body[6000];
    uint64_t state = 0x12345678u + (unsigned)_i;
    memory m = make_memory(MIB, SHRINKABLE);
    int event = make_event();
    start(_i % 2 ? "--no-mmap" : NULL);
    unsigned fds = idle_fds();
    join(P);
    for (unsigned burst = 0; burst < 150; burst++) {
        unsigned expected = 0;
        bool open = true, greeted_again = false;
        for (unsigned i = 0; i < 20 && open; i++) {
            static const uint32_t flags[] = {0, 0, 0, 0, NO_REPLY, NO_REPLY, ERROR, 0x40, 0xfffffff0, REPLY, REPLY | ERROR};
            header h = {
                .id = (uint16_t)random64(&state), .cmd = (uint16_t)(random64(&state) % 20), .error = (uint32_t)random64(&state)};
            h.flags = flags[random64(&state) % COUNT(flags)];
            if (h.cmd == VERSION && random64(&state) % 16)
                h.cmd = REGION_WRITE;
            if (random64(&state) % 64 == 0)
                h.cmd = (uint16_t)random64(&state);
            greeted_again = greeted_again || h.cmd == VERSION;
            uint32_t len = (uint32_t)(random64(&state) % (random64(&state) % 8 ? 64 : sizeof(body)));
            scramble(body, sizeof(body), random64(&state));
            if (random64(&state) % 2) /* small numbers reach further into the engine */
                for (unsigned j = 0; j < 64; j++)
                    if (j % 4 || random64(&state) % 2)
                        body[j] = j % 4 == 0 ? body[j] & 0x3f : 0;
            if (random64(&state) % 2) { /* the first field tells the length in most messages */
                memcpy(body, &len, 4);
                body[4] &= 0x3f;
            }
            if (h.cmd == REGION_READ || h.cmd == REGION_WRITE) {
                region_access access = {random64(&state) % 0x1100, (uint32_t)random64(&state) % 10,
                                        (uint32_t)random64(&state) % 70};
                if (h.cmd == REGION_WRITE && random64(&state) % 8)
                    len = (uint32_t)sizeof(access) + access.count;
                else if (random64(&state) % 8)
                    len = sizeof(access);
                memcpy(body, &access, sizeof(access));
            }
            if (h.cmd == DMA_MAP || h.cmd == DMA_UNMAP) {
                map_request request = {32, (uint32_t)random64(&state) % 8, 0, random64(&state) % 64 * PAGE,
                                       random64(&state) % 64 * PAGE};
                unmap_request undo = {24, 0, random64(&state) % 64 * PAGE, random64(&state) % 64 * PAGE};
                if (random64(&state) % 8) {
                    len = h.cmd == DMA_MAP ? sizeof(request) : sizeof(undo);
                    memcpy(body, h.cmd == DMA_MAP ? (void *)&request : (void *)&undo, len);
                }
            }
            int with[3] = {m.fd, event, event};
            open = send_message(P->fd, h, body, len, with, random64(&state) % 4 ? 0 : (unsigned)(random64(&state) % 3));
            expected += !(h.flags & (NO_REPLY | REPLY)); /* a reply to nothing is no request */
        }
        info request = {.argsz = sizeof(request)};
        open = open && send_message(P->fd, (header){.id = 0xbeef, .cmd = GET_INFO}, &request, sizeof(request), NULL, 0);
        unsigned replies = 0;
        while (open && receive(P->fd, &P->reply)) {
            if ((P->reply.h.flags & TYPE_MASK) != REPLY)
                continue; /* DMA that a command has started, and that gets no answer */
            if (++replies > expected)
                break;
        }
        if (!open || replies != expected + 1 || P->reply.h.id != 0xbeef || P->reply.h.cmd != GET_INFO) {
            if (open && replies > expected)
                FAIL("the stream has lost its place: reply %u has id 0x%x, command %u", replies, P->reply.h.id, P->reply.h.cmd);
            if (!greeted_again) /* no other message is a reason to leave */
                FAIL("the engine left after %u of %u replies", replies, expected);
            leave(P);
            join(P);
        }
    }
    leave(P);
    await_idle(fds);
    stop();
    close(event);
    free_memory(&m);
}
END_TEST

enum { ANY_MESSAGE = 4 };

/* ---- identity -------------------------------------------------------------------------------------------------------------- */

/* "Vendor 0x1234, device 0xD3A1, subsystem 0x1234:0x0001, class 0x088000, revision 1, interrupt pin INTA." */
START_TEST(test_engine_identity)
{
    static const struct {
        uint32_t offset, width;
        uint64_t value;
    } cases[] = {
        {0x00, 2, 0x1234}, {0x02, 2, 0xd3a1},     {0x08, 1, 0x01},       {0x09, 1, 0x00},   {0x0a, 1, 0x80},
        {0x0b, 1, 0x08},   {0x0e, 1, 0x00},       {0x2c, 2, 0x1234},     {0x2e, 2, 0x0001}, {0x3d, 1, 0x01},
        {0x04, 2, 0x00},   {0x00, 4, 0xd3a11234}, {0x08, 4, 0x08800001}, {0x30, 4, 0},
    };
    start(NULL);
    join(P);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        SAME(get(P, CONFIG, cases[i].offset, cases[i].width), cases[i].value);
        if (cases[i].offset != 4) { /* the command register is the only one of them that can be written */
            put(P, CONFIG, cases[i].offset, cases[i].width, UINT64_MAX);
            SAME(get(P, CONFIG, cases[i].offset, cases[i].width), cases[i].value);
        }
    }
    leave(P);
    stop();
}
END_TEST

/* "Capabilities: power management, MSI-X with 4 vectors (table in BAR4 at 0x000, PBA in BAR4 at 0x800), PCI Express endpoint
 * with function-level reset, one vendor-specific capability." "Region 7 (configuration) is 4096 bytes, the extended space
 * empty." */
START_TEST(test_engine_capabilities)
{
    uint8_t config[4096], used[256] = {0};
    unsigned seen[256] = {0};
    start(NULL);
    join(P);
    read_region(P, CONFIG, 0, config, sizeof(config));
    MUST(config[6] & 0x10);
    unsigned steps = 0;
    for (uint32_t at = config[0x34]; at; at = config[at + 1]) {
        MUST(at >= 0x40 && at % 4 == 0 && at < 0xf0 && ++steps <= 4);
        uint8_t id = config[at], len = 0;
        seen[id]++;
        switch (id) {
        case CAP_PM: len = 8; break;
        case CAP_MSIX: len = 12; break;
        case CAP_EXPRESS: len = (config[at + 2] & 0xf) >= 2 ? 60 : 20; break;
        case CAP_VENDOR: len = config[at + 2]; break;
        default: FAIL("a capability 0x%02x", id);
        }
        MUST(len >= 3 && at + len <= 256);
        for (uint32_t i = at; i < at + len; i++)
            MUST(!used[i]++);
    }
    MUST(steps == 4 && seen[CAP_PM] == 1 && seen[CAP_MSIX] == 1 && seen[CAP_EXPRESS] == 1 && seen[CAP_VENDOR] == 1);
    uint32_t msix = capability(P, CAP_MSIX), express = capability(P, CAP_EXPRESS);
    SAME(get(P, CONFIG, msix + 2, 2), 3);               /* four vectors, off */
    SAME(get(P, CONFIG, msix + 4, 4), 0x000 | 4);       /* the table */
    SAME(get(P, CONFIG, msix + 8, 4), 0x800 | 4);       /* the PBA */
    SAME(get(P, CONFIG, express + 2, 2) >> 4 & 0xf, 0); /* an endpoint */
    SAME(get(P, CONFIG, express + 4, 4) >> 28 & 1, 1);  /* function-level reset */
    MUST(all_are(config + 256, sizeof(config) - 256, 0));

    uint8_t ones[4096 - 256];
    memset(ones, 0xff, sizeof(ones));
    write_region(P, CONFIG, 256, ones, sizeof(ones));
    read_region(P, CONFIG, 0, config, sizeof(config));
    MUST(all_are(config + 256, sizeof(config) - 256, 0));
    leave(P);
    stop();
}
END_TEST

/* "Advertises VFIO_DEVICE_FLAGS_RESET and VFIO_DEVICE_FLAGS_PCI; 9 regions, 5 IRQ indexes: INTx 1, MSI 0, MSI-X 4, ERR 1, REQ
 * 1." */
START_TEST(test_engine_device_info)
{
    static const struct {
        uint32_t count, flags;
    } irqs[] = {{1, 7 /* eventfd, maskable, masks itself */}, {0, 0}, {4, 1}, {1, 1}, {1, 1}};
    info i = {.argsz = sizeof(i)};
    start(NULL);
    join(P);
    SAME(call(P, GET_INFO, &i, sizeof(i)), 0);
    SAME(P->reply.len, sizeof(i));
    memcpy(&i, P->reply.body, sizeof(i));
    SAME(i.argsz, sizeof(i));
    SAME(i.flags, 1 | 2);
    SAME(i.regions, 9);
    SAME(i.irqs, 5);
    for (uint32_t index = 0; index < 7; index++) {
        info irq = {.argsz = sizeof(irq), .regions = index};
        int err = call(P, GET_IRQ_INFO, &irq, sizeof(irq));
        if (index >= COUNT(irqs)) {
            MUST(err != 0);
            continue;
        }
        SAME(err, 0);
        memcpy(&irq, P->reply.body, sizeof(irq));
        SAME(irq.regions, index);
        SAME(irq.irqs, irqs[index].count);
        SAME(irq.flags & 7, irqs[index].count ? irqs[index].flags : irq.flags & 7);
    }
    leave(P);
    stop();
}
END_TEST

/* The table of BARs, and "Region 7 (configuration) is 4096 bytes". */
START_TEST(test_engine_regions)
{
    static const uint64_t sizes[9] = {4 * KIB, 0, 64 * KIB, 0, 4 * KIB, 0, 0, 4096, 0};
    start(NULL);
    join(P);
    for (uint32_t index = 0; index < 11; index++) {
        region_info r = {.argsz = sizeof(r), .index = index};
        int err = call(P, GET_REGION_INFO, &r, sizeof(r));
        if (index >= COUNT(sizes)) {
            MUST(err != 0);
            continue;
        }
        SAME(err, 0);
        SAME(P->reply.len, sizeof(r));
        memcpy(&r, P->reply.body, sizeof(r));
        SAME(r.index, index);
        SAME(r.size, sizes[index]);
        SAME(r.flags & 3, sizes[index] ? 3 : r.flags & 3);
        SAME(r.flags >> 2 & 1, index == BAR2);
        SAME(r.flags >> 3, 0); /* "A region info reply to a short argsz must not set the CAPS flag" (INTEROP) */
        SAME(P->reply.fd_count, 0);
        MUST(index == BAR2 ? r.argsz > sizeof(r) : r.argsz == sizeof(r));
    }
    leave(P);
    stop();
}
END_TEST

/* "device RAM, any width; page 0 trapped, [0x1000, 0x10000) can be mapped by the client (sparse mmap capability)" */
START_TEST(test_engine_device_ram)
{
    struct {
        region_info r;
        uint8_t caps[512];
    } reply;
    uint32_t cap[4];
    uint64_t area[2];
    static uint8_t ram[RAM_SIZE], model[RAM_SIZE];
    start(NULL);
    join(P);
    region_info r = {.argsz = sizeof(reply), .index = BAR2};
    SAME(call(P, GET_REGION_INFO, &r, sizeof(r)), 0);
    MUST(P->reply.len <= sizeof(reply) && P->reply.len >= sizeof(r) + sizeof(cap) + sizeof(area));
    memcpy(&reply, P->reply.body, P->reply.len);
    SAME(reply.r.flags, 0xf);
    SAME(reply.r.argsz, P->reply.len);
    MUST(reply.r.cap_offset >= sizeof(r) && reply.r.cap_offset <= P->reply.len - sizeof(cap) - sizeof(area));
    memcpy(cap, P->reply.body + reply.r.cap_offset, sizeof(cap));
    memcpy(area, P->reply.body + reply.r.cap_offset + sizeof(cap), sizeof(area));
    SAME(cap[0], 1 | 1 << 16); /* the sparse mmap capability, version 1 */
    SAME(cap[1], 0);           /* no further one */
    SAME(cap[2], 1);           /* areas */
    SAME(area[0], 0x1000);
    SAME(area[1], 0xf000);
    SAME(P->reply.fd_count, 1);
    int fd = P->reply.fds[0];
    uint8_t *mapped = mmap(NULL, 0xf000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)(reply.r.offset + 0x1000));
    MUST(mapped != MAP_FAILED);
    close(fd);

    /* any width, at any place; the mapping is the same memory */
    uint64_t state = 5;
    for (unsigned i = 0; i < 300; i++) {
        uint32_t len = (uint32_t)(1 + random64(&state) % (i % 4 ? 16 : RAM_SIZE));
        uint32_t at = (uint32_t)(random64(&state) % (RAM_SIZE - len + 1));
        uint8_t part[RAM_SIZE];
        scramble(part, len, i);
        if (i % 3 || at < 0x1000)
            write_region(P, BAR2, at, part, len);
        else
            memcpy(mapped + at - 0x1000, part, len);
        memcpy(model + at, part, len);
        read_region(P, BAR2, at, part, len);
        MUST(memcmp(part, model + at, len) == 0);
    }
    read_region(P, BAR2, 0, ram, RAM_SIZE);
    MUST(memcmp(ram, model, RAM_SIZE) == 0 && memcmp(mapped, model + 0x1000, 0xf000) == 0);

    /* across the end there is nothing to change */
    uint8_t bytes[16];
    memset(bytes, 0xee, sizeof(bytes));
    (void)try_write(P, BAR2, RAM_SIZE - 8, bytes, 16);
    (void)try_write(P, BAR2, RAM_SIZE, bytes, 1);
    (void)try_write(P, BAR2, UINT64_MAX - 7, bytes, 16);
    read_region(P, BAR2, 0, ram, RAM_SIZE - 8);
    MUST(memcmp(ram, model, RAM_SIZE - 8) == 0);
    munmap(mapped, 0xf000);
    leave(P);
    stop();
}
END_TEST

/* The kinds of the BARs, as a driver sizes them. */
START_TEST(test_engine_bar_kinds)
{
    static const uint32_t masks[6] = {0xfffff000, 0, 0xffff0004, 0xffffffff, 0xfffff000, 0};
    start(NULL);
    join(P);
    for (uint32_t i = 0; i < 6; i++) {
        put(P, CONFIG, 0x10 + 4 * i, 4, UINT32_MAX);
        uint32_t got = (uint32_t)get(P, CONFIG, 0x10 + 4 * i, 4);
        SAME(got & ~(got & 1 ? 0u : i == BAR2 ? 8u : 0u), masks[i]); /* nothing is said of prefetchable */
        put(P, CONFIG, 0x10 + 4 * i, 4, 0x12340000);
        SAME(get(P, CONFIG, 0x10 + 4 * i, 4) & 0xfffffff0, masks[i] ? 0x12340000 : 0);
    }
    put(P, CONFIG, 0x30, 4, UINT32_MAX);
    SAME(get(P, CONFIG, 0x30, 4), 0); /* no ROM */
    leave(P);
    stop();
}
END_TEST

/* "trapped: MSI-X table (storage for the client; [...]) and PBA (read-only, zero); the rest reads zero" */
START_TEST(test_engine_msix_table)
{
    uint8_t bar[4096], model[64];
    start(NULL);
    join(P);
    uint64_t state = 9;
    for (unsigned i = 0; i < 200; i++) {
        uint32_t width = i % 2 ? 4 : 8, at = (uint32_t)(random64(&state) % (64 / width)) * width;
        if (i == 0)
            for (uint32_t j = 0; j < 64; j += 4) {
                put(P, BAR4, j, 4, 0x01010101 * j);
                memset(model + j, (int)j, 4);
            }
        uint64_t value = random64(&state);
        put(P, BAR4, at, width, value);
        memcpy(model + at, &value, width);
    }
    memset(bar, 0xff, sizeof(bar));
    write_region(P, BAR4, 64, bar, sizeof(bar) - 64);
    put(P, BAR4, 0x800, 8, UINT64_MAX);
    put(P, BAR4, 0x800, 4, UINT32_MAX);
    read_region(P, BAR4, 0, bar, sizeof(bar));
    for (unsigned i = 0; i < 64; i += 4) {
        /* of vector control only the mask bit has a meaning */
        uint32_t mine, got;
        memcpy(&mine, model + i, 4);
        memcpy(&got, bar + i, 4);
        SAME(i % 16 == 12 ? got & 1 : got, i % 16 == 12 ? mine & 1 : mine);
    }
    MUST(all_are(bar + 64, sizeof(bar) - 64, 0));
    leave(P);
    stop();
}
END_TEST

/* ---- windows --------------------------------------------------------------------------------------------------------------- */

enum { MANY = 65535 };

/* Maps [from, to) as windows of a page, each with a fresh descriptor; pipelined, since it takes long enough. The files are: one
 * that is opened anew for each, or one for each. `keep` gets every 1000th file. Returns how many were refused. */
static unsigned map_many(unsigned from, unsigned to, uint64_t base, int file, int *keep)
{
    enum { BATCH = 32 };
    char path[64];
    unsigned refused = 0;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
    for (unsigned i = from; i < to; i += BATCH) {
        uint16_t first = P->id;
        unsigned n = to - i < BATCH ? to - i : BATCH;
        for (unsigned j = i; j < i + n; j++) {
            int fd = file >= 0 ? open(path, O_RDWR | O_CLOEXEC) : (int)syscall(SYS_memfd_create, "vfu_test", 1u);
            MUST(fd >= 0 && (file >= 0 || ftruncate(fd, PAGE) == 0));
            map_request request = {32, READABLE | WRITEABLE, file >= 0 ? (uint64_t)j * PAGE : 0, base + (uint64_t)j * PAGE, PAGE};
            (void)post_with(P, DMA_MAP, 0, &request, sizeof(request), &fd, 1);
            if (keep && j % 1000 == 0)
                keep[j / 1000] = fd;
            else
                close(fd);
        }
        for (unsigned j = 0; j < n; j++)
            refused += await(P, (uint16_t)(first + j), DMA_MAP) != 0;
    }
    return refused;
}

/* "The server holds the 65,535 DMA windows that it advertises under 1024 open files and the default `vm.max_map_count`." */
START_TEST(test_engine_many_windows)
{
    uint64_t base = UINT64_C(0x7000000000), state = 11;
    memory m = make_memory((MANY + 1) * (size_t)PAGE, SEALED);
    start_limited(_i ? "--no-mmap" : NULL, 1024);
    unsigned fds = idle_fds();
    join(P);
    MUST(strstr((char *)P->reply.body + 4, "\"max_dma_maps\":65535"));
    P->windows[0] = (window){base, m.size, m.at, READABLE | WRITEABLE};
    P->window_count = 1;
    SAME(map_many(0, MANY, base, m.fd, NULL), 0);
    SAME(map_many(MANY, MANY + 1, base, m.fd, NULL), 1); /* one more than advertised */
    SAME(ask_table(NULL, 0), MANY);
    for (unsigned i = 0; i < 100; i++) {
        uint64_t page = i == 0 ? 0 : i == 1 ? MANY - 1 : random64(&state) % MANY;
        memcpy(m.at + page * PAGE + 100, &state, 8);
        uint64_t sum = 0;
        for (unsigned j = 0; j < 8; j++)
            sum += m.at[page * PAGE + 100 + j];
        SAME(run(P, SUM, 0, base + page * PAGE + 100, 8), 0);
        SAME(reg(P, RESULT), sum);
        memset(m.at + page * PAGE, 0, PAGE);
    }
    scramble(m.at + 1000 * PAGE, 8 * MIB, 12); /* a transfer through two thousand of them */
    SAME(run(P, COPY, base + 40000 * UINT64_C(4096) + 5, base + 1000 * UINT64_C(4096) + 9, 8 * MIB - 100), 0);
    MUST(memcmp(m.at + 40000 * UINT64_C(4096) + 5, m.at + 1000 * UINT64_C(4096) + 9, 8 * MIB - 100) == 0);

    /* room for one again, and no more */
    SAME(await(P, post_unmap(P, base + 77 * PAGE, PAGE), DMA_UNMAP), 0);
    refuse(P, SUM, 0, base + 76 * PAGE, 3 * PAGE, ENOENT, base + 77 * PAGE);
    SAME(map_many(MANY, MANY + 1, base, m.fd, NULL), 0);
    SAME(map_many(77, 78, base, m.fd, NULL), 1);
    leave(P);
    await_idle(fds);
    join(P);
    refuse(P, SUM, 0, base, 8, ENOENT, base);
    end(&m);
}
END_TEST

/* The same, each window of a file of its own. */
START_TEST(test_engine_many_files)
{
    static int keep[MANY / 1000 + 1];
    uint64_t base = UINT64_C(0x7000000000), state = 13;
    start_limited(NULL, 1024);
    unsigned fds = idle_fds();
    join(P);
    SAME(map_many(0, MANY, base, -1, keep), 0);
    SAME(ask_table(NULL, 0), MANY);
    for (unsigned i = 0; i < COUNT(keep); i++) {
        uint8_t byte = (uint8_t)(1 + random64(&state) % 255);
        MUST(pwrite(keep[i], &byte, 1, 3000) == 1);
        uint8_t *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, keep[i], 0);
        MUST(at != MAP_FAILED);
        P->windows[0] = (window){base + i * 1000 * UINT64_C(4096), PAGE, at, READABLE | WRITEABLE};
        P->window_count = 1;
        SAME(run(P, SUM, 0, P->windows[0].iova, PAGE), 0);
        SAME(reg(P, RESULT), byte);
        munmap(at, PAGE);
        close(keep[i]);
    }
    leave(P);
    await_idle(fds);
    stop();
}
END_TEST

/* Unmaps as the kernel has them (INTEROP): everything inside the range goes, also several windows or none; a window that would
 * be split is an error, and nothing changes. "Before a repetition starts [...] checked [...] against the table as it is
 * then." */
START_TEST(test_engine_unmaps)
{
    char text[2000];
    memory m = make_memory(MIB, SEALED);
    start(NULL);
    join(P);
    for (unsigned i = 0; i < 8; i++)
        map(P, AT + i * UINT64_C(0x10000), 0x8000, READABLE | WRITEABLE, &m, i * UINT64_C(0x8000), i % 2);
    unmap(P, AT + 0x8000, 0x8000);
    unmap(P, UINT64_C(0x800000000000), UINT64_C(1) << 48);
    SAME(ask_table(NULL, 0), 8);
    for (unsigned i = 0; i < 3; i++) {
        static const uint64_t ranges[3][2] = {{AT, 0x4000}, {AT + 0x1000, 0x30000}, {AT, 0x11000}};
        SAME(await(P, post_unmap(P, ranges[i][0], ranges[i][1]), DMA_UNMAP), EINVAL);
        SAME(ask_table(NULL, 0), 8);
    }
    SAME(run(P, SUM, 0, AT + 0x7fff, 1), 0);
    unmap(P, AT + 0x10000, 0x30000 - 0x8000);
    SAME(ask_table(text, sizeof(text)), 5);
    MUST(strstr(text, "map 0x0000000000100000 0x0000000000107fff rw\nmap 0x0000000000140000 0x0000000000147fff rw\n"));
    refuse(P, SUM, 0, AT + 0x10000, 1, ENOENT, AT + 0x10000);
    refuse(P, FILL, AT + 0x30000, 0, 1, ENOENT, AT + 0x30000);
    SAME(run(P, SUM, 0, AT, 0x8000), 0);
    unmap_request all = {.argsz = sizeof(all), .flags = 2};
    SAME(call(P, DMA_UNMAP, &all, sizeof(all)), 0);
    SAME(call(P, DMA_UNMAP, &all, sizeof(all)), 0);
    SAME(ask_table(NULL, 0), 0);
    SAME(mapped_files(), 0);
    end(&m);
}
END_TEST

/* ---- registers ------------------------------------------------------------------------------------------------------------- */

/* The registers that keep what is written to them. */
static const struct {
    uint32_t offset, size;
} writable[] = {{SRC, 8}, {DST, 8}, {LEN, 8}, {PATTERN, 8}, {REPEAT, 4}, {NOTIFY, 4}};

/* What the registers read, with what was written to the writable ones. */
static void compare_registers(const uint8_t *model)
{
    uint8_t bar[4096];
    for (uint32_t at = 0; at < sizeof(bar); at += 8) {
        uint64_t value = get(P, BAR0, at, 8);
        memcpy(bar + at, &value, 8);
    }
    if (memcmp(bar, model, sizeof(bar)) != 0)
        for (uint32_t at = 0; at < sizeof(bar); at++)
            if (bar[at] != model[at])
                FAIL("register byte 0x%x is 0x%02x, not 0x%02x", at, bar[at], model[at]);
}

static void initial_registers(uint8_t *model)
{
    uint32_t magic = 0x31414D44, version = 1;
    memset(model, 0, 4096);
    memcpy(model, &magic, 4);
    memcpy(model + 4, &version, 4);
}

/* "little endian, aligned 4- or 8-byte access; other accesses read as zero and are ignored on write"; the table's sizes and
 * modes; "An 8-byte access to two 4-byte registers acts on both". Accesses of every width at every place against a plain
 * model. */
START_TEST(test_engine_register_accesses)
{
    uint8_t model[4096], bytes[64];
    uint64_t state = 17;
    start(NULL);
    join(P);
    initial_registers(model);
    compare_registers(model);
    for (unsigned i = 0; i < 3000; i++) {
        static const uint32_t widths[] = {4, 4, 4, 8, 8, 8, 1, 2, 3, 5, 6, 7, 12, 16, 24, 64};
        uint32_t width = widths[random64(&state) % COUNT(widths)], at = (uint32_t)(random64(&state) % (i % 8 ? 0x60 : 4096 - 64));
        if (random64(&state) % 4)
            at = at / width * width;
        bool counts = (width == 4 || width == 8) && at % width == 0;
        if (counts && at <= COMMAND && COMMAND < at + width)
            continue; /* this would start one */
        scramble(bytes, sizeof(bytes), i);
        if (random64(&state) % 2) {
            write_region(P, BAR0, at, bytes, width);
            for (unsigned j = 0; j < COUNT(writable) && counts; j++)
                for (uint32_t k = 0; k < width; k++)
                    if (at + k >= writable[j].offset && at + k < writable[j].offset + writable[j].size)
                        model[at + k] = bytes[k];
        } else {
            read_region(P, BAR0, at, bytes, width);
            for (uint32_t k = 0; k < width; k++)
                if (bytes[k] != (counts ? model[at + k] : 0))
                    FAIL("%u bytes at 0x%x: byte %u is 0x%02x", width, at, k, bytes[k]);
        }
    }
    compare_registers(model);
    (void)try_write(P, BAR0, 4092, bytes, 8); /* across the end */
    compare_registers(model);
    leave(P);
    stop();
}
END_TEST

/* "0x30 | 4 | WO | COMMAND": other accesses to it are ignored; "write-only reads as zero". */
START_TEST(test_engine_command_accesses)
{
    uint64_t value = 0;
    memory m = with_memory(NULL, MIB, WITH_FD);
    operands(P, AT, AT + 64, 8);
    value = SUM;
    for (uint32_t width = 1; width <= 16; width++)
        if (width != 4 && width != 8) {
            uint8_t bytes[16] = {SUM};
            write_region(P, BAR0, COMMAND, bytes, width);
            SAME(reg(P, STATUS), IDLE);
        }
    write_region(P, BAR0, COMMAND - 2, &value, 4);
    write_region(P, BAR0, COMMAND - 4, &value, 4); /* NOTIFY */
    set(P, NOTIFY, 0);
    SAME(reg(P, STATUS), IDLE);
    set(P, COMMAND, SUM);
    SAME(finish(P), 0);
    SAME(get(P, BAR0, COMMAND, 4), 0);

    /* "An 8-byte access to two 4-byte registers acts on both": COMMAND and the STATUS above it */
    put(P, BAR0, COMMAND, 8, UINT64_C(0x7777777700000000) | FILL);
    SAME(finish(P), 0);
    SAME(get(P, BAR0, COMMAND, 8), (uint64_t)DONE << 32);
    SAME(reg(P, COMPLETED), 2);
    put(P, BAR0, REPEAT, 8, UINT64_C(0x0000000900000003)); /* REPEAT and NOTIFY */
    SAME(reg(P, REPEAT), 3);
    SAME(reg(P, NOTIFY), 9);
    set(P, COMMAND, FILL);
    SAME(finish(P), 0);
    SAME(reg(P, COMPLETED), 5);
    SAME(get(P, BAR0, MAGIC, 8), UINT64_C(0x131414D44));
    end(&m);
}
END_TEST

/* "A COMMAND write [...] is answered at once; the work is done after the reply has been sent, so that DMA by message never
 * waits on a client that waits for the reply." */
START_TEST(test_engine_reply_before_work)
{
    memory m = with_memory(NULL, MIB, WITHOUT_FD);
    P->hold = true;
    operands(P, 0, AT, 1000);
    uint32_t sum = SUM;
    uint16_t id = post_write(P, BAR0, COMMAND, &sum, 4, 0);
    MUST(receive(P->fd, &P->reply)); /* nothing comes before it */
    SAME(P->reply.h.flags, REPLY);
    SAME(P->reply.h.id, id);
    (void)held(P);
    release(P);
    SAME(finish(P), 0);

    /* the same without waiting: the replies to both, and whatever DMA there is, but not before the first */
    region_access status = {STATUS, BAR0, 4};
    id = post_write(P, BAR0, COMMAND, &sum, 4, 0);
    uint16_t next = post(P, REGION_READ, &status, sizeof(status));
    MUST(receive(P->fd, &P->reply));
    SAME(P->reply.h.id, id);
    SAME(P->reply.h.flags, REPLY);
    SAME(await(P, next, REGION_READ), 0);
    SAME(finish(P), 0);

    /* a posted one is done as well, and not answered */
    (void)post_write(P, BAR0, COMMAND, &sum, 4, NO_REPLY);
    SAME(finish(P), 0);
    SAME(reg(P, COMPLETED), 3);
    end(&m);
}
END_TEST

/* "While busy, writes to other registers and a second COMMAND are ignored. Other requests are served [...] while the reply to a
 * DMA message is awaited." "A COMMAND write clears ERROR and FAULT, sets STATUS to busy" */
START_TEST(test_engine_busy)
{
    memory m = with_memory(NULL, MIB, WITHOUT_FD);
    uint8_t text[8] = "abcdefg", back[8];
    refuse(P, SUM, 0, AT - 10, 1, ENOENT, AT - 10);
    P->hold = true;
    scramble(m.at, MIB, 4);
    operands(P, AT + 0x8000, AT, 5000);
    set(P, PATTERN, 1234);
    set(P, COMMAND, COPY);
    (void)held(P);
    SAME(reg(P, STATUS), BUSY);
    SAME(reg(P, ERRNO), 0);
    SAME(reg(P, FAULT), 0);
    for (unsigned i = 0; i < COUNT(writable); i++) {
        uint64_t before = get(P, BAR0, writable[i].offset, writable[i].size);
        put(P, BAR0, writable[i].offset, writable[i].size, UINT64_C(0x5555555555555555));
        SAME(get(P, BAR0, writable[i].offset, writable[i].size), before);
        put(P, BAR0, writable[i].offset, 4, 0x55555555);
        SAME(get(P, BAR0, writable[i].offset, writable[i].size), before);
    }
    set(P, COMMAND, FILL);
    set(P, COMMAND, 99);
    put(P, BAR0, COMMAND, 8, FILL);
    SAME(reg(P, STATUS), BUSY);
    /* others */
    sync_up(P);
    write_region(P, BAR2, 0x123, text, 8);
    read_region(P, BAR2, 0x123, back, 8);
    MUST(memcmp(text, back, 8) == 0);
    map(P, 0x80000000, MIB, READABLE, &m, 0, WITH_FD);
    unmap(P, 0x80000000, MIB);
    put(P, CONFIG, 4, 2, 6);
    SAME(get(P, CONFIG, 4, 2), 6);
    int event = make_event();
    assign(P, INTX, &event, 1);
    close(event);
    release(P);
    SAME(finish(P), 0);
    MUST(memcmp(m.at, m.at + 0x8000, 5000) == 0);
    SAME(reg(P, COMPLETED), 1);
    SAME(signalled(event, 0), 0);
    end(&m);
}
END_TEST

/* ---- commands -------------------------------------------------------------------------------------------------------------- */

/* What each window may be used for, and where it is in the memory. Neighbours in addresses are none in memory. */
enum { MODEL_SIZE = 4 * MIB };
static const struct {
    uint64_t iova, size, offset;
    uint32_t prot;
} layout[] = {
    {0, 0x4000, 0x380000, READABLE | WRITEABLE},
    {0x100000, 0x100000, 0, READABLE | WRITEABLE},
    {0x200000, 0x80000, 0x200000, READABLE | WRITEABLE},
    {0x280000, 0x10000, 0x100000, READABLE},
    {0x290000, 0x10000, 0x180000, WRITEABLE},
    {0x2a0000, 0x1000, 0x1f0000, READABLE | WRITEABLE},
    {0xfffffffffffc0000, 0x40000, 0x300000, READABLE | WRITEABLE},
};

/* Which window an address is in, or -1. */
static int layout_at(uint64_t iova)
{
    for (unsigned i = 0; i < COUNT(layout); i++)
        if (iova - layout[i].iova < layout[i].size)
            return (int)i;
    return -1;
}

/* "the whole source is checked in ascending order": errno and first address that refuses, or 0. */
static uint32_t model_check(uint64_t iova, uint64_t len, uint32_t prot, uint64_t *fault)
{
    while (len) {
        int i = layout_at(iova);
        *fault = iova;
        if (i < 0)
            return ENOENT;
        if (!(layout[i].prot & prot))
            return EACCES;
        uint64_t part = layout[i].size - (iova - layout[i].iova);
        if (part >= len)
            break;
        iova += part;
        len -= part;
    }
    *fault = 0;
    return 0;
}

static void model_move(uint8_t *bytes, uint64_t iova, uint8_t *buf, uint64_t len, bool to_memory)
{
    for (uint64_t i = 0; i < len;) {
        int w = layout_at(iova + i);
        uint64_t inside = iova + i - layout[w].iova, part = layout[w].size - inside < len - i ? layout[w].size - inside : len - i;
        uint8_t *at = bytes + layout[w].offset + inside;
        memcpy(to_memory ? at : buf + i, to_memory ? buf + i : at, (size_t)part);
        i += part;
    }
}

/* One address, somewhere interesting. */
static uint64_t some_address(uint64_t *state)
{
    unsigned i = (unsigned)(random64(state) % COUNT(layout));
    uint64_t offset = random64(state) % layout[i].size;
    switch (random64(state) % 8) {
    case 0: offset = 0; break;
    case 1: offset = layout[i].size - 1 - random64(state) % 64 % layout[i].size; break;
    case 2: return random64(state) % 8 ? layout[i].iova + offset : random64(state);
    }
    return layout[i].iova + offset;
}

/* Where windows have descriptors, and whether the engine uses them. */
enum { DIRECT, BY_MESSAGE, MIXED, NO_MMAP, WAYS };

/* The five commands, random operands, ranges over several windows, all ways to reach memory: memory, device RAM and registers
 * equal a plain model after each. "Overlapping source and destination behave as memmove within one mapping." "each repetition
 * counted" */
START_TEST(test_engine_random_commands)
{
    static uint8_t model[MODEL_SIZE], ram[RAM_SIZE], got[RAM_SIZE], buffer[MIB];
    static const char limited[] = "{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":70001}}";
    uint64_t state = 100 + (unsigned)_i, completed = 0, result = 0;
    unsigned kinds[4] = {0};
    memory m = make_memory(MODEL_SIZE, SEALED);
    start(_i == NO_MMAP ? "--no-mmap" : NULL);
    join_with(P, _i == MIXED ? limited : usual_capabilities);
    P->limit = _i == MIXED ? 70001 : 128 * KIB;
    for (unsigned i = 0; i < COUNT(layout); i++)
        map(P, layout[i].iova, layout[i].size, layout[i].prot, &m, layout[i].offset,
            _i == DIRECT || _i == NO_MMAP || (_i == MIXED && i % 2) ? WITH_FD : WITHOUT_FD);
    scramble(m.at, m.size, 6);
    memcpy(model, m.at, m.size);
    for (unsigned i = 0; i < 1000; i++) {
        uint32_t command = (uint32_t)(1 + random64(&state) % 5),
                 repeat = random64(&state) % 4 ? 0 : (uint32_t)(random64(&state) % 4);
        bool reads = command == COPY || command == SUM || command == TO_RAM,
             writes = command == COPY || command == FILL || command == FROM_RAM;
        bool rams = command == TO_RAM || command == FROM_RAM;
        static const uint64_t limits[] = {16, 200, 5000, 70000, 300000};
        uint64_t len = 1 + random64(&state) % limits[random64(&state) % (rams ? 3 : COUNT(limits))];
        uint64_t src = some_address(&state), dst = some_address(&state), pattern = random64(&state), fault = 0;
        if (random64(&state) % 4 == 0) /* close together */
            dst = src + random64(&state) % (2 * len) - len;
        if (rams) { /* one side is device RAM, and now and then a bit beyond its end */
            uint64_t room = RAM_SIZE - len,
                     offset = random64(&state) % 8 ? random64(&state) % (room + 1) : room + 1 + random64(&state) % 100;
            *(command == TO_RAM ? &dst : &src) = offset;
        }
        bool overlap = dst - src < len || src - dst < len;
        if (command == COPY && overlap && layout_at(src < dst ? src : dst) != layout_at((src < dst ? dst : src) + len - 1))
            continue; /* the contract says nothing of an overlap beyond one mapping */

        uint32_t error = 0;
        if ((reads && len - 1 > UINT64_MAX - src) || (writes && len - 1 > UINT64_MAX - dst) ||
            (command == TO_RAM && dst + len > RAM_SIZE) || (command == FROM_RAM && src + len > RAM_SIZE))
            error = EINVAL;
        if (!error && reads)
            error = model_check(src, len, READABLE, &fault);
        if (!error && writes)
            error = model_check(dst, len, WRITEABLE, &fault);
        for (uint32_t round = 0; !error && round < (repeat ? repeat : 1); round++, completed++) {
            for (uint64_t j = 0; j < len; j++)
                buffer[j] = (uint8_t)(pattern >> 8 * (j % 8));
            if (reads)
                model_move(model, src, buffer, len, false);
            if (command == FROM_RAM)
                memcpy(buffer, ram + src, len);
            if (command == TO_RAM)
                memcpy(ram + dst, buffer, len);
            if (writes)
                model_move(model, dst, buffer, len, true);
            if (command == SUM) {
                result = 0;
                for (uint64_t j = 0; j < len; j++)
                    result += buffer[j];
            }
        }
        kinds[error == 0 ? 0 : error == ENOENT ? 1 : error == EACCES ? 2 : 3]++;
        P->write_reply = i % 3 == 0 ? 0 : i % 3 == 1 ? 12 : 16;
        set(P, PATTERN, pattern);
        set(P, REPEAT, repeat);
        uint32_t is = run(P, command, dst, src, len);
        if (is != error || reg(P, FAULT) != fault || reg(P, COMPLETED) != completed || memcmp(m.at, model, m.size) != 0)
            FAIL("command %u, number %u: dst 0x%llx src 0x%llx len 0x%llx repeat %u: error %u, not %u; fault 0x%llx, not 0x%llx; "
                 "completed %llu, not %llu; memory is %s",
                 command, i, (unsigned long long)dst, (unsigned long long)src, (unsigned long long)len, repeat, is, error,
                 (unsigned long long)reg(P, FAULT), (unsigned long long)fault, (unsigned long long)reg(P, COMPLETED),
                 (unsigned long long)completed, memcmp(m.at, model, m.size) ? "different" : "right");
        if (command == SUM && !error)
            SAME(reg(P, RESULT), result);
        read_region(P, BAR2, 0, got, RAM_SIZE);
        MUST(memcmp(got, ram, RAM_SIZE) == 0);
    }
    for (unsigned i = 0; i < COUNT(kinds); i++)
        MUST(kinds[i] >= 5); /* or this has tested nothing */
    MUST(_i == DIRECT ? P->messages == 0 : P->messages > 0);
    if (_i == NO_MMAP)
        SAME(mapped_files(), 0); /* "never map client file descriptors" */
    end(&m);
}
END_TEST

/* "Overlapping source and destination behave as memmove within one mapping.": by any distance, in pieces of any size. */
START_TEST(test_engine_overlaps)
{
    static const int64_t distances[] = {0, 1, 7, 8, 64, 100, 4095, 4096, 65536, 131071, 131072, 131073, 200000, 262144, 399999};
    memory m = make_memory(2 * MIB, SEALED), before = make_memory(2 * MIB, SEALED);
    start(_i == NO_MMAP ? "--no-mmap" : NULL);
    join_with(P, _i == MIXED ? "{\"capabilities\":{\"max_data_xfer_size\":50000}}" : usual_capabilities);
    P->limit = _i == MIXED ? 50000 : 128 * KIB;
    map(P, AT, m.size, READABLE | WRITEABLE, &m, 0, _i == DIRECT || _i == NO_MMAP ? WITH_FD : WITHOUT_FD);
    scramble(m.at, m.size, 71);
    memcpy(before.at, m.at, m.size);
    for (unsigned i = 0; i < COUNT(distances) * 4; i++) {
        int64_t distance = distances[i / 4] * (i % 2 ? 1 : -1);
        uint64_t src = MIB / 2 + i, len = i / 2 % 2 ? 400000 : (uint64_t)distances[i / 4] + 1;
        uint32_t repeat = i % 3 == 0 ? 2 : 1;
        set(P, REPEAT, repeat);
        for (uint32_t j = 0; j < repeat; j++)
            memmove(before.at + (int64_t)src + distance, before.at + src, len);
        SAME(run(P, COPY, AT + src + (uint64_t)distance, AT + src, len), 0);
        if (memcmp(m.at, before.at, m.size) != 0)
            FAIL("%llu bytes by %lld are not as memmove moves them", (unsigned long long)len, (long long)distance);
    }
    free_memory(&before);
    end(&m);
}
END_TEST

/* "LEN | bytes; 1 to 16 MiB": the ends of it, for every command. "EINVAL (LEN out of range, [...] RAM offset out of range;
 * FAULT 0)" */
START_TEST(test_engine_lengths)
{
    static const struct {
        uint32_t command;
        uint64_t dst, src, len;
        uint32_t error;
    } cases[] = {
        {COPY, AT + LEN_MAX + 5, AT, 1, 0},
        {COPY, AT + LEN_MAX + 5, AT + 1, LEN_MAX, 0},
        {COPY, AT + LEN_MAX + 5, AT, LEN_MAX + 1, EINVAL},
        {COPY, AT, AT, 0, EINVAL},
        {COPY, AT, AT, UINT64_MAX, EINVAL},
        {COPY, AT, AT, UINT64_C(0x100000001), EINVAL},
        {FILL, AT, 0, 1, 0},
        {FILL, AT + 3, 0, LEN_MAX, 0},
        {FILL, AT, 0, LEN_MAX + 1, EINVAL},
        {FILL, AT, 0, 0, EINVAL},
        {SUM, 0, AT + 11, 1, 0},
        {SUM, 0, AT + 11, LEN_MAX, 0},
        {SUM, 0, AT + 11, LEN_MAX + 1, EINVAL},
        {SUM, 0, AT, 0, EINVAL},
        {TO_RAM, RAM_SIZE - 1, AT, 1, 0},
        {TO_RAM, 0, AT + 9, RAM_SIZE, 0},
        {TO_RAM, 0, AT, RAM_SIZE + 1, EINVAL},
        {TO_RAM, 1, AT, RAM_SIZE, EINVAL},
        {TO_RAM, RAM_SIZE, AT, 1, EINVAL},
        {TO_RAM, UINT64_MAX, AT, 2, EINVAL},
        {TO_RAM, UINT64_C(0x100000000), AT, 2, EINVAL},
        {TO_RAM, 0, AT, 0, EINVAL},
        {FROM_RAM, AT, RAM_SIZE - 1, 1, 0},
        {FROM_RAM, AT + 9, 0, RAM_SIZE, 0},
        {FROM_RAM, AT, 0, RAM_SIZE + 1, EINVAL},
        {FROM_RAM, AT, RAM_SIZE, 1, EINVAL},
        {FROM_RAM, AT, UINT64_MAX, 1, EINVAL},
        {FROM_RAM, AT, 0, 0, EINVAL},
        {FROM_RAM, AT, 0, LEN_MAX, EINVAL},
    };
    uint64_t pattern = UINT64_C(0x0807060504030201);
    memory m = with_memory(NULL, 2 * LEN_MAX + PAGE, _i ? WITHOUT_FD : WITH_FD);
    uint8_t *before = mmap(NULL, m.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    static uint8_t ram[RAM_SIZE], got[RAM_SIZE];
    MUST(before != MAP_FAILED);
    scramble(m.at, m.size, 21);
    memcpy(before, m.at, m.size);
    set(P, PATTERN, pattern);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint64_t len = cases[i].len, dst = cases[i].dst - AT, src = cases[i].src - AT, sum = 0;
        if (!cases[i].error)
            switch (cases[i].command) {
            case COPY: memmove(before + dst, before + src, len); break;
            case FILL:
                for (uint64_t j = 0; j < len; j++)
                    before[dst + j] = (uint8_t)(1 + j % 8);
                break;
            case SUM:
                for (uint64_t j = 0; j < len; j++)
                    sum += before[src + j];
                break;
            case TO_RAM: memcpy(ram + cases[i].dst, before + src, len); break;
            default: memcpy(before + dst, ram + cases[i].src, len);
            }
        refuse(P, cases[i].command, cases[i].dst, cases[i].src, len, cases[i].error, 0);
        if (cases[i].command == SUM && !cases[i].error)
            SAME(reg(P, RESULT), sum);
        if (memcmp(before, m.at, m.size) != 0)
            FAIL("case %u: the memory is wrong", i);
        read_region(P, BAR2, 0, got, RAM_SIZE);
        MUST(memcmp(got, ram, RAM_SIZE) == 0);
    }
    munmap(before, m.size);
    end(&m);
}
END_TEST

/* "EINVAL ([...] wrap past 2^64, unknown command [...]; FAULT 0)" */
START_TEST(test_engine_invalid_commands)
{
    static const uint32_t unknown[] = {0, 6, 7, 0x80000001, 0x101, UINT32_MAX};
    memory m = with_memory(NULL, MIB, _i ? WITHOUT_FD : WITH_FD);
    map(P, UINT64_MAX - MIB + 1, MIB, READABLE | WRITEABLE, &m, 0, _i ? WITHOUT_FD : WITH_FD);
    map(P, 0, PAGE, READABLE | WRITEABLE, &m, 0, _i ? WITHOUT_FD : WITH_FD);
    scramble(m.at, MIB, 1);
    uint8_t before[64];
    memcpy(before, m.at, sizeof(before));
    for (unsigned i = 0; i < COUNT(unknown); i++)
        refuse(P, unknown[i], AT, AT + 100, 8, EINVAL, 0);
    refuse(P, COPY, AT, UINT64_MAX - 7, 9, EINVAL, 0);
    refuse(P, COPY, UINT64_MAX - 7, AT, 9, EINVAL, 0);
    refuse(P, FILL, UINT64_MAX, 0, 2, EINVAL, 0);
    refuse(P, SUM, 0, UINT64_MAX, LEN_MAX, EINVAL, 0);
    refuse(P, TO_RAM, 0, UINT64_MAX - 7, 9, EINVAL, 0);
    refuse(P, FROM_RAM, UINT64_MAX - 7, 0, 9, EINVAL, 0);
    MUST(memcmp(before, m.at, sizeof(before)) == 0);
    SAME(reg(P, COMPLETED), 0);

    /* an operand that the command doesn't use doesn't matter; the last byte of all can be reached */
    SAME(run(P, SUM, UINT64_MAX, AT, 8), 0);
    SAME(run(P, FILL, AT, UINT64_MAX, 8), 0);
    m.at[MIB - 1] = 9;
    SAME(run(P, SUM, 0, UINT64_MAX, 1), 0);
    SAME(reg(P, RESULT), 9);
    unmap(P, UINT64_MAX - MIB + 1, MIB);
    refuse(P, SUM, 0, UINT64_MAX - 7, 9, EINVAL, 0);
    refuse(P, SUM, 0, UINT64_MAX - 7, 8, ENOENT, UINT64_MAX - 7);
    end(&m);
}
END_TEST

/* "how often the command is done, 0 counts as 1"; "commands done since reset, each repetition counted"; "SUM the bytes of SRC
 * into RESULT (modulo 2^64)" */
START_TEST(test_engine_repetitions)
{
    memory m = with_memory(NULL, MIB, _i ? WITHOUT_FD : WITH_FD);
    memset(m.at, 0xff, MIB);
    static const uint32_t repeats[] = {0, 1, 2, 100, 1};
    uint64_t completed = 0;
    for (unsigned i = 0; i < COUNT(repeats); i++) {
        set(P, REPEAT, repeats[i]);
        SAME(run(P, SUM, 0, AT, MIB / 4), 0);
        SAME(reg(P, RESULT), 255 * (MIB / 4)); /* of the last repetition, not of all */
        completed += repeats[i] ? repeats[i] : 1;
        SAME(reg(P, COMPLETED), completed);
        SAME(reg(P, REPEAT), repeats[i]);
        refuse(P, SUM, 0, AT - 1, 1, ENOENT, AT - 1); /* isn't counted */
        SAME(reg(P, COMPLETED), completed);
    }
    end(&m);
}
END_TEST

/* "Before a repetition starts, the whole source is checked in ascending order, then the whole destination, against the table as
 * it is then. Where any byte is not readable or not writable, no byte moves, STATUS is 3, ERROR is ENOENT (no mapping), EACCES
 * (permission) [...], and FAULT is the first such IOVA." */
START_TEST(test_engine_refusals)
{
    enum { RW = 0x100000, RO = 0x140000, WO = 0x180000, ABOVE = 0x1c0000, HOLE = 0x200000, AFTER = 0x210000, SIZE = 0x40000 };
    static const struct {
        const char *what;
        uint32_t command;
        uint64_t dst, src, len;
        uint32_t error;
        uint64_t fault;
    } cases[] = {
        {"no mapping at all", COPY, RW, 0x5000, 8, ENOENT, 0x5000},
        {"nor for the destination", COPY, 0x5000, RW, 8, ENOENT, 0x5000},
        {"the byte before", SUM, 0, RW - 1, 2, ENOENT, RW - 1},
        {"the byte behind", FILL, HOLE - 8, 0, 9, ENOENT, HOLE},
        {"a hole between two", FILL, HOLE - 8, 0, 0x20000, ENOENT, HOLE},
        {"a hole in the source", COPY, RW, HOLE - 100, 0x10100, ENOENT, HOLE},
        {"writing what is read-only", FILL, RO + 5, 0, 1, EACCES, RO + 5},
        {"the same, from before it", FILL, RO - 5, 0, 100, EACCES, RO},
        {"reading what is write-only", SUM, 0, WO, 1, EACCES, WO},
        {"the same, from before it", COPY, RW, WO - 5, 100, EACCES, WO},
        {"source before destination", COPY, 0x3000, 0x9000000, 8, ENOENT, 0x9000000},
        {"source before destination, kinds differ", COPY, RO, 0x9000000, 8, ENOENT, 0x9000000},
        {"source before destination, permission first", COPY, 0x3000, WO + 9, 8, EACCES, WO + 9},
        {"the late end of the source before the destination's start", COPY, 0x3000, HOLE - 8, 16, ENOENT, HOLE},
        {"permission at a lower address than a hole", SUM, 0, RO, SIZE * 4, EACCES, WO},
        {"a hole at a lower address than a permission", SUM, 0, RW - 1, SIZE * 4, ENOENT, RW - 1},
        {"destination: a read-only part before a hole", FILL, RO - 1, 0, SIZE * 8, EACCES, RO},
        {"from memory into RAM", TO_RAM, 0, HOLE - 1, 2, ENOENT, HOLE},
        {"from RAM into memory", FROM_RAM, HOLE - 1, 0, 2, ENOENT, HOLE},
        {"from write-only memory into RAM", TO_RAM, 0, ABOVE - 1, 2, EACCES, ABOVE - 1},
        {"from RAM into read-only memory", FROM_RAM, WO - 1, 0, 2, EACCES, WO - 1},
        {"far away", SUM, 0, UINT64_MAX, 1, ENOENT, UINT64_MAX},
        {"the lowest address", SUM, 0, 0, 1, ENOENT, 0},
    };
    static uint8_t ram[RAM_SIZE], before_ram[RAM_SIZE];
    memory m = make_memory(2 * MIB, SEALED), before = make_memory(2 * MIB, SEALED);
    start(_i == NO_MMAP ? "--no-mmap" : NULL);
    join(P);
    const struct {
        uint64_t iova, size;
        uint32_t prot;
    } table[] = {{RW, SIZE, 3}, {RO, SIZE, READABLE}, {WO, SIZE, WRITEABLE}, {ABOVE, SIZE, 3}, {AFTER, SIZE, 3}};
    for (unsigned i = 0; i < COUNT(table); i++)
        map(P, table[i].iova, table[i].size, table[i].prot, &m, table[i].iova - RW,
            _i == DIRECT || _i == NO_MMAP || (_i == MIXED && i % 2) ? WITH_FD : WITHOUT_FD);
    scramble(m.at, m.size, 31);
    memcpy(before.at, m.at, m.size);
    scramble(before_ram, RAM_SIZE, 32);
    write_region(P, BAR2, 0, before_ram, RAM_SIZE);
    set(P, REPEAT, 3);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint32_t error = run(P, cases[i].command, cases[i].dst, cases[i].src, cases[i].len);
        uint64_t fault = reg(P, FAULT);
        read_region(P, BAR2, 0, ram, RAM_SIZE);
        if (error != cases[i].error || fault != cases[i].fault || memcmp(before.at, m.at, m.size) ||
            memcmp(before_ram, ram, RAM_SIZE))
            FAIL("%s: error %u, not %u; fault 0x%llx, not 0x%llx; bytes %s", cases[i].what, error, cases[i].error,
                 (unsigned long long)fault, (unsigned long long)cases[i].fault,
                 memcmp(before.at, m.at, m.size) ? "moved" : "are right");
        SAME(reg(P, STATUS), FAILED);
    }
    SAME(reg(P, COMPLETED), 0);
    SAME(P->messages, 0);
    free_memory(&before);
    end(&m);
}
END_TEST

/* "against the table as it is then": what was unmapped is gone for the next command, and for the next repetition; "DMA_UNMAP of
 * a window in use [...] end a transfer: nothing moves after their reply (ENOENT for the unmap)". */
START_TEST(test_engine_unmap_while_repeating)
{
    memory m = make_memory(2 * MIB, SEALED);
    start(NULL);
    join(P);
    map(P, AT, MIB, READABLE | WRITEABLE, &m, 0, WITH_FD);
    map(P, AT + MIB, MIB, READABLE | WRITEABLE, &m, MIB, WITH_FD);
    for (unsigned i = 0; i < 6; i++) {
        bool source = i % 2;
        memset(m.at, 0x11, m.size);
        set(P, REPEAT, UINT32_MAX);
        operands(P, AT + MIB + 10, AT, MIB / 2);
        uint64_t before = reg(P, COMPLETED);
        set(P, COMMAND, COPY);
        while (reg(P, COMPLETED) == before) /* "Other requests are served between repetitions" */
            SAME(reg(P, STATUS), BUSY);
        uint64_t gone = source ? AT : AT + MIB;
        unmap(P, gone, MIB);
        uint64_t completed = reg(P, COMPLETED);
        memset(m.at, 0x22, MIB);
        memset(m.at + MIB, 0x33, MIB);
        SAME(finish(P), ENOENT);
        SAME(reg(P, FAULT), source ? AT : AT + MIB + 10);
        MUST(all_are(m.at, MIB, 0x22) && all_are(m.at + MIB, MIB, 0x33));
        SAME(reg(P, COMPLETED), completed);
        MUST(completed > before);
        map(P, gone, MIB, READABLE | WRITEABLE, &m, source ? 0 : MIB, WITH_FD);
    }
    /* the same with the permission taken away: the unmap ends it, or the next check finds the read-only window */
    set(P, REPEAT, UINT32_MAX);
    operands(P, AT + MIB, AT, MIB);
    set(P, COMMAND, COPY);
    map_request request = {32, READABLE, MIB, AT + MIB, MIB};
    uint16_t id = post_unmap(P, AT + MIB, MIB);
    (void)post_with(P, DMA_MAP, 0, &request, sizeof(request), &m.fd, 1);
    SAME(await(P, id, DMA_UNMAP), 0);
    SAME(await(P, (uint16_t)(id + 1), DMA_MAP), 0);
    uint32_t error = finish(P);
    MUST(error == ENOENT || error == EACCES);
    SAME(reg(P, FAULT), AT + MIB);
    end(&m);
}
END_TEST

/* ---- memory that goes away ------------------------------------------------------------------------------------------------- */

enum { PAGES = 64, LEFT = 21 };

/* "EFAULT, the memory behind the mapping is gone (the client shrank the file), FAULT lies in the first page that is gone, pages
 * that are still backed stay usable" */
START_TEST(test_engine_shrunken_file)
{
    static const struct {
        uint32_t command;
        uint32_t dst, src, len; /* offsets; dst and src of a command that touches only one are 0 or an offset in RAM */
        uint32_t gone;          /* in this page */
    } cases[] = {
        {SUM, 0, 0, PAGES * PAGE, LEFT},
        {SUM, 0, LEFT * PAGE - 1, 2, LEFT},
        {SUM, 0, LEFT * PAGE, 1, LEFT},
        {SUM, 0, 40 * PAGE + 7, 3 * PAGE, 40},
        {FILL, LEFT * PAGE - 100, 0, 10 * PAGE, LEFT},
        {FILL, 0, 0, PAGES * PAGE, LEFT},
        {FILL, 50 * PAGE, 0, 3, 50},
        {TO_RAM, 0, 18 * PAGE + 1, 8 * PAGE, LEFT},
        {TO_RAM, 0, 63 * PAGE, PAGE, 63},
        {FROM_RAM, 20 * PAGE + 1, 0, 8 * PAGE, LEFT},
        {FROM_RAM, 33 * PAGE + 1, 0, 8 * PAGE, 33},
        {COPY, 0, 17 * PAGE, 10 * PAGE, LEFT}, /* from what is gone */
        {COPY, 17 * PAGE, 0, 10 * PAGE, LEFT}, /* to it */
        {COPY, 0, 30 * PAGE, 10 * PAGE, 30},
        {COPY, 30 * PAGE, 0, 10 * PAGE, 30},
        {COPY, 17 * PAGE, 17 * PAGE + 100, 10 * PAGE, LEFT}, /* overlapping, downwards */
        {COPY, 17 * PAGE + 100, 17 * PAGE, 10 * PAGE,
         LEFT}, /* upwards: backwards as memmove goes, but the first page all the same */
        {COPY, 40 * PAGE + 8, 40 * PAGE, 10 * PAGE, 40},
    };
    uint8_t ram[1];
    memory m = make_memory(PAGES * PAGE, SHRINKABLE), healthy = make_memory(PAGES * PAGE, SEALED);
    uint64_t other = 0x40000000;
    start(NULL);
    join(P);
    map(P, AT, m.size, READABLE | WRITEABLE, &m, 0, WITH_FD);
    map(P, other, healthy.size, READABLE | WRITEABLE, &healthy, 0, WITH_FD);
    SAME(run(P, FILL, AT, 0, PAGES * PAGE), 0);
    for (unsigned round = 0; round < 3; round++) {
        MUST(ftruncate(m.fd, LEFT * PAGE) == 0);
        for (unsigned i = 0; i < COUNT(cases); i++) {
            uint64_t dst = cases[i].command == TO_RAM ? cases[i].dst : AT + cases[i].dst;
            uint64_t src = cases[i].command == FROM_RAM ? cases[i].src : AT + cases[i].src;
            uint32_t error = run(P, cases[i].command, dst, src, cases[i].len);
            uint64_t fault = reg(P, FAULT), from = AT + (uint64_t)cases[i].gone * PAGE;
            if (error != EFAULT || fault < from || fault >= from + PAGE)
                FAIL("case %u: error %u, fault 0x%llx, not in [0x%llx, 0x%llx)", i, error, (unsigned long long)fault,
                     (unsigned long long)from, (unsigned long long)(from + PAGE));
            /* the pages that are left, and other windows */
            scramble(m.at, LEFT * PAGE, i);
            SAME(run(P, COPY, other + 3, AT, LEFT * PAGE), 0);
            MUST(memcmp(healthy.at + 3, m.at, LEFT * PAGE) == 0);
            SAME(run(P, COPY, AT + PAGE, other + 40 * PAGE, PAGE * (LEFT - 1)), 0);
            MUST(memcmp(healthy.at + 40 * PAGE, m.at + PAGE, (LEFT - 1) * PAGE) == 0);
        }
        /* only one of two files: from and to the healthy one */
        uint32_t error = run(P, COPY, other, AT + 20 * PAGE, 4 * PAGE);
        SAME(error, EFAULT);
        SAME(reg(P, FAULT) / PAGE, (AT + LEFT * PAGE) / PAGE);
        error = run(P, COPY, AT + 20 * PAGE, other, 4 * PAGE);
        SAME(error, EFAULT);
        SAME(reg(P, FAULT) / PAGE, (AT + LEFT * PAGE) / PAGE);

        /* when the file grows again, its new pages are used, or still refused; never something else */
        MUST(ftruncate(m.fd, PAGES * PAGE) == 0);
        memset(m.at, 1, m.size);
        error = run(P, SUM, 0, AT, PAGES * PAGE);
        MUST(error == EFAULT || (error == 0 && reg(P, RESULT) == PAGES * PAGE));
        if (error) { /* then only a new window has them */
            unmap(P, AT, m.size);
            map(P, AT, m.size, READABLE | WRITEABLE, &m, 0, WITH_FD);
            SAME(run(P, SUM, 0, AT, PAGES * PAGE), 0);
        }
        read_region(P, BAR2, 0, ram, 1);
    }
    free_memory(&healthy);
    end(&m);
}
END_TEST

/* The same for a file that was too short from the start; it may be refused, too. */
START_TEST(test_engine_short_file)
{
    memory m = make_memory(2 * PAGE, SHRINKABLE), full = make_memory(2 * PAGE, SEALED);
    start(NULL);
    join(P);
    map_request requests[] = {
        {32, 3, 0, AT, 5 * PAGE}, {32, 3, PAGE, AT, 4 * PAGE}, {32, 3, 7 * PAGE, AT, PAGE}, {32, 3, 0, AT, PAGE}};
    for (unsigned i = 0; i < 2 * COUNT(requests); i++) {
        map_request *r = &requests[i / 2];
        if (call_with(P, DMA_MAP, r, sizeof(*r), i % 2 ? &full.fd : &m.fd, 1) != 0)
            continue;
        uint64_t backed = r->offset < 2 * PAGE ? 2 * PAGE - r->offset : 0;
        uint32_t error = run(P, SUM, 0, AT, r->size);
        SAME(error, backed < r->size ? EFAULT : 0);
        if (error)
            SAME(reg(P, FAULT) / PAGE, (AT + backed) / PAGE);
        if (backed)
            SAME(run(P, FILL, AT, 0, backed < r->size ? backed : r->size), 0);
        unmap(P, AT, r->size);
    }
    sync_up(P);
    free_memory(&full);
    end(&m);
}
END_TEST

/* The same while the bytes move, again and again. */
START_TEST(test_engine_shrinks_while_repeating)
{
    memory m = make_memory(16 * MIB, SHRINKABLE), healthy = make_memory(MIB, SEALED);
    start(NULL);
    join(P);
    map(P, AT, m.size, READABLE | WRITEABLE, &m, 0, WITH_FD);
    map(P, 0x40000000, MIB, READABLE | WRITEABLE, &healthy, 0, WITH_FD);
    for (unsigned i = 0; i < 8; i++) {
        static const uint32_t commands[] = {COPY, FILL, SUM, COPY};
        uint64_t before = reg(P, COMPLETED), kept = (uint64_t)(i / 4) * 100 * PAGE;
        MUST(ftruncate(m.fd, (off_t)m.size) == 0);
        unmap(P, AT, m.size); /* whatever the engine makes of a file that grows again, this is a new window */
        map(P, AT, m.size, READABLE | WRITEABLE, &m, 0, WITH_FD);
        set(P, REPEAT, UINT32_MAX);
        operands(P, AT, i % 4 == 3 ? AT + 16 : AT + 8 * MIB, 8 * MIB - 32);
        set(P, COMMAND, commands[i % 4]);
        while (reg(P, COMPLETED) == before)
            SAME(reg(P, STATUS), BUSY);
        MUST(ftruncate(m.fd, (off_t)kept) == 0);
        SAME(finish(P), EFAULT);
        MUST(reg(P, FAULT) >= AT + kept && reg(P, FAULT) < AT + m.size);
        set(P, REPEAT, 0);
        memset(healthy.at, (int)i, 1000);
        SAME(run(P, SUM, 0, 0x40000000, 1000), 0);
        SAME(reg(P, RESULT), 1000 * i);
        if (kept)
            SAME(run(P, FILL, AT, 0, kept), 0);
    }
    free_memory(&healthy);
    end(&m);
}
END_TEST

/* ---- by message ------------------------------------------------------------------------------------------------------------ */

/* "`--no-mmap`: never map client file descriptors; every DMA travels as DMA_READ / DMA_WRITE messages." "Messages are at most
 * 128 KiB each, whatever larger limit the client offers": with the limits that clients offer; dma_of() checks each message. */
START_TEST(test_engine_message_limits)
{
    static const struct {
        const char *json;
        uint32_t limit, len;
    } cases[] = {
        {"{}", 128 * KIB, LEN_MAX},
        {"{\"capabilities\":{}}", 128 * KIB, 300000},
        {"{\"capabilities\":{\"max_data_xfer_size\":16777216}}", 128 * KIB, LEN_MAX},
        {"{\"capabilities\":{\"max_data_xfer_size\":131073}}", 128 * KIB, 400001},
        {"{\"capabilities\":{\"max_data_xfer_size\":131071}}", 131071, 400001},
        {"{\"capabilities\":{\"max_data_xfer_size\":4096}}", 4096, 100000},
        {"{\"capabilities\":{\"max_data_xfer_size\":1024,\"max_msg_fds\":32}}", 1024, 100000},
        {"{\"capabilities\":{\"max_data_xfer_size\":1000}}", 1000, 50001},
        {"{\"capabilities\":{\"max_data_xfer_size\":1}}", 1, 50},
    };
    memory m = make_memory(2 * LEN_MAX, SEALED);
    start("--no-mmap");
    unsigned fds = idle_fds();
    for (unsigned i = 0; i < COUNT(cases); i++) {
        join_with(P, cases[i].json);
        P->limit = cases[i].limit;
        map(P, AT, m.size, READABLE | WRITEABLE, &m, 0, WITH_FD);
        SAME(mapped_files(), 0);
        scramble(m.at, cases[i].len, i);
        SAME(run(P, COPY, AT + LEN_MAX, AT, cases[i].len), 0);
        MUST(memcmp(m.at, m.at + LEN_MAX, cases[i].len) == 0);
        MUST(P->messages >= 2 * (cases[i].len / cases[i].limit));
        leave(P);
    }
    await_idle(fds);
    stop();
    free_memory(&m);
}
END_TEST

/* "`max_data_xfer_size` 0 is refused at VERSION": an error, or the end; the next client is served. And other VERSIONs that
 * can't work. */
START_TEST(test_engine_refused_versions)
{
    static const struct {
        uint16_t major, minor;
        const char *json;
    } cases[] = {
        {0, 0, "{\"capabilities\":{\"max_data_xfer_size\":0}}"},
        {0, 1, "{\"capabilities\":{\"max_msg_fds\":1,\"max_data_xfer_size\":0,\"pgsizes\":4096}}"},
        {1, 0, usual_capabilities},
        {0xffff, 0, usual_capabilities},
        {0, 0, "{\"capabilities\":"},
        {0, 0, "nonsense"},
    };
    start(NULL);
    unsigned fds = idle_fds();
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint8_t body[300] = {0};
        memcpy(body, &cases[i].major, 2);
        memcpy(body + 2, &cases[i].minor, 2);
        size_t len = 4 + strlen(cases[i].json) + 1;
        memcpy(body + 4, cases[i].json, len - 4);
        fresh(P, dial_when_ready(&engine));
        MUST(P->fd >= 0 && send_message(P->fd, (header){.id = 1, .cmd = VERSION}, body, (uint32_t)len, NULL, 0));
        if (next_reply(P, &P->reply))
            MUST(P->reply.h.flags == (REPLY | ERROR));
        leave(P);
        join(P);
        sync_up(P);
        leave(P);
    }
    await_idle(fds);
    /* "A client that has not finished the VERSION exchange" is served nothing else */
    for (unsigned i = 0; i < 2; i++) {
        map_request mapping = {32, READABLE | WRITEABLE, 0, AT, PAGE};
        info query = {.argsz = sizeof(query)};
        fresh(P, dial_when_ready(&engine));
        MUST(P->fd >= 0);
        if (i ? send_message(P->fd, (header){.cmd = DMA_MAP}, &mapping, sizeof(mapping), NULL, 0)
              : send_message(P->fd, (header){.cmd = GET_INFO}, &query, sizeof(query), NULL, 0))
            if (next_reply(P, &P->reply))
                MUST(P->reply.h.flags == (REPLY | ERROR));
        SAME(ask_table(NULL, 0), 0);
        leave(P);
    }
    await_idle(fds);
    /* without JSON; and the reply isn't larger than QEMU takes (INTEROP: "at or below 200 bytes") */
    fresh(P, dial_when_ready(&engine));
    uint32_t none = 0;
    SAME(call(P, VERSION, &none, 4), 0);
    MUST(P->reply.len + sizeof(header) <= 200);
    sync_up(P);
    leave(P);
    stop();
}
END_TEST

/* A window without a descriptor, held at the first message of a command. */
static memory hold_first(uint32_t command, uint64_t dst, uint64_t src, uint64_t len)
{
    memory m = with_memory(NULL, MIB, WITHOUT_FD);
    scramble(m.at, MIB, 41);
    P->hold = true;
    operands(P, dst, src, len);
    set(P, COMMAND, command);
    (void)held(P);
    return m;
}

/* Sends a reply to the held message, made of these. */
static void reply_raw(peer *p, const frame *f, uint16_t id, uint16_t cmd, uint32_t flags, uint32_t error, const void *body,
                      uint32_t len)
{
    MUST(send_message(p->fd, (header){.id = id, .cmd = cmd ? cmd : f->h.cmd, .flags = REPLY | flags, .error = error}, body, len,
                      NULL, 0));
}

/* The body of a right reply to the held message; returns its length. */
static uint32_t right_body(peer *p, const frame *f, uint8_t *body)
{
    dma_access access = dma_of(p, f);
    memcpy(body, &access, sizeof(access));
    if (f->h.cmd == DMA_READ)
        move_windows(p, access.address, body + sizeof(access), access.count, false);
    return (uint32_t)(sizeof(access) + (f->h.cmd == DMA_READ ? access.count : 0));
}

/* "EIO, the client refused or broke the message transfer (also: wrong address, count or length in its reply), FAULT is the
 * first IOVA of that message." In each way, in the first message of a command and in the second; what comes too late is
 * discarded, and the next command works. */
START_TEST(test_engine_broken_replies)
{
    enum {
        REFUSED,
        REFUSED_SILENTLY,
        ADDRESS,
        ADDRESS_FAR,
        LESS,
        MORE,
        NOTHING,
        SHORT,
        LONG,
        EMPTY,
        OTHER_COMMAND,
        ALIEN_COMMAND,
        KINDS
    };
    static uint8_t body[200 * KIB];
    memory m = with_memory("--no-mmap", MIB, WITH_FD);
    for (unsigned i = 0; i < KINDS * 4; i++) {
        bool writing = i & 1, second = i & 2;
        unsigned kind = i / 4;
        if (writing && kind == EMPTY)
            continue; /* this is right for DMA_WRITE */
        scramble(m.at, MIB, i);
        P->hold = true;
        if (writing)
            operands(P, AT + 7, 0, 200000);
        else
            operands(P, 0, AT + 7, 200000);
        set(P, COMMAND, writing ? FILL : SUM);
        frame *f = held(P);
        uint64_t from = AT + 7;
        if (second) {
            uint64_t first = dma_of(P, f).count;
            SAME(dma_of(P, f).address, from);
            answer(P, f);
            drop_held(P);
            f = held(P);
            from += first;
        }
        SAME(dma_of(P, f).address, from);
        SAME(f->h.cmd, writing ? DMA_WRITE : DMA_READ);
        uint16_t id = f->h.id;
        uint32_t len = right_body(P, f, body), right = len, error = 0, flags = 0;
        uint16_t cmd = 0;
        dma_access access = dma_of(P, f);
        uint64_t count = access.count;
        switch (kind) {
        case REFUSED: flags = ERROR, error = ENODEV, len = 0; break;
        case REFUSED_SILENTLY: flags = ERROR, len = 0; break;
        case ADDRESS: access.address++; break;
        case ADDRESS_FAR: access.address ^= UINT64_C(1) << 40; break;
        case LESS:
            access.count--;
            len -= writing ? 0 : 1;
            break;
        case MORE:
            access.count++;
            len += writing ? 0 : 1;
            break;
        case NOTHING:
            access.count = 0;
            len = sizeof(access);
            break;
        case SHORT: len--; break;
        case LONG: len += 8; break;
        case EMPTY: len = 0; break;
        case OTHER_COMMAND: cmd = writing ? DMA_READ : DMA_WRITE; break;
        default: cmd = GET_INFO;
        }
        memcpy(body, &access, sizeof(access));
        reply_raw(P, f, id, cmd, flags, error, body, len);
        uint32_t got = finish_within(P, PATIENCE / 3);
        if (got != EIO || reg(P, FAULT) != from)
            FAIL("kind %u of a reply to a %s: error %u, fault 0x%llx, not 0x%llx", kind, writing ? "write" : "read", got,
                 (unsigned long long)reg(P, FAULT), (unsigned long long)from);
        while (P->queued) /* others of the same command may have been sent already; what they get now is too late */
            drop_held(P);
        access = (dma_access){from, count};
        memcpy(body, &access, sizeof(access));
        reply_raw(P, f, id, writing ? DMA_WRITE : DMA_READ, 0, 0, body, right);
        release(P);
        memset(m.at, 1, 1000);
        SAME(run(P, SUM, 0, AT, 1000), 0);
        SAME(reg(P, RESULT), 1000);
    }
    end(&m);
}
END_TEST

/* The payload of a reply to DMA_WRITE: none, 12 bytes or 16 ("accept all three", INTEROP), and no other. */
START_TEST(test_engine_write_replies)
{
    memory m = with_memory("--no-mmap", MIB, WITH_FD);
    for (uint32_t len = 0; len <= 24; len++) {
        uint8_t body[24] = {0};
        for (unsigned wrong = 0; wrong < 3; wrong++) {
            P->hold = true;
            operands(P, AT + 64, 0, 777);
            set(P, COMMAND, FILL);
            frame *f = held(P);
            dma_access access = dma_of(P, f);
            access.address += wrong == 1;
            access.count += wrong == 2;
            memcpy(body, &access, sizeof(access));
            reply_raw(P, f, f->h.id, 0, 0, 0, body, len);
            drop_held(P);
            uint32_t error = finish(P);
            bool right = len == 0 || ((len == 12 || len == 16) && !wrong);
            if (error != (right ? 0 : EIO))
                FAIL("%u bytes of payload%s: error %u", len, wrong ? ", wrong ones" : "", error);
            SAME(reg(P, FAULT), right ? 0 : AT + 64);
        }
    }
    end(&m);
}
END_TEST

/* "QEMU 10.1 and 10.2 have a 32-bit count and data at byte 28 [...]: correct bytes or EIO" (INTEROP). */
START_TEST(test_engine_shifted_replies)
{
    static const uint64_t lens[] = {1, 3, 4, 5, 8, 12, 16, 4096, 5000, 131072, 200000};
    static uint8_t body[200 * KIB], ram[RAM_SIZE];
    memory m = with_memory("--no-mmap", MIB, WITH_FD);
    for (unsigned i = 0; i < COUNT(lens) * 2; i++) {
        uint64_t len = lens[i / 2], sum = 0;
        bool zeros = i % 2; /* then the count may look like one of 64 bits */
        scramble(m.at, MIB, i);
        if (zeros)
            memset(m.at + 5, 0, 8);
        for (uint64_t j = 0; j < len; j++)
            sum += m.at[5 + j];
        bool to_ram = len <= RAM_SIZE;
        P->hold = true;
        operands(P, 0, AT + 5, len);
        set(P, COMMAND, to_ram ? TO_RAM : SUM);
        uint64_t status;
        while ((status = reg(P, STATUS)) == BUSY)
            while (P->queued) {
                frame *f = &P->queue[0];
                dma_access access = dma_of(P, f);
                uint32_t count = (uint32_t)access.count;
                memcpy(body, &access.address, 8);
                memcpy(body + 8, &count, 4);
                memcpy(body + 12, m.at + (access.address - AT), access.count);
                reply_raw(P, f, f->h.id, 0, 0, 0, body, 12 + count);
                drop_held(P);
            }
        if (status == DONE && to_ram) {
            read_region(P, BAR2, 0, ram, (uint32_t)len);
            MUST(memcmp(ram, m.at + 5, len) == 0);
        } else if (status == DONE) {
            SAME(reg(P, RESULT), sum);
        } else {
            SAME(reg(P, ERRNO), EIO);
        }
    }
    end(&m);
}
END_TEST

/* A reply with an id that nobody waits for is discarded; the right one still counts. */
START_TEST(test_engine_wrong_id)
{
    static uint8_t body[200 * KIB];
    memory m = hold_first(SUM, 0, AT, 1000);
    frame *f = &P->queue[0];
    uint32_t len = right_body(P, f, body);
    for (unsigned i = 1; i < 5; i++) {
        memset(body + sizeof(dma_access), (int)i, 1000);
        reply_raw(P, f, (uint16_t)(f->h.id + i * 13), 0, 0, 0, body, len);
        reply_raw(P, f, (uint16_t)(f->h.id - i), 0, ERROR, EIO, NULL, 0);
        SAME(reg(P, STATUS), BUSY);
    }
    uint64_t sum = 0;
    for (unsigned i = 0; i < 1000; i++)
        sum += m.at[i];
    release(P);
    SAME(finish(P), 0);
    SAME(reg(P, RESULT), sum);
    /* and one when nothing is awaited at all */
    reply_raw(P, f, f->h.id, DMA_READ, 0, 0, body, len);
    SAME(run(P, SUM, 0, AT, 1000), 0);
    SAME(reg(P, RESULT), sum);
    end(&m);
}
END_TEST

/* "A reply whose size field is below 16 or above the maximum ends the connection." */
START_TEST(test_engine_impossible_replies)
{
    static const uint32_t sizes[] = {0, 1, 15, 0x40000000, 0x7fffffff, UINT32_MAX};
    memory m = make_memory(MIB, SEALED);
    start(NULL);
    unsigned fds = idle_fds();
    for (unsigned i = 0; i < COUNT(sizes); i++) {
        join(P);
        SAME(reg(P, STATUS), IDLE);
        SAME(reg(P, LEN), 0);
        map(P, AT, MIB, READABLE | WRITEABLE, &m, 0, WITHOUT_FD);
        P->hold = true;
        operands(P, 0, AT, 1000);
        set(P, COMMAND, SUM);
        header h = {.id = held(P)->h.id, .cmd = DMA_READ, .size = sizes[i], .flags = REPLY};
        MUST(send_bytes(P->fd, &h, sizeof(h), NULL, 0));
        await_close(P);
    }
    await_idle(fds);
    stop();
    free_memory(&m);
}
END_TEST

/* "DMA_UNMAP of a window in use [...] end a transfer: nothing moves after their reply (ENOENT for the unmap); a late reply to
 * its message is discarded." The window is source or destination, is being read or written, is mapped again at once, is
 * unmapped with all others. */
START_TEST(test_engine_unmap_during_message)
{
    enum { SOURCE_READ, DESTINATION_READ, SOURCE_WRITE, DESTINATION_WRITE, PHASES };
    enum { EXACT, LARGER, ALL, AND_BACK, WAYS_TO_UNMAP };
    static uint8_t body[200 * KIB];
    unsigned phase = (unsigned)_i % PHASES, way = (unsigned)_i / PHASES;
    uint64_t src = UINT64_C(0x100000000), dst = UINT64_C(0x200000000),
             gone = phase == SOURCE_READ || phase == SOURCE_WRITE ? src : dst;
    memory a = make_memory(MIB, SEALED), b = make_memory(MIB, SEALED);
    MUST(way < WAYS_TO_UNMAP);
    start(NULL);
    join(P);
    map(P, src, MIB, READABLE, &a, 0, WITHOUT_FD);
    map(P, dst, MIB, WRITEABLE, &b, 0, WITHOUT_FD);
    scramble(a.at, MIB, 51);
    P->hold = true;
    set(P, REPEAT, 5);
    operands(P, dst + 100, src + 200, 300000);
    set(P, COMMAND, COPY);
    (void)held(P);
    while (phase >= SOURCE_WRITE && P->queue[0].h.cmd == DMA_READ) {
        answer(P, &P->queue[0]);
        drop_held(P);
        (void)held(P);
    }
    frame late = *held(P);
    uint32_t len = right_body(P, &late, body);
    unsigned sent = P->queued;

    unmap_request request = {.argsz = sizeof(request), .flags = 0, .address = gone, .size = MIB};
    if (way == LARGER)
        request.address = gone & ~UINT64_C(0xffffffff), request.size = UINT64_C(0x100000000);
    if (way == ALL)
        request.flags = 2, request.address = request.size = 0;
    uint16_t id = post(P, DMA_UNMAP, &request, sizeof(request));
    if (way == AND_BACK) {
        map_request back = {32, gone == src ? READABLE : WRITEABLE, 0, gone, MIB};
        (void)post(P, DMA_MAP, &back, sizeof(back));
    }
    SAME(await(P, id, DMA_UNMAP), 0);
    if (way == AND_BACK)
        SAME(await(P, (uint16_t)(id + 1), DMA_MAP), 0);
    else
        forget(P, request.address, way == ALL ? UINT64_MAX : request.size);
    memset(b.at, 0xbb, MIB);
    if (_i % 3 == 0) { /* the late reply isn't needed to end it */
        SAME(finish(P), ENOENT);
    }
    reply_raw(P, &late, late.h.id, 0, 0, 0, body, late.h.cmd == DMA_READ ? len : 16);
    SAME(finish(P), ENOENT);
    uint64_t fault = reg(P, FAULT), from = gone == src ? src + 200 : dst + 100;
    MUST(way == ALL || (fault >= from && fault < from + 300000));
    SAME(P->queued, sent); /* no further message was sent */
    SAME(reg(P, COMPLETED), 0);
    MUST(all_are(b.at, MIB, 0xbb));

    /* and the next command isn't confused by it */
    while (P->queued)
        drop_held(P);
    P->hold = false;
    map(P, 0x5000000, MIB, READABLE | WRITEABLE, &a, 0, WITHOUT_FD);
    set(P, REPEAT, 0);
    memset(a.at, 2, MIB);
    SAME(run(P, SUM, 0, 0x5000000, MIB), 0);
    SAME(reg(P, RESULT), 2 * MIB);
    free_memory(&b);
    end(&a);
}
END_TEST

enum { UNMAP_DURING_MESSAGE = 16 };

/* An unmap of a window that isn't in use ends nothing; of one whose turn has not come, ends the transfer, and no message goes
 * there. */
START_TEST(test_engine_unmap_others_during_message)
{
    memory m = make_memory(4 * MIB, SEALED);
    start(NULL);
    join(P);
    for (unsigned i = 0; i < 4; i++)
        map(P, AT + (uint64_t)i * MIB, MIB, READABLE | WRITEABLE, &m, (uint64_t)i * MIB, WITHOUT_FD);
    memset(m.at, 3, m.size);
    P->hold = true;
    operands(P, 0, AT, 2 * MIB);
    set(P, COMMAND, SUM);
    (void)held(P);
    unmap(P, AT + 3 * MIB, MIB);
    unmap(P, UINT64_C(0x700000000000), MIB);
    release(P);
    SAME(finish(P), 0);
    SAME(reg(P, RESULT), 6 * MIB);

    P->hold = true;
    set(P, COMMAND, SUM);
    (void)held(P);
    unmap(P, AT + MIB, MIB);
    P->hold = false;
    for (unsigned i = 0; i < P->queued; i++) /* dma_of() refuses a message to what is unmapped, unless it was sent before */
        if (window_at(P, P->queue[i].h.size ? AT : 0))
            answer(P, &P->queue[i]);
    P->queued = 0;
    SAME(finish(P), ENOENT);
    MUST(reg(P, FAULT) >= AT && reg(P, FAULT) < AT + 2 * MIB);
    end(&m);
}
END_TEST

/* "device reset [...] end a transfer: nothing moves after their reply [...]; a late reply to its message is discarded": also
 * where the next command asks for the very same bytes. */
START_TEST(test_engine_reset_during_message)
{
    static uint8_t body[200 * KIB];
    memory m = hold_first(COPY, AT + 500000, AT + 100, 5000);
    for (unsigned i = 0; i < 6; i++) {
        bool writing = i % 3 == 2;
        if (writing) {
            answer(P, &P->queue[0]);
            drop_held(P);
            (void)held(P);
        }
        frame late = P->queue[0];
        drop_held(P);
        MUST(P->queued == 0 && late.h.cmd == (writing ? DMA_WRITE : DMA_READ));
        uint32_t len = right_body(P, &late, body);
        if (i % 2)
            function_level_reset(P);
        else
            SAME(call(P, DEVICE_RESET, NULL, 0), 0);
        memset(m.at, (int)i + 1, MIB);
        SAME(reg(P, STATUS), IDLE);
        SAME(reg(P, LEN), 0);
        /* the same again; the old bytes must not get into it */
        operands(P, AT + 500000, AT + 100, 5000);
        set(P, COMMAND, COPY);
        (void)held(P);
        MUST(P->queue[0].h.id != late.h.id);
        reply_raw(P, &late, late.h.id, 0, 0, 0, body, late.h.cmd == DMA_READ ? len : 16);
        SAME(reg(P, STATUS), BUSY);
        memset(m.at + 100, (int)i + 50, 5000);
        release(P);
        SAME(finish(P), 0);
        MUST(all_are(m.at + 100, 5000, i + 50) && all_are(m.at + 500000, 5000, i + 50));
        MUST(all_are(m.at, 100, i + 1) && all_are(m.at + 5100, 494900, i + 1) && all_are(m.at + 505000, MIB - 505000, i + 1));
        SAME(reg(P, COMPLETED), 1);
        P->hold = true;
        operands(P, AT + 500000, AT + 100, 5000);
        set(P, COMMAND, COPY);
        (void)held(P);
    }
    end(&m);
}
END_TEST

/* "[...] and disconnect end a transfer": the next client finds an idle engine, and gets no message. */
START_TEST(test_engine_disconnect_during_message)
{
    memory m = hold_first(SUM, 0, AT, 5000);
    leave(P);
    join(P);
    SAME(reg(P, STATUS), IDLE);
    SAME(reg(P, LEN), 0);
    map(P, AT, MIB, READABLE | WRITEABLE, &m, 0, WITHOUT_FD);
    P->hold = true;
    for (unsigned i = 0; i < 20; i++)
        sync_up(P);
    SAME(P->queued, 0);
    P->hold = false;
    memset(m.at, 4, 1000);
    SAME(run(P, SUM, 0, AT, 1000), 0);
    SAME(reg(P, RESULT), 4000);
    end(&m);
}
END_TEST

/* ---- interrupts ------------------------------------------------------------------------------------------------------------ */

/* Starts a command and waits for its end without a look at STATUS, which would lower INTx. */
static void run_blindly(uint64_t dst, uint64_t src)
{
    uint64_t before = reg(P, COMPLETED);
    operands(P, dst, src, 64);
    set(P, COMMAND, COPY);
    while (reg(P, COMPLETED) == before && !reg(P, ERRNO))
        nap();
    sync_up(P);
}

/* "NOTIFY acts once per command, when it ends, done or failed, after STATUS and the data." "1 + v: MSI-X vector v when MSI-X is
 * enabled in configuration space" */
START_TEST(test_engine_msix)
{
    int events[4];
    memory m = with_memory(NULL, MIB, WITH_FD);
    for (unsigned i = 0; i < 4; i++)
        events[i] = make_event();
    assign(P, MSIX, events, 4);
    enable_msix(P, true);
    for (unsigned i = 0; i < 24; i++) {
        unsigned vector = i % 4;
        bool fails = i % 3 == 0;
        scramble(m.at, 5000, i);
        set(P, NOTIFY, 1 + vector);
        set(P, REPEAT, i % 5 * 10);
        operands(P, AT + 500000, fails ? AT - 5000 : AT, 5000);
        set(P, COMMAND, COPY);
        SAME(signalled(events[vector], PATIENCE), 1);
        if (!fails)
            MUST(memcmp(m.at, m.at + 500000, 5000) == 0); /* by the time of the interrupt */
        SAME(reg(P, STATUS), fails ? FAILED : DONE);
        MUST(!intx_is_up(P));
        for (unsigned j = 0; j < 4; j++)
            SAME(signalled(events[j], 0), 0); /* once, and nobody else */
    }
    set(P, NOTIFY, 0); /* "0: no interrupt" */
    SAME(run(P, COPY, AT, AT + 100, 10), 0);
    sync_up(P);
    for (unsigned j = 0; j < 4; j++) {
        SAME(signalled(events[j], 0), 0);
        close(events[j]);
    }
    end(&m);
}
END_TEST

/* "its mask bits and the function mask have no effect on delivery, since clients virtualise them" */
START_TEST(test_engine_msix_masks)
{
    int events[4];
    memory m = with_memory(NULL, MIB, WITH_FD);
    for (unsigned i = 0; i < 4; i++)
        events[i] = make_event();
    assign(P, MSIX, events, 4);
    enable_msix(P, true);
    uint32_t control = capability(P, CAP_MSIX) + 2;
    for (unsigned i = 0; i < 4; i++) {
        put(P, BAR4, 16 * i + 12, 4, 1);
        put(P, CONFIG, control, 2, i % 2 ? 0xc000 : 0x8000);
        SAME(get(P, CONFIG, control, 2) & 0xc7ff, (i % 2 ? 0xc000 : 0x8000) | 3);
        set(P, NOTIFY, 1 + i);
        SAME(run(P, COPY, AT, AT + 100, 10), 0);
        SAME(signalled(events[i], PATIENCE), 1);
        close(events[i]);
    }
    end(&m);
}
END_TEST

/* "A vector above 3, or one without an eventfd: nothing." De-assigning part of a range leaves the rest as it is (INTEROP). */
START_TEST(test_engine_msix_absent)
{
    static const uint32_t absent[] = {5, 6, 0x100, 0x80000001, UINT32_MAX};
    int events[4], intx = make_event();
    memory m = with_memory(NULL, MIB, WITH_FD);
    for (unsigned i = 0; i < 4; i++)
        events[i] = make_event();
    enable_msix(P, true);
    assign(P, INTX, &intx, 1);
    set(P, NOTIFY, 2);
    SAME(run(P, COPY, AT, AT + 100, 10), 0);
    assign(P, MSIX, events, 4);
    for (unsigned i = 0; i < COUNT(absent); i++) {
        set(P, NOTIFY, absent[i]);
        SAME(run(P, COPY, AT, AT + 100, 10), 0);
        MUST(!intx_is_up(P));
    }
    SAME(set_irqs(P, DATA_EVENTFD | ACTION_TRIGGER, MSIX, 1, 2, NULL, 0), 0);
    for (unsigned i = 0; i < 4; i++) {
        set(P, NOTIFY, 1 + i);
        SAME(run(P, COPY, AT, AT + 100, 10), 0);
        sync_up(P);
        for (unsigned j = 0; j < 4; j++)
            SAME(signalled(events[j], 0), j == i && (i == 0 || i == 3));
    }
    SAME(set_irqs(P, DATA_NONE | ACTION_TRIGGER, MSIX, 0, 0, NULL, 0), 0); /* all of the index */
    for (unsigned i = 0; i < 4; i++) {
        set(P, NOTIFY, 1 + i);
        SAME(run(P, COPY, AT, AT + 100, 10), 0);
        sync_up(P);
        SAME(signalled(events[i], 0), 0);
        close(events[i]);
    }
    SAME(signalled(intx, 0), 0);
    close(intx);
    end(&m);
}
END_TEST

/* "INTx is a level: asserted from then until STATUS is read while not busy, the next COMMAND, or a reset; bit 3 of the
 * configuration status register shows it" */
START_TEST(test_engine_intx_level)
{
    int event = make_event();
    memory m = make_memory(MIB, SEALED);
    start(NULL);
    join(P);
    map(P, AT, MIB / 2, READABLE | WRITEABLE, &m, 0, WITH_FD);
    map(P, AT + MIB, MIB / 2, READABLE | WRITEABLE, &m, MIB / 2, WITHOUT_FD);
    assign(P, INTX, &event, 1);
    MUST(!intx_is_up(P));
    enum { READ_STATUS, READ_STATUS_WIDE, NEXT_COMMAND, RESET, FUNCTION_RESET, ENDS };
    for (unsigned i = 0; i < 2 * ENDS; i++) {
        set(P, NOTIFY, 1 + i % 3); /* every vector is INTx while MSI-X is off */
        operands(P, AT, i / ENDS ? AT - 64 : AT + 64, 64);
        set(P, COMMAND, COPY);
        SAME(signalled(event, PATIENCE), 1);
        MUST(intx_is_up(P));
        /* nothing else lowers it */
        uint8_t bytes[16];
        read_region(P, BAR0, STATUS, bytes, 1);
        read_region(P, BAR0, STATUS, bytes, 2);
        read_region(P, BAR0, COMMAND, bytes, 16);
        (void)reg(P, ERRNO);
        (void)reg(P, RESULT);
        set(P, NOTIFY, 0);
        set(P, STATUS, 0);
        MUST(intx_is_up(P));
        switch (i % ENDS) {
        case READ_STATUS: SAME(reg(P, STATUS), i / ENDS ? FAILED : DONE); break;
        case READ_STATUS_WIDE: SAME(get(P, BAR0, COMMAND, 8) >> 32, i / ENDS ? FAILED : DONE); break;
        case NEXT_COMMAND:
            P->hold = true;
            operands(P, AT, AT + MIB, 64);
            set(P, COMMAND, COPY);
            (void)held(P);
            MUST(!intx_is_up(P));
            release(P);
            SAME(finish(P), 0);
            break;
        case RESET: SAME(call(P, DEVICE_RESET, NULL, 0), 0); break;
        default: function_level_reset(P);
        }
        MUST(!intx_is_up(P));
        SAME(signalled(event, 0), 0);
        /* it has masked itself */
        SAME(set_irqs(P, DATA_NONE | ACTION_UNMASK, INTX, 0, 1, NULL, 0), 0);
        SAME(signalled(event, 0), 0);
    }
    /* MSI-X instead: no level */
    enable_msix(P, true);
    set(P, NOTIFY, 1);
    run_blindly(AT, AT + 64);
    MUST(!intx_is_up(P));
    SAME(signalled(event, 0), 0);
    close(event);
    end(&m);
}
END_TEST

/* "INTx disable keeps it from being signalled" */
START_TEST(test_engine_intx_disable)
{
    int event = make_event();
    memory m = with_memory(NULL, MIB, WITH_FD);
    assign(P, INTX, &event, 1);
    put(P, CONFIG, 4, 2, 0x400);
    set(P, NOTIFY, 1);
    run_blindly(AT, AT + 64);
    MUST(intx_is_up(P)); /* "bit 3 [...] shows it" all the same, as PCI has it */
    SAME(signalled(event, 0), 0);
    SAME(set_irqs(P, DATA_NONE | ACTION_UNMASK, INTX, 0, 1, NULL, 0), 0);
    sync_up(P);
    SAME(signalled(event, 0), 0);
    put(P, CONFIG, 4, 2, 0); /* "INTx is a level": it is still up, and nothing keeps it any more */
    SAME(signalled(event, PATIENCE), 1);
    SAME(reg(P, STATUS), DONE);
    MUST(!intx_is_up(P));
    /* one that went while it was disabled is not signalled later */
    SAME(set_irqs(P, DATA_NONE | ACTION_UNMASK, INTX, 0, 1, NULL, 0), 0);
    put(P, CONFIG, 4, 2, 0x400);
    run_blindly(AT, AT + 64);
    (void)reg(P, STATUS);
    put(P, CONFIG, 4, 2, 0);
    sync_up(P);
    SAME(signalled(event, 0), 0);
    close(event);
    end(&m);
}
END_TEST

/* "the IRQ index is maskable and masks itself when signalled, and an unmask signals again if the level is still up" */
START_TEST(test_engine_intx_mask)
{
    int event = make_event();
    memory m = with_memory(NULL, MIB, WITH_FD);
    assign(P, INTX, &event, 1);
    set(P, NOTIFY, 1);
    run_blindly(AT, AT + 64);
    SAME(signalled(event, PATIENCE), 1);
    /* masked by itself: the next one waits */
    run_blindly(AT, AT + 64);
    MUST(intx_is_up(P));
    SAME(signalled(event, 0), 0);
    /* still up: the unmask signals; again and again, once each */
    for (unsigned i = 0; i < 3; i++) {
        SAME(set_irqs(P, DATA_NONE | ACTION_UNMASK, INTX, 0, 1, NULL, 0), 0);
        SAME(signalled(event, PATIENCE), 1);
        MUST(intx_is_up(P));
    }
    /* down: the unmask doesn't */
    (void)reg(P, STATUS);
    SAME(set_irqs(P, DATA_NONE | ACTION_UNMASK, INTX, 0, 1, NULL, 0), 0);
    sync_up(P);
    SAME(signalled(event, 0), 0);
    /* masked by the client */
    SAME(set_irqs(P, DATA_NONE | ACTION_MASK, INTX, 0, 1, NULL, 0), 0);
    run_blindly(AT, AT + 64);
    MUST(intx_is_up(P));
    SAME(signalled(event, 0), 0);
    SAME(set_irqs(P, DATA_NONE | ACTION_UNMASK, INTX, 0, 1, NULL, 0), 0);
    SAME(signalled(event, PATIENCE), 1);
    (void)reg(P, STATUS);
    /* masked by the client, and gone before the unmask */
    run_blindly(AT, AT + 64);
    (void)reg(P, STATUS);
    SAME(set_irqs(P, DATA_NONE | ACTION_UNMASK, INTX, 0, 1, NULL, 0), 0);
    sync_up(P);
    SAME(signalled(event, 0), 0);
    /* "UNMASK with an eventfd is used for resampling" (INTEROP) */
    int resample = make_event();
    uint64_t once = 1;
    SAME(set_irqs(P, DATA_EVENTFD | ACTION_UNMASK, INTX, 0, 1, &resample, 1), 0);
    run_blindly(AT, AT + 64);
    SAME(signalled(event, PATIENCE), 1);
    for (unsigned i = 0; i < 3; i++) {
        MUST(write(resample, &once, sizeof(once)) == sizeof(once));
        SAME(signalled(event, PATIENCE), 1);
    }
    (void)reg(P, STATUS);
    MUST(write(resample, &once, sizeof(once)) == sizeof(once));
    while (is_readable(resample, 0))
        nap();
    sync_up(P);
    SAME(signalled(event, 0), 0);
    close(resample);
    /* de-assigned */
    SAME(set_irqs(P, DATA_EVENTFD | ACTION_TRIGGER, INTX, 0, 1, NULL, 0), 0);
    run_blindly(AT, AT + 64);
    MUST(intx_is_up(P));
    SAME(signalled(event, 0), 0);
    close(event);
    end(&m);
}
END_TEST

/* ---- reset and disconnect -------------------------------------------------------------------------------------------------- */

/* Leaves traces in all that a reset may clear. */
static void leave_traces(const uint8_t *ram)
{
    put(P, CONFIG, 4, 2, 0x0006);
    put(P, CONFIG, 0x10, 4, 0xfe000000);
    put(P, CONFIG, 0x18, 4, 0xfd000000);
    put(P, CONFIG, 0x1c, 4, 0x00000012);
    put(P, CONFIG, 0x20, 4, 0xfc000000);
    enable_msix(P, true);
    for (uint32_t at = 0; at < 64; at += 8)
        put(P, BAR4, at, 8, UINT64_C(0x0102030405060708));
    for (uint32_t at = 12; at < 64; at += 16)
        put(P, BAR4, at, 4, 1);
    set(P, PATTERN, 99);
    set(P, REPEAT, 2);
    set(P, NOTIFY, 3);
    SAME(run(P, SUM, 5, AT, 100), 0);
    refuse(P, SUM, 5, AT - 1, 100, ENOENT, AT - 1);
    MUST(reg(P, COMPLETED) >= 2 && reg(P, RESULT) != 0);
    write_region(P, BAR2, 0, ram, RAM_SIZE);
}

/* "Device reset, function-level reset and disconnect stop the work and set every register to its initial value, zero but for
 * the read-only constants. Device reset and function-level reset also clear the configuration command register, BARs, MSI-X
 * enable, the MSI-X table and device RAM; DMA windows and eventfds stay. Disconnect drops windows and eventfds, clears MSI-X
 * enable and the command register, and keeps device RAM." */
START_TEST(test_engine_resets)
{
    enum { RESET, FUNCTION_RESET, POSTED_RESET, DISCONNECT };
    static uint8_t ram[RAM_SIZE], got[RAM_SIZE], zero[RAM_SIZE];
    uint8_t model[4096];
    int events[4], intx = make_event();
    memory m = with_memory(NULL, MIB, WITH_FD);
    map(P, AT + MIB, MIB, READABLE | WRITEABLE, &m, 0, WITHOUT_FD);
    memset(m.at, 1, MIB);
    scramble(ram, RAM_SIZE, 61);
    initial_registers(model);
    for (unsigned i = 0; i < 4; i++)
        events[i] = make_event();
    for (unsigned round = 0; round < 2; round++) {
        assign(P, MSIX, events, 4);
        assign(P, INTX, &intx, 1);
        leave_traces(ram);
        SAME(signalled(events[2], PATIENCE), 2);
        if (_i == RESET) {
            SAME(call(P, DEVICE_RESET, NULL, 0), 0);
            SAME(P->reply.len, 0);
        } else if (_i == FUNCTION_RESET) {
            function_level_reset(P);
        } else if (_i == POSTED_RESET) {
            (void)post_with(P, DEVICE_RESET, NO_REPLY, NULL, 0, NULL, 0);
        } else {
            leave(P);
            join(P);
        }
        compare_registers(model);
        uint32_t cap = capability(P, CAP_MSIX);
        SAME(get(P, CONFIG, 4, 2), 0);
        SAME(get(P, CONFIG, cap + 2, 2), 3);
        read_region(P, BAR2, 0, got, RAM_SIZE);
        MUST(memcmp(got, _i == DISCONNECT ? ram : zero, RAM_SIZE) == 0);
        if (_i != DISCONNECT) {
            SAME(get(P, CONFIG, 0x10, 4), 0);
            SAME(get(P, CONFIG, 0x18, 4) & 0xfffffff0, 0);
            SAME(get(P, CONFIG, 0x1c, 4), 0);
            SAME(get(P, CONFIG, 0x20, 4), 0);
            read_region(P, BAR4, 0, got, 4096);
            for (uint32_t at = 12; at < 64; at += 16)
                got[at] &= 0xfe; /* PCI has the vectors masked after a reset */
            MUST(memcmp(got, zero, 4096) == 0);
            SAME(get(P, CONFIG, capability(P, CAP_EXPRESS) + 8, 2) & 0x8000, 0);
            SAME(run(P, SUM, 0, AT, MIB), 0);
            SAME(run(P, SUM, 0, AT + MIB, MIB), 0);
            SAME(reg(P, RESULT), MIB);
            enable_msix(P, true);
        } else {
            refuse(P, SUM, 0, AT, 1, ENOENT, AT);
            refuse(P, SUM, 0, AT + MIB, 1, ENOENT, AT + MIB);
            SAME(ask_table(NULL, 0), 0);
            enable_msix(P, true);
        }
        set(P, NOTIFY, 4);
        (void)run(P, SUM, 0, AT, 8);
        sync_up(P);
        SAME(signalled(events[3], 0), _i != DISCONNECT);
        enable_msix(P, false);
        run_blindly(AT, AT + 64);
        SAME(signalled(intx, 0), _i != DISCONNECT);
        (void)reg(P, STATUS);
        if (_i == DISCONNECT) {
            P->window_count = 0;
            map(P, AT, MIB, READABLE | WRITEABLE, &m, 0, WITH_FD);
        } else {
            SAME(set_irqs(P, DATA_NONE | ACTION_UNMASK, INTX, 0, 1, NULL, 0), 0);
        }
    }
    for (unsigned i = 0; i < 4; i++)
        close(events[i]);
    close(intx);
    end(&m);
}
END_TEST

enum { RESETS = 4 };

/* "stop the work": while it goes on and on, in memory that is mapped; nothing moves after the reply. */
START_TEST(test_engine_resets_while_repeating)
{
    memory m = with_memory(NULL, 16 * MIB, WITH_FD);
    for (unsigned i = 0; i < 6; i++) {
        memset(m.at, 1, 8 * MIB);
        set(P, REPEAT, UINT32_MAX);
        operands(P, AT + 8 * MIB, AT, 8 * MIB);
        set(P, COMMAND, COPY);
        while (reg(P, COMPLETED) == 0)
            SAME(reg(P, STATUS), BUSY);
        if (i % 3 == 0)
            SAME(call(P, DEVICE_RESET, NULL, 0), 0);
        else if (i % 3 == 1)
            function_level_reset(P);
        else {
            leave(P);
            join(P);
            map(P, AT, m.size, READABLE | WRITEABLE, &m, 0, WITH_FD);
        }
        memset(m.at, 2, 8 * MIB);
        memset(m.at + 8 * MIB, 3, 8 * MIB);
        for (unsigned j = 0; j < 50; j++) {
            SAME(reg(P, STATUS), IDLE);
            SAME(reg(P, COMPLETED), 0);
        }
        MUST(all_are(m.at + 8 * MIB, 8 * MIB, 3));
        set(P, REPEAT, 0);
        SAME(run(P, SUM, 0, AT, MIB), 0);
        SAME(reg(P, RESULT), 2 * MIB);
        SAME(call(P, DEVICE_RESET, NULL, 0), 0);
    }
    end(&m);
}
END_TEST

/* ---- the greeting ---------------------------------------------------------------------------------------------------------- */

/* "A client that has not finished the VERSION exchange after ten seconds is dropped." This waits, so it runs in a process of
 * its own beside the other tests and writes into a pipe what was wrong, or "ok". */
static int greeting_verdict = -1;
static pid_t greeting_process;

enum { GREETINGS = 5, GREETING_MS = 10000, TOLERANCE = 12000 };

static void say(int fd, const char *text)
{
    (void)!write(fd, text, strlen(text) + 1);
    _exit(0);
}

/* The bytes of a VERSION request. */
static size_t version_message(uint8_t *bytes)
{
    header h = {.id = 1, .cmd = VERSION, .size = sizeof(h) + 4 + sizeof(usual_capabilities)};
    memcpy(bytes, &h, sizeof(h));
    memset(bytes + sizeof(h), 0, 4);
    memcpy(bytes + sizeof(h) + 4, usual_capabilities, sizeof(usual_capabilities));
    return h.size;
}

static void watch_greetings(int verdict)
{
    enum { SILENT, SLOW, FINISHED, CONNECTED, SECOND };
    static program engines[GREETINGS];
    int fds[GREETINGS], ends[2];
    int64_t began[GREETINGS], dropped[GREETINGS] = {0};
    uint8_t version[300], buf[4096];
    size_t len = version_message(version);
    char option[120];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    for (unsigned i = 0; i <= CONNECTED; i++) {
        name_files(&engines[i]);
        snprintf(option, sizeof(option), "--socket-path=%s", engines[i].path);
        if (i == CONNECTED && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0)
            snprintf(option, sizeof(option), "--fd=%d", ends[1]);
        began[i] = now_ms();
        spawn(&engines[i], (const char *const[]){option, NULL}, i == CONNECTED ? ends[1] : -1, 0);
        fds[i] = i == CONNECTED ? ends[0] : dial_when_ready(&engines[i]);
        if (fds[i] < 0)
            say(verdict, "no engine");
    }
    close(ends[1]);
    (void)!send(fds[FINISHED], version, len, 0);
    fds[SECOND] = dial(engines[SILENT].path); /* waits, or is refused */
    if (fds[SECOND] >= 0)
        (void)!send(fds[SECOND], version, len, MSG_NOSIGNAL);
    /* Until all that has to be dropped was dropped. The slow one sends a byte now and then, which buys it no time. */
    int64_t next_byte = now_ms();
    size_t sent = 0;
    while (!dropped[SILENT] || !dropped[SLOW] || !dropped[CONNECTED]) {
        struct pollfd wait[CONNECTED + 1];
        for (unsigned i = 0; i <= CONNECTED; i++)
            wait[i] = (struct pollfd){.fd = dropped[i] ? -1 : fds[i], .events = POLLIN};
        poll(wait, CONNECTED + 1, 50);
        int64_t now = now_ms();
        for (unsigned i = 0; i <= CONNECTED; i++)
            if (wait[i].revents && recv(fds[i], buf, sizeof(buf), MSG_DONTWAIT) <= 0)
                dropped[i] = now - began[i];
        if (now >= next_byte && !dropped[SLOW]) {
            next_byte = now + 400;
            (void)!send(fds[SLOW], version + sent++, 1, MSG_NOSIGNAL);
        }
        if (now - began[CONNECTED] > GREETING_MS + TOLERANCE)
            say(verdict, !dropped[SILENT] ? "a silent client is not dropped"
                         : !dropped[SLOW] ? "a client that sends its VERSION too slowly is not dropped"
                                          : "a silent client on a connected socket is not dropped");
    }
    if (dropped[FINISHED])
        say(verdict, "a client that has finished its VERSION was dropped");
    if (dropped[SILENT] < GREETING_MS - 50 || dropped[SLOW] < GREETING_MS - 50 || dropped[CONNECTED] < GREETING_MS - 50)
        say(verdict, "a client was dropped before ten seconds were over");
    /* The second is served now; one that was refused may come again. */
    struct pollfd wait = {.fd = fds[SECOND], .events = POLLIN};
    if (fds[SECOND] < 0 || poll(&wait, 1, PATIENCE) <= 0 || recv(fds[SECOND], buf, sizeof(buf), 0) < (ssize_t)sizeof(header)) {
        wait.fd = dial_when_ready(&engines[SILENT]);
        (void)!send(wait.fd, version, len, MSG_NOSIGNAL);
        if (poll(&wait, 1, PATIENCE) <= 0 || recv(wait.fd, buf, sizeof(buf), 0) < (ssize_t)sizeof(header))
            say(verdict, "after a silent client was dropped, the next is not served");
    }
    header h = {.id = 2, .cmd = GET_INFO, .size = sizeof(h) + sizeof(info)};
    info request = {.argsz = sizeof(request)};
    memcpy(buf, &h, sizeof(h));
    memcpy(buf + sizeof(h), &request, sizeof(request));
    (void)!send(fds[FINISHED], buf, h.size, MSG_NOSIGNAL);
    wait.fd = fds[FINISHED];
    if (poll(&wait, 1, PATIENCE) <= 0 || recv(wait.fd, buf, sizeof(buf), 0) != (ssize_t)h.size)
        say(verdict, "a client that was silent after its VERSION is not served any more");
    if (wait_end(&engines[CONNECTED]) < 0)
        say(verdict, "an engine on a connected socket doesn't end when the client is dropped");
    for (unsigned i = 0; i < CONNECTED; i++) {
        kill(engines[i].pid, SIGTERM);
        if (wait_end(&engines[i]) != 0 || is_there(engines[i].path))
            say(verdict, "an engine doesn't end as it should");
    }
    say(verdict, "ok");
}

START_TEST(test_engine_greeting)
{
    char text[200] = "the process that watched has ended";
    struct pollfd wait = {.fd = greeting_verdict, .events = POLLIN};
    if (poll(&wait, 1, GREETING_MS + TOLERANCE + 2 * PATIENCE) > 0)
        (void)!read(greeting_verdict, text, sizeof(text) - 1);
    ck_assert_str_eq(text, "ok");
}
END_TEST

/* ---- the suite ------------------------------------------------------------------------------------------------------------- */

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *where)
{
    (void)st;
    (void)type;
    (void)where;
    return remove(path);
}

static TCase *add_case(Suite *suite, const char *name)
{
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 60 + PATIENCE / 1000);
    suite_add_tcase(suite, tcase);
    return tcase;
}

int main(void)
{
    Suite *suite = suite_create("engine");
    snprintf(scratch, sizeof(scratch), "/tmp/vfu_engine.XXXXXX");
    if (!mkdtemp(scratch)) {
        perror(scratch);
        return 1;
    }
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0) {
        perror("pipe");
        return 1;
    }
    fflush(stdout);
    greeting_process = fork();
    if (greeting_process == 0)
        watch_greetings(ends[1]);
    close(ends[1]);
    greeting_verdict = ends[0];

    TCase *t = add_case(suite, "command line");
    tcase_add_loop_test(t, test_engine_wrong_arguments, 0, COUNT(usage_errors));
    tcase_add_test(t, test_engine_helps);
    tcase_add_test(t, test_engine_unusable_arguments);
    tcase_add_test(t, test_engine_stale_socket);
    tcase_add_test(t, test_engine_live_socket);
    tcase_add_test(t, test_engine_rivals);
    tcase_add_test(t, test_engine_live_socket_of_others);
    tcase_add_test(t, test_engine_listening_descriptor);
    tcase_add_test(t, test_engine_connected_descriptor);
    tcase_add_test(t, test_engine_tcp_descriptor);
    tcase_add_loop_test(t, test_engine_end_by_signal, 0, END_BY_SIGNAL);
    tcase_add_test(t, test_engine_end_by_early_signal);
    tcase_add_test(t, test_engine_verbose);
    tcase_add_test(t, test_engine_table);
    tcase_add_test(t, test_engine_table_storm);

    t = add_case(suite, "clients");
    tcase_add_test(t, test_engine_client_leaves);
    tcase_add_test(t, test_engine_client_dies_anywhere);
    tcase_add_test(t, test_engine_client_breaks_the_stream);
    tcase_add_test(t, test_engine_second_client);
    tcase_add_test(t, test_engine_pieces);
    tcase_add_test(t, test_engine_odd_descriptors);
    tcase_add_test(t, test_engine_full_event);
    tcase_add_test(t, test_engine_sleeps);
    tcase_add_loop_test(t, test_engine_any_message, 0, ANY_MESSAGE);

    t = add_case(suite, "identity");
    tcase_add_test(t, test_engine_identity);
    tcase_add_test(t, test_engine_capabilities);
    tcase_add_test(t, test_engine_device_info);
    tcase_add_test(t, test_engine_regions);
    tcase_add_test(t, test_engine_device_ram);
    tcase_add_test(t, test_engine_bar_kinds);
    tcase_add_test(t, test_engine_msix_table);

    t = add_case(suite, "windows");
    tcase_add_loop_test(t, test_engine_many_windows, 0, 2);
    tcase_add_test(t, test_engine_many_files);
    tcase_add_test(t, test_engine_unmaps);

    t = add_case(suite, "registers");
    tcase_add_test(t, test_engine_register_accesses);
    tcase_add_test(t, test_engine_command_accesses);
    tcase_add_test(t, test_engine_reply_before_work);
    tcase_add_test(t, test_engine_busy);

    t = add_case(suite, "commands");
    tcase_add_loop_test(t, test_engine_random_commands, 0, WAYS);
    tcase_add_loop_test(t, test_engine_overlaps, 0, WAYS);
    tcase_add_loop_test(t, test_engine_lengths, 0, 2);
    tcase_add_loop_test(t, test_engine_invalid_commands, 0, 2);
    tcase_add_loop_test(t, test_engine_repetitions, 0, 2);
    tcase_add_loop_test(t, test_engine_refusals, 0, WAYS);
    tcase_add_test(t, test_engine_unmap_while_repeating);

    t = add_case(suite, "memory that goes away");
    tcase_add_test(t, test_engine_shrunken_file);
    tcase_add_test(t, test_engine_short_file);
    tcase_add_test(t, test_engine_shrinks_while_repeating);

    t = add_case(suite, "messages");
    tcase_add_test(t, test_engine_message_limits);
    tcase_add_test(t, test_engine_refused_versions);
    tcase_add_test(t, test_engine_broken_replies);
    tcase_add_test(t, test_engine_write_replies);
    tcase_add_test(t, test_engine_shifted_replies);
    tcase_add_test(t, test_engine_wrong_id);
    tcase_add_test(t, test_engine_impossible_replies);
    tcase_add_loop_test(t, test_engine_unmap_during_message, 0, UNMAP_DURING_MESSAGE);
    tcase_add_test(t, test_engine_unmap_others_during_message);
    tcase_add_test(t, test_engine_reset_during_message);
    tcase_add_test(t, test_engine_disconnect_during_message);

    t = add_case(suite, "interrupts");
    tcase_add_test(t, test_engine_msix);
    tcase_add_test(t, test_engine_msix_masks);
    tcase_add_test(t, test_engine_msix_absent);
    tcase_add_test(t, test_engine_intx_level);
    tcase_add_test(t, test_engine_intx_disable);
    tcase_add_test(t, test_engine_intx_mask);

    t = add_case(suite, "resets");
    tcase_add_loop_test(t, test_engine_resets, 0, RESETS);
    tcase_add_test(t, test_engine_resets_while_repeating);

    t = add_case(suite, "greeting"); /* last: it has had the time of all others */
    tcase_add_test(t, test_engine_greeting);

    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    kill(greeting_process, SIGKILL);
    waitpid(greeting_process, NULL, 0);
    nftw(scratch, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return failed ? 1 : 0;
}
