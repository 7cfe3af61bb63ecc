/* SPDX-License-Identifier: MIT */
/*
 * ==== capabilities ====
 *
 * The JSON of VERSION: a table of texts with what must come of them, each text also cut at every byte, then limits, the writer,
 * and random damage. Every text lies at the end of a heap block of exactly its size, so a sanitizer sees a read beyond it.
 */
#include "vfu.h"

#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Parses a copy of exactly len bytes */
static int parse(const char *text, size_t len, vfu_caps *out)
{
    char *copy = malloc(len != 0 ? len : 1);
    int rc;

    ck_assert_ptr_nonnull(copy);
    memcpy(copy, text, len);
    rc = vfu_caps_parse(copy, len, out);
    free(copy);
    return rc;
}

static bool same(const vfu_caps *a, const vfu_caps *b)
{
    return a->present == b->present && a->max_msg_fds == b->max_msg_fds && a->max_data_xfer_size == b->max_data_xfer_size &&
           a->max_dma_maps == b->max_dma_maps && a->write_multiple == b->write_multiple && a->twin_socket == b->twin_socket &&
           a->migration == b->migration && a->twin_fd_index == b->twin_fd_index && a->pgsizes == b->pgsizes &&
           a->migration_pgsize == b->migration_pgsize;
}

static bool is_default(const vfu_caps *caps)
{
    vfu_caps defaults;

    vfu_caps_defaults(&defaults);
    return same(caps, &defaults);
}

