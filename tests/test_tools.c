/* SPDX-License-Identifier: MIT */
/*
 * ==== the tools: vfu_lspci, vfu_peek, vfu_trace ====
 *
 * Each as somebody uses it who has only the program: started with arguments against the engine, or against a device that this
 * file plays, and judged by status, output, and what goes over its sockets. The machinery is that of the engine's tests; the
 * tools are looked for beside the engine.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <ftw.h>

static peer one;

#define P (&one)

/* ---- running a tool ----------------------------------------------------------------------------------------------------- */

static const char *tool_file(const char *name)
{
    static char file[4200];
    const char *path = engine_file(), *slash = strrchr(path, '/');
    snprintf(file, sizeof(file), "%.*s%s", slash ? (int)(slash - path) + 1 : 0, path, name);
    return file;
}

/* Starts `name` with a line of arguments, which blanks part; input, if there is any, is its standard input. */
static void start_tool(program *g, const char *name, const char *arguments, const char *input)
{
    char line[1000], *argv[60] = {(char *)(uintptr_t)name}, *rest = line;
    char in[120];
    snprintf(line, sizeof(line), "%s", arguments);
    name_files(g);
    snprintf(in, sizeof(in), "%s.in", g->path);
    FILE *file = fopen(in, "we");
    MUST(file && fputs(input ? input : "", file) >= 0 && fclose(file) == 0);
    for (unsigned i = 1; i < 59 && (argv[i] = strtok_r(rest, " ", &rest)); i++) {
    }
    g->pid = fork();
    if (g->pid)
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = open(in, O_RDONLY);
    if (fd < 0 || dup2(fd, 0) < 0)
        _exit(126);
    redirect(1, g->out);
    redirect(2, g->err);
    execv(tool_file(name), argv);
    _exit(127);
}

/* What the last tool that ran to its end has printed. */
static char out_text[16 * MIB], err_text[16 * KIB];

static void keep_text(const char *path, char *text, size_t room)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t len = fd < 0 ? 0 : read(fd, text, room - 1);
    if (fd >= 0)
        close(fd);
    text[len > 0 ? len : 0] = 0;
}

static int end_tool(program *g)
{
    int status = wait_end(g);
    keep_text(g->out, out_text, sizeof(out_text));
    keep_text(g->err, err_text, sizeof(err_text));
    return status;
}

static int run_tool(const char *name, const char *arguments, const char *input)
{
    program g;
    start_tool(&g, name, arguments, input);
    return end_tool(&g);
}

/* The same with --socket-path=PATH in front of the other arguments. */
static int run_at(const char *name, const char *path, const char *arguments, const char *input)
{
    char line[900];
    snprintf(line, sizeof(line), "--socket-path=%s %s", path, arguments);
    return run_tool(name, line, input);
}

/* Ends the test with a text of any length. */
#define WRONG(...) ck_abort_msg(__VA_ARGS__)

/* Waits until somebody listens there: the socket file alone is there a little earlier. */
static void await_listener(program *g, const char *path)
{
    int64_t until = now_ms() + PATIENCE;
    for (bool found = false; !found; nap()) {
        char line[300];
        unsigned flags;
        FILE *sockets = fopen("/proc/net/unix", "re");
        MUST(sockets);
        while (fgets(line, sizeof(line), sockets))
            found = found || (strstr(line, path) && sscanf(line, "%*s %*s %*s %x", &flags) == 1 && flags & 0x10000);
        fclose(sockets);
        if (!found && (now_ms() > until || !is_running(g)))
            WRONG("nobody listens at %s: %s", path, text_of(g->err, 0));
    }
}

static void start_engine(const char *option)
{
    start(option);
    await_listener(&engine, engine.path);
}

