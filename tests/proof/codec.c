/* SPDX-License-Identifier: MIT */
/*
 * Proofs of the codec. Those for one command: CMD is its number, FIXED the size of the fixed part of its payload, TAIL the largest
 * number of bytes behind that, and FIRST the smallest but 0.
 */
#include "proof.h"

#define VFU_IMPLEMENTATION
#define VFU_CODEC_ONLY
#define VFU_STATIC
#include "vfu.h"

#ifndef CMD
#define CMD VFU_CMD_DEVICE_RESET
#endif
#ifndef FIXED
#define FIXED 0
#endif
#ifndef TAIL
#define TAIL 0
#endif
#ifndef FIRST
#define FIRST 0
#endif
#ifndef LONGEST
#define LONGEST 64
#endif

/* Does what follows for the view that messages of this command have, if they have one. */
#define WITH_VIEW(DO)                                            \
    switch (CMD) {                                               \
    case VFU_CMD_VERSION: DO(version.json, version.json_len)     \
    case VFU_CMD_DMA_UNMAP: DO(dma_unmap.data, dma_unmap.data_len) \
    case VFU_CMD_DEVICE_GET_REGION_INFO: DO(region_info.data, region_info.data_len) \
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS: DO(region_io_fds.data, region_io_fds.data_len) \
    case VFU_CMD_DEVICE_SET_IRQS: DO(irq_set.data, irq_set.data_len) \
    case VFU_CMD_REGION_READ:                                    \
    case VFU_CMD_REGION_WRITE: DO(region.data, region.data_len)  \
    case VFU_CMD_DMA_READ:                                       \
    case VFU_CMD_DMA_WRITE: DO(dma.data, dma.data_len)           \
    case VFU_CMD_REGION_WRITE_MULTI: DO(write_multi.data, write_multi.data_len) \
    case VFU_CMD_DEVICE_FEATURE: DO(feature.data, feature.data_len) \
    case VFU_CMD_MIG_DATA_READ:                                  \
    case VFU_CMD_MIG_DATA_WRITE: DO(mig_data.data, mig_data.data_len) \
    default: break;                                              \
    }

/* The view and its length; NULL: none. */
static const uint8_t *view(const vfu_msg *m, uint32_t *len)
{
#define GET(data, data_len) *len = m->u.data_len; return (const uint8_t *)m->u.data;
    WITH_VIEW(GET)
#undef GET
    *len = 0;
    return NULL;
}

static void set_view(vfu_msg *m, const void *bytes, uint32_t len)
{
#define SET(data, data_len) m->u.data_len = len; m->u.data = bytes; return;
    WITH_VIEW(SET)
#undef SET
}

