/* SPDX-License-Identifier: MIT */
/*
 * ==== PCI ==== as lspci sees it
 *
 * Configuration spaces against golden files, tests/golden/lspci_*.txt, which are what `lspci -n -vvv -xxxx -F` prints for
 * them: their
 * bytes always, and what lspci makes of them where it is installed. Other versions of lspci word things in other ways: then it is
 * checked that it finds nothing wrong.
 *
 * VFU_UPDATE_GOLDEN=1 writes the files anew.
 */
#include "caller.h"

enum { CONFIG_MAX = 4096, TEXT_MAX = 65536 };

typedef struct space {
    uint8_t bytes[CONFIG_MAX];
    uint32_t size;
} space;

/* ---- the spaces -------------------------------------------------------------------------------------------------------- */

static void take(space *s, const vfu_pci *pci, uint32_t size)
{
    s->size = size;
    vfu_pci_read(pci, 0, s->bytes, size);
}

/* Of the running example. */
static void make_engine(space *s)
{
    child engine;
    struct sockaddr_un address;
    socklen_t len;
    vfu_client *client;
    start_engine(&engine, &address, &len);
    ck_assert_int_eq(vfu_client_attach(&client, connect_to(&address, len), NULL), 0);
    s->size = CONFIG_MAX;
    ck_assert_int_eq(vfu_client_region_read(client, VFU_PCI_REGION_CONFIG, 0, s->bytes, CONFIG_MAX), 0);
    vfu_client_destroy(client);
    stop_engine(&engine);
}

static const vfu_pci_vendor_cap vendor_caps[] = {{.data = "first", .len = 5}, {.data = "the second one", .len = 14}};
static const vfu_pci_vendor_cap extended_caps[] = {{.data = "extended", .len = 8, .id = 0x1af4, .version = 2},
                                                   {.data = "x", .len = 1, .id = 0x0001, .version = 15}};

static const vfu_pci_desc everything = {
    .vendor = 0x1234,
    .device = 0xd3a2,
    .subsystem_vendor = 0x1af4,
    .subsystem = 0x1100,
    .class_code = 0x088001,
    .revision = 0xa5,
    .interrupt_pin = 2,
    .bar = {{.size = 1 << 20, .kind = VFU_BAR_MEM64, .prefetchable = true},
            {0},
            {.size = 65536},
            {.size = 256, .kind = VFU_BAR_IO},
            {.size = UINT64_C(1) << 33, .kind = VFU_BAR_MEM64, .prefetchable = true}},
    .rom_size = 65536,
    .pm = true,
    .express = true,
    .flr = true,
    .msix = {.vectors = 2048, .table_bar = 0, .pba_bar = 2, .table_offset = 0x8000, .pba_offset = 0x1000},
    .msi = {.vectors = 32, .mask = true},
    .vendor_caps = vendor_caps,
    .vendor_cap_count = 2,
    .serial_number = 0x0123456789abcdef,
    .aer = true,
    .extended_vendor_caps = extended_caps,
    .extended_vendor_cap_count = 2,
};

static void make_everything(space *s)
{
    vfu_pci pci;
    ck_assert_int_eq(vfu_pci_build(&pci, &everything), 0);
    take(s, &pci, CONFIG_MAX);
}

static void write_word(vfu_pci *pci, uint32_t at, uint32_t value)
{
    uint8_t bytes[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};
    vfu_pci_write(pci, at, bytes, 4);
}

/* The same after firmware and a driver have written to all that they write to. (In a dump lspci 3.9 takes the upper half of a
 * 64-bit BAR for a region of its own, which is "unassigned".) */