#define SHOWS(text, part)                                                                                                      \
    do {                                                                                                                       \
        if (!strstr(text, part))                                                                                               \
            WRONG("\"%s\" isn't in %s: %.3000s", part, #text, text);                                                           \
        else                                                                                                                   \
            mark_point();                                                                                                      \
    } while (0)

#define ENDS(call, status)                                                                                                     \
    do {                                                                                                                       \
        int status_ = (call);                                                                                                  \
        if (status_ != (status))                                                                                               \
            WRONG("status %d, not %d, of %s: %.1500s%.1500s", status_, status, #call, err_text, out_text);                     \
        else                                                                                                                   \
            mark_point();                                                                                                      \
    } while (0)

static unsigned lines_of(const char *text)
{
    unsigned lines = 0;
    for (; *text; text++)
        lines += *text == '\n';
    return lines;
}

/* ---- all three ---------------------------------------------------------------------------------------------------------- */

/* "--help that fits on a screen with an example": 80 columns; vfu_peek has many commands. */
START_TEST(test_tools_help)
{
    static const char *const names[] = {"vfu_lspci", "vfu_peek", "vfu_trace"};
    const char *name = names[_i];
    ENDS(run_tool(name, "--help", NULL), 0);
    SHOWS(out_text, "usage: ");
    SHOWS(out_text, "example");
    SAME(strlen(err_text), 0);
    MUST(lines_of(out_text) <= 24);
    for (const char *line = out_text; *line; line += strcspn(line, "\n") + 1)
        if (strcspn(line, "\n") > 80)
            WRONG("a line of %s --help is too long: %.120s", name, line);
}
END_TEST

START_TEST(test_tools_wrong_arguments)
{
    static const char *const cases[][2] = {
        {"vfu_lspci", ""},
        {"vfu_lspci", "--bogus"},
        {"vfu_lspci", "--socket-path=/nonexistent/a operand"},
        {"vfu_lspci", "--socket-path"},
        {"vfu_peek", ""},
        {"vfu_peek", "read bar0 0 4"},
        {"vfu_peek", "--socket-path=/nonexistent/a --bogus"},
        {"vfu_trace", ""},
        {"vfu_trace", "--socket-path=/nonexistent/a"},
        {"vfu_trace", "--to=/nonexistent/a"},
        {"vfu_trace", "--socket-path=/nonexistent/a --to=/nonexistent/b operand"},
        {"vfu_trace", "--socket-path=/nonexistent/a --to=/nonexistent/b --filter=dma_map,bogus"},
        {"vfu_trace", "--socket-path=/nonexistent/a --to=/nonexistent/b --filter="},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        ENDS(run_tool(cases[i][0], cases[i][1], NULL), 2);
        SHOWS(err_text, "usage: ");
        SAME(strlen(out_text), 0);
    }
}
END_TEST

START_TEST(test_tools_nobody_there)
{
    static const char *const cases[][2] = {
        {"vfu_lspci", "--socket-path=/nonexistent/a"},
        {"vfu_peek", "--socket-path=/nonexistent/a reset"},
        {"vfu_trace", "--socket-path=/nonexistent/a --to=/nonexistent/b"},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        ENDS(run_tool(cases[i][0], cases[i][1], NULL), 1);
        SHOWS(err_text, "/nonexistent/a: ENOENT");
        SAME(strlen(out_text), 0);
    }
}
END_TEST

/* ---- a trace in between --------------------------------------------------------------------------------------------------- */

static program trace;

static void start_trace(const char *to, const char *options)
{
    char line[400], where[100];
    name_files(&trace);
    snprintf(where, sizeof(where), "%s", trace.path);
    snprintf(line, sizeof(line), "--socket-path=%s --to=%s %s", where, to, options);
    start_tool(&trace, "vfu_trace", line, NULL);
    snprintf(trace.path, sizeof(trace.path), "%s", where);
    await_listener(&trace, where);
}

/* SIGTERM ends it with status 0, and its socket file is removed. */
static void stop_trace(void)
{
    char where[100];
    snprintf(where, sizeof(where), "%s", trace.path);
    kill(trace.pid, SIGTERM);
    ENDS(end_tool(&trace), 0);
    MUST(!is_there(where));
}

/* ---- vfu_lspci ---------------------------------------------------------------------------------------------------------- */

/* What it says behind the configuration space, for the engine. */
static void check_engine_facts(void)
{
    static const char *const facts[] = {
        "Device: reset PCI\nRegions: 9\n",
        "\t0 BAR0: 4 KiB, memory (32-bit, non-prefetchable), read write\n",
        "\t2 BAR2: 64 KiB, memory (64-bit, non-prefetchable), read write mmap\n\t\tmappable: [0x1000, 0x10000), in the file at ",
        "\t4 BAR4: 4 KiB, memory (32-bit, non-prefetchable), read write\n",
        "\t7 CONFIG: 4 KiB, read write\nInterrupts: 5\n",
        "\t0 INTx: 1, eventfd maskable automasked\n\t2 MSI-X: 4, eventfd\n\t3 ERR: 1, eventfd\n\t4 REQ: 1, eventfd\n",
        "\tmax_msg_fds: 16\n\tmax_data_xfer_size: ",
        "\tmax_dma_maps: 65535\n\tpgsizes: 0x1000",
        "\twrite_multiple: ",
        "\ttwin_socket: no\n",
    };
    for (unsigned i = 0; i < COUNT(facts); i++)
        SHOWS(out_text, facts[i]);
}

START_TEST(test_tools_lspci_plain)
{
    static const char *const facts[] = {
        "00:00.0 Class 0880: Device 1234:d3a1 (rev 01) (prog-if 00)\n\tSubsystem: 1234:0001\n\tControl: I/O- Mem- BusMaster- ",
        "\tStatus: Cap+ ",
        "\tInterrupt: pin A routed to IRQ 0\n",
        "\tRegion 0: Memory at 00000000 (32-bit, non-prefetchable) [size=4 KiB]\n",
        "\tRegion 2: Memory at 00000000 (64-bit, non-prefetchable) [size=64 KiB]\n",
        "\tRegion 4: Memory at 00000000 (32-bit, non-prefetchable) [size=4 KiB]\n",
        "] Power Management version 3\n\t\tStatus: D0 ",
        "] MSI-X: Enable- Count=4 Masked-\n\t\tVector table: BAR=4 offset=00000000\n\t\tPBA: BAR=4 offset=00000800\n",
        "] Express (v2) Endpoint\n\t\tDevCap: FLReset+\n",
        "] Vendor Specific Information: Len=",
    };
    start_engine(NULL);
    ENDS(run_at("vfu_lspci", engine.path, "--plain", NULL), 0);
    SAME(strlen(err_text), 0);
    for (unsigned i = 0; i < COUNT(facts); i++)
        SHOWS(out_text, facts[i]);
    MUST(!strstr(out_text, "\n00: "));
    check_engine_facts();
    ENDS(run_at("vfu_lspci", engine.path, "--plain -x", NULL), 0);
    SHOWS(out_text, "\n00: 34 12 a1 d3 00 00 ");
    SHOWS(out_text, "\nff0: 00 00 ");
    stop();
}
END_TEST

/* It shows the device as it is now: addresses and bits that a client has written. */
START_TEST(test_tools_lspci_current)
{
    start_engine(NULL);
    join(P);
    put(P, CONFIG, 0x10, 4, 0xfe001000);
    put(P, CONFIG, 0x18, 4, 0xc0010000);
    put(P, CONFIG, 0x1c, 4, 0x12);
    leave(P);
    ENDS(run_at("vfu_lspci", engine.path, "--plain", NULL), 0);
    SHOWS(out_text, "\tRegion 0: Memory at fe001000 (32-bit");
    SHOWS(out_text, "\tRegion 2: Memory at 12c0010000 (64-bit");
    stop();
}
END_TEST

/* With lspci or without, whichever this machine has. */
START_TEST(test_tools_lspci)
{
    start_engine(NULL);
    ENDS(run_at("vfu_lspci", engine.path, "", NULL), 0);
    SAME(strlen(err_text), 0);
    SHOWS(out_text, "1234:d3a1");
    SHOWS(out_text, "Count=4 Masked-");
    SHOWS(out_text, "FLReset+");
    check_engine_facts();
    setenv("PATH", "/nonexistent", 1);
    ENDS(run_at("vfu_lspci", engine.path, "", NULL), 0);
    SHOWS(out_text, "00:00.0 Class 0880: Device 1234:d3a1");
    stop();
}
END_TEST

/* ---- vfu_peek ----------------------------------------------------------------------------------------------------------- */

typedef struct peek_case {
    const char *arguments;
    int status;
    const char *out; /* all of it */
    const char *err; /* a part of it; NULL: there is nothing */
} peek_case;

#define FILL_AT_1M "write bar0 0x10 8 1m, write bar0 0x18 8 16, write bar0 0x20 8 0x1122334455667788, write bar0 0x30 4 2"

static const peek_case peek_cases[] = {
    {"read bar0 0 4", 0, "0x31414d44\n", NULL},
    {"read 0 0 4, read bar0 4 4, read config 0 2, read config 8 1", 0, "0x31414d44\n0x00000001\n0x1234\n0x01\n", NULL},
    {"read config 0 18", 0,
     "00000000  34 12 a1 d3 00 00 10 00 01 00 80 08 00 00 00 00  |4...............|\n"
     "00000010  00 00                                            |..|\n",
     NULL},
    {", , read bar0 0 4 , ,", 0, "0x31414d44\n", NULL},
    {"write bar0 0x08 8 0xfedcba9876543210, read bar0 0x08 8", 0, "0xfedcba9876543210\n", NULL},
    {"write bar2 2k 2 0xbeef, read bar2 2k 4, write bar2 0x1000 1 7, read bar2 4k 1", 0, "0x0000beef\n0x07\n", NULL},
    {"write bar2 0 4 5, reset, read bar2 0 4", 0, "0x00000000\n", NULL},
    {"direct bar2, write bar2 0x1000 4 0x12345678, read bar2 0x1002 2, write bar2 0xffe 4 0x01020304, read bar2 0xfff 2", 0,
     "0x1234\n0x0203\n", NULL},
    {"direct bar0, read bar0 0 4, direct 12", 1, "0x31414d44\n", "direct: EINVAL"},
    {"map 1m 4k, " FILL_AT_1M ", expect bar0 0x34 4 2 5000, mem 1m 8, mem 0x10000e 4", 0,
     "0x1122334455667788\n0x00001122\n", NULL},
    {"map 1m 4k nofd, " FILL_AT_1M ", expect bar0 0x34 4 2 5000, mem 1m 8", 0, "0x1122334455667788\n", NULL},
    {"map 1m 4k ro, " FILL_AT_1M ", expect bar0 0x34 4 3 5000, read bar0 0x38 4, mem 1m 8", 0,
     "0x0000000d\n0x0000000000000000\n", NULL},
    {"map 1m 4k, fill 1m 16 0xab, poke 1m 2 0x1234, mem 1m 16", 0,
     "00100000  34 12 ab ab ab ab ab ab ab ab ab ab ab ab ab ab  |4...............|\n", NULL},
    {"map 1m 4k, unmap 1m 4k, " FILL_AT_1M ", expect bar0 0x34 4 3 5000, read bar0 0x38 4", 0, "0x00000002\n", NULL},
    {"irq intx 0 1, write bar0 0x2c 4 1, map 1m 4k, " FILL_AT_1M ", wait intx 0 5000, unmask intx 0 1", 0, "1\n", NULL},
    {"map 1m 4k nofd, write bar0 0x2c 4 1, irq intx 0 1, " FILL_AT_1M ", wait intx 0 5000, mem 1m 4", 0, "1\n0x55667788\n", NULL},
    {"irq msix 0 4, irq msix 0 0, irq err 0 1, mask intx 0 1", 0, "", NULL},
    {"sleep 1", 0, "", NULL},
    /* commands that fail: what was read before is printed, what stands behind isn't done */
    {"read bar0 0 4, read bar0 0x1000 4, read bar0 4 4", 1, "0x31414d44\n", "read: EINVAL"},
    {"read 77 0 4", 1, "", "read: EINVAL"},
    {"read bar0 0 0", 1, "", "read: EINVAL"},
    {"expect bar0 0 4 1", 1, "", "it is 0x31414d44, not 0x1"},
    {"expect bar0 0 4 1 20", 1, "", "expect: ETIMEDOUT"},
    {"irq msix 0 4, wait msix 2 20", 1, "", "wait: ETIMEDOUT"},
    {"wait msix 2 20", 1, "", "wait: ENOENT"},
    {"irq msix 0 5", 1, "", "irq: EINVAL"},
    {"mem 0 4", 1, "", "mem: ENOENT"},
    {"map 0 4k, mem 4095 2", 1, "", "mem: ENOENT"},
    {"map 0 4k, map 0 4k", 1, "", "map: EEXIST"},
    {"map 0 100", 1, "", "map: EINVAL"},
    {"map 0 8k, unmap 0 4k", 1, "", "unmap: EINVAL"},
    {"map 0 4k file=/nonexistent/a", 1, "", "map: ENOENT"},
    /* arguments that are wrong: nothing is done */
    {"read bar0 0 4, frobnicate", 2, "", "no such command: frobnicate"},
    {"read bar0 0 4, read bar0 0", 2, "", "read: too little; it is read REGION OFFSET LEN"},
    {"read bar0 0 4 4", 2, "", "read: too much: 4"},
    {"read bar6 0 4", 2, "", "read: not understood: bar6"},
    {"read bar0 -1 4", 2, "", "read: not understood: -1"},
    {"read bar0 0x 4", 2, "", "read: not understood: 0x"},
    {"read 0x100000000 0 4", 2, "", "read: not understood"},
    {"read bar0 18446744073709551616 4", 2, "", "read: not understood"},
    {"read bar0 18446744073709551615k 4", 2, "", "read: not understood"},
    {"write bar0 0 3 1", 2, "", "write: not understood: 3"},
    {"write bar0 0 1 256", 2, "", "write: not understood: 256"},
    {"map 0 4k rx", 2, "", "map: not understood: rx"},
};

START_TEST(test_tools_peek)
{
    start_engine(NULL);
    for (unsigned i = 0; i < COUNT(peek_cases); i++) {
        const peek_case *c = &peek_cases[i];
        ENDS(run_at("vfu_peek", engine.path, c->arguments, NULL), c->status);
        if (strcmp(out_text, c->out) != 0)
            WRONG("%s prints %s", c->arguments, out_text);
        if (c->err)
            SHOWS(err_text, c->err);
        else if (*err_text)
            WRONG("%s complains: %s", c->arguments, err_text);
    }
    stop();
}
END_TEST

/* What lies in the mapped part of a region is no message any more. */
START_TEST(test_tools_peek_direct)
{
    unsigned messages[2];
    char *at;
    start_engine(NULL);
    for (unsigned direct = 0; direct < 2; direct++) {
        start_trace(engine.path, "--summary");
        ENDS(run_at("vfu_peek", trace.path, direct ? "direct bar2, write bar2 0x1000 4 7, read bar2 0x1000 4, read bar2 8k 64"
                                                   : "write bar2 0x1000 4 7, read bar2 0x1000 4, read bar2 8k 64", NULL), 0);
        SHOWS(out_text, "0x00000007\n");
        stop_trace();
        SHOWS(out_text, "VERSION");
        messages[direct] = (at = strstr(out_text, "REGION_READ ")) != NULL ? (unsigned)strtoul(at + 12, NULL, 10) : 0;
    }
    SAME(messages[0], 2);
    SAME(messages[1], 0);
    stop();
}
END_TEST

/* "or from standard input line by line" */
START_TEST(test_tools_peek_input)
{
    start_engine(NULL);
    ENDS(run_at("vfu_peek", engine.path, "",
                "# a comment\n\nmap 1m 4k\n  " FILL_AT_1M "\nexpect bar0 0x34 4 2 5000 # done\n"
                "mem 1m 1, mem 1m 2\nread bar0 0 4"),
         0);
    ck_assert_str_eq(out_text, "0x88\n0x7788\n0x31414d44\n");
    ENDS(run_at("vfu_peek", engine.path, "", "read bar0 0 4\nread bar0 0x1000 4\nread bar0 0 4\n"), 1);
    ck_assert_str_eq(out_text, "0x31414d44\n");
    ENDS(run_at("vfu_peek", engine.path, "", "read bar0 0 4\nbogus\nread bar0 0 4\n"), 2);
    ck_assert_str_eq(out_text, "0x31414d44\n");
    stop();
}
END_TEST

/* Memory that is a file: the device's writes are in it afterwards, and not when it was given read-only. */
START_TEST(test_tools_peek_file)
{
    char path[100], line[400];
    uint8_t bytes[PAGE] = {0};
    snprintf(path, sizeof(path), "%s/memory", scratch);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    MUST(fd >= 0 && write(fd, bytes, PAGE) == PAGE);
    start_engine(NULL);
    snprintf(line, sizeof(line), "map 1m 4k file=%s, " FILL_AT_1M ", expect bar0 0x34 4 2 5000", path);
    ENDS(run_at("vfu_peek", engine.path, line, NULL), 0);
    MUST(pread(fd, bytes, 8, 8) == 8 && bytes[0] == 0x88 && bytes[7] == 0x11);
    snprintf(line, sizeof(line), "map 1m 4k ro file=%s, mem 1m 4, fill 1m 1 1", path);
    ENDS(run_at("vfu_peek", engine.path, line, NULL), 1);
    SHOWS(err_text, "fill: EACCES");
    ck_assert_str_eq(out_text, "0x55667788\n");
    snprintf(line, sizeof(line), "map 1m 8k file=%s", path);
    ENDS(run_at("vfu_peek", engine.path, line, NULL), 1);
    SHOWS(err_text, "map: ENXIO"); /* larger than the file */
    close(fd);
    stop();
}
END_TEST

/* ---- vfu_trace ---------------------------------------------------------------------------------------------------------- */

/* Waits until the trace has printed this. */
static void await_line(const char *part)
{
    int64_t until = now_ms() + PATIENCE;
    for (;;) {
        keep_text(trace.out, out_text, sizeof(out_text));
        if (strstr(out_text, part))
            return;
        if (now_ms() > until || !is_running(&trace))
            WRONG("the trace doesn't print \"%s\" but: %.3000s", part, out_text);
        nap();
    }
}

/* "a client session through vfu_trace gives the same results as without" */
START_TEST(test_tools_trace_client)
{
    static const char *const lines[] = {
        " client -> 0x0000 VERSION 0.0 {",
        " device <- 0x0000 VERSION 0.0 {",
        " DEVICE_GET_REGION_INFO BAR2 size 0x10000 read|write|mmap|caps offset 0x0 argsz 64 sparse 1 [0x1000 + 0xf000] fds 1 (",
        " DMA_MAP iova 0x100000 size 0x40000 rw offset 0x0 fds 1\n",
        " DMA_UNMAP error EINVAL (",
        " DEVICE_SET_IRQS MSIX start 0 count 4 eventfd|trigger fds 4\n",
        " DEVICE_RESET (",
        "\nsession 1: ",
        "\nclient DMA_UNMAP                        3       1 ",
        "\nmappings alive at the end: 4, 593920 bytes; mapped 5 times, unmapped 1\n  0x100000 size 0x40000 rw\n",
        "  0x140000 size 0x40000 rw\n  0x800000 size 0x10000 r\n  0xfffffffffffff000 size 0x1000 rw\n",
    };
    static char direct[sizeof(out_text)];
    start_engine(_i ? "--no-mmap" : NULL);
    ENDS(run_at("dma_client", engine.path, "", NULL), 0);
    snprintf(direct, sizeof(direct), "%s", out_text);
    start_trace(engine.path, "");
    ENDS(run_at("dma_client", trace.path, "", NULL), 0);
    ck_assert_str_eq(out_text, direct);
    await_line("mappings alive at the end");
    stop_trace();
    for (unsigned i = 0; i < COUNT(lines); i++)
        SHOWS(out_text, lines[i]);
    if (_i)
        SHOWS(out_text, " device -> 0x");
    MUST(!strchr(out_text, '\033'));
    MUST(!strstr(out_text, "nobody asked") && !strstr(out_text, "malformed") && !strstr(out_text, "never answered"));
    stop();
}
END_TEST

/* Clients come one after the other, and leave in the middle. */
START_TEST(test_tools_trace_sessions)
{
    start_engine(NULL);
    start_trace(engine.path, "");
    for (unsigned i = 0; i < 5; i++) {
        int fd = dial(trace.path);
        fresh(P, fd);
        SAME(await(P, greet(P, usual_capabilities), VERSION), 0);
        SAME(reg(P, MAGIC), 0x31414d44);
        if (i % 2)
            MUST(send_bytes(fd, "half a header", 7, NULL, 0));
        leave(P);
    }
    await_line("session 5: 0.");
    int fd = dial(trace.path); /* the device leaves */
    fresh(P, fd);
    SAME(await(P, greet(P, usual_capabilities), VERSION), 0);
    stop();
    MUST(!next_reply(P, &P->reply));
    leave(P);
    await_line("session 6: 0.");
    fd = dial(trace.path); /* nobody is there */
    fresh(P, fd);
    char byte;
    SAME(recv(fd, &byte, 1, 0), 0);
    leave(P);
    stop_trace();
    SHOWS(err_text, ": ENOENT"); /* the engine has removed its socket */
}
END_TEST

START_TEST(test_tools_trace_filter)
{
    start_engine(NULL);
    start_trace(engine.path, "--filter=dma_map,GET_INFO,device_reset");
    ENDS(run_at("dma_client", trace.path, "", NULL), 0);
    await_line("mappings alive at the end");
    SHOWS(out_text, "-> 0x0001 DEVICE_GET_INFO");
    SHOWS(out_text, " DMA_MAP iova");
    SHOWS(out_text, " DEVICE_RESET");
    MUST(!strstr(out_text, " REGION_READ BAR0"));
    SHOWS(out_text, "client REGION_READ "); /* the summary has them all */
    stop_trace();
    start_trace(engine.path, "--summary");
    ENDS(run_at("dma_client", trace.path, "", NULL), 0);
    await_line("mappings alive at the end");
    MUST(!strstr(out_text, "->"));
    SHOWS(out_text, "client REGION_READ ");
    stop_trace();
    stop();
}
END_TEST

/* ---- vfu_trace: JSON ---------------------------------------------------------------------------------------------------- */

static const char *json_value(const char *s);

static const char *json_string(const char *s)
{
    if (*s++ != '"')
        return NULL;
    for (; *s != '"'; s++) {
        if ((unsigned char)*s < ' ')
            return NULL;
        if (*s == '\\' && !*++s)
            return NULL;
    }
    return s + 1;
}

/* Objects and arrays. */
static const char *json_list(const char *s, char close, bool names)
{
    if (*s == close)
        return s + 1;
    for (;;) {
        if (names && (!(s = json_string(s)) || *s++ != ':'))
            return NULL;
        if (!(s = json_value(s)))
            return NULL;
        if (*s == close)
            return s + 1;
        if (*s++ != ',')
            return NULL;
    }
}

/* Behind the value that begins at s, which has no blanks; NULL: it is none. */
static const char *json_value(const char *s)
{
    char *end;
    if (*s == '{' || *s == '[')
        return json_list(s + 1, *s == '{' ? '}' : ']', *s == '{');
    if (*s == '"')
        return json_string(s);
    if (!strncmp(s, "true", 4))
        return s + 4;
    if (!strncmp(s, "false", 5))
        return s + 5;
    strtod(s, &end);
    return end == s ? NULL : end;
}

START_TEST(test_tools_trace_json)
{
    static const char *const parts[] = {
        "\"from\":\"client\",\"kind\":\"command\",\"id\":0,\"cmd\":\"VERSION\",",
        "\"version_data\":\"{\\u0022capabilities\\u0022:",
        "\"cmd\":\"DMA_MAP\",\"bytes\":48,\"fds\":1,\"flags\":3,\"offset\":\"0x0\",\"address\":\"0x100000\",",
        "\"cmd\":\"REGION_READ\",\"bytes\":36,\"fds\":0,\"us\":",
        "\"region\":0,\"offset\":\"0x0\",\"count\":4,\"data\":\"444d4131\",\"data_len\":4}\n",
        "\"areas\":[[\"0x1000\",\"0xf000\"]]",
        "\"from\":\"device\",\"kind\":\"command\"",
        "\"error\":\"EINVAL\",\"errno\":22",
        "\"event\":\"summary\",\"session\":1,\"messages\":",
        "\"event\":\"command\",\"from\":\"client\",\"cmd\":\"DMA_UNMAP\",\"commands\":3,\"replies\":3,\"errors\":1,",
        "\"event\":\"mapping\",\"address\":\"0xfffffffffffff000\",\"size\":\"0x1000\",\"flags\":3,\"fd\":true}\n",
    };
    start_engine("--no-mmap");
    start_trace(engine.path, "--json");
    ENDS(run_at("dma_client", trace.path, "", NULL), 0);
    await_line("\"0xfffffffffffff000\",\"size\":\"0x1000\",\"flags\":3,\"fd\":true}\n");
    stop_trace();
    for (unsigned i = 0; i < COUNT(parts); i++)
        SHOWS(out_text, parts[i]);
    unsigned lines = 0;
    for (const char *line = out_text, *end; *line; line = end + 1, lines++) {
        end = json_value(line);
        if (*line != '{' || !end || *end != '\n')
            WRONG("no JSON: %.300s", line);
    }
    MUST(lines > 200);
    stop();
}
END_TEST

/* ---- vfu_trace: a device that this test plays --------------------------------------------------------------------------- */

/* Both ends of a traced connection. */
typedef struct wire {
    int listener, client, device;
} wire;

static wire lay_wire(const char *options)
{
    char path[100];
    wire w;
    snprintf(path, sizeof(path), "%s/%d-device.sock", scratch, (int)getpid());
    unlink(path);
    w.listener = listen_at(path);
    MUST(w.listener >= 0);
    start_trace(path, options);
    w.client = dial(trace.path);
    MUST(w.client >= 0);
    MUST(is_readable(w.listener, PATIENCE));
    w.device = accept4(w.listener, NULL, NULL, SOCK_CLOEXEC);
    MUST(w.device >= 0);
    engine.pid = trace.pid; /* whom the helpers watch while they wait */
    return w;
}

static void cut_wire(wire *w)
{
    close(w->client);
    close(w->device);
    close(w->listener);
    engine.pid = 0;
    stop_trace();
}

/* A descriptor that can be told from others: a file of that size. */
static int numbered_fd(unsigned number)
{
    int fd = (int)syscall(SYS_memfd_create, "vfu_test", 1u);
    MUST(fd >= 0 && ftruncate(fd, (off_t)number) == 0);
    return fd;
}

static unsigned number_of(int fd)
{
    struct stat st;
    MUST(fstat(fd, &st) == 0);
    return (unsigned)st.st_size;
}

/* One recvmsg() of at most len bytes, which must come; 0: the end. */
static size_t receive_once(int fd, void *buf, size_t len, frame *f)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(FDS_MAX * sizeof(int))];
    } control;
    struct iovec part = {.iov_base = buf, .iov_len = len};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room};
    message.msg_controllen = sizeof(control.room);
    MUST(is_readable(fd, PATIENCE));
    ssize_t got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    MUST(got >= 0 && !(message.msg_flags & MSG_CTRUNC));
    for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
        unsigned count = (unsigned)((head->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        MUST(f->fd_count + count <= FDS_MAX);
        memcpy(f->fds + f->fd_count, CMSG_DATA(head), count * sizeof(int));
        f->fd_count += count;
    }
    return (size_t)got;
}