/* Two messages say the same, as far as it is encoded. */
static void prove_same(vfu_msg *a, vfu_msg *b)
{
#define SAME(field) PROVE(a->field == b->field)
    bool reply = vfu_msg_is_reply(a);
    SAME(id);
    SAME(cmd);
    SAME(flags);
    SAME(error);
    if (vfu_msg_is_error(a))
        return;
    switch (CMD) {
    case VFU_CMD_VERSION:
        SAME(u.version.major);
        SAME(u.version.minor);
        break;
    case VFU_CMD_DMA_MAP:
        if (reply)
            return;
        SAME(u.dma_map.argsz);
        SAME(u.dma_map.flags);
        SAME(u.dma_map.offset);
        SAME(u.dma_map.address);
        SAME(u.dma_map.size);
        break;
    case VFU_CMD_DMA_UNMAP:
        SAME(u.dma_unmap.argsz);
        SAME(u.dma_unmap.flags);
        SAME(u.dma_unmap.address);
        SAME(u.dma_unmap.size);
        break;
    case VFU_CMD_DEVICE_GET_INFO:
        SAME(u.device_info.argsz);
        SAME(u.device_info.flags);
        SAME(u.device_info.num_regions);
        SAME(u.device_info.num_irqs);
        break;
    case VFU_CMD_DEVICE_GET_REGION_INFO:
        SAME(u.region_info.argsz);
        SAME(u.region_info.flags);
        SAME(u.region_info.index);
        SAME(u.region_info.cap_offset);
        SAME(u.region_info.size);
        SAME(u.region_info.offset);
        break;
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS:
        SAME(u.region_io_fds.argsz);
        SAME(u.region_io_fds.flags);
        SAME(u.region_io_fds.index);
        SAME(u.region_io_fds.count);
        break;
    case VFU_CMD_DEVICE_GET_IRQ_INFO:
        SAME(u.irq_info.argsz);
        SAME(u.irq_info.flags);
        SAME(u.irq_info.index);
        SAME(u.irq_info.count);
        break;
    case VFU_CMD_DEVICE_SET_IRQS:
        if (reply)
            return;
        SAME(u.irq_set.argsz);
        SAME(u.irq_set.flags);
        SAME(u.irq_set.index);
        SAME(u.irq_set.start);
        SAME(u.irq_set.count);
        break;
    case VFU_CMD_REGION_READ:
    case VFU_CMD_REGION_WRITE:
        SAME(u.region.offset);
        SAME(u.region.region);
        SAME(u.region.count);
        break;
    case VFU_CMD_DMA_READ:
    case VFU_CMD_DMA_WRITE:
        if (reply && CMD == VFU_CMD_DMA_WRITE) {
            SAME(u.dma.ack_len);
            if (a->u.dma.ack_len == 0)
                return;
        }
        SAME(u.dma.address);
        SAME(u.dma.count);
        SAME(u.dma.legacy);
        break;
    case VFU_CMD_REGION_WRITE_MULTI: SAME(u.write_multi.count); break;
    case VFU_CMD_DEVICE_FEATURE:
        SAME(u.feature.argsz);
        SAME(u.feature.flags);
        break;
    case VFU_CMD_MIG_DATA_READ:
    case VFU_CMD_MIG_DATA_WRITE:
        if (reply && CMD == VFU_CMD_MIG_DATA_WRITE)
            return;
        SAME(u.mig_data.argsz);
        SAME(u.mig_data.size);
        break;
    default: break;
    }
    uint32_t a_len, b_len;
    const uint8_t *a_data = view(a, &a_len), *b_data = view(b, &b_len);
    PROVE(a_len == b_len);
    if (a_len != 0) {
        size_t any = up_to(a_len - 1);
        PROVE(a_data[any] == b_data[any]);
    }
#undef SAME
}

/*
 * Any bytes whatever as the payload of this command or of its reply, len with the header. What decodes has its view inside these
 * bytes, and can be encoded. How the header may be wrong is for misframed().
 */
static void decode_bytes(size_t len)
{
    uint8_t *bytes = any_memory(len), out[VFU_MSG_HEAD_MAX];
    const uint16_t cmd = CMD;
    const uint32_t size = (uint32_t)len;
    memcpy(bytes + offsetof(vfu_wire_header, cmd), &cmd, sizeof cmd);
    memcpy(bytes + offsetof(vfu_wire_header, size), &size, sizeof size);
    vfu_msg m;
    uint32_t view_len;
    int rc = vfu_msg_decode_dma(bytes, len, (vfu_dma_layout)up_to(2), &m);
    PROVE(rc == 0 || rc == -EINVAL || (rc == -EBADMSG && (m.flags & VFU_HDR_TYPE_MASK) > VFU_HDR_REPLY));
    if (rc < 0)
        return;
    const uint8_t *data = view(&m, &view_len);
    if (data) {
        PROVE(__CPROVER_same_object(data, bytes));
        PROVE(data >= bytes && data <= bytes + len && view_len <= len - (size_t)(data - bytes));
    }
    PROVE(vfux_contents_valid(&m));
    if (CMD == VFU_CMD_VERSION) /* whose text belongs to the head: see encode */
        return;
    rc = vfu_msg_encode_head(&m, out, sizeof out);
    if (CMD == VFU_CMD_DMA_READ || CMD == VFU_CMD_DMA_WRITE)
        PROVE(rc >= (int)VFU_HDR_SIZE || (rc == -EINVAL && m.u.dma.legacy && m.u.dma.data_len < 4));
    else
        PROVE(rc >= (int)VFU_HDR_SIZE);
}

void decode(void)
{
    EACH(behind, FIXED + TAIL)
        decode_bytes(VFU_HDR_SIZE + behind);
}