static void make_used(space *s)
{
    vfu_pci pci;
    ck_assert_int_eq(vfu_pci_build(&pci, &everything), 0);
    uint32_t pm = vfu_pci_capability(&pci, 0x01), msi = vfu_pci_capability(&pci, 0x05), msix = vfu_pci_capability(&pci, 0x11);
    uint32_t express = vfu_pci_capability(&pci, 0x10), aer = vfu_pci_extended_capability(&pci, 0x0001);
    write_word(&pci, 0x10, 0x00200000); /* BARs */
    write_word(&pci, 0x14, 0x00000080);
    write_word(&pci, 0x18, 0xfe010000);
    write_word(&pci, 0x1c, 0x0000c100);
    write_word(&pci, 0x20, 0x00000000);
    write_word(&pci, 0x24, 0x00000088);
    write_word(&pci, 0x30, 0xfe020001); /* ROM, enabled */
    write_word(&pci, 0x04, 0x00000547); /* command */
    write_word(&pci, 0x0c, 0x00000010); /* cache line */
    write_word(&pci, 0x3c, 0x0000000b); /* interrupt line */
    write_word(&pci, pm + 4, 0x00000003);
    write_word(&pci, msi + 4, 0xfee00000);
    write_word(&pci, msi + 8, 0x00000001);
    write_word(&pci, msi + 12, 0x00004021);
    write_word(&pci, msi + 16, 0xffff0000);
    write_word(&pci, msi, 0x00510000); /* enabled, 32 vectors */
    write_word(&pci, msix, 0xc0000000);
    write_word(&pci, express + 8, 0x00005037);
    write_word(&pci, express + 16, 0x00000043);
    write_word(&pci, express + 40, 0x00000010);
    write_word(&pci, aer + 8, 0x00100000);
    write_word(&pci, aer + 12, 0x00400010);
    write_word(&pci, aer + 20, 0x0000c000);
    vfu_pci_set_intx_status(&pci, true);
    take(s, &pci, CONFIG_MAX);
}

static void make_minimal(space *s)
{
    static const vfu_pci_desc desc = {.vendor = 0x1234, .device = 0x0001, .class_code = 0xff0000, .bar = {{.size = 4096}}};
    vfu_pci pci;
    ck_assert_int_eq(vfu_pci_build(&pci, &desc), 0);
    take(s, &pci, 256);
}

static const struct {
    const char *name;
    void (*make)(space *s);
} spaces[] = {{"engine", make_engine}, {"everything", make_everything}, {"used", make_used}, {"minimal", make_minimal}};

/* ---- text -------------------------------------------------------------------------------------------------------------- */

static char golden_text[TEXT_MAX], printed[TEXT_MAX], hex[TEXT_MAX];

/* A file beside this one. */
static const char *golden_path(const char *name)
{
    static char path[512];
    const char *slash = strrchr(__FILE__, '/');
    snprintf(path, sizeof(path), "%.*s/golden/lspci_%s.txt", slash ? (int)(slash - __FILE__) : 1, slash ? __FILE__ : ".", name);
    return path;
}

/* Reads all of it as a string; false: it isn't there. */
static bool read_text(FILE *file, char *out)
{
    if (!file)
        return false;
    size_t len = fread(out, 1, TEXT_MAX - 1, file);
    out[len] = 0;
    ck_assert_uint_lt(len, TEXT_MAX - 1);
    return true;
}

static void read_golden(const char *name)
{
    FILE *file = fopen(golden_path(name), "re");
    ck_assert_msg(read_text(file, golden_text), "%s: can't be read", golden_path(name));
    fclose(file);
}

/* The lines of the bytes, as lspci prints and reads them. */
static void print_hex(const space *s)
{
    size_t len = 0;
    for (uint32_t at = 0; at < s->size; at += 16) {
        len += (size_t)snprintf(hex + len, TEXT_MAX - len, "%02x:", at);
        for (uint32_t i = 0; i < 16; i++)
            len += (size_t)snprintf(hex + len, TEXT_MAX - len, " %02x", s->bytes[at + i]);
        len += (size_t)snprintf(hex + len, TEXT_MAX - len, "\n");
    }
}