enum { FUZZ_MESSAGES = 1500, FUZZ_MAX = 300 * KIB };

/* Message i of a stream: its size, and how many descriptors go with it, the first numbered 16 * i. */
static uint32_t fuzz_size(uint64_t seed, unsigned i)
{
    uint64_t x = seed * 1000003 + i * UINT64_C(0x9e3779b97f4a7c15) + 1;
    random64(&x);
    uint64_t kind = random64(&x) % 100;
    return (uint32_t)(16 + (kind < 80 ? random64(&x) % 100 : kind < 98 ? random64(&x) % 5000 : random64(&x) % (FUZZ_MAX - 16)));
}

static unsigned fuzz_fds(uint64_t seed, unsigned i)
{
    uint64_t x = seed * 7919 + i * UINT64_C(0x9e3779b97f4a7c15) + 1;
    random64(&x);
    return random64(&x) % 4 ? 0 : (unsigned)(random64(&x) % (FDS_MAX + 1));
}

static void fuzz_bytes(uint64_t seed, unsigned i, uint8_t *bytes)
{
    uint32_t size = fuzz_size(seed, i);
    scramble(bytes, size, seed * 31 + i);
    header h = {.id = (uint16_t)i, .cmd = (uint16_t)(bytes[2] % 20), .size = size, .flags = bytes[8] & 0x31, .error = bytes[12]};
    memcpy(bytes, &h, sizeof(h));
}