/* Any bytes whose header doesn't give their number, or which are shorter than a header. */
void misframed(void)
{
    vfu_msg m;
    size_t len = up_to(LONGEST);
    uint8_t *bytes = any_memory(len);
    uint32_t size;
    if (len >= VFU_HDR_SIZE) {
        memcpy(&size, bytes + offsetof(vfu_wire_header, size), sizeof size);
        ASSUME(size != len);
    }
    PROVE(vfu_msg_decode_dma(bytes, len, (vfu_dma_layout)up_to(2), &m) == -EBADMSG);
}

/* A message that was encoded decodes to the same, if it has this size. */
static void prove_decodes(vfu_msg *m, const uint8_t *encoded, size_t size)
{
    uint8_t *bytes = any_memory(size);
    vfu_msg again;
    /* What is known of the header by now is written once more as constants, which keeps the proof small. */
    const vfu_wire_header header = {m->id, CMD, (uint32_t)size, m->flags, m->error};
    vfu_wire_header sent;
    memcpy(&sent, encoded, sizeof sent);
    PROVE(sent.id == header.id && sent.cmd == header.cmd && sent.size == header.size && sent.flags == header.flags &&
          sent.error == header.error);
    memcpy(bytes, encoded, size);
    memcpy(bytes + offsetof(vfu_wire_header, cmd), &header.cmd, sizeof header.cmd + sizeof header.size + sizeof header.flags);
    PROVE(vfu_msg_decode_dma(bytes, size, m->u.dma.legacy ? VFU_DMA_LAYOUT_QEMU10 : VFU_DMA_LAYOUT_SPEC, &again) == 0);
    prove_same(m, &again);
}

/* Any message with these flags and data_len bytes of data. */
static void encode_message(uint32_t flags, uint32_t data_len)
{
    vfu_msg m;
    uint8_t out[16 + FIXED + TAIL + 4];
    m.cmd = CMD;
    m.flags = flags;
    if (CMD == VFU_CMD_DMA_READ || CMD == VFU_CMD_DMA_WRITE)
        m.u.dma.legacy = nondet_bool(); /* never anything but 0 or 1 */
    set_view(&m, data_len == 0 && nondet_bool() ? NULL : any_memory(data_len), data_len);
    const size_t whole = VFU_HDR_SIZE + FIXED + data_len;
    int size = vfu_msg_encode(&m, out, sizeof out);
    if (size == VFU_HDR_SIZE)
        prove_decodes(&m, out, VFU_HDR_SIZE);
    else if (size == (int)whole)
        prove_decodes(&m, out, whole);
    else if (CMD == VFU_CMD_VERSION && size == (int)whole + 1)
        prove_decodes(&m, out, whole + 1);
    else if (CMD == VFU_CMD_DMA_WRITE && size == VFU_HDR_SIZE + 12)
        prove_decodes(&m, out, VFU_HDR_SIZE + 12);
    else
        PROVE(size == -EINVAL);
}

void encode(void)
{
    EACH(len, TAIL)
        if (len == 0 || len >= FIRST) {
            if (nondet_bool())
                encode_message(VFU_HDR_COMMAND, (uint32_t)len);
            else
                encode_message(VFU_HDR_REPLY, (uint32_t)len);
        }
}

/* The header, with any flags and any command, known or not; and the size that framing takes from it. */
void header(void)
{
    vfu_msg m, again;
    uint8_t out[VFU_HDR_SIZE];
    uint32_t size, max = nondet_u32();
    ASSUME(m.cmd == VFU_CMD_DEVICE_RESET || vfu_msg_is_error(&m));
    int rc = vfu_msg_encode(&m, out, sizeof out);
    PROVE(rc == ((m.flags & VFU_HDR_TYPE_MASK) > VFU_HDR_REPLY ? -EINVAL : (int)sizeof out));
    if (rc < 0)
        return;
    PROVE(vfu_msg_size(out, sizeof out, max, &size) == (max < sizeof out ? -EBADMSG : 0) && (max < sizeof out || size == 16));
    PROVE(vfu_msg_decode(out, sizeof out, &again) == (vfux_cmd_known(m.cmd) ? 0 : -ENOSYS));
    PROVE(again.id == m.id && again.cmd == m.cmd && again.flags == m.flags && again.error == m.error);
}