/* Texts that parse, and what the writer makes of them */
static const struct {
    const char *text;
    const char *written;
} good[] = {
    /* in the form of real peers: QEMU twice, Cloud Hypervisor, libvfio-user's sample client, a twin socket */
    {"{\"capabilities\": {\"migration\": {\"max_bitmap_size\": 268435456, \"pgsize\": 4096}, \"max_msg_fds\": 8, "
     "\"write_multiple\": true, \"max_data_xfer_size\": 1048576, \"pgsizes\": 4096, \"max_dma_maps\": 65535}}",
     "{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576,\"max_dma_maps\":65535,\"pgsizes\":4096,"
     "\"write_multiple\":true,\"migration\":{\"pgsize\":4096}}}"},
    {"{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576,\"pgsizes\":4096,\"max_dma_maps\":65535,"
     "\"write_multiple\":true}}",
     "{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576,\"max_dma_maps\":65535,\"pgsizes\":4096,"
     "\"write_multiple\":true}}"},
    {"{\"capabilities\":{\"max_msg_fds\":1,\"max_data_xfer_size\":1048576,\"migration\":{\"pgsize\":4096}}}",
     "{\"capabilities\":{\"max_msg_fds\":1,\"max_data_xfer_size\":1048576,\"migration\":{\"pgsize\":4096}}}"},
    {"{\"capabilities\":{\"max_msg_fds\":32,\"max_data_xfer_size\":1024}}",
     "{\"capabilities\":{\"max_msg_fds\":32,\"max_data_xfer_size\":1024}}"},
    {"{ \"capabilities\": { \"max_msg_fds\": 8, \"twin_socket\": { \"supported\": true, \"fd_index\": 0 } } }\n",
     "{\"capabilities\":{\"max_msg_fds\":8,\"twin_socket\":{\"supported\":true,\"fd_index\":0}}}"},
    /* nothing, or nothing that we know */
    {"{}", "{\"capabilities\":{}}"},
    {" \t\r\n{ \t\r\n} \t\r\n", "{\"capabilities\":{}}"},
    {"{\"capabilities\":{}}", "{\"capabilities\":{}}"},
    {"{\"capabilities\":{\"x\":1,\"y\":[1,-2.5e+7,\"z\",null,true,false,{},[],{\"pgsizes\":[]}],\"w\":{\"pgsize\":1}}}",
     "{\"capabilities\":{}}"},
    {"{\"max_msg_fds\":\"not here\",\"pgsizes\":{},\"supported\":3}", "{\"capabilities\":{}}"},
    {"{\"capabilities\":{\"fd_index\":-1,\"supported\":[],\"pgsize\":\"\"}}", "{\"capabilities\":{}}"},
    {"{\"x\":{\"capabilities\":{\"max_msg_fds\":9}}}", "{\"capabilities\":{}}"},
    {"{\"Capabilities\":{\"max_msg_fds\":9},\"capabilitie\":0,\"capabilitiess\":0}", "{\"capabilities\":{}}"},
    {"{\"capabilities\":{\"max_msg_fd\":1e9,\"max_msg_fdss\":1e9,\"\":0}}", "{\"capabilities\":{}}"},
    /* numbers: the edges of each field, and every form that JSON has where it doesn't matter */
    {"{\"capabilities\":{\"max_msg_fds\":0,\"max_data_xfer_size\":0,\"max_dma_maps\":0,\"pgsizes\":0}}",
     "{\"capabilities\":{\"max_msg_fds\":0,\"max_data_xfer_size\":0,\"max_dma_maps\":0,\"pgsizes\":0}}"},
    {"{\"capabilities\":{\"max_msg_fds\":4294967295,\"max_dma_maps\":4294967295}}",
     "{\"capabilities\":{\"max_msg_fds\":4294967295,\"max_dma_maps\":4294967295}}"},
    {"{\"capabilities\":{\"max_data_xfer_size\":18446744073709551615,\"pgsizes\":18446744073709551615}}",
     "{\"capabilities\":{\"max_data_xfer_size\":18446744073709551615,\"pgsizes\":18446744073709551615}}"},
    {"{\"capabilities\":{\"twin_socket\":{\"fd_index\":2147483647},\"migration\":{\"pgsize\":18446744073709551615}}}",
     "{\"capabilities\":{\"twin_socket\":{\"supported\":false,\"fd_index\":2147483647},"
     "\"migration\":{\"pgsize\":18446744073709551615}}}"},
    {"{\"a\":0,\"b\":-0,\"c\":1.5,\"d\":1e5,\"e\":1E-5,\"f\":-1.25e+30,\"g\":99999999999999999999999999,\"h\":0.0}",
     "{\"capabilities\":{}}"},
    /* objects */
    {"{\"capabilities\":{\"twin_socket\":{}}}", "{\"capabilities\":{\"twin_socket\":{\"supported\":false}}}"},
    {"{\"capabilities\":{\"twin_socket\":{\"supported\":false}}}", "{\"capabilities\":{\"twin_socket\":{\"supported\":false}}}"},
    {"{\"capabilities\":{\"twin_socket\":{\"fd_index\":3,\"supported\":true,\"x\":{}}}}",
     "{\"capabilities\":{\"twin_socket\":{\"supported\":true,\"fd_index\":3}}}"},
    {"{\"capabilities\":{\"migration\":{}}}", "{\"capabilities\":{\"migration\":{\"pgsize\":4096}}}"},
    {"{\"capabilities\":{\"migration\":{\"pgsize\":65536}}}", "{\"capabilities\":{\"migration\":{\"pgsize\":65536}}}"},
    {"{\"capabilities\":{\"write_multiple\":false}}", "{\"capabilities\":{\"write_multiple\":false}}"},
    /* a name that occurs twice: the last one counts, as a whole */
    {"{\"capabilities\":{\"max_msg_fds\":1,\"max_msg_fds\":2}}", "{\"capabilities\":{\"max_msg_fds\":2}}"},
    {"{\"capabilities\":{\"max_msg_fds\":1},\"capabilities\":{\"pgsizes\":8192}}", "{\"capabilities\":{\"pgsizes\":8192}}"},
    {"{\"capabilities\":{\"twin_socket\":{\"supported\":true,\"fd_index\":1},\"twin_socket\":{}}}",
     "{\"capabilities\":{\"twin_socket\":{\"supported\":false}}}"},
    {"{\"capabilities\":{\"migration\":{\"pgsize\":1},\"migration\":{}}}",
     "{\"capabilities\":{\"migration\":{\"pgsize\":4096}}}"},
    /* strings: escapes in names count, in any spelling; UTF-8 of every length */
    {"{\"\\u0063apabilities\":{\"max\\u005Fmsg\\u005ffds\":5}}", "{\"capabilities\":{\"max_msg_fds\":5}}"},
    {"{\"\\\"\\\\\\/\\b\\f\\n\\r\\t\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"}", "{\"capabilities\":{}}"},
    {"{\"\\ud83d\\ude00\":\"\\u0000\\uFFFF\\uD7FF\\uE000\\uDBFF\\uDFFF\"}", "{\"capabilities\":{}}"},
    {"{\"\xc2\x80\":\"\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbf\xf0\x90\x80\x80\xf4\x8f\xbf\xbf\x7f\"}",
     "{\"capabilities\":{}}"},
    {"{\"capabilities\xc3\xa9\":1,\"capabilities\\u0000\":1,\"capabilities\\u00e9\":1}", "{\"capabilities\":{}}"},
};