/* Sends the whole stream: mostly a message at once, some in pieces, some with the header in pieces. */
static void fuzz_send(int fd, uint64_t seed)
{
    static uint8_t bytes[FUZZ_MAX];
    uint64_t x = seed + 77;
    for (unsigned i = 0; i < FUZZ_MESSAGES; i++) {
        int fds[FDS_MAX];
        unsigned n = fuzz_fds(seed, i);
        uint32_t size = fuzz_size(seed, i);
        fuzz_bytes(seed, i, bytes);
        for (unsigned k = 0; k < n; k++)
            fds[k] = numbered_fd(16 * i + k);
        uint32_t first = random64(&x) % 8 ? size : 1 + (uint32_t)(random64(&x) % (random64(&x) % 2 ? 16 : size));
        if (!send_bytes(fd, bytes, first, fds, n) || (first < size && !send_bytes(fd, bytes + first, size - first, NULL, 0)))
            _exit(3);
        for (unsigned k = 0; k < n; k++)
            close(fds[k]);
    }
}

/* Receives it as QEMU does: 16 bytes of header in one recvmsg(), which has the descriptors, then the rest. */
static void fuzz_receive(int fd, uint64_t seed)
{
    static uint8_t got[FUZZ_MAX], expected[FUZZ_MAX];
    for (unsigned i = 0; i < FUZZ_MESSAGES; i++) {
        frame *f = &P->reply;
        uint32_t size = fuzz_size(seed, i);
        f->fd_count = 0;
        SAME(receive_once(fd, got, 16, f), 16);
        SAME(f->fd_count, fuzz_fds(seed, i));
        for (unsigned k = 0; k < f->fd_count; k++) {
            SAME(number_of(f->fds[k]), 16 * i + k);
            close(f->fds[k]);
        }
        f->fd_count = 0;
        MUST(size == 16 || receive_bytes(fd, got + 16, size - 16, f));
        SAME(f->fd_count, 0);
        fuzz_bytes(seed, i, expected);
        if (memcmp(got, expected, size) != 0)
            FAIL("message %u has changed", i);
    }
}