/* Any bytes as the header of a message of a command that doesn't exist. */
void unknown(void)
{
    uint8_t bytes[VFU_HDR_SIZE + 4];
    vfu_msg m;
    uint16_t cmd;
    uint32_t size, max = nondet_u32();
    memcpy(&cmd, bytes + 2, sizeof cmd);
    ASSUME(!vfux_cmd_known(cmd));
    int rc = vfu_msg_decode(bytes, sizeof bytes, &m);
    PROVE(rc == -ENOSYS || rc == -EBADMSG);
    PROVE(m.cmd == cmd);
    PROVE(vfu_msg_size(bytes, up_to(VFU_HDR_SIZE - 1), max, &size) == -EAGAIN);
    rc = vfu_msg_size(bytes, sizeof bytes, max, &size);
    PROVE(rc == -EBADMSG || (rc == 0 && size >= VFU_HDR_SIZE && size <= max));
}

/* Entries of arrays in any message, also in one that was never decoded, for any index. */
static void entries_of(uint32_t data_len)
{
    vfu_msg m;
    vfu_wire_write_one one;
    vfu_wire_sub_region sub;
    const uint8_t *data = nondet_bool() ? NULL : any_memory(data_len);
    if (nondet_bool()) {
        m.cmd = VFU_CMD_REGION_WRITE_MULTI;
        m.u.write_multi.data = data;
        m.u.write_multi.data_len = data_len;
        int rc = vfu_msg_write_one(&m, nondet_u64(), &one);
        PROVE(rc == -EINVAL || (rc == 0 && one.count <= sizeof one.data));
    } else {
        m.cmd = VFU_CMD_DEVICE_GET_REGION_IO_FDS;
        m.u.region_io_fds.data = data;
        m.u.region_io_fds.data_len = data_len;
        int rc = vfu_msg_sub_region(&m, nondet_u32(), &sub);
        PROVE(rc == -EINVAL || rc == 0);
    }
}

void entries(void)
{
    EACH(len, TAIL)
        entries_of((uint32_t)len);
}

/* The capability chain of any message, also of one that was never decoded: it ends, and what it gives is inside the data. */
static void chain_of(uint32_t data_len)
{
    vfu_msg m;
    vfu_region_cap cap = {0, 0, NULL, 0, 0};
    vfu_wire_sparse_area area;
    vfu_wire_cap_type type;
    uint32_t areas = 0, steps = 0;
    const uint8_t *data = any_memory(data_len);
    m.cmd = VFU_CMD_DEVICE_GET_REGION_INFO;
    m.u.region_info.data = nondet_bool() ? NULL : data;
    m.u.region_info.data_len = data_len;
    while (vfu_msg_next_cap(&m, &cap)) {
        steps++;
        PROVE(cap.data >= data && cap.data <= data + data_len && cap.data_len <= data_len - (size_t)(cap.data - data));
        bool sparse = vfu_region_cap_areas(&cap, &areas) == 0;
        uint32_t i = nondet_u32();
        PROVE((vfu_region_cap_area(&cap, i, &area) == 0) == (sparse && i < areas));
        PROVE(!(vfu_region_cap_type(&cap, &type) == 0 && sparse));
    }
    PROVE(steps <= data_len / sizeof(vfu_wire_cap_header));
}

void chain(void)
{
    EACH(len, TAIL)
        chain_of((uint32_t)len);
}