/* The first line in which two texts differ. */
static void check_same(const char *got, const char *want, const char *name)
{
    for (unsigned line = 1; *got || *want; line++) {
        size_t got_len = strcspn(got, "\n"), want_len = strcspn(want, "\n");
        if (got_len != want_len || memcmp(got, want, got_len) != 0)
            ck_abort_msg("%s, line %u: \"%.*s\", not \"%.*s\"", name, line, (int)got_len, got, (int)want_len, want);
        got += got_len + (got[got_len] != 0);
        want += want_len + (want[want_len] != 0);
    }
}

/* The part of a golden text with the bytes. */
static const char *hex_of(const char *text)
{
    const char *at = strstr(text, "\n00: ");
    ck_assert_ptr_nonnull(at);
    return at + 1;
}

/* ---- lspci ------------------------------------------------------------------------------------------------------------- */

/* Its first line of output, "lspci version 3.9.0"; empty: there is no lspci. */
static const char *lspci_version(void)
{
    static char line[128];
    FILE *pipe = popen("LC_ALL=C lspci --version 2>/dev/null", "re");
    if (!pipe || !fgets(line, sizeof(line), pipe))
        line[0] = 0;
    if (pipe)
        pclose(pipe);
    line[strcspn(line, "\n")] = 0;
    return line;
}

/* What it prints for the bytes in `hex`, behind a line with its version. */
static void run_lspci(void)
{
    char path[] = "/tmp/vfu_lspci_XXXXXX", shell[128];
    int fd = mkstemp(path);
    must(fd);
    FILE *dump = fdopen(fd, "w");
    ck_assert_ptr_nonnull(dump);
    fprintf(dump, "00:05.0 Device\n%s\n", hex);
    ck_assert_int_eq(fclose(dump), 0);
    snprintf(shell, sizeof(shell), "LC_ALL=C lspci -n -vvv -xxxx -F %s 2>/dev/null", path);
    int used = snprintf(printed, TEXT_MAX, "%s\n", lspci_version());
    FILE *pipe = popen(shell, "re");
    ck_assert_ptr_nonnull(pipe);
    size_t len = fread(printed + used, 1, TEXT_MAX - 1 - (size_t)used, pipe);
    printed[(size_t)used + len] = 0;
    ck_assert_int_eq(pclose(pipe), 0);
    unlink(path);
}

static bool is_updating(void)
{
    const char *update = getenv("VFU_UPDATE_GOLDEN");
    return update && *update;
}

START_TEST(bytes)
{
    space s;
    spaces[_i].make(&s);
    print_hex(&s);
    if (is_updating()) {
        run_lspci();
        FILE *file = fopen(golden_path(spaces[_i].name), "we");
        ck_assert_ptr_nonnull(file);
        fputs(printed, file);
        fclose(file);
    }
    read_golden(spaces[_i].name);
    strcat(hex, "\n"); /* lspci ends with an empty line */
    check_same(hex, hex_of(golden_text), spaces[_i].name);
}
END_TEST

START_TEST(decoded)
{
    static const char *const bad[] = {"Unknown", "unknown", "!!!",        "access denied", "invalid",
                                      "Invalid", "broken",  "chain loop", "No virtual"};
    space s;
    spaces[_i].make(&s);
    print_hex(&s);
    run_lspci();
    read_golden(spaces[_i].name);
    size_t version = strlen(lspci_version());
    if (strncmp(golden_text, printed, version + 1) == 0)
        check_same(printed, golden_text, spaces[_i].name);
    check_same(hex_of(printed), hex_of(golden_text), spaces[_i].name);
    for (unsigned i = 0; i < COUNT(bad); i++)
        ck_assert_msg(!strstr(printed, bad[i]), "%s: lspci says \"%s\"", spaces[_i].name, bad[i]);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("PCI: as lspci sees it");
    TCase *tests = tcase_create("lspci");
    tcase_add_loop_test(tests, bytes, 0, (int)COUNT(spaces));
    if (*lspci_version())
        tcase_add_loop_test(tests, decoded, 0, (int)COUNT(spaces));
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