/* Bytes and descriptors arrive as they were sent, both ways at once, each message's descriptors with its header. */
START_TEST(test_tools_trace_passes_everything)
{
    wire w = lay_wire(_i % 2 ? "--json" : "");
    pid_t senders[2];
    for (unsigned i = 0; i < 2; i++) {
        senders[i] = fork();
        if (!senders[i]) {
            fuzz_send(i ? w.device : w.client, (uint64_t)(2 * _i) + i);
            _exit(0);
        }
    }
    pid_t receiver = fork();
    if (!receiver) {
        fuzz_receive(w.device, (uint64_t)(2 * _i));
        _exit(0);
    }
    fuzz_receive(w.client, (uint64_t)(2 * _i) + 1);
    pid_t all[3] = {senders[0], senders[1], receiver};
    for (unsigned i = 0; i < 3; i++) {
        int status = 0;
        MUST(waitpid(all[i], &status, 0) == all[i]);
        SAME(status, 0);
    }
    cut_wire(&w);
    MUST(!strstr(out_text, "not vfio-user"));
}
END_TEST

/* "It must survive garbage from either side (then passes bytes through unparsed, saying so)." */
START_TEST(test_tools_trace_garbage)
{
    static uint8_t garbage[3 * MIB], got[3 * MIB];
    static const header starts[] = {{1, 1, 15, 0, 0}, {1, 1, 0, 0, 0}, {1, 1, UINT32_MAX, 0, 0}, {1, 1, 16, 7, 0}};
    for (unsigned i = 0; i < 2 * COUNT(starts); i++) {
        wire w = lay_wire("");
        int from = i % 2 ? w.device : w.client, to = i % 2 ? w.client : w.device;
        header hello = {.id = 0x1234, .cmd = 13, .size = 16, .flags = i % 2 ? REPLY : 0};
        frame *f = &P->reply;
        f->fd_count = 0;
        MUST(send_message(from, hello, NULL, 0, NULL, 0) && receive(to, f) && f->h.id == 0x1234);
        scramble(garbage, sizeof(garbage), i + 1);
        memcpy(garbage, &starts[i / 2], 16);
        pid_t sender = fork();
        if (!sender)
            _exit(!send_bytes(from, garbage, sizeof(garbage), NULL, 0));
        MUST(receive_bytes(to, got, sizeof(got), f) && memcmp(got, garbage, sizeof(got)) == 0);
        waitpid(sender, NULL, 0);
        int fd = numbered_fd(99);
        MUST(send_bytes(from, "more", 4, &fd, 1) && receive_once(to, got, 4, f) == 4 && f->fd_count == 1);
        SAME(number_of(f->fds[0]), 99);
        close(f->fds[0]);
        close(fd);
        MUST(send_message(to, hello, NULL, 0, NULL, 0) && receive(from, f) && f->h.id == 0x1234); /* the other way goes on */
        cut_wire(&w);
        SHOWS(out_text, i % 2 ? "what the device sends is not vfio-user" : "what the client sends is not vfio-user");
        SHOWS(out_text, "0x1234 DEVICE_RESET");
    }
}
END_TEST