/* A chain that the writer makes is what the reader finds. */
void chain_made(void)
{
    vfu_msg m;
    vfu_region_cap cap = {0, 0, NULL, 0, 0};
    vfu_wire_cap_type type, type_read;
    vfu_wire_sparse_area areas[2], area;
    uint8_t buf[64];
    uint32_t count = (uint32_t)up_to(2), found = 0, argsz = nondet_u32();
    bool with_type = nondet_bool();
    size_t room = up_to(sizeof buf);
    vfu_msg_init(&m, 0, VFU_CMD_DEVICE_GET_REGION_INFO);
    m.flags = VFU_HDR_REPLY;
    int rc = vfu_msg_set_region_caps(&m, argsz, with_type ? &type : NULL, areas, count, buf, room);
    uint32_t need = (with_type ? 16 : 0) + (count != 0 ? 16 + 16 * count : 0);
    PROVE(rc == (argsz < 32 ? -EINVAL : need > room ? -EMSGSIZE : 0));
    if (rc < 0)
        return;
    PROVE(m.u.region_info.argsz == 32 + need && m.u.region_info.truncated == (argsz < 32 + need));
    if (m.u.region_info.truncated || need == 0) {
        PROVE(!vfu_msg_next_cap(&m, &cap) && m.u.region_info.data_len == 0);
        return;
    }
    if (with_type) {
        PROVE(vfu_msg_next_cap(&m, &cap) && vfu_region_cap_type(&cap, &type_read) == 0);
        PROVE(type_read.type == type.type && type_read.subtype == type.subtype);
    }
    if (count != 0) {
        uint32_t i = (uint32_t)up_to(count - 1);
        PROVE(vfu_msg_next_cap(&m, &cap) && vfu_region_cap_areas(&cap, &found) == 0 && found == count);
        PROVE(vfu_region_cap_area(&cap, i, &area) == 0 && area.offset == areas[i].offset && area.size == areas[i].size);
    }
    PROVE(!vfu_msg_next_cap(&m, &cap));
}

/* The payloads of FEATURE: any bytes as any of them. */
static void features_of(uint32_t data_len)
{
    vfu_msg m;
    vfu_wire_feature_migration migration;
    vfu_wire_feature_mig_state state;
    vfu_wire_feature_log_control control;
    vfu_wire_feature_log_range range;
    vfu_wire_feature_log_report report;
    const uint8_t *bitmap;
    uint32_t bitmap_len, i = nondet_u32();
    m.cmd = VFU_CMD_DEVICE_FEATURE;
    m.u.feature.data = any_memory(data_len);
    m.u.feature.data_len = data_len;
    PROVE(vfu_feature_migration(&m, &migration) == -EINVAL || data_len >= sizeof migration);
    PROVE(vfu_feature_mig_state(&m, &state) == -EINVAL || data_len >= sizeof state);
    if (vfu_feature_log_control(&m, &control) == 0)
        PROVE((vfu_feature_log_range(&m, i, &range) == 0) == (i < control.num_ranges));
    else
        PROVE(vfu_feature_log_range(&m, i, &range) == -EINVAL);
    if (vfu_feature_log_report(&m, &report, &bitmap, &bitmap_len) == 0)
        PROVE(bitmap == m.u.feature.data + sizeof report && bitmap_len == data_len - sizeof report);
}

void features(void)
{
    EACH(len, TAIL)
        features_of((uint32_t)len);
}

/* What the writers of FEATURE make, the readers read. */
void features_made(void)
{
    vfu_msg m;
    uint8_t buf[48];
    size_t room = up_to(sizeof buf);
    m.cmd = VFU_CMD_DEVICE_FEATURE;
    m.flags = nondet_bool() ? VFU_HDR_REPLY : VFU_HDR_COMMAND;
    if (nondet_bool()) {
        vfu_wire_feature_mig_state in, out;
        if (vfu_feature_set_mig_state(&m, &in, buf, room) == 0) {
            PROVE(vfu_feature_mig_state(&m, &out) == 0 && out.state == in.state && out.data_fd == in.data_fd);
            PROVE(m.u.feature.argsz == 16 && room >= 8);
        }
    } else if (nondet_bool()) {
        vfu_wire_feature_migration in, out;
        if (vfu_feature_set_migration(&m, &in, buf, room) == 0)
            PROVE(vfu_feature_migration(&m, &out) == 0 && out.flags == in.flags && room >= 8);
    } else {
        vfu_wire_feature_log_control in, out;
        vfu_wire_feature_log_range ranges[1], range;
        in.num_ranges = nondet_bool();
        if (vfu_feature_set_log_control(&m, &in, ranges, buf, room) == 0) {
            PROVE(vfu_feature_log_control(&m, &out) == 0 && out.page_size == in.page_size && out.num_ranges == in.num_ranges);
            if (in.num_ranges == 1)
                PROVE(vfu_feature_log_range(&m, 0, &range) == 0 && range.iova == ranges[0].iova &&
                      range.length == ranges[0].length);
        }
    }
}