/* Texts that don't parse, and why not */
static const struct {
    int rc;
    const char *text;
} bad[] = {
    /* not JSON */
    {-EBADMSG, " "},
    {-EBADMSG, "x"},
    {-EBADMSG, "{"},
    {-EBADMSG, "}"},
    {-EBADMSG, "{}}"},
    {-EBADMSG, "{} {}"},
    {-EBADMSG, "{},"},
    {-EBADMSG, "{}x"},
    {-EBADMSG, "{]"},
    {-EBADMSG, "{\"a\":[}"},
    {-EBADMSG, "{\"a\":[1}"},
    {-EBADMSG, "{\"a\":[1]]"},
    {-EBADMSG, "{,}"},
    {-EBADMSG, "{\"a\":1,}"},
    {-EBADMSG, "{\"a\":[1,]}"},
    {-EBADMSG, "{\"a\":[,1]}"},
    {-EBADMSG, "{\"a\":[1 2]}"},
    {-EBADMSG, "{\"a\" 1}"},
    {-EBADMSG, "{\"a\":}"},
    {-EBADMSG, "{\"a\"}"},
    {-EBADMSG, "{a:1}"},
    {-EBADMSG, "{'a':1}"},
    {-EBADMSG, "{1:1}"},
    {-EBADMSG, "{\"a\":1 \"b\":2}"},
    {-EBADMSG, "{\"a\"::1}"},
    {-EBADMSG, "{\"a\":1/**/}"},
    {-EBADMSG, "\xef\xbb\xbf{}"}, /* byte order mark */
    {-EBADMSG, "{\"capabilities\":{\"max_msg_fds\":\"8\"}"}, /* malformed beats mistyped */
    /* numbers and words */
    {-EBADMSG, "{\"a\":01}"},
    {-EBADMSG, "{\"a\":-}"},
    {-EBADMSG, "{\"a\":+1}"},
    {-EBADMSG, "{\"a\":.5}"},
    {-EBADMSG, "{\"a\":5.}"},
    {-EBADMSG, "{\"a\":1e}"},
    {-EBADMSG, "{\"a\":1e+}"},
    {-EBADMSG, "{\"a\":0x10}"},
    {-EBADMSG, "{\"a\":1_000}"},
    {-EBADMSG, "{\"a\":NaN}"},
    {-EBADMSG, "{\"a\":Infinity}"},
    {-EBADMSG, "{\"a\":True}"},
    {-EBADMSG, "{\"a\":tru}"},
    {-EBADMSG, "{\"a\":falsee}"},
    {-EBADMSG, "{\"a\":nul}"},
    {-EBADMSG, "{\"capabilities\":{\"write_multiple\":truE}}"},
    /* strings */
    {-EBADMSG, "{\"a:1}"},
    {-EBADMSG, "{\"a\n\":1}"},
    {-EBADMSG, "{\"a\x1f\":1}"},
    {-EBADMSG, "{\"\\x41\":1}"},
    {-EBADMSG, "{\"\\'\":1}"},
    {-EBADMSG, "{\"\\u12\":1}"},
    {-EBADMSG, "{\"\\u12g4\":1}"},
    {-EBADMSG, "{\"\\U1234\":1}"},
    {-EBADMSG, "{\"\\ud800\":1}"},
    {-EBADMSG, "{\"\\ud800x\":1}"},
    {-EBADMSG, "{\"\\ud800\\n\":1}"},
    {-EBADMSG, "{\"\\ud800\\u0041\":1}"},
    {-EBADMSG, "{\"\\ud800\\ud800\":1}"},
    {-EBADMSG, "{\"\\udc00\":1}"},
    /* UTF-8: stray, cut, overlong, surrogate, too large */
    {-EBADMSG, "{\"\x80\":1}"},
    {-EBADMSG, "{\"\xbf\":1}"},
    {-EBADMSG, "{\"\xc3\":1}"},
    {-EBADMSG, "{\"\xc3(\":1}"},
    {-EBADMSG, "{\"\xe2\x82\":1}"},
    {-EBADMSG, "{\"\xf0\x9f\x98\":1}"},
    {-EBADMSG, "{\"\xc0\xaf\":1}"},
    {-EBADMSG, "{\"\xc1\xbf\":1}"},
    {-EBADMSG, "{\"\xe0\x9f\xbf\":1}"},
    {-EBADMSG, "{\"\xf0\x8f\xbf\xbf\":1}"},
    {-EBADMSG, "{\"\xed\xa0\x80\":1}"},
    {-EBADMSG, "{\"\xf4\x90\x80\x80\":1}"},
    {-EBADMSG, "{\"\xf5\x80\x80\x80\":1}"},
    {-EBADMSG, "{\"\xfe\":1}"},
    {-EBADMSG, "{\"\xff\":1}"},
    /* JSON, but the top is no object */
    {-EINVAL, "[]"},
    {-EINVAL, "[{}]"},
    {-EINVAL, "0"},
    {-EINVAL, "-1.5"},
    {-EINVAL, "true"},
    {-EINVAL, "null"},
    {-EINVAL, "\"capabilities\""},
    /* a known name with a value of another type */
    {-EINVAL, "{\"capabilities\":[]}"},
    {-EINVAL, "{\"capabilities\":null}"},
    {-EINVAL, "{\"capabilities\":1}"},
    {-EINVAL, "{\"capabilities\":\"\"}"},
    {-EINVAL, "{\"capabilities\":{\"max_msg_fds\":\"8\"}}"},
    {-EINVAL, "{\"capabilities\":{\"max_msg_fds\":null}}"},
    {-EINVAL, "{\"capabilities\":{\"max_data_xfer_size\":true}}"},
    {-EINVAL, "{\"capabilities\":{\"max_dma_maps\":[65535]}}"},
    {-EINVAL, "{\"capabilities\":{\"pgsizes\":{\"pgsize\":4096}}}"},
    {-EINVAL, "{\"capabilities\":{\"twin_socket\":true}}"},
    {-EINVAL, "{\"capabilities\":{\"twin_socket\":[]}}"},
    {-EINVAL, "{\"capabilities\":{\"twin_socket\":{\"supported\":1}}}"},
    {-EINVAL, "{\"capabilities\":{\"twin_socket\":{\"fd_index\":\"0\"}}}"},
    {-EINVAL, "{\"capabilities\":{\"write_multiple\":1}}"},
    {-EINVAL, "{\"capabilities\":{\"write_multiple\":\"true\"}}"},
    {-EINVAL, "{\"capabilities\":{\"write_multiple\":{}}}"},
    {-EINVAL, "{\"capabilities\":{\"migration\":false}}"},
    {-EINVAL, "{\"capabilities\":{\"migration\":{\"pgsize\":true}}}"},
    {-EINVAL, "{\"capabilities\":{\"max_msg_fds\":\"8\",\"max_msg_fds\":8}}"}, /* a good one doesn't mend it */
    /* a number that is out of range or in another form */
    {-EINVAL, "{\"capabilities\":{\"max_msg_fds\":-1}}"},
    {-EINVAL, "{\"capabilities\":{\"max_msg_fds\":-0}}"},
    {-EINVAL, "{\"capabilities\":{\"max_msg_fds\":8.0}}"},
    {-EINVAL, "{\"capabilities\":{\"max_msg_fds\":8e0}}"},
    {-EINVAL, "{\"capabilities\":{\"max_msg_fds\":4294967296}}"},
    {-EINVAL, "{\"capabilities\":{\"max_dma_maps\":4294967296}}"},
    {-EINVAL, "{\"capabilities\":{\"max_data_xfer_size\":18446744073709551616}}"},
    {-EINVAL, "{\"capabilities\":{\"max_data_xfer_size\":36893488147419103233}}"}, /* 1, if it wrapped */
    {-EINVAL, "{\"capabilities\":{\"pgsizes\":184467440737095516150}}"},
    {-EINVAL, "{\"capabilities\":{\"pgsizes\":1E3}}"},
    {-EINVAL, "{\"capabilities\":{\"twin_socket\":{\"fd_index\":-1}}}"},
    {-EINVAL, "{\"capabilities\":{\"twin_socket\":{\"fd_index\":2147483648}}}"},
    {-EINVAL, "{\"capabilities\":{\"migration\":{\"pgsize\":0.5}}}"},
};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