/* A message of the protocol's form whose content is nonsense is shown as such, and so is one that is larger than is looked at. */
START_TEST(test_tools_trace_malformed)
{
    static uint8_t body[3 * MIB / 2];
    frame *f = &P->reply;
    wire w = lay_wire("");
    MUST(send_message(w.client, (header){.id = 1, .cmd = REGION_READ}, body, 5, NULL, 0) && receive(w.device, f));
    MUST(send_message(w.client, (header){.id = 2, .cmd = 99}, body, 5, NULL, 0) && receive(w.device, f));
    MUST(send_message(w.device, (header){.id = 3, .cmd = DMA_MAP, .flags = REPLY}, NULL, 0, NULL, 0) && receive(w.client, f));
    pid_t sender = fork();
    if (!sender)
        _exit(!send_message(w.client, (header){.id = 4, .cmd = REGION_WRITE}, body, sizeof(body), NULL, 0));
    static uint8_t got[16 + sizeof(body)];
    MUST(receive_bytes(w.device, got, sizeof(got), f));
    waitpid(sender, NULL, 0);
    header refusal = {.id = 4, .cmd = REGION_WRITE, .flags = REPLY | ERROR, .error = E2BIG};
    MUST(send_message(w.device, refusal, NULL, 0, NULL, 0) && receive(w.client, f));
    cut_wire(&w);
    SHOWS(out_text, "client -> 0x0001 REGION_READ malformed: EINVAL, flags 0x0, 21 bytes\n");
    SHOWS(out_text, "client -> 0x0002 ? no such command: 99, 21 bytes [client waits: 0x0001 REGION_READ]\n");
    SHOWS(out_text, "device <- 0x0003 DMA_MAP (nobody asked)\n");
    SHOWS(out_text, "client -> 0x0004 REGION_WRITE 1572880 bytes, not looked at");
    SHOWS(out_text, "device <- 0x0004 REGION_WRITE error E2BIG (");
    SHOWS(out_text, "-- 0x0001 REGION_READ of the client was never answered\n");
}
END_TEST

