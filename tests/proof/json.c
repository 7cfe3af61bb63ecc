/* SPDX-License-Identifier: MIT */
/*
 * Proofs of the JSON of VERSION: its parser takes text from the peer, so nothing is assumed of a byte, nor of where in the text a
 * step begins, nor of the containers that are open.
 */
#include "proof.h"

#define VFU_IMPLEMENTATION
#define VFU_CODEC_ONLY
#define VFU_STATIC
#include "vfu.h"

#ifndef LENGTH
#define LENGTH 4
#endif

/* A parser at any place of any text of LENGTH bytes, in any state that vfu_caps_parse can bring it to. */
static vfu_caps caps;
static const uint8_t *text;

static vfux_json any_parser(void)
{
    vfux_json j;
    text = any_memory(LENGTH);
    j.at = text + up_to(LENGTH);
    j.end = text + LENGTH;
    j.caps = &caps;
    j.mismatch = nondet_bool();
    ASSUME(j.depth <= VFU_CAPS_DEPTH_MAX && j.name_len <= VFUX_JSON_NAME_MAX);
    return j;
}

/* What every step keeps: it stays in the text and never goes back. */
static void prove_parser(const vfux_json *j, const uint8_t *from)
{
    PROVE(j->at >= from && j->at <= j->end && j->end == text + LENGTH);
    PROVE(j->depth <= VFU_CAPS_DEPTH_MAX && j->name_len <= VFUX_JSON_NAME_MAX);
}

/* One string, anywhere: it stays in the text, and a good one ends behind its second quote. */
void string(void)
{
    vfux_json j = any_parser();
    const uint8_t *from = j.at;
    bool good = vfux_json_string(&j);
    prove_parser(&j, from);
    PROVE(!good || (j.at - from >= 2 && *from == '"' && j.at[-1] == '"'));
}

/* One number, anywhere. */
void number(void)
{
    vfux_json j = any_parser();
    const uint8_t *from = j.at;
    uint64_t value;
    bool plain;
    bool good = vfux_json_number(&j, &value, &plain);
    prove_parser(&j, from);
    PROVE(!good || j.at > from);
}

/* A plain number has the value that its digits say, and has nothing but digits. */
void digits(void)
{
    vfux_json j = any_parser();
    const uint8_t *from = j.at;
    uint64_t value, sum = 0;
    bool plain;
    if (!vfux_json_number(&j, &value, &plain) || !plain)
        return;
    for (const uint8_t *p = from; p < j.at; p++) {
        PROVE(*p >= '0' && *p <= '9');
        sum = sum * 10 + (uint64_t)(*p - '0');
    }
    PROVE(sum == value && (j.at == j.end || *j.at < '0' || *j.at > '9' || *from == '0'));
}

/* A value that is no container, of any kind, for any place. */
void scalar(void)
{
    vfux_json j = any_parser();
    const uint8_t *from = j.at;
    ASSUME(from < j.end);
    bool good = vfux_json_scalar(&j, (vfux_json_place)up_to(VFUX_JSON_UNKNOWN));
    prove_parser(&j, from);
    PROVE(!good || j.at > from);
}

/* Any name in any open container is looked up: one of another place than where it is known is unknown. */
void lookup(void)
{
    vfux_json j = any_parser();
    ASSUME(j.depth > 0);
    vfux_json_place place = vfux_json_lookup(&j);
    PROVE(place == VFUX_JSON_UNKNOWN || (place > VFUX_JSON_TOP && place < VFUX_JSON_UNKNOWN));
    PROVE(place == VFUX_JSON_UNKNOWN || j.stack[j.depth - 1] <= VFUX_JSON_MIGRATION);
}

/*
 * The document, however it is nested, from any place in it on. What is proved of strings, scalars and names above is taken for
 * granted here: calls of them are replaced (run.sh) by what does anything for which that holds.
 */
static void go_on(vfux_json *j, size_t least)
{
    PROVE(j->at <= j->end && j->depth <= VFU_CAPS_DEPTH_MAX);
    size_t n = up_to((size_t)(j->end - j->at));
    ASSUME(n >= least);
    j->at += n;
}

bool any_string(vfux_json *j)
{
    bool good = nondet_bool();
    j->name_len = up_to(VFUX_JSON_NAME_MAX);
    go_on(j, good ? 2 : 0);
    return good;
}

bool any_scalar(vfux_json *j, vfux_json_place place)
{
    bool good = nondet_bool();
    PROVE(j->at < j->end && place >= VFUX_JSON_TOP && place <= VFUX_JSON_UNKNOWN);
    go_on(j, good ? 1 : 0);
    return good;
}

vfux_json_place any_lookup(const vfux_json *j)
{
    vfux_json_place place = (vfux_json_place)up_to(VFUX_JSON_UNKNOWN);
    PROVE(j->depth > 0);
    ASSUME(place > VFUX_JSON_TOP);
    ASSUME(place == VFUX_JSON_UNKNOWN || j->stack[j->depth - 1] <= VFUX_JSON_MIGRATION);
    return place;
}

void document(void)
{
    vfux_json j = any_parser();
    const uint8_t *from = j.at;
    bool good = vfux_json_document(&j);
    prove_parser(&j, from);
    PROVE(!good || (j.at == j.end && j.depth == 0));
}