START_TEST(test_caps_good)
{
    for (size_t i = 0; i < COUNT(good); i++) {
        vfu_caps caps;
        char out[VFU_CAPS_WRITE_MAX];
        ck_assert_msg(parse(good[i].text, strlen(good[i].text), &caps) == 0, "refused: %s", good[i].text);
        ck_assert_int_eq(vfu_caps_write(&caps, out, sizeof out), (int)strlen(good[i].written) + 1);
        ck_assert_str_eq(out, good[i].written);
        /* with its NUL, and with anything behind that */
        ck_assert_int_eq(parse(good[i].text, strlen(good[i].text) + 1, &caps), 0);
        ck_assert_int_eq(vfu_caps_parse(good[i].text, SIZE_MAX, &caps), 0);
    }
}
END_TEST

START_TEST(test_caps_bad)
{
    for (size_t i = 0; i < COUNT(bad); i++) {
        vfu_caps caps;
        int rc = parse(bad[i].text, strlen(bad[i].text), &caps);
        ck_assert_msg(rc == bad[i].rc, "%d instead of %d: %s", rc, bad[i].rc, bad[i].text);
        ck_assert(is_default(&caps));
    }
}
END_TEST

/* The beginning of a text is no text, wherever it is cut: only nothing is, and a text without the spaces that follow it. */
START_TEST(test_caps_cut)
{
    for (size_t i = 0; i < COUNT(good); i++) {
        const char *text = good[i].text;
        size_t whole = strlen(text);
        vfu_caps caps;
        while (strchr(" \t\r\n", text[whole - 1]) != NULL) {
            whole--;
        }
        ck_assert_int_eq(parse(text, 0, &caps), 0);
        for (size_t n = 1; n < whole; n++) {
            ck_assert_int_eq(parse(text, n, &caps), -EBADMSG);
            ck_assert(is_default(&caps));
        }
    }
}
END_TEST