/* "who waits for what": a device that asks while it is asked, and one that takes its time. */
START_TEST(test_tools_trace_waiting)
{
    frame *f = &P->reply;
    region_access access = {0x30, 0, 4};
    dma_access dma = {0x100000, 16};
    wire w = lay_wire("");
    MUST(send_message(w.client, (header){.id = 7, .cmd = REGION_READ}, &access, sizeof(access), NULL, 0) && receive(w.device, f));
    MUST(send_message(w.device, (header){.id = 9, .cmd = DMA_READ}, &dma, sizeof(dma), NULL, 0) && receive(w.client, f));
    await_line("device -> 0x0009 DMA_READ iova 0x100000 count 16 [client waits: 0x0007 REGION_READ]\n");
    await_line("-- client waits for the reply to 0x0007 REGION_READ for 1.");
    await_line("-- device waits for the reply to 0x0009 DMA_READ for 1.");
    cut_wire(&w);
    SHOWS(out_text, "-- 0x0007 REGION_READ of the client was never answered\n");
    SHOWS(out_text, "-- 0x0009 DMA_READ of the device was never answered\n");
}
END_TEST

/* A twin socket in the VERSION reply: what goes over it is passed on and printed. The reply comes in two pieces. */
START_TEST(test_tools_trace_twin)
{
    static const char text[] = "{\"capabilities\":{\"max_msg_fds\":8,\"twin_socket\":{\"supported\":true,\"fd_index\":1}}}";
    uint8_t message[16 + 4 + sizeof(text)] = {0};
    header h = {.id = 100, .cmd = VERSION, .size = sizeof(message), .flags = REPLY};
    dma_access dma = {0x5000, 32};
    frame *f = &P->reply;
    int pair[2], fds[2];
    wire w = lay_wire("");
    fresh(P, w.client);
    greet(P, "{\"capabilities\":{\"twin_socket\":{\"supported\":true}}}");
    MUST(receive(w.device, f));
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    fds[0] = numbered_fd(5);
    fds[1] = pair[1];
    memcpy(message, &h, sizeof(h));
    memcpy(message + 20, text, sizeof(text));
    MUST(send_bytes(w.device, message, 30, fds, 2));
    MUST(!is_readable(w.client, 50));
    MUST(send_bytes(w.device, message + 30, sizeof(message) - 30, NULL, 0));
    close(pair[1]);
    MUST(receive(w.client, f) && f->fd_count == 2 && f->len == sizeof(message) - 16);
    SAME(number_of(f->fds[0]), 5);
    int twin = f->fds[1];
    close(f->fds[0]);
    close(fds[0]);
    MUST(send_message(pair[0], (header){.id = 3, .cmd = DMA_READ}, &dma, sizeof(dma), NULL, 0));
    MUST(receive(twin, f) && f->h.id == 3 && f->h.cmd == DMA_READ && f->len == sizeof(dma));
    MUST(send_message(twin, (header){.id = 3, .cmd = DMA_READ, .flags = REPLY | ERROR, .error = EPERM}, NULL, 0, NULL, 0));
    MUST(receive(pair[0], f) && f->h.error == EPERM);
    await_line("client <- 0x0003 DMA_READ error EPERM twin (");
    close(twin); /* either end of the twin may go first */
    MUST(receive_once(pair[0], message, 1, f) == 0);
    close(pair[0]);
    MUST(send_message(w.client, (header){.id = 5, .cmd = DEVICE_RESET}, NULL, 0, NULL, 0) && receive(w.device, f));
    cut_wire(&w);
    SHOWS(out_text, "device -> 0x0003 DMA_READ iova 0x5000 count 32 twin\n");
}
END_TEST