START_TEST(test_caps_defaults)
{
    vfu_caps caps;

    vfu_caps_defaults(&caps);
    ck_assert_uint_eq(caps.present, 0);
    ck_assert_uint_eq(caps.max_msg_fds, 1);
    ck_assert_uint_eq(caps.max_data_xfer_size, 1048576);
    ck_assert_uint_eq(caps.max_dma_maps, 65535);
    ck_assert_uint_eq(caps.pgsizes, 4096);
    ck_assert(!caps.write_multiple && !caps.twin_socket && !caps.migration);
    ck_assert_int_eq(caps.twin_fd_index, -1);

    memset(&caps, 0xff, sizeof caps);
    ck_assert_int_eq(vfu_caps_parse(NULL, 0, &caps), 0);
    ck_assert(is_default(&caps));
    memset(&caps, 0xff, sizeof caps);
    ck_assert_int_eq(vfu_caps_parse(NULL, 100, &caps), 0);
    ck_assert(is_default(&caps));
    memset(&caps, 0xff, sizeof caps);
    ck_assert_int_eq(parse("\0{", 2, &caps), 0);
    ck_assert(is_default(&caps));

    /* what one text says is left alone by the absence of the rest */
    ck_assert_int_eq(parse("{\"capabilities\":{\"pgsizes\":1}}", 30, &caps), 0);
    ck_assert_uint_eq(caps.pgsizes, 1);
    caps.pgsizes = 4096;
    caps.present = 0;
    ck_assert(is_default(&caps));
}
END_TEST

/* {"a": open, depth - 1 times, middle, close as often } */
static int parse_nested(const char *open, const char *middle, const char *close, size_t depth, vfu_caps *caps)
{
    static char text[VFU_CAPS_JSON_MAX + 1];
    size_t n = 0;

    n += (size_t)sprintf(text + n, "{\"a\":");
    for (size_t i = 1; i < depth; i++) {
        n += (size_t)sprintf(text + n, "%s", open);
    }
    n += (size_t)sprintf(text + n, "%s", middle);
    for (size_t i = 1; i < depth; i++) {
        n += (size_t)sprintf(text + n, "%s", close);
    }
    n += (size_t)sprintf(text + n, "}");
    return parse(text, n, caps);
}

START_TEST(test_caps_limits)
{
    static char text[2 * VFU_CAPS_JSON_MAX];
    vfu_caps caps;

    ck_assert_int_eq(parse_nested("[", "1", "]", VFU_CAPS_DEPTH_MAX, &caps), 0);
    ck_assert_int_eq(parse_nested("[", "1", "]", VFU_CAPS_DEPTH_MAX + 1, &caps), -EBADMSG);
    ck_assert_int_eq(parse_nested("{\"a\":", "1", "}", VFU_CAPS_DEPTH_MAX, &caps), 0);
    ck_assert_int_eq(parse_nested("{\"a\":", "1", "}", VFU_CAPS_DEPTH_MAX + 1, &caps), -EBADMSG);
    ck_assert_int_eq(parse_nested("[{\"a\":", "[]", "}]", 8, &caps), 0);
    ck_assert_int_eq(parse_nested("[{\"a\":", "[[]]", "}]", 8, &caps), -EBADMSG);
    ck_assert_int_eq(parse_nested("[", "", "]", 1000, &caps), -EBADMSG);
    ck_assert_int_eq(parse_nested("[[],", "1", "]", VFU_CAPS_DEPTH_MAX - 1, &caps), 0); /* wide isn't deep */

    memset(text, '[', sizeof text);
    ck_assert_int_eq(parse(text, VFU_CAPS_JSON_MAX, &caps), -EBADMSG);
    memset(text, '{', sizeof text);
    ck_assert_int_eq(parse(text, VFU_CAPS_JSON_MAX, &caps), -EBADMSG);
    memset(text, '"', sizeof text);
    ck_assert_int_eq(parse(text, VFU_CAPS_JSON_MAX, &caps), -EBADMSG);

    /* the longest text that is taken, and one byte more; behind a NUL nothing counts */
    memset(text, ' ', sizeof text);
    memcpy(text, "{}", 2);
    ck_assert_int_eq(parse(text, VFU_CAPS_JSON_MAX, &caps), 0);
    ck_assert_int_eq(parse(text, VFU_CAPS_JSON_MAX + 1, &caps), -EMSGSIZE);
    ck_assert(is_default(&caps));
    text[VFU_CAPS_JSON_MAX] = '\0';
    ck_assert_int_eq(parse(text, sizeof text, &caps), 0);
}
END_TEST

START_TEST(test_caps_write)
{
    vfu_caps largest;
    vfu_caps caps;
    vfu_caps again;
    char out[VFU_CAPS_WRITE_MAX];
    char spare[VFU_CAPS_WRITE_MAX + 1];

    memset(&largest, 0, sizeof largest);
    largest.max_msg_fds = UINT32_MAX;
    largest.max_data_xfer_size = UINT64_MAX;
    largest.max_dma_maps = UINT32_MAX;
    largest.pgsizes = UINT64_MAX;
    largest.twin_fd_index = INT32_MAX;
    largest.migration = true;
    largest.migration_pgsize = UINT64_MAX;

    /* every set of fields, with the largest values: what was written reads back the same, and too little room is told */
    for (uint32_t present = 0; present <= 0x7f; present++) {
        int n;
        caps = largest;
        caps.present = present;
        n = vfu_caps_write(&caps, out, sizeof out);
        ck_assert_int_gt(n, 0);
        ck_assert_uint_eq(strlen(out) + 1, (size_t)n);
        ck_assert_int_eq(parse(out, (size_t)n, &again), 0);
        ck_assert_uint_eq(again.present, present);
        ck_assert_int_eq(vfu_caps_write(&again, spare, sizeof spare), n);
        ck_assert_str_eq(spare, out);
        for (size_t cap = 0; cap < (size_t)n; cap++) {
            memset(spare, 'x', sizeof spare);
            ck_assert_int_eq(vfu_caps_write(&caps, spare, cap), -EMSGSIZE);
            ck_assert_int_eq(spare[cap], 'x');
        }
    }
    caps = largest;
    caps.present = 0x7f;
    ck_assert_int_eq(vfu_caps_write(&caps, out, sizeof out), VFU_CAPS_WRITE_MAX);
    caps.present = 0x80;
    ck_assert_int_eq(vfu_caps_write(&caps, out, sizeof out), -EINVAL);
}
END_TEST