/* Nobody reads what it prints: client and device go on. */
START_TEST(test_tools_trace_broken_pipe)
{
    int ends[2];
    char line[300];
    start_engine(NULL);
    MUST(pipe(ends) == 0);
    name_files(&trace);
    snprintf(line, sizeof(line), "--socket-path=%s", trace.path);
    trace.pid = fork();
    if (!trace.pid) {
        char to[120];
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        snprintf(to, sizeof(to), "--to=%s", engine.path);
        dup2(ends[1], 1);
        close(ends[0]);
        close(ends[1]);
        execl(tool_file("vfu_trace"), "vfu_trace", line, to, (char *)NULL);
        _exit(127);
    }
    close(ends[0]);
    close(ends[1]);
    await_listener(&trace, trace.path);
    for (unsigned i = 0; i < 3; i++)
        ENDS(run_at("dma_client", trace.path, "", NULL), 0);
    kill(trace.pid, SIGTERM);
    SAME(wait_end(&trace), 0);
    stop();
}
END_TEST

/* ---- what it costs ------------------------------------------------------------------------------------------------------ */

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000) + now.tv_nsec / 1000;
}

/* Microseconds per register read: the best of many rows of them, since other programs run on this machine, too. */
static double round_trip(const char *path)
{
    enum { ROWS = 100, TRIPS = 200 };
    int64_t best = INT64_MAX;
    int fd = dial(path);
    MUST(fd >= 0);
    fresh(P, fd);
    SAME(await(P, greet(P, usual_capabilities), VERSION), 0);
    for (unsigned row = 0; row < ROWS; row++) {
        int64_t began = now_us();
        for (unsigned i = 0; i < TRIPS; i++)
            SAME(reg(P, MAGIC), 0x31414d44);
        int64_t took = now_us() - began;
        best = took < best ? took : best;
    }
    leave(P);
    return (double)best / TRIPS;
}

/* "its overhead measured and printed (not asserted)" */
START_TEST(test_tools_trace_overhead)
{
    static const char *const ways[] = {"", "--summary", "--json", "--filter=dma_map"};
    start_engine(NULL);
    double direct = round_trip(engine.path);
    fprintf(stderr, "vfu_trace: a register read takes %.1f us without", direct);
    for (unsigned i = 0; i < COUNT(ways); i++) {
        start_trace(engine.path, ways[i]);
        double traced = round_trip(trace.path);
        fprintf(stderr, ", %.1f us with%s%s", traced, *ways[i] ? " " : "", ways[i]);
        stop_trace();
        MUST(traced > 0);
    }
    fprintf(stderr, "\n");
    stop();
}
END_TEST

/* ------------------------------------------------------------------------------------------------------------------------- */

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
    snprintf(scratch, sizeof(scratch), "/tmp/vfu_tools.XXXXXX");
    if (!mkdtemp(scratch)) {
        perror(scratch);
        return 1;
    }
    Suite *suite = suite_create("tools");
    TCase *t = add_case(suite, "all");
    tcase_add_loop_test(t, test_tools_help, 0, 3);
    tcase_add_test(t, test_tools_wrong_arguments);
    tcase_add_test(t, test_tools_nobody_there);

    t = add_case(suite, "lspci");
    tcase_add_test(t, test_tools_lspci_plain);
    tcase_add_test(t, test_tools_lspci_current);
    tcase_add_test(t, test_tools_lspci);

    t = add_case(suite, "peek");
    tcase_add_test(t, test_tools_peek);
    tcase_add_test(t, test_tools_peek_direct);
    tcase_add_test(t, test_tools_peek_input);
    tcase_add_test(t, test_tools_peek_file);

    t = add_case(suite, "trace");
    tcase_add_loop_test(t, test_tools_trace_client, 0, 2);
    tcase_add_test(t, test_tools_trace_sessions);
    tcase_add_test(t, test_tools_trace_filter);
    tcase_add_test(t, test_tools_trace_json);
    tcase_add_loop_test(t, test_tools_trace_passes_everything, 0, 4);
    tcase_add_test(t, test_tools_trace_garbage);
    tcase_add_test(t, test_tools_trace_malformed);
    tcase_add_test(t, test_tools_trace_waiting);
    tcase_add_test(t, test_tools_trace_twin);
    tcase_add_test(t, test_tools_trace_broken_pipe);
    tcase_add_test(t, test_tools_trace_overhead);

    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    nftw(scratch, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return failed ? 1 : 0;
}