/* QEMU takes a VERSION reply of at most 200 bytes: header, version, text. */
START_TEST(test_caps_reply_for_qemu)
{
    vfu_caps caps;
    char out[VFU_CAPS_WRITE_MAX];

    vfu_caps_defaults(&caps);
    caps.present = VFU_CAPS_MAX_MSG_FDS | VFU_CAPS_MAX_DATA_XFER_SIZE | VFU_CAPS_MAX_DMA_MAPS | VFU_CAPS_PGSIZES |
                   VFU_CAPS_WRITE_MULTIPLE | VFU_CAPS_MIGRATION;
    caps.max_msg_fds = 16;
    caps.pgsizes = 0xffffffff000;
    caps.write_multiple = true;
    ck_assert_int_le(16 + 4 + vfu_caps_write(&caps, out, sizeof out), 200);
}
END_TEST

/* xorshift64*: the same sequence everywhere */
static uint64_t random_state;

static uint32_t random_below(uint32_t n)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)((random_state * 0x2545f4914f6cdd1du) >> 33) % n;
}

/* Damaged texts do no harm, and what still parses can be written and read again. */
START_TEST(test_caps_damage)
{
    static const char pieces[] = "{}[]\",:\\u0e-+.tfn19 ";
    unsigned parsed = 0;

    random_state = 0x9e3779b97f4a7c15u;
    for (int round = 0; round < 100000; round++) {
        const char *text = good[random_below((uint32_t)COUNT(good))].text;
        char damaged[512];
        char out[VFU_CAPS_WRITE_MAX];
        size_t n = strlen(text);
        vfu_caps caps;
        vfu_caps again;
        int written;

        memcpy(damaged, text, n);
        for (uint32_t i = 1 + random_below(3); i > 0; i--) {
            size_t at = random_below((uint32_t)n);
            switch (random_below(4)) {
            case 0:
                damaged[at] = (char)random_below(256);
                break;
            case 1:
                damaged[at] = pieces[random_below((uint32_t)sizeof pieces - 1)];
                break;
            case 2:
                memmove(damaged + at, damaged + at + 1, n - at - 1);
                n--;
                break;
            default:
                memmove(damaged + at + 1, damaged + at, n - at);
                n++;
                break;
            }
            if (n == 0) {
                break;
            }
        }
        if (parse(damaged, n, &caps) != 0) {
            ck_assert(is_default(&caps));
            continue;
        }
        parsed++;
        written = vfu_caps_write(&caps, out, sizeof out);
        ck_assert_int_gt(written, 0);
        ck_assert_int_eq(parse(out, (size_t)written, &again), 0);
        ck_assert(same(&caps, &again));
    }
    ck_assert_uint_gt(parsed, 1000); /* or the test would say nothing */
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("capabilities");
    TCase *tc = tcase_create("capabilities");
    SRunner *runner;
    int failed;

    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, test_caps_good);
    tcase_add_test(tc, test_caps_bad);
    tcase_add_test(tc, test_caps_cut);
    tcase_add_test(tc, test_caps_defaults);
    tcase_add_test(tc, test_caps_limits);
    tcase_add_test(tc, test_caps_write);
    tcase_add_test(tc, test_caps_reply_for_qemu);
    tcase_add_test(tc, test_caps_damage);
    suite_add_tcase(suite, tc);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
